"""The engine: plans made once, batches all or nothing, trouble contained, and a clean end on a signal."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from harness.engine import Engine, Limits
from harness.engine.executors import Executor, Host, Inline, Item, ItemResult, Outcome
from harness.engine.plan import Budget, Plan, in_order
from harness.engine.stop import StopSignal
from harness.errors import EnvironmentFault, Stopped
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Batch, BatchResult, BatchStatus, Row, Store
from tests.cases import some_of
from tests.fakes import (
    Fake,
    Followers,
    Memory,
    OutOfRoom,
    Watcher,
    events_of,
    measured,
    padded_tokens,
    plan_of,
    rows_of,
    run_stages,
    same_lengths,
    score,
    scored,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
MIXED = {f"k{i:03d}": float(3 + (7 * i) % 23) for i in range(30)}
"""Thirty items of many lengths, in no order."""


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it, and nothing after it is written."""


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What is logged as a warning or worse."""
    lines: list[str] = []
    handle = logger.add(lambda message: lines.append(str(message).strip()), level="WARNING", format="{message}")
    yield lines
    logger.remove(handle)


def killed_at(compute: Callable[[Sequence[Item]], Sequence[ItemResult]], call: int | None):
    """`compute`, until the given call; and the number of calls so far."""
    calls: list[int] = []

    def counted(items: Sequence[Item]) -> Sequence[ItemResult]:
        if len(calls) == call:
            raise Killed
        calls.append(len(items))
        return compute(items)

    return counted, calls


def failures(folder: Path) -> dict[str, str]:
    return {str(key): message for key, message in events_of(folder, "failed_item").items()}


# -- the plan


def test_the_plan_is_stored_longest_first_and_does_not_depend_on_the_order_of_the_items(tmp_path: Path) -> None:
    run_stages(tmp_path / "a", Fake(MIXED))
    run_stages(tmp_path / "b", Fake(dict(reversed(MIXED.items()))))
    plan = plan_of(tmp_path / "a")
    assert plan == plan_of(tmp_path / "b")
    lengths = [MIXED[key] for batch in plan for key in batch[4]]
    assert lengths == sorted(MIXED.values(), reverse=True)
    # Control: another length is another plan.
    run_stages(tmp_path / "c", Fake(MIXED | {"k000": 22.0}))
    assert plan != plan_of(tmp_path / "c")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.floats(0, 60, allow_subnormal=False), min_size=1, max_size=40), max_tokens=st.integers(1, 150)
)
def test_rows_times_the_longest_row_stay_within_the_budget(lengths: list[float], max_tokens: int) -> None:
    items = {f"k{i:03d}": n for i, n in enumerate(lengths)}
    with TemporaryDirectory() as name:
        run_stages(Path(name), Fake(items), max_tokens=max_tokens)
        plan = plan_of(Path(name))
    assert sorted(key for b in plan for key in b[4]) == sorted(items)  # each item once
    for batch, after in zip(plan, [*plan[1:], None], strict=True):
        padded = padded_tokens([items[k] for k in batch[4]])
        assert batch[6] == padded
        assert padded <= max_tokens or len(batch[4]) == 1
        if after is not None:  # and no batch is smaller than it need be
            longest = max(1.0, *(items[k] for k in batch[4]))
            assert (len(batch[4]) + 1) * longest > max_tokens


def test_a_resume_uses_the_stored_plan_whatever_the_settings_say_now(tmp_path: Path) -> None:
    stopped, _ = killed_at(scored, 2)
    with pytest.raises(Killed):
        run_stages(tmp_path / "a", Fake(MIXED, stopped), max_tokens=40)
    before = [b[4] for b in plan_of(tmp_path / "a")]
    again, calls = killed_at(scored, None)
    run_stages(tmp_path / "a", Fake(MIXED, again), max_tokens=400)
    assert [b[4] for b in plan_of(tmp_path / "a")] == before
    assert calls == [len(keys) for keys in before[2:]]  # and repeats nothing
    # Control: a new run with those settings has another plan, and the same rows.
    run_stages(tmp_path / "b", Fake(MIXED), max_tokens=400)
    assert [b[4] for b in plan_of(tmp_path / "b")] != before
    assert measured(tmp_path / "a") == measured(tmp_path / "b")


def test_a_finished_stage_computes_nothing_again(tmp_path: Path) -> None:
    run_stages(tmp_path, Fake(MIXED))
    first = rows_of(tmp_path, "batches")
    again, calls = killed_at(scored, None)
    watcher = Watcher()
    (report,) = run_stages(tmp_path, Fake(MIXED, again), watcher=watcher)
    assert calls == []
    assert rows_of(tmp_path, "batches") == first
    assert watcher.started == [("scores", 30, 30)]
    assert (report.status, report.num_items, report.num_failed) == ("done", 30, 0)


def test_a_stage_without_items_is_done(tmp_path: Path) -> None:
    (report,) = run_stages(tmp_path, Fake({}))
    assert (report.status, report.num_items, report.num_batches) == ("done", 0, 0)
    assert rows_of(tmp_path, "stages")[0]["status"] == "done"


def test_a_stage_reads_what_the_stage_before_it_wrote(tmp_path: Path) -> None:
    watcher = Watcher()
    reports = run_stages(tmp_path, Fake(MIXED), Followers(), watcher=watcher)
    assert [(r.name, r.num_items, r.tokens) for r in reports] == [("scores", 30, 30), ("followers", 30, 0)]
    assert {r["prompt_id"]: r["text"] for r in rows_of(tmp_path, "completions")} == {
        key: f"{score(key):.6f}" for key in MIXED
    }
    assert watcher.finished == ["scores", "followers"]
    assert sum(n for stage, n in watcher.batches if stage == "scores") == 30


# -- killed at every step


@dataclass(frozen=True)
class Scenario:
    """Work with a kind of trouble in it, to be killed at every batch."""

    compute: Callable[[Memory, Sequence[Item]], Sequence[ItemResult]] = Memory.scored
    room: float = math.inf
    capacity: int | None = None
    max_tokens: int | None = 60
    lengths: Mapping[str, float] = field(default_factory=lambda: FEW)

    def run(self, folder: Path, call: int | None = None) -> int:
        """Run or go on; killed at that call of `compute`. The number of calls."""
        memory = Memory(self.room, base=1_000, per_token=2, capacity=self.capacity)
        compute, calls = killed_at(lambda items: self.compute(memory, items), call)
        run_stages(folder, Fake(self.lengths, compute), memory=memory, max_tokens=self.max_tokens)
        return len(calls)


def bad_item(memory: Memory, items: Sequence[Item]) -> Sequence[ItemResult]:
    if any(i.key == "k003" for i in items):
        raise ValueError("k003 is bad")
    return memory.scored(items)


FEW = {f"k{i:03d}": float(3 + (7 * i) % 23) for i in range(11)}
MANY = {f"k{i:03d}": float(200 + i) for i in range(85)}
SCENARIOS = {
    "plain": Scenario(),
    "out of memory": Scenario(room=30),
    "bad item": Scenario(bad_item),
    "both": Scenario(bad_item, room=45),
    "measured": Scenario(max_tokens=None, capacity=9_000, lengths=MANY),
    "measured, out of memory": Scenario(max_tokens=None, capacity=9_000, lengths=MANY, room=4_500),
}


@pytest.mark.parametrize("name", some_of(SCENARIOS, ["both"]))
def test_a_run_killed_at_any_batch_ends_with_the_rows_and_the_plan_of_one_that_was_not(
    name: str, tmp_path: Path
) -> None:
    """Once for each batch there is: killed there, then left to end."""
    scenario = SCENARIOS[name]
    num_calls = scenario.run(tmp_path / "whole")
    rows, plan, failed = measured(tmp_path / "whole"), plan_of(tmp_path / "whole"), failures(tmp_path / "whole")
    assert num_calls > 3
    for call in range(num_calls):
        folder = tmp_path / str(call)
        with pytest.raises(Killed):
            scenario.run(folder, call)
        scenario.run(folder)
        assert plan_of(folder) == plan, f"another plan after a kill at call {call} of {num_calls}"
        assert measured(folder) == rows, f"other rows after a kill at call {call} of {num_calls}"
        assert failures(folder) == failed


# -- a batch is atomic


def test_a_batch_that_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    """The second row of the batch has the key of the first: neither it, nor the first, nor the mark is there."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        good = scored(items)
        if "k001" not in [i.key for i in items]:
            return good
        return [good[0], replace(good[1], rows=good[0].rows)]

    with pytest.raises(Exception, match=r"[Cc]onstraint"):
        run_stages(tmp_path, Fake(same_lengths(4), compute), max_tokens=20)
    assert rows_of(tmp_path, "psem") == []
    assert [b["status"] for b in rows_of(tmp_path, "batches")] == ["planned", "planned"]
    run_stages(tmp_path, Fake(same_lengths(4)), max_tokens=20)  # and with the stage mended the run goes on
    assert len(rows_of(tmp_path, "psem")) == 4


def test_an_executor_may_take_several_batches_and_answer_in_any_order(tmp_path: Path) -> None:
    """What several GPUs will do: the plan is taken three batches at a time, and the outcomes come back reversed."""

    class Backwards:
        accelerator = Host()

        def map(self, setup: Any, work: Any, jobs: Any) -> Iterator[Outcome]:
            while taken := list(takewhile(lambda job: job is not None, islice(jobs, 3))):
                while taken:
                    job = taken.pop()
                    yield Outcome(job.token, work(setup(), job).results)

    run_stages(tmp_path / "inline", Fake(MIXED))
    (tmp_path / "other").mkdir()
    paths = RunPaths(tmp_path / "other")
    executor: Executor = Backwards()
    with Store(paths.results, SCHEMA) as store:
        Engine(store, paths, executor, Limits(40, 0), Watcher(), StopSignal()).run([Fake(MIXED)], lambda report: None)
    assert measured(tmp_path / "other") == measured(tmp_path / "inline")
    assert plan_of(tmp_path / "other") == plan_of(tmp_path / "inline")


# -- out of memory


def test_a_batch_that_does_not_fit_is_split_in_two_and_the_ceiling_is_learned(
    tmp_path: Path, warned: list[str]
) -> None:
    """Four batches of 4 × 10 tokens where 20 fit: one runs out, the other three are cut before they are tried."""
    memory = Memory(room=20)
    (report,) = run_stages(tmp_path, Fake(same_lengths(16), memory.scored), memory=memory, max_tokens=40)
    batches = rows_of(tmp_path, "batches")
    assert [b["status"] for b in batches[:4]] == ["split"] * 4
    halves = batches[4:]
    assert [(h["parent"], h["num_items"], h["status"]) for h in halves] == [
        (parent, 2, "done") for parent in range(4) for _ in range(2)
    ]
    assert [k for h in halves for k in h["keys"]] == [k for b in batches[:4] for k in b["keys"]]
    assert memory.releases == 1
    assert len(warned) == 1, "one line says so, however many batches are cut for it"
    assert "out of memory" in warned[0]
    assert len(rows_of(tmp_path, "psem")) == 16
    assert (report.splits, report.num_failed) == (4, 0)
    # Control: where it fits, nothing is split and nobody is warned.
    warned.clear()
    run_stages(tmp_path / "roomy", Fake(same_lengths(16)), max_tokens=40)
    assert (len(rows_of(tmp_path / "roomy", "batches")), warned) == (4, [])
    assert measured(tmp_path / "roomy") == measured(tmp_path)


def test_running_out_again_and_again_halves_again_and_again(tmp_path: Path) -> None:
    memory = Memory(room=10)
    run_stages(tmp_path, Fake(same_lengths(8), memory.scored), memory=memory, max_tokens=80)
    assert [b["num_items"] for b in rows_of(tmp_path, "batches")] == [8, 4, 4, 2, 2, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    assert memory.releases == 3  # 80, 40 and 20 tokens were tried once each
    assert len(rows_of(tmp_path, "psem")) == 8


def test_one_item_that_does_not_fit_alone_is_a_failed_item(tmp_path: Path, warned: list[str]) -> None:
    lengths = same_lengths(5) | {"giant": 1_000.0}
    memory = Memory(room=50)
    (report,) = run_stages(tmp_path, Fake(lengths, memory.scored), memory=memory, max_tokens=2_000)
    assert list(failures(tmp_path)) == ["giant"]
    assert "memory" in failures(tmp_path)["giant"]
    assert len(rows_of(tmp_path, "psem")) == 5
    assert (report.status, report.num_failed) == ("failed", 1)
    assert any("giant" in line for line in warned)


def test_the_ceiling_never_forbids_a_single_item(tmp_path: Path) -> None:
    memory = Memory(room=50)
    lengths = {"long": 48.0, **same_lengths(4, 30.0)}
    run_stages(tmp_path, Fake(lengths, memory.scored), memory=memory, max_tokens=60)
    assert len(rows_of(tmp_path, "psem")) == 5


# -- failed items


def test_an_exception_fails_only_the_item_that_caused_it(tmp_path: Path) -> None:
    asked: list[int] = []

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        asked.append(len(items))
        if any(i.key == "k005" for i in items):
            raise ValueError("k005 has no target")
        return scored(items)

    (report,) = run_stages(tmp_path, Fake(same_lengths(16), compute), max_tokens=160)
    assert failures(tmp_path) == {"k005": "ValueError: k005 has no target"}
    assert {r["prompt_id"] for r in rows_of(tmp_path, "psem")} == set(same_lengths(16)) - {"k005"}
    assert asked[0] == 16
    assert len(asked) == 9, "halving: 16, then two each of 8, 4, 2, 1"
    assert (report.num_failed, report.status, report.num_items) == (1, "failed", 16)
    with Store(RunPaths(tmp_path).results, SCHEMA) as store:
        assert store.failed("scores") == ["k005"]
        assert store.stage_rows()[0]["num_done"] == 15


def test_a_bad_item_does_not_lower_the_memory_ceiling(tmp_path: Path) -> None:
    """Splits that look for a bad item say nothing of memory, neither now nor after a resume."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if any(i.key == "k000" for i in items):
            raise ValueError("bad")
        return scored(items)

    stopped, calls = killed_at(compute, 5)  # 4 tried, 2, 1 (bad), 1, 2: the next is the first of the other batches
    with pytest.raises(Killed):
        run_stages(tmp_path, Fake(same_lengths(16), stopped), max_tokens=40)
    assert calls == [4, 2, 1, 1, 2]
    again, sizes = killed_at(compute, None)
    run_stages(tmp_path, Fake(same_lengths(16), again), max_tokens=40)
    assert sizes == [4, 4, 4], f"batches of four were cut to {sizes} after a resume"


NAN, INF = float("nan"), float("inf")
NOT_FINITE: dict[str, Row] = {
    "scalar": {"p_sem": NAN},
    "minus infinity": {"p_sem": -INF},
    "list": {"logprobs": [0.5, NAN]},
    "tuple": {"logprobs": (0.5, INF)},
    "numpy double": {"p_sem": np.float64(NAN)},
    "numpy single": {"p_sem": np.float32(NAN)},
    "list of numpy singles": {"logprobs": [np.float32(0.5), np.float32(INF)]},
    "numpy array": {"logprobs": np.array([0.5, NAN])},
    "half": {"p_sem": np.float16(INF)},
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_nan_and_infinity_are_a_failed_item_and_never_a_row(name: str, tmp_path: Path) -> None:
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        return [
            replace(r, rows={"psem": [r.rows["psem"][0] | (NOT_FINITE[name] if r.key == "k001" else {})]})
            for r in scored(items)
        ]

    run_stages(tmp_path, Fake(same_lengths(3), compute))
    assert [r["prompt_id"] for r in rows_of(tmp_path, "psem")] == ["k000", "k002"]
    assert list(failures(tmp_path)) == ["k001"]
    assert "psem." + next(iter(NOT_FINITE[name])) in failures(tmp_path)["k001"]


def test_nan_in_a_nested_list_a_later_row_or_a_changed_row_is_found_too(tmp_path: Path) -> None:
    bad = {
        "a": ItemResult("a", {"psem": [{"prompt_id": "a", "condition": "x", "p_sem": 0.1},
                                       {"prompt_id": "a", "condition": "y", "p_sem": NAN}]}),
        "b": ItemResult("b", {"detections": [{"prompt_id": "b", "condition": "x", "mode": "m", "sample_id": 0,
                                              "char_spans": [[1, 2], [3, NAN]]}]}),
        "c": ItemResult("c", {}, updates={"prompts": [{"prompt_id": "c", "tier": INF}]}),
        "d": ItemResult("d", {"psem": [{"prompt_id": "d", "condition": "x", "p_sem": 0.1}]}),
    }  # fmt: skip
    run_stages(tmp_path, Fake(same_lengths(0) | dict.fromkeys("abcd", 1.0), lambda items: [bad[i.key] for i in items]))
    assert sorted(failures(tmp_path)) == ["a", "b", "c"]
    assert [r["prompt_id"] for r in rows_of(tmp_path, "psem")] == ["d"]


def test_a_number_too_large_for_its_column_does_not_become_infinity(tmp_path: Path) -> None:
    """`completions.logprobs` is FLOAT[]: 1e300 is finite where it is computed, and infinite where it is stored."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        return [ItemResult(i.key, {"completions": [{"prompt_id": i.key, "condition": "c", "mode": "m", "sample_id": 0,
                                                    "logprobs": [1e300]}]}) for i in items]  # fmt: skip

    run_stages(tmp_path, Fake(same_lengths(1), compute))
    assert rows_of(tmp_path, "completions") == []
    assert list(failures(tmp_path)) == ["k000"]


def test_an_item_with_an_error_or_without_a_result_is_a_failed_item(tmp_path: Path) -> None:
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        results = {r.key: r for r in scored(items)}
        results["k001"] = ItemResult.failed("k001", ValueError("cannot be mapped"))
        results["k002"] = replace(results["k002"], error="half of it failed")  # its rows do not count then
        del results["k003"]
        return [*results.values(), ItemResult("nobody asked", {})]

    (report,) = run_stages(tmp_path, Fake(same_lengths(5), compute), max_tokens=50)
    assert failures(tmp_path) == {
        "k001": "cannot be mapped", "k002": "half of it failed", "k003": "the stage gave no result for it",
    }  # fmt: skip
    assert [r["prompt_id"] for r in rows_of(tmp_path, "psem")] == ["k000", "k004"]
    assert (report.num_failed, report.num_batches, report.splits) == (3, 1, 0)


def test_an_item_that_failed_without_a_word_is_a_failed_item(tmp_path: Path) -> None:
    """`ItemResult.failed(key, AssertionError())`: its message is empty, the failure is not."""
    run_stages(
        tmp_path, Fake(same_lengths(2), lambda items: [ItemResult.failed(i.key, AssertionError()) for i in items])
    )
    assert sorted(failures(tmp_path)) == ["k000", "k001"]


def test_retrying_tries_just_the_failed_items_and_then_what_follows_from_them(tmp_path: Path) -> None:
    asked: list[str] = []
    broken = {"k001", "k003"}

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        asked.extend(i.key for i in items)
        return [ItemResult.failed(r.key, "no luck") if r.key in broken else r for r in scored(items)]

    stages = (Fake(same_lengths(6), compute), Followers())
    first = run_stages(tmp_path, *stages)
    assert [(r.num_items, r.num_failed) for r in first] == [(6, 2), (4, 0)]

    asked.clear()
    run_stages(tmp_path, *stages)  # without --retry-failed a failed item is left alone
    assert asked == []

    broken.remove("k001")
    second = run_stages(tmp_path, *stages, retry_failed=True)
    assert asked == ["k001", "k003"]
    assert [(r.num_items, r.num_failed, r.status) for r in second] == [(6, 1, "failed"), (5, 0, "done")]
    broken.clear()
    third = run_stages(tmp_path, *stages, retry_failed=True)
    assert asked == ["k001", "k003", "k003"]
    assert [(r.num_items, r.num_failed, r.status) for r in third] == [(6, 0, "done"), (6, 0, "done")]

    attempts = [(b["keys"], b["parent"], b["attempt"]) for b in rows_of(tmp_path, "batches") if b["attempt"] > 1]
    assert [(keys, attempt) for keys, _, attempt in attempts] == [(["k001"], 2), (["k003"], 2), (["k003"], 3)]
    assert list(events_of(tmp_path, "recovered_item")) == ["k001", "k003"]
    run_stages(tmp_path / "well", Fake(same_lengths(6)), Followers())
    assert measured(tmp_path) == measured(tmp_path / "well")


def test_a_killed_retry_goes_on_and_is_not_planned_twice(tmp_path: Path) -> None:
    fails = [True]

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        return [ItemResult.failed(i.key, "no luck") for i in items] if fails else scored(items)

    run_stages(tmp_path, Fake(same_lengths(3), compute))
    fails.clear()
    stopped, _ = killed_at(compute, 1)
    with pytest.raises(Killed):
        run_stages(tmp_path, Fake(same_lengths(3), stopped), retry_failed=True)
    again, calls = killed_at(compute, None)
    run_stages(tmp_path, Fake(same_lengths(3), again), retry_failed=True)
    assert calls == [1, 1]
    assert [b["attempt"] for b in rows_of(tmp_path, "batches")] == [1, 2, 2, 2]
    assert len(rows_of(tmp_path, "psem")) == 3


# -- measured memory


def test_the_budget_is_measured_by_two_small_batches_and_stays_within_the_capacity(tmp_path: Path) -> None:
    memory = Memory(base=50_000, per_token=7, capacity=400_000)
    (report,) = run_stages(tmp_path, Fake(MANY_LONG, memory.scored), memory=memory, max_tokens=None)
    sizes = [b["padded_tokens"] for b in rows_of(tmp_path, "batches")]
    assert sizes[0] <= 2_048
    assert sizes[0] < sizes[1] <= 8_192
    room = (400_000 - 50_000) / 7
    assert max(memory.peaks) <= 400_000
    assert 0.7 * room < max(sizes[2:]) <= 0.85 * room  # the room is used, less what allocators waste
    assert report.budget == pytest.approx(0.85 * room, rel=0.01)
    assert report.peak_bytes == max(memory.peaks)
    # Control: twice the cost per token halves the budget.
    dear = Memory(base=50_000, per_token=14, capacity=400_000)
    (other,) = run_stages(tmp_path / "dear", Fake(MANY_LONG, dear.scored), memory=dear, max_tokens=None)
    assert other.budget == pytest.approx(report.budget / 2, rel=0.01)
    assert measured(tmp_path / "dear") == measured(tmp_path)


MANY_LONG = {f"k{i:04d}": 300.0 + i % 50 for i in range(600)}


@pytest.mark.parametrize("num_probes_done", [0, 1, 2])
def test_a_resume_between_the_probes_and_the_rest_measures_the_same_budget(
    num_probes_done: int, tmp_path: Path
) -> None:
    def run(folder: Path, call: int | None) -> None:
        memory = Memory(base=50_000, per_token=7, capacity=400_000)
        compute, _ = killed_at(memory.scored, call)
        run_stages(folder, Fake(MANY_LONG, compute), memory=memory, max_tokens=None)

    run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "killed", num_probes_done)
    run(tmp_path / "killed", None)
    assert plan_of(tmp_path / "killed") == plan_of(tmp_path / "whole")


def test_a_given_budget_is_not_measured(tmp_path: Path) -> None:
    memory = Memory(base=1, per_token=1, capacity=10_000_000)
    (report,) = run_stages(tmp_path, Fake(MANY_LONG, memory.scored), memory=memory, max_tokens=4_000)
    assert report.budget == 4_000
    assert max(b["padded_tokens"] for b in rows_of(tmp_path, "batches")[:2]) > 2_048


@pytest.mark.parametrize("memory", [Memory(base=10, per_token=0, capacity=10**9), Memory(capacity=10**9)])
def test_peaks_that_say_nothing_still_bring_every_item_to_its_end(memory: Memory, tmp_path: Path) -> None:
    """Equal peaks give no line, and peaks of 0 no measurement: the budget must still be one, and the run must end."""
    run_stages(tmp_path, Fake(MANY_LONG, memory.scored), memory=memory, max_tokens=None)
    assert len(rows_of(tmp_path, "psem")) == len(MANY_LONG)


def test_probes_that_all_fail_leave_the_others_to_be_measured(tmp_path: Path) -> None:
    memory = Memory(base=100, per_token=1, capacity=10**6)

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if any(i.key < "k0030" for i in items):
            raise ValueError("bad")
        return memory.scored(items)

    lengths = {key: 400.0 if key < "k0030" else 300.0 for key in MANY_LONG}
    run_stages(tmp_path, Fake(lengths, compute), memory=memory, max_tokens=None)
    assert len(failures(tmp_path)) == 30
    assert len(rows_of(tmp_path, "psem")) == len(MANY_LONG) - 30


# -- disk


def test_too_little_disk_is_found_before_a_stage_computes_anything(tmp_path: Path) -> None:
    def never(items: Sequence[Item]) -> list[ItemResult]:
        raise AssertionError("computed something")

    with pytest.raises(EnvironmentFault, match=r"stage scores needs about .* are free"):
        run_stages(tmp_path, replace(Fake(same_lengths(3), never), row_bytes=10**15))
    with pytest.raises(EnvironmentFault, match="disk"):
        run_stages(tmp_path, Fake(same_lengths(3), never), reserve_disk_bytes=10**18)
    run_stages(tmp_path, Fake(same_lengths(3)))  # resumable: with room it ends
    assert len(rows_of(tmp_path, "psem")) == 3


# -- signals


@contextmanager
def sleepers(*folders: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes whose second batch takes a minute; they are in it when this yields."""
    code = "import sys, pathlib, tests.fakes as f; f.sleepy_run(pathlib.Path(sys.argv[1]), 60.0)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "asleep\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], since: float) -> float:
    process.communicate(timeout=30)
    return time.perf_counter() - since


def test_a_signal_ends_a_run_within_ten_seconds_and_a_second_one_at_once(tmp_path: Path) -> None:
    """A batch that takes a minute is dropped after some seconds; the batches before it are kept; exit code 3."""
    with sleepers(tmp_path / "int", tmp_path / "term", tmp_path / "twice") as (a, b, c):
        start = time.perf_counter()
        a.send_signal(signal.SIGINT)
        b.send_signal(signal.SIGTERM)
        c.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert c.poll() is None  # the first signal lets the batch go on
        c.send_signal(signal.SIGINT)
        seconds = [ended(process, start) for process in (c, a, b)]
    assert seconds[0] < 2
    assert seconds[2] < 10
    assert seconds[1] > 2, "a batch is given time to end"
    assert [p.returncode for p in (a, b, c)] == [3, 3, 3]
    for name in ("int", "term", "twice"):
        assert [b["status"] for b in rows_of(tmp_path / name, "batches")] == ["done", "planned", "planned"]
        run_stages(tmp_path / name, Fake(same_lengths(3)))
        assert len(rows_of(tmp_path / name, "psem")) == 3


def test_a_batch_that_ends_soon_after_the_signal_is_kept(tmp_path: Path) -> None:
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if items[0].key == "k001":
            os.kill(os.getpid(), signal.SIGTERM)
        return scored(items)

    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop, pytest.raises(Stopped):
        run_stages(tmp_path, Fake(same_lengths(3), compute), max_tokens=10, stop=stop)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert [b["status"] for b in rows_of(tmp_path, "batches")] == ["done", "done", "planned"]


def test_an_overdue_batch_is_dropped_though_the_stage_catches_every_exception(tmp_path: Path) -> None:
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception as e:
            return [ItemResult.failed(i.key, e) for i in items]
        return scored(items)

    start = time.perf_counter()
    with StopSignal(grace_s=0.1) as stop, pytest.raises(Stopped, match="dropped"):
        run_stages(tmp_path, Fake(same_lengths(3), compute), max_tokens=10, stop=stop)
    assert time.perf_counter() - start < 3
    assert failures(tmp_path) == {}
    assert {b["status"] for b in rows_of(tmp_path, "batches")} == {"planned"}


class SignalledStore(Store):
    """Gets both signals in the middle of a commit: after its rows, before its mark."""

    def _insert(self, table: str, rows: Sequence[Row]) -> None:
        super()._insert(table, rows)
        if table == "psem":
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)


class NoShield(StopSignal):
    """The control: a stop signal that lets commits be interrupted."""

    def shield(self) -> Any:
        return nullcontext()


def test_a_commit_is_never_interrupted(tmp_path: Path) -> None:
    with StopSignal() as stop, pytest.raises(Stopped):
        run_stages(tmp_path, Fake(same_lengths(3)), max_tokens=10, stop=stop, open_store=SignalledStore)
    assert [b["status"] for b in rows_of(tmp_path, "batches")] == ["done", "planned", "planned"]
    assert [r["prompt_id"] for r in rows_of(tmp_path, "psem")] == ["k000"]
    # Control: without the shield the same two signals lose the batch.
    folder = tmp_path / "control"
    with NoShield() as stop, pytest.raises(Stopped):
        run_stages(folder, Fake(same_lengths(3)), max_tokens=10, stop=stop, open_store=SignalledStore)
    assert {b["status"] for b in rows_of(folder, "batches")} == {"planned"}


def test_a_signal_before_the_first_batch_stops_before_it(tmp_path: Path) -> None:
    compute, calls = killed_at(scored, None)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            run_stages(tmp_path, Fake(same_lengths(3), compute), stop=stop)
    assert calls == []


def test_a_signal_in_the_middle_of_a_log_line_still_stops_the_run_in_time() -> None:
    """The handler logs; loguru refuses to be entered twice by one thread. The deadline must be set all the same."""
    handle = logger.add(lambda message: signal.raise_signal(signal.SIGTERM) if "now" in message else None)
    try:
        with StopSignal(grace_s=30.0) as stop:
            logger.info("now")
            assert stop.requested
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        logger.remove(handle)


def test_the_results_of_a_commit_are_counted_once(tmp_path: Path) -> None:
    """`stages` adds up over batches and resumes."""
    stopped, _ = killed_at(scored, 3)
    with pytest.raises(Killed):
        run_stages(tmp_path, Fake(MIXED, stopped))
    run_stages(tmp_path, Fake(MIXED))
    (row,) = rows_of(tmp_path, "stages")
    assert (row["num_items"], row["num_done"], row["num_failed"], row["tokens"], row["status"]) == (
        30,
        30,
        0,
        30,
        "done",
    )


def test_the_engine_needs_nothing_of_a_batch_result_but_what_it_says() -> None:
    """A result is plain data: its defaults are those of a batch that gave nothing."""
    empty = BatchResult()
    assert (empty.rows, empty.updates, empty.failures, empty.tokens, empty.peak_bytes) == ({}, {}, [], 0, 0)
    assert BatchResult().rows is not empty.rows
    with pytest.raises(OutOfRoom):
        Memory(room=1).scored([Item("a", 2.0)])
    assert Inline().accelerator.capacity_bytes() is None


# -- batches cut as another run cut them


def sizes_of(folder: Path, sizes: Sequence[int], max_tokens: int | None = 1_000, memory: Any = None) -> tuple[int, ...]:
    """Run `MIXED` in `folder`, to be cut so; how it was cut, as the report tells."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, reports = RunPaths(folder), []
    stage = Fake(MIXED, memory.scored if memory else scored)
    with Store(paths.results, SCHEMA) as store:
        limits = Limits(max_tokens, 0, {stage.name: sizes})
        Engine(store, paths, Inline(memory or Host()), limits, Watcher(), StopSignal()).run([stage], reports.append)
    return reports[0].sizes


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, len(MIXED) - 1)), data=st.data())
@pytest.mark.thorough
def test_recorded_sizes_are_cut_again_whatever_the_budget_longest_items_first(
    cuts: set[int], data: st.DataObject
) -> None:
    ends = [*sorted(cuts), len(MIXED)]
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    budget = data.draw(st.sampled_from([1, 64, 100_000]))
    with TemporaryDirectory() as folder:
        assert sizes_of(Path(folder), sizes, budget) == tuple(sizes)
        order = [
            key
            for *_, keys in sorted((b["batch_id"], b["keys"]) for b in rows_of(Path(folder), "batches"))
            for key in keys
        ]
    assert order == sorted(MIXED, key=lambda k: (-MIXED[k], k))


def test_recorded_sizes_are_cut_again_without_the_probes_that_measure_memory(tmp_path: Path) -> None:
    gpu = Memory(base=1_000, per_token=10, capacity=10**9)
    assert sizes_of(tmp_path, [10, 20], None, gpu) == (10, 20)
    free = Memory(base=1_000, per_token=10, capacity=10**9)
    assert sizes_of(tmp_path / "free", [], None, free) != (10, 20), "the control"


@pytest.mark.parametrize("sizes", [[], [29], [10, 21], [31]])
def test_sizes_of_another_number_of_items_are_left_alone(tmp_path: Path, sizes: list[int]) -> None:
    assert sizes_of(tmp_path / "a", sizes, 64) == sizes_of(tmp_path / "b", (), 64)


def test_a_batch_that_does_not_fit_any_more_is_split_and_the_split_sizes_are_what_is_recorded(tmp_path: Path) -> None:
    small = Memory(room=200)
    found = sizes_of(tmp_path / "small", [30], None, small)
    assert len(found) > 1
    assert sum(found) == len(MIXED)
    assert sizes_of(tmp_path / "large", found) == found, "elsewhere the same batches, without running out"
    assert not events_of(tmp_path / "large", "oom_split")
    keys = [
        [b["keys"] for b in rows_of(tmp_path / name, "batches") if b["status"] == "done"] for name in ("small", "large")
    ]
    assert sorted(keys[0]) == sorted(keys[1])


def test_an_item_that_is_tried_again_is_counted_and_not_among_the_sizes(tmp_path: Path) -> None:
    def refusing(items: Sequence[Item]) -> list[ItemResult]:
        return [ItemResult.failed(r.key, "tired") if r.key == "k003" else r for r in scored(items)]

    lengths = same_lengths(8)
    (report,) = run_stages(tmp_path, Fake(lengths, refusing))
    assert (report.sizes, report.retried) == ((4, 4), 0)
    (report,) = run_stages(tmp_path, Fake(lengths), retry_failed=True)
    assert (report.sizes, report.retried) == ((4, 4), 1)


class CountingStore(Store):
    """How often it was asked for a plan, and how many batches it handed out."""

    plans = 0

    def plan(self, stage: str, status: BatchStatus | None = None) -> list[Batch]:
        type(self).plans += 1
        return super().plan(stage, status)


@pytest.mark.parametrize("num_items", [40, 400])
def test_the_store_is_asked_for_a_plan_once_a_stage_however_many_batches_there_are(
    tmp_path: Path, num_items: int
) -> None:
    """Each plan is every key of every batch: asked for with each batch, a stage took the square of its length."""

    class Counting(CountingStore):
        pass

    lengths = {f"k{i:03d}": float(200 + i) for i in range(num_items)}
    (report,) = run_stages(
        tmp_path, Fake(lengths), max_tokens=None, memory=Memory(per_token_s=0.001), open_store=Counting
    )
    assert report.num_items == num_items
    assert Counting.plans == 1


def test_a_ceiling_counts_for_batches_behind_the_one_that_taught_it_whichever_came_back_first() -> None:
    plan = Plan([Batch("a", n, (f"{n}a", f"{n}b"), 40) for n in range(4)])
    learned = Budget(40, None, plan, [])
    learned.learn(plan[2], plan.place(plan[2]))
    assert [learned.allows(batch, plan.place(batch)) for batch in plan] == [True, True, False, False]
    # What an earlier one teaches, later, counts for all behind it; and a resume knows the same.
    learned.learn(plan[1], plan.place(plan[1]))
    resumed = Budget(40, None, plan, [1, 2])
    for budget in (learned, resumed):
        assert [budget.allows(batch, plan.place(batch)) for batch in plan] == [True, False, False, False]


def test_a_budget_is_cut_for_the_weakest_worker() -> None:
    """Control: where none is weaker the room of this process is used."""

    def largest(heard: int | None) -> int:
        plan = Plan([replace(Batch("a", n, (f"x{n}",), size), status="done", peak_bytes=1_000 + 10 * size)
                     for n, size in enumerate((2_000, 8_000))])  # fmt: skip
        budget = Budget(None, 1_000_000, plan, [])
        budget.hear(heard)
        items = in_order([Item(f"k{n:04d}", 100.0) for n in range(2_000)])
        return max(b.padded_tokens for b in budget.cut(items, 2, "a"))

    assert largest(None) == largest(2_000_000) == 84_900
    assert largest(500_000) == 42_400
