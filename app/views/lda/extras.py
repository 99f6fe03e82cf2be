"""What amplification gives to the pages of the core: its filters, examples of questions, two runs' results."""

import pandas as pd
import streamlit as st

from app import frame
from app.charts.lda import compared as charts
from app.charts.lda import number_told
from app.experiments import Extras
from app.queries import lda as ask
from app.queries.lda import compared as asked
from app.selection import RunEntry, Selection
from app.views.lda import pick


def compare(view: Selection | None, entry: RunEntry, other: RunEntry) -> None:
    """Draw the rates of two runs side by side; the chart of the detector that the view looks at."""
    st.subheader("Results side by side")
    both = [asked.results(e.paths) for e in (entry, other)]
    for rows, which in zip(both, ("This run", "The other run"), strict=True):
        if rows.empty:
            st.info(f"{which} has no statistics.")
            return
    rows = asked.compare(*both)
    detector = view.detector if isinstance(view, ask.View) else None
    _intervals(rows, detector, (f"this: {entry.paths.run_id}", f"other: {other.paths.run_id}"))
    st.caption(
        "difference = other − this. Intervals are 95 %; that they overlap does not show that the runs agree, and prompts that "
        "both runs share make a smaller difference real than the intervals suggest."
    )
    measured = rows[rows["measure"] != asked.EXTRAPOLATED]
    numbers = measured.select_dtypes("float").columns
    config = {name: st.column_config.NumberColumn(name, format="%.4f") for name in numbers}
    st.dataframe(measured, hide_index=True, key="results", column_config=config)
    frame.download(measured, "compared")
    for row in rows[rows["measure"] == asked.EXTRAPOLATED].to_dict("records"):
        this, that = ("–" if pd.isna(v) else number_told(v) for v in (row["value"], row["value_other"]))
        st.text(f"{row['detector']}: extrapolated natural rate, not measured: {this} (this), {that} (other)")


def _intervals(rows: pd.DataFrame, detector: str | None, names: tuple[str, str]) -> None:
    shown = rows[(rows["analysis"] == "rates") & (rows["measure"] == "rate") & (rows["detector"] == detector)]
    if shown.empty:
        st.caption("Neither run has rates of the chosen detector.")
        return
    labels = [ask.Arm(str(c), 0.0).label for c in shown["condition"]]
    st.echarts_chart(charts.intervals(shown, labels, names), height=320, key="compared-chart")
    st.text(f"Detector {detector}.")


EXTRAS = Extras(
    pick=pick,
    examples=ask.EXAMPLES,
    choices={"prompt_id": "prompt"},
    of_items=ask.prompts_of_items,
    compare=compare,
)
