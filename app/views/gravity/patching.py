"""Which layer's activations, taken from the baseline, change what is said under the ban."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import streamlit as st

from app import charts, frame
from app.charts.gravity import patching as drawing
from app.queries.gravity import View
from app.queries.gravity import patching as asking
from app.views.gravity import open_page

_HELP = {
    "ΔP": "P_sem under the patch − P_sem without it",
    "flipped": "share of prompts whose answer changes its verdict",
}


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if view is None:
        return
    condition = asking.patched_condition(view.paths, view.manifest)
    layers, kinds = asking.num_layers(view.paths), drawing.ordered(asking.kinds(view.paths))
    effect, group, layer, patch = _pickers(layers, kinds)
    where, params = view.where()
    _numbers(view, condition, where, params)
    means = _means(view, condition, asking.EFFECTS[effect], where, params)
    chosen = (layer, patch) if layer is not None and patch is not None else None
    _grid_of_means(means, kinds, layers, effect, group, chosen)
    if chosen is not None:
        _cell(view, condition, means[means["grouping"] == group], effect, chosen, group)
    _prompts(view, condition, kinds, layers, chosen)


def _pickers(layers: int, kinds: list[str]) -> tuple[str, str, int | None, str | None]:
    columns = st.columns([2, 4, 2, 3])
    effect = columns[0].segmented_control(
        "Effect",
        list(asking.EFFECTS),
        key="effect",
        bind="query-params",
        default="ΔP",
        required=True,
        help="; ".join(f"{k}: {v}" for k, v in _HELP.items()),
    )
    group = columns[1].segmented_control(
        "Prompts",
        asking.GROUPS,
        key="group",
        bind="query-params",
        default="all",
        required=True,
        help="by the greedy answer in the patched condition; difference: failure − success",
    )
    layer = columns[2].selectbox(
        "Layer", range(layers), key="layer", bind="query-params", index=None, placeholder="click a cell"
    )
    patch = columns[3].selectbox(
        "Patch", kinds[::-1], key="patch", bind="query-params", index=None, placeholder="click a cell"
    )
    return str(effect), str(group), layer, patch


def _numbers(view: View, condition: str, where: str, params: list[Any]) -> None:
    n = asking.counts(view.paths, condition, where, params)
    st.caption(
        f"{n['all']} prompts patched from `baseline` into `{condition}`: {n['success']} successes, {n['failure']} failures. "
        "One layer at a time, where the first token of the answer is decided."
    )
    if view.condition != condition and view.outcome is not None:
        st.caption(f"The filter's outcome is that under `{view.condition}`, not under `{condition}`.")


def _means(view: View, condition: str, measure: str, where: str, params: list[Any]) -> pd.DataFrame:
    """The stored statistics where all prompts are looked at, else the same counted over the filter's."""
    if view.category is None and view.outcome is None:
        stored = asking.stored_means(view.paths, condition, measure)
        if len(stored):
            return stored
    return asking.counted_means(view.paths, condition, measure, where, params)


def _grid_of_means(
    means: pd.DataFrame, kinds: list[str], layers: int, effect: str, group: str, chosen: tuple[int, str] | None
) -> None:
    cells = drawing.placed(means[means["grouping"] == group], kinds, layers, chosen)
    if cells.empty:
        st.info(f"The filter keeps no prompts for **{group}**.")
        return
    top = drawing.top_of(means["value"])
    title = (
        f"{'mean ΔP' if effect == 'ΔP' else 'share flipped'}{', failure − success' if group == 'difference' else ''}"
    )
    key = f"patch-means-{chosen}"  # a new chart for a new cell, or the old one would stay selected in it
    st.echarts_chart(
        drawing.means(cells, kinds, layers, top=top, title=title, chosen=chosen),
        height=92 + 34 * len(kinds),
        key=key,
        on_select=frame.on_click(key, _choosing(cells)),
        alt=f"{title} by layer and kind of patch",
    )
    meaning = drawing.legend(effect, group)
    st.caption(f"{title}: {meaning} Colours from −{top:.3g} to +{top:.3g}, the same for all four groups.")
    frame.download(cells.drop(columns=["x", "y"]), f"patching-{group}")


def _choosing(cells: pd.DataFrame) -> Callable[[int, int], dict[str, Any] | None]:
    def chosen(series: int, index: int) -> dict[str, Any] | None:
        cell = charts.clicked_cell(index, cells)
        return {"layer": int(cell["layer"]), "patch": cell["patch"]} if cell else None

    return chosen


def _cell(view: View, condition: str, means: pd.DataFrame, effect: str, chosen: tuple[int, str], group: str) -> None:
    layer, patch = chosen
    st.subheader(f"{patch}, layer {layer}", anchor=False)
    here = means[(means["layer"] == layer) & (means["patch"] == patch)]
    for row in here.to_dict("records"):
        q = f" q = {row['q']:.2g}." if pd.notna(row["q"]) else ""
        st.text(f"{drawing.mean_note(row, effect)} ({row['method']}).{q}")
    rows = asking.behind(view.paths, condition, layer, patch, group, *view.where())
    if rows.empty:
        st.info("No prompt of the filter was patched here.")
        return
    key = f"patch-rows-{layer}-{patch}-{group}"
    number = st.column_config.NumberColumn
    st.dataframe(
        rows,
        key=key,
        height=min(38 + 35 * len(rows), 320),
        hide_index=True,
        selection_mode="single-row",
        on_select=frame.on_row(key, list(rows["prompt_id"])),
        column_config={
            "prompt_id": "prompt",
            "target": "X",
            "before": number("P_sem before", format="%.3f"),
            "after": number("P_sem after", format="%.3f"),
            "delta_p": number("ΔP", format="%+.3f"),
            "said": "answer before",
            "says": "answer after",
        },
    )
    frame.download(rows, f"patching-{patch}-{layer}")


def _prompts(view: View, condition: str, kinds: list[str], layers: int, chosen: tuple[int, str] | None) -> None:
    st.subheader("One prompt", anchor=False)
    ids = [i for i in (view.prompt_id, view.pin) if i is not None]
    if not ids:
        st.caption("Choose a prompt: click a cell, then a row of its table; or take one in the sidebar.")
        return
    grids = {i: asking.of_prompt(view.paths, i) for i in dict.fromkeys(ids)}
    top = drawing.top_of(pd.concat([g["value"] for g in grids.values()]))
    for n, (column, (prompt_id, rows)) in enumerate(zip(st.columns(len(grids)), grids.items(), strict=True)):
        with column:
            st.text(prompt_id)
            if rows.empty:
                st.info("This prompt was not patched.")
                continue
            cells = drawing.placed(rows, kinds, layers, chosen)
            key = f"patch-own-{n}-{chosen}"
            st.echarts_chart(
                drawing.own(cells, kinds, layers, top=top, chosen=chosen),
                height=92 + 30 * len(kinds),
                key=key,
                on_select=frame.on_click(key, _choosing(cells)),
                alt="ΔP of one prompt by layer and kind of patch",
            )
            frame.download(rows, f"patching-prompt-{n}")
            _answers(view, condition, prompt_id, cells, chosen)
    st.caption(
        f"ΔP of the prompt: {drawing.LEGEND} Colours from −{top:.3g} to +{top:.3g}. ◯: the answer's verdict flips."
    )


def _answers(view: View, condition: str, prompt_id: str, cells: pd.DataFrame, chosen: tuple[int, str] | None) -> None:
    """P_sem and the answer without and with the chosen patch, as text."""
    if chosen is None:
        st.caption("Click a cell for its answer.")
        return
    here = cells[(cells["layer"] == chosen[0]) & (cells["patch"] == chosen[1])]
    if here.empty:
        st.caption(f"`{chosen[1]}` at layer {chosen[0]} was not measured for this prompt.")
        return
    row = here.iloc[0]
    tokens = "" if pd.isna(row["num_span"]) else f"; {int(row['num_patched'])} of {int(row['num_span'])} tokens patched"
    st.text(f"{chosen[1]}, layer {chosen[0]}{tokens}")
    for name, p, said in (
        ("without the patch", row["before"], asking.greedy_text(view.paths, prompt_id, condition)),
        ("with the patch" + (", flipped" if row["flipped"] else ""), row["after"], row["says"]),
    ):
        st.caption(f"{name}: P_sem {p:.4f}")
        st.code(said if said else "(nothing)", language=None, wrap_lines=True)


main()
