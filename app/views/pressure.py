"""How strongly prompts pull, and how often the word comes out all the same."""

import pandas as pd
import streamlit as st

from app import charts, queries
from harness.stats import BIN_NAMES

st.title("Pressure")
entry = queries.choose_run()
result = queries.summary(entry.paths) if entry else None
if entry and result and result.conditions:
    names = [c.condition for c in result.conditions]
    wanted = st.query_params.get("condition", "negative")
    name = st.selectbox("Condition", names, index=names.index(wanted) if wanted in names else 0)
    st.query_params["condition"] = name
    chosen = next(c for c in result.conditions if c.condition == name)
    for column, (label, value) in zip(
        st.columns(4),
        [
            ("prompts", f"{chosen.num_prompts:,}"),
            ("mean p_sem", f"{chosen.p_sem:.3f}"),
            ("greedy says X", "–" if chosen.greedy_rate is None else f"{chosen.greedy_rate:.3f}"),
            ("samples say X", "–" if chosen.sample_rate is None else f"{chosen.sample_rate.mean:.3f}"),
        ],
        strict=True,
    ):
        column.metric(label, value)
    points = queries.query(
        entry.paths,
        "SELECT v.prompt_id, p.category, p.target, b.p_sem AS p0, v.rate FROM violation v JOIN prompts p USING (prompt_id) "
        "JOIN psem b ON b.prompt_id = v.prompt_id AND b.condition = 'baseline' WHERE v.condition = ? ORDER BY prompt_id",
        name,
    )
    if points is not None and not points.empty:
        st.altair_chart(charts.rate_against_pressure(points, chosen.fit), width="stretch")
        if chosen.fit is not None:
            low, high = chosen.fit.slope_interval
            st.write(
                f"P(says X) = σ({chosen.fit.intercept:+.2f} {chosen.fit.slope:+.2f}·P0), slope 95 % [{low:.2f}, {high:.2f}]"
            )
    bins = [
        {"P0": label, "prompts": e.num_prompts, "share that says X": e.mean, "low": e.low, "high": e.high}
        for label, e in zip(BIN_NAMES, chosen.by_bin, strict=True)
        if e is not None
    ]
    if bins:
        st.dataframe(pd.DataFrame(bins), hide_index=True)
elif entry and result:
    st.info("Nothing has been measured yet.")
