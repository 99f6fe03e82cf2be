"""The inline executor: what becomes of a batch that works, runs out of memory, or raises."""

import errno
import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import pytest

from harness.engine import executors
from harness.engine.executors import Accelerator, Computed, Inline, Item, ItemResult, Job, Outcome
from harness.errors import EnvironmentFault, ItemFailed
from harness.settings import RuntimeSettings
from tests import gravity
from tests.fakes import Memory, OutOfRoom, scored
from tests.gravity import resolve

ITEMS = [Item("a", 3.0), Item("b", 2.0)]


def outcomes(compute, memory: Memory | None = None, batches: int = 1) -> list[Outcome]:
    given = [Job(n, ITEMS) for n in range(batches)]
    return list(Inline(memory or Memory()).map(lambda: None, lambda _context, job: Computed(compute(job.items)), given))


def work(_context: object, job: Job) -> Computed:
    return Computed(scored(job.items))


def raising(error: BaseException):
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        raise error

    return compute


def test_a_batch_comes_back_with_its_token_results_time_and_peak() -> None:
    memory = Memory(base=100, per_token=10)
    (outcome,) = outcomes(memory.scored, memory)
    assert [r.key for r in outcome.results] == ["a", "b"]
    assert (outcome.token, outcome.peak_bytes, outcome.error, outcome.out_of_memory) == (0, 160, None, False)
    assert outcome.seconds > 0


def test_setup_runs_once_and_not_at_all_without_a_batch() -> None:
    calls: list[int] = []
    executor = Inline(Memory())
    assert list(executor.map(lambda: calls.append(1), work, [])) == []
    assert calls == []
    assert len(list(executor.map(lambda: calls.append(1), work, [Job(0, ITEMS), Job(1, ITEMS)]))) == 2
    assert calls == [1]


def test_batches_may_be_added_while_the_outcomes_are_read() -> None:
    todo = [0]

    def pull() -> Iterator[Job]:
        while todo:
            yield Job(todo.pop(), ITEMS)

    seen = []
    for outcome in Inline().map(lambda: None, work, pull()):
        seen.append(outcome.token)
        if outcome.token < 3:
            todo.append(outcome.token + 1)
    assert seen == [0, 1, 2, 3]


def test_out_of_memory_is_told_by_its_type_and_released_outside_the_except_block() -> None:
    memory = Memory(room=5)
    (outcome,) = outcomes(memory.scored, memory)
    assert outcome.out_of_memory
    assert outcome.error is None
    assert memory.releases == 1  # and Memory.release asserts that no exception is being handled
    # Control: the same message in another type is an ordinary error.
    (other,) = outcomes(raising(RuntimeError("CUDA out of memory")), memory)
    assert not other.out_of_memory
    assert "RuntimeError: CUDA out of memory" in str(other.error)
    assert memory.releases == 1


def test_the_tensors_of_a_batch_that_ran_out_are_gone_when_memory_is_released() -> None:
    class Tensor:
        """Stands for what the frames of the failed batch hold."""

    held: list[weakref.ref] = []
    alive: list[bool] = []

    class Watching(Memory):
        def release(self) -> None:
            gc.collect()
            alive.append(held[0]() is not None)

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise OutOfRoom("x" * bool(tensor))

    outcomes(compute, Watching())
    assert alive == [False]


def test_an_error_comes_back_with_its_name_and_traceback() -> None:
    (outcome,) = outcomes(raising(KeyError("layer")))
    assert outcome.error == "KeyError: 'layer'"
    assert outcome.traceback is not None
    assert "test_executor.py" in outcome.traceback
    (known,) = outcomes(raising(ItemFailed("the text cannot be mapped")))
    assert known.error == "the text cannot be mapped"  # our own errors are written for people: no class name


def test_an_error_without_a_message_is_still_an_error() -> None:
    """`raise ItemFailed` with nothing in it must not read as `no error`."""
    for error in (ItemFailed(), AssertionError(), KeyError()):
        (outcome,) = outcomes(raising(error))
        assert outcome.error, f"{error!r} came back as {outcome.error!r}"


def test_an_empty_error_of_one_item_is_still_an_error() -> None:
    """`ItemResult.failed(key, AssertionError())` says nothing, and must not read as success with no rows."""
    assert ItemResult.failed("a", AssertionError()).error
    assert ItemResult.failed("a", "").error


def test_a_full_disk_ends_the_run_and_other_file_trouble_fails_the_batch() -> None:
    with pytest.raises(EnvironmentFault, match="disk is full"):
        outcomes(raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(EnvironmentFault, match="no GPU"):
        outcomes(raising(EnvironmentFault("no GPU")))
    (outcome,) = outcomes(raising(OSError(errno.EACCES, "Permission denied")))
    assert "Permission denied" in str(outcome.error)


def test_what_is_not_an_exception_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt):
        outcomes(raising(KeyboardInterrupt()))


def test_a_failed_batch_does_not_end_the_others() -> None:
    left = [True]

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if left:
            left.pop()
            raise ValueError("first")
        return scored(items)

    first, second = outcomes(compute, batches=2)
    assert first.error == "ValueError: first"
    assert second.error is None
    assert len(second.results) == 2


def test_batches_are_computed_by_the_executor_that_the_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runtime.executor` was read by nobody."""
    assert get_args(RuntimeSettings.model_fields["executor"].annotation) == tuple(executors.EXECUTORS)
    made: list[Accelerator] = []

    def make(accelerator: Accelerator) -> Inline:
        made.append(accelerator)
        return Inline(accelerator)

    monkeypatch.setitem(executors.EXECUTORS, "inline", make)
    flags = {"data.limit": "2", "gravity.stages": "prompts", "paths.runs": str(tmp_path), "runtime.device": "cpu"}
    assert gravity.run(resolve(flags, environ={})) == 0
    assert len(made) == 1
    monkeypatch.delitem(executors.EXECUTORS, "inline")
    with pytest.raises(KeyError):  # the control: there is no other
        gravity.run(resolve(flags, environ={}), resume="new")
