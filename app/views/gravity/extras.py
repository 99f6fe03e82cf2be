"""What gravity gives to the pages of the core: its filters, examples of questions, two runs' results."""

import pandas as pd
import streamlit as st

from app import frame
from app.charts.gravity import compared as charts
from app.experiments import Extras
from app.queries import gravity as ask
from app.queries.gravity import compared as asked
from app.selection import RunEntry, Selection
from app.views.gravity import pick

MEASURES = {
    "violation_rate": ("rates", "share of samples that say X", 0.0, 1.0),
    "delta": ("suppression", "mean P0 − P1", -1.0, 1.0),
    "relative": ("suppression", "mean (P0 − P1) / P0", None, None),
    "log": ("suppression", "mean ln P0 − ln P1", None, None),
}
"""Measures that a chart compares: their analysis, title, and the ends of the axis."""


def compare(view: Selection | None, entry: RunEntry, other: RunEntry) -> None:
    """Draw the answers of two runs side by side; the chart under the condition that the view looks at."""
    st.subheader("Results side by side")
    both = [asked.results(e.paths) for e in (entry, other)]
    for rows, which in zip(both, ("This run", "The other run"), strict=True):
        if rows.empty:
            st.info(f"{which} has no statistics.")
            return
    rows = asked.compare(*both)
    for which, names in asked.conditions_of_one(rows).items():
        if names:
            st.text(f"Conditions that only {which} run has: {', '.join(names)}")
    condition = view.condition if isinstance(view, ask.View) else ""
    _intervals(condition, rows, (f"this: {entry.paths.run_id}", f"other: {other.paths.run_id}"))
    st.caption(
        "difference = other − this. Intervals are 95 %; that they overlap does not show that the runs agree, and prompts that "
        "both runs share make a smaller difference real than the intervals suggest."
    )
    numbers = rows.select_dtypes("float").columns
    config = {name: st.column_config.NumberColumn(name, format="%.4f") for name in numbers}
    st.dataframe(rows, hide_index=True, key="results", column_config=config)
    frame.download(rows, "compared")


def _intervals(condition: str, rows: pd.DataFrame, names: tuple[str, str]) -> None:
    measure = st.segmented_control(
        "Measure", list(MEASURES), key="compared", bind="query-params", default="violation_rate", required=True
    )
    analysis, title, low, high = MEASURES[str(measure)]
    shown = rows[(rows["analysis"] == analysis) & (rows["measure"] == measure) & (rows["condition"] == condition)]
    shown = pd.DataFrame(
        [r for r in shown.to_dict("records") if r["grouping"] == "all" or asked.bin_start(r["grouping"]) is not None]
    )
    if shown.empty:
        st.caption("Neither run has this measure under the chosen condition.")
        return
    st.echarts_chart(charts.intervals(shown, names, title, low, high), height=320, key="compared-chart")
    st.text(f"Condition {condition}.")


EXTRAS = Extras(
    pick=pick,
    examples=ask.EXAMPLES,
    choices={"prompt_id": "prompt"},
    of_items=ask.prompts_of_items,
    compare=compare,
)
