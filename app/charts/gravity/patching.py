"""Grids of layer × kind of patch: means over prompts, and one prompt's own."""

import html
from collections.abc import Sequence

import pandas as pd

from app import charts

ORDER = ("resid", "attn", "mlp", "kv_question", "kv_instruction", "knockout_instruction")
LEGEND = "0: as under the ban; above: the patch makes X more likely; below: less."
_FLIP_LEGEND = "0: no answer changes its verdict; 1: every answer does."
_DIFFERENCE_LEGEND = "0: as in successes; above: more in failures; below: less."
_CHOSEN = {"borderColor": charts.PURPLE, "borderWidth": 3}


def legend(effect: str, group: str) -> str:
    """What the sign of a cell means."""
    if group == "difference":
        return _DIFFERENCE_LEGEND
    return LEGEND if effect == "ΔP" else _FLIP_LEGEND


def ordered(kinds: Sequence[str]) -> list[str]:
    """Kinds of patch from bottom to top: the blocks' outputs above what takes the prohibition away."""
    return sorted(kinds, key=lambda k: (-ORDER.index(k) if k in ORDER else -len(ORDER), k))


def placed(
    rows: pd.DataFrame, kinds: Sequence[str], layers: int, chosen: tuple[int, str] | None = None
) -> pd.DataFrame:
    """The rows of a grid with their places: x the layer, y the kind's place in `kinds`. The chosen one comes last, so that
    its frame is drawn over its neighbours."""
    known = rows[rows["patch"].isin(list(kinds)) & (rows["layer"] < layers)]
    known = known.assign(x=known["layer"], y=[list(kinds).index(k) for k in known["patch"]])
    is_chosen = [(layer, patch) == chosen for layer, patch in zip(known["layer"], known["patch"], strict=True)]
    return known.assign(last=is_chosen).sort_values("last", kind="stable").drop(columns="last").reset_index(drop=True)


def top_of(values: pd.Series) -> float:
    """The half-width of a symmetric scale that holds all values; 1 where there is none."""
    return charts.symmetric(values.dropna().astype(float))[1]


def means(
    cells: pd.DataFrame,
    kinds: Sequence[str],
    layers: int,
    *,
    top: float,
    title: str,
    chosen: tuple[int, str] | None = None,
) -> charts.Option:
    """The grid of means: `cells` as `placed` gives them, with low, high, n."""
    shown = cells.assign(label=[short(v) for v in cells["value"]])
    option = _grid(shown, kinds, layers, top, title, "label" if layers <= 32 else None)
    return with_notes(option, shown, [mean_note(r, title) for r in _known(shown)], chosen)


def own(
    cells: pd.DataFrame, kinds: Sequence[str], layers: int, *, top: float, chosen: tuple[int, str] | None = None
) -> charts.Option:
    """One prompt's grid of ΔP; a cell whose answer flipped has a ring."""
    shown = cells.assign(label=["◯" if f else "" for f in cells["flipped"].fillna(False)])
    option = _grid(shown, kinds, layers, top, "ΔP", "label")
    notes = [
        f"{r['patch']}, layer {int(r['layer'])}: P_sem {r['before']:.3f} → {r['after']:.3f} ({r['value']:+.3f})"
        + (", answer flipped" if r["flipped"] else "")
        for r in _known(shown)
    ]
    return with_notes(option, shown, notes, chosen)


def mean_note(row: pd.Series | dict, title: str) -> str:
    """One cell of means in words, with its interval."""
    interval = (
        f", 95 % {row['low']:+.3f} … {row['high']:+.3f}" if pd.notna(row["low"]) and pd.notna(row["high"]) else ""
    )
    return f"{row['patch']}, layer {int(row['layer'])}: {title} {row['value']:+.3f}{interval}, {int(row['n'])} prompts"


def short(value: float) -> str:
    """Two decimals without the leading zero: .31, −.05, 1; '' for what is not known."""
    if pd.isna(value):
        return ""
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text.removesuffix(".00")
    return ("−" if value < 0 and text != ".00" else "") + ("0" if text == ".00" else text)


def with_notes(
    option: charts.Option, cells: pd.DataFrame, notes: Sequence[str], chosen: tuple[int, str] | None = None
) -> charts.Option:
    """A heatmap whose cells say `notes` when hovered, one for each cell with a value; `chosen` (layer, kind) is framed."""
    for item, note in zip(option["series"][0]["data"], notes, strict=False):
        item["tooltip"] = {"formatter": as_template(note)}
    for item, row in zip(option["series"][0]["data"], _known(cells), strict=False):
        if chosen is not None and (int(row["x"]), row.get("patch")) == chosen:
            item["itemStyle"] = _CHOSEN
    return option


def as_template(text: str) -> str:
    """Text for a tooltip's template: it is HTML, and takes braces for placeholders."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("\n", "⏎")


def _known(cells: pd.DataFrame) -> list[dict]:
    return cells.dropna(subset=["value"]).to_dict("records")


def _grid(
    cells: pd.DataFrame, kinds: Sequence[str], layers: int, top: float, title: str, text: str | None
) -> charts.Option:
    option = charts.heatmap(
        cells,
        range(layers),
        kinds,
        low=-top,
        high=top,
        x_title="layer",
        y_title="",
        value_title=title,
        is_signed=True,
        text=text,
    )
    option["grid"] |= {"left": 8, "right": 16, "top": 8, "bottom": 76}
    option["animation"] = False
    option["series"][0]["select"] = {"itemStyle": {"borderWidth": 0}}  # the chosen cell has a frame of its own
    option["visualMap"]["text"] = [f"+{top:.3g}", f"−{top:.3g}"]
    return option
