"""A prompt token by token, coloured by what a few neurons do there; two prompts side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from app import frame
from app.charts.neurons import number_told, size_told
from app.charts.neurons import tokens as charts
from app.queries import neurons as shared
from app.queries.neurons import Neuron, View
from app.queries.neurons import heat_map as ask
from app.queries.neurons.heat_map import Context
from app.views.neurons import absent, open_page, tokens
from harness.errors import HarnessError

MOST_NEURONS = 4
MOST_TOKENS = 4_000  # of a prompt, drawn at once
_SCALE_OF = {told: name for name, told in charts.SCALES.items()}


@dataclass(frozen=True)
class Drawn:
    """How tokens are drawn: what |a| is held against, how it becomes a colour, tokens in a row (0: as many as fit)."""

    scale: str
    colouring: charts.Colouring
    per_row: int


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if not view:
        return
    known = shared.prompt_ids(view.paths)
    if not known:
        st.info(absent(view, "prompts", "Prompts"))
        return
    prompts, neurons, rows = _chosen(view, known)
    drawn = _drawn()
    frame.safely(lambda: _map(view, prompts, neurons, drawn))
    frame.safely(lambda: _candidates(view, prompts[0], rows))


# -- what is chosen


def _chosen(view: View, known: list[str]) -> tuple[list[str], list[Neuron], pd.DataFrame]:
    """The prompts and neurons to draw, and those that could be: the sidebar's, or the first ones, and what is laid beside."""
    first = view.prompt_id or known[0]
    if st.session_state.get("pin") not in (None, *known):
        frame.choose(pin=None)
    left, right = st.columns(2, vertical_alignment="bottom")
    pinned = left.selectbox(
        "A second prompt beside it", known, key="pin", bind="query-params", index=None, placeholder="none",
        help="drawn on the same scale",
    )  # fmt: skip
    also = right.text_input(
        "More neurons, laid over it", key="also", bind="query-params", placeholder="up to three, such as 3.77 5.12",
        max_chars=100,
    )  # fmt: skip
    rows = ask.candidates(view, first)
    prompts = [first] if pinned in (None, first) else [first, str(pinned)]
    return prompts, _neurons(view.neuron, rows, str(also or "")), rows


def _neurons(first: Neuron | None, rows: pd.DataFrame, also: str) -> list[Neuron]:
    if first is None and len(rows):
        first = Neuron(int(rows["layer"].iloc[0]), int(rows["neuron"].iloc[0]))
    more = [shared.neuron_of(word) for word in also.replace(",", " ").split()]
    if None in more:
        st.caption("What is no neuron is left out: expected layer.number, such as 3.77.")
    distinct = list(dict.fromkeys(n for n in (first, *more) if n is not None))
    if len(distinct) > MOST_NEURONS:
        st.caption(f"The first {MOST_NEURONS} neurons are drawn.")
    return distinct[:MOST_NEURONS]


def _drawn() -> Drawn:
    with st.expander("Colours and layout"):
        one, two, three = st.columns(3)
        scale = one.selectbox(
            "Scale of |a|", list(charts.SCALES.values()), key="scale", bind="query-params",
            help="the largest |a| of tokens that the statistics have; tokens beyond it have the full colour",
        )  # fmt: skip
        shape = two.selectbox("From |a| / scale to opacity", charts.SHAPES, key="shape", bind="query-params")
        power = three.number_input(
            "Exponent of the power", 0.1, 10.0, 2.0, 0.1, key="power", bind="query-params", disabled=shape != "power"
        )
        one, two, _ = st.columns(3)
        threshold = one.number_input(
            "No colour under |a| =", 0.0, None, charts.THRESHOLD, key="threshold", bind="query-params", format="%g",
        )  # fmt: skip
        per_row = two.number_input("Tokens a row", 0, 200, 0, key="row", bind="query-params", help="0: as many as fit")
    colouring = charts.Colouring(str(shape), float(power or 2.0), float(threshold or 0.0))
    return Drawn(_SCALE_OF[str(scale)], colouring, int(per_row or 0))


# -- the map


def _map(view: View, prompts: Sequence[str], neurons: Sequence[Neuron], drawn: Drawn) -> None:
    contexts = [found for p in prompts if (found := ask.context(view.paths, p)) is not None and found.token_ids]
    if not contexts:
        st.info(absent(view, "prompts", "The tokens of this prompt"))
        return
    values = [_values(view, told, neurons) for told in contexts]
    scales = charts.scales(values, [told.counted for told in contexts], drawn.scale)
    names = [f"neuron {one.label}" for one in neurons]
    panels: list[dict] = []
    for told, own, scale in zip(contexts, values, scales, strict=True):
        parts = charts.cells(told.text, told.offsets, told.pieces)
        if len(parts) > MOST_TOKENS:
            st.caption(
                f"Of {len(told.token_ids):,} tokens the first {MOST_TOKENS:,} are drawn; the file has all of them."
            )
        dumped = np.zeros(len(told.token_ids), bool)
        dumped[[n for n in told.positions if n < len(dumped)]] = True
        if not ask.has_dump(view.paths, told.prompt_id):
            dumped[:] = [bool(any(one is not None and np.isfinite(one[n]) for one in own)) for n in range(len(dumped))]
        facts = {
            "token_ids": told.token_ids,
            "special": told.special,
            "counted": told.counted,
            "dumped": dumped.tolist(),
        }
        panels.append(
            charts.panel(told.prompt_id, told.text, parts[:MOST_TOKENS], facts, own, names, scale, drawn.colouring)
        )
    st.text(_told(view, neurons))
    tokens.show(panels, charts.legend(drawn.colouring), drawn.per_row, "heat")
    st.caption(_scale_told(contexts, neurons, scales, drawn))
    frame.download(_rows(contexts, neurons, values), "token-heat-map")


def _values(view: View, told: Context, neurons: Sequence[Neuron]) -> list[np.ndarray | None]:
    """Activations of each neuron; where nothing was dumped what the examples say, and a line that says so."""
    if not neurons:
        return []
    if ask.has_dump(view.paths, told.prompt_id):
        try:
            found = ask.values(view.paths, told, neurons)
        except HarnessError as e:
            st.warning("The file of these activations cannot be read; what the examples say is shown in its place.")
            st.text(str(e))
            found = ask.known_peaks(view.paths, told, neurons)
        missing = [one.label for one in neurons if found[one] is None]
        if missing:
            st.warning(f"Not in the files of this run: {', '.join(missing)} (`neurons.layers` says which layers are).")
    else:
        is_off = shared.asked_for(view, "dump") == "off"
        if is_off:
            st.info(
                "This run kept no activations: `neurons.dump` was off. Set it to `float16` to have them at every token. Known "
                "here are only peaks in prompts that are among a neuron's top examples."
            )
        else:
            st.info(absent(view, "dump", f"Activations of {_plain(told.prompt_id)}", "neurons.dump"))
        found = ask.known_peaks(view.paths, told, neurons)
    return [found[one] for one in neurons]


def _plain(text: str) -> str:
    """A prompt's id in a sentence that is read as Markdown: letters, digits and a few signs; the rest as ?."""
    return "".join(c if c.isalnum() or c in "-_." else "?" for c in text)[:60]


def _told(view: View, neurons: Sequence[Neuron]) -> str:
    """What is drawn, in one line."""
    defaults = [
        what for what, is_own in (("prompt", view.prompt_id is None), ("neuron", view.neuron is None)) if is_own
    ]
    of_own = f" No {' and no '.join(defaults)} is chosen in the sidebar: the first is shown." if defaults else ""
    if not neurons:
        return "No neuron is chosen: the sidebar takes one, and so does a row below."
    if len(neurons) == 1:
        return f"Activation of neuron {neurons[0].label} at each token: green above 0, orange below.{of_own}"
    bars = ", ".join(f"{n + 1}. {one.label}" for n, one in enumerate(neurons))
    return f"Bars under each token, from above: {bars}. Green above 0, orange below.{of_own}"


def _scale_told(
    contexts: Sequence[Context], neurons: Sequence[Neuron], scales: Sequence[Sequence[float]], drawn: Drawn
) -> str:
    """Which scale it is, and how large, in one line."""
    if not neurons:
        return ""
    if drawn.scale == "all":
        sizes = size_told(scales[0][0])
    elif drawn.scale == "prompt":
        sizes = ", ".join(f"{_plain(c.prompt_id)} {size_told(own[0])}" for c, own in zip(contexts, scales, strict=True))
    else:
        sizes = ", ".join(f"{one.label} {size_told(top)}" for one, top in zip(neurons, scales[0], strict=True))
    return (
        f"Scale: {charts.SCALES[drawn.scale]} ({sizes}), the largest |a| of tokens that the statistics have; "
        f"{drawn.colouring.told}; no colour under {drawn.colouring.threshold:g}. Tokens left out of the statistics may go "
        "beyond the scale: they have the full colour. A loud neuron need not matter: see its measured effects on the page "
        "Neurons. A click on a token keeps its numbers in sight."
    )


def _rows(
    contexts: Sequence[Context], neurons: Sequence[Neuron], values: Sequence[Sequence[np.ndarray | None]]
) -> pd.DataFrame:
    """prompt_id, position, token_id, token, is_special, is_counted, and a column a neuron."""
    frames = []
    for told, own in zip(contexts, values, strict=True):
        columns = {
            f"a_{one.label}": np.full(len(told.token_ids), np.nan) if found is None else found
            for one, found in zip(neurons, own, strict=True)
        }
        frames.append(
            pd.DataFrame(
                {
                    "prompt_id": told.prompt_id, "position": range(len(told.token_ids)), "token_id": told.token_ids,
                    "token": told.pieces, "is_special": told.special, "is_counted": told.counted, **columns,
                }
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


# -- neurons to look at


def _candidates(view: View, prompt_id: str, rows: pd.DataFrame) -> None:
    st.subheader("Neurons to look at")
    if rows.empty:
        st.info(absent(view, "influence", "A ranking of neurons for this prompt"))
        return
    key = f"candidates-{view.paths.run_id}-{prompt_id}-{view.metric}"

    def clicked() -> None:
        for n in (st.session_state.get(key) or {}).get("selection", {}).get("rows", [])[:1]:
            if n < len(rows):
                frame.choose(neuron=Neuron(int(rows.iloc[n]["layer"]), int(rows.iloc[n]["neuron"])).label)

    is_ranked = rows["value"].notna().any()
    st.dataframe(
        rows,
        hide_index=True,
        key=key,
        selection_mode="single-row",
        on_select=clicked,
        height=min(320, 40 + 35 * len(rows)),
        column_config={
            "value": st.column_config.NumberColumn("influence", format="%+.4f"),
            "share": st.column_config.NumberColumn("share of Σ|influence|", format="percent"),
            "activation": st.column_config.NumberColumn("a where the target is read", format="%+.4g"),
            "mean_peak": st.column_config.NumberColumn("mean peak, all prompts", format="%.4g"),
        },
    )
    if is_ranked:
        first = rows.iloc[0]
        st.caption(
            f"Those that {view.metric} ranks first for this prompt's target, the first at {number_told(first['value'])}. A "
            "selected row is the neuron that is drawn."
        )
    else:
        st.caption("Those that peak highest over all prompts: this prompt has no ranking. A selected row is drawn.")
    frame.download(rows, "candidates")


main()
