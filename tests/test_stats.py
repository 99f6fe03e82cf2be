"""Intervals that cover, fits that recover what was planted, and the summary of a run against plain numpy."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import minimize

from harness.stats import BIN_NAMES, EDGES, Estimate, LogisticFit, bin_of, fit_violations, mean_interval
from harness.store import Batch, BatchResult, Failure, Reader, Row, Store
from harness.summary import next_steps, render, summarise

patient = settings(deadline=None)  # a busy machine is no failure
INTERCEPT, SLOPE = -2.4, 2.27  # the paper's, gravity.md section 9


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
    # GLM stops when the deviance changes by 1e-8, which leaves the coefficients right to about 1e-5.
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
        with Store(tmp_path / "results.duckdb") as store:
            store.start_stage("made", 1, 1)
            failures = [Failure(f"item {i}", "planted") for i in range(num_failed)]
            batch = Batch("made", 0, ("all", *(f.key for f in failures)), 1)
            store.add_batches([batch])
            store.commit(batch, BatchResult(rows=rows, failures=failures))
            store.publish(tmp_path / "live.duckdb")
        return Reader(tmp_path / "live.duckdb")

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
    with reader_of(measured(), num_failed=2) as reader:
        result = summarise(reader)
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
    assert result.num_failed == 2


def test_what_has_not_been_measured_is_none_and_no_condition_is_made_up(reader_of) -> None:
    with reader_of({"psem": measured()["psem"]}) as reader:
        result = summarise(reader)
    for one in result.conditions:
        assert (one.greedy_rate, one.sample_rate, one.format_rate, one.fit) == (None, None, None, None)
        assert one.by_bin == (None,) * 5
    assert "–" in shown(result, {"run_id": "r"})


def test_an_empty_run_has_an_empty_summary_that_can_be_shown(reader_of) -> None:
    with reader_of({}) as reader:
        result = summarise(reader)
    assert (result.conditions, result.num_failed, result.bin_counts) == ((), 0, (0,) * 5)
    assert "Run r" in shown(result, {"run_id": "r"})


def test_a_shown_summary_keeps_its_brackets_and_says_when_answers_were_planted(reader_of) -> None:
    """Rich reads [..] as markup: it would swallow an interval, and raise at the "[/b]" of a condition's name."""
    rows = measured()
    for row in rows["psem"] + rows["detections"]:
        row["condition"] = row["condition"].replace("negative", "ban[/b]")
    with reader_of(rows, num_failed=3) as reader:
        result = summarise(reader)
    text = shown(result, {"run_id": "r", "planted": True})
    for name in BIN_NAMES:
        assert name in text
    rate = result.conditions[0].sample_rate
    assert rate is not None
    assert f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}]" in text
    assert "ban[/b]" in text
    assert "planted" in text
    assert "3 items failed" in text
    assert "planted" not in shown(result, {"run_id": "r"})


def test_the_fitted_line_is_shown_with_its_intervals(reader_of) -> None:
    rng = np.random.default_rng(0)
    p0, violations, _ = planted(rng, 60, 4)
    psem = [{"prompt_id": f"p{i}", "condition": c, "p_sem": p, "p_word": p}
            for i, p in enumerate(p0.tolist()) for c in ("baseline", "negative")]  # fmt: skip
    found = [detection(f"p{i}", "negative", "sample", s, s < k) for i, k in enumerate(violations) for s in range(4)]
    with reader_of({"psem": psem, "detections": found}) as reader:
        result = summarise(reader)
    fit = result.conditions[1].fit
    assert isinstance(fit, LogisticFit)
    assert fit.slope_interval[0] < SLOPE < fit.slope_interval[1]
    text = shown(result, {"run_id": "r"})
    assert f"σ({fit.intercept:+.2f} {fit.slope:+.2f}·P0)" in text
    assert f"[{fit.slope_interval[0]:.2f}, {fit.slope_interval[1]:.2f}]" in text


def test_the_next_steps_name_the_run_and_where_it_is(tmp_path: Path) -> None:
    text = next_steps("20260101-demo", tmp_path)
    assert str(tmp_path / "20260101-demo") in text
    assert "harness show 20260101-demo" in text


def shown(result, manifest) -> str:
    file = io.StringIO()
    console = Console(file=file, width=300)
    for one in render(result, manifest):
        console.print(one)
    return file.getvalue()
