"""Statistics of the experiment, thin on numpy and statsmodels. Knows no store and no model.

Everything is resampled over prompts: the samples of one prompt are correlated, and drawing them one by one would make
every interval too narrow.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import statsmodels.api as sm
from jaxtyping import Float, Int
from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

NUM_BOOTSTRAPS = 1000
EDGES = (0.2, 0.4, 0.6, 0.8)
BIN_NAMES = ("[0, .2)", "[.2, .4)", "[.4, .6)", "[.6, .8)", "[.8, 1]")


def bin_of(p0: float) -> int:
    """The pressure bin of a P0: [0,.2) [.2,.4) [.4,.6) [.6,.8) [.8,1]."""
    return int(np.searchsorted(EDGES, p0, side="right"))


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval; NaN bounds where one prompt allows none."""

    mean: float
    low: float
    high: float
    num_prompts: int


def mean_interval(values: Sequence[float], seed: int = 0, num_bootstraps: int = NUM_BOOTSTRAPS) -> Estimate:
    """Mean of one value per prompt, with a percentile interval from a bootstrap over prompts (Efron & Tibshirani, §13.3)."""
    data = np.asarray(values, dtype=np.float64)
    assert data.size, "a mean needs at least one prompt"
    if data.size == 1:
        return Estimate(float(data[0]), float("nan"), float("nan"), 1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, data.size, size=(num_bootstraps, data.size))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), data.size)


@dataclass(frozen=True)
class LogisticFit:
    """P(violation) = σ(intercept + slope·P0), with 95 % intervals from a bootstrap over prompts."""

    intercept: float
    slope: float
    intercept_interval: tuple[float, float]
    slope_interval: tuple[float, float]
    num_prompts: int
    num_samples: int

    def predict(self, p0: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return 1 / (1 + np.exp(-(self.intercept + self.slope * p0)))


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
    return LogisticFit(
        float(whole[0]), float(whole[1]), (float(low[0]), float(high[0])), (float(low[1]), float(high[1])),
        len(p0), int(trials.sum()),
    )  # fmt: skip


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
