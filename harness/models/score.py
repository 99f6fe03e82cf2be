"""Probabilities of many token sequences after a context, in one forward: tree scoring.

An item is the context followed by the trie's nodes. Each node looks at the context and at its ancestors (Cai et al.
2024, Medusa; Miao et al. 2024, SpecInfer use the same mask to verify drafts) and stands at position context length +
depth. Items are packed into rows, where they do not see each other, so that little padding is computed; the common
start of a batch's contexts is forwarded once (see `prefix`). The head is applied to the context's last token and the
nodes, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.attend import Layout
from harness.models.load import LM
from harness.models.prefix import shared_cache, shared_length
from harness.text.words import Trie

_ROW = 192
"""Tokens a row may be filled to by several items: longer rows waste less padding but more attention."""
_OPEN_ROWS = 32
_HEAD_ROWS = 256
"""Rows per application of the head: 256 × 152k float32 logits are 150 MB."""


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
    padded = len(contexts) * max(row_length(c, t) for c, t in zip(contexts, tries, strict=True))
    shared = shared_length(contexts, padded)
    tokens, layout, places = tree_batch(contexts, tries, lm.device, shared, is_apart)
    cache = shared_cache(lm, contexts[0][:shared], tokens.shape[0]) if shared else None
    hidden = lm.hidden(tokens, layout, cache)
    # Rows the head is applied to: per item its last context token, then its nodes.
    where = [
        (row, offset + len(c) - shared - 1 + i)
        for (row, offset), c, t in zip(places, contexts, tries, strict=True)
        for i in range(1 + len(t))
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
    picked, word_end, entropy, top_ids, top_probs, finite = _read(lm, rows, picks.to(lm.device), first, top_k)
    results: list[TreeScores | ItemFailed] = []
    for i, trie in enumerate(tries):
        if not bool(finite[starts[i] : starts[i + 1]].all()):
            results.append(NotFinite(NOT_FINITE))
            continue
        logprobs = np.array([picked[pick_of[i][j]].sum() for j in range(len(trie.sequences))], dtype=np.float64)
        ends = np.array([word_end[starts[i] + 1 + e] if e >= 0 else np.nan for e in trie.ends], dtype=np.float64)
        results.append(TreeScores(logprobs, ends, float(entropy[i]), top_ids[i], top_probs[i]))
    return results


def tree_batch(
    contexts: Sequence[Sequence[int]],
    tries: Sequence[Trie],
    device: torch.device,
    shared: int = 0,
    is_apart: bool = False,
) -> tuple[Int[Tensor, "R T"], Layout, list[tuple[int, int]]]:
    """Tokens [R, T] of contexts + nodes, the layout that makes each item a tree of its own, and each item's (row, offset).

    Several items stand in one row where they fit, blind to each other, or each in its own with `is_apart`. The first
    `shared` tokens of every context stand in a cache already: all see them, and they are keys only.
    """
    lengths = [row_length(c, t) - shared for c, t in zip(contexts, tries, strict=True)]
    places = [(row, 0) for row in range(len(lengths))] if is_apart else pack(lengths)
    rows, width = 1 + max(r for r, _ in places), max(o + n for (_, o), n in zip(places, lengths, strict=True))
    tokens = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((rows, shared + width), dtype=np.int64)
    positions[:, :shared] = np.arange(shared)
    allowed = np.zeros((rows, width, shared + width), dtype=bool)
    allowed[:, :, :shared] = True
    # Padding sees itself, so that no row of the mask is empty; nothing else sees padding.
    allowed[:, np.arange(width), shared + np.arange(width)] = True
    for (row, start), length, context, trie in zip(places, lengths, contexts, tries, strict=True):
        n = len(context) - shared
        node, end = start + n, start + length
        tokens[row, start:node], tokens[row, node:end] = context[shared:], trie.tokens
        positions[row, shared + start : shared + node] = np.arange(shared, len(context))
        positions[row, shared + node : shared + end] = len(context) + np.asarray(trie.depths, dtype=np.int64)
        allowed[row, start:end, shared + start : shared + node] = np.tri(length, n, dtype=bool)
        allowed[row, node:end, shared + node : shared + end] = trie.ancestry()
    at = torch.from_numpy(positions).to(device)
    layout = Layout(at[:, shared:], at, torch.from_numpy(allowed).to(device))
    return torch.from_numpy(tokens).to(device), layout, places


def pack(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """A (row, offset) for each length, so that rows × longest row is small and no row is much over `_ROW`.

    First fit, longest first (Johnson 1973), at the best of a few widths; only the newest rows are tried, which keeps
    a batch of thousands cheap.
    """
    longest = max(lengths)
    widths = {longest, *range(longest, _ROW + 1, 16)} if len(lengths) <= 256 else {longest, max(_ROW, longest)}
    tries = [_first_fit(lengths, width) for width in sorted(widths)]
    return min(tries, key=lambda places: _area(lengths, places))


def _first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    places = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        newest = range(max(0, len(filled) - _OPEN_ROWS), len(filled))
        row = next((r for r in newest if filled[r] + lengths[i] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places


def _area(lengths: Sequence[int], places: Sequence[tuple[int, int]]) -> int:
    return (1 + max(r for r, _ in places)) * max(o + n for (_, o), n in zip(places, lengths, strict=True))


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
    lm: LM, rows: Float[Tensor, "N D"], picks: Int[Tensor, "P 2"], first: Int[Tensor, " B"], top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The numbers wanted of each row, a block of rows at a time, so that the full [N, V] logits never stand in memory."""
    num_rows, top_k = rows.shape[0], min(top_k, lm.vocabulary.ends_word.size)
    device = rows.device
    ends_word: Bool[Tensor, " V"] = torch.from_numpy(lm.vocabulary.ends_word).to(device)
    picked = torch.empty(picks.shape[0], dtype=torch.float64, device=device)
    word_end = torch.empty(num_rows, dtype=torch.float64, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    entropy = torch.empty(first.shape[0], dtype=torch.float64, device=device)
    top_ids = torch.empty(first.shape[0], top_k, dtype=torch.long, device=device)
    top_probs = torch.empty(first.shape[0], top_k, dtype=torch.float64, device=device)
    for begin in range(0, num_rows, _HEAD_ROWS):
        end = min(begin + _HEAD_ROWS, num_rows)
        log_p = lm.logits(rows[begin:end]).log_softmax(-1)
        finite[begin:end] = log_p.isfinite().all(-1)
        word_end[begin:end] = log_p.masked_fill(~ends_word, float("-inf")).logsumexp(-1).double()
        here = (picks[:, 0] >= begin) & (picks[:, 0] < end)
        picked[here] = log_p[picks[here, 0] - begin, picks[here, 1]].double()
        mine = (first >= begin) & (first < end)
        at_first = log_p[first[mine] - begin]
        entropy[mine] = -(at_first.exp() * at_first).sum(-1).double()
        values, ids = at_first.topk(top_k, dim=-1)
        top_ids[mine], top_probs[mine] = ids, values.exp().double()
    return tuple(x.cpu().numpy() for x in (picked, word_end, entropy, top_ids, top_probs, finite))  # type: ignore[return-value]
