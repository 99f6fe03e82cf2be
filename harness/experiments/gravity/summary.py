"""The headline results of a run, from its snapshot, and how they look in a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from harness.experiments.experiment import Headline
from harness.experiments.gravity.bins import BIN_NAMES, bin_of
from harness.experiments.gravity.fit import Pressed, fit_of
from harness.run import Manifest, seed_of
from harness.stats import Estimate, LogisticFit, estimate_of
from harness.store import Reader, Row


@dataclass(frozen=True)
class ConditionSummary:
    """One condition: mean pressure, share of prompts whose greedy answer has the word, sampled rate, one-word answers."""

    condition: str
    num_prompts: int
    p_sem: float
    p_word: float
    greedy_rate: float | None
    sample_rate: Estimate | None
    format_rate: float | None
    by_bin: tuple[Estimate | None, ...]
    fit: LogisticFit | None


@dataclass(frozen=True)
class Summary:
    """What a run came to: one entry a condition, and prompts per pressure bin."""

    conditions: tuple[ConditionSummary, ...]
    bin_counts: tuple[int, ...]
    taxonomy: Mapping[str, Mapping[str, int]]
    """Condition -> kind of failure -> greedy answers."""
    strongest_patches: tuple[Mapping[str, Any], ...]
    """Rows of `statistics`: for each patch the layer of largest mean ΔP in magnitude."""


def summarise(reader: Reader, manifest: Manifest) -> Summary:
    """Rates by condition and pressure bin, and the fitted line; whatever has not been measured yet is None.

    Intervals and the line are those that stage `analysis` stored; before it has, they are computed as it will.
    """
    seed, stored = seed_of(manifest), _stored(reader)
    p0 = {r["prompt_id"]: r["p_sem"] for r in reader.query("SELECT * FROM psem WHERE condition = 'baseline'")}
    rows = reader.query(
        "SELECT condition, count(*) AS n, avg(p_sem) AS p_sem, avg(p_word) AS p_word FROM psem GROUP BY condition "
        "ORDER BY condition"
    )
    greedy = _rates(reader, "greedy", "word_present")
    formats = _rates(reader, "sample", "format_ok") or _rates(reader, "greedy", "format_ok")
    violations: dict[str, list[dict[str, Any]]] = {}
    for row in reader.query("SELECT * FROM violation ORDER BY condition, prompt_id"):
        violations.setdefault(row["condition"], []).append(row)
    conditions = []
    for row in rows:
        name = row["condition"]
        samples = violations.get(name, [])
        pressed = [r for r in samples if r["prompt_id"] in p0]
        rates = {key[-1]: row for key, row in stored.items() if key[:3] == ("rates", name, "violation_rate")}
        by_bin = tuple(
            estimate_of(said, rates.get(bin_name), seed)
            if (said := [r["rate"] for r in pressed if bin_of(p0[r["prompt_id"]]) == b])
            else None
            for b, bin_name in enumerate(BIN_NAMES)
        )
        is_analysed = "all" in rates and rates["all"]["n"] == len(samples)
        conditions.append(
            ConditionSummary(
                name,
                row["n"],
                row["p_sem"],
                row["p_word"],
                greedy.get(name),
                estimate_of([r["rate"] for r in samples], rates.get("all"), seed) if samples else None,
                formats.get(name),
                by_bin,
                _fit(pressed, p0, stored, seed, is_analysed=is_analysed) if name != "baseline" else None,
            )
        )
    counts = np.bincount([bin_of(p) for p in p0.values()], minlength=len(BIN_NAMES))
    taxonomy: dict[str, dict[str, int]] = {}
    for row in reader.query(
        "SELECT condition, coalesce(taxonomy, 'unknown') AS kind, count(*) AS n FROM outcomes WHERE outcome = 'failure' "
        "GROUP BY ALL ORDER BY ALL"
    ):
        taxonomy.setdefault(row["condition"], {})[row["kind"]] = row["n"]
    is_older = "statistics" not in reader.tables()  # a run of an older harness has no such tables
    strongest = (
        reader.query(
            "SELECT * FROM statistics WHERE analysis = 'patching' AND measure = 'delta_p' AND grouping = 'all' "
            "QUALIFY row_number() OVER (PARTITION BY patch ORDER BY abs(value) DESC, layer) = 1 ORDER BY abs(value) DESC"
        )
        if not is_older
        else []
    )
    return Summary(tuple(conditions), tuple(int(c) for c in counts), taxonomy, tuple(strongest))


def render(result: Summary, manifest: Manifest) -> list[object]:
    """Tables for a terminal."""
    shown: list[object] = []
    overview = Table(title=f"Run {manifest.run_id}", title_justify="left")
    for column in (
        "condition",
        "prompts",
        "mean p_sem",
        "mean p_word",
        "greedy says X",
        "samples say X [95 %]",
        "one word",
    ):
        overview.add_column(column, justify="left" if column == "condition" else "right")
    for c in result.conditions:
        overview.add_row(
            c.condition,
            str(c.num_prompts),
            f"{c.p_sem:.3f}",
            f"{c.p_word:.3f}",
            _share(c.greedy_rate),
            _estimate(c.sample_rate),
            _share(c.format_rate),
        )
    shown.append(overview)
    sampled = [c for c in result.conditions if c.sample_rate is not None and any(c.by_bin)]
    if sampled:
        bins = Table(
            title="Share of samples that say X, by pressure P0 (interval: bootstrap over prompts)", title_justify="left"
        )
        bins.add_column("P0")
        bins.add_column("prompts", justify="right")
        for c in sampled:
            bins.add_column(c.condition, justify="right")
        for b, name in enumerate(BIN_NAMES):
            # Rich reads [..] as markup, which an interval is not.
            bins.add_row(name, str(result.bin_counts[b]), *(_estimate(c.by_bin[b]) for c in sampled))
        shown.append(bins)
    shown.extend(_fit_line(c.condition, c.fit) for c in sampled if c.fit is not None)
    shown.extend(
        f"{name}: greedy answers that say X: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        for name, kinds in result.taxonomy.items()
    )
    if result.strongest_patches:
        told = ", ".join(
            f"{r['patch']} {r['value']:+.3f} (layer {r['layer']})" for r in result.strongest_patches if r["value"]
        )
        shown.append(f"Patching {result.strongest_patches[0]['n']} prompts, largest mean ΔP of each patch: {told}")
    return shown


def headlines(reader: Reader) -> list[Headline]:
    """Rates, fit and suppression over all prompts."""
    if "statistics" not in reader.tables():
        return []
    rows = reader.query(
        "SELECT condition, analysis || ' ' || measure AS measure, value, low, high FROM statistics "
        "WHERE analysis IN ('rates', 'fit', 'suppression') AND grouping = 'all' AND value IS NOT NULL ORDER BY ALL"
    )
    return [Headline(r["condition"], r["measure"], r["value"], r["low"], r["high"]) for r in rows]


def _fit_line(condition: str, fit: LogisticFit) -> str:
    (a, b), (c, d) = fit.intercept_interval, fit.slope_interval
    return (
        f"{condition}: P(says X) = σ({fit.intercept:+.2f} {fit.slope:+.2f}·P0), slope 95 % [{c:.2f}, {d:.2f}], "
        f"intercept [{a:.2f}, {b:.2f}], {fit.num_prompts} prompts with P0 from {fit.support.low:.2f} to "
        f"{fit.support.high:.2f}"
    )


def _rates(reader: Reader, mode: str, column: str) -> dict[str, float]:
    rows = reader.query(
        f"SELECT condition, avg({column}::INTEGER) AS rate FROM detections WHERE mode = ? GROUP BY condition", [mode]
    )
    return {r["condition"]: r["rate"] for r in rows}


def _stored(reader: Reader) -> dict[tuple[str, str, str, str], Row]:
    """What stage `analysis` said of rates and fits, by analysis, condition, measure and grouping."""
    if "statistics" not in reader.tables():
        return {}
    rows = reader.query("SELECT * FROM statistics WHERE analysis IN ('rates', 'fit')")
    return {(r["analysis"], r["condition"], r["measure"], r["grouping"]): r for r in rows}


def _fit(
    rows: Sequence[Row],
    p0: Mapping[str, float],
    stored: Mapping[tuple[str, str, str, str], Row],
    seed: int,
    *,
    is_analysed: bool,
) -> LogisticFit | None:
    if not rows:
        return None
    columns = [(p0[r["prompt_id"]], r["num_violations"], r["num_samples"]) for r in rows]
    pressed = Pressed(*(np.array(c, dtype=np.float64) for c in zip(*columns, strict=True)))
    known = [row for key, row in stored.items() if key[:2] == ("fit", rows[0]["condition"])]
    return fit_of(known, pressed, seed, is_analysed=is_analysed)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3f}" if value.num_prompts < 2 else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
