"""Tokens are computed once, in the layers where they are distinct, and counted as they go through."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from harness import tally
from harness.models import patch as patch_module
from harness.models.attend import Layout, right_padded
from harness.models.cells import Late, filled_cells, late_cells, shared_cells
from harness.models.decode import Request, Sampling, decode
from harness.models.load import LM
from harness.models.patch import PATCHES, Patched, enter_late, sweep
from harness.models.score import score_trees
from harness.text.words import Tokens
from tests.models.test_patch import PAIR, likely, stopping_lm
from tests.models.test_taps import ALL, lm_of, random_ids

CPU = torch.device("cpu")
TEXTS: tuple[Tokens, ...] = (
    *(
        random_ids(9, 1) + tail
        for tail in (random_ids(20, 2), random_ids(3, 3), random_ids(20, 2)[:7] + random_ids(2, 4))
    ),
    random_ids(30, 5),
)
"""The second and third open as the first does, the third further than the second; the last shares nothing."""
OF_PROBS = 1e-5


@contextmanager
def counted(lm: LM) -> Iterator[list[int]]:
    """Tokens that enter the attention of every block, counted beside the harness: an entry a call."""
    seen: list[int] = []

    def count(_module: object, args: tuple, kwargs: dict) -> None:
        resid = args[0] if args else kwargs["hidden_states"]
        seen.append(resid.shape[0] * resid.shape[1])

    attentions = [
        next(m for m in b.modules() if getattr(m, "layer_idx", None) is not None and m is not b)
        for b in lm.anatomy.blocks
    ]
    handles = [a.register_forward_pre_hook(count, with_kwargs=True) for a in attentions]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(lm: LM, texts: Sequence[Tokens], *, is_packed: bool) -> list[torch.Tensor]:
    """Final-norm output of each text's own tokens."""
    tokens, layout = right_padded(texts, lm.device)
    if not is_packed:
        layout = Layout(layout.q_positions, layout.k_positions)
    with torch.inference_mode():
        whole = lm.hidden(tokens, layout)
    return [whole[r, : len(t)] for r, t in enumerate(texts)]


@pytest.mark.parametrize("family", ALL)
def test_a_forward_without_padding_and_repetition_gives_what_the_padded_one_gives(family: str) -> None:
    lm = lm_of(family)
    distinct = {t[:n] for t in TEXTS for n in range(1, len(t) + 1)}
    with counted(lm) as seen:
        packed = hidden_of(lm, TEXTS, is_packed=True)
    assert seen == [len(distinct)] * len(lm.anatomy.blocks)
    for a, b in zip(packed, hidden_of(lm, TEXTS, is_packed=False), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


def test_a_beginning_that_is_not_common_may_not_be_shared() -> None:
    """Control for the test above: one token more taken as common changes what the second text says."""
    lm = lm_of("tiny-llama")
    wrong = (TEXTS[0], TEXTS[0][:10] + TEXTS[1][10:])
    (_, a), (_, b) = (hidden_of(lm, texts, is_packed=True) for texts in (wrong, TEXTS[:2]))
    assert not torch.allclose(a[-1], b[-1], rtol=0, atol=1e-3 * float(b.abs().max()))


def test_cells_hold_each_distinct_beginning_once_and_what_is_a_rows_own_apart() -> None:
    cells = shared_cells([(1, 2, 3), (1, 2), (1, 2, 3)], [0, 1, 2], CPU)
    assert cells.source.tolist() == [[0, 1, 2, 0, 0], [0, 1, 3, 0, 0], [0, 1, 2, 4, 5]]
    assert (cells.row.tolist(), cells.column.tolist()) == ([0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 3, 4])
    assert len(shared_cells([(1, 2, 3), (1, 2), (1, 2, 3)], [0, 1, 2], CPU, is_apart=True)) == 11
    packed = torch.arange(6.0)[None, :, None]
    assert cells.gather(cells.spread(packed)).equal(packed)
    ragged = filled_cells([2, 0, 1], CPU)
    assert (len(ragged), ragged.source.shape) == (3, (3, 2))


def test_rows_enter_at_their_layer_and_their_leader_stands_for_them_before() -> None:
    late = enter_late([-1, 2, 0, 1], [(), (), (), ()], num_layers=4)
    assert (late.entry.tolist(), late.leader.tolist()) == ([0, 2, 0, 1], [0, 0, 0, 0])
    cells = late_cells(4, 2, late, CPU)
    assert [len(cells.at(layer)) for layer in range(4)] == [4, 6, 8, 8]
    assert cells.at(0).source.tolist() == [[0, 1], [0, 1], [2, 3], [0, 1]]
    assert cells.at(1).source.tolist() == [[0, 1], [0, 1], [2, 3], [4, 5]]
    assert cells.at(3).source.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Texts that differ have leaders of their own: of those patched, the one patched highest.
    late = enter_late([0, 3, 1, 2], [(5,), (5,), (6,), (6,)], num_layers=4)
    assert (late.entry.tolist(), late.leader.tolist()) == ([0, 0, 1, 0], [1, 1, 3, 3])
    with pytest.raises(AssertionError, match="leader"):
        late_cells(2, 1, Late(np.array([1, 1]), np.array([0, 0])), CPU)


@pytest.mark.parametrize("family", ALL)
def test_a_sweep_forwards_the_layers_that_a_patch_can_change_and_no_more(family: str) -> None:
    """And the rows equal those of a sweep in which every row goes through every layer."""
    lm, trie = stopping_lm(family), likely(family)
    with counted(lm) as seen:
        rows = sweep(lm, PAIR, PATCHES, trie, 6)
    with pytest.MonkeyPatch.context() as patched, counted(lm) as whole:
        patched.setattr(patch_module, "enter_late", _at_once)
        plain = sweep(lm, PAIR, PATCHES, trie, 6)
    for a, b in zip(rows, plain, strict=True):
        assert isinstance(a, Patched)
        assert isinstance(b, Patched)
        assert a.continuation.token_ids == b.continuation.token_ids
        assert np.abs(np.exp(a.scores.logprobs) - np.exp(b.scores.logprobs)).max() < OF_PROBS
    assert sum(seen) < 0.9 * sum(whole)


def _at_once(layers: Sequence[int], _texts: object, _num_layers: int) -> Late:
    return Late(np.zeros(len(layers), dtype=np.int64), np.arange(len(layers)))


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2", "tiny-neox"])
@pytest.mark.parametrize("name", ["resid", "kv_question", "knockout_instruction"])
def test_a_row_that_enters_one_layer_late_differs(family: str, name: str) -> None:
    """Control: the layer in which a row is patched is the last one that may be left out."""
    lm, trie = lm_of(family), likely(family)

    def too_late(layers: Sequence[int], texts: Sequence[Sequence[int]], num_layers: int) -> Late:
        return enter_late([n if n < 0 else n + 1 for n in layers], texts, num_layers + 1)

    right = sweep(lm, PAIR, [name], trie, 6, layers=[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_module, "enter_late", too_late)
        late = sweep(lm, PAIR, [name], trie, 6, layers=[1])
    # An activation put in too early for its row is put into its leader, which is the untouched target here.
    apart = [np.abs(a.scores.logprobs - b.scores.logprobs).max() for a, b in zip(right, late, strict=True)]  # type: ignore[union-attr]
    assert max(apart) > 1e-3


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2"])
def test_tokens_counted_equal_tokens_forwarded(family: str) -> None:
    lm, trie = lm_of(family), likely(family)
    work = {
        "scores": lambda: score_trees(lm, TEXTS, [trie] * len(TEXTS)),
        "completions": lambda: decode([lm], [Request(t, n) for t in TEXTS for n in range(4)], Sampling(5, 1.0, 0.9)),
        "patches": lambda: sweep(lm, PAIR, PATCHES, trie, 6),
    }
    for name, act in work.items():
        before = tally.now()
        with counted(lm) as seen:
            act()
        told = tally.now() - before
        assert told.tokens * len(lm.anatomy.blocks) == pytest.approx(sum(seen)), name
        contexts = len({t[:n] for t in TEXTS for n in range(1, len(t) + 1)})
        assert 0 < told.prefill < told.tokens, name
        assert name == "patches" or told.prefill == pytest.approx(contexts), name
        assert told.padding == 0
