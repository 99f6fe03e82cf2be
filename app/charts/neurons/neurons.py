"""The page Neurons' drawings: where a ranking lies, peak against influence, effect against claim, curves."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import pandas as pd

from app.charts import BLUE, GREY, ORANGE, RED, Option, heatmap, lines
from app.charts.neurons import COLOUR_OF, number_told, size_told

LEVEL = 0.05
"""Share of false discoveries up to which a neuron counts as beyond the background."""


class Point(NamedTuple):
    """What a drawn point stands for: a neuron, or a neuron in a prompt."""

    layer: int
    neuron: int
    prompt_id: str | None = None


# -- where


def bins(edges: Sequence[int], cells: pd.DataFrame) -> list[str]:
    """Labels of the bins of places up to the last that has any: `1`, `2`, `3–5`, `6–10` …"""
    last = int(cells["bin"].max()) if len(cells) else -1
    starts = [1, *(edge + 1 for edge in edges)]
    labels = [f"{a:,}" if a == b else f"{a:,}–{b:,}" for a, b in zip(starts, edges, strict=False)]
    return [*labels, f"over {edges[-1]:,}"][: last + 1]


def density(cells: pd.DataFrame, layers: Sequence[int], edges: Sequence[int]) -> Option:
    """Layers by places of a ranking: each cell the share of the neurons at these places that lies in the layer; the shares of
    a column add up to 1. `cells`: layer, bin (index into `edges`), share; what is not in them is 0."""
    labels = bins(edges, cells)
    filled = grid(cells, layers, len(labels))
    option = heatmap(
        filled, labels, list(layers), low=0.0, high=float(filled["value"].max()) if len(filled) else 1.0,
        x_title="place in the ranking", y_title="layer", value_title="share of these places",
    )  # fmt: skip
    option["tooltip"] = {"trigger": "item", "formatter": "{b}"}
    for item, row in zip(option["series"][0]["data"], filled.to_dict("records"), strict=False):
        item["name"] = f"layer {row['layer']}, places {labels[row['x']]}: {row['value']:.1%}, {row['n']:,} neurons"
    option["animation"] = False
    return option


def grid(cells: pd.DataFrame, layers: Sequence[int], num_bins: int) -> pd.DataFrame:
    """x, y, value, n, layer of every cell, in the order in which they are drawn."""
    known = {(int(r["layer"]), int(r["bin"])): (float(r["share"]), int(r["n"])) for r in cells.to_dict("records")}
    rows = [
        {
            "x": x,
            "y": y,
            "layer": layer,
            "value": known.get((layer, x), (0.0, 0))[0],
            "n": known.get((layer, x), (0.0, 0))[1],
        }
        for y, layer in enumerate(layers)
        for x in range(num_bins)
    ]
    return pd.DataFrame(rows, columns=["x", "y", "layer", "value", "n"])


def clicked_layer(cells: pd.DataFrame, layers: Sequence[int], edges: Sequence[int], item: int) -> int | None:
    """The layer of a clicked cell."""
    width = len(bins(edges, cells))
    return layers[item // width] if width and item // width < len(layers) else None


# -- peak against influence


def scatter(rows: pd.DataFrame, chosen: Point | None) -> Option:
    """Mean peak against influence, a point a neuron; those beyond the background in a colour of their own, the chosen one
    ringed."""
    series = [_dots(title, part, colour) for title, part, colour in _parts(rows) if len(part)]
    ring = rows[(rows["layer"] == chosen.layer) & (rows["neuron"] == chosen.neuron)] if chosen else rows.head(0)
    if len(ring):
        series.append(_ring("chosen", ring, "mean_peak", "influence"))
    has_log = len(rows) > 0 and bool((rows["mean_peak"] > 0).all())
    return {
        "grid": {"left": 12, "right": 24, "top": 48, "bottom": 12},
        "legend": {"top": 0, "data": [s["name"] for s in series]},
        "tooltip": {"trigger": "item", "formatter": "{b}"},
        "xAxis": {
            "type": "log" if has_log else "value", "name": "mean peak, max |a| of a prompt", "nameLocation": "middle",
            "nameGap": 28, "min": "dataMin", "max": "dataMax", "axisLabel": {"showMinLabel": False, "showMaxLabel": False},
        },
        "yAxis": {"type": "value", "name": "influence on the target", "nameLocation": "middle", "nameGap": 48},
        "animation": False,
        "series": series,
    }  # fmt: skip


def clicked_point(rows: pd.DataFrame, series: int, item: int) -> Point | None:
    """The neuron behind a clicked point of `scatter`; None for a click on something else."""
    drawn = [part for _, part, _ in _parts(rows) if len(part)]
    if series >= len(drawn) or item >= len(drawn[series]):
        return None
    row = drawn[series].iloc[item]
    return Point(int(row["layer"]), int(row["neuron"]))


def _parts(rows: pd.DataFrame) -> tuple[tuple[str, pd.DataFrame, str], ...]:
    is_beyond = rows["q"] < LEVEL
    return (
        (f"beyond the background (q < {LEVEL:g})", rows[is_beyond], RED),
        ("not beyond it, or not tested", rows[~is_beyond], BLUE),
    )


def _dots(title: str, rows: pd.DataFrame, colour: str) -> Option:
    return {
        "type": "scatter",
        "name": title,
        "symbolSize": 6,
        "selectedMode": "single",
        "itemStyle": {"color": colour, "opacity": 0.7},
        "data": [
            {
                "name": f"neuron {layer}.{neuron}: peak {size_told(peak)}, influence {number_told(influence)}",
                "value": [float(f"{peak:.6g}"), float(f"{influence:.6g}")],
            }
            for layer, neuron, peak, influence in zip(
                rows["layer"], rows["neuron"], rows["mean_peak"], rows["influence"], strict=True
            )
        ],
    }


def _ring(title: str, rows: pd.DataFrame, x: str, y: str) -> Option:
    return {
        "type": "scatter",
        "name": title,
        "symbolSize": 16,
        "silent": True,
        "z": 5,
        "itemStyle": {"color": "transparent", "borderColor": ORANGE, "borderWidth": 3},
        "data": [{"name": title, "value": [float(a), float(b)]} for a, b in zip(rows[x], rows[y], strict=True)],
    }


# -- effect against claim


def claims(rows: pd.DataFrame, chosen: Point | None = None) -> Option:
    """What was measured against what was claimed, a point a neuron in a prompt, a series a ranking; on the dashed line both
    are the same. `rows`: ranking, prompt_id, layer, neuron, predicted, measured."""
    series = [
        {
            "type": "scatter",
            "name": ranking,
            "symbolSize": 6,
            "selectedMode": "single",
            "itemStyle": {"color": COLOUR_OF.get(ranking, BLUE), "opacity": 0.65},
            "data": [
                {
                    # ECharts takes braces in a name for a template: a prompt's id may have any.
                    "name": f"neuron {layer}.{neuron} in {_bare(prompt)}: {ranking} claims {number_told(claimed)}, "
                    f"measured {number_told(measured)}",
                    "value": [float(f"{claimed:.6g}"), float(f"{measured:.6g}")],
                }
                for prompt, layer, neuron, claimed, measured in part[
                    ["prompt_id", "layer", "neuron", "predicted", "measured"]
                ].itertuples(index=False)
            ],
        }
        for ranking, part in _by_ranking(rows)
    ]  # fmt: skip
    known = rows[["predicted", "measured"]].dropna()
    # ECharts leaves out a line that ends beyond an axis: as far as both axes go.
    low, high = (float(known.min().max()), float(known.max().min())) if len(known) else (0.0, 0.0)
    if low < high:
        series[0]["markLine"] = {
            "symbol": "none", "silent": True, "animation": False, "label": {"show": False},
            "lineStyle": {"color": GREY, "type": "dashed", "width": 1.5},
            "data": [[{"coord": [low, low]}, {"coord": [high, high]}]],
        }  # fmt: skip
    ring = rows.head(0)
    if chosen is not None:
        ring = known.assign(layer=rows["layer"], neuron=rows["neuron"])
        ring = ring[(ring["layer"] == chosen.layer) & (ring["neuron"] == chosen.neuron)]
    if len(ring):
        series.append(_ring("chosen", ring, "predicted", "measured"))
    return {
        "grid": {"left": 12, "right": 24, "top": 48, "bottom": 12},
        "legend": {"top": 0, "data": [s["name"] for s in series]},
        "tooltip": {"trigger": "item", "formatter": "{b}"},
        "xAxis": {"type": "value", "name": "claimed change", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "value", "name": "measured change", "nameLocation": "middle", "nameGap": 48},
        "animation": False,
        "series": series,
    }


def clicked_claim(rows: pd.DataFrame, series: int, item: int) -> Point | None:
    """The neuron and prompt behind a clicked point of `claims`; None for a click on something else."""
    drawn = [part for _, part in _by_ranking(rows)]
    if series >= len(drawn) or item >= len(drawn[series]):
        return None
    row = drawn[series].iloc[item]
    return Point(int(row["layer"]), int(row["neuron"]), str(row["prompt_id"]))


def _by_ranking(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    known = rows.dropna(subset=["predicted", "measured"])
    present = set(known["ranking"])
    names = [*(n for n in COLOUR_OF if n in present), *sorted(present - set(COLOUR_OF))]
    return [(name, known[known["ranking"] == name]) for name in names]


def _bare(text: str) -> str:
    return text.replace("{", "(").replace("}", ")")


# -- curves


def curves(rows: pd.DataFrame, mode: str, controls: Collection[str]) -> Option:
    """m(k) of one mode, a line a ranking, controls dashed. `rows`: ranking, mode, k, m. An empty set has no place on a scale
    of logarithms: there m is 0 where neurons are kept, and 1 where they are dropped."""
    mine = rows[(rows["mode"] == mode) & (rows["k"] > 0)]
    present = set(mine["ranking"])
    names = [*(n for n in COLOUR_OF if n in present), *sorted(present - set(COLOUR_OF))]
    parts = [(n, mine[mine["ranking"] == n].rename(columns={"k": "x", "m": "y"})[["x", "y"]]) for n in names]
    option = lines(
        parts, x_title=f"k neurons {'kept' if mode == 'keep' else 'dropped'}", y_title="m(k)",
        colours=[COLOUR_OF.get(n, BLUE) for n in names] or [BLUE], dashed=[n for n in names if n in controls],
    )  # fmt: skip
    option["xAxis"] |= {"type": "log", "axisLabel": {"showMinLabel": False, "showMaxLabel": False}}
    option["legend"] |= {"type": "scroll"}
    option["animation"] = False
    return option
