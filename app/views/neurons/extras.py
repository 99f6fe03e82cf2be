"""What the neuron experiment gives to the pages of the core: its filters, examples of questions, two runs' results."""

import streamlit as st

from app import frame
from app.charts.neurons import compared as charts
from app.experiments import Extras
from app.queries import neurons as ask
from app.queries.neurons import compared as asked
from app.selection import RunEntry, Selection
from app.views.neurons import pick

MEASURES = {
    "spearman": ("agreement", "rank correlation of claimed and measured effects"),
    "area_keep": ("curves", "area under m(k), neurons kept"),
    "area_drop": ("curves", "area under m(k), neurons dropped"),
}
"""Measures that a chart compares: their analysis and title."""


def compare(view: Selection | None, entry: RunEntry, other: RunEntry) -> None:
    """Draw two runs' agreement and curves side by side."""
    st.subheader("Results side by side")
    both = [asked.results(e.paths) for e in (entry, other)]
    for rows, which in zip(both, ("This run", "The other run"), strict=True):
        if rows.empty:
            st.info(f"{which} has no statistics.")
            return
    rows = asked.compare(*both)
    measure = str(
        st.segmented_control(
            "Measure", list(MEASURES), key="compared", bind="query-params", default="spearman", required=True
        )
    )
    analysis, title = MEASURES[measure]
    shown = rows[(rows["analysis"] == analysis) & (rows["measure"] == measure)]
    if shown.empty:
        st.caption("Neither run has this measure.")
    else:
        names = (f"this: {entry.paths.run_id}", f"other: {other.paths.run_id}")
        st.echarts_chart(charts.intervals(shown, names, title), height=320, key="compared-chart", alt=title)
    st.caption(
        "difference = other − this. Intervals are 95 %; that they overlap does not show that the runs agree, and prompts that "
        "both runs share make a smaller difference real than the intervals suggest."
    )
    config = {name: st.column_config.NumberColumn(name, format="%.4f") for name in rows.select_dtypes("float").columns}
    st.dataframe(rows, hide_index=True, key="results", column_config=config)
    frame.download(rows, "compared")


EXTRAS = Extras(
    pick=pick,
    examples=ask.EXAMPLES,
    choices={"prompt_id": "prompt"},
    of_items=ask.prompts_of_items,
    compare=compare,
)
