"""What a batch may leave beside rows: artifacts, and rows that take the place of older ones."""

import errno
import hashlib
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import files
from harness.engine import Artifact, BatchOutput, Item, ItemResult, staging
from harness.errors import EnvironmentFault
from harness.files import file_sha256
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Store
from tests.fakes import Fake, events_of, rows_of, run_stages, same_lengths, score, scored


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
    left = {p.name for p in RunPaths(tmp_path / "killed").artifacts.rglob("*.bin")}
    assert len(left) == 4, "two batches of two wrote theirs"
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


def test_files_are_durable_then_named_then_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a power cut at any moment at most a file without a row is left: bytes first, names second, rows last."""
    done: list[tuple[str, str]] = []
    sync, replaced, sync_folder = files._sync, Path.replace, staging.sync_folder

    def named(path: Path, target: Path) -> Path:
        if target.suffix == ".bin":
            done.append(("named", target.name))
        return replaced(path, target)

    class Telling(Store):
        def commit(self, batch: Batch, result: BatchResult) -> None:
            done.append(("row", "artifacts"))
            super().commit(batch, result)

    monkeypatch.setattr(files, "_sync", lambda path: (done.append(("durable", path.name)), sync(path)))
    monkeypatch.setattr(staging, "sync_folder", lambda path: (done.append(("folder", path.name)), sync_folder(path)))
    monkeypatch.setattr(Path, "replace", named)
    run_stages(tmp_path, Fake({f"k00{n}": 1.0 for n in (0, 2, 3)}, with_files), open_store=Telling)
    told = [step for step in done if step[1].endswith(".bin") or step in (("row", "artifacts"), ("folder", "kind"))]
    names = {f"k00{n}.bin" for n in (0, 2, 3)}
    assert {name for what, name in told[:3]} == names
    assert [what for what, _ in told] == [*["durable"] * 3, *["named"] * 3, "folder", "row"]


@pytest.mark.parametrize("num", [1, 5])
def test_a_disk_that_fails_while_files_are_made_durable_ends_the_run_by_their_name(
    num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(number: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").endswith("k000.bin"):
            raise OSError(errno.EIO, "Input/output error")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EnvironmentFault, match=r"the disk fails .*k000\.bin"):
        run_stages(tmp_path, Fake({f"k00{2 * n}": 1.0 for n in range(num)}, with_files))
    assert rows_of(tmp_path, "artifacts") == []


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


# -- files of a batch, staged and streamed


def shard(items: Sequence[Item], size: int = 1_000) -> Artifact:
    """One file for the whole batch, named by its items and written piece by piece."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for n in range(size):
                file.write(bytes([n % 251]) * 1_000)

    return Artifact(f"shards/{items[0].key}.bin", {"condition": "baseline"}, "shard", (size, 1_000), "uint8", write)


def test_a_file_of_a_batch_is_streamed_to_disk_and_claimed_with_its_rows(tmp_path: Path) -> None:
    """A hundred megabytes by a function that writes them: the most memory that Python takes is a small part of that.
    Control: the same as bytes takes all of it."""

    def streamed(items: Sequence[Item]) -> BatchOutput:
        return BatchOutput(scored(items), (shard(items, 100_000),))

    def whole(items: Sequence[Item]) -> BatchOutput:
        return BatchOutput(scored(items), (replace(shard(items), content=bytes(100_000_000)),))

    peaks = {}
    for name, compute in (("streamed", streamed), ("whole", whole)):
        tracemalloc.start()
        run_stages(tmp_path / name, Fake(same_lengths(2), compute))
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        (row,) = rows_of(tmp_path / name, "artifacts")
        written = RunPaths(tmp_path / name).artifacts / row["path"]
        assert (row["sha256"], row["bytes"]) == (file_sha256(written), 100_000_000)
        assert (row["kind"], row["prompt_id"], row["condition"]) == ("shard", None, "baseline")
        assert not RunPaths(tmp_path / name).staged.exists(), "nothing is left aside"
    assert peaks["streamed"] < 20_000_000
    assert 100_000_000 < peaks["whole"] < 150_000_000, "once, not twice"


def test_a_file_of_a_batch_that_fails_is_dropped_with_a_reason(tmp_path: Path) -> None:
    def nan(items: Sequence[Item]) -> BatchOutput:
        row = {"prompt_id": items[0].key, "condition": "baseline", "p_sem": float("nan")}
        return BatchOutput([ItemResult(i.key, {"psem": [row]}) for i in items], (shard(items, 1),))

    run_stages(tmp_path, Fake(same_lengths(2), nan))
    assert rows_of(tmp_path, "artifacts") == []
    assert list(RunPaths(tmp_path).artifacts.rglob("*.bin")) == []
    (why,) = events_of(tmp_path, "dropped_file").values()
    assert why == "shards/k000.bin: all 2 items failed"


def test_a_file_of_an_item_that_fails_is_dropped_with_a_reason(tmp_path: Path) -> None:
    run_stages(tmp_path, Fake(same_lengths(3), with_files))
    told = events_of(tmp_path, "dropped_file")
    assert list(told) == ["k001"]
    assert "kind/k001.bin: psem.p_sem is not finite" in told["k001"]


class DiesWhileStaged(Store):
    """Killed when the files of the second batch are written aside and nothing is claimed."""

    def event(self, *args: Any, **kwargs: Any) -> None:
        raise Killed


def test_what_a_dead_run_left_aside_is_swept_and_no_claim_is_made_of_it(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_stages(tmp_path, Fake(same_lengths(3), with_files), open_store=DiesWhileStaged)
    paths = RunPaths(tmp_path)
    assert len(list(paths.staged.rglob("*.bin"))) > 0
    assert rows_of(tmp_path, "artifacts") == []
    run_stages(tmp_path, Fake(same_lengths(3), with_files))
    assert not paths.staged.exists()
    assert "files of batches that were killed" in events_of(tmp_path, "swept_files")[None]
    assert {r["path"] for r in rows_of(tmp_path, "artifacts")} == {"kind/k000.bin", "kind/k002.bin"}


def test_files_count_where_room_on_the_disk_is_asked_for(tmp_path: Path) -> None:
    """Control: rows alone would fit."""

    class Large(Fake):
        file_bytes = 10**15

    with pytest.raises(EnvironmentFault, match="stage scores needs about"):
        run_stages(tmp_path, Large(same_lengths(1)))
    run_stages(tmp_path, Fake(same_lengths(1)))


@pytest.mark.parametrize("path", ["../outside.bin", "/outside.bin", ""])
def test_a_file_cannot_be_named_out_of_its_folder(tmp_path: Path, path: str) -> None:
    def outside(items: Sequence[Item]) -> BatchOutput:
        return BatchOutput(scored(items), (replace(shard(items, 1), path=path),))

    run_stages(tmp_path, Fake(same_lengths(1), outside))
    assert "leads out of its folder" in events_of(tmp_path, "failed_item")["k000"]
