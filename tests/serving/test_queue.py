"""Who may wait: never more than the limits, reserved before anything is done, first come first."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from harness.errors import HarnessError
from harness.serving.queue import Job, Limits, Queue, Refused, Row

LIMITS = Limits(max_requests=4, max_rows=12, max_tokens=200, max_client_batch=8, timeout_s=10.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def everything(rows: Sequence[Row]) -> bool:
    return True


def put(
    queue: Queue, job: Job, tokens: Sequence[int], told: list[Any] | None = None, *, is_whole: bool = False
) -> None:
    told = [] if told is None else told
    rows = [(n, t, None) for n, t in enumerate(tokens)]
    queue.submit(job, "g", rows, lambda n, o: told.append((n, o)), is_whole=is_whole)


def refused(queue: Queue, rows: int, tokens: int) -> Refused:
    with pytest.raises(Refused) as found:
        queue.admit(rows, tokens)
    return found.value


class Crowd(RuleBasedStateMachine):
    """Requests come, are read, wait, begin, end, are cancelled and time out in any order."""

    admitted = Bundle("admitted")
    submitted = Bundle("submitted")

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.queue = Queue(LIMITS, self.clock)
        self.running: list[Row] = []
        self.told: dict[Job, list[int]] = {}
        self.num_rows: dict[Job, int] = {}
        self.cancelled: set[Job] = set()

    @rule(target=admitted, rows=st.integers(1, 9), tokens=st.integers(0, 120))
    def admit(self, rows: int, tokens: int) -> Job | None:
        before = self.queue.num_requests, self.queue.num_rows, self.queue.num_tokens
        room = (
            before[0] < LIMITS.max_requests
            and before[1] + rows <= LIMITS.max_rows
            and before[2] + tokens <= LIMITS.max_tokens
        )
        job, status = None, 0
        try:
            job = self.queue.admit(rows, tokens)
        except Refused as error:
            status = error.status
        if job is None:
            assert status == (413 if rows > LIMITS.max_client_batch else 429)
            assert status == 413 or not room
            assert before == (self.queue.num_requests, self.queue.num_rows, self.queue.num_tokens)
            return None
        assert room
        assert self.queue.num_rows == before[1] + rows, "reserved with the admission, before anything is known of it"
        assert self.queue.num_tokens == before[2] + tokens
        return job

    @rule(
        target=submitted,
        job=consumes(admitted),
        fewer=st.integers(0, 3),
        tokens=st.integers(0, 60),
        whole=st.booleans(),
    )
    def submit(self, job: Job | None, fewer: int, tokens: int, whole: bool) -> Job | None:
        if job is None:
            return None
        num = max(0, job.rows - fewer)
        self.told[job], self.num_rows[job] = [], num
        rows = [(n, tokens, None) for n in range(num)]
        try:
            self.queue.submit(job, "g", rows, lambda n, _: self.told[job].append(n), is_whole=whole)
        except HarnessError:
            self.cancelled.add(job)
        return job

    @rule(most=st.integers(0, 6))
    def take(self, most: int) -> None:
        def fits(rows: Sequence[Row]) -> bool:
            nonlocal most
            most -= len(rows)
            return most >= 0

        found = self.queue.take(fits)
        places = list(dict.fromkeys(row.job for row in found))
        assert [job.since for job in places] == sorted(job.since for job in places), "oldest first"
        assert not any(row.job.is_cancelled for row in found)
        for row in found:
            if row.job.is_whole:
                assert sum(r.job is row.job for r in found) == self.num_rows[row.job], "all of it or none"
        self.running += found
        self.clock.now += 0.5

    @rule()
    def finish(self) -> None:
        if self.running:
            row = self.running.pop(0)
            self.queue.finished(row, "done")

    @rule(job=submitted)
    def cancel(self, job: Job | None) -> None:
        if job is not None:
            self.queue.cancel(job)
            self.cancelled.add(job)
            assert not job.waiting

    @rule(seconds=st.floats(0, 20))
    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        self.queue.expire()

    @invariant()
    def within_limits(self) -> None:
        queue = self.queue
        assert 0 <= queue.num_requests <= LIMITS.max_requests
        assert 0 <= queue.num_rows <= LIMITS.max_rows
        assert 0 <= queue.num_tokens <= LIMITS.max_tokens
        live = list(queue._live)
        assert queue.num_rows == sum(job.rows for job in live)
        assert queue.num_tokens == sum(job.tokens for job in live)
        assert queue.num_requests == sum(job.rows > 0 for job in live)

    @invariant()
    def told_once(self) -> None:
        for told in self.told.values():
            assert len(told) == len(set(told))

    def teardown(self) -> None:
        for row in self.running:
            self.queue.finished(row, "done")
        self.queue.fail_all(HarnessError("over"))
        assert self.queue.is_idle
        assert self.queue.num_requests == self.queue.num_rows == self.queue.num_tokens == 0
        for job, told in self.told.items():
            assert job in self.cancelled or len(told) == self.num_rows[job], "everybody who waits is told"


TestCrowd = Crowd.TestCase


def test_a_place_is_reserved_before_the_request_is_read() -> None:
    """The control is a queue that counts at `submit`: of a burst it would admit everybody."""
    queue = Queue(LIMITS)
    jobs = [queue.admit(3, 10) for _ in range(4)]  # none was submitted
    assert refused(queue, 1, 1).status == 429
    queue.cancel(jobs[0])
    queue.admit(1, 1)


def test_a_burst_from_many_threads_cannot_slip_through() -> None:
    queue = Queue(Limits(32, 10_000, 10**6, 100, 10.0))
    admitted, all_there = [], threading.Barrier(16)

    def come() -> None:
        all_there.wait()
        for _ in range(50):
            with suppress(Refused):
                admitted.append(queue.admit(1, 1))

    threads = [threading.Thread(target=come) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 32


@pytest.mark.parametrize(
    ("rows", "tokens", "status", "line"),
    [
        (9, 1, 413, "expected at most 8 completions a request (serve.max_client_batch), found 9"),
        (1, 201, 413, "can never be queued"),
        (8, 10, 429, "8 rows wait, and at most 12 may (serve.max_queued_rows)"),
        (2, 150, 429, "100 tokens wait, and at most 200 may (serve.max_queued_tokens)"),
    ],
)
def test_what_is_too_much_says_so(rows: int, tokens: int, status: int, line: str) -> None:
    queue = Queue(LIMITS)
    queue.admit(8, 100)
    found = refused(queue, rows, tokens)
    assert found.status == status
    assert line in str(found)
    assert (found.retry_after_s is not None) is (status == 429)


def test_a_request_that_does_not_begin_in_time_is_told_so_and_one_that_has_begun_is_not() -> None:
    clock = Clock()
    queue = Queue(LIMITS, clock)
    first, second, told = queue.admit(2, 20), queue.admit(1, 10), []
    put(queue, first, [5, 5], told)
    put(queue, second, [5], told)
    (begun,) = queue.take(lambda rows: rows[0].place == 0 and rows[0].job is first)
    clock.now = 9.9
    queue.expire()
    assert told == []
    clock.now = 10.1
    queue.expire()
    assert [(n, e.status) for n, e in told] == [(0, 503)]
    assert "not begun within 10 s" in str(told[0][1])
    assert queue.num_rows == 1, "the second row of the first waits on"
    queue.finished(begun, "done")
    assert told[1] == (0, "done")


def test_a_request_that_was_given_up_before_it_was_read_is_told_when_it_is() -> None:
    clock = Clock()
    queue = Queue(LIMITS, clock)
    job = queue.admit(2, 20)
    clock.now = 11
    queue.expire()
    assert queue.is_idle
    with pytest.raises(Refused, match="not begun"):
        put(queue, job, [1, 1])


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(0, 200))
def test_a_reservation_is_lowered_to_what_is_needed_and_never_raised(needed: list[int], reserved: int) -> None:
    queue = Queue(LIMITS)
    job = queue.admit(len(needed), reserved)
    put(queue, job, needed)
    assert queue.num_tokens <= min(reserved, sum(needed))
    assert [row.tokens for row in queue.take(everything)] == needed, "the worker is told what it really takes"
    assert queue.num_tokens == queue.num_rows == queue.num_requests == 0


def test_a_whole_job_waits_until_all_of_it_fits_and_nobody_overtakes_it() -> None:
    queue = Queue(LIMITS)
    whole, after = queue.admit(3, 30), queue.admit(1, 10)
    put(queue, whole, [10, 10, 10], is_whole=True)
    put(queue, after, [1])
    assert queue.take(lambda rows: len(rows) < 3) == []
    assert len(queue.take(everything)) == 4


def test_a_closed_queue_admits_nobody_and_lets_the_others_go_on() -> None:
    queue = Queue(LIMITS)
    job, told = queue.admit(1, 5), []
    queue.close(lambda: Refused(503, "stopping", "stopping"))
    assert refused(queue, 1, 1).status == 503
    put(queue, job, [5], told)
    (row,) = queue.take(everything)
    queue.finished(row, "done")
    assert told == [(0, "done")]


def test_retry_after_grows_with_what_waits_and_has_an_end() -> None:
    queue = Queue(Limits(2, 1000, 10**9, 1000, 10.0))
    queue.worked(100, 1.0)
    queue.admit(1, 1000)
    queue.admit(1, 0)
    assert refused(queue, 1, 1).retry_after_s == 10
    queue = Queue(Limits(1, 1000, 10**9, 1000, 10.0))
    queue.worked(1, 1.0)
    queue.admit(1, 10**8)
    assert refused(queue, 1, 1).retry_after_s == 60
