"""Stages whose batches rest on one another: the same rows and the same state, whatever happens in between."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest

from harness.engine import Artifact, BatchOutput, Engine, FileHandle, Item, ItemResult, Limits
from harness.engine.executors import Host, Outcome
from harness.engine.stage import Keeps, Kind
from harness.engine.stop import StopSignal
from harness.errors import RunError, Stopped
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Store
from tests.cases import some_of
from tests.fakes import Fake, Watcher, events_of, measured, plan_of, rows_of, run_stages, score, scored


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it, and nothing after it is written."""


Check = Callable[[Sequence[Item]], None]


def nothing(items: Sequence[Item]) -> None:
    pass


@dataclass(frozen=True)
class Chained:
    """The state is a number that depends on the order of the items, and on which of them worked."""

    lengths: Mapping[str, float]
    kind: Kind = "fold"
    keeps: Keeps = "last"
    bad: Sequence[str] = ()
    """Items that fail, as the stage says itself."""
    check: Check = nothing
    name: str = "chained"
    version: int = 1
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    row_bytes: int = 1_000

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Any) -> list[Item]:
        return [Item(key, length) for key, length in self.lengths.items()]

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item], before: FileHandle | None) -> BatchOutput:
        self.check(items)
        value, seen = json.loads(before.check().read_bytes()) if before else (0.0, 0)
        results = scored(items)
        for n, item in enumerate(items):
            if item.key in self.bad:
                results[n] = ItemResult.failed(item.key, "bad")
            else:
                value, seen = 0.5 * value + score(item.key), seen + 1
        state = json.dumps([value, seen]).encode()
        return BatchOutput(results, state=Artifact("state.json", {}, "state", (2,), "json", state))


MIXED = {f"k{i:03d}": float(3 + (7 * i) % 23) for i in range(10)}


def states(folder: Path) -> dict[str, bytes]:
    """Files of the run by name, as they are on disk."""
    root = RunPaths(folder).artifacts
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def last_state(folder: Path) -> list[float]:
    return json.loads(list(states(folder).values())[-1])


def dying(call: int) -> Check:
    calls: list[int] = []

    def check(items: Sequence[Item]) -> None:
        if len(calls) == call:
            raise Killed
        calls.append(1)

    return check


class DiesOnCommit(Store):
    """Killed once the state of a batch lies in its place, before the row that tells of it."""

    at = 0

    def commit(self, batch: Batch, result: BatchResult) -> None:
        if batch.batch_id == self.at:
            raise Killed
        super().commit(batch, result)


class DiesAfterCommit(Store):
    """Killed with the rows of a batch in the store, before the state that it made needless is gone."""

    at = 0

    def commit(self, batch: Batch, result: BatchResult) -> None:
        super().commit(batch, result)
        if batch.batch_id == self.at:
            raise Killed


def too_many(most: int) -> Check:
    def check(items: Sequence[Item]) -> None:
        if len(items) > most:
            raise MemoryError

    return check


@pytest.mark.parametrize("keeps", some_of(["all", "last"], 1))
def test_a_fold_killed_at_every_batch_ends_with_the_same_rows_and_the_same_state(tmp_path: Path, keeps: Keeps) -> None:
    """Before it is computed, before its commit, and after it. Control: batches in another order give another state."""
    stage = Chained(MIXED, keeps=keeps)
    run_stages(tmp_path / "whole", stage)
    rows, files, plan = measured(tmp_path / "whole"), states(tmp_path / "whole"), plan_of(tmp_path / "whole")
    assert len(files) == (1 if keeps == "last" else len(plan))
    assert last_state(tmp_path / "whole")[1] == 10
    for call in range(len(plan)):
        before, after = type("B", (DiesOnCommit,), {"at": call}), type("A", (DiesAfterCommit,), {"at": call})
        for n, (killed, open_store) in enumerate(
            [(replace(stage, check=dying(call)), Store), (stage, before), (stage, after)]
        ):
            folder = tmp_path / f"{call} {n}"
            with pytest.raises(Killed):
                run_stages(folder, killed, open_store=open_store)
            run_stages(folder, stage)
            assert (measured(folder), states(folder), plan_of(folder)) == (rows, files, plan)
    run_stages(tmp_path / "other", replace(stage, lengths={key: 30 - length for key, length in MIXED.items()}))
    assert last_state(tmp_path / "other") != last_state(tmp_path / "whole")


def test_a_batch_that_is_split_keeps_its_place_in_the_fold(tmp_path: Path) -> None:
    """Four items fit where batches of up to thirteen are planned: the same order of items, so the same state."""
    run_stages(tmp_path / "whole", Chained(MIXED))
    run_stages(tmp_path / "split", Chained(MIXED, check=too_many(2)))
    assert any(b["status"] == "split" for b in rows_of(tmp_path / "split", "batches"))
    assert last_state(tmp_path / "split") == last_state(tmp_path / "whole")


def test_an_item_that_fails_adds_nothing_to_the_state_however_it_fails(tmp_path: Path) -> None:
    """Said by the stage, raised, or a number that is not finite, which the stage has taken in already."""

    def raising(items: Sequence[Item]) -> None:
        if any(i.key == "k007" for i in items):
            raise ValueError("bad")

    class NotFinite(Chained):
        def run(self, context: None, items: Sequence[Item], before: FileHandle | None) -> BatchOutput:
            output = super().run(context, items, before)
            spoiled = [
                replace(r, rows={"psem": [r.rows["psem"][0] | {"p_sem": float("nan")}]}) if r.key == "k007" else r
                for r in output.results
            ]
            return replace(output, results=spoiled)

    without = {key: length for key, length in MIXED.items() if key != "k007"}
    run_stages(tmp_path / "without", Chained(without))
    stages = {"said": Chained(MIXED, bad=["k007"]), "raised": Chained(MIXED, check=raising), "nan": NotFinite(MIXED)}
    for name, stage in stages.items():
        (report,) = run_stages(tmp_path / name, stage)
        assert (report.num_failed, list(events_of(tmp_path / name, "failed_item"))) == (1, ["k007"])
        assert last_state(tmp_path / name) == last_state(tmp_path / "without"), name
        assert [r["prompt_id"] for r in rows_of(tmp_path / name, "psem")] == sorted(without)
    run_stages(tmp_path / "with", Chained(MIXED))
    assert last_state(tmp_path / "with") != last_state(tmp_path / "without")


def test_an_executor_that_takes_several_jobs_gets_those_of_a_fold_one_by_one(tmp_path: Path) -> None:
    """Control: of a map it gets three at a time."""
    taken: list[int] = []

    class Greedy:
        accelerator = Host()

        def map(self, setup: Any, work: Any, jobs: Any) -> Any:
            context = setup()
            while some := list(takewhile(lambda job: job is not None, islice(jobs, 3))):
                taken.append(len(some))
                for job in reversed(some):
                    yield Outcome(job.token, (done := work(context, job)).results, files=done.files)

    def run(folder: Path, stage: Any) -> None:
        folder.mkdir()
        paths = RunPaths(folder)
        with Store(paths.results, SCHEMA) as store:
            Engine(store, paths, Greedy(), Limits(40, 0), Watcher(), StopSignal()).run([stage], lambda report: None)

    run(tmp_path / "fold", Chained(MIXED))
    assert set(taken) == {1}
    run_stages(tmp_path / "inline", Chained(MIXED))
    assert states(tmp_path / "fold") == states(tmp_path / "inline")
    run(tmp_path / "map", Fake(MIXED))
    assert 3 in taken


def test_a_state_that_was_changed_is_refused_by_name(tmp_path: Path) -> None:
    stage = Chained(MIXED)
    with pytest.raises(Killed):
        run_stages(tmp_path, replace(stage, check=dying(2)))
    (path,) = RunPaths(tmp_path).artifacts.rglob("state.json")
    kept = path.read_bytes()
    path.write_bytes(kept[:-3] + bytes([kept[-3] ^ 1]) + kept[-2:])
    with pytest.raises(RunError, match=r"state-000001/state\.json: not the file that was measured"):
        run_stages(tmp_path, stage)
    assert events_of(tmp_path, "failed_item") == {}, "no item is blamed for it"
    path.write_bytes(kept)
    run_stages(tmp_path, stage)
    run_stages(tmp_path / "whole", stage)
    assert states(tmp_path) == states(tmp_path / "whole")


def test_items_that_a_fold_has_taken_in_and_that_are_no_more_are_told_of(tmp_path: Path) -> None:
    run_stages(tmp_path, Chained(MIXED))
    assert events_of(tmp_path, "stale_state") == {}
    run_stages(tmp_path, Chained({key: length for key, length in MIXED.items() if key != "k007"}))
    assert "k007" in events_of(tmp_path, "stale_state")[None]


# -- loops

STEPS = {f"step {n}": float(length) for n, length in enumerate([5, 30, 10, 20, 1, 8])}
"""In an order that is not that of their lengths."""


@pytest.mark.thorough
def test_a_loop_takes_items_in_their_order_one_by_one_and_ends_the_same_after_any_kill(tmp_path: Path) -> None:
    stage = Chained(STEPS, "loop", "all")
    run_stages(tmp_path / "whole", stage, max_tokens=1_000)
    assert [b["keys"] for b in rows_of(tmp_path / "whole", "batches")] == [[key] for key in STEPS]
    rows, files = measured(tmp_path / "whole"), states(tmp_path / "whole")
    assert [json.loads(state)[1] for state in files.values()] == [1, 2, 3, 4, 5, 6], "each rests on the one before"
    for call in range(len(STEPS)):
        with pytest.raises(Killed):
            run_stages(tmp_path / str(call), replace(stage, check=dying(call)))
        run_stages(tmp_path / str(call), stage)
        assert (measured(tmp_path / str(call)), states(tmp_path / str(call))) == (rows, files)
    # Control: another order is another state.
    run_stages(tmp_path / "other", replace(stage, lengths=dict(reversed(STEPS.items()))))
    assert last_state(tmp_path / "other") != last_state(tmp_path / "whole")


@pytest.mark.parametrize("how", some_of(["said", "raised", "memory"], 1))
def test_a_failed_item_ends_a_loop_and_a_retry_goes_on_from_there(tmp_path: Path, how: str) -> None:
    tried: list[str] = []

    def check(items: Sequence[Item]) -> None:
        tried.extend(i.key for i in items)
        if items[0].key == "step 2" and how != "said":
            raise MemoryError if how == "memory" else ValueError("diverged")

    stage = Chained(STEPS, "loop", bad=["step 2"] if how == "said" else [], check=check)
    (report,) = run_stages(tmp_path, stage)
    assert tried == ["step 0", "step 1", "step 2"]
    assert (report.status, report.num_items, report.num_failed, report.num_untried) == ("failed", 6, 1, 3)
    assert "3 items after it were not tried" in events_of(tmp_path, "chain_ended")["step 2"]
    tried.clear()
    (report,) = run_stages(tmp_path, stage)  # without --retry-failed it is left alone
    assert (tried, report.status, report.num_untried) == ([], "failed", 3)
    assert len(rows_of(tmp_path, "psem")) == 2
    (report,) = run_stages(tmp_path, stage, retry_failed=True)  # fails once more
    assert (tried, report.num_untried) == (["step 2"], 3)

    with pytest.raises(Killed):  # mended, killed, and gone on with
        run_stages(tmp_path, replace(stage, bad=[], check=dying(2)), retry_failed=True)
    (report,) = run_stages(tmp_path, replace(stage, bad=[], check=nothing))
    assert (report.status, report.num_failed, report.num_untried, report.retried) == ("done", 0, 0, 2)
    run_stages(tmp_path / "whole", Chained(STEPS, "loop"))
    assert last_state(tmp_path) == last_state(tmp_path / "whole")
    rows, whole = (rows_of(folder, "psem") for folder in (tmp_path, tmp_path / "whole"))
    assert rows == whole


@pytest.mark.parametrize("grace_s", [None, 5.0])
def test_a_loop_has_a_grace_of_its_own_at_a_signal(tmp_path: Path, grace_s: float | None) -> None:
    """Control: with the usual grace the same item is dropped."""

    class Patient(Chained):
        @property
        def grace_s(self) -> float | None:
            return grace_s

    def check(items: Sequence[Item]) -> None:
        if items[0].key == "step 1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    with StopSignal(grace_s=0.05) as stop, pytest.raises(Stopped):
        run_stages(tmp_path, Patient(STEPS, "loop", check=check), stop=stop)
    done = [b["status"] for b in rows_of(tmp_path, "batches")].count("done")
    assert done == (1 if grace_s is None else 2)
