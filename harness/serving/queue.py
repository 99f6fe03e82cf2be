"""Who may wait for the device, and who is next.

A request has its place before any work is done for it: its rows and tokens are counted and reserved in one step, so that a
burst cannot slip through between a check and a count. Knows no model, no clock of its own and no HTTP but the numbers of
its refusals.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import HarnessError

_MOST_WAIT_S = 60
_SMOOTHING = 0.1
"""Weight of the newest measurement in the tokens per second that `Retry-After` is guessed from."""


class Refused(HarnessError):
    """A request that is turned away: with which status of HTTP, counted under which `reason`, and when to come again."""

    def __init__(self, status: int, reason: str, line: str, retry_after_s: int | None = None):
        super().__init__(line)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


class Broken(HarnessError):
    """The worker ended in a way that was not expected: nothing more can be computed."""

    exit_code = 1


@dataclass(frozen=True)
class Limits:
    """What may wait at once, all requests together: requests, rows (completions to make), tokens (of contexts and to be
    written). `max_client_batch`: rows of one request. `timeout_s`: how long a request may wait for its first row to begin."""

    max_requests: int
    max_rows: int
    max_tokens: int
    max_client_batch: int
    timeout_s: float


@dataclass(eq=False)
class Row:
    """One completion of a job: `what` the worker is to compute, and the padded tokens that it takes.

    `follow` is called by the worker with what is written so far, after each step; true ends the row there. `company`: so many
    rows may be computed at once while this one is; the worker halves it when memory runs out.
    """

    job: "Job"
    place: int
    what: Any
    tokens: int
    follow: Callable[[Any], bool] | None = None
    company: int | None = None
    charged: int = 0


@dataclass(eq=False)
class Job:
    """One request from its admission until its last row is over. `rows` and `tokens`: what it has reserved and not begun.

    `tell` is called once a row, with its place and its result or error, from whichever thread ended it. Rows of one `group`
    may share a batch; those of a job that `is_whole` begin all at once, and in a batch of their own.
    """

    since: float
    rows: int
    tokens: int
    group: Hashable = None
    is_whole: bool = False
    tell: Callable[[int, Any], None] = field(default=lambda place, outcome: None)
    waiting: deque[Row] = field(default_factory=deque)
    untold: set[int] = field(default_factory=set)
    started_at: float | None = None
    is_cancelled: bool = False
    error: HarnessError | None = None


class Queue:
    """Requests that wait, oldest first. Every method may be called from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self._clock = clock
        self._changed = threading.Condition()
        self._live: OrderedDict[Job, None] = OrderedDict()  # admitted and not over
        self._num_requests = self._num_rows = self._num_tokens = 0
        self._closed: Callable[[], HarnessError] | None = None
        self._tokens_per_s: float | None = None

    # -- requests

    def admit(self, rows: int, tokens: int) -> Job:
        """Reserve a place for so many rows, and tokens: the most that they can be. Raises Refused.

        What is reserved is given back by `cancel`, or as the rows that `submit` hands in begin.
        """
        limits = self.limits
        self.check_size(rows)
        if rows > limits.max_rows or tokens > limits.max_tokens:
            found = f"{rows:,} completions of up to {tokens:,} tokens"
            most = f"{limits.max_rows:,} and {limits.max_tokens:,}"
            raise Refused(413, "too_large", f"{found} can never be queued, which takes at most {most}; send fewer")
        with self._changed:
            if self._closed is not None:
                raise self._closed()
            for name, there, more, most in (
                ("requests", self._num_requests, 1, limits.max_requests),
                ("rows", self._num_rows, rows, limits.max_rows),
                ("tokens", self._num_tokens, tokens, limits.max_tokens),
            ):
                if there + more > most:
                    line = (
                        f"the queue is full: {there:,} {name} wait, and at most {most:,} may (serve.max_queued_{name})"
                    )
                    raise Refused(429, f"queued_{name}", line, self._retry_after_s())
            job = Job(self._clock(), rows, tokens)
            self._live[job] = None
            self._num_requests += 1
            self._num_rows += rows
            self._num_tokens += tokens
        return job

    def check_size(self, rows: int) -> None:
        """Raises Refused for more rows than one request may have, whoever else waits."""
        most = self.limits.max_client_batch
        if rows > most:
            line = f"expected at most {most:,} completions a request (serve.max_client_batch), found {rows:,}"
            raise Refused(413, "max_client_batch", f"{line}; send them in several requests")

    def submit(
        self,
        job: Job,
        group: Hashable,
        rows: Sequence[tuple[Any, int, Callable[[Any], bool] | None]],
        tell: Callable[[int, Any], None],
        *,
        is_whole: bool = False,
    ) -> None:
        """Hand in what a place was reserved for: of each row what it is, its padded tokens, and who follows it.

        The reservation is lowered to what is needed, and never raised. Raises what the job was ended by meanwhile.
        """
        needed = sum(tokens for _, tokens, _ in rows)
        with self._changed:
            if job not in self._live:
                raise job.error or Refused(503, "cancelled", "the request was cancelled")
            assert len(rows) <= job.rows, "more rows than were reserved"
            scale = min(1.0, job.tokens / max(needed, 1))
            job.group, job.tell, job.is_whole = group, tell, is_whole
            job.untold = set(range(len(rows)))
            for place, (what, tokens, follow) in enumerate(rows):
                job.waiting.append(Row(job, place, what, tokens, follow, charged=int(tokens * scale)))
            self._give_back(job, job.rows - len(rows), job.tokens - sum(row.charged for row in job.waiting))
            if not rows:
                self._end(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: its waiting rows leave now, its running ones when the worker looks next."""
        with self._changed:
            if job not in self._live:
                return
            job.is_cancelled = True
            self._drop_waiting(job)
            self._end(job)
            self._changed.notify_all()

    def expire(self) -> None:
        """Refuse the requests that have waited longer than their time without a row that began."""
        now = self._clock()
        with self._changed:
            late = [j for j in self._live if j.started_at is None and now - j.since > self.limits.timeout_s]
        for job in late:
            line = f"not begun within {self.limits.timeout_s:g} s (serve.timeout_s); try again later"
            self.fail(job, Refused(503, "timeout", line, self._retry_after_s()), only_waiting=True)

    def fail(self, job: Job, error: HarnessError, *, only_waiting: bool = False) -> None:
        """Tell a job's rows this error, and forget it; `only_waiting`: unless it has begun meanwhile."""
        with self._changed:
            if job not in self._live or (only_waiting and job.started_at is not None):
                return
            places = sorted(job.untold)
            job.untold.clear()
            job.is_cancelled, job.error = True, error
            self._drop_waiting(job)
            self._end(job)
            self._changed.notify_all()
        for place in places:
            job.tell(place, error)

    # -- the end

    def close(self, refusal: Callable[[], HarnessError]) -> None:
        """Admit nobody any more; those who were admitted go on."""
        with self._changed:
            self._closed = self._closed or refusal
            self._changed.notify_all()

    def fail_all(self, error: HarnessError) -> None:
        """Tell this error to all that wait or run."""
        with self._changed:
            jobs = list(self._live)
        for job in jobs:
            self.fail(job, error)

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self._live

    # -- the worker

    def take(self, fits: Callable[[Sequence[Row]], bool]) -> list[Row]:
        """The rows that begin now: oldest first, for as long as what is next `fits`."""
        with self._changed:
            return list(self._taken(fits))

    def _taken(self, fits: Callable[[Sequence[Row]], bool]) -> Iterator[Row]:
        for job in list(self._live):
            while job.waiting:
                some = list(job.waiting) if job.is_whole else [job.waiting[0]]
                if not fits(some):
                    return
                if job.started_at is None:
                    job.started_at = self._clock()
                for row in some:
                    job.waiting.popleft()
                    self._give_back(job, 1, row.charged)
                    yield row

    def finished(self, row: Row, outcome: Any) -> None:
        """A running row is over."""
        job = row.job
        with self._changed:
            if row.place not in job.untold:
                return
            job.untold.discard(row.place)
            if not job.untold:
                self._end(job)
        job.tell(row.place, outcome)

    def oldest(self) -> float | None:
        """Since when the oldest row waits; None where none does."""
        with self._changed:
            return next((job.since for job in self._live if job.waiting), None)

    def wait_for_work(self, is_over: Callable[[], bool]) -> None:
        """Until a row waits, or it is over."""
        with self._changed:
            self._changed.wait_for(lambda: is_over() or any(job.waiting for job in self._live))

    def wake(self) -> None:
        """Have those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def worked(self, tokens: int, seconds: float) -> None:
        """So many tokens' worth of rows ended in this time."""
        rate = tokens / max(seconds, 1e-6)
        known = self._tokens_per_s
        self._tokens_per_s = rate if known is None else known + _SMOOTHING * (rate - known)

    # -- numbers

    @property
    def num_requests(self) -> int:
        """Requests with a row that has not begun."""
        return self._num_requests

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def _retry_after_s(self) -> int:
        rate = self._tokens_per_s
        return 1 if not rate else max(1, min(_MOST_WAIT_S, math.ceil(self._num_tokens / rate)))

    def _give_back(self, job: Job, rows: int, tokens: int) -> None:
        """Of what a job has reserved. One without a row left to begin waits no more."""
        had_rows = job.rows
        job.rows -= rows
        job.tokens -= tokens
        self._num_rows -= rows
        self._num_tokens -= tokens
        assert min(job.rows, job.tokens) >= 0, "given back more than was reserved"
        if had_rows and not job.rows:
            self._num_tokens -= job.tokens  # what rounding left
            job.tokens = 0
            self._num_requests -= 1

    def _drop_waiting(self, job: Job) -> None:
        job.waiting.clear()
        if job.rows:
            self._give_back(job, job.rows, job.tokens)

    def _end(self, job: Job) -> None:
        self._live.pop(job, None)
