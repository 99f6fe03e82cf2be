"""The four figures of a run, from rows to matplotlib Figures.

`gather` reads a snapshot once; every figure is then a pure function of what it gathered. Knows no file and no page. What was
not measured is said in grey on the figure, and a rate of no hit is drawn as its upper bound, never as a point at zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from harness.experiments import drawing
from harness.experiments.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION
from harness.experiments.lda.schema import NATURAL
from harness.store import Reader, Row

NUM_TOKENS = 15
"""Tokens that are shown of each kind: most raised and most lowered, at each place."""
PLACES: dict[str, str] = {"answer": "the first token of the answer", "prompt": "every token of the prompt"}
"""Where differences of tokens are measured, in words; the most telling first."""
WAYS: dict[str, tuple[str, str, str]] = {
    "exact": ("exact, at the start", GREEN, "D"),
    "counted": ("sampled at α = 0", BLUE, "o"),
    "reweighted": ("reweighted from all arms", ORANGE, "s"),
    "extrapolated": ("extrapolated (a guess)", GREY, "X"),
}
"""To the natural rate, the surest first: what it is called, its colour, its marker."""
_LOG_FROM = 20.0
"""Largest over smallest rate from which their axis is logarithmic."""
_NUM_BARS = 8
_MOST_SIGNS = 20
"""Of a token's text on an axis."""


@dataclass(frozen=True)
class FigureData:
    """All that the figures are drawn from."""

    arms: Mapping[str, float] = field(default_factory=dict)
    """α by the name of its condition, the smallest first."""
    statistics: Sequence[Row] = ()
    """Rows of the table of that name."""
    tokens: Sequence[Row] = ()
    """Rows of `token_diffs` with their `text`: those with the largest and the smallest means of each place."""
    is_cut: bool = False
    """Whether temperature, top-p or floor keep rollouts from being drawn as the arms have them; exact rates know no such cut."""

    def row(self, analysis: str, detector: str, condition: str, measure: str) -> Row | None:
        """What the analysis says of it, where it says anything."""
        return self._known.get((analysis, detector, condition, measure))

    def rows(self, analysis: str, detector: str, measure: str) -> list[tuple[float, Row]]:
        """By α, those that have a value."""
        found = ((alpha, self.row(analysis, detector, name, measure)) for name, alpha in self.arms.items())
        return [(alpha, row) for alpha, row in found if row is not None and row["value"] is not None]

    def way(self, detector: str, way: str) -> Row | None:
        """The natural rate by one way to it; the exact one with its upper end, where tokenisations were left out."""
        row = self.row("natural", detector, NATURAL, way)
        if row is None or row["value"] is None:
            return None
        curve = self.row("exact", detector, NATURAL, "rate") if way == "exact" else None
        return row | {"low": curve["low"], "high": curve["high"]} if curve else row

    def raised(self, place: str) -> list[Row]:
        """The tokens that the training made likelier, the most raised first."""
        rows = [r for r in self.tokens if r["place"] == place and r["mean"] > 0]
        return sorted(rows, key=lambda r: (-r["mean"], r["token_id"]))[:NUM_TOKENS]

    def lowered(self, place: str) -> list[Row]:
        """The tokens that it made less likely, the most lowered first."""
        rows = [r for r in self.tokens if r["place"] == place and r["mean"] < 0]
        return sorted(rows, key=lambda r: (r["mean"], r["token_id"]))[:NUM_TOKENS]

    @cached_property
    def detectors(self) -> tuple[str, ...]:
        """Those that the analysis says anything of."""
        return tuple(sorted({r["detector"] for r in self.statistics if r["detector"]}))

    @cached_property
    def _known(self) -> Mapping[tuple[str, str, str, str], Row]:
        return {(r["analysis"], r["detector"], r["condition"], r["measure"]): r for r in self.statistics}


def gather(reader: Reader) -> FigureData:
    """Reads everything the figures need, in three queries."""
    arms = reader.query("SELECT * FROM arms ORDER BY alpha")
    tokens = reader.query(
        "SELECT d.*, coalesce(v.text, '') AS text FROM token_diffs d LEFT JOIN vocabulary v USING (token_id) "
        "WHERE d.mean IS NOT NULL QUALIFY least(row_number() OVER (PARTITION BY d.place ORDER BY d.mean DESC, token_id), "
        f"row_number() OVER (PARTITION BY d.place ORDER BY d.mean, token_id)) <= {NUM_TOKENS} "
        "ORDER BY d.place, d.mean DESC, token_id"
    )
    statistics = reader.query("SELECT * FROM statistics ORDER BY analysis, detector, condition, measure")
    is_cut = any(r["temperature"] != 1 or r["top_p"] != 1 or r["floor"] for r in arms)
    return FigureData({r["condition"]: r["alpha"] for r in arms}, statistics, tokens, is_cut)


# -- the figures


def rates_by_arm(data: FigureData) -> Figure:
    """Share of rollouts in which a detector fires against α with intervals, a panel a detector, the exact curve beside it."""
    shown = [d for d in data.detectors if data.rows("rates", d, "rate") or data.rows("exact", d, "rate")]
    figure, axes = drawing.panels(shown, "needs a detector, rollouts or phrases at the start, and stage analysis")
    for ax, detector in zip(axes, shown, strict=True):
        rates, exact = data.rows("rates", detector, "rate"), data.rows("exact", detector, "rate")
        least = _scaled(ax, "y", [row for _, row in (*rates, *exact)])
        _exact_curve(ax, exact, "exact, at the start" + (", nothing cut off" if data.is_cut else ""))
        seen = [(alpha, row) for alpha, row in rates if row["value"] > 0]
        if seen:
            alphas, rows = zip(*seen, strict=True)
            values = [row["value"] for row in rows]
            style = {"fmt": "o-", "color": BLUE, "markersize": 5, "capsize": 3, "linewidth": 1.3, "zorder": 4}
            ax.errorbar(alphas, values, yerr=_reach(rows, least), label="sampled, 95 %", **style)
        _bounds(ax, [(alpha, row) for alpha, row in rates if row["value"] == 0])
        ax.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        _arms(ax, [alpha for alpha, _ in (*rates, *exact)])
        drawing.label(ax, detector, "α (−1: before, 0: after)", "share of rollouts")
        drawing.legend(ax, "upper left")
    return figure


def natural_rates(data: FigureData) -> Figure:
    """The rate at α = 0 by every way there is to it, a panel a detector; what is extrapolated stands below a line."""
    shown = [d for d in data.detectors if any(data.way(d, way) for way in WAYS)]
    figure, axes = drawing.panels(shown, "needs a detector and stage analysis", columns=2, height=2.4)
    for ax, detector in zip(axes, shown, strict=True):
        found = {way: row for way in WAYS if (row := data.way(detector, way))}
        least = _scaled(ax, "x", [*found.values()])
        for place, (way, row) in enumerate(found.items()):
            _, colour, marker = WAYS[way]
            if not row["value"]:
                _no_hit(ax, place, row, colour)
                continue
            style = {"color": colour, "markersize": 7, "linewidth": 1.5, "capsize": 4, "zorder": 4}
            style |= {"markerfacecolor": "white"} if way == "extrapolated" else {}
            # What an exact rate left out lies on one side only, and nothing of it is chance.
            reach = None if row["low"] is None else _reach([row], least)
            ax.errorbar([row["value"]], [place], xerr=reach, fmt=marker, **style)
        if "extrapolated" in found and len(found) > 1:
            ax.axhline(len(found) - 1.5, color=GREY, linewidth=0.8)
        cut = {"counted": ", cut off", "extrapolated": ", cut off"} if data.is_cut else {}
        ax.set_yticks(range(len(found)), [WAYS[way][0] + cut.get(way, "") for way in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        drawing.label(ax, detector, "natural rate (share of rollouts)", "")
    return figure


def tokens_moved(data: FigureData) -> Figure:
    """Tokens that the training raised and lowered most, by mean difference over contexts, a panel a place."""
    shown = [place for place in PLACES if data.raised(place) or data.lowered(place)]
    figure, axes = drawing.panels(shown, "needs stages diff_tokens and analysis", columns=2, height=4.2)
    for ax, place in zip(axes, shown, strict=True):
        rows = [*data.raised(place)[:_NUM_BARS], *reversed(data.lowered(place)[:_NUM_BARS])]
        means = [row["mean"] for row in rows]
        # NaN has no length: one context alone has no spread.
        spread = [math.nan if row["sd"] is None else row["sd"] for row in rows]
        colours = [VERMILLION if mean > 0 else BLUE for mean in means]
        ax.barh(range(len(rows)), means, color=colours, height=0.7)
        ax.errorbar(means, range(len(rows)), xerr=spread, fmt="none", ecolor=BLACK, elinewidth=0.8, capsize=2)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_yticks(range(len(rows)), [drawing.plain(drawable(row["text"])) for row in rows])
        ax.invert_yaxis()
        num = max(row["n"] for row in rows)
        drawing.label(ax, f"{PLACES[place]} (n = {num:,})", "log p after − log p before, nats (mean ± sd)", "token")
    return figure


MEASURES: dict[str, tuple[str, str]] = {
    "branched": ("another text than at α = 0", "share of rollouts"),
    "ended": ("ended by itself", "share of rollouts"),
    "num_tokens": ("length", "tokens a rollout"),
    "mass_removed": ("removed by floor and top-p", "probability a token"),
}
"""What is told of an arm's rollouts, whatever is in them: its title and its unit."""


def rollouts_by_arm(data: FigureData) -> Figure:
    """How rollouts of an arm look, whatever is in them, a panel a measure."""
    shown = [measure for measure in MEASURES if data.rows("rollouts", "", measure)]
    figure, axes = drawing.panels(shown, "needs rollouts and stage analysis", columns=2, height=2.5)
    for ax, measure in zip(axes, shown, strict=True):
        alphas, rows = zip(*data.rows("rollouts", "", measure), strict=True)
        values = [row["value"] for row in rows]
        ax.plot(alphas, values, "o-", color=SKY, markeredgecolor=BLUE, linewidth=1.3, clip_on=False)
        ax.set_ylim(0, 1.05 if measure in ("branched", "ended") or not any(values) else 1.15 * max(values))
        if measure == "mass_removed" and not any(values):
            drawing.say(ax, "nothing was removed")
        _arms(ax, alphas)
        title, unit = MEASURES[measure]
        drawing.label(ax, f"{title} (n = {max(row['n'] for row in rows):,})", "α", unit)
    return figure


FIGURES: dict[str, Callable[[FigureData], Figure]] = {
    "rates": rates_by_arm,
    "natural": natural_rates,
    "tokens": tokens_moved,
    "rollouts": rollouts_by_arm,
}
"""The figures by the name of their files, in the order of reading."""

CAPTIONS: dict[str, tuple[str, str]] = {
    "rates": (
        "Rate of hits against α",
        "Blue: mean over prompts of the share of rollouts in which the detector fires, with a 95 % interval from a bootstrap "
        "over prompts; a triangle is the upper bound of an arm without a hit (rule of three). Green: the exact probability of "
        "beginning with the detector's phrases, nothing cut off; its band adds the ways to write them that were not followed. "
        "A detector that fires anywhere in the text may lie above it.",
    ),
    "natural": (
        "Natural rate by every way to it",
        "The rate at α = 0. Sampled and reweighted with 95 % intervals from a bootstrap over prompts; the bar of the exact "
        "one is what was not followed, and no chance. Below the line: extrapolated, a guess of a form that has no interval.",
    ),
    "tokens": (
        "Tokens that the training moved most",
        "Mean over contexts of the difference in log-probability. Whiskers: one standard deviation over contexts, which is how "
        "much they differ and no interval of the mean. Orange: raised. Blue: lowered.",
    ),
    "rollouts": (
        "Rollouts by arm",
        "Means over all rollouts of an arm, hits or not. Where the same sample has the same noise in every arm, a text differs "
        "from that at α = 0 only where amplification changed a choice.",
    ),
}
"""Title and caption of each figure."""


def drawable(text: str) -> str:
    """A token as `quoted` has it, and whatever the figures' font lacks as escapes."""
    return "".join(c if ord(c) in _signs() else c.encode("unicode_escape").decode() for c in quoted(text))


def quoted(text: str) -> str:
    """A token's text in quotes, its control characters as escapes, and not too long."""
    return repr(text if len(text) <= _MOST_SIGNS else text[: _MOST_SIGNS - 1] + "…")


# -- drawing


@lru_cache(maxsize=1)
def _signs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _scaled(ax: Axes, axis: str, rows: Sequence[Row]) -> float:
    """Scales the axis of rates, by decades where they span some; the least that can be drawn on it."""
    found = [rate for row in rows if (rate := row["value"] or row["high"])]
    limit, scale = (ax.set_ylim, ax.set_yscale) if axis == "y" else (ax.set_xlim, ax.set_xscale)
    if not found or max(found) < _LOG_FROM * min(found):
        limit(0, 1.15 * max([*found, *(row["high"] or 0.0 for row in rows), 1e-6]))
        return 0.0
    least = min(found) / 3  # an interval that goes down to 0 leaves the axis here
    scale("log")
    limit(least, 5 * max(found))
    return least


def _reach(rows: Sequence[Row], least: float) -> list[list[float]]:
    """How far the intervals reach down and up, down to `least` at most; no length where there is none."""
    down = [row["value"] - max(row["low"], least) if row["low"] is not None else 0.0 for row in rows]
    up = [row["high"] - row["value"] if row["high"] is not None else 0.0 for row in rows]
    return [[max(0.0, x) for x in down], [max(0.0, x) for x in up]]


def _bounds(ax: Axes, empty: Sequence[tuple[float, Row]]) -> None:
    """Upper bounds of rates that no hit was seen of, as triangles that point down."""
    bounds = [(alpha, row["high"]) for alpha, row in empty if row["high"]]
    if bounds:
        label = "no hit: at most"
        ax.plot(
            *zip(*bounds, strict=True), "v", color=BLUE, markerfacecolor="white", markersize=7, label=label, zorder=4
        )


def _no_hit(ax: Axes, place: int, row: Row, colour: str) -> None:
    """The upper bound of a rate that no hit was seen of, as a triangle that points to smaller ones; or words, where it has
    none."""
    if row["high"]:
        ax.plot([row["high"]], [place], "<", color=colour, markerfacecolor="white", markersize=7, zorder=4)
        ax.annotate("no hit: at most ", (row["high"], place), (-6, 0), textcoords="offset points", ha="right", va="center",
                    fontsize=8, color=GREY)  # fmt: skip
    else:
        ax.text(0.5, place, "no hit in any arm", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=8,
                color=GREY)  # fmt: skip


def _exact_curve(ax: Axes, exact: Sequence[tuple[float, Row]], label: str) -> None:
    if not exact:
        return
    alphas, rows = zip(*exact, strict=True)
    values = [row["value"] for row in rows]
    ax.plot(alphas, values, "D--", color=GREEN, markersize=4, linewidth=1.3, label=label, zorder=3)
    highs: list[Any] = [row["value"] if row["high"] is None else row["high"] for row in rows]
    ax.fill_between(alphas, values, highs, color=GREEN, alpha=0.18, linewidth=0)


def _arms(ax: Axes, alphas: Iterable[float]) -> None:
    """A tick an arm, where there is room for it."""
    found = sorted(set(alphas))
    if len(found) <= 8:
        ax.set_xticks(found, [f"{alpha:g}".replace("-", "−") for alpha in found])
