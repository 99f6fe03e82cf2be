"""One prompt's own charts, beside those of the other pages."""

import math
from collections.abc import Sequence

import pandas as pd

from app import charts
from app.charts.chips import Chip
from app.charts.gravity.activations import axis, label, token_axis
from app.charts.gravity.attention import SPAN_COLOURS
from app.charts.gravity.patching import as_template

RATIO_NAMES = {"iar": "IAR", "nf": "NF", "tmf": "TMF", "pi": "PI"}


def spans_on(tokens: Sequence[str], spans: dict[str, tuple[int, int]]) -> list[Chip]:
    """A context's tokens with a line under those of a part: the mention and the negation before the instruction they are in."""
    inner_first = sorted(spans.items(), key=lambda s: s[1][1] - s[1][0])
    found = []
    for i, text in enumerate(tokens):
        names = [name for name, (start, end) in inner_first if start <= i < end]
        found.append(
            Chip(
                text,
                note=f"{i} {label(text)}" + (f": {', '.join(names)}" if names else ""),
                underline=SPAN_COLOURS.get(names[0], "") if names else "",
            )
        )
    return found


def marked(text: str, spans: Sequence[Sequence[int]]) -> list[Chip]:
    """An answer with every occurrence of X outlined; together the chips are the text."""
    found, done = [], 0
    for start, end in sorted((int(a), int(b)) for a, b in spans):
        found += [Chip(text[done:start]), Chip(text[start:end], note=f"X, characters {start} to {end}", is_marked=True)]
        done = end
    return [c for c in [*found, Chip(text[done:])] if c.text]


def ratio_lines(rows: pd.DataFrame, condition: str, low: float, high: float) -> charts.Option:
    """Attention ratios by layer under a condition, and baseline's IAR, the only one that it has, dashed."""
    here, base = rows[rows["condition"] == condition], rows[rows["condition"] == "baseline"]
    curves = [(RATIO_NAMES[m], _xy(here, m)) for m in RATIO_NAMES]
    if condition != "baseline":
        curves.append(("IAR, baseline", _xy(base, "iar")))
    colours = (charts.BLUE, charts.RED, charts.PURPLE, charts.GREEN, charts.BLUE)
    kept = [(c, colour) for c, colour in zip(curves, colours, strict=False) if c[1]["y"].notna().any()]
    return compact(
        charts.lines(
            [c for c, _ in kept],
            x_title="layer",
            y_title="mean over heads",
            low=low,
            high=high,
            colours=[colour for _, colour in kept] or charts.COLOURS,
            dashed=["IAR, baseline"],
        )
    )


def lens_lines(rows: pd.DataFrame, condition: str) -> charts.Option:
    """The target's mass in the lens by layer, under a condition and, dashed, baseline; and that of what is said."""
    curves = [(f"X, {condition}", _xy(rows[rows["condition"] == condition], "p_target"))]
    curves.append((f"said, {condition}", _xy(rows[rows["condition"] == condition], "p_emitted")))
    colours = [charts.RED, charts.SKY]
    if condition != "baseline":
        curves.append(("X, baseline", _xy(rows[rows["condition"] == "baseline"], "p_target")))
        colours.append(charts.ORANGE)
    return compact(
        charts.lines(
            curves,
            x_title="layer",
            y_title="probability in the lens",
            colours=colours,
            low=0,
            high=1,
            dashed=["X, baseline"],
        )
    )


def share_grid(rows: pd.DataFrame, texts: Sequence[str], top: float) -> charts.Option:
    """Layer × token: what a step attends to. A share above `top`, as the first token's often is, has `top`'s colour."""
    length, layers = int(rows["position"].max()) + 1, int(rows["layer"].max()) + 1
    names = axis(texts, length)
    cells = rows.assign(x=rows["position"], y=rows["layer"], value=rows["share"].clip(upper=top))
    option = charts.heatmap(
        cells, names, range(layers), low=0, high=top, x_title="", y_title="", value_title="share of attention"
    )
    for item, row in zip(option["series"][0]["data"], cells.dropna(subset=["value"]).to_dict("records"), strict=False):
        note = f"{names[int(row['x'])]}, layer {int(row['y'])}: {row['share']:.4f} of the attention"
        item["tooltip"] = {"formatter": as_template(note)}
    token_axis(option, 0, top)
    option["visualMap"]["text"] = [f"{top:.3f}", "0"]
    return option


def last_tokens(rows: pd.DataFrame, number: int = 4) -> pd.DataFrame:
    """layer and the likeliest tokens with their probabilities of the last layers, the last first. `rows`: layer, tokens,
    top_probs of one condition."""
    found = []
    for row in rows.sort_values("layer", ascending=False).head(number).to_dict("records"):
        pairs = zip(row["tokens"], row["top_probs"] if row["top_probs"] is not None else (), strict=False)
        found.append(
            {"layer": int(row["layer"])} | {f"#{i + 1}": f"{label(text)} {p:.3f}" for i, (text, p) in enumerate(pairs)}
        )
    return pd.DataFrame(found)


def compact(option: charts.Option) -> charts.Option:
    """A line chart for a column: less room around it, whole layers on its axis."""
    option["grid"] = {"left": 24, "right": 16, "top": 48, "bottom": 24}
    option["legend"]["type"] = "scroll"
    option["xAxis"]["minInterval"] = 1
    option["animation"] = False
    return option


def ratio_range(frames: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """0 to 1 and whatever is outside: NF, TMF and IAR are shares, PI is a difference and may be below zero."""
    lows = [float(f[name].min()) for f in frames for name in RATIO_NAMES]
    low = min((value for value in lows if not math.isnan(value)), default=0.0)
    return min(0.0, math.floor(low * 5) / 5), 1.0


def _xy(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows.rename(columns={"layer": "x", column: "y"})[["x", "y"]]
