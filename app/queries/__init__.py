"""The app's only door to results: snapshots, read-only, cached by run and by the moment each was published.

Never imports torch and never opens a store. A snapshot that is read stays open for the next draw; that hinders nobody,
since a newer one takes its name and not its place. Questions of the core's pages stand in the modules of their names,
those of an experiment in the package of its name; what all ask stands here. SQL stands nowhere else in the app.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from app import experiments
from harness.errors import HarnessError
from harness.experiments.registry import resolve
from harness.experiments.remarks import Remark
from harness.run import Manifest, RunEntry, RunPaths, list_runs, read_manifest
from harness.store import Reader, Schema


def runs_root() -> Path:
    """The folder of runs, as every command resolves it."""
    return resolve(experiment=None).settings.paths.runs


def entries() -> list[RunEntry]:
    """Every run, newest first; broken ones with their reason."""
    return list_runs(runs_root())


def snapshot_age_s(paths: RunPaths) -> float | None:
    """Seconds since the snapshot was published; None where there is none yet."""
    try:
        with open_reader(paths.live) as reader:
            return reader.age_s
    except HarnessError:
        return None


def ask(paths: RunPaths, sql: str, params: Sequence[Any] = ()) -> pd.DataFrame:
    """The rows a question gives, in its columns also where there is none. Raises HarnessError for what cannot be asked:
    no snapshot, or a table that a run of an older schema has not."""
    hashable = tuple(tuple(p) if isinstance(p, list) else p for p in params)
    return _ask(str(paths.live), published(paths), sql, hashable)


def tables(paths: RunPaths) -> frozenset[str]:
    """Tables and views of the run's snapshot; none where there is no snapshot."""
    try:
        return _tables(str(paths.live), published(paths))
    except HarnessError:
        return frozenset()


def problem(paths: RunPaths) -> str | None:
    """Why the run's snapshot is not read; None where it is, or where there is none yet."""
    try:
        _tables(str(paths.live), published(paths))
    except HarnessError as e:
        return str(e) if paths.live.exists() or paths.live.is_symlink() else None
    return None


def has_rows(paths: RunPaths, table: str) -> bool:
    """Whether a table is there and has a row."""
    return table in tables(paths) and not ask(paths, f"SELECT 1 FROM {table} LIMIT 1").empty


def columns(paths: RunPaths, table: str) -> list[str]:
    """Columns a table has in this run's schema; none where there is no such table."""
    return [] if table not in tables(paths) else list(map(str, ask(paths, f"SELECT * FROM {table} LIMIT 0")))


def published(paths: RunPaths) -> float:
    """The moment of the run's snapshot, 0 where there is none: what an answer kept for later depends on."""
    return paths.live.stat().st_mtime if paths.live.exists() else 0.0


def open_reader(live: Path) -> Reader:
    """A reader of a snapshot, as every question of the app is asked. Raises HarnessError where its experiment is not there."""
    return Reader(live, schema_of(live))


def schema_of(live: Path) -> Schema:
    """The tables that a snapshot should have, by what its run's manifest says it is."""
    return experiments.schema_of(read_manifest(RunPaths(live.parent)))


class _Shared:
    """A snapshot that all draws of its moment read, one question at a time: opening one takes longer than most answers."""

    def __init__(self, live: str):
        self._reader = open_reader(Path(live))
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
def _tables(live: str, published: float) -> frozenset[str]:
    return _shared(live, published).tables()


def remarks(entry: RunEntry) -> list[Remark]:
    """What a run should say of itself; nothing where it has no snapshot that can be read."""
    if entry.manifest is None:
        return []
    try:
        return _remarks(str(entry.paths.live), published(entry.paths), entry.manifest)
    except HarnessError:
        return []


@st.cache_data(max_entries=64, show_spinner=False)
def _remarks(live: str, published: float, _manifest: Manifest) -> list[Remark]:
    with open_reader(Path(live)) as reader:
        return experiments.remarks_of(reader, _manifest)
