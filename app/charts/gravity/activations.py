"""Norms of the residual stream as grids and chips, and the largest neurons as bars."""

import math
from collections.abc import Sequence

import pandas as pd

from app import charts
from app.charts.chips import Chip
from app.charts.gravity.patching import as_template

SCALES = {"relative": "log₂(norm / the layer's mean)", "norm": "log₁₀ norm"}
_ABOVE, _BELOW = (0, 158, 115), (230, 159, 0)
_LONGEST = 10


def label(text: str) -> str:
    """A token's text for an axis: white space made visible, long ones shortened."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def axis(texts: Sequence[str], length: int) -> list[str]:
    """Labels of `length` tokens, numbered, so that equal tokens differ; tokens without a text are their number alone."""
    return [f"{i} {label(texts[i])}" if i < len(texts) else str(i) for i in range(length)]


def coloured(rows: pd.DataFrame, scale: str) -> pd.Series:
    """What the colour shows: the logarithm of the norm or of its ratio to the layer's mean; NaN where it has none."""
    values = rows["relative"] if scale == "relative" else rows["norm"]
    values = values.astype(float).where(values > 0)
    return values.map(math.log2 if scale == "relative" else math.log10, na_action="ignore").astype(float)


def span(frames: Sequence[pd.DataFrame], scale: str) -> tuple[float, float]:
    """The range of colours for grids that are compared: around zero for ratios."""
    values = pd.concat([coloured(f, scale) for f in frames]) if frames else pd.Series(dtype=float)
    if scale == "relative":
        return charts.symmetric(values)
    low, high = (float(values.min()), float(values.max())) if values.notna().any() else (0.0, 1.0)
    return low, high if high > low else low + 1.0


def grid(
    rows: pd.DataFrame, texts: Sequence[str], *, scale: str, low: float, high: float, layer: int | None = None
) -> charts.Option:
    """Layer × token. `rows`: layer, position, norm, relative; `layer`: the one to mark on the axis."""
    length, layers = int(rows["position"].max()) + 1, int(rows["layer"].max()) + 1
    cells = rows.assign(x=rows["position"], y=rows["layer"], value=coloured(rows, scale))
    names = axis(texts, length)
    option = charts.heatmap(
        cells,
        names,
        [f"▸ {i}" if i == layer else str(i) for i in range(layers)],
        low=low,
        high=high,
        x_title="",
        y_title="",
        value_title=SCALES[scale],
        is_signed=scale == "relative",
    )
    for item, row in zip(option["series"][0]["data"], cells.dropna(subset=["value"]).to_dict("records"), strict=False):
        note = f"{names[int(row['x'])]}, layer {int(row['y'])}: norm {row['norm']:.4g}, {row['relative']:.3g} × the layer's mean"
        item["tooltip"] = {"formatter": as_template(note)}
    token_axis(option, low, high)
    return option


def token_axis(option: charts.Option, low: float, high: float) -> None:
    """Make room for token texts under a grid: upright labels, and the range as numbers."""
    option["xAxis"] |= {"axisLabel": {"rotate": 90, "fontSize": 10, "interval": "auto"}, "axisTick": {"show": False}}
    option["grid"] |= {"left": 8, "right": 8, "top": 8, "bottom": 44}
    option["animation"] = False
    option["visualMap"] |= {"text": [f"{high:+.2f}", f"{low:+.2f}"], "itemWidth": 12}
    option["series"][0]["select"] = {"itemStyle": {"borderWidth": 0}}


def of_layer(rows: pd.DataFrame, layer: int) -> pd.DataFrame:
    """A layer's rows in order of position."""
    return rows[rows["layer"] == layer].sort_values("position")


def furthest(frames: Sequence[pd.DataFrame]) -> float:
    """The largest |norm / mean − 1| of the layers shown as chips, to which their opacity is relative."""
    tops = [float((f["relative"] - 1).abs().max()) for f in frames if f["relative"].notna().any()]
    return max(tops, default=0.0) or 1.0


def chips(rows: pd.DataFrame, texts: Sequence[str], top: float) -> list[Chip]:
    """A layer's norms on its tokens: green above the layer's mean, orange below, opacity logarithmic up to `top`."""
    found = []
    for row in rows.to_dict("records"):
        i = int(row["position"])
        text = texts[i] if i < len(texts) else f"[{i}]"
        if pd.isna(row["relative"]):
            found.append(Chip(text, note=f"{i}: not measured", is_missing=True))
            continue
        note = (
            f"{i} {label(text)}: norm {row['norm']:.4g}, {row['relative']:.3g} × the layer's mean ({row['mean']:.4g})"
        )
        found.append(Chip(text, shade(row["relative"] - 1, top), note))
    return found


def shade(excess: float, top: float) -> str:
    """Green above zero, orange below; the opacity is log(1 + |excess|) / log(1 + top)."""
    colour = _ABOVE if excess > 0 else _BELOW
    opacity = min(1.0, math.log1p(abs(excess)) / math.log1p(top)) if top > 0 else 0.0
    return f"rgba({colour[0]}, {colour[1]}, {colour[2]}, {opacity:.3f})"


def chips_note(rows: pd.DataFrame, top: float) -> str:
    """The line under the chips: the range of what they show, and what full colour means."""
    if rows["relative"].isna().all():
        return "not measured"
    low, high = rows["relative"].min(), rows["relative"].max()
    return (
        f"{low:.3g} to {high:.3g} × the layer's mean norm ({rows['mean'].iloc[0]:.4g}). Green above, orange below; "
        f"full colour at a distance of {top:.3g} × the mean, logarithmic."
    )


def bars(rows: pd.DataFrame, *, top: float) -> charts.Option:
    """The largest neurons of one layer. `rows`: neuron, value, the largest first; the scale is −`top` to `top`."""
    rows = rows.iloc[::-1]
    data = [
        {"value": round(float(v), 4), "itemStyle": {"color": charts.BLUE if v >= 0 else charts.RED}}
        for v in rows["value"]
    ]
    return {
        "animation": False,
        "grid": {"left": 8, "right": 24, "top": 8, "bottom": 32},
        "tooltip": {"trigger": "item", "formatter": "neuron {b}: {c}"},
        "xAxis": {
            "type": "value",
            "min": -top,
            "max": top,
            "axisLabel": {"showMinLabel": True, "showMaxLabel": True},
            "name": "activation",
            "nameLocation": "middle",
            "nameGap": 28,
        },
        "yAxis": {"type": "category", "data": [str(int(n)) for n in rows["neuron"]]},
        "series": [{"type": "bar", "name": "activation", "data": data}],
    }


def neuron_table(rows: pd.DataFrame, columns: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """layer, rank, neuron, and a column for each of the named frames (layer, neuron, value): NaN where the neuron is not
    among its largest."""
    found = rows[["layer", "rank", "neuron"]].copy()
    for name, other in columns:
        values = other[["layer", "neuron", "value"]].rename(columns={"value": name})
        found = found.merge(values, on=["layer", "neuron"], how="left")
    return found.sort_values(["layer", "rank"]).reset_index(drop=True)


def round_up(value: float) -> float:
    """The next of 1, 2, 5 × a power of ten: the end of an axis."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))
