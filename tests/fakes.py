"""Fake stages, a fake accelerator and a short way to run them: rows follow from keys alone, so any two runs compare."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import duckdb

from harness import tally
from harness.engine import BatchOutput, BatchReport, Engine, Limits, StageReport
from harness.engine.executors import Accelerator, Host, Inline, Item, ItemResult
from harness.engine.stop import StopSignal
from harness.errors import Stopped
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Row, Schema, Store


def score(key: str) -> float:
    """A number in [0, 1) that follows from the key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12


def scored(items: Sequence[Item]) -> list[ItemResult]:
    """One `psem` row an item; a token forwarded for each."""
    tally.add(float(len(items)))
    return [
        ItemResult(i.key, {"psem": [{"prompt_id": i.key, "condition": "baseline", "p_sem": score(i.key),
                                     "logprobs": [score(i.key + "/a"), score(i.key + "/b")]}]})
        for i in items
    ]  # fmt: skip


@dataclass(frozen=True)
class Fake:
    """A stage over items of given lengths; `compute` gives their results, raises, sleeps."""

    lengths: Mapping[str, float]
    compute: Callable[[Sequence[Item]], Sequence[ItemResult] | BatchOutput] = scored
    name: str = "scores"
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    row_bytes: int = 1_000
    version: int = 1

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Mapping[str, list[Row]]) -> list[Item]:
        return [Item(key, float(length)) for key, length in self.lengths.items()]

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item]) -> Sequence[ItemResult] | BatchOutput:
        return self.compute(items)


def same_lengths(num: int, length: float = 10.0) -> dict[str, float]:
    return {f"k{i:03d}": length for i in range(num)}


@dataclass(frozen=True)
class Followers:
    """A stage with one item for each `psem` row there is: what a failed item upstream leaves out, a retry brings."""

    name: str = "followers"
    version: int = 1
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"psem": ("prompt_id", "condition", "p_sem")})
    row_bytes: int = 1_000

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Mapping[str, list[Row]]) -> list[Item]:
        return [Item(r["prompt_id"], 10.0, r["p_sem"]) for r in tables["psem"] if r["condition"] == "baseline"]

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item]) -> list[ItemResult]:
        return [ItemResult(i.key, {"completions": [{
            "prompt_id": i.key, "condition": "baseline", "mode": "greedy", "sample_id": 0, "text": f"{i.payload:.6f}",
            "token_ids": [int(1000 * i.payload)]}]}) for i in items]  # fmt: skip


class OutOfRoom(Exception):
    """What the fake accelerator runs out with."""


@dataclass
class Memory:
    """An accelerator whose peak is `base + per_token` × padded tokens, where more than `room` tokens do not fit, and whose
    clock says `base_s + per_token_s` × padded tokens."""

    room: float = math.inf
    base: int = 0
    per_token: int = 0
    capacity: int | None = None
    out_of_memory: tuple[type[BaseException], ...] = (OutOfRoom,)
    peak: int = 0
    peaks: list[int] = field(default_factory=list)
    releases: int = 0
    base_s: float = 0.0
    per_token_s: float = 0.0
    seconds: float = 0.0

    def release(self) -> None:
        assert sys.exc_info() == (None, None, None), "released while the exception keeps the batch's tensors alive"
        self.releases += 1

    def reset_peak(self) -> None:
        self.peak = 0

    def peak_bytes(self) -> int:
        return self.peak

    def capacity_bytes(self) -> int | None:
        return self.capacity

    def work_s(self, wall_s: float, cpu_s: float) -> float:
        return self.seconds

    def scored(self, items: Sequence[Item]) -> list[ItemResult]:
        """`scored`, in this memory."""
        padded = padded_tokens([i.length for i in items])
        if padded > self.room:
            raise OutOfRoom(f"{padded} tokens")
        self.peak = self.base + self.per_token * padded
        self.peaks.append(self.peak)
        self.seconds = self.base_s + self.per_token_s * padded
        return scored(items)


def padded_tokens(lengths: Sequence[float]) -> int:
    return math.ceil(len(lengths) * max(1.0, *lengths))


@dataclass
class Watcher:
    """An observer that keeps what it is told."""

    started: list[tuple[str, int, int]] = field(default_factory=list)
    batches: list[tuple[str, int]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    done: list[BatchReport] = field(default_factory=list)
    doings: list[tuple[str, str]] = field(default_factory=list)

    def doing(self, stage: str, what: str) -> None:
        self.doings.append((stage, what))

    def stage_started(self, stage: str, total: int, done: int, length: float, length_done: float) -> None:
        self.started.append((stage, total, done))

    def batch_done(self, batch: BatchReport) -> None:
        self.batches.append((batch.stage, batch.num_items))
        self.done.append(batch)

    def stage_finished(self, stage: str) -> None:
        self.finished.append(stage)


def run_stages(
    folder: Path,
    *stages: Any,
    max_tokens: int | None = 40,
    memory: Accelerator | None = None,
    retry_failed: bool = False,
    reserve_disk_bytes: int = 0,
    stop: StopSignal | None = None,
    watcher: Watcher | None = None,
    open_store: Callable[[Path, Schema], Store] = Store,
) -> list[StageReport]:
    """Open the run in `folder`, new or not, and bring the stages to their end."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, reports = RunPaths(folder), []
    with open_store(paths.results, SCHEMA) as store:
        engine = Engine(store, paths, Inline(memory or Host()), Limits(max_tokens, reserve_disk_bytes),
                        watcher or Watcher(), stop or StopSignal())  # fmt: skip
        engine.run(stages, reports.append, retry_failed)
    return reports


def measured(folder: Path) -> dict[str, list[Row]]:
    """Every table of measurements of a run that nobody writes."""
    with Store(RunPaths(folder).results, SCHEMA) as store:
        return {name: store.table(name) for name in SCHEMA.measured}


def rows_of(folder: Path, table: str) -> list[Row]:
    with Store(RunPaths(folder).results, SCHEMA) as store:
        return store.table(table)


def events_of(folder: Path, kind: str) -> dict[str | None, str]:
    """Message by item of the events of a kind."""
    with Store(RunPaths(folder).results, SCHEMA) as store:
        rows = store.query("SELECT item_key, message FROM events WHERE kind = ? ORDER BY event_id", [kind])
    return {r["item_key"]: r["message"] for r in rows}


def plan_of(folder: Path) -> list[tuple[Any, ...]]:
    """The stored plan of all stages: everything of `batches` but what a clock or a memory gauge says."""
    names = ("stage", "batch_id", "parent", "status", "keys", "num_items", "padded_tokens", "attempt")
    return [tuple(map(_hashable, (row[n] for n in names))) for row in rows_of(folder, "batches")]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def sleepy_run(folder: Path, seconds: float) -> NoReturn:
    """A process to send signals to: a quick first batch, then one that sleeps. Exits as `harness run` would."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if items[0].key != "k000":
            print("asleep", flush=True)
            time.sleep(seconds)
        return scored(items)

    try:
        with StopSignal() as stop:
            run_stages(folder, Fake(same_lengths(3), compute), max_tokens=10, stop=stop)
    except Stopped as e:
        print(e, flush=True)
        sys.exit(e.exit_code)
    sys.exit(0)


def older_store(path: Path, version: int) -> None:
    """An empty store as a harness of an earlier schema version made it, before the machinery's tables were apart."""
    assert version <= SCHEMA.made_core
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied TIMESTAMP)")
        for n in range(version):
            con.execute(SCHEMA.migrations[n])
            con.execute("INSERT INTO schema_version VALUES (?, TIMESTAMP '2026-01-01')", [n + 1])


def later(sql: str) -> Schema:
    """The schema of a later harness, which has one migration more."""
    return replace(SCHEMA, migrations=(*SCHEMA.migrations, sql))
