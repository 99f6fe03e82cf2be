"""Pages of neurons, and the filters that they share as widgets; their SQL is `app.queries.neurons`'."""

import streamlit as st

from app import frame
from app.queries import neurons as ask
from app.queries.neurons import View
from app.selection import RunEntry
from harness.errors import HarnessError

METRIC_TOLD = {
    "dla": "direct logit attribution: what the neuron itself writes on the target, every norm's scale frozen",
    "act_grad": "activation × gradient through everything that follows",
    "ig": "integrated gradients from no activation, or the background's mean, to this one",
    "relp": "relevance: gradients with norms and attention patterns frozen",
}


def open_page(file: str) -> View | None:
    """Draw the head of the page in `file`; what is looked at, or None where there is nothing to show."""
    return frame.open_page(file, pick)


def pick(entry: RunEntry) -> View:
    """Draw the filters of a run in the sidebar."""
    try:
        metrics, prompts = ask.metrics(entry.paths), ask.prompt_ids(entry.paths)
    except HarnessError as e:
        st.warning(str(e))
        metrics, prompts = (), []
    prompt_id = st.selectbox(
        "Prompt", prompts, key="prompt", bind="query-params", index=None, placeholder="all of them"
    )
    metric = st.selectbox(
        "Metric",
        metrics,
        key="metric",
        bind="query-params",
        placeholder="none in this run",
        help="; ".join(f"{name}: {told}" for name, told in METRIC_TOLD.items()),
    )
    named = st.text_input(
        "Neuron",
        key="neuron",
        bind="query-params",
        placeholder="layer.number, such as 3.77",
        max_chars=20,
        help="both count from 0; a click on a point or a row chooses one too",
    )
    neuron = ask.neuron_of(named)
    if named and neuron is None:
        st.caption("No neuron: expected layer.number, such as 3.77.")
    return View(
        entry=entry,
        metrics=metrics,
        metric=str(metric) if metric else None,
        prompt_id=str(prompt_id) if prompt_id else None,
        neuron=neuron,
    )


def absent(view: View, stage: str, what: str, setting: str = "") -> str:
    """Why something is not there, and which stage makes it; `setting` is one that may have switched it off."""
    if view.is_running:
        return f"{what}: not yet. The stage `{stage}` makes that."
    rest = f", unless `{setting}` switches it off" if setting else ""
    return f"{what}: not in this run. The stage `{stage}` makes that{rest}."
