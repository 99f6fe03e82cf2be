"""Intervals that cover, fits that recover what was planted, and the summary of a run against plain numpy."""

import io
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import minimize
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from harness import stats
from harness.commands import launch, show
from harness.experiments.gravity.bins import BIN_NAMES, EDGES, bin_of
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.summary import summarise
from harness.run import Manifest
from harness.stats import (
    Estimate,
    Intervals,
    LogisticFit,
    Moments,
    benjamini_hochberg,
    calibration,
    curve_of_fit,
    fit_violations,
    mean_differences,
    mean_interval,
    mean_intervals,
    moments,
    paired_differences,
    support_of,
    t_intervals,
    welch,
)
from harness.store import Batch, BatchResult, Failure, Reader, Row, Store
from tests.commands import saying
from tests.gravity import EXPERIMENT

patient = settings(deadline=None)  # a busy machine is no failure
INTERCEPT, SLOPE = -2.4, 2.27  # the paper's, arXiv 2601.08070


# ---- bins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p0", "index"),
    [(0.0, 0), (0.2, 1), (0.4, 2), (0.6, 3), (0.8, 4), (1.0, 4), *((float(np.nextafter(e, 0)), i) for i, e in enumerate(EDGES))],
)  # fmt: skip
def test_a_bin_takes_in_its_lower_edge_and_the_last_one_both(p0: float, index: int) -> None:
    assert bin_of(p0) == index


@patient
@given(st.floats(0, 1))
def test_a_bin_is_the_one_its_name_says(p0: float) -> None:
    low, high = BIN_NAMES[bin_of(p0)].strip("[])").split(", ")
    assert float(low) <= p0 < float(high) or (p0 == 1.0 and high == "1")
    assert BIN_NAMES[bin_of(p0)].endswith("]" if high == "1" else ")")


# ---- means ----------------------------------------------------------------------------------------------------


def test_an_interval_over_prompts_covers_and_one_over_samples_is_too_narrow() -> None:
    """Prompts differ (Beta(.3, .7)), so the 16 samples of one say little more than one does."""
    rng = np.random.default_rng(1)
    over_prompts, over_samples = [], []
    for trial in range(200):
        rates = rng.beta(0.3, 0.7, size=50)
        samples = rng.random((50, 16)) < rates[:, None]
        over_prompts.append(covers(mean_interval(samples.mean(axis=1).tolist(), trial, 300), 0.3))
        over_samples.append(covers(mean_interval(samples.astype(float).ravel().tolist(), trial, 300), 0.3))
    # 200 trials know a coverage of .95 to within ±.03; the percentile interval itself is a point or two short of it.
    assert 0.90 <= np.mean(over_prompts) <= 0.98
    assert np.mean(over_samples) < 0.6  # the control


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@patient
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 100))
def test_an_interval_lies_within_the_data_and_is_the_same_for_the_same_seed(values: list[float], seed: int) -> None:
    found = mean_interval(values, seed, 200)
    assert found == mean_interval(values, seed, 200)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.num_prompts == len(values)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12  # a mean of equal numbers may round


def test_another_seed_gives_another_interval_and_the_same_mean() -> None:
    values = np.random.default_rng(0).random(30).tolist()
    one, other = mean_interval(values, 0), mean_interval(values, 1)
    assert one.mean == other.mean
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low == pytest.approx(other.low, abs=0.02)  # a tenth of the interval: Monte Carlo error at B=1000


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    found = mean_interval([0.25])
    assert (found.mean, found.num_prompts) == (0.25, 1)
    assert np.isnan([found.low, found.high]).all()
    with pytest.raises(AssertionError, match="at least one prompt"):
        mean_interval([])


def test_a_bootstrap_is_the_mean_of_prompts_drawn_with_replacement() -> None:
    """The slow reference draws, and takes means; ours counts how often each prompt was drawn."""
    values = np.random.default_rng(2).random((17, 3))
    found = mean_intervals(values, seed=5, num_bootstraps=400)
    draws = values[np.random.default_rng(5).integers(0, 17, size=(400, 17))].mean(axis=1)
    assert found.value == pytest.approx(values.mean(axis=0))
    assert np.array([found.low, found.high]) == pytest.approx(np.quantile(draws, [0.025, 0.975], axis=0))
    assert found.se == pytest.approx(draws.std(axis=0, ddof=1))
    assert np.isnan(found.p).all()
    for column in range(3):  # a column alone is the same
        alone = mean_interval(values[:, column].tolist(), seed=5, num_bootstraps=400)
        assert (alone.low, alone.high, alone.se) == pytest.approx(
            (found.low[column], found.high[column], found.se[column]), rel=1e-12
        )


# ---- differences ----------------------------------------------------------------------------------------------


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_welch_by_hand_and_as_scipy_has_it() -> None:
    one, other = column(1, 2, 3, 4), column(2, 4, 6)
    found = welch(moments(one), moments(other))
    # Variances 5/3 and 4: se = √(5/12 + 4/3) = √1.75; df = 1.75² / ((5/12)²/3 + (4/3)²/2) = 3.2347.
    assert found.value[0] == -1.5
    assert found.se[0] == pytest.approx(1.75**0.5)
    reference: Any = ttest_ind(one[:, 0], other[:, 0], equal_var=False)
    assert reference.df == pytest.approx(3.2347, abs=1e-4)
    assert found.p[0] == pytest.approx(reference.pvalue)
    assert (found.low[0], found.high[0]) == pytest.approx(tuple(reference.confidence_interval()))
    assert mean_differences(one, other).p[0] == found.p[0]
    back = welch(moments(other), moments(one))
    assert (back.value[0], back.p[0], back.low[0]) == pytest.approx((1.5, found.p[0], -found.high[0]))


def test_students_interval_and_the_paired_t_are_scipys() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.random((9, 2)), rng.random((9, 2))
    found, paired = t_intervals(moments(one)), paired_differences(one, other, num_bootstraps=50)
    for i in range(2):
        low, high = ttest_1samp(one[:, i], 0).confidence_interval()
        assert (found.low[i], found.high[i]) == pytest.approx((low, high))
        assert paired.p[i] == pytest.approx(ttest_rel(one[:, i], other[:, i]).pvalue)
    assert np.isnan(found.p).all()
    assert paired.value == pytest.approx((one - other).mean(axis=0))
    assert paired.low == pytest.approx(mean_intervals(one - other, num_bootstraps=50).low)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        pytest.param(column(3), column(1, 2), 1.5, id="one prompt"),
        pytest.param(column(1, 2), column(3), -1.5, id="one prompt on the other side"),
        pytest.param(column(2, 2, 2), column(1, 1), 1.0, id="neither side varies"),
        pytest.param(column(*[0.1 + 0.2] * 3), column(*[0.3, 0.1 + 0.2, 0.3]), 0.0, id="nothing but rounding varies"),
    ],
)
def test_what_moments_do_not_determine_is_nan_without_a_warning(
    one: np.ndarray, other: np.ndarray, value: float
) -> None:
    found = welch(moments(one), moments(other))
    assert found.value[0] == pytest.approx(value, abs=1e-12)
    assert np.isnan([found.se[0], found.low[0], found.high[0], found.p[0]]).all()
    assert np.isnan(mean_differences(one, other, num_bootstraps=20).p).all()


def test_one_side_that_varies_determines_a_difference() -> None:
    """The control of the law above; beside a column that is not determined, too."""
    found = welch(
        Moments(np.array([3.0, 1.0]), np.array([2.0, 2.0]), np.array([0.0, np.nan])),
        Moments(np.array([3.0, 5.0]), np.array([1.0, 1.0]), np.array([0.3, 0.3])),
    )
    reference: Any = ttest_1samp([1 - 0.3**0.5, 1, 1 + 0.3**0.5], 2)
    assert found.p[0] == pytest.approx(reference.pvalue)
    assert np.isnan(found.p[1])
    assert np.isfinite([one[0] for one in found]).all()


def test_one_pair_or_equal_pairs_have_a_mean_difference_and_no_p() -> None:
    one = paired_differences(column(0.5), column(0.25), num_bootstraps=20)
    assert one.value[0] == 0.25
    assert np.isnan([one.se[0], one.low[0], one.high[0], one.p[0]]).all()
    level = paired_differences(column(0.5, 0.75), column(0.25, 0.5), num_bootstraps=20)
    assert (level.value[0], level.low[0], level.high[0]) == (0.25, 0.25, 0.25)
    assert np.isnan(level.p[0])


def gap(found: Intervals, truth: float) -> bool:
    return bool(found.low[0] <= truth <= found.high[0])


def test_intervals_of_differences_cover_over_prompts_and_are_too_narrow_over_samples() -> None:
    """30 failures against 50 successes that vary more; 8 samples of a prompt say little more than one does."""
    rng = np.random.default_rng(6)
    covered: dict[str, list[bool]] = {}
    for trial in range(600):
        failures = rng.beta(6, 4, size=30)[:, None] + rng.normal(0, 0.05, (30, 8))
        successes = rng.beta(0.3, 0.7, size=50)[:, None] + rng.normal(0, 0.05, (50, 8))
        for unit, (one, other) in {
            "prompts": (failures.mean(axis=1, keepdims=True), successes.mean(axis=1, keepdims=True)),
            "samples": (failures.reshape(-1, 1), successes.reshape(-1, 1)),
        }.items():
            covered.setdefault(f"welch {unit}", []).append(gap(welch(moments(one), moments(other)), 0.3))
            covered.setdefault(f"bootstrap {unit}", []).append(gap(mean_differences(one, other, trial, 300), 0.3))
    rates = {name: np.mean(hits) for name, hits in covered.items()}
    for name in ("welch", "bootstrap"):
        assert 0.92 <= rates[f"{name} prompts"] <= 0.975, (
            rates
        )  # 600 trials: .95 ± .018; percentiles fall a little short
        assert rates[f"{name} samples"] < 0.65, rates  # the control


def test_pairing_narrows_the_interval_and_it_still_covers() -> None:
    """Prompts differ much, phrasings little: compared prompt by prompt the difference is plain."""
    rng = np.random.default_rng(8)
    covered, narrower = [], []
    for trial in range(150):
        base = rng.random((40, 1))
        one, other = base + rng.normal(0.05, 0.1, (40, 1)), base + rng.normal(0, 0.1, (40, 1))
        paired, apart = paired_differences(one, other, trial, 200), mean_differences(one, other, trial, 200)
        covered.append(gap(paired, 0.05))
        narrower.append(paired.high[0] - paired.low[0] < 0.7 * (apart.high[0] - apart.low[0]))
    assert 0.89 <= np.mean(covered) <= 0.99
    assert np.mean(narrower) > 0.95


# ---- false discoveries ----------------------------------------------------------------------------------------


def test_q_by_hand() -> None:
    # By rank p·4/rank is .02 .02 .04 .04, and no q is above that of a larger p.
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert benjamini_hochberg(np.array([0.3])).tolist() == [0.3]
    assert benjamini_hochberg(np.array([])).tolist() == []
    with pytest.raises(AssertionError, match="leave out"):
        benjamini_hochberg(np.array([0.1, np.nan]))


def test_q_keeps_false_discoveries_rare_where_p_does_not() -> None:
    """100 tests of noise, and the same with 20 planted differences: the share of false ones among those found."""
    rng = np.random.default_rng(9)
    any_q, any_p, false_share, power = [], [], [], []
    for _ in range(200):
        one, other = rng.normal(size=(25, 100)), rng.normal(size=(35, 100))
        p = welch(moments(one), moments(other)).p
        any_q.append((benjamini_hochberg(p) < 0.05).any())
        any_p.append((p < 0.05).any())
        one[:, :20] += 1.5
        found = benjamini_hochberg(welch(moments(one), moments(other)).p) < 0.05
        false_share.append(found[20:].sum() / max(1, found.sum()))
        power.append(found[:20].mean())
    assert np.mean(any_q) < 0.1  # .05 ± .03 for 200 repetitions
    assert np.mean(any_p) > 0.9  # the control
    assert np.mean(false_share) < 0.06
    assert np.mean(power) > 0.9


# ---- the fit --------------------------------------------------------------------------------------------------


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def planted(rng: np.random.Generator, num_prompts: int, trials: int, spread: float | None = None):
    """P0 and violation counts with mean σ(INTERCEPT + SLOPE·P0); with `spread`, each prompt has a rate of its own."""
    p0 = rng.random(num_prompts)
    rate = sigma(INTERCEPT + SLOPE * p0)
    rate = rng.beta(rate * spread, (1 - rate) * spread) if spread else rate
    return p0, rng.binomial(trials, rate), np.full(num_prompts, trials)


def test_the_fit_recovers_planted_coefficients() -> None:
    fit = fit_violations(*planted(np.random.default_rng(0), 4000, 16), num_bootstraps=100)
    assert fit is not None
    assert fit.intercept == pytest.approx(INTERCEPT, abs=0.08)  # about two standard errors at 64,000 samples
    assert fit.slope == pytest.approx(SLOPE, abs=0.13)
    assert (fit.num_prompts, fit.num_samples) == (4000, 64_000)
    assert fit.slope_interval[0] < fit.slope < fit.slope_interval[1]
    shuffled = planted(np.random.default_rng(0), 4000, 16)
    control = fit_violations(np.random.default_rng(1).permutation(shuffled[0]), *shuffled[1:], num_bootstraps=100)
    assert control is not None
    assert control.slope_interval[0] < 0 < control.slope_interval[1]


def test_the_fits_interval_covers_and_one_over_samples_is_too_narrow() -> None:
    """Prompts with a rate of their own (beta-binomial): resampling single samples forgets that they hang together."""
    rng = np.random.default_rng(3)
    over_prompts, over_samples = [], []
    for trial in range(40):
        p0, violations, trials = planted(rng, 60, 8, spread=1.5)
        fit = fit_violations(p0, violations, trials, trial, 60)
        assert fit is not None
        over_prompts.append(fit.slope_interval[0] <= SLOPE <= fit.slope_interval[1])
        one_by_one = (np.arange(8)[None] < violations[:, None]).astype(float).ravel()
        fit = fit_violations(p0.repeat(8), one_by_one, np.ones(len(p0) * 8), trial, 60)
        assert fit is not None
        over_samples.append(fit.slope_interval[0] <= SLOPE <= fit.slope_interval[1])
    assert 0.85 <= np.mean(over_prompts) <= 1.0  # 40 trials: .95 ± .07, and percentile intervals fall a little short
    assert np.mean(over_samples) < 0.78  # the control


@pytest.mark.parametrize("fractional", [False, True])
def test_the_fit_is_the_maximum_of_the_likelihood(fractional: bool) -> None:
    rng = np.random.default_rng(5)
    p0, violations, trials = planted(rng, 60, 16)
    counts = violations * 1.0
    if fractional:
        counts, trials = trials * sigma(INTERCEPT + SLOPE * p0 + rng.normal(size=60)), trials + rng.integers(0, 3, 60)

    def loss(ab: np.ndarray) -> float:
        linear = ab[0] + ab[1] * p0
        return float(-(counts * linear - trials * np.logaddexp(0, linear)).sum())

    best = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x
    fit = fit_violations(p0, counts, trials, num_bootstraps=20)
    assert fit is not None
    # BFGS stops where the slope of the likelihood is 1e-8.
    assert [fit.intercept, fit.slope] == pytest.approx(best, abs=1e-4)


def test_expected_counts_without_noise_give_the_planted_line_exactly() -> None:
    p0 = np.linspace(0, 1, 30)
    fit = fit_violations(p0, 16 * sigma(INTERCEPT + SLOPE * p0), np.full(30, 16.0), num_bootstraps=50)
    assert fit is not None
    flat = [fit.intercept, *fit.intercept_interval]
    assert flat == pytest.approx([INTERCEPT] * 3, abs=1e-6)
    assert [fit.slope, *fit.slope_interval] == pytest.approx([SLOPE] * 3, abs=1e-6)
    assert fit.predict(p0) == pytest.approx(sigma(INTERCEPT + SLOPE * p0), abs=1e-7)


def test_the_same_seed_gives_the_same_fit_and_another_seed_another_interval() -> None:
    data = planted(np.random.default_rng(7), 50, 16)
    one, same, other = (fit_violations(*data, seed, 60) for seed in (0, 0, 1))
    assert one is not None
    assert other is not None
    assert one == same
    assert (one.intercept, one.slope) == (other.intercept, other.slope)
    assert one.slope_interval != other.slope_interval


def test_mcfaddens_r2_by_hand_and_of_single_samples() -> None:
    p0 = np.repeat([0.0, 1.0], 10)
    fit = fit_violations(p0, np.repeat([1, 3], 10), np.full(20, 4), num_bootstraps=20)
    assert fit is not None
    # Rates ¼ and ¾ against ½ everywhere: 1 − (¼·ln ¼ + ¾·ln ¾) / ln ½.
    assert fit.mcfadden_r2 == pytest.approx(1 - (0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / np.log(0.5))
    p0, violations, trials = planted(np.random.default_rng(2), 80, 6)
    fit = fit_violations(p0, violations, trials, num_bootstraps=20)
    assert fit is not None
    one_by_one = (np.arange(6)[None] < violations[:, None]).astype(float).ravel()
    reference = sm.Logit(one_by_one, sm.add_constant(p0.repeat(6))).fit(disp=0)
    assert fit.mcfadden_r2 == pytest.approx(reference.prsquared, abs=1e-7)
    assert fit.slope == pytest.approx(reference.params[1], abs=1e-4)
    # Control: where P0 says nothing, it explains nothing.
    control = fit_violations(np.random.default_rng(0).permutation(p0), violations, trials, num_bootstraps=20)
    assert control is not None
    assert 0 <= control.mcfadden_r2 < 0.02 < fit.mcfadden_r2


def test_the_fit_of_every_draw_is_that_of_an_ordinary_regression() -> None:
    """All draws at once by Newton's method, against statsmodels draw by draw; separated draws are left out by both."""
    rng = np.random.default_rng(11)
    p0, violations, trials = 0.16 * rng.random(14), rng.binomial(4, 0.25, 14), np.full(14, 4)
    design = sm.add_constant(p0)
    draws, slopes = np.random.default_rng(5).integers(0, 14, size=(300, 14)), []
    for drawn in draws:
        yes, no = (p0[drawn][counts[drawn] > 0] for counts in (violations, trials - violations))
        if yes.max() > no.min() and no.max() > yes.min():
            counts = np.column_stack([violations, trials - violations])[drawn]
            slopes.append(sm.GLM(counts, design[drawn], family=sm.families.Binomial()).fit(tol=1e-12).params)
    fit = fit_violations(p0, violations, trials, seed=5, num_bootstraps=300)
    assert fit is not None
    low, high = np.quantile(slopes, [0.025, 0.975], axis=0)
    assert [*fit.intercept_interval, *fit.slope_interval] == pytest.approx([low[0], high[0], low[1], high[1]], rel=1e-6)
    assert fit.slope_se == pytest.approx(np.std(slopes, axis=0, ddof=1)[1], rel=1e-6)


def test_a_fit_says_the_pressure_it_rests_on_and_its_curve_where_that_ends() -> None:
    p0 = np.linspace(0.02, 0.16, 15)
    counts = np.random.default_rng(0).binomial(16, 0.3, 15)
    fit = fit_violations(p0, counts, np.full(15, 16), 3, 200)
    assert fit is not None
    # Quantiles of 15 equal steps: 5 % is .7 of the first step in.
    assert fit.support == pytest.approx((0.02, 0.027, 0.153, 0.16))
    curve = curve_of_fit((fit.intercept, fit.slope), p0, counts, np.full(15, 16), 3, 200)
    assert curve.p0[[0, -1]].tolist() == [0.0, 1.0]
    inside = curve.p0[curve.is_supported]
    assert inside[[0, -1]].tolist() == pytest.approx([0.02, 0.16])
    assert curve.value == pytest.approx(fit.predict(curve.p0))
    width = curve.high - curve.low
    assert width[~curve.is_supported].max() > 2 * width[curve.is_supported].max()  # what the dashes warn of
    everywhere = curve_of_fit((0.0, 1.0), np.linspace(0, 1, 15), counts, np.full(15, 16), 3, 50)
    assert everywhere.is_supported.all()


def test_the_band_of_a_curve_is_from_the_very_draws_of_the_fits_intervals() -> None:
    data = planted(np.random.default_rng(7), 50, 16)
    fit = fit_violations(*data, 4, 300)
    assert fit is not None
    line = fit.intercept, fit.slope
    curve = curve_of_fit(line, *data, 4, 300)
    # At P0 = 0 the curve is σ(intercept). Quantiles lie between two draws, so σ of one is not quite the other.
    assert [curve.low[0], curve.high[0]] == pytest.approx(sigma(np.array(fit.intercept_interval)), abs=1e-4)
    other = curve_of_fit(line, *data, 5, 300)
    assert abs(other.low[0] - curve.low[0]) > 1e-4  # the control: another seed's draws
    assert (curve.low <= curve.value).all()
    assert (curve.value <= curve.high).all()


def test_prompts_of_one_pressure_allow_no_band() -> None:
    curve = curve_of_fit((0.0, 1.0), np.full(9, 0.5), np.arange(9), np.full(9, 16))
    assert np.isnan([curve.low, curve.high]).all()
    assert np.isfinite(curve.value).all()


def test_the_fits_standard_errors_agree_with_its_intervals() -> None:
    fit = fit_violations(*planted(np.random.default_rng(1), 300, 16), num_bootstraps=400)
    assert fit is not None
    for se, (low, high) in ((fit.slope_se, fit.slope_interval), (fit.intercept_se, fit.intercept_interval)):
        assert (high - low) / (2 * 1.96) == pytest.approx(se, rel=0.15)  # nearly normal; 400 draws know it to ±7 %


@pytest.mark.parametrize(("num_prompts", "sizes"), [(3, [3]), (12, [6, 6]), (23, [6, 6, 6, 5]), (200, [20] * 10)])
def test_calibration_groups_hold_equally_many_prompts_by_rising_pressure(num_prompts: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(num_prompts)
    p0 = rng.permutation(np.linspace(0, 1, num_prompts))
    expected = 16 * sigma(INTERCEPT + SLOPE * p0)
    fit = fit_violations(*planted(rng, 100, 16), num_bootstraps=20)
    assert fit is not None
    groups = calibration(fit, p0, expected, np.full(num_prompts, 16.0), num_bootstraps=50)
    assert [g.observed.num_prompts for g in groups] == sizes
    starts = np.cumsum([0, *sizes])
    chunks = [np.sort(p0)[a:b] for a, b in pairwise(starts)]
    assert [g.p0 for g in groups] == pytest.approx([c.mean() for c in chunks])
    assert [g.predicted for g in groups] == pytest.approx([fit.predict(c).mean() for c in chunks])
    assert [g.observed.mean for g in groups] == pytest.approx([sigma(INTERCEPT + SLOPE * c).mean() for c in chunks])
    order = rng.permutation(num_prompts)
    again = calibration(fit, p0[order], expected[order], np.full(num_prompts, 16.0), num_bootstraps=50)
    assert again == groups  # the prompts' order says nothing


TENTHS = np.linspace(0, 1, 11)
TIED = np.repeat([0.1, 0.9], 20)


@pytest.mark.parametrize(
    ("p0", "violations", "trials"),
    [
        pytest.param(TENTHS[:2], np.array([1, 2]), np.array([4, 4]), id="two prompts"),
        pytest.param(np.full(9, 0.5), np.arange(9), np.full(9, 16), id="one pressure"),
        pytest.param(TENTHS, np.zeros(11), np.full(11, 16), id="never"),
        pytest.param(TENTHS, np.full(11, 16), np.full(11, 16), id="always"),
        pytest.param(TENTHS, (TENTHS > 0.5) * 1, np.ones(11), id="separated"),
        pytest.param(TENTHS, (TENTHS > 0.5) * 16, np.full(11, 16), id="separated counts"),
        pytest.param(TENTHS, (TENTHS < 0.5) * 16, np.full(11, 16), id="separated downwards"),
        pytest.param(TENTHS, np.array([0] * 5 + [3] + [16] * 5), np.full(11, 16), id="separated but for one prompt"),
        pytest.param(TIED, np.where(TIED < 0.5, np.arange(40) % 5, 16), np.full(40, 16), id="separated but for ties"),
        pytest.param(
            np.array([0.1] * 11 + [0.9]),
            np.array([3, 5] * 6),
            np.full(12, 16),
            id="one pressure in a third of the draws",
        ),
    ],
)
def test_data_that_do_not_determine_a_line_give_none_without_a_warning(
    p0: np.ndarray, violations: np.ndarray, trials: np.ndarray
) -> None:
    """Warnings are errors here. Separated but for ties: the likelihood rises for ever towards a vertical line at .9."""
    assert fit_violations(p0, violations, trials, num_bootstraps=100) is None


def test_nearly_the_same_data_do_determine_a_line() -> None:
    """The control of the law above: violations at both pressures, and their absence, in every draw."""
    violations = np.where(TIED < 0.5, np.arange(40) % 5, 16 - (np.arange(40) == 39))
    assert fit_violations(TIED, np.repeat([8, 15], 20), np.full(40, 16), num_bootstraps=50) is not None
    assert fit_violations(TIED, violations, np.full(40, 16), num_bootstraps=50) is None  # 1 draw in 3 is without it
    assert fit_violations(TENTHS, np.arange(11), np.full(11, 16), num_bootstraps=50) is not None


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_fit_is_given_only_where_a_maximum_exists(rows: list[tuple[int, int]]) -> None:
    """For one regressor (Albert & Anderson 1984): violations and their absence must overlap in P0 from both sides."""
    p0, violations = np.array([r[0] for r in rows]) / 4, np.array([float(r[1]) for r in rows])
    fit = fit_violations(p0, violations, np.full(len(rows), 3.0), num_bootstraps=10)
    yes, no = p0[violations > 0], p0[violations < 3]
    if not (len(yes) and len(no) and yes.max() > no.min() and no.max() > yes.min()):
        assert fit is None
    if fit is not None:
        assert np.isfinite([fit.intercept, fit.slope, *fit.intercept_interval, *fit.slope_interval]).all()
        assert fit.slope_interval[0] <= fit.slope_interval[1]


# ---- the summary of a run -------------------------------------------------------------------------------------

P0 = {"a": 0.05, "b": 0.2, "c": 0.45, "d": 0.61, "e": 0.8, "f": 1.0}
VIOLATIONS = {"a": 1, "b": 0, "c": 2, "d": 1, "e": 3, "f": 3, "no_p0": 4}  # of 4 samples


def detection(prompt: str, condition: str, mode: str, sample: int, present: bool) -> Row:
    return {"prompt_id": prompt, "condition": condition, "mode": mode, "sample_id": sample, "word_present": present,
            "word_present_full": True, "format_ok": prompt != "a"}  # fmt: skip


@pytest.fixture
def reader_of(tmp_path: Path) -> Callable[[dict[str, list[Row]], int], Reader]:
    def make(rows: dict[str, list[Row]], num_failed: int = 0) -> Reader:
        with Store(tmp_path / "results.duckdb", SCHEMA) as store:
            store.start_stage("made", 1, 1)
            failures = [Failure(f"item {i}", "planted") for i in range(num_failed)]
            batch = Batch("made", 0, ("all", *(f.key for f in failures)), 1)
            store.add_batches([batch])
            store.commit(batch, BatchResult(rows=rows, failures=failures))
            store.publish(tmp_path / "live.duckdb")
        return Reader(tmp_path / "live.duckdb", SCHEMA)

    return make


def measured() -> dict[str, list[Row]]:
    psem = [{"prompt_id": p, "condition": "baseline", "p_sem": v, "p_word": v / 2} for p, v in P0.items()]
    psem += [{"prompt_id": p, "condition": "negative", "p_sem": 0.1, "p_word": 0.05} for p in VIOLATIONS]
    detections = [
        detection(p, "negative", "sample", sample, sample < k) for p, k in VIOLATIONS.items() for sample in range(4)
    ]
    detections += [detection(p, "negative", "greedy", 0, k > 1) for p, k in VIOLATIONS.items()]
    return {"psem": psem, "detections": detections}


def test_a_summary_says_what_numpy_says_of_the_same_rows(reader_of) -> None:
    with reader_of(measured()) as reader:
        result = summarise(reader, saying())
    baseline, negative = result.conditions
    assert (baseline.condition, negative.condition) == ("baseline", "negative")
    assert (baseline.num_prompts, negative.num_prompts) == (6, 7)
    assert baseline.p_sem == pytest.approx(np.mean(list(P0.values())))
    assert baseline.p_word == pytest.approx(baseline.p_sem / 2)
    assert negative.greedy_rate == pytest.approx(4 / 7)
    assert negative.sample_rate == mean_interval([VIOLATIONS[p] / 4 for p in sorted(VIOLATIONS)])
    assert negative.format_rate == pytest.approx(6 / 7)
    # By pressure only the prompts that have a P0 count.
    expected = [0.25, 0.0, 0.5, 0.25, 0.75]
    assert [one and one.mean for one in negative.by_bin] == expected
    assert [one and one.num_prompts for one in negative.by_bin] == [1, 1, 1, 1, 2]
    x, k = np.array(list(P0.values())), np.array([VIOLATIONS[p] for p in P0], dtype=float)
    assert negative.fit == fit_violations(x, k, np.full(6, 4.0))
    assert result.bin_counts == (1, 1, 1, 1, 2)


def test_a_summary_gives_the_numbers_that_the_analysis_stored_and_no_second_ones(reader_of) -> None:
    """It fitted and resampled again with seed 0, where the stage had the run's: two values of one number."""
    rows = measured()
    stored = {("rates", "violation_rate", "all"): 7, ("rates", "violation_rate", BIN_NAMES[4]): 2,
              ("fit", "intercept", "all"): 6, ("fit", "slope", "all"): 6, ("fit", "mcfadden_r2", "all"): 6}  # fmt: skip
    rows["statistics"] = [
        {"analysis": a, "condition": "negative", "measured": "", "step_kind": "", "measure": m, "grouping": g, "patch": "",
         "layer": -1, "head": -1, "value": 0.5, "se": 0.1, "low": 0.25, "high": 0.75, "n": n}
        for (a, m, g), n in stored.items()
    ]  # fmt: skip
    with reader_of(rows) as reader:
        (_, negative) = summarise(reader, saying()).conditions
    assert negative.sample_rate == Estimate(0.5, 0.25, 0.75, 7, 0.1)
    assert negative.by_bin[4] == Estimate(0.5, 0.25, 0.75, 2, 0.1)
    assert negative.by_bin[0] is not None
    assert negative.by_bin[0].mean == 0.25  # the analysis says nothing of that bin
    fit = negative.fit
    assert isinstance(fit, LogisticFit)
    assert (fit.intercept, fit.slope_interval, fit.num_samples) == (0.5, (0.25, 0.75), 24)
    assert fit.support == support_of(np.array(list(P0.values())))


@pytest.mark.parametrize("seed", [0, 9])
def test_before_the_analysis_a_summary_resamples_with_the_runs_seed(reader_of, seed: int) -> None:
    rows = measured()
    rows["statistics"] = [  # of another number of prompts: from before more were measured
        {"analysis": "rates", "condition": "negative", "measured": "", "step_kind": "", "measure": "violation_rate",
         "grouping": "all", "patch": "", "layer": -1, "head": -1, "value": 0.5, "n": 3}
    ]  # fmt: skip
    with reader_of(rows) as reader:
        (_, negative) = summarise(reader, saying({"settings": {"runtime.seed": {"value": seed}}})).conditions
    rates = [VIOLATIONS[p] / 4 for p in sorted(VIOLATIONS)]
    assert negative.sample_rate == mean_interval(rates, seed)
    assert negative.sample_rate != mean_interval(rates, seed + 1)


def test_what_has_not_been_measured_is_none_and_no_condition_is_made_up(reader_of) -> None:
    with reader_of({"psem": measured()["psem"]}) as reader:
        result, text = summarise(reader, saying()), shown(reader, saying())
    for one in result.conditions:
        assert (one.greedy_rate, one.sample_rate, one.format_rate, one.fit) == (None, None, None, None)
        assert one.by_bin == (None,) * 5
    assert "–" in text


def test_an_empty_run_has_an_empty_summary_that_can_be_shown(reader_of) -> None:
    with reader_of({}) as reader:
        result, text = summarise(reader, saying()), shown(reader, saying())
    assert (result.conditions, result.bin_counts) == ((), (0,) * 5)
    assert "Run r" in text


def test_a_shown_summary_keeps_its_brackets_and_says_when_answers_were_planted(reader_of) -> None:
    """Rich reads [..] as markup: it would swallow an interval, and raise at the "[/b]" of a condition's name."""
    rows = measured()
    for row in rows["psem"] + rows["detections"]:
        row["condition"] = row["condition"].replace("negative", "ban[/b]")
    with reader_of(rows, num_failed=3) as reader:
        result = summarise(reader, saying())
        text = shown(reader, saying({"planted": True}))
        unplanted = shown(reader, saying())
    for name in BIN_NAMES:
        assert name in text
    rate = result.conditions[0].sample_rate
    assert rate is not None
    assert f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}]" in text
    assert "ban[/b]" in text
    assert "planted" in text
    assert "3 items failed" in text
    assert "planted" not in unplanted


def test_the_fitted_line_is_shown_with_its_intervals(reader_of) -> None:
    rng = np.random.default_rng(0)
    p0, violations, _ = planted(rng, 60, 4)
    psem = [{"prompt_id": f"p{i}", "condition": c, "p_sem": p, "p_word": p}
            for i, p in enumerate(p0.tolist()) for c in ("baseline", "negative")]  # fmt: skip
    found = [detection(f"p{i}", "negative", "sample", s, s < k) for i, k in enumerate(violations) for s in range(4)]
    with reader_of({"psem": psem, "detections": found}) as reader:
        result, text = summarise(reader, saying()), shown(reader, saying())
    fit = result.conditions[1].fit
    assert isinstance(fit, LogisticFit)
    assert fit.slope_interval[0] < SLOPE < fit.slope_interval[1]
    assert f"σ({fit.intercept:+.2f} {fit.slope:+.2f}·P0)" in text
    assert f"[{fit.slope_interval[0]:.2f}, {fit.slope_interval[1]:.2f}]" in text
    assert f"60 prompts with P0 from {p0.min():.2f} to {p0.max():.2f}" in text


def test_a_shown_summary_says_what_to_know_of_the_run(reader_of) -> None:
    rows = {
        "completions": [
            {"prompt_id": f"p{n}", "condition": "ban[/b]", "mode": "greedy", "sample_id": 0, "token_ids": [], "text": "",
             "answer": "", "finish_reason": "stop"}
            for n in range(6)
        ]
    }  # fmt: skip
    with reader_of(rows) as reader:
        text = shown(reader, saying({"model": {"chat_template_sha256": "ab"}}))
    assert "Note: Under ban[/b], 6 of 6 greedy answers (100 %) are empty. Try `--gravity.chat true`" in text


def test_a_sound_run_has_no_note(reader_of) -> None:
    with reader_of(measured()) as reader:
        assert "Note" not in shown(reader, saying())


def test_the_next_steps_name_the_run_and_where_it_is(tmp_path: Path) -> None:
    text = launch._next_steps("gravity", "20260101-demo", tmp_path)
    assert str(tmp_path / "20260101-demo") in text
    assert "harness report 20260101-demo" in text
    assert "`harness run --model" in text
    assert "`harness run another --model" in launch._next_steps("another", "20260101-demo", tmp_path)


def shown(reader: Reader, manifest: Manifest) -> str:
    """What `harness show` and the end of a run print of the results."""
    file = io.StringIO()
    console = Console(markup=False, file=file, width=300)
    for one in show.headlines(EXPERIMENT, reader, manifest):
        console.print(one)
    return file.getvalue()


def test_a_bootstrap_of_many_prompts_is_made_in_parts_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand draws of 100,000 prompts took 2.4 GB at once."""
    values = np.random.default_rng(1).random((2_000, 3))
    tracemalloc.start()
    whole = mean_intervals(values, 5)
    at_once = tracemalloc.get_traced_memory()[1]
    monkeypatch.setattr(stats, "_COUNTS_AT_ONCE", 2_000 * 77)
    tracemalloc.reset_peak()
    parts = mean_intervals(values, 5)
    in_parts = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for one, other in zip(whole[:4], parts[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)
    assert in_parts < at_once / 5
    assert not np.array_equal(mean_intervals(values, 6).low, whole.low), "the control: other draws are seen"
