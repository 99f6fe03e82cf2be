"""The app's only door to results: snapshots, read-only, cached by run and by the moment each was published.

Never imports torch and never opens a store. A snapshot that is read stays open for the next draw; that hinders nobody,
since a newer one takes its name and not its place. Each page's own questions stand in the module of its name; what
several ask stands here.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from harness.errors import HarnessError
from harness.experiments.gravity.remarks import Remark, remarks_of
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunEntry, RunPaths, list_runs
from harness.settings import resolve
from harness.store import Reader


def runs_root() -> Path:
    """The folder of runs, as every command resolves it."""
    return resolve().settings.paths.runs


def entries() -> list[RunEntry]:
    """Every run, newest first; broken ones with their reason."""
    return list_runs(runs_root())


def snapshot_age_s(paths: RunPaths) -> float | None:
    """Seconds since the snapshot was published; None where there is none yet."""
    try:
        with Reader(paths.live, SCHEMA) as reader:
            return reader.age_s
    except HarnessError:
        return None


def ask(paths: RunPaths, sql: str, params: Sequence[Any] = ()) -> pd.DataFrame:
    """The rows a question gives, in its columns also where there is none. Raises HarnessError for what cannot be asked:
    no snapshot, or a table that a run of an older schema has not."""
    hashable = tuple(tuple(p) if isinstance(p, list) else p for p in params)
    return _ask(str(paths.live), _published(paths), sql, hashable)


def tables(paths: RunPaths) -> frozenset[str]:
    """Tables and views of the run's snapshot; none where there is no snapshot."""
    try:
        return _tables(str(paths.live), _published(paths))
    except HarnessError:
        return frozenset()


def problem(paths: RunPaths) -> str | None:
    """Why the run's snapshot is not read; None where it is, or where there is none yet."""
    try:
        _tables(str(paths.live), _published(paths))
    except HarnessError as e:
        return str(e) if paths.live.exists() or paths.live.is_symlink() else None
    return None


def conditions(paths: RunPaths) -> list[str]:
    """The run's conditions, baseline first."""
    if "contexts" not in tables(paths):
        return []
    rows = ask(paths, "SELECT DISTINCT condition FROM contexts ORDER BY condition <> 'baseline', condition")
    return list(rows["condition"])


def prompts(paths: RunPaths) -> pd.DataFrame:
    """prompt_id, category, question, target of every prompt, by id."""
    return ask(paths, "SELECT prompt_id, category, question, target FROM prompts ORDER BY prompt_id")


def outcomes(paths: RunPaths, condition: str) -> pd.DataFrame:
    """prompt_id, outcome and taxonomy under a condition."""
    return ask(
        paths, "SELECT prompt_id, outcome, taxonomy FROM outcomes WHERE condition = ? ORDER BY prompt_id", [condition]
    )


def token_texts(paths: RunPaths, token_ids: Sequence[int]) -> dict[int, str]:
    """The text of each of these ids; ids the run does not know are shown by number."""
    wanted = sorted(set(map(int, token_ids)))
    if "vocabulary" not in tables(paths):
        return {n: f"[{n}]" for n in wanted}
    rows = ask(paths, "SELECT token_id, text FROM vocabulary WHERE list_contains(?, token_id)", [wanted])
    return {n: f"[{n}]" for n in wanted} | dict(zip(rows["token_id"], rows["text"], strict=True))


def remarks(paths: RunPaths, manifest: Mapping[str, Any]) -> list[Remark]:
    """What the run should say of itself, as its snapshot stands; nothing where there is none."""
    try:
        return _remarks(str(paths.live), _published(paths), manifest)
    except HarnessError:
        return []


def _published(paths: RunPaths) -> float:
    return paths.live.stat().st_mtime if paths.live.exists() else 0.0


class _Shared:
    """A snapshot that all draws of its moment read, one question at a time: opening one takes longer than most answers."""

    def __init__(self, live: str):
        self._reader = Reader(Path(live), SCHEMA)
        self._lock = threading.Lock()

    def frame(self, sql: str, params: Sequence[Any]) -> pd.DataFrame:
        with self._lock:
            return self._reader.frame(sql, params)

    def tables(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._reader.tables())

    def __del__(self) -> None:  # the last draw that used it is over
        if hasattr(self, "_reader"):
            self._reader.close()


@st.cache_resource(max_entries=2, ttl=600, show_spinner=False)
def _shared(live: str, published: float) -> _Shared:
    return _Shared(live)


@st.cache_data(max_entries=256, show_spinner=False)
def _ask(live: str, published: float, sql: str, params: tuple[Any, ...]) -> pd.DataFrame:
    return _shared(live, published).frame(sql, [list(p) if isinstance(p, tuple) else p for p in params])


@st.cache_data(max_entries=64, show_spinner=False)
def _remarks(live: str, published: float, _manifest: Mapping[str, Any]) -> list[Remark]:
    with Reader(Path(live), SCHEMA) as reader:
        return remarks_of(reader, _manifest)


@st.cache_data(max_entries=64, show_spinner=False)
def _tables(live: str, published: float) -> frozenset[str]:
    return _shared(live, published).tables()
