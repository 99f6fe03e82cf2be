"""Every run, and one of them in progress."""

import streamlit as st

from app import queries

st.title("Runs")


@st.fragment(run_every=3.0)
def live() -> None:
    table = queries.runs_table()
    if not table.empty:
        st.dataframe(table, hide_index=True, width="stretch")


live()
entry = queries.choose_run()


@st.fragment(run_every=3.0)
def progress() -> None:
    assert entry is not None
    age = queries.snapshot_age_s(entry.paths)
    st.caption("no snapshot yet" if age is None else f"snapshot {age:.0f} s old")
    stages = queries.query(entry.paths, "SELECT * FROM stages ORDER BY rowid")
    if stages is None or stages.empty:
        st.info("No stage has begun.")
        return
    for row in stages.to_dict("records"):
        done, total = int(row["num_done"]) + int(row["num_failed"]), max(1, int(row["num_items"]))
        failed = f", {row['num_failed']} failed" if row["num_failed"] else ""
        st.progress(
            min(1.0, done / total),
            text=f"{row['stage']}: {done:,} of {row['num_items']:,} items, {row['seconds']:.1f} s{failed}",
        )
    events = queries.query(
        entry.paths,
        "SELECT time, level, stage, item_key, kind, message FROM events WHERE level <> 'info' ORDER BY event_id",
    )
    if events is not None and not events.empty:
        st.subheader("Warnings and failures")
        st.dataframe(events, hide_index=True, width="stretch")


if entry is not None:
    st.subheader(entry.paths.run_id)
    progress()
    with st.expander("Manifest"):
        st.json({k: v for k, v in (entry.manifest or {}).items() if k not in ("packages", "prompts")}, expanded=1)
