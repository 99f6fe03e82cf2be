"""The thread that owns the device: who joins, who leaves, what happens when memory runs out or it dies."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from harness.errors import HarnessError, ItemFailed
from harness.models.rollout import Ask, Rollout
from harness.serving.metrics import Metrics
from harness.serving.queue import Broken, Limits, Queue, Refused
from harness.serving.worker import Worker, is_out_of_memory

LIMITS = Limits(1000, 10_000, 10**7, 1000, 60.0)


class Decoder:
    """Writes 1, 2, 3 … up to what was asked for. With more than `room` rows at once memory runs out."""

    def __init__(self, room: int = 10**6, log: list[Any] | None = None, name: Any = None):
        self.room, self.log, self.name = room, [] if log is None else log, name
        self.live: dict[int, tuple[Ask, Rollout]] = {}
        self.num = 0

    def add(self, asks: Sequence[Ask]) -> list[int]:
        self.log.append(("add", self.name, [a.key for a in asks]))
        numbers = list(range(self.num, self.num + len(asks)))
        self.num += len(asks)
        self.live.update({n: (ask, Rollout()) for n, ask in zip(numbers, asks, strict=True)})
        return numbers

    def step(self) -> dict[int, Any]:
        if len(self.live) > self.room:
            raise torch.OutOfMemoryError("no room")
        self.log.append(("step", self.name, [ask.key for ask, _ in self.live.values()]))
        ended: dict[int, Any] = {}
        for number, (ask, done) in list(self.live.items()):
            done.token_ids.append(len(done.token_ids) + 1)
            if len(done.token_ids) == ask.max_new_tokens:
                ended[number] = done
                del self.live[number]
        return ended

    def written(self, number: int) -> Rollout:
        return self.live[number][1]

    def drop(self, numbers: Sequence[int]) -> None:
        self.log.append(("drop", self.name, [self.live.pop(n)[0].key for n in numbers]))


class Bench:
    """A queue and a worker whose turns the test makes itself."""

    def __init__(self, budget: int = 10**6, room: int = 10**6, decoder_of: Callable[[Any], Any] | None = None):
        self.log: list[Any] = []
        self.queue = Queue(LIMITS)
        self.metrics = Metrics(self.queue)
        made = decoder_of or (lambda group: Decoder(room, self.log, group))
        self.worker = Worker(self.queue, made, budget, 0.0, self.metrics)
        self.told: dict[int, Any] = {}

    def put(
        self, keys: Sequence[int], new: int = 3, group: Any = "g", follow: Any = None, *, is_whole: bool = False
    ) -> Any:
        job = self.queue.admit(len(keys), 10 * len(keys))
        rows = [(Ask((1,), key, 0.0, new), 10, follow) for key in keys]
        self.queue.submit(job, group, rows, lambda n, o: self.told.update({keys[n]: o}), is_whole=is_whole)
        return job

    def all(self, most: int = 1000) -> None:
        for _ in range(most):
            if self.queue.is_idle:
                return
            self.worker.turn()
        raise AssertionError("it does not end")

    def steps(self) -> list[Any]:
        return [keys for what, _, keys in self.log if what == "step"]


def test_rows_join_between_steps_and_leave_when_they_end() -> None:
    bench = Bench()
    bench.put([1], new=4)
    bench.worker.turn()
    bench.put([2, 3], new=2)
    bench.all()
    assert bench.steps() == [[1], [1, 2, 3], [1, 2, 3], [1]]
    assert {key: len(done.token_ids) for key, done in bench.told.items()} == {1: 4, 2: 2, 3: 2}


def test_the_budget_of_padded_tokens_is_kept_and_the_oldest_go_first() -> None:
    bench = Bench(budget=25)
    bench.put([1, 2, 3, 4, 5], new=1)
    bench.put([6], new=1)
    bench.all()
    assert bench.steps() == [[1, 2], [3, 4], [5, 6]]


def test_a_row_beyond_the_budget_runs_alone() -> None:
    bench = Bench(budget=5)
    bench.put([1, 2], new=1)
    bench.all()
    assert bench.steps() == [[1], [2]]


def test_groups_take_turns() -> None:
    bench = Bench()
    bench.put([1], new=3, group="a")
    bench.put([2], new=3, group="b")
    bench.all()
    assert [name for what, name, _ in bench.log if what == "step"] == ["a", "b", "a", "b", "a", "b"]


def test_a_whole_job_has_a_batch_of_its_own() -> None:
    bench = Bench()
    bench.put([1], new=2)
    bench.put([2, 3], new=2, is_whole=True)
    bench.put([4], new=2)
    bench.all()
    assert bench.steps() == [[1, 4], [2, 3], [1, 4], [2, 3]]


def test_a_cancelled_request_frees_its_rows_before_the_next_step() -> None:
    bench = Bench(budget=30)
    first = bench.put([1, 2], new=50)
    second = bench.put([3, 4], new=50)
    bench.worker.turn()
    assert bench.steps()[-1] == [1, 2, 3]
    assert bench.queue.num_rows == 1
    bench.queue.cancel(second)
    assert bench.queue.num_rows == 0, "what waits leaves at once"
    bench.worker.turn()
    assert bench.steps()[-1] == [1, 2], "what runs with the next step"
    bench.queue.cancel(first)
    bench.put([9], new=1)
    bench.all()
    assert bench.steps()[-1] == [9]
    assert set(bench.told) == {9}, "nobody is told who has gone"
    assert bench.worker.num_running == 0


@pytest.mark.parametrize("room", [1, 2, 3, 5, 8])
def test_out_of_memory_begins_the_batch_again_in_halves(room: int) -> None:
    bench = Bench(room=room)
    bench.put(range(8), new=3)
    bench.all()
    assert all(len(done.token_ids) == 3 for done in bench.told.values())
    assert len(bench.told) == 8
    most = max(map(len, bench.steps()))
    assert most == {1: 1, 2: 2, 3: 2, 5: 4, 8: 8}[room], "halves of what did not fit"
    splits = bench.metrics.registry.get_sample_value("harness_splits_total")
    assert (splits == 0) is (room == 8)


def test_what_does_not_fit_alone_fails_alone() -> None:
    class Picky(Decoder):
        def step(self) -> dict[int, Any]:
            if any(ask.key == 3 for ask, _ in self.live.values()):
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return super().step()

    bench = Bench(decoder_of=lambda _: Picky())
    bench.put([1, 2, 3, 4, 5])
    bench.all()
    assert isinstance(bench.told.pop(3), ItemFailed)
    assert sorted(bench.told) == [1, 2, 4, 5]
    assert all(isinstance(done, Rollout) for done in bench.told.values())


def test_rows_that_begin_again_keep_those_behind_them_waiting_and_then_all_is_as_before() -> None:
    bench = Bench(room=4)
    bench.put(range(6), new=2)
    bench.worker.turn()
    bench.put([10, 11], new=2)
    bench.all()
    assert len(bench.told) == 8
    bench.put(range(20, 24), new=1)
    bench.all()
    assert bench.steps()[-1] == [20, 21, 22, 23], "a split does not last"


def test_a_row_that_is_followed_ends_when_enough_is_written() -> None:
    bench = Bench()
    bench.put([1, 2], new=50, follow=lambda done: len(done.token_ids) == 3)
    bench.all(4)
    assert {key: done.token_ids for key, done in bench.told.items()} == {1: [1, 2, 3], 2: [1, 2, 3]}


def test_a_follower_that_fails_ends_its_own_row_alone() -> None:
    def fails(_: Rollout) -> bool:
        raise ValueError("no")

    bench = Bench()
    bench.put([1], follow=fails)
    bench.put([2])
    bench.all()
    assert isinstance(bench.told[1], ItemFailed)
    assert isinstance(bench.told[2], Rollout)


def test_a_worker_that_dies_tells_everybody_and_nobody_waits_for_ever() -> None:
    class Ill(Decoder):
        def step(self) -> dict[int, Any]:
            raise ZeroDivisionError("unexpected")

    bench = Bench(budget=20, decoder_of=lambda _: Ill())
    told = threading.Event()
    job = bench.queue.admit(5, 50)
    rows = [(Ask((1,), n, 0.0, 3), 10, None) for n in range(5)]
    found: dict[int, Any] = {}

    def tell(place: int, outcome: Any) -> None:
        found[place] = outcome
        if len(found) == 5:
            told.set()

    bench.queue.submit(job, "g", rows, tell)
    bench.worker.start()
    assert told.wait(30), "two ran, three waited"
    assert all(isinstance(error, Broken) for error in found.values())
    bench.worker._thread.join(30)
    assert not bench.worker.is_alive
    with pytest.raises(Refused, match="ended unexpectedly") as late:
        bench.queue.admit(1, 1)
    assert late.value.status == 503


def test_a_stopped_worker_ends() -> None:
    bench = Bench()
    bench.worker.start()
    assert bench.worker.is_alive
    bench.worker.stop()
    bench.worker._thread.join(30)
    assert not bench.worker.is_alive


def test_the_first_row_waits_for_company_no_longer_than_told() -> None:
    slept: list[float] = []
    bench = Bench()
    bench.worker._batch_wait_s = 30.0
    bench.worker._clock = lambda: bench.queue._clock() + 29.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.worker._over, "wait", slept.append)
        bench.put([1])
        bench.worker.turn()
        bench.put([2])
        bench.worker.turn()
    assert len(slept) == 1, "who joins what runs waits for nobody"
    assert 0 < slept[0] <= 1.0


def test_what_counts_as_running_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(HarnessError("x"))
