"""Data frame to ECharts option: no Streamlit, no SQL. Each page's own charts stand in the module of its name.

Colours are Okabe and Ito's, which every reader can tell apart; a scale is fixed over what is compared, and its range is
printed beside it. What was not measured is grey and hatched, never zero.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

Option = dict[str, Any]

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, YELLOW, SKY = "#CC79A7", "#F0E442", "#56B4E9"
GREY = "#9A9A9A"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, YELLOW)
SEQUENTIAL = ("#F7FBFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")
_MISSING: Option = {
    "color": GREY,
    "opacity": 0.35,
    "decal": {
        "symbol": "rect",
        "dashArrayX": [1, 0],
        "dashArrayY": [2, 4],
        "rotation": -0.785,
        "color": "rgba(0,0,0,0.6)",
    },
}
DIVERGING = ("#B35806", "#F1A340", "#F7F7F7", "#998EC3", "#542788")
"""Below zero, zero, above."""


def heatmap(
    cells: pd.DataFrame,
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    low: float,
    high: float,
    x_title: str,
    y_title: str,
    value_title: str,
    is_signed: bool = False,
    text: str | None = None,
) -> Option:
    """A grid of cells. `cells`: columns x, y (positions in the lists `x` and `y` of labels), value (NaN: not measured), and
    `text`, where named, the column shown in each cell.

    The first of `y` is at the bottom. A cell without a value, or not in `cells`, is grey and hatched. Cells can be
    clicked, see `clicked_cell`.
    """
    known = cells.dropna(subset=["value"])
    data: list[Option] = []
    for cell in known.to_dict("records"):
        i, j = int(cell["x"]), int(cell["y"])
        # ECharts selects by name, and takes braces in a label for a template.
        item: Option = {"name": f"{x[i]} | {y[j]}", "value": [i, j, round(float(cell["value"]), 6)]}
        if text is not None:
            item["label"] = {"show": True, "formatter": str(cell[text]).replace("{", "(").replace("}", ")")}
        data.append(item)
    for i, j in _missing(known, len(x), len(y)):
        data.append(
            {
                "name": f"{x[i]} | {y[j]}: not measured",
                "value": [i, j, low],
                "visualMap": False,
                "itemStyle": _MISSING,
                "tooltip": {"show": False},
            }
        )
    series: Option = {
        "type": "heatmap",
        "name": value_title,
        "selectedMode": "single",
        "data": data,
        "emphasis": {"itemStyle": {"borderColor": "#000", "borderWidth": 1}},
        "select": {"itemStyle": {"borderColor": "#000", "borderWidth": 2}},
    }
    return {
        "grid": {"left": 12, "right": 24, "top": 24, "bottom": 64},
        "tooltip": {"trigger": "item"},
        "xAxis": {
            "type": "category",
            "data": list(map(str, x)),
            "name": x_title,
            "nameLocation": "middle",
            "nameGap": 28,
        },
        "yAxis": {
            "type": "category",
            "data": list(map(str, y)),
            "name": y_title,
            "nameLocation": "middle",
            "nameGap": 44,
        },
        "visualMap": {
            "min": low,
            "max": high,
            "calculable": False,
            "orient": "horizontal",
            "left": "center",
            "bottom": 0,
            "precision": 3,
            "text": [f"{high:.3g}", f"{low:.3g}"],
            "seriesIndex": 0,
            "inRange": {"color": list(DIVERGING if is_signed else SEQUENTIAL)},
        },
        "series": [series],
    }


def clicked_cell(index: int, cells: pd.DataFrame) -> dict[Any, Any] | None:
    """The row of `cells` behind the clicked item of their `heatmap`; None for one that was not measured."""
    known = cells.dropna(subset=["value"])
    return known.to_dict("records")[index] if index < len(known) else None


def symmetric(values: pd.Series) -> tuple[float, float]:
    """A range around zero that holds all values; ±1 where there is none."""
    top = float(values.abs().max()) if values.notna().any() else 1.0
    return -(top or 1.0), top or 1.0


def lines(
    curves: Sequence[tuple[str, pd.DataFrame]],
    *,
    x_title: str,
    y_title: str,
    colours: Sequence[str] = COLOURS,
    low: float | None = None,
    high: float | None = None,
    dashed: Sequence[str] = (),
) -> Option:
    """Named curves. Each frame: columns x, y and, where there is a 95 % interval, low and high, drawn as a band."""
    series: list[Option] = []
    bands: list[Option] = []
    for n, (name, frame) in enumerate(curves):
        colour = colours[n % len(colours)]
        known = frame.dropna(subset=["y"])
        if {"low", "high"} <= set(known.columns) and known[["low", "high"]].notna().all(axis=None):
            common = {
                "type": "line",
                "stack": f"band {n}",
                "symbol": "none",
                "silent": True,
                "lineStyle": {"opacity": 0},
                "tooltip": {"show": False},
                "stackStrategy": "all",
            }
            bands.append(common | {"name": name, "data": known[["x", "low"]].to_numpy().tolist()})
            width = (known["high"] - known["low"]).tolist()
            bands.append(
                common
                | {
                    "name": name,
                    "data": list(map(list, zip(known["x"], width, strict=True))),
                    "areaStyle": {"color": colour, "opacity": 0.2},
                }
            )
        series.append(
            {
                "type": "line",
                "name": name,
                "data": known[["x", "y"]].to_numpy().tolist(),
                "symbolSize": 5,
                "lineStyle": {"color": colour, "width": 2, "type": "dashed" if name in dashed else "solid"},
                "itemStyle": {"color": colour},
            }
        )
    return {
        "grid": {"left": 12, "right": 24, "top": 48, "bottom": 12},
        "legend": {"top": 0, "data": [name for name, _ in curves]},
        "tooltip": {"trigger": "axis", "valueFormatter": "%.3f"},
        "xAxis": {
            "type": "value",
            "name": x_title,
            "nameLocation": "middle",
            "nameGap": 28,
            "min": "dataMin",
            "max": "dataMax",
        },
        "yAxis": {"type": "value", "name": y_title, "nameLocation": "middle", "nameGap": 44, "min": low, "max": high},
        "series": series + bands,  # the legend takes its colours from the first series of a name
    }


def _missing(known: pd.DataFrame, width: int, height: int) -> list[tuple[int, int]]:
    have = set(zip(known["x"].astype(int), known["y"].astype(int), strict=True))
    return [(i, j) for i in range(width) for j in range(height) if (i, j) not in have]
