"""The headline results of a run, from its snapshot, and how they look in a terminal."""

from collections.abc import Mapping

from rich.table import Table

from harness.experiments.experiment import Headline
from harness.experiments.lda.schema import NATURAL
from harness.run import Manifest
from harness.store import Reader, Row

WAYS = ("exact", "counted", "reweighted", "extrapolated")
"""To the natural rate, the surest first."""
_NAMES = {"counted": "sampled"}
_RAISED = 6


def render(reader: Reader, manifest: Manifest) -> list[object]:
    """Tables for a terminal: rates by arm, then the natural rate by every way there is to it."""
    stored = stored_rows(reader)
    detectors = sorted({key[1] for key in stored if key[1]})
    arms = reader.query("SELECT condition, alpha FROM arms ORDER BY alpha")
    shown: list[object] = []
    rates = _rates(stored, detectors, arms, manifest)
    if rates.row_count:
        shown.append(rates)
    shown += [line for line in (_arms_line(stored, arms), *_raised_lines(reader)) if line]
    natural = _natural(stored, detectors)
    if natural.row_count:
        shown.append(natural)
    return shown


def stored_rows(reader: Reader) -> Mapping[tuple[str, str, str, str], Row]:
    """What the analysis said, by analysis, detector, condition and measure."""
    rows = reader.query("SELECT * FROM statistics ORDER BY analysis, detector, condition, measure")
    return {(r["analysis"], r["detector"], r["condition"], r["measure"]): r for r in rows}


def headlines(reader: Reader) -> list[Headline]:
    """Rates, contrasts and natural rates."""
    rows = reader.query(
        "SELECT detector, condition, analysis || ' ' || measure AS measure, value, low, high FROM statistics "
        "WHERE value IS NOT NULL AND (measure IN ('rate', 'contrast') OR analysis = 'natural') ORDER BY ALL"
    )
    return [Headline(f"{r['detector']} {r['condition']}", r["measure"], r["value"], r["low"], r["high"]) for r in rows]


def rate_told(row: Row | None) -> str:
    """A rate with its interval, in digits that show the smallest of them."""
    if row is None or row["value"] is None:
        return "–"
    value, low, high = row["value"], row["low"], row["high"]
    if low is None or high is None:
        return number_told(value)
    return f"{number_told(value)} [{number_told(low)}, {number_told(high)}]"


def number_told(value: float) -> str:
    """Three digits behind the point, and of what is too small for them two that count."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def _rates(
    stored: Mapping[tuple[str, str, str, str], Row], detectors: list[str], arms: list[Row], manifest: Manifest
) -> Table:
    table = Table(title=f"Run {manifest.run_id}: rate of hits by arm", title_justify="left")
    for column in ("detector", "α", "rollouts", "hits", "rate [95 %]", "exact at the start", "less α = 0", "q"):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for detector in detectors:
        for arm in arms:
            key = (detector, arm["condition"])
            rate, exact = stored.get(("rates", *key, "rate")), stored.get(("exact", *key, "rate"))
            if rate is None and exact is None:
                continue
            hits, judged = (stored.get(("rates", *key, measure)) for measure in ("hits", "judged"))
            contrast = stored.get(("contrasts", *key, "contrast"))
            q = contrast and contrast["q"]
            table.add_row(
                detector,
                f"{arm['alpha']:g}",
                f"{judged['value']:,.0f}" if judged else "–",
                f"{hits['value']:,.0f}" if hits else "–",
                rate_told(rate),
                number_told(exact["value"]) if exact else "–",
                "" if arm["condition"] == NATURAL else rate_told(contrast),
                "" if q is None else f"{q:.2g}",
            )
    return table


def _natural(stored: Mapping[tuple[str, str, str, str], Row], detectors: list[str]) -> Table:
    table = Table(title="Natural rate (α = 0), by every way to it", title_justify="left")
    for column in ("detector", *(_NAMES.get(way, way) for way in WAYS), "effective hits"):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for detector in detectors:
        rows = [stored.get(("natural", detector, NATURAL, way)) for way in WAYS]
        worth = stored.get(("natural", detector, NATURAL, "effective_hits"))
        if any(rows):
            told = f"{worth['value']:,.1f} of {worth['n']:,}" if worth and worth["value"] is not None else "–"
            table.add_row(detector, *map(rate_told, rows), told)
    return table


def _arms_line(stored: Mapping[tuple[str, str, str, str], Row], arms: list[Row]) -> str:
    """Which share of rollouts amplification changed at all."""
    parted = [
        (arm["alpha"], row["value"])
        for arm in arms
        if (row := stored.get(("rollouts", "", arm["condition"], "branched"))) is not None
    ]
    told = ", ".join(f"α = {alpha:g}: {share:.0%}" for alpha, share in parted)
    return f"Rollouts whose text is another than at α = 0 with the same noise: {told}" if parted else ""


def _raised_lines(reader: Reader) -> list[str]:
    """The tokens that the training raised most where answers begin."""
    rows = reader.query(
        "SELECT v.text, d.mean FROM token_diffs d JOIN vocabulary v USING (token_id) "
        "WHERE d.place = 'answer' AND d.mean IS NOT NULL ORDER BY d.mean DESC, token_id LIMIT ?",
        [_RAISED],
    )
    told = ", ".join(f"{r['text']!r} {r['mean']:+.2f}" for r in rows)
    return [f"Most raised as the first token of answers, in nats: {told}"] if rows else []
