"""The fit of violation on pressure as the run keeps it: read where stage `analysis` stored it, computed as it will be before.

Terminal, figures, report and app ask here, so that a number has one value and a finished run is not fitted again. Knows no
store: rows of `statistics` are handed in.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from harness.stats import Curve, LogisticFit, curve_of_fit, fit_violations, support_of

Row = Mapping[str, Any]
PLACE, CURVE, BEYOND = "curve_p0", "curve", "curve_beyond"
"""Measures of a curve's places: its P0, and the curve there, among the prompts or where none of them reaches. Places are
numbered: the ends of the support are measured, and rounding may move a value but no key."""


class Pressed(NamedTuple):
    """What a fit rests on, in the order of prompt_id, which decides the draws: P0, samples that say X, samples."""

    p0: Float[np.ndarray, " N"]
    violations: Float[np.ndarray, " N"]
    trials: Float[np.ndarray, " N"]


def curve_rows(curve: Curve) -> Iterator[dict[str, Any]]:
    """The curve as rows of `statistics`, to the last bit; `stored_curve` is the way back."""
    places = zip(*(column.tolist() for column in curve), strict=True)
    for i, (p0, value, low, high, is_supported) in enumerate(places):
        place = {"grouping": f"place:{i}"}
        yield place | {"measure": PLACE, "value": p0}
        yield place | {"measure": CURVE if is_supported else BEYOND, "value": value, "low": low, "high": high}


def fit_of(known: Iterable[Row], pressed: Pressed, seed: int, *, is_analysed: bool) -> LogisticFit | None:
    """The line of these prompts: as stored, if it is of as many; None where the analysis found none.

    `known` are the condition's rows of analysis `fit`; `is_analysed` says whether the analysis saw these prompts.
    """
    rows = _whole(known)
    a, b, r2 = (rows.get(measure) for measure in ("intercept", "slope", "mcfadden_r2"))
    if a is None or b is None:
        return None if is_analysed else fit_violations(*pressed, seed)
    if a["n"] != len(pressed.p0):
        return fit_violations(*pressed, seed)
    if _is_missing(a["value"]) or _is_missing(b["value"]):
        return None
    return LogisticFit(
        a["value"],
        b["value"],
        (_number(a["low"]), _number(a["high"])),
        (_number(b["low"]), _number(b["high"])),
        len(pressed.p0),
        int(pressed.trials.sum()),
        _number(r2["value"] if r2 else None),
        _number(a["se"]),
        _number(b["se"]),
        support_of(pressed.p0),
    )


def curve_of(known: Iterable[Row], pressed: Callable[[], Pressed], seed: int) -> Curve | None:
    """The curve of a stored line, with its band; None where no line is stored.

    A run made before curves were stored has the line alone: `pressed` is asked for then, and its draws are made once more.
    """
    rows = list(known)
    line = _whole(rows)
    a, b = (line.get(measure) for measure in ("intercept", "slope"))
    if a is None or b is None or _is_missing(a["value"]) or _is_missing(b["value"]):
        return None
    found = stored_curve(rows)
    return curve_of_fit((a["value"], b["value"]), *pressed(), seed) if found is None else found


def stored_curve(known: Sequence[Row]) -> Curve | None:
    """The curve that these rows hold; None where they hold none."""
    places = {r["grouping"]: float(r["value"]) for r in known if r["measure"] == PLACE}
    if not places:
        return None
    drawn = sorted((r for r in known if r["measure"] in (CURVE, BEYOND)), key=lambda r: places[r["grouping"]])
    value, low, high = (np.array([_number(r[column]) for r in drawn]) for column in ("value", "low", "high"))
    is_supported = np.array([r["measure"] == CURVE for r in drawn])
    return Curve(np.array(sorted(places.values())), value, low, high, is_supported)


def _whole(known: Iterable[Row]) -> dict[str, Row]:
    """What is said of all prompts together, by measure."""
    return {row["measure"]: row for row in known if row["grouping"] == "all"}


def _number(value: float | None) -> float:
    """NULL is what arithmetic calls NaN."""
    return math.nan if value is None else float(value)


def _is_missing(value: float | None) -> bool:
    return math.isnan(_number(value))
