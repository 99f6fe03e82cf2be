"""What each layer would say if it were the last, and what each adds to the probability of X."""

import pandas as pd
import streamlit as st

from app import charts, frame, queries
from app.charts.gravity import attention as attention_charts
from app.charts.gravity import layers as layers_charts
from app.queries.gravity import View
from app.queries.gravity import layers as asked
from app.views.gravity import open_page, pick_step

OWN = (("prompt", charts.ORANGE), ("pinned", charts.GREEN))


def show(view: View) -> None:
    """The whole page."""
    step = pick_step()
    own = [(name, asked.lens(view.paths, name, step)) for name in _chosen(view)]
    _grid(view, step, own)
    _curves(view, step, own)
    _contributions(view, step)


def _chosen(view: View) -> list[str]:
    return [name for name in dict.fromkeys((view.prompt_id, view.pin)) if name]


def _grid(view: View, step: str, own: list[tuple[str, pd.DataFrame]]) -> None:
    st.header("Logit lens", anchor=False)
    if not own:
        _offer(view)
        return
    titled = [
        (condition if name == view.prompt_id else f"{condition}, pinned", rows[rows["condition"] == condition])
        for condition in view.conditions
        for name, rows in own
        if condition in set(rows["condition"])
    ]
    if not titled:
        st.info("The lens was not measured for this prompt.")
        return
    num_layers = asked.num_layers(view.paths, "lens")
    left, right = st.columns(2)
    shade = left.selectbox(
        "Colour",
        list(layers_charts.SHADES),
        key="shade",
        bind="query-params",
        help="; ".join(f"{k}: {v}" for k, v in layers_charts.SHADES.items()),
    )
    with right:
        layer = _pick_layer(num_layers)
    cells = layers_charts.lens_cells(titled, shade)
    low, high = layers_charts.lens_range(cells, shade)

    def clicked(_: int, index: int) -> dict | None:
        cell = charts.clicked_cell(index, cells)
        return {"layer": int(cell["layer"])} if cell else None

    key = f"lens-grid-{layer}"  # a chart of its own: in an older one a second click on a cell would only deselect it
    st.echarts_chart(
        layers_charts.lens_grid(cells, [title for title, _ in titled], num_layers, shade, layer),
        key=key,
        height=max(320, 22 * num_layers + 140),
        on_select=frame.on_click(key, clicked),
    )
    st.caption(
        f"Each cell shows the likeliest token; colour is the {layers_charts.SHADES[shade]}, {low:.3g} to {high:.3g} over the "
        "whole grid. Hover for the top five, click to lock a layer."
    )
    frame.download(pd.concat(rows.assign(prompt_id=name) for name, rows in own), "lens")
    st.subheader(f"Layer {layer}", anchor=False)
    st.dataframe(layers_charts.top_tokens(titled, layer), hide_index=True)


def _pick_layer(num_layers: int) -> int:
    if num_layers < 2:
        return 0
    held = st.session_state.get("layer", 0)
    if held is None:  # cleared on another page
        del st.session_state["layer"]
    elif held >= num_layers:  # of a deeper run
        st.session_state["layer"] = num_layers - 1
    return st.slider("Layer", 0, num_layers - 1, num_layers // 2, key="layer", bind="query-params")


def _offer(view: View) -> None:
    st.info("Choose a prompt in the sidebar, or one of these, to see what each layer would say.")
    rows = asked.offered(view, "lens")
    st.dataframe(
        rows,
        hide_index=True,
        key="lens-offer",
        on_select=frame.on_row("lens-offer", list(rows["prompt_id"])),
        selection_mode="single-row",
        column_config={"question": st.column_config.TextColumn(width="medium")},
    )


def _curves(view: View, step: str, own: list[tuple[str, pd.DataFrame]]) -> None:
    st.header("By layer", anchor=False)
    titles = {"p_target": "p_target", "entropy": "entropy, nats", "kl_final": "KL from the final layer, nats"}
    found = []
    for place, (measure, title) in zip((st.container(), *st.columns(2)), titles.items(), strict=True):
        rows = asked.curves(view, "lens", step, measure)
        found.append(rows.assign(measure=measure))
        extra = [
            (f"{name}, {view.condition}", _curve(some, view.condition, measure), colour)
            for (name, colour), (_, some) in zip(OWN, own, strict=False)
        ]
        if own:
            extra.append(("prompt, baseline", _curve(own[0][1], "baseline", measure), charts.GREY))
        chart = attention_charts.by_layer(rows, title, extra)
        chart["legend"]["show"] = measure == "p_target"
        with place:
            st.echarts_chart(chart, key=f"lens-{measure}", height=340)
    st.caption("Means over prompts by the outcome of the greedy answer, with 95 % intervals. One legend for all three.")
    frame.download(pd.concat(found), "lens-by-layer")


def _curve(rows: pd.DataFrame, condition: str, measure: str) -> pd.DataFrame:
    return rows[rows["condition"] == condition].rename(columns={"layer": "x", measure: "y"})[["x", "y"]]


def _contributions(view: View, step: str) -> None:
    st.header("What each layer adds", anchor=False)
    if not queries.has_rows(view.paths, "decomposition"):
        st.info("Not measured in this run: it has no rows in `decomposition`.")
        return
    st.caption(
        "To the lens's p_target, by a block's attention and by its MLP. The scale is shared by charts side by side."
    )
    measured = list(dict.fromkeys(["baseline", view.condition]))
    own = [(name, asked.contributions(view.paths, name, step)) for name in _chosen(view)]
    _own_contributions(own, measured)
    st.subheader("Mean over prompts, by outcome", anchor=False)
    rows = {part: asked.curves(view, "decomposition", step, part) for part in asked.CONTRIBUTIONS}
    limit = layers_charts.axis_limit(*(r[c] for r in rows.values() for c in ("value", "low", "high")))
    for place, name in zip(st.columns(len(measured)), measured, strict=True):
        with place:
            st.text(name)
            st.echarts_chart(layers_charts.contribution_curves(rows, name, limit), key=f"added-mean-{name}", height=340)
    frame.download(pd.concat(r.assign(measure=part) for part, r in rows.items()), "contributions-by-outcome")


def _own_contributions(own: list[tuple[str, pd.DataFrame]], measured: list[str]) -> None:
    if not own:
        return
    limit = layers_charts.axis_limit(*(rows[part] for _, rows in own for part in asked.CONTRIBUTIONS))
    for name, rows in own:
        for place, condition in zip(st.columns(len(measured)), measured, strict=True):
            some = rows[rows["condition"] == condition]
            with place:
                st.text(f"{name}, {condition}")
                if some.empty:
                    st.info("Not measured.")
                else:
                    chart = layers_charts.contribution_bars(some, limit)
                    st.echarts_chart(chart, key=f"added-{name}-{condition}", height=300)
    frame.download(pd.concat(rows.assign(prompt_id=name) for name, rows in own), "contributions")


opened = open_page(__file__)
if opened:
    show(opened)
