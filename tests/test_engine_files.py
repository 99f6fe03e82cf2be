"""What a batch may leave beside rows: artifacts, and rows that take the place of older ones."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.engine.executors import Artifact, Item, ItemResult
from harness.errors import EnvironmentFault
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Store
from tests.fakes import Fake, events_of, rows_of, run_stages, same_lengths, score


def content(key: str) -> bytes:
    return f"{key}: {score(key)}".encode() * 100


def with_files(items: Sequence[Item]) -> list[ItemResult]:
    """A row and a file an item; k001 gives NaN, so it fails."""
    return [
        ItemResult(
            i.key, {"psem": [{"prompt_id": i.key, "condition": "baseline", "p_sem": float("nan") if i.key == "k001" else 0.5}]},
            artifacts=(Artifact(f"kind/{i.key}.bin", {"prompt_id": i.key, "condition": "baseline"}, "kind", (2, 3), "float32",
                                content(i.key)),),
        )
        for i in items
    ]  # fmt: skip


def test_a_file_is_on_disk_whole_and_its_row_tells_its_hash(tmp_path: Path) -> None:
    run_stages(tmp_path, Fake(same_lengths(3), with_files))
    rows = {r["path"]: r for r in rows_of(tmp_path, "artifacts")}
    assert set(rows) == {"kind/k000.bin", "kind/k002.bin"}
    for key in ("k000", "k002"):
        row, written = rows[f"kind/{key}.bin"], (RunPaths(tmp_path).artifacts / f"kind/{key}.bin").read_bytes()
        assert written == content(key)
        assert (row["sha256"], row["bytes"]) == (hashlib.sha256(written).hexdigest(), len(written))
        assert (row["shape"], row["dtype"], row["prompt_id"], row["condition"]) == ([2, 3], "float32", key, "baseline")


def test_a_failed_item_leaves_neither_file_nor_row(tmp_path: Path) -> None:
    run_stages(tmp_path, Fake(same_lengths(3), with_files))
    assert set(events_of(tmp_path, "failed_item")) == {"k001"}
    assert not (RunPaths(tmp_path).artifacts / "kind/k001.bin").exists()
    assert not list(RunPaths(tmp_path).artifacts.rglob("*.tmp"))


class Killed(BaseException):
    """Stands for SIGKILL."""


class DiesOnCommit(Store):
    """Killed once the files of the second batch are on disk, before their rows are."""

    def commit(self, batch: Batch, result: BatchResult) -> None:
        if batch.batch_id == 1:
            raise Killed
        super().commit(batch, result)


def test_a_kill_between_file_and_row_claims_nothing_and_a_resume_ends_the_same(tmp_path: Path) -> None:
    stage = Fake({f"k{i}": 20.0 for i in range(6)}, with_files)
    with pytest.raises(Killed):
        run_stages(tmp_path / "killed", stage, open_store=DiesOnCommit)
    files = {p.name for p in RunPaths(tmp_path / "killed").artifacts.rglob("*.bin")}
    assert len(files) == 4, "two batches of two wrote theirs"
    assert len(rows_of(tmp_path / "killed", "artifacts")) == 2, "one of them was committed"
    run_stages(tmp_path / "killed", stage)
    run_stages(tmp_path / "whole", stage)
    assert rows_of(tmp_path / "killed", "artifacts") == rows_of(tmp_path / "whole", "artifacts")
    assert len(rows_of(tmp_path / "whole", "artifacts")) == 6


def test_a_file_that_cannot_be_written_stops_the_run_cleanly_before_its_rows(tmp_path: Path) -> None:
    RunPaths(tmp_path).artifacts.write_text("in the way")
    with pytest.raises(EnvironmentFault, match="artifacts"):
        run_stages(tmp_path, Fake(same_lengths(1), with_files))
    assert rows_of(tmp_path, "artifacts") == rows_of(tmp_path, "psem") == []


def derived(value: float, version: str) -> Fake:
    """A stage whose only item is named by what it rests on, and whose row takes the place of the last one."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        row: dict[str, Any] = {
            "analysis": "rates", "condition": "negative", "measured": "", "step_kind": "", "measure": version,
            "grouping": "all", "patch": "", "layer": -1, "head": -1, "value": value,
        }  # fmt: skip
        return [ItemResult(i.key, {"statistics": [row]}, replaces={"statistics": {"analysis": "rates"}}) for i in items]

    return Fake({f"rates|{version}": 1.0}, compute)


def test_rows_that_rest_on_what_was_measured_again_are_replaced(tmp_path: Path) -> None:
    run_stages(tmp_path, derived(0.25, "a"))
    run_stages(tmp_path, derived(0.25, "a"))
    (row,) = rows_of(tmp_path, "statistics")
    assert (row["measure"], row["value"]) == ("a", 0.25)
    (report,) = run_stages(tmp_path, derived(0.5, "b"))
    (row,) = rows_of(tmp_path, "statistics")
    assert (row["measure"], row["value"]) == ("b", 0.5), "the older row is gone, though its key is another"
    (stage,) = rows_of(tmp_path, "stages")
    assert (stage["num_items"], stage["num_done"], report.num_items) == (1, 1, 1), (
        "an item that is no more is not counted"
    )


def test_an_item_that_is_no_more_when_its_batch_comes_is_dropped_and_said_so(tmp_path: Path) -> None:
    """A stage planned and killed, whose items change before the resume (an earlier stage was retried)."""
    planned = Fake({"gone": 30.0, "kept": 30.0}, lambda items: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run_stages(tmp_path, planned)
    run_stages(tmp_path, Fake({"kept": 30.0}))
    assert [r["prompt_id"] for r in rows_of(tmp_path, "psem")] == ["kept"]
    assert set(events_of(tmp_path, "dropped_item")) == {"gone"}
    assert events_of(tmp_path, "failed_item") == {}
    (stage,) = rows_of(tmp_path, "stages")
    assert (stage["status"], stage["num_items"], stage["num_done"]) == ("done", 1, 1)


def test_a_failure_of_an_item_that_is_no_more_does_not_stay_for_good(tmp_path: Path) -> None:
    def fails(items: Sequence[Item]) -> list[ItemResult]:
        return [ItemResult.failed(i.key, "no room in the lens") for i in items]

    (report,) = run_stages(tmp_path, Fake({"rates|a": 1.0}, fails))
    assert (report.status, report.num_failed) == ("failed", 1)
    (report,) = run_stages(tmp_path, Fake({"rates|b": 1.0}))
    assert (report.status, report.num_failed) == ("done", 0)
