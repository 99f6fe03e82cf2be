"""The fit as a run keeps it: stored to the last bit, read wherever it is there, and computed only where it is not."""

from typing import Any

import numpy as np
import pytest

from harness import stats
from harness.experiments.gravity.fit import BEYOND, CURVE, PLACE, Pressed, curve_of, curve_rows, fit_of, stored_curve
from harness.stats import Fitted, fit_with_curve

SEED = 42


def pressed() -> Pressed:
    rng = np.random.default_rng(1)
    p0 = rng.uniform(0.1, 0.8, 50)
    return Pressed(p0, rng.binomial(16, 1 / (1 + np.exp(2.4 - 2.27 * p0))).astype(float), np.full(50, 16.0))


def fitted() -> Fitted:
    found = fit_with_curve(*pressed(), SEED, 200)
    assert found is not None
    return found


def line_rows(fitted: Fitted) -> list[dict[str, Any]]:
    fit = fitted.fit
    parts = {"intercept": (fit.intercept, fit.intercept_se, *fit.intercept_interval),
             "slope": (fit.slope, fit.slope_se, *fit.slope_interval),
             "mcfadden_r2": (fit.mcfadden_r2, None, None, None)}  # fmt: skip
    return [
        {"measure": measure, "grouping": "all", "n": 50}
        | dict(zip(("value", "se", "low", "high"), numbers, strict=True))
        for measure, numbers in parts.items()
    ]


@pytest.fixture
def no_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a fit is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("draws of prompts were fitted")

    monkeypatch.setattr(stats, "_lines_of_draws", refuse)


def test_a_stored_curve_is_the_one_that_was_computed_to_the_last_bit_in_any_order_of_rows() -> None:
    curve = fitted().curve
    rows = list(curve_rows(curve))
    assert len({(row["measure"], row["grouping"]) for row in rows}) == len(rows) == 2 * len(curve.p0) == 206
    assert {row["measure"] for row in rows} == {PLACE, CURVE, BEYOND}
    back = stored_curve(rows[::-1])
    assert back is not None
    for one, other in zip(curve, back, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def test_rounding_moves_values_and_no_key() -> None:
    """Two runs that differ by rounding are compared row by row."""
    data = pressed()
    moved = fit_with_curve(data.p0 + 1e-9, data.violations, data.trials, SEED, 200)
    assert moved is not None
    keys = [[(row["measure"], row["grouping"]) for row in curve_rows(c)] for c in (fitted().curve, moved.curve)]
    assert keys[0] == keys[1]
    assert moved.curve.p0.tolist() != fitted().curve.p0.tolist(), "the control"


def test_a_band_that_is_not_determined_is_stored_as_null_and_read_as_nan() -> None:
    curve = fitted().curve
    rows = [row | {"low": None, "high": None} for row in curve_rows(curve)]
    back = stored_curve(rows)
    assert back is not None
    assert np.isnan(back.low).all()
    assert np.isnan(back.high).all()
    assert (back.value == curve.value).all()


KEPT = fitted()


def test_a_stored_fit_and_its_curve_are_read_and_not_computed(no_fitting: None) -> None:
    kept, rows = KEPT, [*line_rows(KEPT), *curve_rows(KEPT.curve)]
    with pytest.raises(AssertionError, match="were fitted"):  # the control
        fit_of([], pressed(), SEED, is_analysed=False)
    assert fit_of(rows, pressed(), SEED, is_analysed=True) == kept.fit
    read = curve_of(rows, lambda: pytest.fail("the prompts are not needed"), SEED)
    assert read is not None
    assert read.low.tobytes() == kept.curve.low.tobytes()


def test_where_the_analysis_found_no_line_none_is_looked_for_again(no_fitting: None) -> None:
    assert fit_of([], pressed(), SEED, is_analysed=True) is None
    assert curve_of([], pressed, SEED) is None


def test_a_line_without_its_curve_gets_the_band_of_its_own_draws() -> None:
    """A run of an older harness stored the line alone."""
    kept = fit_with_curve(*pressed(), SEED)
    assert kept is not None
    read = curve_of(line_rows(kept), pressed, SEED)
    assert read is not None
    for one, other in zip(read, kept.curve, strict=True):
        assert one.tobytes() == other.tobytes()
    other = curve_of(line_rows(kept), pressed, SEED + 1)
    assert other is not None
    assert other.low.tobytes() != kept.curve.low.tobytes(), "the control: another seed has another band"


def test_a_line_of_fewer_prompts_is_not_that_of_more() -> None:
    older = [row | {"n": 49} for row in line_rows(fitted())]
    now = fit_of(older, pressed(), SEED, is_analysed=False)
    assert now is not None
    assert now == stats.fit_violations(*pressed(), SEED)
    assert now.slope_interval != fitted().fit.slope_interval
