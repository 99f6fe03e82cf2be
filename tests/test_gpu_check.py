"""The check of a GPU machine: a step that fails is a row and the others are still made; all of it, tried on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import gpu_check
from tests.gpu_check import ROOT, Row, Step, check


def said(output: str) -> tuple[str, dict[str, Any]]:
    return f"{len(output)} characters", {"characters": len(output)}


def lost(output: str) -> tuple[str, dict[str, Any]]:
    raise FileNotFoundError("no file was written")


@pytest.mark.thorough
def test_a_step_that_fails_or_leaves_nothing_is_a_row_and_the_next_one_is_made() -> None:
    shown: list[Row] = []
    rows = check(
        [Step("refused", ("bench", "--shape", "huge"), said), Step("empty", ("--help",), lost),
         Step("lacking", ("--help",), said, lacks="no such file"), Step("fine", ("--help",), said)],
        deadline=100.0, clock=lambda: 0.0, show=shown.append,
    )  # fmt: skip
    assert rows == shown
    assert [(r.step, r.verdict, r.exit) for r in rows] == [
        ("refused", "FAIL", 2), ("empty", "FAIL", 0), ("lacking", "skip", None), ("fine", "ok", 0)
    ]  # fmt: skip
    assert "no shape 'huge'" in rows[0].finding
    assert rows[1].finding == "FileNotFoundError: no file was written"
    assert rows[2].finding == "no such file"
    assert rows[3].numbers["characters"] > 0


def test_nothing_begins_after_the_deadline_and_nothing_runs_past_it() -> None:
    times: Iterator[float] = iter([0.0, 0.0, 0.4, 700.0])
    rows = check(
        [Step("long", ("run",), said), Step("late", ("--help",), said)],
        deadline=0.5, clock=lambda: next(times), show=lambda _: None,
    )  # fmt: skip
    assert [(r.step, r.verdict) for r in rows] == [("long", "FAIL"), ("late", "skip")]
    assert rows[0].finding.startswith("not done after")
    assert "no time was left" in rows[1].finding


def test_a_run_that_had_memory_enough_has_shown_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"splits": 0, "seconds": 1.0, "peak_bytes": 0}
    whole = {"stages": {"samples": stage}, "num_failed": 0}
    monkeypatch.setattr(gpu_check, "_of_run", lambda _: ("told", whole))
    with pytest.raises(AssertionError, match="expected batches that ran out of memory"):
        gpu_check._of_cramped(tmp_path)
    stage["splits"] = 2
    assert "samples 2 times" in gpu_check._of_cramped(tmp_path)[0]


@pytest.mark.thorough
def test_all_of_it_can_be_tried_without_a_gpu(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "tests.gpu_check", "--cpu", "--json", str(told), "--model", "random:tiny-qwen3"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False
    )
    found = json.loads(told.read_text())
    assert {r["step"]: r["verdict"] for r in found["steps"]} == dict.fromkeys(
        ("doctor", "sanity", "memory", "demo", "bench-small", "real", "bench-large"), "ok"
    ), found  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    by_step = {r["step"]: r for r in found["steps"]}
    assert sum(s["splits"] for s in by_step["memory"]["numbers"]["stages"].values()) > 0
    assert by_step["memory"]["numbers"]["num_failed"] == 0
    assert by_step["bench-small"]["numbers"]["about"]["dtype"] == "bfloat16"
    assert {"torch", "transformers", "device", "commit"} <= found["about"].keys()
    assert all(name in done.stdout for name in by_step)
