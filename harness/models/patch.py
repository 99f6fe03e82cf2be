"""Activation patching: what a target context would say if a part of its network had seen a source context.

One prefix, many rows: the target's context up to its last token is prefilled once; then every (patch, layer) is a row
that shares it, patched at its own layer, and only the last token, the word's own tokens and the continuation are
computed. The word's probability is recomputed under the patch, tokens after the first included.

A row patched at layer l equals the untouched target below it, so it enters there (`cells.Late`): about half of the
work. So does its continuation, as long as another row that is still untouched in those layers says the same tokens.

The patches (docs/method.md, Patching), all at the answer's first step:
`resid`, `attn`, `mlp`: the block's output, or what one part of it adds, at the context's last token, from the source
(Vig et al. 2020; Meng et al. 2022). `kv_question`, `kv_instruction`: the keys and values that are read from a span, the
keys turned to their new positions. `knockout_instruction`: the last token may not look at a span in that layer (Geva
et al. 2023).

Keys at a new place: with rotary positions a key depends on its distance to the query alone, so the source text is
forwarded once more, moved as a whole, until the span stands where the target has it. With absolute positions there is
nothing to turn, and keys are taken as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.attend import GridCache, Layout, right_padded
from harness.models.cells import Cells, Late, late_cells
from harness.models.decode import Completion
from harness.models.load import LM
from harness.models.score import TreeScores, read_trees
from harness.models.taps import Captured, Edit, capture, patch
from harness.text.words import Trie

UNTOUCHED = ("", -1)
"""The name of a row that is left as it is."""
PATCHES = ("resid", "attn", "mlp", "kv_question", "kv_instruction", "knockout_instruction")
Span = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """Source tokens [start, start + length) put in place of the target's from `to` on."""

    start: int
    to: int
    length: int

    @property
    def shift(self) -> int:
        return self.to - self.start


@dataclass(frozen=True)
class Pair:
    """Two contexts and what is patched between them: spans that are not needed by a sweep may be None."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    question: Move | None = None
    instruction: Move | None = None
    prohibition: Span | None = None
    """The target's tokens that `knockout_instruction` hides."""


@dataclass(frozen=True)
class Patched:
    """The word's scores and the greedy continuation in one row; `patch` '' and `layer` -1 is the target as it is."""

    patch: str
    layer: int
    scores: TreeScores
    continuation: Completion


@dataclass(frozen=True)
class Start:
    """What all rows of a pair go on from, computed once and never written to."""

    found: Captured
    """The source's activations at its last token."""
    moved: Mapping[int, DynamicCache]
    """The source's keys and values, by the number of places the text was moved."""
    prefix: DynamicCache
    """The target's context up to its last token."""


Names = Sequence[tuple[str, int]]
"""(patch, layer) of each row."""


@torch.inference_mode()
def sweep(
    lm: LM,
    pair: Pair,
    patches: Sequence[str],
    trie: Trie,
    max_new_tokens: int,
    stop_at_newline: bool = True,
    layers: Sequence[int] | None = None,
    top_k: int = 10,
) -> list[Patched | ItemFailed]:
    """The untouched target, then every patch at every layer (all of them, unless `layers` names some).

    A row whose logits are not finite comes back as ItemFailed. Raises ItemFailed for a pair that cannot be patched.
    """
    _check(lm, pair, patches, trie, max_new_tokens)
    where = range(len(lm.anatomy.blocks)) if layers is None else layers
    names = [UNTOUCHED, *((patch, layer) for patch in patches for layer in where)]
    return run_rows(lm, pair, begin(lm, pair, patches), names, trie, max_new_tokens, stop_at_newline, top_k)


@torch.inference_mode()
def begin(lm: LM, pair: Pair, patches: Sequence[str]) -> Start:
    """The source, as often as it must be moved, and the target's prefix, in one forward."""
    wanted = [
        m for n, m in (("kv_question", pair.question), ("kv_instruction", pair.instruction)) if n in patches and m
    ]
    # Unmoved first, whether its keys are wanted or not: from there `resid`, `attn` and `mlp` take what they put in.
    shifts = sorted({0} | {_shift(lm, move) for move in wanted}, key=abs)
    # The target's last token is left to the rows: it is the first that differs between them.
    texts = [*((pair.source, shift) for shift in shifts), (pair.target[:-1], 0)]
    with tally.prefilling():
        found, caches, is_finite = _prefill(lm, texts)
        if not is_finite:  # a masked NaN is still a NaN (0 × NaN), so one text may have it from another
            apart = [_prefill(lm, [text]) for text in texts]
            found, caches = apart[0].found, [text.caches[0] for text in apart]
    # What is not finite even then stays: it fails the rows that read it (`run_rows`), and no other.
    return Start(found, dict(zip(shifts, caches[:-1], strict=True)), caches[-1])


@torch.inference_mode()
def run_rows(
    lm: LM,
    pair: Pair,
    start: Start,
    names: Names,
    trie: Trie,
    max_new_tokens: int,
    stop_at_newline: bool = True,
    top_k: int = 10,
) -> list[Patched | ItemFailed]:
    """One row for each of `names`, all in one forward of the target's last token and the word's nodes."""
    cache = fork(start.prefix, len(names))
    for patch_name, move in (("kv_question", pair.question), ("kv_instruction", pair.instruction)):
        rows = _rows_of(names, patch_name)
        if rows:
            assert move is not None, "checked at the door"
            _move_keys(cache, start.moved[_shift(lm, move)], rows, move)
    edits = [e for name in ("resid", "attn", "mlp") for e in _edits(lm, start.found, name, _rows_of(names, name))]
    # Only this forward is edited. What is said afterwards reads the patched keys and values, and is not patched again:
    # a patch is made at the answer's first step.
    with patch(edits):
        hidden = _forward_tree(lm, pair, trie, cache, names)
    scores = read_trees(lm, hidden.flatten(0, 1), [trie] * len(names), top_k)
    logits = lm.logits(hidden[:, 0])
    continuations = _continue(lm, logits, cache, names, len(pair.target), len(trie), max_new_tokens, stop_at_newline)
    return [
        score
        if isinstance(score, ItemFailed)
        else (Patched(name, layer, score, done) if np.isfinite(done.logprobs).all() else NotFinite(NOT_FINITE))
        for (name, layer), score, done in zip(names, scores, continuations, strict=True)
    ]


def _rows_of(names: Names, patch_name: str) -> list[tuple[int, int]]:
    """(row, layer) of one patch."""
    return [(row, layer) for row, (name, layer) in enumerate(names) if name == patch_name]


def _check(lm: LM, pair: Pair, patches: Sequence[str], trie: Trie, max_new_tokens: int) -> None:
    if min(len(pair.source), len(pair.target)) < 2:
        raise ItemFailed("expected contexts of at least two tokens; nothing stands before the last one")
    reach = len(pair.target) + max(max_new_tokens, max(trie.depths, default=-1) + 1)
    if max(reach, len(pair.source)) > lm.max_positions:
        raise ItemFailed(f"needs {reach} positions, the model has {lm.max_positions}; shorten the prompt")
    needed = {
        "kv_question": pair.question,
        "kv_instruction": pair.instruction,
        "knockout_instruction": pair.prohibition,
    }
    for name in patches:
        assert name in PATCHES, f"no patch {name}"
        if name in needed and needed[name] is None:
            raise ItemFailed(f"{name}: the two contexts have no such span in common")


def _shift(lm: LM, move: Move) -> int:
    return move.shift if lm.anatomy.is_relative else 0


class _Prefilled(NamedTuple):
    """What one forward of several texts gives."""

    found: Captured
    """Activations at the last token of the first text."""
    caches: list[DynamicCache]
    """Every text's keys and values."""
    is_finite: bool
    """Whether every text's output is."""


def _prefill(lm: LM, texts: Sequence[tuple[Sequence[int], int]]) -> _Prefilled:
    """One forward of all texts: each is its tokens, and how many places further on it stands."""
    lengths = [len(tokens) for tokens, _ in texts]
    tokens, layout = right_padded(
        [tokens for tokens, _ in texts], lm.device, shifts=[shift for _, shift in texts], is_apart=True
    )
    # The hooks want a place in every row; what they find in the other texts' is dropped below.
    at = torch.full((len(texts), 1), lengths[0] - 1, device=lm.device)
    cache = lm.new_cache()
    with capture(lm.anatomy, at) as found:
        hidden = lm.hidden(tokens, layout, cache)
    first = Captured(*([x[:1] for x in part] for part in (found.resid, found.attention, found.mlp)))
    caches = [_row(cache, n, length) for n, length in enumerate(lengths)]
    # Padding need not be left out: its cells show a token of the first text, and have no number of their own.
    return _Prefilled(first, caches, bool(hidden.isfinite().all()))


def _row(cache: DynamicCache, row: int, length: int) -> DynamicCache:
    """Keys and values of one text of several."""
    one = GridCache()
    for n, layer in enumerate(cache.layers):
        keys, values = (getattr(layer, kind)[row : row + 1, :, :length] for kind in ("keys", "values"))
        one.update(keys, values, n)
    return one


def fork(cache: DynamicCache, rows: int) -> DynamicCache:
    """The cache of one text as `rows` rows with keys and values of their own: what one changes, nothing else sees."""
    forked = GridCache()
    for n, layer in enumerate(cache.layers):
        keys, values = (getattr(layer, kind).repeat_interleave(rows, 0) for kind in ("keys", "values"))
        forked.update(keys, values, n)
    return forked


def _move_keys(cache: DynamicCache, source: DynamicCache, rows: Sequence[tuple[int, int]], move: Move) -> None:
    """Write the source's span over the target's, for each row in its own layer only."""
    here, there = slice(move.start, move.start + move.length), slice(move.to, move.to + move.length)
    for row, layer in rows:
        # In the row's own layer, not from it on: higher layers hold what the target's own tokens made of it.
        for kind in ("keys", "values"):
            getattr(cache.layers[layer], kind)[row, :, there] = getattr(source.layers[layer], kind)[0, :, here]


def _edits(lm: LM, found: Captured, name: str, rows: Sequence[tuple[int, int]]) -> list[Edit]:
    """One edit a layer: the source's activation in the rows that are patched there."""
    anatomy = lm.anatomy
    edits = []
    for row, layer in rows:
        module = {"resid": anatomy.blocks, "attn": anatomy.attention_out, "mlp": anatomy.mlp_out}[name][layer]
        # A part's own output is wanted here, before the family's multiplier: the module is edited, not what is added.
        value = (
            found.resid[layer + 1] if name == "resid" else getattr(found, {"attn": "attention"}.get(name, name))[layer]
        )
        scale = 1.0 if name == "resid" else anatomy.multiplier
        edits.append(Edit(module, torch.tensor([row], device=lm.device), 0, value[:, 0] / scale, layer))
    return edits


def _forward_tree(lm: LM, pair: Pair, trie: Trie, cache: DynamicCache, names: Names) -> Tensor:
    """Final-norm output [R, 1 + nodes, D] of the target's last token and the word's nodes, behind the shared prefix."""
    prefix, num, width = len(pair.target) - 1, len(names), 1 + len(trie)
    tokens = torch.tensor([[pair.target[-1], *trie.tokens]], device=lm.device).expand(num, -1)
    positions = torch.tensor([*range(prefix + 1), *(prefix + 1 + d for d in trie.depths)], device=lm.device)
    # All rows stand on one text, so the prefix has no padding to hide: the mask is about the last token and the nodes.
    own = np.zeros((width, width), dtype=bool)
    own[:, 0] = True
    own[1:, 1:] = trie.ancestry()
    allowed = torch.ones(num, width, prefix + width, dtype=torch.bool, device=lm.device)
    allowed[:, :, prefix:] = torch.from_numpy(own).to(lm.device)
    at = positions.expand(num, -1)
    # One text, so one leader: the untouched row where there is one, which no layer parts from the target.
    cells = late_cells(
        num, width, enter_late([layer for _, layer in names], [()] * num, len(lm.anatomy.blocks)), lm.device
    )
    layout = Layout(at[:, prefix:], at, allowed, _knockouts(pair, names, allowed), cells)
    return lm.hidden(tokens, layout, cache)


def enter_late(layers: Sequence[int], texts: Sequence[Sequence[int]], num_layers: int) -> Late:
    """Where each row's own computation begins: row r is patched at layer `layers[r]` (-1: nowhere) and holds `texts[r]`.

    Rows of one text are equal below the layers they are patched at; the one patched highest stands for the others.
    """
    # Behind the last layer: a row that is nowhere patched may stand for any other, and needs no layer of its own.
    entry = np.array([num_layers if layer < 0 else layer for layer in layers])
    leader_of: dict[tuple[int, ...], int] = {}
    for row, text in enumerate(map(tuple, texts)):
        if entry[row] > entry[leader_of.setdefault(text, row)]:
            leader_of[text] = row
    # Whoever leads is computed from the start: only where it too is patched later could it have been spared.
    leader = np.array([leader_of[tuple(text)] for text in texts])
    entry[leader] = 0
    return Late(entry, leader)


def _knockouts(pair: Pair, names: Names, allowed: Bool[Tensor, "R T S"]) -> Mapping[int, Bool[Tensor, "R T S"]]:
    blocked: dict[int, Bool[Tensor, "R T S"]] = {}
    for row, layer in _rows_of(names, "knockout_instruction"):
        assert pair.prohibition is not None, "checked at the door"
        here = blocked.setdefault(layer, torch.zeros_like(allowed))
        # The last token alone is blinded; the word's nodes behind it still see the span, as its continuation does.
        here[row, 0, pair.prohibition[0] : pair.prohibition[1]] = True
    return blocked


def _continue(
    lm: LM,
    logits: Tensor,
    cache: DynamicCache,
    names: Names,
    seen: int,
    num_nodes: int,
    max_new_tokens: int,
    stop_at_newline: bool,
) -> list[Completion]:
    """Greedy completions from the logits after `seen` tokens; the word's nodes, in the cache too, are not looked at.

    Rows that are finished leave the cache.
    """
    done = [Completion() for _ in range(len(logits))]
    live = list(range(len(done)))
    for step in range(max_new_tokens):
        best = logits.log_softmax(-1).topk(2, dim=-1)
        log_p = best.values[:, 0].tolist()
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        tokens = best.indices[:, 0].tolist()
        going = [
            n
            for n, row in enumerate(live)
            if done[row].append(tokens[n], log_p[n], margins[n], lm.vocabulary, stop_at_newline)
        ]
        if step + 1 == max_new_tokens or not going:
            break  # the last tokens are not forwarded: nothing is read behind them
        if len(going) < len(live):
            cache.batch_select_indices(torch.tensor(going, device=lm.device))
            live = [live[n] for n in going]
        newest = torch.tensor([[done[row].token_ids[-1]] for row in live], device=lm.device)
        # Grouped anew at every step, since rows that said the same so far may part. Any row may lead next: its cache is
        # whole, for in the layers below its patch the leader's keys were laid out in it too.
        late = enter_late([names[r][1] for r in live], [done[r].token_ids for r in live], len(lm.anatomy.blocks))
        layout = _next_layout(late_cells(len(live), 1, late, lm.device), seen, num_nodes, step)
        logits = lm.logits(lm.hidden(newest, layout, cache)[:, 0])
    return done


def _next_layout(cells: Cells, seen: int, num_nodes: int, step: int) -> Layout:
    """Keys: the context, the word's nodes (hidden), the continuation so far and the new token."""
    rows, device = len(cells), cells.row.device
    k_positions: Int[Tensor, " S"] = torch.tensor(
        [*range(seen), *[0] * num_nodes, *range(seen, seen + step + 1)], device=device
    )
    allowed = torch.ones(rows, 1, len(k_positions), dtype=torch.bool, device=device)
    # The nodes stay in the cache and are hidden: to cut them out would copy every row's keys.
    allowed[:, :, seen : seen + num_nodes] = False
    at = k_positions.expand(rows, -1)
    return Layout(at[:, -1:], at, allowed, cells=cells)
