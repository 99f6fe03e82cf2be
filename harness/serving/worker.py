"""The one thread that owns the device: it writes completions in batches that rows join and leave between steps.

Rows of one group share a decoder; groups take turns, a step each. Rows begin oldest first, as many as the budget of padded
tokens holds. Knows no request and no HTTP: what a row gives goes back through its job.
"""

import gc
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from loguru import logger

from harness.errors import HarnessError, ItemFailed, machine_fault
from harness.models.rollout import Ask, Rollout
from harness.serving.metrics import Metrics
from harness.serving.queue import Broken, Queue, Refused, Row

_JOIN_S = 0.3
"""How long an ended service waits for its last step, which cannot be broken off."""


class Decoding(Protocol):
    """A batch of completions, see `rollout.Decoder`."""

    def add(self, asks: Sequence[Ask]) -> list[int]: ...

    def step(self) -> dict[int, Rollout | ItemFailed]: ...

    def written(self, number: int) -> Rollout: ...

    def drop(self, numbers: Sequence[int]) -> None: ...


class _Group:
    """Rows that share a decoder, by their number in it, and since when each runs."""

    def __init__(self, decoder: Decoding):
        self.decoder = decoder
        self.rows: dict[int, Row] = {}
        self.since: dict[int, float] = {}


class Worker:
    """Takes rows from a queue and ends each with a Rollout or an error.

    `decoder_of` gives an empty decoder for a group. `budget` is in padded tokens: rows × the longest of their group. A row
    that exceeds it alone runs alone. With nothing running the first row waits at most `batch_wait_s` for company.
    """

    def __init__(
        self,
        queue: Queue,
        decoder_of: Callable[[Any], Decoding],
        budget: int,
        batch_wait_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.queue, self.metrics = queue, metrics
        self.error: BaseException | None = None
        self._decoder_of, self._budget, self._batch_wait_s, self._clock = decoder_of, budget, batch_wait_s, clock
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._again: deque[Row] = deque()  # began, and must begin again
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it after the step in progress."""
        self._over.set()
        self.queue.wake()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def num_running(self) -> int:
        """Rows that have begun and are not over."""
        return sum(len(group.rows) for group in self._groups.values()) + len(self._again)

    # -- the thread

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                self.turn()
        except BaseException as e:
            self._die(e)

    def turn(self) -> None:
        """Let rows leave and join, then make one step of one group; wait where there is nothing to do."""
        self._leave()
        if not self._groups and not self._again:
            self.queue.wait_for_work(self._over.is_set)
            self._wait_for_company()
            if self._over.is_set():
                return
        self._join()
        self.metrics.running_rows.set(self.num_running)
        if self._groups:
            key = next(iter(self._groups))
            self._groups.move_to_end(key)
            self._guarded(key, self._step)

    def _wait_for_company(self) -> None:
        oldest = self.queue.oldest()
        left = 0.0 if oldest is None else oldest + self._batch_wait_s - self._clock()
        if left > 0:
            self._over.wait(left)

    def _leave(self) -> None:
        """Rows that nobody waits for."""
        self._again = deque(row for row in self._again if not row.job.is_cancelled)
        for key, group in list(self._groups.items()):
            if gone := [number for number, row in group.rows.items() if row.job.is_cancelled]:
                group.decoder.drop(gone)
                for number in gone:
                    self._forget(group, number)
            if not group.rows:
                del self._groups[key]
        self.metrics.running_rows.set(self.num_running)

    def _join(self) -> None:
        """Rows that begin: those that must begin again first."""
        fits = _Room(self._budget, [row for group in self._groups.values() for row in group.rows.values()])
        joining: dict[Hashable, list[Row]] = {}
        while self._again and fits([self._again[0]]):
            row = self._again.popleft()
            joining.setdefault(_key(row), []).append(row)
        if not self._again:
            now = self._clock()
            for row in self.queue.take(fits):
                if row.place == 0:
                    self.metrics.queued_s.observe(max(0.0, now - row.job.since))
                self.metrics.prompt_tokens.inc(len(row.what.context))
                joining.setdefault(_key(row), []).append(row)
        for key, rows in joining.items():
            if key not in self._groups:
                self._groups[key] = _Group(self._decoder_of(rows[0].job.group))
            self._guarded(key, lambda group, rows=rows: self._begin(group, rows), rows)

    def _begin(self, group: _Group, rows: Sequence[Row]) -> None:
        now = self._clock()
        for number, row in zip(group.decoder.add([row.what for row in rows]), rows, strict=True):
            group.rows[number] = row
            group.since[number] = now

    def _step(self, group: _Group) -> None:
        start = self._clock()
        self.metrics.batch_rows.observe(len(group.rows))
        ended = group.decoder.step()
        self.metrics.step_s.observe(max(0.0, self._clock() - start))
        for number, outcome in ended.items():
            self._end(group, number, outcome)
        for number, row in list(group.rows.items()):
            if row.follow is None:
                continue
            try:
                is_enough = row.follow(group.decoder.written(number))
            except Exception as e:  # one row's text is no reason to end the others
                logger.error("a row could not be followed:\n{}", "".join(traceback.format_exception(e)))
                group.decoder.drop([number])
                self._end(group, number, ItemFailed(f"its text cannot be followed: {type(e).__name__}"))
                continue
            if is_enough:
                done = group.decoder.written(number)
                group.decoder.drop([number])
                self._end(group, number, done)

    def _end(self, group: _Group, number: int, outcome: Rollout | HarnessError) -> None:
        row, since = self._forget(group, number)
        seconds = max(0.0, self._clock() - since)
        self.metrics.row_s.observe(seconds)
        self.queue.worked(row.tokens * (len(group.rows) + 1), seconds)
        if isinstance(outcome, Rollout):
            self.metrics.new_tokens.inc(len(outcome.token_ids))
        self.queue.finished(row, outcome)

    def _forget(self, group: _Group, number: int) -> tuple[Row, float]:
        return group.rows.pop(number), group.since.pop(number)

    # -- failures

    def _guarded(self, key: Hashable, act: Callable[[_Group], None], joining: Sequence[Row] = ()) -> None:
        """Work on a group; where memory runs out, its rows begin again in halves. One that was alone fails alone."""
        try:
            act(self._groups[key])
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        else:
            return
        # Out here nothing holds the frames, and with them the tensors, of what failed.
        rows = [*dict.fromkeys([*self._groups.pop(key).rows.values(), *joining])]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.metrics.splits.inc()
        num = len(rows) + sum(len(group.rows) for group in self._groups.values())
        if num == 1:
            self.queue.finished(rows[0], ItemFailed("out of memory, even alone: ask for fewer tokens"))
            return
        logger.warning(
            "out of memory with {} completions at once: beginning {} of them again in halves", num, len(rows)
        )
        for row in rows:
            row.company = max(1, min(num, row.company or num) // 2)
        self._again.extendleft(reversed(rows))

    def _die(self, error: BaseException) -> None:
        """Nothing can be trusted any more: everybody is told, and nobody admitted."""
        self.error = error
        logger.error("the worker ended:\n{}", "".join(traceback.format_exception(error)))
        told = f"the worker ended unexpectedly ({type(error).__name__}); see the service's log"
        self.queue.close(lambda: Refused(503, "broken", told))
        self.queue.fail_all(Broken(told))
        self._groups.clear()
        self._again.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the CPU's or a GPU's; torch says it of the CPU in the text of a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    fault = machine_fault(error) if isinstance(error, RuntimeError) else None
    return fault is not None and str(fault).startswith("memory ran out")


def _key(row: Row) -> Hashable:
    """What the rows of a batch have in common; a job that is whole has a batch of its own, unless it was split."""
    return (row.job.group, row.job if row.job.is_whole else None)


class _Room:
    """Whether rows fit beside those that run, and those that were found to fit before."""

    def __init__(self, budget: int, running: Sequence[Row]):
        self._budget = budget
        self._count: Counter[Hashable] = Counter()
        self._longest: dict[Hashable, int] = {}
        self._company: int | None = None
        self._add(running)

    def __call__(self, rows: Sequence[Row]) -> bool:
        count, longest, company = self._count.copy(), dict(self._longest), self._company
        self._add(rows)
        padded = sum(n * self._longest[key] for key, n in self._count.items())
        num = self._count.total()
        is_alone = num == len(rows)
        if (self._company is None or num <= self._company) and (is_alone or padded <= self._budget):
            return True
        self._count, self._longest, self._company = count, longest, company
        return False

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = _key(row)
            self._count[key] += 1
            self._longest[key] = max(self._longest.get(key, 0), row.tokens)
            if row.company is not None:
                self._company = min(row.company, self._company or row.company)
