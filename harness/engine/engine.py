"""Plan, skip what is done, execute, commit. Knows no stage by name and no tensor.

The plan of a stage is made once and stored: a killed run goes on with the same batches and so ends with the same bits.
"""

import math
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from loguru import logger

from harness.engine.chain import States
from harness.engine.executors import Executor, Job, Outcome, StagedFile
from harness.engine.plan import Budget, Plan, batch_of, halves, in_order
from harness.engine.stage import AnyStage, Item, ItemResult, kind_of, loaded
from harness.engine.staging import claim, compute, drop_folder, drop_if_empty, sweep_staged
from harness.engine.stop import StopSignal
from harness.engine.tables import Tables
from harness.errors import EnvironmentFault
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Failure, Row, Store

_FLOAT_MAX = 3.4028234663852886e38
_NO_NUMBERS = (str, int, bool, type(None))
"""Types of values that are finite whatever they are; most of what a run stores is of these."""


class BatchReport(NamedTuple):
    """What a batch that is committed came to: its items, their `length` together, and what it took."""

    stage: str
    num_items: int
    length: float
    tokens: int
    seconds: float
    peak_bytes: int


@runtime_checkable
class Observer(Protocol):
    """Who shows progress. Lengths are those of `Item`, added up."""

    def doing(self, stage: str, what: str) -> None:
        """What a stage is at beside its batches: a few words, empty once it is done."""
        ...

    def stage_started(self, stage: str, total: int, done: int, length: float, length_done: float) -> None: ...
    def batch_done(self, batch: BatchReport) -> None: ...
    def stage_finished(self, stage: str) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a run may take. `max_tokens` None: measured."""

    max_tokens: int | None = None
    reserve_disk_bytes: int = 500_000_000
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Items a batch, for stages that are to be cut as another run cut them."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Seconds a padded token that a stage is expected to take; its first batch is small enough for that."""


@dataclass
class StageReport:
    """What a stage came to in this process, for the manifest."""

    name: str
    version: int
    status: str = "running"
    num_items: int = 0
    num_failed: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    tokens: int = 0
    """Tokens that went through the model, each once however many rows share it; a share of one through a share of its layers."""
    prefill_tokens: int = 0
    """Of them, those of contexts."""
    padding_tokens: int = 0
    """Computed beside them, and thrown away."""
    tokens_per_s: float = 0.0
    num_batches: int = 0
    splits: int = 0
    peak_bytes: int = 0
    budget: int = 0
    sizes: tuple[int, ...] = ()
    """Items a batch, in the order of the plan; retries left out. The same sizes give the same bits again."""
    retried: int = 0
    """Items that were measured on a later attempt, each in a batch of its own: the last bits may differ from the plan's."""
    num_untried: int = 0
    """Items of a loop that were not tried, since one before them failed."""


class Engine:
    """Runs stages of one run, in order, and is the only one to write its store."""

    def __init__(
        self, store: Store, paths: RunPaths, executor: Executor, limits: Limits, observer: Observer, stop: StopSignal
    ):
        self._store, self._paths, self._executor = store, paths, executor
        self._limits, self._observer, self._stop = limits, observer, stop

    def run(
        self, stages: Iterable[AnyStage], after_stage: Callable[[StageReport], None], retry_failed: bool = False
    ) -> None:
        """Bring every stage to its end. Raises Stopped on a signal, EnvironmentFault on a full disk; both resumable."""
        if num := sweep_staged(self._paths.staged):
            self._store.event("info", "swept_files", f"{num} files of batches that were killed")
        for stage in stages:
            with self._stop.droppable(), self._stop.patient(getattr(stage, "grace_s", None)):
                report = self._run_stage(stage, retry_failed)
            after_stage(report)
        drop_if_empty([self._paths.staged])

    def _run_stage(self, stage: AnyStage, retry_failed: bool) -> StageReport:
        self._observer.doing(stage.name, "listing its items")
        tables = Tables(self._store, stage.reads, self._paths.artifacts)
        with self._stop.at_once():
            items = {i.key: i for i in stage.items(tables)}
        self._observer.doing(stage.name, "")
        plan = Plan(self._store.plan(stage.name), is_loop=kind_of(stage) == "loop")
        self._check_disk(stage, len(items))
        failed = set(self._store.failed(stage.name))
        if retry_failed:
            self._plan_retries(stage, items, plan, failed)
        # Items may have changed since the plan was made, where what they rest on was measured again.
        finished = {key for b in plan if b.status == "done" for key in b.keys} & items.keys()
        with self._stop.shield():
            self._store.drop_items(stage.name, sorted(failed - items.keys()))
            self._store.start_stage(stage.name, stage.version, len(items), len(finished - failed))
        lengths = [math.fsum(items[key].length for key in keys) for keys in (items, finished)]
        self._observer.stage_started(stage.name, len(items), len(finished), *lengths)
        capacity = self._executor.accelerator.capacity_bytes()
        sizes = self._limits.sizes.get(stage.name, ())
        rate = self._limits.rates.get(stage.name)
        budget = Budget(self._limits.max_tokens, capacity, plan, self._store.ran_out(stage.name), sizes, rate)
        course = _Course(self, stage, tables, items, plan, budget, failed & items.keys())
        while course.has_work():
            for outcome in self._executor.map(partial(self._set_up, stage), partial(compute, stage), course.jobs()):
                course.take(outcome)
                self._stop.check()
        course.say_untried()
        self._observer.stage_finished(stage.name)
        return self._finish(stage, plan, budget, course.num_untried)

    def _plan_retries(
        self, stage: AnyStage, items: Mapping[str, Item[Any]], plan: Plan, failed: Collection[str]
    ) -> None:
        """One new batch for each item that failed, beside the batch it failed in."""
        last = {key: b for b in plan for key in b.keys if b.status == "done"}
        waiting = {key for b in plan for key in b.keys if b.status == "planned"}
        retries = [
            replace(
                batch_of(stage.name, len(plan) + n, [items[key]]),
                parent=last[key].batch_id,
                attempt=last[key].attempt + 1,
            )
            for n, key in enumerate(k for k in sorted(failed) if k in items and k in last and k not in waiting)
        ]
        if retries:
            with self._stop.shield():
                self._store.add_batches(retries)
            plan.add(retries)

    def _set_up(self, stage: AnyStage) -> Any:
        self._observer.doing(stage.name, "loading what it needs")
        with self._stop.at_once():
            context = stage.setup()
        self._observer.doing(stage.name, "")
        return context

    def _finish(self, stage: AnyStage, plan: Plan, budget: Budget, num_untried: int) -> StageReport:
        row = next(r for r in self._store.stage_rows() if r["stage"] == stage.name)
        with self._stop.shield():
            self._store.finish_stage(stage.name, "done" if not row["num_failed"] else "failed")
        done = [b for b in plan if b.status == "done"]
        return StageReport(
            name=stage.name,
            version=stage.version,
            status="done" if not row["num_failed"] else "failed",
            num_items=row["num_items"],
            num_failed=row["num_failed"],
            num_rows=row["num_rows"],
            seconds=round(row["seconds"], 3),
            tokens=row["tokens"],
            prefill_tokens=row["prefill_tokens"],
            padding_tokens=row["padding_tokens"],
            tokens_per_s=round(row["tokens"] / row["seconds"], 1) if row["seconds"] else 0.0,
            num_batches=len(done),
            splits=sum(b.status == "split" for b in plan),
            peak_bytes=max((b.peak_bytes or 0 for b in plan), default=0),
            budget=budget.tokens or 0,
            sizes=tuple(len(b.keys) for b in plan.in_order() if b.status == "done" and b.attempt == 1),
            retried=sum(len(b.keys) for b in done if b.attempt > 1),
            num_untried=num_untried,
        )

    def _check_disk(self, stage: AnyStage, num_items: int) -> None:
        """Before a stage: room for its rows, twice, since the snapshot is a copy, for its files, and for what must stay
        free."""
        files = num_items * int(getattr(stage, "file_bytes", 0))
        need = 2 * num_items * stage.row_bytes + files + self._limits.reserve_disk_bytes
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


class _Course:
    """One stage on its way: which batch is next, what is out, and what becomes of an outcome.

    The plan is read from the store once and kept in step here. Asking the store again for each batch would read every key
    of every batch as often as there are batches.
    """

    def __init__(
        self,
        engine: Engine,
        stage: AnyStage,
        tables: Tables,
        items: Mapping[str, Item[Any]],
        plan: Plan,
        budget: Budget,
        failed: set[str],
    ):
        self._engine, self._stage, self._tables, self._items = engine, stage, tables, items
        self._plan, self._budget, self._failed = plan, budget, set(failed)
        self._store, self._paths, self._stop = engine._store, engine._paths, engine._stop
        self._kind = kind_of(stage)
        new = [item for key, item in items.items() if key not in plan]
        self._waiting: Sequence[Item[Any]] = new if self._kind == "loop" else in_order(new)
        self._todo: deque[Batch] = deque()
        self._num_out = 0
        self._ahead: dict[str, Item[Any]] = {}
        """Items that are loaded, whose batches are next."""
        self._ended_at: str | None = None
        """The item that ended a loop."""
        self._states: States | None = None
        if self._kind != "map":
            rows = self._store.query("SELECT path, sha256, bytes FROM artifacts")
            self._states = States(stage.name, plan, self._paths.artifacts, rows, getattr(stage, "keeps", "last"))
            self._states.sweep()
            self._say_stale()

    @property
    def num_untried(self) -> int:
        """Items that were planned and will not be computed."""
        return sum(key in self._items for b in self._plan if b.status == "planned" for key in b.keys)

    def has_work(self) -> bool:
        """Plan what can be planned; whether there is a batch to compute."""
        self._stop.check()
        self._plan_more()
        self._todo = deque(self._planned())
        self._num_out = 0
        return bool(self._todo)

    def jobs(self) -> Iterator[Job | None]:
        """What is planned, and what is planned once that was measured; None while there is nothing before an outcome."""
        while True:
            # Batches that are out may come back in halves, and a chain goes on from what the one that is out leaves.
            if self._num_out and (self._states is not None or not self._todo):
                yield None
                continue
            if not self._todo and not self._plan_more():
                return
            batch = self._todo.popleft()
            if not self._budget.allows(batch, self._plan.place(batch)):
                why = f"{batch.padded_tokens} padded tokens are over the learned ceiling"
                self._split(batch, "ceiling_split", why)
                continue
            items = [self._items[key] for key in batch.keys if key in self._items]
            before = self._states.before(batch) if self._states else None
            if before is not None:
                before.check()  # here, where a damaged one ends the run and says which, rather than every item after it
            self._num_out += 1
            yield Job(batch, self._loaded(items), self._staging(batch), before)

    def _loaded(self, items: Sequence[Item[Any]]) -> list[Item[Any]]:
        """Items as they are computed; loaded with those of the next batches, as far as the stage allows."""
        if any(i.key not in self._ahead for i in items):
            keys = dict.fromkeys(i.key for i in items)
            most = getattr(self._stage, "loads_ahead", 0)
            for batch in self._todo:
                if len(keys) + len(batch.keys) > most:
                    break
                keys.update(dict.fromkeys(batch.keys))
            wanted = [self._items[key] for key in keys if key in self._items]
            self._ahead = {i.key: i for i in loaded(self._stage, self._tables, wanted)}
        return [self._ahead.pop(i.key) for i in items]

    def take(self, outcome: Outcome) -> None:
        """Commit an outcome. A batch that does not fit, or fails whole, comes back as two halves."""
        batch: Batch = outcome.token
        self._num_out -= 1
        self._budget.hear(outcome.capacity_bytes)
        if outcome.error is not None and self._stop.dropped:
            self._stop.check()
        can_split = len(batch.keys) > 1
        if outcome.out_of_memory and can_split:
            self._budget.learn(batch, self._plan.place(batch))
            self._split(batch, "oom_split", "out of memory")
        elif outcome.error is not None and can_split:
            logger.debug("traceback of a failed batch:\n{}", outcome.traceback)
            self._split(batch, "error_split", outcome.error)
        elif can_split and self._states is not None and (why := _unforeseen(batch, outcome, self._items)):
            # Its state has taken in what is no result. Without that item it is computed again.
            self._drop_files(outcome.files, why)
            self._split(batch, "error_split", why)
        else:
            with self._stop.shield():
                self._commit(batch, outcome)
        drop_folder(self._staging(batch))

    def say_untried(self) -> None:
        """Where a loop has ended before its end: say so, and by which item."""
        if not self.num_untried:
            return
        at = self._ended_at or "an item that failed before"
        message = f"{self._stage.name} ended at {at}, which failed: {self.num_untried} items after it were not tried"
        logger.error("{}; the same command with --retry-failed goes on from there", message)
        if self._ended_at is not None:
            with self._stop.shield():
                self._store.event("error", "chain_ended", message, self._stage.name, self._ended_at)

    # -- planning

    def _plan_more(self) -> bool:
        """Store batches for the items that no batch holds yet: all of them, or first one that measures time and memory."""
        if self._kind == "loop":
            batches = [batch_of(self._stage.name, len(self._plan) + n, [i]) for n, i in enumerate(self._waiting)]
        elif self._budget.tokens is None and any(b.status == "planned" for b in self._plan):
            return False  # measure first
        else:
            self._budget.remember(self._plan)
            batches = list(self._budget.cut(self._waiting, len(self._plan), self._stage.name))
        if not batches:
            return False
        self._waiting = self._waiting[sum(len(b.keys) for b in batches) :]
        with self._stop.shield():
            self._store.add_batches(batches)
        self._plan.add(batches)
        self._todo.extend(batches)
        return True

    def _planned(self) -> Iterator[Batch]:
        """Batches to compute, in the order of the plan; of a loop those before an item that failed and is not retried."""
        retried = {key for b in self._plan if b.status == "planned" and b.attempt > 1 for key in b.keys}
        for batch in self._plan.in_order():
            if batch.status == "planned":
                yield batch
            elif self._kind == "loop" and batch.status == "done" and self._failed.intersection(batch.keys) - retried:
                return

    def _split(self, batch: Batch, kind: str, why: str) -> None:
        parts = halves(batch, self._items, len(self._plan))
        message = f"{self._stage.name} batch {batch.batch_id} ({len(batch.keys)} items): {why}; split in two"
        with self._stop.shield():
            self._store.add_batches(parts, batch, message, kind)
        self._plan.change(replace(batch, status="split"))
        self._plan.add(parts)
        # Running out of memory is worth one line; that later batches keep to what was learned is not.
        logger.log("DEBUG" if kind == "ceiling_split" else "WARNING", "{}", message)
        self._todo.extendleft(reversed(parts))

    # -- what comes back

    def _commit(self, batch: Batch, outcome: Outcome) -> None:
        result = collect(batch, outcome, [key for key in batch.keys if key not in self._items])
        state = self._claim_files(batch, outcome, result)
        for failure in result.failures:
            logger.error("{} failed on {}: {}", self._stage.name, failure.key, failure.message)
        if outcome.traceback:
            logger.debug("its traceback:\n{}", outcome.traceback)
        self._store.commit(batch, result)
        if state is not None and self._states is not None:
            self._states.committed(batch, state)
        self._plan.change(replace(batch, status="done", peak_bytes=result.peak_bytes, work_s=result.work_s))
        failed = {f.key for f in result.failures}
        self._failed.difference_update(batch.keys)
        self._failed.update(failed)
        if failed and self._kind == "loop":
            self._ended_at = batch.keys[0]
            self._todo.clear()
        self._store.publish_if_due(self._paths.live)
        self._engine._check_reserve()
        length = math.fsum(self._items[key].length for key in batch.keys if key in self._items)
        self._engine._observer.batch_done(
            BatchReport(self._stage.name, len(batch.keys), length, result.tokens, result.seconds, result.peak_bytes)
        )

    def _claim_files(self, batch: Batch, outcome: Outcome, result: BatchResult) -> Row | None:
        """Give the files of what worked their names, before any row speaks of them: a kill leaves a file, never a claim.

        Their rows go into `result`; the one of a state comes back.
        """
        failed = {f.key: f.message for f in result.failures}
        whole = f"all {len(batch.keys)} items failed" if len(failed) == len(batch.keys) else None
        for item, path in outcome.unwritten:
            self._say_dropped(path, failed.get(item, "its item failed"), item)
        state, claimed = None, list[tuple[StagedFile, Path]]()
        for file in outcome.files:
            why = whole if file.item is None else failed.get(file.item)
            if why is not None:
                self._drop_files([file], why)
                continue
            path = file.artifact.path
            assert file.is_state or self._states is None or not self._states.is_own(path), f"{path}: a state's name"
            if file.is_state and self._states is not None:
                path = self._states.path(batch, path)
            claimed.append((file, self._paths.artifacts / path))
            row = _artifact_row(file, path, batch)
            result.rows.setdefault("artifacts", []).append(row)
            if file.is_state and self._states is not None:
                state = {"path": path, "sha256": file.sha256, "bytes": file.bytes}
                if (gone := self._states.gone_after(batch)) is not None:
                    result.replaced.append(("artifacts", {"path": gone}))
        claim(claimed)
        return state

    def _drop_files(self, files: Iterable[StagedFile], why: str) -> None:
        for file in files:
            self._say_dropped(file.artifact.path, why, file.item)

    def _say_dropped(self, path: str, why: str, item: str | None) -> None:
        self._store.event("info", "dropped_file", f"{path}: {why}", self._stage.name, item)

    def _say_stale(self) -> None:
        """A state holds what it was made of for good: where an item is no more, only measuring anew takes it out."""
        gone = {k for b in self._plan if b.status == "done" for k in b.keys} - self._items.keys()
        if gone:
            message = (
                f"{len(gone)} items that are no more, such as {min(gone)}, are part of the state of {self._stage.name}"
            )
            logger.warning("{}; --resume new makes it without them", message)
            self._store.event("warning", "stale_state", message, self._stage.name)

    def _staging(self, batch: Batch) -> Any:
        return self._paths.staged / f"{batch.stage}-{batch.batch_id}-{batch.attempt}"


def _unforeseen(batch: Batch, outcome: Outcome, items: Mapping[str, Item[Any]]) -> str | None:
    """Why an item is no result although its stage took it for one, and so into the state: a number that is not finite, or
    no answer at all. None where there is none."""
    told = {r.key for r in outcome.results if r.error is not None}
    result = collect(batch, outcome, [key for key in batch.keys if key not in items])
    return next((f"{f.key}: {f.message}" for f in result.failures if f.key not in told), None)


def _artifact_row(file: StagedFile, path: str, batch: Batch) -> Row:
    """A file as the table `artifacts` tells of it."""
    artifact = file.artifact
    return {
        "path": path,
        "kind": artifact.kind,
        "sha256": file.sha256,
        "bytes": file.bytes,
        "shape": list(artifact.shape),
        "dtype": artifact.dtype,
        "stage": batch.stage,
        "batch_id": batch.batch_id,
        "item_key": file.item,
        "keys": dict(artifact.keys),
    }


def collect(batch: Batch, outcome: Outcome, dropped: list[str]) -> BatchResult:
    """The rows of the items that worked; a failure for each that did not, NaN and infinity included."""
    forwarded = outcome.forwarded
    result = BatchResult(
        seconds=outcome.seconds,
        work_s=outcome.work_s,
        tokens=round(forwarded.tokens),
        prefill_tokens=round(forwarded.prefill),
        padding_tokens=round(forwarded.padding),
        peak_bytes=outcome.peak_bytes,
        dropped=dropped,
    )
    keys = [key for key in batch.keys if key not in dropped]
    whole = outcome.error or (
        "does not fit in memory even alone; shorten it or free memory" if outcome.out_of_memory else None
    )
    if whole is not None:
        result.failures = [Failure(key, whole) for key in keys]
        return result
    answered = {r.key: r for r in outcome.results}
    for key in keys:
        item = answered.get(key)
        if item is None:
            result.failures.append(Failure(key, "the stage gave no result for it"))
            continue
        error = item.error if item.error is not None else _not_finite(item)
        if error is not None:
            result.failures.append(Failure(key, error or "failed without a message"))
            continue
        result.replaced.extend((item.replaces or {}).items())
        for target, given in ((result.rows, item.rows), (result.updates, item.updates or {})):
            for table, rows in given.items():
                target.setdefault(table, []).extend(rows)
    return result


def _not_finite(item: ItemResult) -> str | None:
    for table, rows in {**item.rows, **(item.updates or {})}.items():
        for row in rows:
            for column, value in row.items():
                if type(value) not in _NO_NUMBERS and not _finite(value):
                    return f"{table}.{column} is not finite (NaN or infinity)"
    return None


def _finite(value: Any) -> bool:
    """Whether every number in it is finite, and stays so as a 32-bit float, which is what lists are stored as."""
    if isinstance(value, float):
        return bool(abs(value) <= _FLOAT_MAX)  # false for NaN
    if isinstance(value, list | tuple):
        try:  # most lists are plain numbers, and there are many: one sum tells of them all
            if sum(map(abs, value)) <= _FLOAT_MAX:  # false for NaN
                return True
        except TypeError:
            pass  # text, or lists within the list
        return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return _finite(value.tolist()) if hasattr(value, "tolist") else True  # numpy's scalars and arrays


def _mb(size: int | float) -> str:
    return f"{size / 1e6:,.0f} MB"
