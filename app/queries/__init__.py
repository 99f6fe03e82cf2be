"""The app's only door to results: snapshots, read-only, cached by run and by the moment each was published.

Never imports torch, never opens a store, never holds a snapshot open between two draws of a page.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from harness.errors import HarnessError
from harness.run import RunEntry, RunPaths, list_runs
from harness.settings import resolve
from harness.store import Reader
from harness.summary import Summary, summarise


def runs_root() -> Path:
    """The folder of runs, as every command resolves it."""
    return resolve().settings.paths.runs


def runs() -> list[RunEntry]:
    """Every run, newest first; broken ones with their reason."""
    return list_runs(runs_root())


def runs_table() -> pd.DataFrame:
    """One row a run, for a table on a page."""
    return pd.DataFrame([entry.facts() for entry in runs()])


def choose_run() -> RunEntry | None:
    """The run picked in the sidebar, kept in the address; says so on the page where there is none to show."""
    readable = {e.paths.run_id: e for e in runs() if e.manifest is not None}
    if not readable:
        st.info(f"No run in `{runs_root()}` yet. Start one with `harness run`.")
        return None
    wanted = st.query_params.get("run")
    names = list(readable)
    picked = st.sidebar.selectbox("Run", names, index=names.index(wanted) if wanted in readable else 0)
    st.query_params["run"] = picked
    entry = readable[picked]
    if entry.manifest and entry.manifest.get("planted"):
        st.caption(
            "The bundled demo model's answers are planted: this page tests the pipeline and says nothing of language models."
        )
    return entry


def snapshot_age_s(paths: RunPaths) -> float | None:
    """Seconds since the snapshot was published; None where there is none yet."""
    try:
        with Reader(paths.live) as reader:
            return reader.age_s
    except HarnessError:
        return None


def query(paths: RunPaths, sql: str, *params: Any) -> pd.DataFrame | None:
    """Rows of the run's snapshot; None, with the reason on the page, where it cannot be read."""
    try:
        return _query(str(paths.live), _published(paths), sql, params)
    except HarnessError as e:
        st.warning(str(e))
        return None


def summary(paths: RunPaths) -> Summary | None:
    """The run's headline results so far."""
    try:
        return _summary(str(paths.live), _published(paths))
    except HarnessError as e:
        st.warning(str(e))
        return None


def _published(paths: RunPaths) -> float:
    return paths.live.stat().st_mtime if paths.live.exists() else 0.0


@st.cache_data(max_entries=64, show_spinner=False)
def _query(live: str, published: float, sql: str, params: tuple[Any, ...]) -> pd.DataFrame:
    with Reader(Path(live)) as reader:
        return pd.DataFrame(reader.query(sql, list(params)))


@st.cache_data(max_entries=16, show_spinner=False)
def _summary(live: str, published: float) -> Summary:
    with Reader(Path(live)) as reader:
        return summarise(reader)
