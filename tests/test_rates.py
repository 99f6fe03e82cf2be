"""Natural rates from amplified samples, against a truth that is known."""

import numpy as np
import pytest
from scipy.special import expit, logit, xlog1py, xlogy

from harness.rates import FEWEST_PROMPTS, Drawn, extrapolated_rate, natural_rate, weights

ALPHAS = np.array([0.0, 1.0, 2.0])
STRENGTH = 1.6
"""How much an arm raises the log-odds of a hit, a unit of α."""


def true_rates(num_prompts: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(np.log(3e-4), np.log(3e-2), num_prompts))


def drawn(natural: np.ndarray, seed: int, num_samples: int = 16, alphas: np.ndarray = ALPHAS) -> Drawn:
    """Rollouts that say one of two things: how often, each arm knows exactly."""
    rng = np.random.default_rng([seed, 7])
    prompt, arm, _ = (x.ravel() for x in np.indices((len(natural), len(alphas), num_samples)))
    of_arms = expit(logit(natural)[:, None] + STRENGTH * alphas)
    is_hit = rng.random(len(prompt)) < of_arms[prompt, arm]

    def logp(p: np.ndarray) -> np.ndarray:
        said = is_hit[:, None] if p.ndim == 2 else is_hit
        return xlogy(said, p) + xlog1py(~said, -p)

    return Drawn(prompt, arm, is_hit, logp(natural[prompt]), logp(of_arms[prompt]))


def test_the_weighted_rate_covers_the_truth_and_the_unweighted_does_not() -> None:
    natural = true_rates(100)
    found = [natural_rate(drawn(natural, seed)) for seed in range(100)]
    covered = [f.estimate.low <= natural.mean() <= f.estimate.high for f in found]
    assert sum(covered) >= 93
    # Control: hits counted as they were drawn.
    counted = [drawn(natural, seed).is_hit.mean() for seed in range(20)]
    assert not any(f.estimate.low <= c <= f.estimate.high for f, c in zip(found, counted, strict=False))


def test_it_is_unbiased_and_much_closer_than_counting_natural_samples() -> None:
    natural = true_rates(30)
    weighted = [natural_rate(drawn(natural, seed)).estimate.mean for seed in range(400)]
    alone = [drawn(natural, seed, 48, ALPHAS[:1]).is_hit.mean() for seed in range(400)]
    error = np.std(weighted) / np.sqrt(len(weighted))
    assert abs(np.mean(weighted) - natural.mean()) < 4 * error
    assert np.var(alone) > 3 * np.var(weighted), "with as many rollouts in all"


def test_weights_are_bounded_by_the_share_of_the_natural_arm() -> None:
    given = drawn(true_rates(50), 0, num_samples=8)
    found = weights(given)
    assert found.max() <= 3.0 + 1e-9  # of three arms, one is natural
    assert (found[~given.is_hit] == 0).all()
    assert (found[given.is_hit] > 0).all()
    # Alone, the natural arm weighs every hit as one.
    alone = drawn(true_rates(50), 0, 200, ALPHAS[:1])
    assert np.allclose(weights(alone)[alone.is_hit], 1)
    assert natural_rate(alone).estimate.mean == pytest.approx(alone.is_hit.mean())
    assert natural_rate(alone).effective_size == pytest.approx(alone.is_hit.sum())


def test_an_arm_without_rollouts_has_no_part_in_it() -> None:
    """As where all of an arm's rollouts of a prompt failed."""
    given = drawn(true_rates(40), 3)
    kept = ~((given.arm == 2) & (given.prompt % 2 == 0))
    some = Drawn(*(getattr(given, name)[kept] for name in ("prompt", "arm", "is_hit", "logp_natural", "logp_arms")))
    two = drawn(true_rates(40), 3)
    hits = np.flatnonzero(some.is_hit & (some.prompt % 2 == 0))
    assert len(hits)
    mixture = np.log(np.exp(some.logp_arms[hits][:, :2]).mean(1))
    assert np.allclose(weights(some)[hits], np.exp(some.logp_natural[hits] - mixture))
    assert not np.allclose(weights(two)[kept][hits], weights(some)[hits])


def test_few_prompts_give_a_rate_and_no_interval() -> None:
    for num in (FEWEST_PROMPTS - 1, FEWEST_PROMPTS):
        found = natural_rate(drawn(true_rates(num), 1, 64)).estimate
        assert found.mean > 0
        assert np.isnan(found.low) == (num < FEWEST_PROMPTS)
    nothing = natural_rate(drawn(np.full(25, 1e-12), 0))
    assert (nothing.estimate.mean, nothing.num_hits, nothing.effective_size) == (0.0, 0, 0.0)


def test_a_line_through_the_log_odds_is_read_off_where_it_is_asked() -> None:
    alphas, num = [-1.0, 0.0, 1.0, 2.0, 3.0], 10**7
    rates = expit(-6.0 + 1.5 * np.array(alphas))
    hits = (rates * num).round().astype(int)
    assert extrapolated_rate(alphas, hits.tolist(), [num] * 5) == pytest.approx(float(expit(-6.0)), rel=1e-3)
    assert extrapolated_rate(alphas, [0, 0, *hits[2:]], [num] * 5) == pytest.approx(float(expit(-6.0)), rel=1e-3)
    for few in ([0, 0, 4, 4, 500], [9, 9, 9, 0, 0], [0, 0, 8, num, 0]):
        assert np.isnan(extrapolated_rate(alphas, few, [num] * 5))
