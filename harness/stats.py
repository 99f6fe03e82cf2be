"""Statistics of the experiment, thin on numpy, scipy and statsmodels. Knows no store and no model.

Everything is resampled over prompts: the samples of one prompt are correlated, and drawing them one by one would make
every interval too narrow. Functions in the plural work on M measures at once, one column each. Intervals are 95 %.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import statsmodels.api as sm
from jaxtyping import Float, Int
from scipy import stats
from scipy.special import expit
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

NUM_BOOTSTRAPS = 1000
EDGES = (0.2, 0.4, 0.6, 0.8)
BIN_NAMES = ("[0, .2)", "[.2, .4)", "[.4, .6)", "[.6, .8)", "[.8, 1]")
NUM_GROUPS = 10
"""Most groups of a calibration curve."""
GROUP_SIZE = 5
"""Fewest prompts in one of its groups, where there are as many."""
_RESOLUTION = 1e-12
"""A standard error below this share of the means is rounding: float64 carries 16 digits, and sums lose some."""


def bin_of(p0: float) -> int:
    """The pressure bin of a P0: [0,.2) [.2,.4) [.4,.6) [.6,.8) [.8,1]."""
    return int(np.searchsorted(EDGES, p0, side="right"))


class Intervals(NamedTuple):
    """M values, each with its standard error, 95 % interval and p; NaN where the data do not determine one."""

    value: Float[np.ndarray, " M"]
    se: Float[np.ndarray, " M"]
    low: Float[np.ndarray, " M"]
    high: Float[np.ndarray, " M"]
    p: Float[np.ndarray, " M"]


class Moments(NamedTuple):
    """Number of prompts (≥ 1), mean and unbiased variance of M measures; the variance of one prompt is NaN."""

    n: Float[np.ndarray, " M"]
    mean: Float[np.ndarray, " M"]
    var: Float[np.ndarray, " M"]


def moments(values: Float[np.ndarray, "N M"]) -> Moments:
    """Moments of each column, one row a prompt."""
    num_prompts, num_columns = values.shape
    var = values.var(axis=0, ddof=1) if num_prompts > 1 else np.full(num_columns, np.nan)
    return Moments(np.full(num_columns, float(num_prompts)), values.mean(axis=0), var)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, its 95 % interval and standard error; NaN but for the mean where one prompt allows none."""

    mean: float
    low: float
    high: float
    num_prompts: int
    se: float


def mean_interval(values: Sequence[float], seed: int = 0, num_bootstraps: int = NUM_BOOTSTRAPS) -> Estimate:
    """Mean of one value per prompt, with a percentile interval from a bootstrap over prompts (Efron & Tibshirani, §13.3)."""
    assert len(values), "a mean needs at least one prompt"
    found = mean_intervals(np.asarray(values, dtype=np.float64)[:, None], seed, num_bootstraps)
    return Estimate(float(found.value[0]), float(found.low[0]), float(found.high[0]), len(values), float(found.se[0]))


def mean_intervals(values: Float[np.ndarray, "N M"], seed: int = 0, num_bootstraps: int = NUM_BOOTSTRAPS) -> Intervals:
    """`mean_interval` of each column, one row a prompt: the same draws of prompts for all of them. No p."""
    draws = _means_of_draws(values, np.random.default_rng(seed), num_bootstraps)
    return _percentiles(values.mean(axis=0), draws, is_known=len(values) > 1)


def mean_differences(
    one: Float[np.ndarray, "N M"],
    other: Float[np.ndarray, "O M"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> Intervals:
    """Mean of `one` less that of `other`, prompts of two groups: a bootstrap over each group's prompts, p by Welch's t.

    Source: Efron & Tibshirani, §8.3.
    """
    rng = np.random.default_rng(seed)
    draws = _means_of_draws(one, rng, num_bootstraps) - _means_of_draws(other, rng, num_bootstraps)
    found = _percentiles(one.mean(axis=0) - other.mean(axis=0), draws, is_known=min(len(one), len(other)) > 1)
    return found._replace(p=welch(moments(one), moments(other)).p)


def paired_differences(
    one: Float[np.ndarray, "N M"],
    other: Float[np.ndarray, "N M"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> Intervals:
    """Mean of `one` less `other` of the same prompt: a bootstrap over prompts, p by the paired t."""
    gaps = moments(one - other)
    scale = np.maximum(np.abs(one).max(axis=0), np.abs(other).max(axis=0))
    se = _determined(np.sqrt(gaps.var / gaps.n), gaps.n, scale)
    return mean_intervals(one - other, seed, num_bootstraps)._replace(p=_p_of_t(gaps.mean, se, gaps.n - 1))


def welch(one: Moments, other: Moments) -> Intervals:
    """Mean of `one` less that of `other`, two groups with variances of their own, from moments alone.

    Where a side has fewer than two prompts, or neither side varies, only the difference is known.
    Source: Welch (1947), The generalization of `Student's' problem.
    """
    share_one, share_other = one.var / one.n, other.var / other.n
    fewest = np.minimum(one.n, other.n)
    se = _determined(np.sqrt(share_one + share_other), fewest, np.maximum(np.abs(one.mean), np.abs(other.mean)))
    weight = np.where(np.isfinite(se), share_one, np.nan) / se**2
    df = 1 / (weight**2 / np.maximum(one.n - 1, 1) + (1 - weight) ** 2 / np.maximum(other.n - 1, 1))
    value = one.mean - other.mean
    half = stats.t.ppf(0.975, df) * se
    return Intervals(value, se, value - half, value + half, _p_of_t(value, se, df))


def t_intervals(given: Moments) -> Intervals:
    """Means with Student's interval, from moments alone; no p. One prompt, or prompts that do not vary, allow none."""
    se = _determined(np.sqrt(given.var / given.n), given.n, np.abs(given.mean))
    half = stats.t.ppf(0.975, np.maximum(given.n - 1, 1)) * se
    return Intervals(given.mean, se, given.mean - half, given.mean + half, np.full_like(se, np.nan))


def benjamini_hochberg(p: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """q of each p: the lowest false-discovery rate at which it would count (Benjamini & Hochberg 1995). Refuses NaN."""
    assert np.isfinite(p).all(), "leave out the tests that were not made before correcting for their number"
    return stats.false_discovery_control(p, method="bh") if len(p) else p


@dataclass(frozen=True)
class LogisticFit:
    """P(violation) = σ(intercept + slope·P0), with 95 % intervals and standard errors from a bootstrap over prompts.

    `mcfadden_r2` is 1 − log-likelihood / that of the intercept alone, of single samples (McFadden 1974).
    """

    intercept: float
    slope: float
    intercept_interval: tuple[float, float]
    slope_interval: tuple[float, float]
    num_prompts: int
    num_samples: int
    mcfadden_r2: float
    intercept_se: float
    slope_se: float

    def predict(self, p0: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return expit(self.intercept + self.slope * p0)


def fit_violations(
    p0: Float[np.ndarray, " N"],
    violations: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    trials: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> LogisticFit | None:
    """Binomial regression of violation counts on P0, one row a prompt; None where the data do not determine a line.

    `violations` may be fractional (expected counts). No penalty. A bootstrap draw that is separated is left out, and
    with more than a tenth of such draws there is no fit to report.
    """
    if len(p0) < 3 or np.ptp(p0) == 0 or not 0 < violations.sum() < trials.sum():
        return None
    design = np.column_stack([np.ones_like(p0), p0])
    counts = np.column_stack([violations, trials - violations]).astype(np.float64)
    whole = _binomial(design, counts, None)
    if whole is None:
        return None
    rng = np.random.default_rng(seed)
    fits = []
    for _ in range(num_bootstraps):
        weights = np.bincount(rng.integers(0, len(p0), size=len(p0)), minlength=len(p0))
        drawn = weights > 0
        fit = _binomial(design[drawn], counts[drawn] * weights[drawn, None], whole)
        if fit is not None:
            fits.append(fit)
    if len(fits) < 0.9 * num_bootstraps:
        return None
    low, high = np.quantile(np.array(fits), [0.025, 0.975], axis=0)
    se = np.std(fits, axis=0, ddof=1)
    return LogisticFit(
        float(whole[0]), float(whole[1]), (float(low[0]), float(high[0])), (float(low[1]), float(high[1])),
        len(p0), int(trials.sum()), _mcfadden(counts, design @ whole), float(se[0]), float(se[1]),
    )  # fmt: skip


class CalibrationGroup(NamedTuple):
    """Prompts of neighbouring P0: their mean P0, the violation rate observed, and the one the fit predicts."""

    p0: float
    observed: Estimate
    predicted: float


def calibration(
    fit: LogisticFit,
    p0: Float[np.ndarray, " N"],
    violations: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    trials: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> list[CalibrationGroup]:
    """At most `NUM_GROUPS` groups of equally many prompts, by rising P0; the intervals are over prompts.

    Fewer groups where one would have fewer than `GROUP_SIZE` prompts.
    """
    rates = violations / trials
    order = np.lexsort((rates, p0))
    groups = np.array_split(order, min(NUM_GROUPS, max(1, len(p0) // GROUP_SIZE)))
    predicted = fit.predict(p0)
    return [
        CalibrationGroup(
            float(p0[g].mean()),
            mean_interval(rates[g].tolist(), seed, num_bootstraps),
            float(predicted[g].mean()),
        )
        for g in groups
    ]


def _binomial(
    design: Float[np.ndarray, "N 2"], counts: Float[np.ndarray, "N 2"], start: Float[np.ndarray, " 2"] | None
) -> Float[np.ndarray, " 2"] | None:
    # Albert & Anderson (1984): the maximum exists just where both outcomes overlap in P0 from both sides.
    yes, no = design[counts[:, 0] > 0, 1], design[counts[:, 1] > 0, 1]
    if not (len(yes) and len(no) and yes.max() > no.min() and no.max() > yes.min()):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfectSeparationWarning)  # said of a perfect fit too, which is none
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # a saturated draw has no degree of freedom left: 0/0 in its scale
        return sm.GLM(counts, design, family=sm.families.Binomial()).fit(start_params=start, maxiter=50).params


def _mcfadden(counts: Float[np.ndarray, "N 2"], linear: Float[np.ndarray, " N"]) -> float:
    # Without the binomial coefficients: they would make it depend on how samples are grouped into prompts.
    fitted = -(counts * np.logaddexp(0, np.column_stack([-linear, linear]))).sum()
    totals = counts.sum(axis=0)
    return float(1 - fitted / (totals * np.log(totals / totals.sum())).sum())


def _means_of_draws(
    values: Float[np.ndarray, "N M"], rng: np.random.Generator, num_bootstraps: int
) -> Float[np.ndarray, "R M"]:
    """Means over prompts drawn with replacement, as counts of prompts times values: one product for all columns."""
    num_prompts = len(values)
    draws = rng.integers(0, num_prompts, size=(num_bootstraps, num_prompts))
    draws += num_prompts * np.arange(num_bootstraps)[:, None]
    counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    return counts.astype(np.float64) @ values / num_prompts


def _percentiles(value: Float[np.ndarray, " M"], draws: Float[np.ndarray, "R M"], is_known: bool) -> Intervals:
    missing = np.full_like(value, np.nan)
    if not is_known:
        return Intervals(value, missing, missing, missing, missing)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return Intervals(value, draws.std(axis=0, ddof=1), low, high, missing)


def _determined(
    se: Float[np.ndarray, " M"], n: Float[np.ndarray, " M"], scale: Float[np.ndarray, " M"]
) -> Float[np.ndarray, " M"]:
    """The standard error; NaN where it rests on one prompt, or on no variation but rounding."""
    return np.where((n > 1) & (se > _RESOLUTION * scale), se, np.nan)


def _p_of_t(
    value: Float[np.ndarray, " M"], se: Float[np.ndarray, " M"], df: Float[np.ndarray, " M"]
) -> Float[np.ndarray, " M"]:
    return 2 * stats.t.sf(np.abs(value) / se, df)
