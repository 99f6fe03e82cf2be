"""The figures of a run, from rows to matplotlib Figures.

`gather` reads a snapshot once; every figure is then a pure function of what it gathered. Knows no file and no page. What was
not measured is said in grey on the figure. No text of a user stands in any of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.experiments import drawing
from harness.experiments.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from harness.experiments.neurons.settings import CONTROLS, LEVEL
from harness.experiments.neurons.summary import MEASURED, in_order, stored_rows, unit_of
from harness.store import Reader, Row

_MOST_POINTS = 4_000
"""Of a panel of the scatter; beyond, every n-th row is drawn."""
_WIDE = 0.995
"""Share of the points that a panel's frame holds; the others are drawn at its edge."""
MODES: dict[str, str] = {"keep": "only the k first are kept", "drop": "the k first are changed"}
"""The two kinds of curve, in words."""
_LINES: dict[str, tuple[str, str]] = {
    "dla": (BLUE, "-"),
    "act_grad": (VERMILLION, "-"),
    "ig": (GREEN, "-"),
    "relp": (PURPLE, "-"),
    "loudest": (ORANGE, "--"),
    "matched": (BLACK, "--"),
    "random": (GREY, ":"),
}


@dataclass(frozen=True)
class FigureData:
    """All that the figures are drawn from."""

    statistics: Mapping[tuple[str, str, str], Row] = field(default_factory=dict)
    """What the analysis said, by analysis, ranking and measure."""
    points: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """By ranking, predicted and measured changes, a pair a neuron and prompt: all, or every n-th."""
    num_points: Mapping[str, int] = field(default_factory=dict)
    """How many there are."""
    curves: Sequence[Row] = ()
    """ranking, mode, k, and `m` of all prompts together: mean(f(S) − f(∅)) over mean(f(all) − f(∅)); k above 0."""
    layers: Sequence[Row] = ()
    """metric, layer, and `share`: the mean over prompts of what the selected neurons of the layer hold of "
    "Σ|influence|."""
    unit: str = "logit"

    @cached_property
    def rankings(self) -> list[str]:
        """Those whose effects were measured."""
        return in_order([*self.points])

    def row(self, analysis: str, ranking: str, measure: str) -> Row | None:
        """What the analysis says of it, where it has a value."""
        row = self.statistics.get((analysis, ranking, measure))
        return row if row is not None and row["value"] is not None else None

    def background(self) -> list[tuple[int, Row]]:
        """Shares beyond the background, by layer."""
        rows = ((k[1], r) for k, r in self.statistics.items() if k[0] == "background" and k[1].startswith("layer "))
        return sorted(((int(name.removeprefix("layer ")), r) for name, r in rows), key=lambda found: found[0])


def gather(reader: Reader) -> FigureData:
    """Reads everything the figures need, in a few queries."""
    points: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    for r in reader.query(
        f"""
        WITH each AS (
            SELECT ranking, predicted, {MEASURED} AS measured, count(*) OVER (PARTITION BY ranking) AS num,
                   row_number() OVER (PARTITION BY ranking ORDER BY prompt_id, place) - 1 AS n
            FROM effects e JOIN targets t USING (prompt_id))
        SELECT * FROM each WHERE n % ceil(num / {_MOST_POINTS})::BIGINT = 0 ORDER BY ranking, n
        """
    ):
        points.setdefault(r["ranking"], []).append((r["predicted"], r["measured"]))
        counts[r["ranking"]] = r["num"]
    curves = reader.query(
        """
        WITH ends AS (
            SELECT prompt_id, ranking, mode, max(logit) FILTER (m = 0) AS none, max(logit) FILTER (m = 1) AS whole
            FROM curves WHERE k = 0 OR k = (SELECT max(k) FROM curves) GROUP BY ALL)
        SELECT ranking, mode, k, avg(logit - none) / nullif(avg(whole - none), 0) AS m, count(*) AS n
        FROM curves JOIN ends USING (prompt_id, ranking, mode)
        WHERE k > 0 AND none IS NOT NULL AND whole IS NOT NULL GROUP BY ALL ORDER BY ranking, mode, k
        """
    )
    layers = reader.query(
        """
        WITH counts AS (SELECT metric, count(*) AS num FROM influence_totals WHERE num_selected > 0 GROUP BY metric)
        SELECT metric, layer, sum(share) / any_value(num) AS share FROM influence JOIN counts USING (metric)
        WHERE selected GROUP BY metric, layer ORDER BY metric, layer
        """
    )
    return FigureData(stored_rows(reader), points, counts, curves, layers, unit_of(reader))


# -- the figures


def agreement(data: FigureData) -> Figure:
    """Measured change against what each metric claims, a panel a metric, with the line of equality."""
    figure, axes = drawing.panels(
        data.rankings, "needs stage effects, and neurons.effects above 0", columns=2, height=3.6
    )
    for ax, ranking in zip(axes, data.rankings, strict=True):
        found = np.array(data.points[ranking], dtype=np.float64)
        # One scale for both axes, so that agreement is a diagonal; a few extremes would leave nothing to be seen of the rest.
        reach = float(np.quantile(np.abs(found), _WIDE)) or 1.0
        inside = np.clip(found, -reach, reach)
        ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":", label="as claimed")
        ax.scatter(inside[:, 0], inside[:, 1], s=7, color=BLUE, alpha=0.35, linewidths=0, rasterized=True, zorder=3)
        if slope := data.row("agreement", ranking, "slope"):
            told = f"{slope['value']:.2f}".replace("-", "−")
            ax.axline((0, 0), slope=slope["value"], color=VERMILLION, linewidth=1.2, label=f"slope {told}")
        ax.axhline(0, color=GREY, linewidth=0.5)
        ax.axvline(0, color=GREY, linewidth=0.5)
        for limit in (ax.set_xlim, ax.set_ylim):
            limit(-1.04 * reach, 1.04 * reach)
        ax.set_aspect("equal")
        drawing.label(ax, f"{ranking} (n = {data.num_points[ranking]:,})", f"claimed ({data.unit})", "measured")
        drawing.legend(ax, "upper left")
    return figure


def curves(data: FigureData) -> Figure:
    """m(k) of all prompts together for every ranking and control, a panel for what is kept and one for what is "
    "dropped."""
    shown = [mode for mode in MODES if any(r["mode"] == mode and r["m"] is not None for r in data.curves)]
    figure, axes = drawing.panels(shown, "needs stage effects, and sizes in neurons.curve", columns=2, height=3.8)
    for ax, mode in zip(axes, shown, strict=True):
        for ranking in reversed(in_order([r["ranking"] for r in data.curves])):
            own = [r for r in data.curves if (r["mode"], r["ranking"]) == (mode, ranking) and r["m"] is not None]
            colour, style = _LINES.get(ranking, (SKY, "-"))
            is_control = ranking in CONTROLS
            ax.plot(
                [r["k"] for r in own], [r["m"] for r in own], style, color=colour, marker="" if is_control else "o",
                markersize=3.5, linewidth=1.4, label=f"{ranking} (control)" if is_control else ranking,
            )  # fmt: skip
        ax.set_xscale("log")
        for level in (0, 1):
            ax.axhline(level, color=GREY, linewidth=0.6)
        drawing.label(ax, MODES[mode], "k neurons", "m(k): 0 as with none, 1 as with all")
    if axes:
        # One for both panels, in the order in which everything else is told.
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], fontsize=8, ncols=4, frameon=False, loc="outside lower center")
    return figure


def background(data: FigureData) -> Figure:
    """Share of each layer's neurons whose peaks differ from the background's."""
    found = data.background()
    figure, axes = drawing.panels([1] if found else [], "needs a background, and stages peaks and analysis", height=2.6)
    for ax in axes:
        layers, rows = zip(*found, strict=True)
        ax.bar(layers, [r["value"] for r in rows], color=SKY, edgecolor=BLUE, linewidth=0.6)
        ax.set_ylim(0, 1)
        _layers(ax, layers)
        drawing.label(ax, f"neurons beyond the background, q < {LEVEL:g}", "layer", "share of the layer's neurons")
    return figure


def layers(data: FigureData) -> Figure:
    """What the selected neurons of each layer hold of Σ|influence|, a line a metric."""
    metrics = in_order([r["metric"] for r in data.layers])
    figure, axes = drawing.panels(
        [1] if metrics else [], "needs stage influence, and neurons.cumulative above 0", height=2.8
    )
    for ax in axes:
        numbers = sorted({r["layer"] for r in data.layers})
        for metric in metrics:
            held = {r["layer"]: r["share"] for r in data.layers if r["metric"] == metric}
            ax.plot(numbers, [held.get(n, 0.0) for n in numbers], "o-", color=_LINES.get(metric, (SKY, "-"))[0],
                    markersize=3.5, linewidth=1.4, label=metric)  # fmt: skip
        ax.set_ylim(bottom=0)
        _layers(ax, numbers)
        drawing.label(ax, "selected neurons by layer", "layer", "share of Σ|influence|")
        drawing.legend(ax)
    return figure


FIGURES: dict[str, Callable[[FigureData], Figure]] = {
    "agreement": agreement,
    "curves": curves,
    "layers": layers,
    "background": background,
}
"""The figures by the name of their files, in the order of reading."""

CAPTIONS: dict[str, tuple[str, str]] = {
    "agreement": (
        "What was measured against what each metric claims",
        "A point is one neuron of one prompt, of those that the metric ranks highest; of more than "
        f"{_MOST_POINTS:,} every n-th is drawn, and extremes stand at the frame. On the dotted line a claim is "
        "right. Red: the slope through 0, mean over prompts.",
    ),
    "curves": (
        "Sets of neurons, kept and dropped",
        "The target with only the k first neurons of a ranking left as they are (left), and with only these changed "
        "(right), all prompts together: the mean change from none over the mean change from none to all. Dashed and "
        "dotted: controls, which claim nothing. A good ranking rises early on the left, and falls early on the "
        "right.",
    ),
    "layers": (
        "Where the influence lies",
        "Mean over prompts of what the selected neurons of a layer hold of the sum of |influence|, by each metric's "
        "own account.",
    ),
    "background": (
        "Neurons beyond the background, by layer",
        "Mean peaks over these prompts against those over the background, false discoveries controlled over all "
        "neurons. Prompts of one form differ from other text in most neurons; of a few prompts only large "
        "differences show.",
    ),
}
"""Title and caption of each figure."""


def _layers(ax: Axes, numbers: Sequence[int]) -> None:
    """A tick a layer, where there is room for it."""
    step = max(1, -(-len(numbers) // 16))
    ax.set_xticks([*numbers][::step])
