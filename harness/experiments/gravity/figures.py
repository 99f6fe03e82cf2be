"""The eight figures of a run, from rows to matplotlib Figures.

`gather` reads a snapshot once; every figure is then a pure function of what it gathered. Knows no file and no page.
What was not measured is said in grey on the figure; a NULL is left out, never drawn as zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import ndtri

from harness.experiments import drawing
from harness.experiments.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from harness.experiments.drawing import WIDTH as WIDTH
from harness.experiments.gravity.bins import BIN_NAMES, EDGES
from harness.experiments.gravity.fit import Pressed, curve_of
from harness.stats import Curve, estimate_of
from harness.store import Reader, Row

OUTCOMES: dict[str, tuple[str, str]] = {"success": (BLUE, "o"), "failure": (VERMILLION, "s")}
"""Outcome of the greedy answer: its colour and marker."""
PATCHES: dict[str, str] = {
    "resid": "residual stream",
    "attn": "attention output",
    "mlp": "MLP output",
    "kv_question": "keys and values, question",
    "kv_instruction": "keys and values, instruction",
    "knockout_instruction": "instruction not attended to",
}
"""Every kind of patch and what it stands for in words."""
_SMALLEST_RELATIVE = -1.5
"""Relative suppression has no lower bound where P0 is near zero; the axis stops here."""


@dataclass(frozen=True)
class FigureData:
    """All that the figures are drawn from."""

    conditions: tuple[str, ...] = ()
    """In the order of drawing: baseline, negative, others by name."""
    points: Sequence[Row] = ()
    """One row a prompt and condition: p0, p1, delta, relative, num_samples, num_violations, rate, outcome, and the
    first step's iar, nf, tmf, pi (means over layers and heads); None where it was not measured."""
    statistics: Sequence[Row] = ()
    """Rows of the table `statistics`, those of single heads left out."""
    seed: int = 0
    """The run's: what is resampled for a picture takes the draws that its stored numbers took."""
    _by_analysis: Mapping[str, list[Row]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grouped: dict[str, list[Row]] = {}
        for row in self.statistics:
            grouped.setdefault(row["analysis"], []).append(row)
        object.__setattr__(self, "_by_analysis", grouped)

    def where(self, analysis: str, **keys: Any) -> list[Row]:
        """Statistics of an analysis with these values in their key columns."""
        return [r for r in self._by_analysis.get(analysis, []) if all(r[k] == v for k, v in keys.items())]

    def bins(self, analysis: str, condition: str, measure: str) -> dict[str, Row]:
        """What the analysis says of the pressure bins, by their names."""
        rows = self.where(analysis, condition=condition, measure=measure)
        return {r["grouping"]: r for r in rows if r["grouping"] in BIN_NAMES}

    def prompts(self, condition: str, *needed: str) -> list[Row]:
        """Points of one condition that have all the needed values."""
        return [p for p in self.points if p["condition"] == condition and all(p[k] is not None for k in needed)]

    @property
    def compared(self) -> tuple[str, ...]:
        """Every condition but the baseline."""
        return tuple(c for c in self.conditions if c != "baseline")


def gather(reader: Reader, seed: int = 0) -> FigureData:
    """Reads everything the figures need, in a handful of queries."""
    known = set(reader.tables())
    conditions = [r["condition"] for r in reader.query("SELECT DISTINCT condition FROM contexts ORDER BY condition")]
    conditions.sort(key=lambda name: (name != "baseline", name != "negative", name))
    points = reader.query(
        """
        WITH mass AS (
            SELECT prompt_id, condition, avg(list_avg(iar)) AS iar, avg(list_avg(nf)) AS nf, avg(list_avg(tmf)) AS tmf,
                   avg(list_avg(pi)) AS pi
            FROM attention WHERE step_kind = 'first' GROUP BY prompt_id, condition)
        SELECT c.prompt_id, c.condition, b.p_sem AS p0, own.p_sem AS p1, s.delta, s.relative, v.num_samples,
               v.num_violations, v.rate, o.outcome, mass.iar, mass.nf, mass.tmf, mass.pi
        FROM contexts c
             LEFT JOIN psem b ON b.prompt_id = c.prompt_id AND b.condition = 'baseline'
             LEFT JOIN psem own ON own.prompt_id = c.prompt_id AND own.condition = c.condition
             LEFT JOIN suppression s ON s.prompt_id = c.prompt_id AND s.condition = c.condition
             LEFT JOIN violation v ON v.prompt_id = c.prompt_id AND v.condition = c.condition
             LEFT JOIN outcomes o ON o.prompt_id = c.prompt_id AND o.condition = c.condition
             LEFT JOIN mass ON mass.prompt_id = c.prompt_id AND mass.condition = c.condition
        ORDER BY c.condition, c.prompt_id
        """
    )
    statistics = reader.query("SELECT * FROM statistics WHERE head = -1 ORDER BY ALL") if "statistics" in known else []
    return FigureData(tuple(conditions), points, statistics, seed)


# -- the figures


def violation_by_pressure(data: FigureData) -> Figure:
    """Share of a prompt's samples that say X against P0, with binned means and the fitted curve, by condition.

    The curve is dashed and its band paler where no prompt's P0 reaches: there it is extrapolated.
    """
    shown = {c: found for c in data.conditions if (found := data.prompts(c, "p0", "rate"))}
    figure, axes = drawing.panels(list(shown), "needs `psem` of the baseline and samples")
    for ax, (condition, points) in zip(axes, shown.items(), strict=True):
        p0, rate, said, samples = (_column(points, k) for k in ("p0", "rate", "num_violations", "num_samples"))
        _dots(ax, p0, _jittered(rate, samples), f"one prompt, jittered (n = {len(points):,})")
        fit = data.where("fit", condition=condition)
        curve = curve_of(fit, partial(Pressed, p0, said, samples), data.seed)
        if curve is not None:
            a, b = (next(r for r in fit if r["measure"] == measure) for measure in ("intercept", "slope"))
            told = (
                f"σ({a['value']:.2f} {b['value']:+.2f}·P0), slope [{b['low']:.2f}, {b['high']:.2f}]\n"
                f"from prompts with P0 {p0.min():.2f} to {p0.max():.2f}"
            )
            _fitted(ax, curve, told.replace("-", "−"))
        known = data.bins("rates", condition, "violation_rate")
        _binned(ax, p0, rate, BLUE, "o", "mean of a pressure bin, 95 %", known=known, seed=data.seed)
        drawing.label(ax, condition, "P0 (probability of X under baseline)", "share of samples that say X")
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.05, 1.05))
        drawing.legend(ax)
    return figure


def suppression_by_pressure(data: FigureData) -> Figure:
    """Relative suppression (P0 − P1)/P0 against P0 by condition, with the median and the mean of each bin."""
    shown = {c: found for c in data.compared if (found := data.prompts(c, "p0", "relative"))}
    figure, axes = drawing.panels(list(shown), "needs `psem` of the baseline and of another condition")
    for ax, (condition, points) in zip(axes, shown.items(), strict=True):
        p0, relative = _column(points, "p0"), _column(points, "relative")
        inside = relative >= _SMALLEST_RELATIVE
        _dots(
            ax,
            p0[inside],
            relative[inside],
            f"one prompt (n = {len(points):,}, {int((~inside).sum()):,} below the axis)",
        )
        known = data.bins("suppression", condition, "relative")
        _binned(ax, p0, relative, BLUE, "o", "mean of a bin, 95 %", known=known, seed=data.seed)
        _medians(ax, p0, np.maximum(relative, _SMALLEST_RELATIVE))
        ax.axhline(0, color=GREY, linewidth=0.8)
        drawing.label(ax, condition, "P0 (probability of X under baseline)", "relative suppression (P0 − P1) / P0")
        ax.set(xlim=(-0.02, 1.02), ylim=(_SMALLEST_RELATIVE, 1.05))
        drawing.legend(ax, "lower right")
    return figure


def attention_by_pressure(data: FigureData) -> Figure:
    """IAR, NF and TMF at the first step against P0, by outcome; one row of panels a condition."""
    measures = {"iar": "IAR (instruction share)", "nf": "NF (negation focus)", "tmf": "TMF (target-mention focus)"}
    shown = [c for c in data.compared if any(data.prompts(c, "p0", "outcome", m) for m in measures)]
    panels = [(c, m) for c in shown for m in measures]
    figure, axes = drawing.panels(panels, "needs attention and greedy answers under a condition", columns=3, height=2.7)
    for ax, (condition, measure) in zip(axes, panels, strict=True):
        points = data.prompts(condition, "p0", "outcome", measure)
        for outcome, (colour, marker) in OUTCOMES.items():
            chosen = [p for p in points if p["outcome"] == outcome]
            if chosen:
                name = f"{outcome} (n = {len(chosen):,})"
                _binned(
                    ax, _column(chosen, "p0"), _column(chosen, measure), colour, marker, name, line=True, seed=data.seed
                )
        drawing.label(ax, condition, "P0", measures[measure])
        ax.set_xlim(0, 1)
        if points and measure == "iar":  # the same in the whole row
            drawing.legend(ax)
        if not points:
            ax.set(xticks=[], yticks=[])
            drawing.say(ax, "not measured\n(this condition has no such span)")
    return figure


def priming_and_violation(data: FigureData) -> Figure:
    """Violation rate against the priming index PI = TMF − NF of the first step, with their correlation, by condition."""
    shown = {c: found for c in data.compared if (found := data.prompts(c, "pi", "rate"))}
    figure, axes = drawing.panels(
        list(shown), "needs samples, and attention under a condition that has a negation and names X"
    )
    for ax, (condition, points) in zip(axes, shown.items(), strict=True):
        x, y = _column(points, "pi"), _column(points, "rate")
        _dots(ax, x, _jittered(y, _column(points, "num_samples")), f"one prompt, jittered (n = {len(points):,})")
        ax.plot([], [], linestyle="none", label=_correlation(x, y))
        ax.axvline(0, color=GREY, linewidth=0.8)
        drawing.label(ax, condition, "priming index PI (mean over layers and heads)", "share of samples that say X")
        ax.set_ylim(-0.05, 1.05)
        drawing.legend(ax)
    return figure


def lens_by_outcome(data: FigureData) -> Figure:
    """Logit-lens probability of X by layer at the first step, by outcome, under baseline and under the condition."""
    rows = data.where("lens", step_kind="first", measure="p_target")
    shown = [c for c in data.compared if any(r["condition"] == c for r in rows)]
    figure, axes = drawing.panels(shown, "needs the lens, greedy answers under a condition, and stage analysis")
    for ax, condition in zip(axes, shown, strict=True):
        for outcome, (colour, _) in OUTCOMES.items():
            for measured, style in (("baseline", "--"), (condition, "-")):
                chosen = [
                    r for r in rows if (r["condition"], r["measured"], r["grouping"]) == (condition, measured, outcome)
                ]
                _curve(ax, chosen, f"{outcome}, {measured}", colour, style)
        drawing.label(ax, condition, "layer", "P(first token of X)")
        ax.set_ylim(0, 1)
        _layers(ax)
        drawing.legend(ax)
    return figure


def contributions_by_layer(data: FigureData) -> Figure:
    """What attention and MLP of each layer add to P(X) at the first step, by outcome; a row of panels a condition."""
    parts = {"attn_contrib": "attention", "ffn_contrib": "MLP (FFN)"}
    rows = data.where("decomposition", step_kind="first")
    rows = [r for r in rows if r["measured"] == r["condition"] and r["measure"] in parts]
    shown = [c for c in data.compared if any(r["condition"] == c for r in rows)]
    panels = [(c, part) for c in shown for part in parts]
    reason = "needs the decomposition, greedy answers under a condition, and stage analysis"
    figure, axes = drawing.panels(panels, reason, columns=2, height=2.9, share_y=True)
    for ax, (condition, part) in zip(axes, panels, strict=True):
        for outcome, (colour, _) in OUTCOMES.items():
            chosen = [r for r in rows if (r["condition"], r["measure"], r["grouping"]) == (condition, part, outcome)]
            _curve(ax, chosen, outcome, colour, "-" if outcome == "failure" else "--")
        ax.axhline(0, color=GREY, linewidth=0.8)
        drawing.label(ax, f"{condition}: {parts[part]}", "layer", "change of P(X)")
        _layers(ax)
        drawing.legend(ax, "upper left")
    return figure


def patching_by_layer(data: FigureData) -> Figure:
    """Change of P(X) when one layer of the prohibited run is patched from the baseline, by kind of patch and P0 bin."""
    rows = data.where("patching", measure="delta_p")
    panels = [
        (c, patch)
        for c in data.compared
        for patch in PATCHES
        if any((r["condition"], r["patch"]) == (c, patch) for r in rows)
    ]
    reason = "needs stage patching and stage analysis"
    figure, axes = drawing.panels(panels, reason, columns=3, height=2.7, share_y=True)
    colours = dict(zip(BIN_NAMES, (SKY, GREEN, PURPLE, ORANGE, VERMILLION), strict=True))
    for ax, (condition, patch) in zip(axes, panels, strict=True):
        chosen = [r for r in rows if (r["condition"], r["patch"]) == (condition, patch)]
        _curve(ax, [r for r in chosen if r["grouping"] == "all"], "all", BLACK, "-")
        for name, colour in colours.items():
            _curve(ax, [r for r in chosen if r["grouping"] == name], f"P0 in {name}", colour, ":", band=False)
        ax.axhline(0, color=GREY, linewidth=0.8)
        several = len({c for c, _ in panels}) > 1
        drawing.label(
            ax, f"{condition}: {PATCHES[patch]}" if several else PATCHES[patch], "layer", "ΔP(X), patched − not"
        )
        _layers(ax)
        if ax is axes[0]:  # the same in every panel but for the numbers of prompts
            drawing.legend(ax)
    return figure


def taxonomy_counts(data: FigureData) -> Figure:
    """How many greedy failures of each condition are priming, override or unknown."""
    rows = data.where("taxonomy", measure="count")
    shown = [c for c in data.compared if any(r["condition"] == c for r in rows)]
    figure, axes = drawing.panels(
        ["all"] if shown else [],
        "needs greedy answers under a condition, and stage analysis",
        columns=1,
        height=1.1 + 0.45 * len(shown),
    )
    for ax in axes[: len(shown)]:
        ends = np.zeros(len(shown))
        for kind, colour in (("priming", ORANGE), ("override", SKY), ("unknown", "#BBBBBB")):
            counts = {r["condition"]: r["value"] for r in rows if r["grouping"] == kind}
            widths = np.array([counts.get(c) or 0.0 for c in shown])
            bars = ax.barh(range(len(shown)), widths, left=ends, color=colour, label=kind, height=0.6)
            ax.bar_label(bars, [f"{w:,.0f}" if w else "" for w in widths], label_type="center", color=BLACK)
            ends += widths
        if not ends.any():
            drawing.say(ax, "no failures: no greedy answer says X")
        ax.set_xlim(0, max(1.0, 1.02 * ends.max()))
        ax.tick_params(axis="y", labelsize=9)
        ax.set_yticks(range(len(shown)), [drawing.plain(c) for c in shown])
        ax.invert_yaxis()
        drawing.label(ax, f"greedy failures (n = {ends.sum():,.0f})", "prompts", "")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    return figure


FIGURES: dict[str, Callable[[FigureData], Figure]] = {
    "violation": violation_by_pressure,
    "suppression": suppression_by_pressure,
    "attention": attention_by_pressure,
    "priming": priming_and_violation,
    "lens": lens_by_outcome,
    "contributions": contributions_by_layer,
    "patching": patching_by_layer,
    "taxonomy": taxonomy_counts,
}
"""The figures by the name of their files, in the order of reading."""

CAPTIONS: dict[str, tuple[str, str]] = {
    "violation": (
        "Violation against pressure",
        "Each grey point is a prompt: the share of its samples that contain X. Blue: mean of each pressure bin. Red: the "
        "binomial fit, its band pointwise; dashed where no prompt's P0 reaches. Intervals and band: 95 %, from a bootstrap over "
        "prompts.",
    ),
    "suppression": (
        "Relative suppression against pressure",
        "How much of the baseline pressure the condition takes away: 1 is all, 0 none, below 0 it adds. The ratio has no "
        "lower bound where P0 is near zero: the axis ends at −1.5, a mean below it is not drawn, and the median stands "
        "beside it.",
    ),
    "attention": (
        "Attention to the prohibition, by outcome",
        "Attention of the last context token, mean over layers and heads, before the first answer token. Points: means of "
        "a pressure bin with a 95 % bootstrap interval over prompts.",
    ),
    "priming": (
        "Priming index and violation",
        "PI = TMF − NF: attention to the mention of X less attention to the words that forbid it. Pearson correlation with "
        "its 95 % interval (Fisher's z).",
    ),
    "lens": (
        "Logit lens",
        "Probability of X's first tokens when the residual stream after each layer is read out. Dashed: the same prompts "
        "under baseline. Prompts are split by their greedy answer under the condition. Bands: 95 %.",
    ),
    "contributions": (
        "What attention and MLP add",
        "Change of the read-out probability of X across each attention and each MLP block, at the first answer token under "
        "the condition. Bands: 95 %.",
    ),
    "patching": (
        "Activation patching",
        "Change of P(X) under the prohibition when one site of one layer takes its baseline value, or, in the knock-out, "
        "may not be attended to. Black: all patched prompts, with a 95 % band. Dotted: by pressure bin.",
    ),
    "taxonomy": (
        "Kinds of failure",
        "A greedy failure is priming where the condition raises P(X) or PI > 0, else override; unknown where what was "
        "measured cannot tell.",
    ),
}
"""Title and caption of each figure."""


# -- drawing


def _layers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dots(ax: Axes, x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], label: str) -> None:
    # As pixels: thousands of vector dots would make the page megabytes larger and slow to scroll.
    size, alpha = (7, 0.35) if len(x) > 500 else (16, 0.6)
    ax.scatter(x, y, s=size, color="#8A8A8A", alpha=alpha, linewidths=0, label=label, rasterized=True)


def _jittered(rate: Float[np.ndarray, " N"], samples: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Shares moved by less than half a sample, so that equal ones do not hide each other; the same at every call."""
    return rate + 0.8 * np.random.default_rng(0).uniform(-0.5, 0.5, len(rate)) / np.maximum(samples, 1)


def _fitted(ax: Axes, curve: Curve, label: str) -> None:
    """The curve with its band: solid among the prompts, dashed and paler beyond them."""
    inside = curve.is_supported
    start, end = np.flatnonzero(inside)[[0, -1]]
    places = np.arange(len(curve.p0))
    for chosen, style, alpha in ((places <= start, "--", 0.1), (places >= end, "--", 0.1), (inside, "-", 0.25)):
        x, y, low, high = (values[chosen] for values in curve[:4])
        ax.plot(x, y, style, color=VERMILLION, linewidth=1.5, label=label if style == "-" else None)
        ax.fill_between(x, low, high, color=VERMILLION, alpha=alpha, linewidth=0)


def _binned(
    ax: Axes,
    x: Float[np.ndarray, " N"],
    y: Float[np.ndarray, " N"],
    colour: str,
    marker: str,
    label: str,
    line: bool = False,
    known: Mapping[str, Row] | None = None,
    seed: int = 0,
) -> None:
    """Mean and bootstrap interval of y in each pressure bin, drawn at the bin's mean x; an empty bin is left out.

    `known` are rows of `statistics` by bin: where one is of as many prompts, it is what is drawn.
    """
    bins = np.searchsorted(EDGES, x, side="right")
    parts = {BIN_NAMES[b]: bins == b for b in np.unique(bins)}
    found = [
        (float(x[part].mean()), estimate_of(y[part].tolist(), (known or {}).get(name), seed))
        for name, part in parts.items()
    ]
    at, means = [p for p, _ in found], [e.mean for _, e in found]
    # A bin of one prompt has no interval; its bar has no length and its point still stands.
    reach = np.nan_to_num([[e.mean - e.low for _, e in found], [e.high - e.mean for _, e in found]])
    ax.errorbar(
        at,
        means,
        yerr=np.maximum(reach, 0),
        fmt=marker + ("-" if line else ""),
        color=colour,
        markersize=5,
        capsize=3,
        linewidth=1.3,
        label=label,
        zorder=4,
    )


def _medians(ax: Axes, x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> None:
    bins = np.searchsorted(EDGES, x, side="right")
    middles = [(float(x[bins == b].mean()), float(np.median(y[bins == b]))) for b in np.unique(bins)]
    ax.plot(
        *zip(*middles, strict=True),
        "D",
        markersize=6,
        markerfacecolor="white",
        color=PURPLE,
        label="median of a bin",
        zorder=5,
    )


def _curve(ax: Axes, rows: Sequence[Row], label: str, colour: str, style: str, band: bool = True) -> None:
    """Value by layer with its interval as a band; a layer without a value breaks the line."""
    if not rows:
        return
    rows = sorted(rows, key=lambda r: r["layer"])
    layers = [r["layer"] for r in rows]
    counts = sorted({r["n"] for r in rows if r["n"] is not None})
    told = f"{label} (n = {counts[-1]:,})" if counts else label
    ax.plot(
        layers,
        _column(rows, "value"),
        style,
        color=colour,
        linewidth=1.5,
        label=told,
        marker="." if len(rows) == 1 else None,
    )
    if band:
        ax.fill_between(layers, _column(rows, "low"), _column(rows, "high"), color=colour, alpha=0.18, linewidth=0)


def _column(rows: Sequence[Row], name: str) -> Float[np.ndarray, " N"]:
    """A column as float64, NaN for NULL: matplotlib leaves a gap there."""
    return np.array([np.nan if r[name] is None else r[name] for r in rows], dtype=np.float64)


def _correlation(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> str:
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "r: too little variation"
    r, reach = float(np.corrcoef(x, y)[0, 1]), ndtri(0.975) / np.sqrt(len(x) - 3)
    low, high = np.tanh(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)) + np.array([-reach, reach]))
    return f"r = {r:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
