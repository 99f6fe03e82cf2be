"""Statistics of the experiment, thin on numpy and scipy. Knows no store and no model.

Everything is resampled over prompts: the samples of one prompt are correlated, and drawing them one by one would make
every interval too narrow. Functions in the plural work on M measures at once, one column each. Intervals are 95 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, stdtr, stdtrit  # not scipy.stats: it takes most of a second to import

NUM_BOOTSTRAPS = 1000
NUM_GROUPS = 10
"""Most groups of a calibration curve."""
GROUP_SIZE = 5
"""Fewest prompts in one of its groups, where there are as many."""
_FEWEST_DRAWS = 0.9
"""Share of the bootstrap's draws that must determine a line, or there is none to report."""
_NEWTON_STEPS = 60
_LONGEST_STEP = 3.0
"""On the scale of the logit, anywhere among the prompts: further out Newton's quadratic is no likeness of the likelihood."""
_CONVERGED = 1e-9
"""A step that moves no prompt's logit further ends the search; the error left is of the order of its square."""
_COUNTS_AT_ONCE = 2**25
"""Counts of prompts in draws that are in memory together, three times over: 800 MB. A thousand draws of 33,000 prompts are one
part; of 100,000 they took 2.4 GB."""
_AT_ONCE = 4_000_000  # numbers in one matrix of draws × prompts
_RESOLUTION = 1e-12
"""A standard error below this share of the means is rounding: float64 carries 16 digits, and sums lose some."""


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


def estimate_of(values: Sequence[float], stored: Mapping[str, Any] | None, seed: int = 0) -> Estimate:
    """The mean of one value per prompt as a row of `statistics` has it, if it is of as many prompts; else computed here, so
    that what is shown before the analysis, and beside it, is the same number."""
    if stored is None or stored["n"] != len(values) or stored["value"] is None:
        return mean_interval(values, seed)
    value, low, high, se = (np.nan if stored[key] is None else stored[key] for key in ("value", "low", "high", "se"))
    return Estimate(value, low, high, len(values), se)


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
    half = stdtrit(df, 0.975) * se
    return Intervals(value, se, value - half, value + half, _p_of_t(value, se, df))


def t_intervals(given: Moments) -> Intervals:
    """Means with Student's interval, from moments alone; no p. One prompt, or prompts that do not vary, allow none."""
    se = _determined(np.sqrt(given.var / given.n), given.n, np.abs(given.mean))
    half = stdtrit(np.maximum(given.n - 1, 1), 0.975) * se
    return Intervals(given.mean, se, given.mean - half, given.mean + half, np.full_like(se, np.nan))


def benjamini_hochberg(p: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """q of each p: the lowest false-discovery rate at which it would count (Benjamini & Hochberg 1995). Refuses NaN."""
    assert np.isfinite(p).all(), "leave out the tests that were not made before correcting for their number"
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh") if len(p) else p


class Support(NamedTuple):
    """The P0 that a fit rests on: smallest, 5 %, 95 % and largest of its prompts. Elsewhere the fit is extrapolated."""

    low: float
    most_low: float
    most_high: float
    high: float


def support_of(p0: Float[np.ndarray, " N"]) -> Support:
    """The support of a fit to prompts of these P0."""
    return Support(*(float(v) for v in np.quantile(p0, [0.0, 0.05, 0.95, 1.0])))


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
    support: Support

    def predict(self, p0: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return expit(self.intercept + self.slope * p0)


class Curve(NamedTuple):
    """A fit as it is drawn, G places from 0 to 1: P0, P(violation), its pointwise 95 % band, and whether prompts of both
    lower and higher P0 stand behind it. The ends of the fit's support are among the places."""

    p0: Float[np.ndarray, " G"]
    value: Float[np.ndarray, " G"]
    low: Float[np.ndarray, " G"]
    high: Float[np.ndarray, " G"]
    is_supported: Bool[np.ndarray, " G"]


class Fitted(NamedTuple):
    """A fit and its curve, both from the same draws of prompts."""

    fit: LogisticFit
    curve: Curve


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
    found = fit_with_curve(p0, violations, trials, seed, num_bootstraps)
    return None if found is None else found.fit


def fit_with_curve(
    p0: Float[np.ndarray, " N"],
    violations: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    trials: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> Fitted | None:
    """`fit_violations`, and the curve whose band is from the same draws."""
    if len(p0) < 3 or np.ptp(p0) == 0 or not 0 < violations.sum() < trials.sum():
        return None
    counts = np.column_stack([violations, trials - violations]).astype(np.float64)
    (whole,) = _lines(p0, counts, np.ones((1, len(p0))), (0.0, 0.0))
    if np.isnan(whole).any():
        return None
    line = float(whole[0]), float(whole[1])
    draws = _lines_of_draws(p0, counts, line, seed, num_bootstraps)
    if draws is None:
        return None
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    se = np.std(draws, axis=0, ddof=1)
    fit = LogisticFit(
        *line,
        (float(low[0]), float(high[0])),
        (float(low[1]), float(high[1])),
        len(p0),
        int(trials.sum()),
        _mcfadden(counts, whole[0] + whole[1] * p0),
        float(se[0]),
        float(se[1]),
        support_of(p0),
    )
    return Fitted(fit, _curve(line, fit.support, draws))


def curve_of_fit(
    line: tuple[float, float],
    p0: Float[np.ndarray, " N"],
    violations: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    trials: Float[np.ndarray, " N"] | Int[np.ndarray, " N"],
    seed: int = 0,
    num_bootstraps: int = NUM_BOOTSTRAPS,
) -> Curve:
    """The curve of a fit's (intercept, slope) to these prompts where nobody kept it: the draws are made once more.

    They are the very draws that the fit's intervals are from where seed and number are the same. The band is NaN where too
    few of them determine a line.
    """
    counts = np.column_stack([violations, trials - violations]).astype(np.float64)
    return _curve(line, support_of(p0), _lines_of_draws(p0, counts, line, seed, num_bootstraps))


def _curve(line: tuple[float, float], ends: Support, draws: Float[np.ndarray, "R 2"] | None) -> Curve:
    x = np.unique(np.concatenate([np.linspace(0, 1, 101), np.clip([ends.low, ends.high], 0, 1)]))
    low = high = np.full_like(x, np.nan)
    if draws is not None:
        low, high = np.quantile(expit(draws[:, :1] + draws[:, 1:] * x), [0.025, 0.975], axis=0)
    return Curve(x, expit(line[0] + line[1] * x), low, high, (x >= ends.low) & (x <= ends.high))


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


def _lines_of_draws(
    p0: Float[np.ndarray, " N"],
    counts: Float[np.ndarray, "N 2"],
    whole: tuple[float, float],
    seed: int,
    num_bootstraps: int,
) -> Float[np.ndarray, "R 2"] | None:
    """Intercept and slope of each draw of prompts that determines them; None where more than a tenth do not.

    `whole` is the line of all prompts: the search for a draw's begins there.
    """
    rng = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // len(p0))
    parts = [min(size, num_bootstraps - start) for start in range(0, num_bootstraps, size)]
    lines = np.concatenate([_lines(p0, counts, _draws(rng, len(p0), n), whole) for n in parts])
    found = lines[np.isfinite(lines).all(axis=1)]
    return found if len(found) >= _FEWEST_DRAWS * num_bootstraps else None


def _lines(
    p0: Float[np.ndarray, " N"],
    counts: Float[np.ndarray, "N 2"],
    weights: Float[np.ndarray, "R N"],
    start: tuple[float, float],
) -> Float[np.ndarray, "R 2"]:
    """Intercept and slope of greatest likelihood for each row of weights of the prompts, by Newton's method on all rows
    at once; NaN where there is no greatest one. `counts` are violations and what is none, a row a prompt.
    """
    lines = np.full((len(weights), 2), np.nan)
    lines[_is_determined(p0, counts, weights)] = start
    left = np.flatnonzero(np.isfinite(lines[:, 0]))
    ends, trials = np.array([p0.min(), p0.max()]), counts.sum(axis=1)
    for _ in range(_NEWTON_STEPS):
        mean = expit(lines[left, :1] + lines[left, 1:] * p0)
        pull = weights[left] * (counts[:, 0] - trials * mean)
        bend = weights[left] * trials * mean * (1 - mean)
        g0, g1 = pull.sum(axis=1), pull @ p0
        h00, h01, h11 = bend.sum(axis=1), bend @ p0, bend @ p0**2
        determinant = np.maximum(h00 * h11 - h01**2, np.finfo(float).tiny)
        step = np.column_stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / determinant[:, None]
        reach = np.abs(step[:, :1] + step[:, 1:] * ends).max(axis=1)
        lines[left] += step * np.minimum(1.0, _LONGEST_STEP / np.maximum(reach, 1e-300))[:, None]
        left = left[reach > _CONVERGED]
        if not len(left):
            break
    lines[left] = np.nan  # a likelihood so flat that rounding hides its top determines no line either
    return lines


def _is_determined(
    p0: Float[np.ndarray, " N"], counts: Float[np.ndarray, "N 2"], weights: Float[np.ndarray, "R N"]
) -> Bool[np.ndarray, " R"]:
    # Albert & Anderson (1984): the maximum exists just where both outcomes overlap in P0 from both sides.
    yes, no = ((weights > 0) & (counts[:, side] > 0) for side in (0, 1))
    highest_yes, highest_no = (np.where(has, p0, -np.inf).max(axis=1) for has in (yes, no))
    lowest_yes, lowest_no = (np.where(has, p0, np.inf).min(axis=1) for has in (yes, no))
    return yes.any(axis=1) & no.any(axis=1) & (highest_yes > lowest_no) & (highest_no > lowest_yes)


def _mcfadden(counts: Float[np.ndarray, "N 2"], linear: Float[np.ndarray, " N"]) -> float:
    # Without the binomial coefficients: they would make it depend on how samples are grouped into prompts.
    fitted = -(counts * np.logaddexp(0, np.column_stack([-linear, linear]))).sum()
    totals = counts.sum(axis=0)
    return float(1 - fitted / (totals * np.log(totals / totals.sum())).sum())


def _means_of_draws(
    values: Float[np.ndarray, "N M"], rng: np.random.Generator, num_bootstraps: int
) -> Float[np.ndarray, "R M"]:
    """Means over prompts drawn with replacement, as counts of prompts times values: one product for all columns."""
    size = max(1, _COUNTS_AT_ONCE // len(values))
    parts = [min(size, num_bootstraps - start) for start in range(0, num_bootstraps, size)]
    return np.concatenate([_draws(rng, len(values), n) @ values / len(values) for n in parts])


def _draws(rng: np.random.Generator, num_prompts: int, num_draws: int) -> Float[np.ndarray, "R N"]:
    """How often each prompt is in each of R draws with replacement."""
    draws = rng.integers(0, num_prompts, size=(num_draws, num_prompts))
    draws += num_prompts * np.arange(num_draws)[:, None]
    return np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape).astype(np.float64)


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
    return 2 * stdtr(df, -np.abs(value) / se)
