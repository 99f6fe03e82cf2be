"""Activation patching: every row of a sweep against one layer at a time, and the laws that hold without a reference."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from harness.errors import ItemFailed, NotFinite
from harness.models import attend, patch, plain
from harness.models.attend import GridCache, Layout
from harness.models.decode import Completion, Sampling
from harness.models.load import LM
from harness.models.patch import PATCHES, Move, Pair, Patched, sweep
from harness.text.words import Tokens, Trie, build_trie
from harness.tolerance import TOLERANCE
from tests.cases import some_of
from tests.models.test_inside import POISON, poisoned_lm
from tests.models.test_taps import ALL, every_hook, lm_of, random_ids

OF_PROBS = TOLERANCE["float32"].prob
NEW_TOKENS = 6
SIZE = 260

# The shape of a real pair, short enough for the tiny windows (16) to cut through what is patched.
OPENING, BAN, QUESTION, TAIL = random_ids(6, 1), random_ids(7, 2), random_ids(8, 3), random_ids(2, 4)
SOURCE, TARGET = OPENING + QUESTION + TAIL, OPENING + BAN + QUESTION + TAIL
PAIR = Pair(SOURCE, TARGET, question=Move(6, 13, 8), instruction=Move(0, 6, 6), prohibition=(6, 13))
BACK = Pair(TARGET, SOURCE, question=Move(13, 6, 8), instruction=Move(6, 0, 6), prohibition=(0, 6))
"""From the longer to the shorter: spans move to the front, to before position 0."""
RARE = build_trie([(5,), (7, 8, 9), (7, 8, 10), (7, 11), (200, 3)])


@cache
def stopping_lm(family: str) -> LM:
    """A model to which a third of its tokens, drawn by chance, are newlines: rows finish at different steps."""
    lm = lm_of(family)
    is_newline = np.random.default_rng(5).random(SIZE) < 0.3
    return replace(lm, vocabulary=replace(lm.vocabulary, has_newline=is_newline))


@cache
def likely(family: str) -> Trie:
    """Words that the model does say: its greedy answer's first three tokens, forks of it, and the runner-up.

    Of words that it hardly ever says any two probabilities would agree to 1e-5.
    """
    (row,) = sweep(lm_of(family), PAIR, [], RARE, 3, stop_at_newline=False)
    assert isinstance(row, Patched)
    first, second, third = row.continuation.token_ids
    other = int(row.scores.top_ids[1])
    return build_trie([(first, second, third), (first, second, third ^ 1), (first, second ^ 1), (other,), (7, 8, 9)])


def swept(
    lm: LM,
    pair: Pair = PAIR,
    patches: Sequence[str] = PATCHES,
    trie: Trie | None = None,
    layers: Sequence[int] | None = None,
    top_k: int = 10,
) -> dict[tuple[str, int], Patched]:
    """The rows of a sweep by (patch, layer)."""
    trie = trie or (likely(lm.identity.name) if lm.identity.name in ALL else RARE)
    rows = sweep(lm, pair, patches, trie, NEW_TOKENS, layers=layers, top_k=top_k)
    assert all(isinstance(r, Patched) for r in rows), rows
    return {(r.patch, r.layer): r for r in rows if isinstance(r, Patched)}


def layers_of(cache: DynamicCache) -> list[Any]:
    """With `keys` and `values` [R, G, S, K] each."""
    return list(cache.layers)


def p_sem(row: Patched) -> float:
    return float(np.exp(row.scores.logprobs).sum())


def reference(
    lm: LM, pair: Pair, patch_name: str, layer: int, trie: Trie, num_tokens: int = NEW_TOKENS
) -> tuple[float, Completion]:
    """P(the word) and the greedy continuation, one layer at a time."""
    logprobs, done = plain.patched(lm, pair, patch_name, layer, trie.sequences, Sampling(num_tokens))
    return float(np.exp(logprobs).sum()), done


def gap(a: Patched, b: Patched) -> float:
    """Greatest difference in the probability of a sequence; infinite where the continuations differ."""
    if a.continuation.token_ids != b.continuation.token_ids:
        return np.inf
    return float(np.abs(np.exp(a.scores.logprobs) - np.exp(b.scores.logprobs)).max())


def by_identity(lm: LM, patches: Sequence[str] = PATCHES) -> list[tuple[str, int]]:
    return [("", -1), *((name, layer) for name in patches for layer in range(len(lm.anatomy.blocks)))]


# ---- agreement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", some_of([PAIR, BACK], 1), ids=["to the back", "to the front"])
@pytest.mark.parametrize("family", ALL)
def test_every_patch_at_every_layer_equals_one_layer_at_a_time(family: str, pair: Pair) -> None:
    lm, names = stopping_lm(family), PATCHES if pair is PAIR else ("kv_question", "kv_instruction")
    rows = swept(lm, pair, names)
    assert list(rows) == by_identity(lm, names)
    for (name, layer), row in rows.items():
        want, done = reference(lm, pair, name, layer, likely(family))
        assert p_sem(row) == pytest.approx(want, abs=OF_PROBS), (name, layer)
        assert row.continuation.token_ids == done.token_ids, (name, layer)
        assert row.continuation.finish_reason == done.finish_reason
        assert row.continuation.logprobs == pytest.approx(done.logprobs, abs=1e-4)
        assert row.continuation.margins == pytest.approx(done.margins, abs=1e-4)
    # Control: every kind of patch does something somewhere.
    before = rows["", -1]
    for name in names:
        moved = [abs(np.exp(r.scores.logprobs) - np.exp(before.scores.logprobs)).max()
                 for (n, _), r in rows.items() if n == name]  # fmt: skip
        assert max(moved) > 20 * OF_PROBS, name


def test_rows_do_leave_the_batch_at_different_steps() -> None:
    """Control: the agreement above is of continuations that end apart, in nearly every family."""
    lengths = [{len(r.continuation.token_ids) for r in swept(stopping_lm(family)).values()} for family in ALL]
    assert sum(len(some) > 1 for some in lengths) >= len(ALL) - 2


@pytest.mark.parametrize("family", ALL)
def test_patches_of_a_longer_text_than_the_windows_equal_the_reference(family: str) -> None:
    """Most of what is patched stands behind the windows' edge here."""
    lm = lm_of(family)
    opening, ban, question = random_ids(12, 6), random_ids(14, 7), random_ids(20, 8)
    pair = Pair(opening + question, opening + ban + question, Move(12, 26, 18), Move(0, 12, 12), (12, 26))
    rows = swept(lm, pair, layers=[1])
    for (name, layer), row in rows.items():
        want, done = reference(lm, pair, name, layer, likely(family))
        assert p_sem(row) == pytest.approx(want, abs=OF_PROBS), name
        assert row.continuation.token_ids == done.token_ids, name


@pytest.mark.parametrize("family", ALL)
def test_a_row_of_a_full_sweep_is_what_it_is_alone(family: str) -> None:
    lm = stopping_lm(family)
    rows = swept(lm)
    for name in PATCHES:
        for layer in (0, len(lm.anatomy.blocks) - 1):
            alone = swept(lm, patches=[name], layers=[layer])
            assert list(alone) == [("", -1), (name, layer)]
            assert gap(alone[name, layer], rows[name, layer]) < OF_PROBS
            assert gap(alone["", -1], rows["", -1]) < OF_PROBS


def test_rows_come_in_the_order_asked_for() -> None:
    lm = lm_of("tiny-llama")
    rows = swept(lm, patches=["mlp", "resid"], layers=[3, 1])
    assert list(rows) == [("", -1), ("mlp", 3), ("mlp", 1), ("resid", 3), ("resid", 1)]
    whole = swept(lm)
    assert all(gap(row, whole[key]) < OF_PROBS for key, row in rows.items())
    assert list(swept(lm, patches=[])) == [("", -1)]


# ---- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_run_patched_with_its_own_activations_does_not_change(family: str) -> None:
    """At every layer, for every kind that copies something."""
    lm, names = stopping_lm(family), [p for p in PATCHES if p != "knockout_instruction"]
    itself = Pair(TARGET, TARGET, question=Move(13, 13, 8), instruction=Move(6, 6, 7))
    rows = swept(lm, itself, names)
    assert list(rows) == by_identity(lm, names)
    assert max(gap(row, rows["", -1]) for row in rows.values()) < OF_PROBS
    # Control: with another source of the same length each kind changes something.
    other = Pair(random_ids(len(TARGET), 9), TARGET, question=Move(13, 13, 8), instruction=Move(6, 6, 7))
    changed = swept(lm, other, names)
    for name in names:
        assert max(gap(row, changed["", -1]) for (n, _), row in changed.items() if n == name) > 20 * OF_PROBS, name


@pytest.mark.parametrize("family", ALL)
def test_the_last_blocks_output_brings_the_sources_own_first_token(family: str) -> None:
    lm = lm_of(family)
    rows = swept(lm, patches=["resid"], top_k=SIZE)
    want = plain.next_logits(lm, SOURCE)[-1].double().softmax(-1).numpy()

    def first_token(row: Patched) -> np.ndarray:
        p = np.zeros(SIZE)
        p[row.scores.top_ids] = row.scores.top_probs
        return p

    last = len(lm.anatomy.blocks) - 1
    assert first_token(rows["resid", last]) == pytest.approx(want, abs=OF_PROBS)
    assert rows["resid", last].continuation.token_ids[0] == want.argmax()
    # Control: the target as it is, and one block earlier, say something else.
    assert np.abs(first_token(rows["", -1]) - want).max() > 100 * OF_PROBS
    assert np.abs(first_token(rows["resid", last - 1]) - want).max() > 100 * OF_PROBS


@pytest.mark.parametrize("family", ALL)
def test_probabilities_over_a_complete_prefix_free_cover_sum_to_one_under_every_patch(family: str) -> None:
    """So the tokens after the first are recomputed under the patch of their own row, none counted twice."""
    lm = lm_of(family)
    opened = {0, 255, *swept(lm, patches=[])["", -1].scores.top_ids[:2].tolist()}
    cover = [(t,) for t in range(SIZE) if t not in opened] + [(t, u) for t in sorted(opened) for u in range(SIZE)]
    for row in swept(lm, trie=build_trie(cover)).values():
        assert p_sem(row) == pytest.approx(1.0, abs=OF_PROBS)
    # Control: the first tokens that were opened once more.
    overlapping = swept(lm, patches=[], trie=build_trie([*cover, *((t,) for t in opened)]))["", -1]
    assert p_sem(overlapping) > 1.02


def test_two_sweeps_in_a_row_give_the_same_bits() -> None:
    """The paper's code kept one cache for all patches, and each forward grew it (arXiv 2601.08070)."""
    lm = stopping_lm("tiny-gemma3")
    hooks = every_hook(lm)
    first, second = swept(lm), swept(lm)
    for key, row in first.items():
        assert np.array_equal(row.scores.logprobs, second[key].scores.logprobs)
        assert np.array_equal(row.scores.top_probs, second[key].scores.top_probs)
        assert row.continuation == second[key].continuation
    assert every_hook(lm) == hooks
    assert attend._layout.get() is None


def test_what_rows_start_from_is_never_written_to() -> None:
    """So the rows of one pair may be computed in several batches, from one start."""
    lm = stopping_lm("tiny-qwen3")
    trie, names = likely("tiny-qwen3"), by_identity(lm)
    start = patch.begin(lm, PAIR, PATCHES)
    caches = (start.prefix, *start.moved.values())
    assert set(start.moved) == {0, 6, 7}, "each distance is forwarded once"
    before = [x.clone() for c in caches for layer in layers_of(c) for x in (layer.keys, layer.values)]
    whole = patch.run_rows(lm, PAIR, start, names, trie, NEW_TOKENS)
    again = patch.run_rows(lm, PAIR, start, names, trie, NEW_TOKENS)
    pieces = [r for name in names for r in patch.run_rows(lm, PAIR, start, [name], trie, NEW_TOKENS)]
    after = [x for c in caches for layer in layers_of(c) for x in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for a, b, alone in zip(whole, again, pieces, strict=True):
        assert isinstance(a, Patched)
        assert isinstance(b, Patched)
        assert isinstance(alone, Patched)
        assert np.array_equal(a.scores.logprobs, b.scores.logprobs)
        assert a.continuation == b.continuation
        assert (alone.patch, alone.layer) == (a.patch, a.layer)
        assert gap(a, alone) < OF_PROBS


# ---- the cache ------------------------------------------------------------------------------------------------


def _one_too_many(cache: DynamicCache, rows: int) -> DynamicCache:
    cache.batch_repeat_interleave(rows)
    for layer in layers_of(cache):
        layer.keys, layer.values = (torch.cat([x, x[:, :, -1:]], 2) for x in (layer.keys, layer.values))
    return cache


def _one_too_few(cache: DynamicCache, rows: int) -> DynamicCache:
    cache.batch_repeat_interleave(rows)
    for layer in layers_of(cache):
        layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    return cache


@pytest.mark.parametrize("broken", [_one_too_many, _one_too_few])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_a_cache_of_another_length_is_refused_before_anything_is_computed_with_it(
    family: str, broken: Callable[[DynamicCache, int], DynamicCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The assertions on the length are live: one stray token, as the paper's reused cache left, ends the sweep."""
    lm, whole = lm_of(family), swept(lm_of(family))
    hooks = every_hook(lm)
    with monkeypatch.context() as patched:
        patched.setattr(patch, "fork", broken)
        with pytest.raises(AssertionError, match="the cache holds"):
            sweep(lm, PAIR, PATCHES, RARE, NEW_TOKENS)
    assert every_hook(lm) == hooks
    assert gap(swept(lm)["attn", 1], whole["attn", 1]) < OF_PROBS


class _Forgetful(GridCache):
    """Shows a forward its own tokens and keeps none of them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        held = layers_of(self)[layer_idx] if layer_idx < len(self.layers) else None
        old = (held.keys, held.values) if held is not None and held.get_seq_length() else None
        whole = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if old is not None:
            layer = layers_of(self)[layer_idx]
            layer.keys, layer.values = old
        return whole


def test_a_cache_that_does_not_grow_with_its_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("tiny-llama")
    monkeypatch.setattr(patch, "GridCache", _Forgetful)
    with pytest.raises(AssertionError, match="must grow the cache by its own tokens"):
        sweep(lm, PAIR, ["resid"], RARE, NEW_TOKENS)


def _rows_that_share(cache: DynamicCache, rows: int) -> DynamicCache:
    for layer in layers_of(cache):
        layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return cache


@pytest.mark.parametrize("family", ALL)
def test_what_one_row_writes_no_other_sees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the control: rows forked without memory of their own leak every key patch into every row."""
    lm, names = lm_of(family), ["resid", "kv_question", "kv_instruction"]
    clean = swept(lm, patches=["resid"])
    with_keys = swept(lm, patches=names)
    assert max(gap(with_keys[key], clean[key]) for key in clean) < OF_PROBS
    monkeypatch.setattr(patch, "fork", _rows_that_share)
    leaking = swept(lm, patches=names)
    assert max(gap(leaking[key], clean[key]) for key in clean) > 20 * OF_PROBS


# ---- keys at their new place ----------------------------------------------------------------------------------


def moved_keys(lm: LM, monkeypatch: pytest.MonkeyPatch, pair: Pair) -> dict[str, tuple[DynamicCache, DynamicCache]]:
    """Copies of the target's cache before and after each of the two key patches wrote into it."""
    found: dict[str, tuple[DynamicCache, DynamicCache]] = {}
    write = patch._move_keys

    def copied(cache: DynamicCache) -> DynamicCache:
        twin = DynamicCache()
        for n, layer in enumerate(layers_of(cache)):
            twin.update(layer.keys.clone(), layer.values.clone(), n)
        return twin

    def watched(cache: DynamicCache, source: DynamicCache, rows: Sequence[tuple[int, int]], move: Move) -> None:
        before = copied(cache)
        write(cache, source, rows, move)
        found["kv_question" if move == pair.question else "kv_instruction"] = (before, copied(cache))

    monkeypatch.setattr(patch, "_move_keys", watched)
    swept(lm, pair)
    return found


def projected(lm: LM, text: Tokens) -> tuple[dict[str, Tensor], Callable[[Sequence[int]], tuple[Tensor, Tensor]]]:
    """What each layer of a Llama projects for `text`, before any rotation: {"k_proj 0": [G, T, K], …}; and the angles
    of positions."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, _args, output: outputs.update({name: output[0].unflatten(-1, (2, 16)).transpose(0, 1)})

    handles = [
        getattr(block.self_attn, kind).register_forward_hook(keep(f"{kind} {n}"))
        for n, block in enumerate(lm.model.model.layers)
        for kind in ("k_proj", "v_proj")
    ]
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()

    def angles(positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        return lm.model.model.rotary_emb(torch.zeros(1), torch.tensor([list(positions)]))

    return outputs, angles


@pytest.mark.parametrize("pair", [PAIR, BACK], ids=["to the back", "to the front"])
def test_moved_keys_are_the_sources_own_rotated_to_where_they_are_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lm_of("tiny-llama")
    found = moved_keys(lm, monkeypatch, pair)
    outputs, angles = projected(lm, pair.source)
    rows = {name: i for i, name in enumerate(by_identity(lm))}
    for name, move in (("kv_question", pair.question), ("kv_instruction", pair.instruction)):
        assert move is not None
        assert move.shift != 0
        _, after = found[name]
        here, there = slice(move.start, move.start + move.length), slice(move.to, move.to + move.length)
        for layer in range(4):
            key = outputs[f"k_proj {layer}"][None, :, here]
            right = apply_rotary_pos_emb(key, key, *angles(range(there.start, there.stop)))[1][0]
            stale = apply_rotary_pos_emb(key, key, *angles(range(here.start, here.stop)))[1][0]
            written = layers_of(after)[layer].keys[rows[name, layer], :, there]
            scale = float(right.abs().max())
            assert torch.allclose(written, right, atol=2e-5 * scale, rtol=0)
            assert not torch.allclose(written, stale, atol=1e-2 * scale), "control: where they came from"
            value = outputs[f"v_proj {layer}"][:, here]
            got = layers_of(after)[layer].values[rows[name, layer], :, there]
            assert torch.allclose(got, value, atol=2e-5 * float(value.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ALL)
def test_keys_are_written_into_their_own_row_layer_and_span_and_nowhere_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lm_of(family)
    rows = {name: i for i, name in enumerate(by_identity(lm))}
    for name, (before, after) in moved_keys(lm, monkeypatch, PAIR).items():
        num_changed = 0
        move = PAIR.question if name == "kv_question" else PAIR.instruction
        assert move is not None
        there = slice(move.to, move.to + move.length)
        for layer in range(len(lm.anatomy.blocks)):
            for kind in ("keys", "values"):
                old, new = getattr(layers_of(before)[layer], kind), getattr(layers_of(after)[layer], kind)
                mine = torch.zeros_like(old, dtype=torch.bool)
                mine[rows[name, layer], :, there] = True
                assert torch.equal(old[~mine], new[~mine])
                num_changed += not torch.allclose(old[mine], new[mine], rtol=1e-2)
        # Control. At the first layer a key is its token's alone, so there the question's are what they were.
        assert num_changed >= 2 * (len(lm.anatomy.blocks) - 1)


def test_learned_positions_leave_keys_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 adds a position to a token before the first block: its keys know where they stood, and keep it."""
    lm = lm_of("tiny-gpt2")
    assert not lm.anatomy.is_relative
    found = moved_keys(lm, monkeypatch, PAIR)
    rows = {name: i for i, name in enumerate(by_identity(lm))}
    cache = DynamicCache()
    with torch.inference_mode(), plain.eager(lm):
        lm.model(input_ids=torch.tensor([SOURCE]), past_key_values=cache, use_cache=True)
    for name, move in (("kv_question", PAIR.question), ("kv_instruction", PAIR.instruction)):
        assert move is not None
        here, there = slice(move.start, move.start + move.length), slice(move.to, move.to + move.length)
        for layer in range(4):
            for kind in ("keys", "values"):
                own = getattr(layers_of(cache)[layer], kind)[0, :, here]
                got = getattr(layers_of(found[name][1])[layer], kind)[rows[name, layer], :, there]
                assert torch.allclose(got, own, atol=2e-5 * float(own.abs().max()), rtol=0)


# ---- knockout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_answer_token_may_not_look_at_the_prohibition_in_one_layer_and_nobody_else_notices(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, forward = lm_of(family), patch._forward_tree
    weights: list[Tensor] = []  # [R, H, 1 + nodes, S] a layer

    def watched(lm: LM, pair: Pair, trie: Trie, cache: DynamicCache, names: patch.Names) -> Tensor:
        everything = torch.arange(1 + len(trie)).expand(len(names), -1)
        with attend.watch_rows(everything, lambda _layer, w: weights.append(w)):
            return forward(lm, pair, trie, cache, names)

    monkeypatch.setattr(patch, "_forward_tree", watched)
    swept(lm, patches=["knockout_instruction"])
    start, end = 6, 13
    for layer in range(len(lm.anatomy.blocks)):
        row = 1 + layer  # the untouched target stands first
        whole, knocked = weights[layer][0], weights[layer][row]
        assert float(whole[:, 0, start:end].sum(-1).max()) > 1e-3, "control: it did look there"
        assert bool((knocked[:, 0, start:end] == 0).all())
        kept = whole[:, 0].clone()
        kept[:, start:end] = 0
        assert torch.allclose(knocked[:, 0], kept / kept.sum(-1, keepdim=True), atol=OF_PROBS)
        # Before that layer nothing is different, and in it the later tokens look where they like.
        assert all(torch.allclose(weights[n][row], weights[n][0], atol=OF_PROBS) for n in range(layer))
        assert float(knocked[:, 1:, start:end].sum(-1).min()) > 0
        for other in range(layer + 1, len(lm.anatomy.blocks)):
            assert float(weights[other][row][:, 0, start:end].sum(-1).min()) > 0, "nor is it hidden in later layers"


def test_later_tokens_of_the_continuation_still_see_the_prohibition(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("tiny-llama")
    seen: list[Layout] = []
    layout_of = patch._next_layout

    def watched(*args) -> Layout:
        seen.append(layout_of(*args))
        return seen[-1]

    monkeypatch.setattr(patch, "_next_layout", watched)
    rows = swept(lm, patches=["knockout_instruction"], trie=RARE)
    assert len(seen) == max(len(row.continuation.token_ids) for row in rows.values()) - 1 > 0
    for layout in seen:
        for layer in range(4):
            mask = layout.mask(None, layer)
            assert bool(mask[..., 6:13].all())
            assert not bool(mask[..., len(TARGET) : len(TARGET) + len(RARE)].any()), "the word's own nodes are hidden"
    assert gap(rows["knockout_instruction", 0], rows["", -1]) > 0


# ---- refusals and failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing"),
    [("kv_question", "question"), ("kv_instruction", "instruction"), ("knockout_instruction", "prohibition")],
)
def test_a_patch_without_its_span_is_refused_by_name_and_the_others_are_not(name: str, missing: str) -> None:
    lm, pair = lm_of("tiny-llama"), replace(PAIR, **{missing: None})
    with pytest.raises(ItemFailed, match=f"{name}: the two contexts have no such span in common"):
        sweep(lm, pair, PATCHES, RARE, NEW_TOKENS)
    others = [p for p in PATCHES if p != name]
    whole = swept(lm)
    assert all(gap(row, whole[key]) < OF_PROBS for key, row in swept(lm, pair, others).items())


def test_a_patch_of_no_known_name_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="no patch residual"):
        sweep(lm_of("tiny-llama"), PAIR, ["residual"], RARE, NEW_TOKENS)


def test_contexts_too_short_or_too_long_are_refused() -> None:
    lm = lm_of("tiny-gpt2")
    for source, target in (((5,), TARGET), (SOURCE, (5,)), ((), TARGET)):
        with pytest.raises(ItemFailed, match="at least two tokens"):
            sweep(lm, Pair(source, target), ["resid"], RARE, NEW_TOKENS)
    assert list(swept(lm, Pair((5, 6), (7, 8)), ["resid"], layers=[0])) == [("", -1), ("resid", 0)]
    limited = replace(lm, max_positions=len(TARGET) + NEW_TOKENS)
    assert swept(limited)
    with pytest.raises(ItemFailed, match=f"needs {len(TARGET) + NEW_TOKENS} positions, the model has 28"):
        sweep(replace(lm, max_positions=28), PAIR, PATCHES, RARE, NEW_TOKENS)
    # The word may reach further than the continuation does.
    deep = build_trie([tuple(range(1, 12))])
    with pytest.raises(ItemFailed, match=f"needs {len(TARGET) + 10} positions"):
        sweep(limited, PAIR, PATCHES, deep, NEW_TOKENS)
    # And the source further than both.
    with pytest.raises(ItemFailed, match="the model has 29"):
        sweep(limited, Pair(random_ids(40, 1), TARGET), ["resid"], RARE, NEW_TOKENS)


def test_gpt2_patches_up_to_its_last_position() -> None:
    lm = lm_of("tiny-gpt2")
    long = random_ids(1024 - NEW_TOKENS, 1)
    assert swept(lm, Pair(SOURCE, long), ["resid"], layers=[3])
    with pytest.raises(ItemFailed):
        sweep(lm, Pair(SOURCE, (*long, 5)), ["resid"], RARE, NEW_TOKENS, layers=[3])


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_rows_whose_numbers_are_not_finite_fail_and_the_others_keep_theirs(family: str) -> None:
    """A source that overflows at its first token reaches every row that takes something from it, and no other.

    At the first layer the keys of other tokens do not know that token yet.
    """
    lm = poisoned_lm(family=family)
    ill = replace(PAIR, source=(POISON, *SOURCE[1:]))
    names = ["knockout_instruction", "resid", "kv_question", "attn"]
    rows = dict(zip(by_identity(lm, names), sweep(lm, ill, names, RARE, NEW_TOKENS), strict=True))
    clean = swept(lm, PAIR, names)
    for (name, layer), row in rows.items():
        if name in ("", "knockout_instruction") or (name, layer) == ("kv_question", 0):
            assert isinstance(row, Patched), (name, layer)
            assert gap(row, clean[name, layer]) < OF_PROBS
        else:
            assert isinstance(row, NotFinite), (name, layer)


def test_a_layer_that_overflows_fails_its_own_row_alone() -> None:
    """The source's last blocks give NaN; a patch taken before them is sound."""
    lm = poisoned_lm()

    forwards = iter(range(100))

    def overflow(_module: object, _args: object, output: Tensor) -> Tensor | None:
        forward, output = next(forwards), output.clone()
        if forward < 2:  # first of the texts that are forwarded together, then of those forwarded one by one
            output[:, : len(PAIR.source)] = torch.nan
        return output

    handle = lm.anatomy.blocks[2].register_forward_hook(overflow)
    rows = dict(zip(by_identity(lm, ["resid"]), sweep(lm, PAIR, ["resid"], RARE, NEW_TOKENS), strict=True))
    handle.remove()
    clean = swept(lm, PAIR, ["resid"])
    assert [layer for (_, layer), row in rows.items() if isinstance(row, NotFinite)] == [2, 3]
    for key, row in rows.items():
        if isinstance(row, Patched):
            assert gap(row, clean[key]) < OF_PROBS


def test_a_target_that_overflows_fails_every_row() -> None:
    rows = sweep(poisoned_lm(), replace(PAIR, target=(*TARGET[:3], POISON, *TARGET[4:])), PATCHES, RARE, NEW_TOKENS)
    assert len(rows) == 25
    assert all(isinstance(row, NotFinite) for row in rows)
