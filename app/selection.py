"""What is looked at: a run, and what its experiment's own filters keep of it.

Knows no experiment. One that has filters derives its selection from `Selection`, with their SQL, where its questions
stand, and hands every page the function that draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import streamlit as st

from harness.run import Manifest, RunEntry, RunPaths, state


@dataclass(frozen=True)
class Selection:
    """A run, the whole of it."""

    entry: RunEntry

    @property
    def paths(self) -> RunPaths:
        return self.entry.paths

    @property
    def manifest(self) -> Manifest:
        assert self.entry.manifest is not None, "a broken run is listed, and cannot be chosen"
        return self.entry.manifest

    @property
    def status(self) -> str:
        return state(self.manifest)

    @property
    def is_running(self) -> bool:
        """Whether the numbers still grow."""
        return self.status == "running"


def pick_run(entries: Sequence[RunEntry]) -> RunEntry:
    """Draw the choice of a run; the newest where none, or none of these, was chosen. `entries` are not empty."""
    by_id = {entry.paths.run_id: entry for entry in entries}
    if st.session_state.get("run", "") not in by_id:  # chosen on a page of another experiment
        st.session_state.pop("run", None)
    chosen = st.selectbox("Run", list(by_id), key="run", bind="query-params")
    return by_id[str(chosen)]
