"""Probabilities of many token sequences after a context, in one forward: tree scoring.

An item is the context followed by the trie's nodes. Each node looks at the context and at its ancestors (Cai et al.
2024, Medusa; Miao et al. 2024, SpecInfer use the same mask to verify drafts) and stands at position context length +
depth. No padding is computed, and every beginning that contexts have in common just once (see `cells`). The head is
applied to the context's last token and the nodes, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.attend import Layout
from harness.models.cells import shared_cells
from harness.models.load import LM
from harness.text.words import Trie

_HEAD_ROWS = 256
"""Rows whose whole distribution stands in memory at once: 256 × 152k float32 logits are 150 MB."""
_SLICE_ROWS = 2_048
"""Rows that a slice of the vocabulary is computed for at once."""
_SLICE_OF_CPU, _SLICE_OF_GPU = 2**21, 2**26
"""Logits in a slice of the vocabulary for such rows: 8 MB, which stay in a CPU's cache, or few launches on a GPU."""


@dataclass(frozen=True)
class TreeScores:
    """What the model says after one context. Natural logarithms, computed in float32 from the model's logits.

    `logprobs[j]` is the log-probability of the trie's sequence j; `word_end[j]` the log-mass of next tokens that end
    a word after it (NaN where the trie does not hold the sequence whole). `entropy` (nats) and the top tokens are of
    the first step.
    """

    logprobs: np.ndarray
    word_end: np.ndarray
    entropy: float
    top_ids: np.ndarray
    top_probs: np.ndarray


def row_length(context: Sequence[int], trie: Trie) -> int:
    """Tokens forwarded for one item."""
    return len(context) + len(trie)


@torch.inference_mode()
def score_trees(
    lm: LM, contexts: Sequence[Sequence[int]], tries: Sequence[Trie], top_k: int = 10
) -> list[TreeScores | ItemFailed]:
    """Scores of every trie's sequences after its context, one forward for the whole batch.

    An item whose logits are not finite, or which is longer than the model reaches, comes back as ItemFailed.
    """
    results: list[TreeScores | ItemFailed | None] = [_too_long(lm, c, t) for c, t in zip(contexts, tries, strict=True)]
    kept = [i for i, failed in enumerate(results) if failed is None]
    if kept:
        scores = _score(lm, [contexts[i] for i in kept], [tries[i] for i in kept], top_k)
        for i, score in zip(kept, scores, strict=True):
            results[i] = score
        # A masked NaN is still a NaN (0 × NaN), so an item may have caught it from a neighbour in its row.
        bad = [i for i in kept if isinstance(results[i], NotFinite)]
        if bad and len(kept) > 1:
            apart = _score(lm, [contexts[i] for i in bad], [tries[i] for i in bad], top_k, is_apart=True)
            for i, score in zip(bad, apart, strict=True):
                results[i] = score
    return [r for r in results if r is not None]


def _too_long(lm: LM, context: Sequence[int], trie: Trie) -> ItemFailed | None:
    reach = len(context) + max(trie.depths, default=-1) + 1
    if not context:
        return ItemFailed("expected a context of at least one token, found none")
    if reach > lm.max_positions:
        return ItemFailed(f"needs {reach} positions, the model has {lm.max_positions}; shorten the prompt")
    return None


def _score(
    lm: LM, contexts: Sequence[Sequence[int]], tries: Sequence[Trie], top_k: int, is_apart: bool = False
) -> list[TreeScores | ItemFailed]:
    tokens, layout = tree_batch(contexts, tries, lm.device, is_apart)
    num_tokens, num_nodes = len(layout.cells or tokens), sum(map(len, tries))
    with tally.prefilling(1 - num_nodes / num_tokens):
        hidden = lm.hidden(tokens, layout)
    # What the head is applied to: per item its last context token, then its nodes.
    where = [
        (r, len(c) - 1 + i) for r, (c, t) in enumerate(zip(contexts, tries, strict=True)) for i in range(1 + len(t))
    ]
    row, column = torch.tensor(where, device=lm.device).T
    return read_trees(lm, hidden[row, column], tries, top_k)


def read_trees(
    lm: LM, rows: Float[Tensor, "N D"], tries: Sequence[Trie], top_k: int = 10
) -> list[TreeScores | ItemFailed]:
    """Scores of tries whose rows were forwarded already: per trie its context's last token, then its nodes."""
    starts = np.cumsum([0] + [1 + len(t) for t in tries])
    picks, pick_of = _picks(tries, starts)
    first = torch.tensor(starts[:-1], device=lm.device)
    is_end = np.zeros(rows.shape[0], dtype=bool)
    for start, trie in zip(starts, tries, strict=False):
        is_end[[start + 1 + node for node in trie.ends if node >= 0]] = True
    ends = torch.from_numpy(is_end).to(lm.device)
    picked, word_end, entropy, top_ids, top_probs, finite = _read(lm, rows, picks.to(lm.device), first, ends, top_k)
    results: list[TreeScores | ItemFailed] = []
    for i, trie in enumerate(tries):
        if not bool(finite[starts[i] : starts[i + 1]].all()):
            results.append(NotFinite(NOT_FINITE))
            continue
        logprobs = np.array([picked[pick_of[i][j]].sum() for j in range(len(trie.sequences))], dtype=np.float64)
        ended = np.array([word_end[starts[i] + 1 + e] if e >= 0 else np.nan for e in trie.ends], dtype=np.float64)
        results.append(TreeScores(logprobs, ended, float(entropy[i]), top_ids[i], top_probs[i]))
    return results


def tree_batch(
    contexts: Sequence[Sequence[int]], tries: Sequence[Trie], device: torch.device, is_apart: bool = False
) -> tuple[Int[Tensor, "R T"], Layout]:
    """Tokens [R, T] of contexts, each with its trie's nodes behind it, and the layout that makes each row a tree.

    A beginning that contexts have in common is computed once; with `is_apart` nothing is shared.
    """
    lengths = [row_length(c, t) for c, t in zip(contexts, tries, strict=True)]
    rows, width = len(lengths), max(lengths)
    tokens = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((rows, width), dtype=np.int64)
    # Padding sees itself, so that no row of the mask is empty; nothing else sees padding.
    allowed = np.broadcast_to(np.eye(width, dtype=bool), (rows, width, width)).copy()
    for r, (end, context, trie) in enumerate(zip(lengths, contexts, tries, strict=True)):
        n = len(context)
        tokens[r, :n], tokens[r, n:end] = context, trie.tokens
        positions[r, :n], positions[r, n:end] = np.arange(n), n + np.asarray(trie.depths, dtype=np.int64)
        allowed[r, :end, :n] = np.tri(end, n, dtype=bool)
        allowed[r, n:end, n:end] = trie.ancestry()
    at = torch.from_numpy(positions).to(device)
    cells = shared_cells(contexts, [len(t) for t in tries], device, is_apart)
    return torch.from_numpy(tokens).to(device), Layout(at, at, torch.from_numpy(allowed).to(device), cells=cells)


def _picks(tries: Sequence[Trie], starts: np.ndarray) -> tuple[Int[Tensor, "P 2"], list[list[np.ndarray]]]:
    """Every (head row, token) whose log-probability is needed, and for each sequence where its own stand in that list."""
    index: dict[tuple[int, int], int] = {}
    pick_of = [
        [
            np.array([index.setdefault((int(starts[i]) + 1 + node, token), len(index)) for node, token in steps])
            for steps in trie.steps
        ]
        for i, trie in enumerate(tries)
    ]
    return torch.tensor(list(index), dtype=torch.long).reshape(-1, 2), pick_of


def _read(
    lm: LM,
    rows: Float[Tensor, "N D"],
    picks: Int[Tensor, "P 2"],
    first: Int[Tensor, " B"],
    is_end: Bool[Tensor, " N"],
    top_k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The numbers wanted of each row; the full [N, V] logits never stand in memory.

    Only of the first rows a whole distribution is needed. Of the others, mostly all, it is a few tokens and the sum, for
    which the vocabulary is gone through a slice at a time: head and all passes over it then stay within a CPU's cache.
    """
    num_rows, top_k = rows.shape[0], min(top_k, lm.vocabulary.ends_word.size)
    device = rows.device
    ends_word: Bool[Tensor, " V"] = torch.from_numpy(lm.vocabulary.ends_word).to(device)
    picked = torch.empty(picks.shape[0], dtype=torch.float64, device=device)
    word_end = torch.full((num_rows,), torch.nan, dtype=torch.float64, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    entropy = torch.empty(first.shape[0], dtype=torch.float64, device=device)
    top_ids = torch.empty(first.shape[0], top_k, dtype=torch.long, device=device)
    top_probs = torch.empty(first.shape[0], top_k, dtype=torch.float64, device=device)
    place = torch.full((num_rows,), -1, dtype=torch.long, device=device)  # of a row among those looked at now
    for some in torch.arange(len(first), device=device).split(_HEAD_ROWS):
        mine = first[some]
        log_p = lm.logits(rows[mine]).log_softmax(-1)
        place.fill_(-1)[mine] = torch.arange(len(mine), device=device)
        at = place[picks[:, 0]]
        picked[at >= 0] = log_p[at[at >= 0], picks[at >= 0, 1]].double()
        finite[mine] = log_p.sum(-1).isfinite()
        entropy[some] = -(log_p.exp() * log_p).sum(-1).double()
        values, ids = log_p.topk(top_k, dim=-1)
        top_ids[some], top_probs[some] = ids, values.exp().double()
    is_first = torch.zeros(num_rows, dtype=torch.bool, device=device)
    is_first[first] = True
    others = (~is_first).nonzero()[:, 0]
    for mine in others.split(_SLICE_ROWS) if len(others) else ():
        place.fill_(-1)[mine] = torch.arange(len(mine), device=device)
        at = place[picks[:, 0]]
        ended = is_end[mine].nonzero()[:, 0]
        sums, sums_of_ends, total = [], [], torch.zeros(len(mine), dtype=torch.float64, device=device)
        width = max(1, (_SLICE_OF_CPU if device.type == "cpu" else _SLICE_OF_GPU) // len(mine))
        for begin in range(0, len(ends_word), width):
            some = slice(begin, begin + width)
            logits = lm.logits(rows[mine], some)
            here = (at >= 0) & (picks[:, 1] >= begin) & (picks[:, 1] < begin + width)
            picked[here] = logits[at[here], picks[here, 1] - begin].double()
            total += logits.sum(-1)
            sums.append(logits.logsumexp(-1))
            if len(ended):
                sums_of_ends.append(logits[ended].masked_fill_(~ends_word[some], float("-inf")).logsumexp(-1))
        whole = torch.stack(sums, -1).double().logsumexp(-1)
        finite[mine] = (total - whole).isfinite()
        picked[at >= 0] -= whole[at[at >= 0]]
        if len(ended):
            word_end[mine[ended]] = torch.stack(sums_of_ends, -1).double().logsumexp(-1) - whole[ended]
    return tuple(x.cpu().numpy() for x in (picked, word_end, entropy, top_ids, top_probs, finite))  # type: ignore[return-value]
