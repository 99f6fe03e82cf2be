"""How large the residual stream is at every token, and which neurons are the largest."""

import pandas as pd
import streamlit as st

from app import chips, frame
from app.charts.gravity import activations as drawing
from app.queries.gravity import View
from app.queries.gravity import activations as asking
from app.views.gravity import open_page

_BASELINE = "baseline"


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if view is None:
        return
    layers = asking.num_layers(view.paths)
    columns = st.columns([1, 2, 3])
    layer = columns[0].selectbox("Layer", range(layers), key="layer", bind="query-params", index=layers - 1)
    scale = columns[1].segmented_control(
        "Colour",
        list(drawing.SCALES),
        key="norms",
        bind="query-params",
        default="relative",
        required=True,
        help="; ".join(f"{k}: {v}" for k, v in drawing.SCALES.items()),
    )
    layer = layers - 1 if layer is None else int(layer)
    if view.prompt_id is None:
        _offer(view)
    else:
        _norms(view, layer, str(scale))
        _neurons(view, layer)
    _recurring(view, layer)
    _files(view)


def _offer(view: View) -> None:
    st.subheader("Choose a prompt", anchor=False)
    rows = asking.offered(view.paths, view.condition, *view.where())
    if rows.empty:
        st.info("The filter keeps no prompt with activations.")
        return
    st.caption("Click a row, or take any prompt in the sidebar. Those with stored files come first.")
    st.dataframe(
        rows,
        key="activations-offered",
        hide_index=True,
        selection_mode="single-row",
        column_config={"target": "X"},
        on_select=frame.on_row("activations-offered", list(rows["prompt_id"])),
    )


def _shown(view: View) -> list[tuple[str, str]]:
    """(prompt, condition) of every panel: the prompt's two conditions, then the pinned one's."""
    ids = dict.fromkeys(i for i in (view.prompt_id, view.pin) if i is not None)
    names = dict.fromkeys(c for c in (view.condition, _BASELINE) if c in view.conditions)
    return [(i, c) for i in ids for c in names]


def _norms(view: View, layer: int, scale: str) -> None:
    st.subheader("Norm of the residual stream", anchor=False)
    found = {at: asking.norms(view.paths, *at) for at in _shown(view)}
    known = [rows for rows in found.values() if len(rows)]
    if not known:
        st.info("This prompt has no activations.")
        return
    low, high = drawing.span(known, scale)
    furthest = drawing.furthest([drawing.of_layer(rows, layer) for rows in known])
    st.caption(
        f"{drawing.SCALES[scale]}, the output of every block at every token of the context. "
        f"Colours from {low:+.2f} to {high:+.2f}, the same for all that is shown."
    )
    panels = list(found.items())
    for n in range(0, len(panels), 2):
        for column, (at, rows) in zip(st.columns(2), panels[n : n + 2], strict=False):
            with column:
                _panel(view, at, rows, layer, scale, (low, high), furthest)


def _panel(
    view: View,
    at: tuple[str, str],
    rows: pd.DataFrame,
    layer: int,
    scale: str,
    span: tuple[float, float],
    furthest: float,
) -> None:
    prompt_id, condition = at
    st.text(f"{prompt_id}, {condition}" + (", pinned" if prompt_id != view.prompt_id else ""))
    if rows.empty:
        st.info("Not measured.")
        return
    texts = asking.tokens(view.paths, *at)
    name = f"{'pin' if prompt_id != view.prompt_id else 'prompt'}-{condition}"
    st.echarts_chart(
        drawing.grid(rows, texts, scale=scale, low=span[0], high=span[1], layer=layer),
        height=150 + max(14 * (int(rows["layer"].max()) + 1), 90),
        key=f"norms-{name}",
        alt="norm of the residual stream by layer and token",
    )
    here = drawing.of_layer(rows, layer)
    st.caption(f"Layer {layer}")
    chips.show(drawing.chips(here, texts, furthest), drawing.chips_note(here, furthest), f"norm-chips-{name}")
    frame.download(rows, f"norms-{name}")


def _neurons(view: View, layer: int) -> None:
    st.subheader("Largest neurons at the first step", anchor=False)
    if not asking.has_neurons(view.paths):
        st.info("None: this family's MLP has no single list of neurons before its last projection.")
        return
    found = {
        i: asking.neurons(view.paths, i, [view.condition, _BASELINE])
        for i in dict.fromkeys(i for i in (view.prompt_id, view.pin) if i is not None)
    }
    shown = {at: found[at[0]][found[at[0]]["condition"] == at[1]] for at in _shown(view)}
    here = {at: rows[rows["layer"] == layer] for at, rows in shown.items()}
    values = pd.concat([rows["value"] for rows in here.values()]) if here else pd.Series(dtype=float)
    if values.empty:
        st.info(f"None stored for this prompt at layer {layer}.")
        return
    top = drawing.round_up(float(values.abs().max()))
    for column, (at, rows) in zip(st.columns(len(here)), here.items(), strict=True):
        with column:
            st.text(f"{at[1]}{', pinned' if at[0] != view.prompt_id else ''}")
            st.echarts_chart(
                drawing.bars(rows, top=top),
                height=60 + 22 * max(len(rows), 4),
                key=f"neurons-{at[0] == view.prompt_id}-{at[1]}",
                alt="largest neurons of a layer with their values",
            )
    st.caption(f"Layer {layer}; the inputs of the MLP's last projection, signed; axes from −{top:g} to {top:g}.")
    _neuron_table(view, shown)


def _neuron_table(view: View, shown: dict[tuple[str, str], pd.DataFrame]) -> None:
    own = next(iter(shown.values()))
    named = [(f"{at[1]}{', pinned' if at[0] != view.prompt_id else ''}", rows) for at, rows in shown.items()]
    table = drawing.neuron_table(own, named)
    with st.expander("All layers"):
        st.caption(f"By their rank under {view.condition}; empty: not among the largest there.")
        st.dataframe(table, hide_index=True, height=320)
    frame.download(table, "neurons")


def _recurring(view: View, layer: int) -> None:
    if not asking.has_neurons(view.paths):
        return
    st.subheader(f"Neurons that recur, layer {layer}", anchor=False)
    n = asking.measured(view.paths, view.condition, layer, *view.where())
    rows = asking.recurring(view.paths, view.condition, layer, *view.where())
    if rows.empty:
        st.info("The filter keeps no prompt with neurons.")
        return
    st.caption(
        f"How many prompts of the filter have a neuron among their largest, under `{view.condition}`: "
        f"of {n['all']} prompts, {n['success']} successes and {n['failure']} failures; the {len(rows)} most frequent."
    )
    for outcome in ("success", "failure"):
        rows[f"share_{outcome}"] = rows[outcome] / n[outcome] if n[outcome] else float("nan")
    share = lambda title: st.column_config.ProgressColumn(title, min_value=0, max_value=1, format="percent")  # noqa: E731
    number = lambda title: st.column_config.NumberColumn(title, format="%+.2f")  # noqa: E731
    st.dataframe(
        rows,
        hide_index=True,
        height=320,
        column_config={
            "share_success": share("of successes"),
            "share_failure": share("of failures"),
            "mean_success": number("mean value, success"),
            "mean_failure": number("mean value, failure"),
        },
    )
    frame.download(rows, "neurons-recurring")


def _files(view: View) -> None:
    st.subheader("Stored residual streams", anchor=False)
    where, params = view.where_chosen()
    total, rows = asking.num_files(view.paths, where, params), asking.files(view.paths, where, params)
    if rows.empty:
        st.caption("No file of these prompts; the setting `experiment.mechanism.stored` says whose are kept.")
        return
    st.caption(
        f"{len(rows)} of {total} safetensors files, in the run's folder `artifacts`: every block's input and the last "
        "block's output at the token that decides a step, one tensor a step."
    )
    st.dataframe(
        rows,
        hide_index=True,
        height=min(38 + 35 * len(rows), 280),
        column_config={"bytes": st.column_config.NumberColumn("size", format="bytes")},
    )
    frame.download(rows, "resid-files")


main()
