"""Plan, skip what is done, execute, commit. Knows no stage by name and no tensor.

The plan of a stage is made once and stored: a killed run goes on with the same batches and so ends with the same bits.
"""

import hashlib
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from loguru import logger

from harness.engine.executors import Executor, Item, ItemResult, Outcome
from harness.engine.plan import Budget, batch_of, halves, place
from harness.engine.stop import StopSignal
from harness.errors import EnvironmentFault, machine_fault
from harness.files import replacing
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Failure, Row, Store

_FLOAT_MAX = 3.4028234663852886e38

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


class Engine:
    """Runs stages of one run, in order, and is the only one to write its store."""

    def __init__(
        self, store: Store, paths: RunPaths, executor: Executor, limits: Limits, observer: Observer, stop: StopSignal
    ):
        self._store, self._paths, self._executor = store, paths, executor
        self._limits, self._observer, self._stop = limits, observer, stop

    def run(
        self, stages: Iterable[Stage], after_stage: Callable[[StageReport], None], retry_failed: bool = False
    ) -> None:
        """Bring every stage to its end. Raises Stopped on a signal, EnvironmentFault on a full disk; both resumable."""
        for stage in stages:
            with self._stop.droppable():
                report = self._run_stage(stage, retry_failed)
            after_stage(report)

    def _run_stage(self, stage: Stage, retry_failed: bool) -> StageReport:
        self._observer.doing(stage.name, "listing its items")
        with self._stop.at_once():
            items = {i.key: i for i in stage.items({name: self._store.table(name) for name in stage.reads})}
        self._observer.doing(stage.name, "")
        plan = self._store.plan(stage.name)
        self._check_disk(stage, len(items))
        if retry_failed:
            plan += self._plan_retries(stage, items, plan)
        # Items may have changed since the plan was made, where what they rest on was measured again.
        finished = {key for b in plan if b.status == "done" for key in b.keys} & items.keys()
        failed = set(self._store.failed(stage.name))
        with self._stop.shield():
            self._store.drop_items(stage.name, sorted(failed - items.keys()))
            self._store.start_stage(stage.name, stage.version, len(items), len(finished - failed))
        lengths = [math.fsum(items[key].length for key in keys) for keys in (items, finished)]
        self._observer.stage_started(stage.name, len(items), len(finished), *lengths)
        capacity = self._executor.accelerator.capacity_bytes()
        sizes = self._limits.sizes.get(stage.name, ())
        rate = self._limits.rates.get(stage.name)
        budget = Budget(self._limits.max_tokens, capacity, plan, self._store.ran_out(stage.name), sizes, rate)
        while True:
            plan += self._plan_more(stage, items, plan, budget)
            todo = deque(sorted((b for b in plan if b.status == "planned"), key=lambda b: place(b, plan)))
            if not todo:
                break
            self._execute(stage, items, todo, budget, next_id=len(plan))
            plan = self._store.plan(stage.name)
            budget.remember(plan)
        self._observer.stage_finished(stage.name)
        return self._finish(stage, plan, budget)

    def _plan_more(self, stage: Stage, items: Mapping[str, Item], plan: Sequence[Batch], budget: Budget) -> list[Batch]:
        """Store batches for the items that no batch holds yet: all of them, or first one that measures time and memory."""
        if budget.tokens is None and any(b.status == "planned" for b in plan):
            return []  # measure first
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
                batch_of(stage.name, len(plan) + n, [items[key]]),
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
        self, stage: Stage, items: Mapping[str, Item], todo: deque[Batch], budget: Budget, next_id: int
    ) -> None:
        """Compute and commit what is planned, and what is planned once that was measured. A batch that does not fit, or fails
        whole, comes back as two halves."""

        def pull() -> Iterator[tuple[Batch, list[Item]]]:
            while todo or plan_more():
                batch = todo.popleft()
                if budget.allows(batch):
                    yield batch, [items[key] for key in batch.keys if key in items]
                else:
                    split(batch, "ceiling_split", f"{batch.padded_tokens} padded tokens are over the learned ceiling")

        def plan_more() -> bool:
            nonlocal next_id
            plan = self._store.plan(stage.name)
            budget.remember(plan)
            todo.extend(self._plan_more(stage, items, plan, budget))
            next_id = len(plan) + len(todo)
            return bool(todo)

        def split(batch: Batch, kind: str, why: str) -> None:
            nonlocal next_id
            parts = halves(batch, items, next_id)
            next_id += len(parts)
            message = f"{stage.name} batch {batch.batch_id} ({len(batch.keys)} items): {why}; split in two"
            with self._stop.shield():
                self._store.add_batches(parts, batch, message, kind)
            # Running out of memory is worth one line; that later batches keep to what was learned is not.
            logger.log("DEBUG" if kind == "ceiling_split" else "WARNING", "{}", message)
            todo.extendleft(reversed(parts))

        self._stop.check()
        for outcome in self._executor.map(partial(self._set_up, stage), stage.run, pull()):
            batch: Batch = outcome.token
            if outcome.error is not None and self._stop.dropped:
                self._stop.check()
            if outcome.out_of_memory and len(batch.keys) > 1:
                budget.learn(batch)
                split(batch, "oom_split", "out of memory")
            elif outcome.error is not None and len(batch.keys) > 1:
                logger.debug("traceback of a failed batch:\n{}", outcome.traceback)
                split(batch, "error_split", outcome.error)
            else:
                with self._stop.shield():
                    self._commit(stage, batch, outcome, items)
            self._stop.check()

    def _set_up(self, stage: Stage) -> Any:
        self._observer.doing(stage.name, "loading what it needs")
        with self._stop.at_once():
            context = stage.setup()
        self._observer.doing(stage.name, "")
        return context

    def _commit(self, stage: Stage, batch: Batch, outcome: Outcome, items: Mapping[str, Item]) -> None:
        result = collect(batch, outcome, [key for key in batch.keys if key not in items])
        self._write_artifacts(batch, outcome, result)
        for failure in result.failures:
            logger.error("{} failed on {}: {}", stage.name, failure.key, failure.message)
        if outcome.traceback:
            logger.debug("its traceback:\n{}", outcome.traceback)
        self._store.commit(batch, result)
        self._store.publish_if_due(self._paths.live)
        self._check_reserve()
        length = math.fsum(items[key].length for key in batch.keys if key in items)
        self._observer.batch_done(
            BatchReport(stage.name, len(batch.keys), length, result.tokens, result.seconds, result.peak_bytes)
        )

    def _write_artifacts(self, batch: Batch, outcome: Outcome, result: BatchResult) -> None:
        """Each file written beside, synced and renamed before any row speaks of it: a kill leaves a file, never a claim."""
        failed = {f.key for f in result.failures}
        for key, artifact in ((r.key, a) for r in outcome.results if r.key not in failed for a in r.artifacts):
            path = self._paths.artifacts / artifact.path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(artifact.content)
            except OSError as e:
                raise machine_fault(e) or EnvironmentFault(f"{path}: cannot be written: {e.strerror}") from e
            result.rows.setdefault("artifacts", []).append({
                "path": artifact.path, "kind": artifact.kind, "sha256": hashlib.sha256(artifact.content).hexdigest(),
                "bytes": len(artifact.content), "shape": list(artifact.shape), "dtype": artifact.dtype,
                "stage": batch.stage, "batch_id": batch.batch_id, "item_key": key,
                "keys": {"prompt_id": artifact.prompt_id, "condition": artifact.condition},
            })  # fmt: skip

    def _finish(self, stage: Stage, plan: Sequence[Batch], budget: Budget) -> StageReport:
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
            sizes=tuple(len(b.keys) for b in sorted(done, key=lambda b: place(b, plan)) if b.attempt == 1),
            retried=sum(len(b.keys) for b in done if b.attempt > 1),
        )

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


def collect(batch: Batch, outcome: Outcome, dropped: list[str]) -> BatchResult:
    """The rows of the items that worked; a failure for each that did not, NaN and infinity included."""
    forwarded = outcome.forwarded
    result = BatchResult(
        seconds=outcome.seconds, work_s=outcome.work_s, tokens=round(forwarded.tokens), prefill_tokens=round(forwarded.prefill),
        padding_tokens=round(forwarded.padding), peak_bytes=outcome.peak_bytes, dropped=dropped,
    )  # fmt: skip
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
