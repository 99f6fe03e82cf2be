"""Which tokens one model raised over another, against plain forwards and by hand; and the tokens it chose from."""

import numpy as np
import pytest
import torch

from harness.errors import ItemFailed, NotFinite
from harness.models import plain
from harness.models.best import most_probable
from harness.models.raised import NUM_TOP, Sums, _of_table, raised
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from tests.models.test_decode import poisoned_lm, random_ids
from tests.tiny import FAMILIES, tiny_lm

CONTEXTS = [random_ids(9, 0), random_ids(1, 1), random_ids(23, 2), random_ids(9, 0)[:5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_over_a_text_equal_those_of_plain_forwards(family: str) -> None:
    pair = Pair(tiny_lm(family), tiny_lm(family, seed=1), 256)
    for context, sums in zip(CONTEXTS, raised(pair, CONTEXTS), strict=True):
        assert isinstance(sums, Sums)
        table = plain.differences(pair, context)
        for place, rows in ((0, table[:-1]), (1, table[-1:])):
            assert (sums.n[place] == len(rows)).all()
            assert np.allclose(sums.total[place], rows.sum(0), atol=1e-3)
            assert np.allclose(sums.squares[place], (rows**2).sum(0), rtol=1e-3, atol=1e-3)
            assert sums.top[place].sum() == NUM_TOP * len(rows)
            if len(rows) > 2:
                assert np.allclose(sums.sd[place], rows.std(0, ddof=1), atol=1e-3)
                assert (sums.positive[place] == (rows > 0).sum(0)).mean() > 0.98
    # Control: the other way round is the negative.
    (back,) = raised(Pair(pair.before, pair.after, 256), CONTEXTS[:1])
    (there,) = raised(pair, CONTEXTS[:1])
    assert isinstance(back, Sums)
    assert isinstance(there, Sums)
    assert np.allclose(back.total, -there.total, atol=1e-4)
    assert np.abs(there.total).max() > 0.1


def test_by_hand_with_tokens_that_a_model_rules_out() -> None:
    minus = -torch.inf
    table = torch.tensor([[1.0, -2.0, minus, 0.5], [3.0, 2.0, 1.0, torch.nan]], dtype=torch.float64)
    sums = _of_table(table, 1)
    assert sums.n.tolist() == [[0, 0, 0, 0], [2, 2, 1, 1]]
    assert sums.total[1].tolist() == [4.0, 0.0, 1.0, 0.5]
    assert sums.squares[1].tolist() == [10.0, 8.0, 1.0, 0.25]
    assert sums.positive[1].tolist() == [2, 1, 1, 1]
    assert np.isnan(sums.mean[0]).all()
    assert sums.sd[1][0] == pytest.approx(np.sqrt(2))
    assert np.isnan(sums.sd[1][2])
    both = sums + Sums.none(4) + sums
    assert both.total[1].tolist() == [8.0, 0.0, 2.0, 1.0]
    assert Sums.of(both.tensors()).n.tolist() == both.n.tolist()


def test_one_that_is_not_finite_or_too_long_fails_alone() -> None:
    pair = Pair(poisoned_lm(256), tiny_lm("tiny-llama", seed=1), 256)
    found = raised(pair, [*CONTEXTS, (5, 256, 6), (), random_ids(pair.max_positions + 1, 0)])
    assert [isinstance(f, ItemFailed) for f in found] == [False] * len(CONTEXTS) + [True] * 3
    assert [isinstance(f, NotFinite) for f in found[-3:]] == [True, False, False]
    for alone, beside in zip(raised(pair, CONTEXTS), found, strict=False):
        assert isinstance(alone, Sums)
        assert isinstance(beside, Sums)
        assert np.allclose(alone.total, beside.total, atol=1e-4)


def test_the_most_probable_tokens_are_those_a_rollout_was_drawn_from() -> None:
    pair = Pair(tiny_lm("tiny-qwen2"), tiny_lm("tiny-gpt2", seed=1), 256)
    context = random_ids(7, 3)
    (done,) = rollouts(pair, [Ask(context, 5, 0.0, 6)], Rule(temperature=0.0))
    assert isinstance(done, Rollout)
    (alone,) = most_probable(pair, [(context, done.token_ids)], 3)
    _, beside = most_probable(pair, [(random_ids(20, 1), [1, 2]), (context, done.token_ids)], 3)
    assert alone["after_ids"][:, 0].tolist() == done.token_ids, "greedy is the first of them"
    assert np.allclose(alone["after_logps"][:, 0], done.logp_after, atol=1e-4)
    for name, values in alone.items():
        assert values.shape == (6, 3), name
        assert np.allclose(values, beside[name], atol=1e-4), name
