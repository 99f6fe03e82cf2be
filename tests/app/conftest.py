"""Runs for the app to show: a finished, a broken, an empty, a running, a failed and one of an older schema."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from streamlit.testing.v1 import AppTest

from app.experiments import CORE, Page, pages_of
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Store
from tests import gravity
from tests.fakes import older_store
from tests.gravity import resolve

OLDER = "20200103-000000-older-00000000"
RUNNING = "20200104-000000-running-00000000"
FAILED = "20200105-000000-failed-00000000"
EMPTY = "20200102-000000-empty-00000000"
BROKEN = "20200101-000000-broken-00000000"


PAGES: dict[str, Page] = {page.name: page for page in (*CORE, *pages_of("gravity"))}
"""The pages of these runs, by address."""


def page_file(name: str) -> Path:
    """The file of the page at an address."""
    return PAGES[name].file


def open_view(name: str, **params: str) -> AppTest:
    """A page of the app as it opens at an address."""
    return open_file(page_file(name), **params)


def open_file(file: Path, **params: str | list[str]) -> AppTest:
    """The same for a page in a file."""
    test = AppTest.from_file(str(file), default_timeout=60)
    for key, value in params.items():
        test.query_params[key] = value
    return test.run()


def store_of(folder: Path, fill: Callable[[Store], Any]) -> RunPaths:
    """A published snapshot with what `fill` puts in its store."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir()
    paths.manifest.write_text('{"run_id": "x", "fingerprint": "0", "status": "finished"}')
    with Store(paths.results, SCHEMA) as store:
        fill(store)
        store.publish(paths.live)
    return paths


AHEAD = (datetime.now(UTC) + timedelta(days=1)).isoformat()
"""A heartbeat that does not go stale while a busy machine takes its time."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; the newest is finished and whole."""
    root = tmp_path_factory.mktemp("app") / "runs"
    flags = {"data.limit": "15", "gravity.num_samples": "4", "paths.runs": str(root), "runtime.device": "cpu"}
    assert gravity.run(resolve(flags, environ={})) == 0
    (whole,) = root.iterdir()
    (root / BROKEN).mkdir()
    (root / BROKEN / "manifest.json").write_text("{ torn")
    _stub(root / EMPTY, status="running", heartbeat="2020-01-02T00:00:00+00:00")
    _stub(root / OLDER, status="finished")
    _older_schema(root / OLDER / "live.duckdb")
    for name, told in ((RUNNING, {"status": "running", "heartbeat": AHEAD, "ended": None}),
                       (FAILED, {"status": "failed", "reason": "EnvironmentFault: the disk is full"})):  # fmt: skip
        shutil.copytree(whole, root / name)
        manifest = json.loads((whole / "manifest.json").read_text()) | {"run_id": name} | told
        (root / name / "manifest.json").write_text(json.dumps(manifest))
        with duckdb.connect(str(root / name / "live.duckdb")) as con:  # as far as it came
            for table in ("patching", "statistics", "activations"):
                con.execute(f"DELETE FROM {table}")
            con.execute("UPDATE stages SET status = 'running', num_done = 3 WHERE stage = 'mechanism'")
    return root


@pytest.fixture
def opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the folder of runs of this process."""
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    return root


def _stub(folder: Path, **told: str) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"run_id": folder.name, "fingerprint": "0", **told}))


def _older_schema(live: Path) -> None:
    """A store of the first schema: no vocabulary, no statistics, no certificate, fewer columns and views."""
    older_store(live, 1)
    with duckdb.connect(str(live)) as con:
        con.execute(
            "INSERT INTO prompts (prompt_id, category, question, target) VALUES ('a', 'facts', 'Which?', 'word')"
        )
        con.execute("INSERT INTO contexts (prompt_id, condition, text, token_ids) VALUES ('a', 'baseline', 'Which?', [1, 2]), "
                    "('a', 'negative', 'Not. Which?', [3, 1, 2])")  # fmt: skip
        con.execute(
            "INSERT INTO psem (prompt_id, condition, p_sem, p_word) VALUES ('a', 'baseline', .5, .5), ('a', 'negative', .2, .2)"
        )
        con.execute("INSERT INTO stages VALUES ('psem', 1, 'done', 2, 2, 0, 1.0, 10)")
