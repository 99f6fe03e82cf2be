"""Plan, skip what is done, execute, commit. Knows no stage by name and no tensor.

The plan of a stage is made once and stored: a killed run goes on with the same batches and so ends with the same bits.
"""

import math
import shutil
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from loguru import logger

from harness.errors import EnvironmentFault, Stopped
from harness.executor import Executor, Item, ItemResult, Outcome
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Failure, Row, Store

CPU_BUDGET = 8_192
"""Padded tokens a batch where memory is not measured."""
_PROBES = (2_048, 8_192)
"""Padded tokens of the two small batches that a GPU's memory is measured with."""
_SAFETY = 0.85
"""Share of the measured room that is used: allocators fragment."""
_FLOAT_MAX = 3.4028234663852886e38
_GRACE_S = 6.0
"""Time a batch has to end after a signal, before it is dropped; the manifest and the snapshot need the rest of 10 s."""

Tables = Mapping[str, list[Row]]


@runtime_checkable
class Stage(Protocol):
    """One step of an experiment: rows in, rows out. It opens no store and draws no progress."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """Changes when the stage's results would."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Tables it is handed whole."""
        ...

    @property
    def row_bytes(self) -> int:
        """Disk that one item takes, roughly."""
        ...

    def params(self) -> dict[str, Any]:
        """Everything of its settings that decides its rows, for the fingerprint."""
        ...

    def items(self, tables: Tables) -> list[Item]:
        """All its items, done or not."""
        ...

    def setup(self) -> Any:
        """What `run` needs and is costly to make; once per worker."""
        ...

    def run(self, context: Any, items: Sequence[Item]) -> Sequence[ItemResult]:
        """One result per item. An exception fails the whole batch, which is then tried in halves."""
        ...


@runtime_checkable
class Observer(Protocol):
    """Who shows progress."""

    def stage_started(self, stage: str, total: int, done: int) -> None: ...
    def batch_done(self, stage: str, items: int, tokens: int, seconds: float, batch: int, peak_bytes: int) -> None: ...
    def stage_finished(self, stage: str) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a run may take. `max_tokens` None: measured, or `CPU_BUDGET`."""

    max_tokens: int | None = None
    reserve_disk_bytes: int = 500_000_000


@dataclass
class StageReport:
    """What a stage came to in this process, for the manifest."""

    name: str
    version: int
    status: str = "running"
    num_items: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    num_batches: int = 0
    splits: int = 0
    peak_bytes: int = 0
    budget: int = field(default=0)


class Engine:
    """Runs stages of one run, in order, and is the only one to write its store."""

    def __init__(
        self, store: Store, paths: RunPaths, executor: Executor, limits: Limits, observer: Observer, stop: "StopSignal"
    ):
        self._store, self._paths, self._executor = store, paths, executor
        self._limits, self._observer, self._stop = limits, observer, stop

    def run(
        self, stages: Iterable[Stage], after_stage: Callable[[StageReport], None], retry_failed: bool = False
    ) -> None:
        """Bring every stage to its end. Raises Stopped on a signal, EnvironmentFault on a full disk; both resumable."""
        for stage in stages:
            report = self._run_stage(stage, retry_failed)
            after_stage(report)

    def _run_stage(self, stage: Stage, retry_failed: bool) -> StageReport:
        items = {i.key: i for i in stage.items({name: self._store.table(name) for name in stage.reads})}
        plan = self._store.plan(stage.name)
        self._check_disk(stage, len(items))
        if retry_failed:
            plan += self._plan_retries(stage, items, plan)
        with self._stop.shield():
            self._store.start_stage(stage.name, stage.version, len(items))
        finished = sum(len(b.keys) for b in plan if b.status == "done" and b.attempt == 1)
        self._observer.stage_started(stage.name, len(items), finished)
        budget = _Budget(self._limits.max_tokens, self._executor, plan, self._store.ran_out(stage.name))
        while True:
            plan += self._plan_more(stage, items, plan, budget)
            todo = deque(sorted((b for b in plan if b.status == "planned"), key=lambda b: _place(b, plan)))
            if not todo:
                break
            self._execute(stage, items, todo, budget, next_id=len(plan))
            plan = self._store.plan(stage.name)
            budget.remember(plan)
        self._observer.stage_finished(stage.name)
        return self._finish(stage, plan, budget)

    def _plan_more(
        self, stage: Stage, items: Mapping[str, Item], plan: Sequence[Batch], budget: "_Budget"
    ) -> list[Batch]:
        """Store batches for the items that no batch holds yet: all of them, or on a GPU first those that measure it."""
        if budget.tokens is None and any(b.status == "planned" for b in plan):
            return []  # a run that was killed before its probes were done: measure first
        planned = {key for b in plan for key in b.keys}
        new = [item for key, item in items.items() if key not in planned]
        batches = list(budget.cut(new, len(plan), stage.name))
        if batches:
            with self._stop.shield():
                self._store.add_batches(batches)
        return batches

    def _plan_retries(self, stage: Stage, items: Mapping[str, Item], plan: Sequence[Batch]) -> list[Batch]:
        """One new batch for each item that failed, beside the batch it failed in."""
        failed = [key for key in self._store.failed(stage.name) if key in items]
        last = {key: b for b in plan for key in b.keys if b.status == "done"}
        waiting = {key for b in plan for key in b.keys if b.status == "planned"}
        retries = [
            replace(
                _batch(stage.name, len(plan) + n, [items[key]]),
                parent=last[key].batch_id,
                attempt=last[key].attempt + 1,
            )
            for n, key in enumerate(k for k in failed if k in last and k not in waiting)
        ]
        if retries:
            with self._stop.shield():
                self._store.add_batches(retries)
        return retries

    def _execute(
        self, stage: Stage, items: Mapping[str, Item], todo: deque[Batch], budget: "_Budget", next_id: int
    ) -> None:
        """Compute and commit what is planned. A batch that does not fit, or fails whole, comes back as two halves."""

        def pull() -> Iterator[tuple[Batch, list[Item]]]:
            while todo:
                batch = todo.popleft()
                if budget.allows(batch):
                    yield batch, [items[key] for key in batch.keys]
                else:
                    split(batch, "ceiling_split", f"{batch.padded_tokens} padded tokens are over the learned ceiling")

        def split(batch: Batch, kind: str, why: str) -> None:
            nonlocal next_id
            halves = _halves(batch, items, next_id)
            next_id += len(halves)
            message = f"{stage.name} batch {batch.batch_id} ({len(batch.keys)} items): {why}; split in two"
            with self._stop.shield():
                self._store.add_batches(halves, batch, message, kind)
            # Running out of memory is worth one line; that later batches keep to what was learned is not.
            logger.log("DEBUG" if kind == "ceiling_split" else "WARNING", "{}", message)
            todo.extendleft(reversed(halves))

        with self._stop.droppable():
            for outcome in self._executor.map(stage.setup, stage.run, pull()):
                batch: Batch = outcome.token
                if outcome.out_of_memory and len(batch.keys) > 1:
                    budget.learn(batch)
                    split(batch, "oom_split", "out of memory")
                elif outcome.error is not None and len(batch.keys) > 1:
                    logger.debug("traceback of a failed batch:\n{}", outcome.traceback)
                    split(batch, "error_split", outcome.error)
                else:
                    with self._stop.shield():
                        self._commit(stage, batch, outcome)
                if self._stop.requested:
                    raise Stopped("stopped by a signal")

    def _commit(self, stage: Stage, batch: Batch, outcome: Outcome) -> None:
        result = _collect(batch, outcome)
        for failure in result.failures:
            logger.error("{} failed on {}: {}", stage.name, failure.key, failure.message)
        if outcome.traceback:
            logger.debug("its traceback:\n{}", outcome.traceback)
        self._store.commit(batch, result)
        self._store.publish_if_due(self._paths.live)
        self._check_reserve()
        self._observer.batch_done(
            stage.name, len(batch.keys), result.tokens, result.seconds, len(batch.keys), result.peak_bytes
        )

    def _finish(self, stage: Stage, plan: Sequence[Batch], budget: "_Budget") -> StageReport:
        row = next(r for r in self._store.stage_rows() if r["stage"] == stage.name)
        with self._stop.shield():
            self._store.finish_stage(stage.name, "done" if not row["num_failed"] else "failed")
        return StageReport(
            stage.name, stage.version, "done" if not row["num_failed"] else "failed", row["num_items"], row["num_failed"],
            round(row["seconds"], 3), row["tokens"], sum(b.status == "done" for b in plan),
            sum(b.status == "split" for b in plan), max((b.peak_bytes or 0 for b in plan), default=0), budget.tokens or 0,
        )  # fmt: skip

    def _check_disk(self, stage: Stage, num_items: int) -> None:
        """Before a stage: room for its rows, twice, since the snapshot is a copy, and for what must stay free."""
        need = 2 * num_items * stage.row_bytes + self._limits.reserve_disk_bytes
        free = shutil.disk_usage(self._paths.folder).free
        if free < need:
            raise EnvironmentFault(
                f"{self._paths.folder}: stage {stage.name} needs about {_mb(need)} of disk, {_mb(free)} are free; "
                "free some space (or lower runtime.reserve_disk_gb) and type the same command again"
            )

    def _check_reserve(self) -> None:
        free = shutil.disk_usage(self._paths.folder).free
        if free < self._limits.reserve_disk_bytes / 2:
            raise EnvironmentFault(
                f"{self._paths.folder}: only {_mb(free)} of disk are free; free some space and type the same command again"
            )


class _Budget:
    """How many padded tokens a batch may have: given, or measured on the first two batches; lower after running out."""

    def __init__(self, given: int | None, executor: Executor, plan: Sequence[Batch], ran_out: Collection[int]):
        """`ran_out`: ids of the batches of `plan` that did not fit, in an earlier life of this run."""
        self._capacity = executor.accelerator.capacity_bytes() if given is None else None
        self.tokens: int | None = given or (None if self._capacity is not None else CPU_BUDGET)
        self._ceiling: int | None = None
        for batch in plan:
            if batch.batch_id in ran_out:
                self.learn(batch)
        self.remember(plan)

    def allows(self, batch: Batch) -> bool:
        return self._ceiling is None or batch.padded_tokens <= self._ceiling or len(batch.keys) == 1

    def learn(self, batch: Batch) -> None:
        """A batch did not fit: none larger than its larger half is tried again in this stage."""
        num = len(batch.keys)
        half = math.ceil(batch.padded_tokens * ((num + 1) // 2) / num)
        self._ceiling = min(half, self._ceiling or half)

    def cut(self, items: Sequence[Item], next_id: int, stage: str) -> Iterator[Batch]:
        """Batches of the items, longest first, so that trouble shows early; equal lengths in the order of their keys."""
        ordered = sorted(items, key=lambda i: (-i.length, i.key))
        if self.tokens is None and self._measured:
            self.tokens = self._from_measurement()
        if self.tokens is None:
            for probe in _PROBES:
                batch = _take(ordered, probe)
                if batch:
                    ordered = ordered[len(batch) :]
                    yield _batch(stage, next_id, batch)
                    next_id += 1
            return
        while ordered:
            batch = _take(ordered, self.tokens)
            ordered = ordered[len(batch) :]
            yield _batch(stage, next_id, batch)
            next_id += 1

    def remember(self, plan: Sequence[Batch]) -> None:
        """Take the peaks of the batches that are done as measurements."""
        self._measured = [b for b in plan if b.status == "done" and b.peak_bytes]

    def _from_measurement(self) -> int:
        """Room over what is always there, divided by bytes per padded token: a line through the two probes.

        Never less than the largest batch that did fit.
        """
        small = min(self._measured, key=lambda b: b.padded_tokens)
        large = max(self._measured, key=lambda b: b.padded_tokens)
        rise = (large.peak_bytes or 0) - (small.peak_bytes or 0)
        if large.padded_tokens == small.padded_tokens or rise <= 0:
            return 4 * large.padded_tokens
        per_token = rise / (large.padded_tokens - small.padded_tokens)
        room = (self._capacity or 0) - ((small.peak_bytes or 0) - per_token * small.padded_tokens)
        return max(int(_SAFETY * room / per_token), large.padded_tokens)


def _take(ordered: Sequence[Item], budget: int) -> list[Item]:
    """The most items from the front whose rows × longest row stay within the budget; at least one."""
    if not ordered:
        return []
    longest = max(1.0, ordered[0].length)
    return list(ordered[: max(1, int(budget / longest))])


def _batch(stage: str, batch_id: int, items: Sequence[Item]) -> Batch:
    return Batch(
        stage, batch_id, tuple(i.key for i in items), math.ceil(len(items) * max(1.0, *(i.length for i in items)))
    )


def _place(batch: Batch, plan: Sequence[Batch]) -> tuple[int, ...]:
    """Where a batch stands in the order of running: halves stand where their parent stood, in a resumed run too."""
    if batch.parent is None or plan[batch.parent].status != "split":
        return (batch.batch_id,)
    return (*_place(plan[batch.parent], plan), batch.batch_id)


def _halves(batch: Batch, items: Mapping[str, Item], next_id: int) -> list[Batch]:
    middle = len(batch.keys) // 2
    return [
        replace(
            _batch(batch.stage, next_id + n, [items[k] for k in keys]), parent=batch.batch_id, attempt=batch.attempt
        )
        for n, keys in enumerate((batch.keys[:middle], batch.keys[middle:]))
    ]


def _collect(batch: Batch, outcome: Outcome) -> BatchResult:
    """The rows of the items that worked; a failure for each that did not, NaN and infinity included."""
    result = BatchResult(seconds=outcome.seconds, peak_bytes=outcome.peak_bytes)
    whole = outcome.error or (
        "does not fit in memory even alone; shorten it or free memory" if outcome.out_of_memory else None
    )
    if whole is not None:
        result.failures = [Failure(key, whole) for key in batch.keys]
        return result
    answered = {r.key: r for r in outcome.results}
    for key in batch.keys:
        item = answered.get(key)
        if item is None:
            result.failures.append(Failure(key, "the stage gave no result for it"))
            continue
        error = item.error if item.error is not None else _not_finite(item)
        if error is not None:
            result.failures.append(Failure(key, error or "failed without a message"))
            continue
        result.tokens += item.tokens
        for target, given in ((result.rows, item.rows), (result.updates, item.updates or {})):
            for table, rows in given.items():
                target.setdefault(table, []).extend(rows)
    return result


def _not_finite(item: ItemResult) -> str | None:
    for table, rows in {**item.rows, **(item.updates or {})}.items():
        for row in rows:
            for column, value in row.items():
                if not _finite(value):
                    return f"{table}.{column} is not finite (NaN or infinity)"
    return None


def _finite(value: Any) -> bool:
    """Whether every number in it is finite, and stays so as a 32-bit float, which is what lists are stored as."""
    if isinstance(value, float):
        return bool(abs(value) <= _FLOAT_MAX)  # false for NaN
    if isinstance(value, list | tuple):
        try:  # most lists are plain numbers, and there are many
            finite = all(map(math.isfinite, value))
            return finite and (not value or bool(max(value) <= _FLOAT_MAX and min(value) >= -_FLOAT_MAX))
        except TypeError:
            return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return _finite(value.tolist()) if hasattr(value, "tolist") else True  # numpy's scalars and arrays


def _mb(size: int | float) -> str:
    return f"{size / 1e6:,.0f} MB"


class StopNow(BaseException):
    """Drops the batch in progress; not an Exception, so that no handler on the way takes it for a failed item."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a clean end: the batch in progress may finish, or is dropped after a few seconds.

    A commit is never interrupted. A second signal drops the batch at once. Only the main thread can catch signals;
    elsewhere (tests, notebooks) this does nothing.
    """

    def __init__(self, grace_s: float = _GRACE_S):
        self.requested = False
        self._grace_s = grace_s
        self._shielded = 0
        self._droppable = False
        self._overdue = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._on_signal)
            self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        except ValueError:  # not the main thread
            self._old.clear()
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Nothing is dropped inside: what must be written is written whole."""
        self._shielded += 1
        try:
            yield
        finally:
            self._shielded -= 1
        self._drop_if_overdue()

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Work inside may be dropped; that reads as Stopped outside."""
        self._droppable = True
        try:
            if self.requested:
                raise Stopped("stopped by a signal")
            yield
        except StopNow:
            raise Stopped("stopped by a signal; the batch in progress was dropped") from None
        finally:
            self._droppable = False

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            self._on_alarm()
            return
        self.requested = True
        logger.warning("stopping: finishing the batch in progress (again to drop it)")
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_alarm(self, *_: object) -> None:
        self._overdue = True
        self._drop_if_overdue()

    def _drop_if_overdue(self) -> None:
        if self._overdue and self._droppable and not self._shielded:
            self._overdue = False
            raise StopNow
