"""Killed any number of times at any moment, a run ends with the same rows as one that was not; readers never notice.

`python -c "from tests.test_kill import zygote; zygote()"` is the process under test: it has imported everything and
forks one life of the run for each line it reads, so that a life costs milliseconds and kills fall into the work.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.engine import Engine, Limits, StageReport
from harness.engine.executors import Host, Inline, Item, ItemResult
from harness.engine.stop import StopSignal
from harness.experiments.gravity.schema import SCHEMA
from harness.run import ManifestFile, RunPaths, locked, read_manifest
from harness.store import Batch, BatchResult, Reader, Row, Schema, Store
from tests.fakes import Watcher, measured, plan_of, score

ROOT = Path(__file__).parents[1]
NUM_PROMPTS = 40
CONDITIONS = ("baseline", "negative")
LIVES = 24
"""Kills before the run is left alone. Each life lasts a random part of `LONGEST_LIFE_S`."""
LONGEST_LIFE_S = 0.25


# -- the experiment


@dataclass(frozen=True)
class Stage:
    """A stage whose batches take some milliseconds."""

    name: str
    reads: Mapping[str, tuple[str, ...]]
    list_items: Callable[[Mapping[str, list[Row]]], list[Item]]
    measure: Callable[[Item], ItemResult]
    most: int = 100
    """Items that fit in memory together."""
    version: int = 1
    row_bytes: int = 1_000

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Mapping[str, list[Row]]) -> list[Item]:
        return self.list_items(tables)

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item]) -> list[ItemResult]:
        time.sleep(0.005)
        if len(items) > self.most:
            raise MemoryError
        return [self.measure(i) for i in items]


def _prompt(item: Item) -> ItemResult:
    return ItemResult(item.key, {"prompts": [{
        "prompt_id": item.key, "category": "idioms", "question": f"«{item.key}» ?",
        "alternatives": ["a", item.key]}]})  # fmt: skip


def _psem(item: Item) -> ItemResult:
    if item.payload[0].endswith("13"):
        return ItemResult.failed(item.key, "unlucky")
    first, second = score(item.key), score(item.key + "/2")
    return ItemResult(item.key, {"psem": [{
        "prompt_id": item.payload[0], "condition": item.payload[1], "p_sem": first, "sequences": [[1, 2], [3]],
        "logprobs": [first, second], "num_sequences": 2}]})  # fmt: skip


def _completion(item: Item) -> ItemResult:
    """Two rows and a change to an earlier table, so that a batch is more than one statement."""
    rows = [
        {"prompt_id": item.key, "condition": "negative", "mode": mode, "sample_id": 0, "token_ids": [len(item.key)],
         "text": f"{item.payload:.12f}", "logprobs": [item.payload]} for mode in ("greedy", "sample")
    ]  # fmt: skip
    tier = "high" if item.payload > 0.5 else "low"
    return ItemResult(item.key, {"completions": rows}, {"prompts": [{"prompt_id": item.key, "tier": tier}]})


STAGES = (
    Stage("texts", {}, lambda _: [Item(f"p{i:02d}", 20.0) for i in range(NUM_PROMPTS)], _prompt),
    Stage(
        "pressure",
        {"prompts": ("prompt_id",)},
        lambda t: [Item(f"{p['prompt_id']}|{c}", 10.0, (p["prompt_id"], c)) for p in t["prompts"] for c in CONDITIONS],
        _psem,
        most=2,  # batches of four run out of memory: the first is tried and split, the others are cut before
    ),
    Stage(
        "answers",
        {"psem": ()},
        lambda t: [
            Item(r["prompt_id"], 5.0 + r["p_sem"], r["p_sem"]) for r in t["psem"] if r["condition"] == "negative"
        ],
        _completion,
    ),
)


class EagerStore(Store):
    """Publishes often, so that readers meet many snapshots and kills meet half-written ones."""

    def publish_if_due(self, live: Path, every_s: float = 0.0, share: float = 0.0) -> bool:
        return super().publish_if_due(live, 0.1, 0.3)


class TwoCommits(EagerStore):
    """The control: the mark that a batch is done is committed first, then its rows; once the process dies between."""

    def commit(self, batch: Batch, result: BatchResult) -> None:
        super().commit(batch, BatchResult(failures=result.failures, tokens=result.tokens))
        died = self.path.with_name("died")
        if batch.stage == "answers" and batch.batch_id == 5 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with self._transaction():
            for table, rows in result.rows.items():
                self._insert(table, rows)
            for table, rows in result.updates.items():
                self._update(table, rows)


def live_once(folder: Path, open_store: Callable[[Path, Schema], Store]) -> None:
    """One life of the run, put together as `harness.commands.launch` does."""
    paths = RunPaths(folder)
    reports: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(locked(paths))
        store = stack.enter_context(open_store(paths.results, SCHEMA))
        if paths.manifest.exists():
            manifest = ManifestFile.reopen(paths)
            store.event("info", "resume", "continued")
            manifest.update(status="running")
        else:
            manifest = ManifestFile.create(paths, {"fingerprint": "0" * 64})

        def after_stage(report: StageReport) -> None:
            reports[report.name] = asdict(report)
            manifest.update(stages=reports)

        store.publish(paths.live)
        with manifest.beating(), StopSignal() as stop:
            engine = Engine(store, paths, Inline(Host()), Limits(40, 0), Watcher(), stop)
            engine.run(STAGES, after_stage)
        store.publish(paths.live)
        manifest.update(status="finished")


def zygote() -> None:
    """For each line `seconds`: fork a life, kill it after so long (0: never), print what became of it."""
    from loguru import logger

    logger.remove()
    folder, open_store = Path(sys.argv[1]), {"whole": EagerStore, "split": TwoCommits}[sys.argv[2]]
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                live_once(folder, open_store)
            except BaseException as e:
                print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if float(line):
            time.sleep(float(line))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Lives:
    """Lives of one run, in a process of their own."""

    def __init__(self, folder: Path, kind: str):
        code = "from tests.test_kill import zygote; zygote()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), kind],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def live(self, seconds: float = 0.0) -> int:
        """Exit code of one life, -9 where it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> str:
        """What the lives wrote to stderr."""
        return self._process.communicate(timeout=300)[1]


class Hammer:
    """A thread that opens the run's snapshot and manifest over and over, from the first one on."""

    def __init__(self, paths: RunPaths):
        self.paths, self.num_reads, self.states, self.problems = paths, 0, set(), []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Hammer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._stop.is_set():
            time.sleep(0.002)
            if not self.paths.live.exists():
                continue
            try:
                read_manifest(self.paths)
                with Reader(self.paths.live, SCHEMA) as reader:
                    self.problems += inconsistencies(reader.query)
                    self.states.add(reader.query("SELECT count(*) AS n FROM batches WHERE status = 'done'")[0]["n"])
                self.num_reads += 1
            except Exception as e:
                self.problems.append(f"{type(e).__name__}: {e}")


ROWS_OF = {
    "texts": "SELECT prompt_id AS key FROM prompts",
    "pressure": "SELECT prompt_id || '|' || condition AS key FROM psem",
    "answers": "SELECT prompt_id AS key FROM completions WHERE mode = 'greedy'",
}


def inconsistencies(query: Callable[[str], list[Row]]) -> list[str]:
    """Items of done batches without a row or a failure, and rows that no done batch accounts for."""
    failed = Counter(
        (r["stage"], r["item_key"]) for r in query("SELECT * EXCLUDE time FROM events WHERE item_key NOT NULL")
    )
    batches = query("SELECT stage, keys FROM batches WHERE status = 'done'")
    found = []
    for stage, sql in ROWS_OF.items():
        done = {k for b in batches if b["stage"] == stage for k in b["keys"] if not failed[stage, k]}
        rows = {r["key"] for r in query(sql)}
        found += [f"{stage}: {key} is marked done and has no row" for key in sorted(done - rows)]
        found += [f"{stage}: {key} has a row and is not marked done" for key in sorted(rows - done)]
    return found


class Ended(NamedTuple):
    """What a run left behind."""

    folder: Path
    rows: dict[str, list[Row]]
    plan: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    live_once(folder, EagerStore)
    return Ended(folder, measured(folder), plan_of(folder))


def test_a_run_killed_at_random_moments_ends_with_the_same_rows_while_a_reader_hammers_it(
    tmp_path: Path, whole: Ended
) -> None:
    assert len([b for b in whole.plan if b[3] == "done"]) >= 60
    assert any(b[3] == "split" for b in whole.plan)
    assert all(whole.rows[name] for name in ("prompts", "psem", "completions"))

    moments = random.Random(0)
    folder, codes = tmp_path / "killed", []
    lives = Lives(folder, "whole")
    with Hammer(RunPaths(folder)) as hammer:
        codes += [lives.live(moments.uniform(0.01, LONGEST_LIFE_S)) for _ in range(LIVES)]
        codes.append(lives.live())
    said = lives.end()

    assert codes[-1] == 0, said
    assert set(codes[:-1]) <= {-9, 0}, said  # never an error: not from a kill before, not from a reader
    assert codes.count(-9) >= 20, f"the run was over too soon to be killed often enough: {codes}"
    assert measured(folder) == whole.rows
    assert plan_of(folder) == whole.plan
    assert hammer.problems == []
    assert hammer.num_reads > 20
    assert len(hammer.states) > 5, "the reader saw the run move"
    with Store(RunPaths(folder).results, SCHEMA) as store:
        assert inconsistencies(store.query) == []
        assert {r["stage"]: (r["num_done"], r["num_failed"]) for r in store.stage_rows()} == {
            "texts": (40, 0), "pressure": (78, 2), "answers": (39, 0),
        }  # fmt: skip


def test_a_store_that_commits_in_two_steps_would_be_caught(tmp_path: Path, whole: Ended) -> None:
    """The control: one kill between the mark and the rows, and both the comparison and the consistency check see it."""
    lives = Lives(tmp_path / "killed", "split")
    codes = [lives.live(), lives.live()]
    said = lives.end()
    assert codes == [-9, 0], said
    assert measured(tmp_path / "killed") != whole.rows
    with Store(RunPaths(tmp_path / "killed").results, SCHEMA) as store:
        assert any("is marked done and has no row" in problem for problem in inconsistencies(store.query))


def test_a_life_after_the_end_changes_nothing(whole: Ended) -> None:
    live_once(whole.folder, EagerStore)
    assert (measured(whole.folder), plan_of(whole.folder)) == (whole.rows, whole.plan)
