"""Exact probabilities under every arm, against two plain forwards of each sequence and against what rollouts draw."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from harness.errors import ItemFailed
from harness.models import plain
from harness.models.arms import ArmScores, score_arms
from harness.models.noise import row_key
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from harness.text.words import build_trie
from harness.tolerance import TOLERANCE
from tests.models.test_rollout import ARMS, pair_of, poisoned_lm, random_ids
from tests.tiny import FAMILIES, tiny_lm

NATS = TOLERANCE["float32"].nats
TRIES = [
    build_trie([(5, 6, 7), (5, 9), (200,), (5, 6, 8, 8)]), build_trie([(1,)]), build_trie([(3, 3, 3, 3, 3, 3), (4, 3)]),
]  # fmt: skip
CONTEXTS = [random_ids(n, 4) for n in (20, 1, 50)]


def scored(pair: Pair, contexts=CONTEXTS, tries=TRIES, arms=ARMS) -> list[ArmScores]:
    found = score_arms(pair, contexts, tries, arms)
    assert all(isinstance(s, ArmScores) for s in found), found
    return found  # type: ignore[return-value]


def plainly(pair: Pair, context: tuple[int, ...], sequence: tuple[int, ...], alpha: float) -> float:
    """ln P_α(sequence | context): both models forwarded once over the whole text, the arithmetic in float64."""
    tables = [plain.next_logits(lm, [*context, *sequence])[:, : pair.num_common].double() for lm in pair.lms]
    after, before = (t.log_softmax(-1) for t in tables)
    p = (after + alpha * (after - before)).log_softmax(-1)
    return float(sum(p[len(context) - 1 + n, token] for n, token in enumerate(sequence)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sequence_under_every_arm_equals_two_plain_forwards(family: str) -> None:
    pair = pair_of(family)
    for scores, context, trie in zip(scored(pair), CONTEXTS, TRIES, strict=True):
        want = [[plainly(pair, context, s, alpha) for s in trie.sequences] for alpha in ARMS]
        assert scores.logprobs.shape == (len(ARMS), len(trie.sequences))
        assert np.allclose(scores.logprobs, want, rtol=0, atol=40 * NATS)
    assert np.ptp(scored(pair)[0].logprobs, axis=0).min() > 1000 * NATS, "the control: arms differ"


def test_a_score_does_not_depend_on_its_company() -> None:
    pair = pair_of("tiny-gemma3")
    together = scored(pair)
    for n in range(3):
        (alone,) = scored(pair, CONTEXTS[n : n + 1], TRIES[n : n + 1])
        assert np.allclose(alone.logprobs, together[n].logprobs, rtol=0, atol=20 * NATS)


def test_a_complete_cover_has_probability_one_under_every_arm() -> None:
    pair = pair_of("tiny-llama")
    trie = build_trie([(token,) for token in range(256) if token != 9] + [(9, token) for token in range(256)])
    (scores,) = scored(pair, CONTEXTS[:1], [trie])
    assert np.allclose(np.exp(scores.logprobs).sum(1), 1, atol=1e-5)


def test_rollouts_draw_a_beginning_as_often_as_its_exact_probability_says() -> None:
    """In the exact rate's 99.9 % interval for every arm; control: not in that of another arm's."""
    pair = pair_of("tiny-llama")
    tokens = np.argsort(-plain.next_logits(pair.lms[0], CONTEXTS[0])[-1, :256].numpy())[:6]
    trie = build_trie([(int(t),) for t in tokens])
    (scores,) = scored(pair, CONTEXTS[:1], [trie])
    exact = np.exp(scores.logprobs).sum(1)
    num = 1_500
    asks = [Ask(CONTEXTS[0], row_key(1, "p", "lda", s), alpha, 1) for alpha in ARMS for s in range(num)]
    done = rollouts(pair, asks, Rule())
    drawn = np.array([isinstance(d, Rollout) and d.token_ids[0] in tokens for d in done]).reshape(len(ARMS), num)
    counts = drawn.sum(1)
    low, high = binom.interval(0.999, num, exact)
    assert ((low <= counts) & (counts <= high)).all()
    assert not ((low <= counts[::-1]) & (counts[::-1] <= high)).all()


def test_what_is_not_finite_or_does_not_fit_fails_alone() -> None:
    ill = Pair(poisoned_lm(256), tiny_lm("tiny-llama", seed=1), 256)
    contexts = [CONTEXTS[0], (256, 4), CONTEXTS[1], (), random_ids(60, 2)]
    short = replace(ill, before=replace(tiny_lm("tiny-llama", seed=1), max_positions=61))
    results = score_arms(short, contexts, [TRIES[0]] * 5, ARMS)
    assert [isinstance(r, ItemFailed) for r in results] == [False, True, False, True, True]
    assert "the model has 61" in str(results[4])
    for n in (0, 2):
        (alone,) = scored(ill, [contexts[n]], TRIES[:1])
        assert np.allclose(results[n].logprobs, alone.logprobs, rtol=0, atol=20 * NATS)  # type: ignore[union-attr]
