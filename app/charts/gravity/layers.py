"""Charts of the page Layers: the logit-lens grid, and what attention and MLP add by layer."""

from collections.abc import Mapping, Sequence

import pandas as pd

from app import charts
from app.charts import Option
from app.charts.gravity import OUTCOME_COLOURS
from app.charts.gravity.attention import PLAIN_TOOLTIP, frame, on_cell, plain, visible, with_lines_first

SHADES = {
    "p_top": "probability of the token shown",
    "p_target": "p_target: probability of X's first tokens",
    "entropy": "entropy, nats",
    "kl_final": "KL from the final layer, nats",
}
PART_COLOURS = {"attn_contrib": charts.ORANGE, "ffn_contrib": charts.BLUE}
PARTS = {"attn_contrib": "attention", "ffn_contrib": "MLP"}


def lens_cells(lens: Sequence[tuple[str, pd.DataFrame]], shade: str) -> pd.DataFrame:
    """Cells of `lens_grid`, x = column and y = layer. `lens`: a column's title and its condition's rows of
    `queries.layers.lens`."""
    found = []
    for x, (title, rows) in enumerate(lens):
        for row in rows.to_dict("records"):
            probs, tokens = row["top_probs"], row["tokens"]
            top = {"p_top": float(probs[0]) if len(tokens) else float("nan")}
            found.append(
                {
                    "x": x,
                    "y": int(row["layer"]),
                    "value": (row | top)[shade],
                    "token": visible(tokens[0]) if len(tokens) else "",
                    "column": title,
                    "layer": int(row["layer"]),
                    "told": _told(title, row),
                }
            )
    return pd.DataFrame(found, columns=["x", "y", "value", "token", "column", "layer", "told"])


def lens_range(cells: pd.DataFrame, shade: str) -> tuple[float, float]:
    """0 to 1 for probabilities; else up to the largest that is shown."""
    if shade.startswith("p_") or not cells["value"].notna().any():
        return 0.0, 1.0
    return 0.0, max(float(cells["value"].max()), 1e-9)


def lens_grid(cells: pd.DataFrame, titles: Sequence[str], num_layers: int, shade: str, locked: int) -> Option:
    """Layer × condition, each cell with its top token; hovering tells the top five, the locked layer has a frame."""
    low, high = lens_range(cells, shade)
    option = charts.heatmap(
        cells,
        [plain(t) for t in titles],
        range(num_layers),
        low=low,
        high=high,
        x_title="",
        y_title="layer",
        value_title=SHADES[shade],
        text="token",
    )
    option["series"][0]["select"] = {"itemStyle": {"borderWidth": 0}}
    known = cells.dropna(subset=["value"]).to_dict("records")
    for item, cell in zip(option["series"][0]["data"], known, strict=False):
        item["name"] = plain(cell["told"])
        item["label"] |= on_cell(cell["value"] > low + (high - low) * 0.5)
        if cell["layer"] == locked:
            frame(item)
    option |= {"tooltip": dict(PLAIN_TOOLTIP), "animation": False}
    option["grid"] = {"left": 24, "right": 16, "top": 8, "bottom": 64}
    option["xAxis"]["axisLabel"] = {"interval": 0, "width": max(40, 900 // len(titles)), "overflow": "break"}
    return option


def _told(title: str, row: Mapping) -> str:
    lines = [f"{title}, layer {row['layer']}"]
    lines += [f"{p:.3f}  {visible(t)}" for t, p in zip(row["tokens"], row["top_probs"], strict=False)]
    numbers = (("p_target", ".4f"), ("p_emitted", ".4f"), ("entropy", ".3f"), ("kl_final", ".3f"))
    lines += [f"{name} {row[name]:{form}}" for name, form in numbers if row[name] == row[name]]
    return "\n".join(lines)


def top_tokens(lens: Sequence[tuple[str, pd.DataFrame]], layer: int) -> pd.DataFrame:
    """One layer's likeliest tokens: a row a column of the grid, with its numbers, and columns 1st, 2nd, …"""
    found = []
    for title, rows in lens:
        for row in rows[rows["layer"] == layer].to_dict("records"):
            tokens = [f"{visible(t)} {p:.3f}" for t, p in zip(row["tokens"], row["top_probs"], strict=False)]
            numbers = {n: row[n] for n in ("p_target", "p_emitted", "entropy", "kl_final")}
            found.append({"where": title, **{f"#{i + 1}": t for i, t in enumerate(tokens)}, **numbers})
    return pd.DataFrame(found)


def contribution_bars(rows: pd.DataFrame, limit: float) -> Option:
    """What attention and the MLP of each layer add to the target's probability, in one prompt. `rows`: layer, attn_contrib,
    ffn_contrib; the axis goes from −limit to limit."""
    series = [
        {"type": "bar", "name": PARTS[part], "data": rows[part].tolist(), "itemStyle": {"color": PART_COLOURS[part]}}
        for part in PARTS
    ]
    return _by_layer(limit) | {
        "xAxis": {
            "type": "category",
            "data": [str(n) for n in rows["layer"]],
            "name": "layer",
            "nameLocation": "middle",
            "nameGap": 28,
            "axisLine": {"onZero": False},
        },
        "tooltip": {"trigger": "axis", "valueFormatter": "%.4f"},
        "series": series,
    }


def contribution_curves(rows: Mapping[str, pd.DataFrame], measured: str, limit: float) -> Option:
    """Means by outcome with 95 % bands, the MLP's whole and attention's dashed. `rows`: by column the rows of
    `queries.layers.curves`; the axis goes from −limit to limit."""
    curves, colours, dashed = [], [], []
    for part, name in PARTS.items():
        some = rows[part][rows[part]["measured"] == measured]
        for outcome, curve in some.groupby("outcome"):
            title = f"{name}, {outcome}"
            curves.append((title, curve.rename(columns={"layer": "x", "value": "y"})[["x", "y", "low", "high"]]))
            colours.append(OUTCOME_COLOURS[str(outcome)])
            dashed += [title] if part == "attn_contrib" else []
    option = charts.lines(
        curves,
        x_title="layer",
        y_title="added to p_target",
        colours=colours or charts.COLOURS,
        low=-limit,
        high=limit,
        dashed=dashed,
    )
    option["xAxis"]["axisLine"] = {"onZero": False}
    option["yAxis"]["interval"] = limit / 2
    return with_lines_first(option)


def axis_limit(*values: pd.Series) -> float:
    """A round number that no value is above in magnitude, so that charts side by side can share an axis."""
    top = max((float(v.abs().max()) for v in values if v.notna().any()), default=0.0)
    if top == 0:
        return 1.0
    unit = 10.0 ** (len(str(int(1 / top))) if top < 1 else 0)
    return -(-top * unit // 1) / unit


def _by_layer(limit: float) -> Option:
    return {
        "grid": {"left": 24, "right": 16, "top": 40, "bottom": 4},
        "legend": {"top": 0},
        "yAxis": {
            "type": "value",
            "name": "added to p_target",
            "nameLocation": "middle",
            "nameGap": 44,
            "min": -limit,
            "max": limit,
            "interval": limit / 2,
        },
    }
