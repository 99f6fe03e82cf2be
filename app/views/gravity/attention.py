"""Where the token that decides the answer looks: the instruction, the ban, the word itself, or the question."""

import numpy as np
import pandas as pd
import streamlit as st

from app import charts, chips, frame
from app.charts.gravity import attention as drawn
from app.queries.gravity import View
from app.queries.gravity import attention as asked
from app.queries.gravity import layers as by_layer
from app.views.gravity import open_page, pick_step
from harness.errors import HarnessError


def show(view: View) -> None:
    """The whole page."""
    left, middle, right = st.columns([2, 1, 1])
    measure = left.selectbox(
        "Measure",
        asked.measures(view.paths),
        key="measure",
        bind="query-params",
        help="; ".join(asked.MEASURES.values()),
    )
    with middle:
        step = pick_step()
    with right:
        measured = st.segmented_control(
            "Heads under",
            ("condition", "baseline"),
            key="measured",
            bind="query-params",
            default="condition",
            required=True,
            help="outcomes are those under the condition in both",
        )
    _curves(view, step, measure)
    layer, head = _heads(view, step, measure, view.condition if measured == "condition" else "baseline")
    _tokens(view, step, layer, head)


def _curves(view: View, step: str, measure: str) -> None:
    st.header("By layer", anchor=False)
    rows = asked.curves(view, step, measure)
    if rows.empty:
        st.info(f"`{measure}` does not exist under {view.condition}: its context has no such part.")
        return
    st.echarts_chart(drawn.by_layer(rows, measure), key="attention-curves", height=340)
    st.caption("Mean over heads, then over prompts, by the outcome of the greedy answer, with 95 % intervals.")
    frame.download(rows, "attention-by-layer")


def _heads(view: View, step: str, measure: str, measured: str) -> tuple[int, int | None]:
    """Draws the grid and the locked head's distribution; the layer and the head that are locked."""
    st.header("By head", anchor=False)
    heads = asked.heads(view, step, measure, measured)
    num_layers, num_heads = by_layer.num_layers(view.paths, "attention"), asked.num_heads(view.paths)
    side = _side(view)
    _hold_in_range(num_layers, num_heads)
    grid, detail = st.columns([3, 2])
    with detail:
        layer, head = _lock(num_layers, num_heads)
        _detail(view, step, measure, measured, layer, head, heads)
    with grid:
        if heads[side].notna().any():
            _grid(heads, side, num_heads, num_layers, (layer, head), f"{measure} under {measured}")
        else:
            st.info(f"No {side} of `{measure}` under {measured} for these filters.")
    return layer, head


def _side(view: View) -> str:
    if view.outcome is not None:
        st.caption(f"The filter keeps one outcome: means over prompts with a {view.outcome}.")
        return view.outcome
    return st.segmented_control(
        "Cells",
        drawn.SIDES,
        key="side",
        bind="query-params",
        default="difference",
        required=True,
        help="difference: mean of failures less that of successes",
    )


def _grid(
    heads: pd.DataFrame, side: str, num_heads: int, num_layers: int, locked: tuple[int, int | None], title: str
) -> None:
    cells = drawn.head_cells(heads, side)
    key = f"head-grid-{locked}"  # a chart of its own: in an older one a second click on a cell would only deselect it

    def clicked(_: int, index: int) -> dict | None:
        cell = charts.clicked_cell(index, cells)
        return {"layer": int(cell["layer"]), "head": int(cell["head"])} if cell else None

    st.echarts_chart(
        drawn.head_grid(cells, num_heads, num_layers, side, locked),
        key=key,
        height=max(320, 20 * num_layers + 140),
        on_select=frame.on_click(key, clicked),
    )
    low, high = drawn.head_range(heads, side)
    marks = " ● q < .05 over layers × heads." if side == "difference" else ""
    st.caption(f"{title}, {side}: {low:.3g} to {high:.3g}.{marks} Hover for a head's numbers, click to lock it.")
    frame.download(heads, "attention-heads")


def _hold_in_range(num_layers: int, num_heads: int) -> None:
    for key, number in (("layer", num_layers), ("head", num_heads)):
        held = st.session_state.get(key, 0)
        if held is None and key == "layer":  # cleared on another page
            del st.session_state[key]
        elif held is not None and held >= max(1, number):  # of a larger run
            st.session_state[key] = max(0, number - 1)


def _lock(num_layers: int, num_heads: int) -> tuple[int, int | None]:
    layer = 0
    if num_layers > 1:
        layer = st.slider("Layer", 0, num_layers - 1, num_layers // 2, key="layer", bind="query-params")
    head = st.selectbox(
        "Head", range(num_heads), key="head", bind="query-params", index=None, placeholder="mean over heads"
    )
    return layer, head


def _detail(
    view: View, step: str, measure: str, measured: str, layer: int, head: int | None, heads: pd.DataFrame
) -> None:
    bins = asked.distribution(view, step, measure, measured, layer, head)
    if bins.empty:
        return
    if head is not None:
        for cell in heads[(heads["layer"] == layer) & (heads["head"] == head)].to_dict("records"):
            st.text(drawn.head_numbers(cell))
    st.echarts_chart(drawn.histogram(bins, measure), key="head-distribution", height=300)
    frame.download(bins, "attention-distribution")
    rows = asked.values(view, step, measure, measured, layer, head)
    _prompts(rows, "head-values")


def _prompts(rows: pd.DataFrame, key: str, height: int = 220) -> None:
    """A table of prompts, a click on one chooses it."""
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        on_select=frame.on_row(key, list(rows["prompt_id"])),
        selection_mode="single-row",
        height=height,
        column_config={"question": st.column_config.TextColumn(width="medium")},
    )


def _tokens(view: View, step: str, layer: int, head: int | None) -> None:
    st.header("Over the prompt", anchor=False)
    if view.prompt_id is None:
        st.info("Choose a prompt in the sidebar, or one of these, to see which of its tokens are attended to.")
        _prompts(by_layer.offered(view, "attention"), "attention-offer", height=320)
        return
    named = [
        (f"{condition}, pinned" if pinned else condition, prompt, condition)
        for prompt, pinned in ((view.prompt_id, False), (view.pin, True))
        if prompt is not None
        for condition in dict.fromkeys([view.condition, "baseline"])
    ]
    rows, whole = {}, {}
    for title, prompt, condition in named:
        row = asked.token_row(view.paths, prompt, condition, step, layer)
        try:
            whole[title] = asked.head_rows(view.paths, prompt, condition, step, layer)
        except HarnessError as e:
            st.warning(str(e))
            whole[title] = None
        rows[title] = _of_head(row, whole[title], head)
    _told_stored(view, head, [title for title, _, _ in named if whole[title] is None])
    _chips(named, rows, layer, head)
    spans = {title: asked.spans(view.paths, prompt, condition) for title, prompt, condition in named}
    masses = drawn.masses({t: r for t, r in rows.items() if r["share"].notna().any()}, spans)
    st.dataframe(
        masses,
        hide_index=True,
        column_config={c: st.column_config.NumberColumn(format="%.4f") for c in masses.columns[3:]},
    )
    frame.download(
        pd.concat(rows[title].assign(prompt_id=prompt, condition=condition) for title, prompt, condition in named),
        "attention-tokens",
    )
    _all_heads(named, rows, whole, layer, head)


def _of_head(row: pd.DataFrame, whole: np.ndarray | None, head: int | None) -> pd.DataFrame:
    """The row of a head in the place of the mean; NaN where it was not kept."""
    if head is None or row.empty:
        return row
    return row.assign(share=np.nan if whole is None or head >= len(whole) else whole[head].astype(float))


def _told_stored(view: View, head: int | None, missing: list[str]) -> None:
    if head is None or not missing:
        return
    st.info(f"Head rows are stored for some prompts only; not for this one under: {', '.join(missing)}.")
    rows = asked.stored(view.paths)
    if rows.empty:
        st.caption("This run has stored none. Without a head, the mean over heads is shown.")
    else:
        _prompts(rows, "stored-prompts")


def _chips(named: list[tuple[str, str, str]], rows: dict[str, pd.DataFrame], layer: int, head: int | None) -> None:
    top = drawn.largest_share(list(rows.values()))
    what = "mean over heads" if head is None else f"head {head}"
    st.caption(
        f"Layer {layer}, {what}. Colour: 0 to {top:.4f} of the attention, the largest share of any token but the first, "
        "over all that is shown here. Hover over a token for its share."
    )
    chips.show(drawn.legend(list(drawn.SPAN_COLOURS)), "", "attention-legend")
    for start in range(0, len(named), 2):
        for place, (title, prompt, condition) in zip(st.columns(2), named[start : start + 2], strict=False):
            with place:
                st.text(f"{prompt}, {condition}")
                row = rows[title]
                if row.empty:
                    st.info("Not measured.")
                    continue
                first = row["share"].iloc[0]
                note = "not stored" if first != first else f"first token: {first:.4f}"
                chips.show(drawn.chips_of(row, top), note, f"chips-{title}")


def _all_heads(
    named: list[tuple[str, str, str]],
    rows: dict[str, pd.DataFrame],
    whole: dict[str, np.ndarray | None],
    layer: int,
    head: int | None,
) -> None:
    found = [(*n, whole[n[0]]) for n in named if not rows[n[0]].empty]
    kept = [(title, prompt, condition, shares) for title, prompt, condition, shares in found if shares is not None]
    if not kept:
        return
    st.subheader(f"Each head of layer {layer}", anchor=False)
    top = max(float(shares[:, 1:].max()) for *_, shares in kept)
    for title, prompt, condition, shares in kept:
        cells = drawn.head_row_cells(shares)

        def clicked(_: int, index: int, cells: pd.DataFrame = cells) -> dict | None:
            cell = charts.clicked_cell(index, cells)
            return {"head": int(cell["y"])} if cell else None

        st.text(f"{prompt}, {condition}")
        key = f"head-rows-{title}-{head}"
        st.echarts_chart(
            drawn.head_row_grid(cells, list(rows[title]["text"]), len(shares), top),
            key=key,
            height=230 + 16 * len(shares),
            on_select=frame.on_click(key, clicked),
        )
        frame.download(cells.rename(columns={"x": "position", "y": "head", "value": "share"}), f"attention-{title}")
    st.caption(f"0 to {top:.4f}, the largest share of any token but the first. Click a cell to lock its head.")


opened = open_page(__file__)
if opened:
    show(opened)
