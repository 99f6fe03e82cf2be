"""How often something rare happens, from samples of distributions in which it is frequent.

A behaviour of one answer in ten thousand needs a hundred thousand answers to be counted. Drawn under arms that say it more
often, and weighed by how much less likely each hit is naturally, a few hundred will do (multiple importance sampling: Veach &
Guibas 1995; of rare outputs of language models: arXiv 2604.22167). Knows no store and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, logit, logsumexp

from harness.stats import Estimate, mean_interval

FEWEST_PROMPTS = 20
"""Fewer give no interval: a bootstrap over them would be of too few values."""
FEWEST_HITS = 5
"""Of an arm whose rate is extrapolated from."""
_FEWEST_ARMS = 2


@dataclass(frozen=True)
class Drawn:
    """N rollouts of some prompts under K arms, as one detector sees them; failed ones are not among them.

    The log-probabilities, in nats, are of each rollout up to where the detector fired (of one that is no hit they are not
    used): naturally, and under each arm as it really was drawn from.
    """

    prompt: Int[np.ndarray, " N"]
    arm: Int[np.ndarray, " N"]
    is_hit: Bool[np.ndarray, " N"]
    logp_natural: Float[np.ndarray, " N"]
    logp_arms: Float[np.ndarray, "N K"]


@dataclass(frozen=True)
class NaturalRate:
    """The natural rate, with an interval where there are prompts enough; `effective_size` is how many equally weighted hits
    the hits are worth (Kish)."""

    estimate: Estimate
    num_hits: int
    effective_size: float


def weights(drawn: Drawn) -> Float[np.ndarray, " N"]:
    """The balance heuristic's weight of each rollout, p_natural / Σ_k (n_k / N) q_k over its prompt's rollouts; 0 where it is
    no hit. At most N / n of an arm that is the natural distribution itself."""
    found = np.zeros(len(drawn.is_hit))
    for prompt in np.unique(drawn.prompt):
        mine = drawn.prompt == prompt
        counts = np.bincount(drawn.arm[mine], minlength=drawn.logp_arms.shape[1])
        hits = mine & drawn.is_hit
        with np.errstate(divide="ignore"):  # an arm that was not drawn has no part in the mixture
            mixture = logsumexp(drawn.logp_arms[hits] + np.log(counts / counts.sum()), axis=1)
        found[hits] = np.exp(drawn.logp_natural[hits] - mixture)
    return found


def natural_rate(drawn: Drawn, seed: int = 0) -> NaturalRate:
    """Mean over prompts of how often each gives a hit naturally. Unbiased, since every rollout's true probability is known."""
    assert len(drawn.prompt), "a rate needs at least one rollout"
    of_each = weights(drawn)
    prompts, place, counts = np.unique(drawn.prompt, return_inverse=True, return_counts=True)
    rates = np.bincount(place, weights=of_each, minlength=len(prompts)) / counts
    estimate = mean_interval(rates.tolist(), seed)
    if len(prompts) < FEWEST_PROMPTS:
        estimate = Estimate(estimate.mean, np.nan, np.nan, len(prompts), np.nan)
    squares = float((of_each**2).sum())
    return NaturalRate(estimate, int(drawn.is_hit.sum()), float(of_each.sum()) ** 2 / squares if squares else 0.0)


def extrapolated_rate(
    alphas: Sequence[float], num_hits: Sequence[int], num_rollouts: Sequence[int], at: float = 0.0
) -> float:
    """The rate at α = `at`, read off a line through logit(rate) of the arms beyond it with enough hits, and misses (Pernice &
    Aranguri 2026). NaN with fewer than two such arms. A guess of a form, not an estimate: it has no interval."""
    alpha, hits, all_ = (np.asarray(x, dtype=np.float64) for x in (alphas, num_hits, num_rollouts))
    used = (alpha > at) & (hits >= FEWEST_HITS) & (hits < all_)
    if used.sum() < _FEWEST_ARMS:
        return float("nan")
    _, height = np.polyfit(alpha[used] - at, logit(hits[used] / all_[used]), 1)
    return float(expit(height))
