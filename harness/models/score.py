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
    results: list[TreeScores | ItemFailed | None] = [too_long(lm, c, t) for c, t in zip(contexts, tries, strict=True)]
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


def rows_of_trees(
    hidden: Float[Tensor, "R T D"], contexts: Sequence[Sequence[int]], tries: Sequence[Trie]
) -> Float[Tensor, "N D"]:
    """What the head is applied to of a batch of trees: per item its context's last token, then its nodes."""
    where = [
        (r, len(c) - 1 + i) for r, (c, t) in enumerate(zip(contexts, tries, strict=True)) for i in range(1 + len(t))
    ]
    row, column = torch.tensor(where, device=hidden.device).T
    return hidden[row, column]


def too_long(lm: LM, context: Sequence[int], trie: Trie) -> ItemFailed | None:
    """Why a trie behind a context cannot be scored; None where it can."""
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
    # Nodes are never shared, so what is computed beside them is contexts, each distinct beginning once.
    num_tokens, num_nodes = len(layout.cells or tokens), sum(map(len, tries))
    with tally.prefilling(1 - num_nodes / num_tokens):
        hidden = lm.hidden(tokens, layout)
    return read_trees(lm, rows_of_trees(hidden, contexts, tries), tries, top_k)


def read_trees(
    lm: LM, rows: Float[Tensor, "N D"], tries: Sequence[Trie], top_k: int = 10
) -> list[TreeScores | ItemFailed]:
    """Scores of tries whose rows were forwarded already: per trie its context's last token, then its nodes."""
    starts = np.cumsum([0] + [1 + len(t) for t in tries])
    # A sequence's first token is read off the context's last row, every later one off the node before it.
    picks, pick_of = _picks(tries, starts)
    first = torch.tensor(starts[:-1], device=lm.device)
    is_end = np.zeros(rows.shape[0], dtype=bool)
    for start, trie in zip(starts, tries, strict=False):
        is_end[[start + 1 + node for node in trie.ends if node >= 0]] = True
    read = _read(lm, rows, _Wanted(picks.to(lm.device), first, torch.from_numpy(is_end).to(lm.device)), top_k)
    picked, word_end = read.picked.numpy(), read.word_end.numpy()
    results: list[TreeScores | ItemFailed] = []
    for i, trie in enumerate(tries):
        # One bad row fails its whole item: a sum of the other sequences would pass for the word's probability.
        if not bool(read.finite[starts[i] : starts[i + 1]].all()):
            results.append(NotFinite(NOT_FINITE))
            continue
        logprobs = np.array([picked[pick_of[i][j]].sum() for j in range(len(trie.sequences))], dtype=np.float64)
        ended = np.array([word_end[starts[i] + 1 + e] if e >= 0 else np.nan for e in trie.ends], dtype=np.float64)
        top_ids, top_probs = read.top_ids[i].numpy(), read.top_probs[i].numpy()
        results.append(TreeScores(logprobs, ended, float(read.entropy[i]), top_ids, top_probs))
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
        # Taller than wide: causal within the context, and below it nodes, which see all of it.
        allowed[r, :end, :n] = np.tri(end, n, dtype=bool)
        allowed[r, n:end, n:end] = trie.ancestry()
    at = torch.from_numpy(positions).to(device)
    cells = shared_cells(contexts, [len(t) for t in tries], device, is_apart)
    return torch.from_numpy(tokens).to(device), Layout(at, at, torch.from_numpy(allowed).to(device), cells=cells)


def _picks(tries: Sequence[Trie], starts: np.ndarray) -> tuple[Int[Tensor, "P 2"], list[list[np.ndarray]]]:
    """Every (head row, token) whose log-probability is needed, and for each sequence where its own stand in that list."""
    # Sequences that begin alike want the same numbers, which are read once.
    index: dict[tuple[int, int], int] = {}
    pick_of = [
        [
            np.array([index.setdefault((int(starts[i]) + 1 + node, token), len(index)) for node, token in steps])
            for steps in trie.steps
        ]
        for i, trie in enumerate(tries)
    ]
    return torch.tensor(list(index), dtype=torch.long).reshape(-1, 2), pick_of


@dataclass(frozen=True)
class _Wanted:
    """Which numbers are wanted of rows that the head is applied to."""

    picks: Int[Tensor, "P 2"]
    """(row, token) of every log-probability."""
    first: Int[Tensor, " B"]
    """The rows that begin an answer: of these, and no others, a whole distribution."""
    is_end: Bool[Tensor, " N"]
    """The rows after which a word may end."""

    def picks_of(self, mine: Int[Tensor, " M"]) -> Int[Tensor, " P"]:
        """Where among the rows `mine` each pick's row stands; -1 for a pick of another row."""
        place = torch.full_like(self.is_end, -1, dtype=torch.long)
        place[mine] = torch.arange(len(mine), device=mine.device)
        return place[self.picks[:, 0]]


@dataclass(frozen=True)
class _Numbers:
    """What is wanted of rows, filled a few rows at a time, and kept where the model is: one transfer at the end."""

    picked: Float[Tensor, " P"]
    word_end: Float[Tensor, " N"]
    """NaN for rows after which no word can end."""
    finite: Bool[Tensor, " N"]
    entropy: Float[Tensor, " B"]
    top_ids: Int[Tensor, "B K"]
    top_probs: Float[Tensor, "B K"]

    @classmethod
    def empty(cls, wanted: _Wanted, top_k: int) -> "_Numbers":
        num_rows, num_first, device = len(wanted.is_end), len(wanted.first), wanted.is_end.device
        # Float64, since sequences and slices are summed up in these.
        wide = {"dtype": torch.float64, "device": device}
        return cls(
            picked=torch.empty(len(wanted.picks), **wide),
            word_end=torch.full((num_rows,), torch.nan, **wide),
            finite=torch.empty(num_rows, dtype=torch.bool, device=device),
            entropy=torch.empty(num_first, **wide),
            top_ids=torch.empty(num_first, top_k, dtype=torch.long, device=device),
            top_probs=torch.empty(num_first, top_k, **wide),
        )

    def cpu(self) -> "_Numbers":
        return _Numbers(**{name: value.cpu() for name, value in vars(self).items()})


def _read(lm: LM, rows: Float[Tensor, "N D"], wanted: _Wanted, top_k: int) -> _Numbers:
    """The numbers wanted of each row; the full [N, V] logits never stand in memory.

    Only of the first rows a whole distribution is needed. Of the others, mostly all, it is a few tokens and the sum, for
    which the vocabulary is gone through a slice at a time: head and all passes over it then stay within a CPU's cache.
    """
    numbers = _Numbers.empty(wanted, min(top_k, lm.vocabulary.ends_word.size))
    for places in torch.arange(len(wanted.first), device=rows.device).split(_HEAD_ROWS):
        _read_whole_(numbers, lm, rows, wanted, places)
    is_first = torch.zeros_like(wanted.is_end)
    is_first[wanted.first] = True
    for mine in (~is_first).nonzero()[:, 0].split(_SLICE_ROWS):
        if len(mine):  # a split of nothing is one empty part
            _read_sliced_(numbers, lm, rows, wanted, mine)
    return numbers.cpu()


def _read_whole_(
    numbers: _Numbers, lm: LM, rows: Float[Tensor, "N D"], wanted: _Wanted, places: Int[Tensor, " F"]
) -> None:
    """Fill in the first rows at these places among all first rows, each from its whole distribution."""
    mine = wanted.first[places]
    log_p = lm.logits(rows[mine]).log_softmax(-1)
    at = wanted.picks_of(mine)
    numbers.picked[at >= 0] = log_p[at[at >= 0], wanted.picks[at >= 0, 1]].double()
    numbers.finite[mine] = log_p.sum(-1).isfinite()
    numbers.entropy[places] = -(log_p.exp() * log_p).sum(-1).double()
    values, ids = log_p.topk(numbers.top_ids.shape[1], dim=-1)
    numbers.top_ids[places], numbers.top_probs[places] = ids, values.exp().double()


def _read_sliced_(
    numbers: _Numbers, lm: LM, rows: Float[Tensor, "N D"], wanted: _Wanted, mine: Int[Tensor, " M"]
) -> None:
    """Fill in the rows `mine`, whose vocabulary is gone through once, a slice at a time.

    A pick is its raw logit until the last slice is seen: what is to be subtracted from it, the log-sum of all, is known
    only then.
    """
    device = rows.device
    ends_word: Bool[Tensor, " V"] = torch.from_numpy(lm.vocabulary.ends_word).to(device)
    at, tokens = wanted.picks_of(mine), wanted.picks[:, 1]
    ended = wanted.is_end[mine].nonzero()[:, 0]
    sums, sums_of_ends, total = [], [], torch.zeros(len(mine), dtype=torch.float64, device=device)
    width = max(1, (_SLICE_OF_CPU if device.type == "cpu" else _SLICE_OF_GPU) // len(mine))
    for begin in range(0, len(ends_word), width):
        some = slice(begin, begin + width)
        logits = lm.logits(rows[mine], some)
        here = (at >= 0) & (tokens >= begin) & (tokens < begin + width)
        numbers.picked[here] = logits[at[here], tokens[here] - begin].double()
        # A logit of -inf leaves every log-sum finite: only a plain sum shows it.
        total += logits.sum(-1)
        sums.append(logits.logsumexp(-1))
        if len(ended):
            sums_of_ends.append(logits[ended].masked_fill_(~ends_word[some], float("-inf")).logsumexp(-1))
    whole = torch.stack(sums, -1).double().logsumexp(-1)
    numbers.finite[mine] = (total - whole).isfinite()
    numbers.picked[at >= 0] -= whole[at[at >= 0]]
    if len(ended):
        numbers.word_end[mine[ended]] = torch.stack(sums_of_ends, -1).double().logsumexp(-1) - whole[ended]
