"""Charts of the page Attention: curves by layer, the grid of heads, a head's distribution, token rows as chips."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from app import charts
from app.charts import Option
from app.charts.chips import Chip, shade
from app.charts.gravity import OUTCOME_COLOURS

SIDES = ("difference", "failure", "success")
SPAN_COLOURS = {
    "instruction": charts.ORANGE,
    "negation": charts.RED,
    "mention": charts.PURPLE,
    "question": charts.GREEN,
    "answer": charts.GREY,
}
SIGNIFICANT = 0.05
PLAIN_TOOLTIP: Option = {"trigger": "item", "renderMode": "richText", "formatter": "{b}"}
"""An item's name, drawn on the canvas: names hold tokens, which must not be taken for markup."""
_MARK = "●"
_DARKEST = 0.7  # of a chip: a darker one would hide its text


def by_layer(rows: pd.DataFrame, title: str, extra: Sequence[tuple[str, pd.DataFrame, str]] = ()) -> Option:
    """Means by layer with 95 % bands: a colour an outcome, dashed for baseline. `rows`: measured, outcome, layer, value,
    low, high. `extra`: name, frame with x and y, and colour of single prompts' curves."""
    curves, colours, dashed = [], [], []
    for (measured, outcome), some in rows.groupby(["measured", "outcome"], sort=False):
        name = f"{outcome}, {measured}"
        curves.append((name, some.rename(columns={"layer": "x", "value": "y"})[["x", "y", "low", "high"]]))
        colours.append(OUTCOME_COLOURS[str(outcome)])
        dashed += [name] if measured == "baseline" else []
    for name, frame, colour in extra:
        curves.append((name, frame))
        colours.append(colour)
    option = charts.lines(curves, x_title="layer", y_title=title, colours=colours or charts.COLOURS, dashed=dashed)
    return with_lines_first(option)


def with_lines_first(option: Option) -> Option:
    """The option with the lines before their bands, from which the legend would else take its colours; and with layers, which
    are whole numbers, on the x axis."""
    option["series"].sort(key=lambda series: "stack" in series)
    option["legend"]["type"] = "scroll"
    option["xAxis"]["minInterval"] = 1
    option["grid"] = {"left": 24, "right": 16, "top": 48, "bottom": 4}
    return option


def head_range(heads: pd.DataFrame, side: str) -> tuple[float, float]:
    """The colours' range: around zero for the difference; for the means, one range for both outcomes."""
    if side == "difference":
        return charts.symmetric(heads["difference"])
    both = heads[["failure", "success"]].to_numpy(float)
    if not np.isfinite(both).any():
        return 0.0, 1.0
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    if low < 0:
        return charts.symmetric(pd.Series([low, high]))
    return 0.0, high or 1.0


def head_cells(heads: pd.DataFrame, side: str) -> pd.DataFrame:
    """Cells of the grid, x = head and y = layer; `mark` is a dot where the difference has q < .05."""
    marks = np.where(heads["q"] < SIGNIFICANT, _MARK, "") if side == "difference" else ""
    return heads.assign(x=heads["head"], y=heads["layer"], value=heads[side], mark=marks)


def head_grid(
    cells: pd.DataFrame, num_heads: int, num_layers: int, side: str, locked: tuple[int, int | None]
) -> Option:
    """Layer × head. Hovering tells a head's numbers, the locked head has a frame."""
    low, high = head_range(cells, side)
    option = charts.heatmap(
        cells,
        range(num_heads),
        range(num_layers),
        low=low,
        high=high,
        x_title="head",
        y_title="layer",
        value_title=side,
        is_signed=low < 0,
        text="mark",
    )
    series = option["series"][0]
    series["select"] = {"itemStyle": {"borderWidth": 0}}  # a frame is for what is locked, which a slider may have moved
    for item, cell in zip(series["data"], cells.dropna(subset=["value"]).to_dict("records"), strict=False):
        item["name"] = head_numbers(cell)
        is_dark = abs(cell["value"] - (low + high) / 2) > (high - low) * 0.25  # the dark ends of the colours
        item["label"] = {"show": bool(cell["mark"]), "formatter": cell["mark"], "fontSize": 8} | on_cell(is_dark)
        if (cell["layer"], cell["head"]) == locked:
            frame(item)
    option |= {"tooltip": dict(PLAIN_TOOLTIP), "animation": False}
    option["grid"] = {"left": 24, "right": 16, "top": 8, "bottom": 64}
    return option


def frame(item: Option) -> None:
    """Gives a cell the frame of what is locked, selected or not."""
    item["itemStyle"] = {"borderColor": charts.GREEN, "borderWidth": 3}
    item["select"] = {"itemStyle": item["itemStyle"]}


def on_cell(is_dark: bool) -> Option:
    """The colour of a text on a cell, whose own colour is the same in every theme."""
    return {"color": "#FFFFFF" if is_dark else "#1A1A1A", "textBorderWidth": 0}


def head_numbers(cell: Mapping) -> str:
    """A head's numbers, a line each."""
    lines = [f"layer {cell['layer']}, head {cell['head']}"]
    known = [o for o in ("failure", "success") if np.isfinite(cell[o])]
    lines += [f"{o} {cell[o]:.4f} (n {int(cell[f'n_{o}'])})" for o in known]
    if np.isfinite(cell["difference"]):
        lines.append(f"failure − success {cell['difference']:+.4f}")
        if np.isfinite(cell["low"]):
            lines.append(f"95 % {cell['low']:+.4f} to {cell['high']:+.4f}")
        if np.isfinite(cell["q"]):
            lines.append(f"q {cell['q']:.2g}")
    return "\n".join(lines)


def histogram(bins: pd.DataFrame, title: str) -> Option:
    """The share of each outcome's prompts by value. `bins`: outcome, start, end, n, share; the same bins for all."""
    edges = bins[["start", "end"]].drop_duplicates().sort_values("start")
    labels = [f"{(a + b) / 2:.3f}" for a, b in edges.to_numpy()]
    series = [
        {
            "type": "bar",
            "name": f"{outcome} (n {int(some['n'].sum())})",
            "barGap": "-100%",
            "barCategoryGap": "4%",
            "data": some["share"].tolist(),
            "itemStyle": {"color": OUTCOME_COLOURS[str(outcome)], "opacity": 0.55},
        }
        for outcome, some in bins.groupby("outcome")
    ]
    return {
        "grid": {"left": 24, "right": 16, "top": 40, "bottom": 4},
        "legend": {"top": 0},
        "tooltip": {"trigger": "axis", "valueFormatter": "percent"},
        "xAxis": {"type": "category", "data": labels, "name": title, "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "value", "name": "share of prompts", "nameLocation": "middle", "nameGap": 40},
        "series": series,
    }


def largest_share(rows: Sequence[pd.DataFrame]) -> float:
    """The largest share of any token but the first, which usually takes most; 0 where there is none."""
    shares = [row.loc[row["position"] > 0, "share"] for row in rows]
    return max((float(s.max()) for s in shares if s.notna().any()), default=0.0)


def chips_of(row: pd.DataFrame, top: float) -> list[Chip]:
    """Tokens coloured by their share of `top`, larger ones as that, with a line under those of a span.

    `row`: position, token_id, text, span, share.
    """
    return [
        Chip(
            t["text"],
            shade(min(t["share"], top), top / _DARKEST),
            _told(t),
            is_missing=t["share"] != t["share"],
            underline=SPAN_COLOURS.get(t["span"], ""),
        )
        for t in row.to_dict("records")
    ]


def _told(token: Mapping) -> str:
    part = f", {token['span']}" if token["span"] else ""
    return f"{token['share']:.4f} of the attention on token {token['position']} ({token['text']!r}, id {token['token_id']}){part}"


def legend(names: Sequence[str]) -> list[Chip]:
    """One chip a span, with its line."""
    found: list[Chip] = []
    for name in names:
        found += [Chip(name, underline=SPAN_COLOURS[name], note=name), Chip("   ")]
    return found


def masses(rows: Mapping[str, pd.DataFrame], spans: Mapping[str, Mapping[str, tuple[int, int]]]) -> pd.DataFrame:
    """part, tokens, mass, per_token for each row by name: what the parts of a context get. The mention and the negation are
    within the instruction; `else` is what none of these has."""
    found = []
    for name, row in rows.items():
        share = row["share"].to_numpy(float)
        parts = {part: np.arange(*span) for part, span in spans[name].items()}
        parts["first token"] = np.arange(min(1, len(share)))
        parts["answer so far"] = row.index[row["span"] == "answer"].to_numpy()
        rest = np.setdiff1d(np.arange(len(share)), np.concatenate(list(parts.values())))
        for part, where in (parts | {"else": rest}).items():
            if len(where):
                found.append(
                    {
                        "where": name,
                        "part": part,
                        "tokens": len(where),
                        "mass": float(share[where].sum()),
                        "per token": float(share[where].mean()),
                    }
                )
    return pd.DataFrame(found, columns=["where", "part", "tokens", "mass", "per token"])


def head_row_cells(rows: np.ndarray) -> pd.DataFrame:
    """Cells of `head_row_grid`, x = token and y = head, from shares [heads, tokens]."""
    head, position = np.indices(rows.shape)
    return pd.DataFrame({"x": position.ravel(), "y": head.ravel(), "value": rows.ravel().astype(float)})


def head_row_grid(cells: pd.DataFrame, texts: Sequence[str], num_heads: int, top: float) -> Option:
    """Head × token of one layer. `top` is the share that has the darkest colour; larger ones, such as the first token's,
    have it too."""
    labels = [f"{i} {visible(text)}" for i, text in enumerate(texts)]
    option = charts.heatmap(
        cells, labels, range(num_heads), low=0.0, high=top or 1.0, x_title="", y_title="head", value_title="share"
    )
    shares = cells.dropna(subset=["value"])[["x", "y", "value"]].to_dict("records")
    for item, cell in zip(option["series"][0]["data"], shares, strict=False):
        item["name"] = plain(f"head {int(cell['y'])} on {labels[int(cell['x'])]}: {cell['value']:.4f}")
    option |= {"tooltip": dict(PLAIN_TOOLTIP), "animation": False}
    option["xAxis"]["axisLabel"] = {"rotate": 60, "interval": 0 if len(texts) <= 80 else "auto", "fontSize": 10}
    option["grid"] = {"left": 24, "right": 16, "top": 8, "bottom": 48}
    return option


def visible(text: str) -> str:
    """A token with its spaces and line ends to be seen, cut after sixteen characters."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= 16 else shown[:15] + "…"


def plain(text: str) -> str:
    """A text that ECharts cannot take for a template."""
    return text.replace("{", "(").replace("}", ")")
