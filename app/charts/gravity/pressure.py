"""The P_sem page's charts: pressure against pressure, suppression, how often X is said, and which spellings carry it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.charts import COLOURS, GREY, ORANGE, RED, Option
from app.charts.gravity import OUTCOME_COLOURS

UNKNOWN = "not known"
_SYMBOLS = ("circle", "triangle", "rect", "diamond")
_RANGES: Mapping[str, tuple[float, float] | None] = {"delta": (-1.0, 1.0), "relative": (-1.5, 1.0), "log": None}
"""Axis of a suppression. `relative` has no lower bound where P0 is near zero; what lies below is counted in the first bin."""
_NUM_BINS = 40
_GRID: Option = {"left": 12, "right": 24, "top": 48, "bottom": 12}  # axis names and labels get their room from ECharts
_NUM_SPELLINGS = 12


@dataclass(frozen=True)
class Group:
    """Points of one colour."""

    name: str
    colour: str
    symbol: str
    rows: pd.DataFrame


def groups(points: pd.DataFrame, by: str, names: Sequence[str]) -> list[Group]:
    """The points by `category` or `outcome`. `names` are all the categories of the run, so that a filter changes no colour;
    groups without a point are left out."""
    if by == "outcome":
        told = points["outcome"].where(points["outcome"].notna(), UNKNOWN)
        styles = [(n, OUTCOME_COLOURS.get(n, GREY), "circle") for n in ("success", "failure", UNKNOWN)]
    else:
        told = points["category"]
        styles = [
            (n, COLOURS[i % len(COLOURS)], _SYMBOLS[i // len(COLOURS) % len(_SYMBOLS)]) for i, n in enumerate(names)
        ]
    cut = [Group(name, colour, symbol, points[told == name].reset_index(drop=True)) for name, colour, symbol in styles]
    return [g for g in cut if len(g.rows)]


def clicked_prompt(found: Sequence[Group], series: int, index: int) -> str | None:
    """The prompt behind a point; None for a click on something else. Series come in the order of the groups."""
    if series >= len(found) or index >= len(found[series].rows):
        return None
    return str(found[series].rows["prompt_id"].iloc[index])


def scatter(found: Sequence[Group], x_title: str, y_title: str, chosen: Mapping[str, str | None]) -> Option:
    """`py` against `px`, both in 0 to 1, with the diagonal; `chosen` (a name and a prompt's id) are ringed."""
    series = [
        {
            "type": "scatter",
            "name": g.name,
            "datasetIndex": n,
            "encode": {"x": "px", "y": "py", "itemName": "prompt_id"},
            "symbol": g.symbol,
            "symbolSize": 6,
            "itemStyle": {"color": g.colour, "opacity": 0.55},
            "selectedMode": "single",
            "select": {"itemStyle": {"borderColor": ORANGE, "borderWidth": 2, "opacity": 1}},
            "tooltip": {"formatter": "{@prompt_id}<br>X = {@target}<br>{@px} → {@py}<br>greedy answer: {@outcome}"},
        }
        for n, g in enumerate(found)
    ]
    rings = _rings(found, chosen, "px", "py")
    return {
        "grid": _GRID,
        "legend": {"top": 0, "data": [s["name"] for s in [*series, *rings]]},
        "tooltip": {"trigger": "item"},
        "xAxis": _unit_axis(x_title, 28),
        "yAxis": _unit_axis(y_title, 44),
        "dataset": [{"source": _rounded(g.rows[["prompt_id", "target", "px", "py", "outcome"]])} for g in found],
        "series": [*series, *rings, _diagonal()],
    }


def histogram(found: Sequence[Group], column: str) -> pd.DataFrame:
    """group, low, high, n: prompts per bin of a suppression. Values outside the axis are counted in its end bins."""
    values = [g.rows[column].to_numpy(float) for g in found]
    low, high = _RANGES[column] or _symmetric(values)
    edges = np.linspace(low, high, _NUM_BINS + 1)
    rows = [
        pd.DataFrame(
            {"group": g.name, "low": edges[:-1], "high": edges[1:], "n": np.histogram(np.clip(v, low, high), edges)[0]}
        )
        for g, v in zip(found, values, strict=True)
    ]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["group", "low", "high", "n"])


def num_outside(found: Sequence[Group], column: str) -> int:
    """Prompts whose suppression is off the axis."""
    given = _RANGES[column]
    return 0 if given is None else sum(int((~g.rows[column].between(*given)).sum()) for g in found)


def suppression(counts: pd.DataFrame, found: Sequence[Group], title: str, mean: float | None) -> Option:
    """`histogram`'s counts as stacked bars; the mean is a line."""
    first = counts[counts["group"] == found[0].name]
    bins = [f"{a + 0:.3g} to {b + 0:.3g}" for a, b in zip(first["low"].round(6), first["high"].round(6), strict=True)]
    series: list[Option] = [
        {
            "type": "bar",
            "stack": "prompts",
            "name": g.name,
            "barCategoryGap": "8%",
            "itemStyle": {"color": g.colour},
            "data": counts.loc[counts["group"] == g.name, "n"].astype(int).tolist(),
        }
        for g in found
    ]
    low, high = float(first["low"].min()), float(first["high"].max())
    lines = [_upright(0.0, "", GREY)]
    if mean is not None and mean == mean:
        lines.append(_upright(float(np.clip(mean, low, high)), f"mean {mean:.3f}", ORANGE))
    return {
        "grid": _GRID,
        "legend": {"top": 0, "data": [g.name for g in found]},
        "tooltip": {"trigger": "axis", "axisPointer": {"type": "shadow"}},
        "xAxis": [
            {"type": "category", "data": bins, "show": False},
            {
                "type": "value",
                "min": low,
                "max": high,
                "position": "bottom",
                "name": title,
                "nameLocation": "middle",
                "nameGap": 28,
                "axisPointer": {"show": False},
                "splitLine": {"show": False},
            },
        ],
        "yAxis": [
            {"type": "value", "name": "prompts", "nameLocation": "middle", "nameGap": 44, "minInterval": 1},
            {"type": "value", "min": 0, "max": 1, "show": False},
        ],
        "series": [*series, *lines],
    }


def said(
    points: pd.DataFrame,
    bins: pd.DataFrame,
    curve: pd.DataFrame | None,
    *,
    is_whole: bool,
    chosen: Mapping[str, str | None],
) -> Option:
    """Share of samples that say X against P0: the prompts (moved up or down a little, so that equal shares do not hide
    each other), the means of bins with their intervals, and the fitted curve (`queries.pressure.curve`) with its band;
    dashed and paler where no prompt's P0 reaches, and all of it thin where it is of more prompts than are shown."""
    moved = points.assign(shown=_jittered(points))
    group = Group("prompt", GREY, "circle", moved)
    dots: Option = {
        "type": "scatter",
        "name": "prompt",
        "datasetIndex": 0,
        "symbolSize": 5,
        "clip": False,
        "encode": {"x": "p0", "y": "shown", "itemName": "prompt_id"},
        "itemStyle": {"color": GREY, "opacity": 0.35},
        "selectedMode": "single",
        "select": {"itemStyle": {"borderColor": ORANGE, "borderWidth": 2, "opacity": 1}},
        "tooltip": {
            "formatter": "{@prompt_id}<br>X = {@target}<br>P0 {@p0}<br>"
            "{@num_violations} of {@num_samples} samples say X"
        },
    }
    series = [dots, *_rings([group], chosen, "p0", "shown"), *_bin_means(bins), *_curve(curve, is_whole)]
    names = [s["name"] for s in series if s.get("name")]
    return {
        "grid": _GRID,
        "legend": {"top": 0, "data": list(dict.fromkeys(names))},
        "tooltip": {"trigger": "item"},
        "xAxis": _unit_axis("P0: p_sem under baseline", 28),
        "yAxis": _unit_axis("share of samples that say X", 44),
        "dataset": [
            {"source": _rounded(moved[["prompt_id", "target", "p0", "shown", "rate", "num_violations", "num_samples"]])}
        ],
        "series": series,
    }


def clicked_rate(points: pd.DataFrame, series: int, index: int) -> str | None:
    """The prompt behind a point of `said`."""
    return str(points["prompt_id"].iloc[index]) if series == 0 and index < len(points) else None


def spelling_rows(spellings: pd.DataFrame, texts: Mapping[int, str], totals: pd.DataFrame) -> pd.DataFrame:
    """One prompt's spellings, likeliest (in any condition) first: spelling, tokens, and per condition `p`, `share` (of p_sem) and
    `ends` (the probability that the word ends there), as columns named `<condition>: …`."""
    keys = [tuple(map(int, ids)) for ids in spellings["token_ids"]]
    known = spellings.assign(key=pd.Series(keys, spellings.index, dtype=object))
    p_sem = totals.set_index("condition")["p_sem"]
    order = known.groupby("key")["p"].max().sort_values(ascending=False, kind="stable").index
    rows = pd.DataFrame(index=order)
    rows["spelling"] = [visible("".join(texts[t] for t in key)) for key in order]
    rows["tokens"] = [" | ".join(visible(texts[t]) for t in key) for key in order]
    for condition, part in known.groupby("condition", sort=False):
        part = part.set_index("key")
        rows[f"{condition}: p"] = part["p"]
        total = float(p_sem.get(condition, 0.0) or 0.0)
        rows[f"{condition}: share"] = part["p"] / total if total > 0 else float("nan")
        rows[f"{condition}: ends"] = part["word_end"]
    return rows.reset_index(drop=True)


def spelling_bars(rows: pd.DataFrame, conditions: Sequence[str], top: float) -> Option:
    """The likeliest spellings of `spelling_rows` as bars, a colour a condition; `top` ends the axis, so that charts side
    by side compare. Spellings further down are added up in one bar."""
    shown = rows.head(_NUM_SPELLINGS)
    rest = rows.iloc[_NUM_SPELLINGS:]
    names = list(shown["tokens"]) + ([f"{len(rest)} further"] if len(rest) else [])
    series: list[Option] = []
    for n, condition in enumerate(conditions):
        column = f"{condition}: p"
        if column not in rows:
            continue
        values = [None if v != v else float(v) for v in shown[column]]
        data = values + ([float(rest[column].sum())] if len(rest) else [])
        series.append(
            {"type": "bar", "name": condition, "data": data, "itemStyle": {"color": COLOURS[n % len(COLOURS)]}}
        )
    return {
        "grid": {"left": 24, "right": 32, "top": 40, "bottom": 48, "containLabel": True},
        "legend": {"top": 0},
        "tooltip": {"trigger": "axis", "valueFormatter": "%.5f", "axisPointer": {"type": "shadow"}},
        "xAxis": {
            "type": "value",
            "min": 0,
            "max": top,
            "name": "probability",
            "nameLocation": "middle",
            "nameGap": 28,
        },
        "yAxis": {"type": "category", "inverse": True, "data": names, "axisLabel": {"interval": 0}},
        "series": series,
    }


def spelling_height(rows: pd.DataFrame, num_conditions: int) -> int:
    """Pixels that the bars need."""
    bars = min(len(rows), _NUM_SPELLINGS + 1)
    return 120 + bars * (14 + 9 * num_conditions)


def visible(text: str) -> str:
    """Text on one line with its spaces and line ends to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _rings(found: Sequence[Group], chosen: Mapping[str, str | None], x: str, y: str) -> list[Option]:
    rings: list[Option] = []
    for n, (name, prompt_id) in enumerate(chosen.items()):
        for g in found:
            at = g.rows[g.rows["prompt_id"] == prompt_id]
            if len(at):
                rings.append(
                    {
                        "type": "scatter",
                        "name": name,
                        "data": [[float(at[x].iloc[0]), float(at[y].iloc[0])]],
                        "silent": True,
                        "symbol": ("circle", "diamond")[n % 2],
                        "symbolSize": 16,
                        "z": 5,
                        "tooltip": {"show": False},
                        "itemStyle": {"color": "transparent", "borderColor": ORANGE, "borderWidth": 3},
                    }
                )
    return rings


def _rows(bins: pd.DataFrame) -> Iterator[Any]:
    """Rows with an attribute a column."""
    return iter(bins.itertuples())


def _bin_means(bins: pd.DataFrame) -> list[Option]:
    if bins.empty:
        return []
    bars = [
        [{"coord": [float(r.p0), float(r.low)]}, {"coord": [float(r.p0), float(r.high)]}]
        for r in _rows(bins)
        if r.low == r.low and r.high == r.high
    ]
    name = "mean of a bin, 95 %" if bars else "mean of a bin"
    item: Option = {
        "type": "scatter",
        "name": name,
        "symbol": "rect",
        "symbolSize": 10,
        "z": 4,
        "itemStyle": {"color": COLOURS[0]},
        "data": [
            {"name": f"P0 in {r.grouping}: {r.n} prompts, {_told(r)}", "value": [float(r.p0), float(r.value)]}
            for r in _rows(bins)
        ],
        "tooltip": {"formatter": "{b}"},
    }
    if bars:
        item["markLine"] = {
            "symbol": "none",
            "silent": True,
            "animation": False,
            "data": bars,
            "label": {"show": False},
            "lineStyle": {"color": COLOURS[0], "type": "solid", "width": 3},
        }
    return [item]


def _told(row: Any) -> str:
    share = f"share {row.value:.3f}"
    return share if row.low != row.low else f"{share} [{row.low:.3f}, {row.high:.3f}]"


def _curve(curve: pd.DataFrame | None, is_whole: bool) -> list[Option]:
    if curve is None:
        return []
    name = "fit, 95 %" if is_whole else "fit of the whole run"
    inside = np.flatnonzero(curve["is_supported"])
    beyond = (curve.iloc[: inside[0] + 1], curve.iloc[inside[-1] :])
    parts = [(part, "dashed", 0.08) for part in beyond if len(part) > 1] + [(curve.iloc[inside], "solid", 0.2)]
    width = 2 if is_whole else 1
    series: list[Option] = []
    for n, (part, style, opacity) in enumerate(parts):
        series += _band(part, name, opacity, f"band-{n}")
        series.append(
            {
                "type": "line",
                "name": name,
                "symbol": "none",
                "silent": True,
                "tooltip": {"show": False},
                "data": part[["p0", "value"]].to_numpy().tolist(),
                "itemStyle": {"color": RED},
                "lineStyle": {"color": RED, "width": width, "type": style},
            }
        )
    return series


def _band(part: pd.DataFrame, name: str, opacity: float, stack: str) -> list[Option]:
    """From low to high, as ECharts has it: two lines that are not drawn, the second stacked on the first and filled."""
    if not part[["low", "high"]].notna().all(axis=None):
        return []
    hidden: Option = {
        "type": "line",
        "stack": stack,
        "symbol": "none",
        "silent": True,
        "lineStyle": {"opacity": 0},
        "tooltip": {"show": False},
        "stackStrategy": "all",
        "name": name,
        "itemStyle": {"color": RED},
    }
    height = part.assign(height=part["high"] - part["low"])
    return [
        hidden | {"data": part[["p0", "low"]].to_numpy().tolist()},
        hidden
        | {"data": height[["p0", "height"]].to_numpy().tolist(), "areaStyle": {"color": RED, "opacity": opacity}},
    ]


def _jittered(points: pd.DataFrame) -> pd.Series:
    """Less than half the step between two shares, by a sequence that repeats from draw to draw."""
    if points.empty:
        return points["rate"]
    unit = (np.arange(len(points)) * 0.6180339887498949) % 1 - 0.5
    return (points["rate"] + 0.7 * unit / np.maximum(points["num_samples"], 10)).round(4)


def _diagonal() -> Option:
    return {
        "type": "line",
        "data": [[0, 0], [1, 1]],
        "symbol": "none",
        "silent": True,
        "tooltip": {"show": False},
        "lineStyle": {"color": GREY, "type": "dashed", "width": 1},
    }


def _upright(at: float, text: str, colour: str) -> Option:
    """A vertical line on the axis of values that lies over the bars' own."""
    label = {"show": bool(text), "formatter": text, "position": "end", "color": colour}
    return {
        "type": "line",
        "data": [],
        "xAxisIndex": 1,
        "yAxisIndex": 1,
        "silent": True,
        "tooltip": {"show": False},
        "markLine": {
            "symbol": "none",
            "silent": True,
            "animation": False,
            "label": label,
            "lineStyle": {"color": colour, "width": 2, "type": "solid"},
            "data": [{"xAxis": at}],
        },
    }


def _unit_axis(name: str, gap: int) -> Option:
    return {"type": "value", "min": 0, "max": 1, "name": name, "nameLocation": "middle", "nameGap": gap}


def _symmetric(values: Sequence[np.ndarray]) -> tuple[float, float]:
    top = max((float(np.abs(v).max()) for v in values if len(v)), default=1.0)
    top = float(np.ceil(top * 2) / 2) or 1.0
    return -top, top


def _rounded(rows: pd.DataFrame) -> pd.DataFrame:
    """Six digits are sent to the browser, not sixteen."""
    return rows.round(6).reset_index(drop=True)
