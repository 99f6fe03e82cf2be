"""Hours of ordinary use in one go: `python -m tests.soak --minutes 30 --json soak.json`. Does anything grow, differ or break?

In a fresh folder and with real processes: runs of the bundled model one after the other, some killed and gone on with; every
command that reads, in turn; the review app, visited page after page by a browser, SQL that runs away included. What the app
and the folder hold is sampled all the while. Exit 1 where something is not flat, a run differs, or a reader or page fails.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness.errors import HarnessError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs, read_manifest
from harness.store import Reader

ROOT = Path(__file__).parents[1]
RUN = ("run", "--limit", "6", "--gravity.num_samples", "4", "--runtime.threads", "1")
EVERY_S = 15.0
KEPT = 8
"""Runs that stay in the folder, besides the first, with which each is compared."""
GROWTH = {"rss_mb": 120.0, "fds": 12.0, "threads": 12.0, "children": 1.0, "tmpdir_mb": 1.0, "temp_files": 2.0}
"""By how much the median of the last third of the samples may exceed that of the first third, after the warm-up. Memory: what
the app keeps of answers is bounded by number, and fills."""
LEFT = {"children": 0, "temp_files": 0, "tmpdir_files": 0}
"""What there may be when everything has come to rest."""
ENOUGH = 12
"""Samples after the warm-up; with fewer, growth is shown and not judged."""
QUESTIONS = (
    "SELECT condition, avg(rate) AS rate FROM violation GROUP BY ALL ORDER BY ALL",
    "SELECT * FROM completions ORDER BY ALL",
    "SELECT nothing FROM nowhere",
    "SUMMARIZE psem",
)
RUNAWAY = (
    "SELECT repeat('x', 2000000000) AS x",
    "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000)) AS n",
    "SELECT lpad('x', 2000000000, 'y') AS x",
    "SELECT list_reduce(range(1000000000), lambda x, y: x + y) AS n",
    "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range < -1",
)


@dataclass
class Told:
    """What happened, by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    warm_s: float | None = None
    """When the browser had seen every page once."""


class Soak:
    """The folder, the processes and what was seen of them."""

    def __init__(self, folder: Path, seconds: float, seed: int):
        self.runs, self.tmp, self.out = folder / "runs", folder / "tmp", folder / "out"
        for made in (self.runs, self.tmp, self.out):
            made.mkdir()
        self.start, self.seconds = time.monotonic(), seconds
        self.random = random.Random(seed)
        self.told = Told()
        self.is_over = threading.Event()
        self.reading, self.visiting = threading.Lock(), threading.Lock()
        self.environment = os.environ | {
            "TMPDIR": str(self.tmp), "OUTPUT_ROOT": str(self.runs), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.expected: dict[str, str] | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    def going(self) -> bool:
        """Whether another round may begin."""
        return not self.is_over.is_set() and self.elapsed_s < self.seconds

    def harness(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "harness", *arguments], cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finished(self) -> list[RunPaths]:
        """Finished runs, newest first."""
        return [e.paths for e in list_runs(self.runs) if e.manifest and e.manifest.status == "finished"]

    # -- runs

    def write(self) -> None:
        """Runs, one after the other: one is left alone, one killed, one asked to stop, and so on; each goes on to its end."""
        for how in itertools.cycle((None, signal.SIGKILL, None, signal.SIGTERM)):
            if not self.going():
                return
            before = set(self.runs.iterdir())
            is_done = self._life(("--resume", "new"), how)
            while not is_done:
                again = self.random.choice((None, None, signal.SIGKILL)) if self.going() else None
                is_done = self._life((), again)
            for folder in sorted(set(self.runs.iterdir()) - before):
                self._compare(RunPaths(folder))
            self._prune()

    def _life(self, more: Sequence[str], how: signal.Signals | None) -> bool:
        """One process of a run, left alone or ended by a signal; whether the run is done, or hopeless."""
        process = self.harness(*RUN, *more)
        if how is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.random.uniform(4, 25))
            if process.poll() is None:
                process.send_signal(how)
                self.told.counts[f"runs sent {how.name}"] += 1
        said = process.communicate(timeout=900)[1]
        if process.returncode in (0, 3, -signal.SIGKILL):
            self.told.counts["lives of runs"] += 1
            return process.returncode == 0
        self.told.failures.append(f"harness run ended with {process.returncode}: {_last_line(said)}")
        return True

    def _compare(self, paths: RunPaths) -> None:
        try:
            if read_manifest(paths).status != "finished":
                raise HarnessError(f"it is {read_manifest(paths).status}")
            with Reader(paths.live, SCHEMA) as reader:
                found = {t: hashlib.sha256(repr(reader.table(t)).encode()).hexdigest() for t in SCHEMA.measured}
        except HarnessError as e:
            self.told.failures.append(f"{paths.run_id} cannot be compared: {e}")
            return
        self.expected = self.expected or found
        apart = [t for t in SCHEMA.measured if found[t] != self.expected[t]]
        self.told.counts["runs that differ" if apart else "runs ended identical"] += 1
        self.told.differing += [f"{paths.run_id}: {', '.join(apart)}"] if apart else []

    def _prune(self) -> None:
        with self.reading, self.visiting:
            for paths in self.finished()[KEPT:-1]:
                shutil.rmtree(paths.folder)

    # -- readers

    def read(self) -> None:
        """Every command that reads, in turn."""
        for number in itertools.count():
            while not self.finished():
                if not self.going():
                    return
                time.sleep(1)
            if not self.going():
                return
            with self.reading:
                self._read_one(number)
            time.sleep(1)

    def _read_one(self, number: int) -> None:
        found = [p.run_id for p in self.finished()]
        one, other = self.random.choice(found), self.random.choice(found)
        form = ("parquet", "csv", "jsonl")[number % 3]
        commands = (
            ("show", "latest"), ("verify", one, "--batches", "0"), ("export", one, "--to", str(self.out), "--format", form),
            ("report", one), ("diff", one, other), ("runs",), ("show", one),
        )  # fmt: skip
        command = commands[number % len(commands)]
        process = self.harness(*command)
        said = process.communicate(timeout=600)[1]
        self.told.counts[f"harness {command[0]}"] += 1
        if process.returncode:
            self.told.failures.append(
                f"harness {' '.join(command)} ended with {process.returncode}: {_last_line(said)}"
            )
        shutil.rmtree(self.out, ignore_errors=True)

    # -- the app

    @contextmanager
    def app(self) -> Iterator[tuple[str, psutil.Popen]]:
        """The app's address and process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = psutil.Popen(
            [sys.executable, "-m", "streamlit", "run", "app", "--server.headless", "true", "--server.port", str(port),
             "--server.address", "127.0.0.1", "--browser.gatherUsageStats", "false"],
            cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            _wait_for(f"http://127.0.0.1:{port}/_stcore/health", server)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.terminate()
            try:
                server.wait(20)
            except psutil.TimeoutExpired:
                server.kill()
                server.wait()

    def visit(self, address: str) -> None:
        """Every page in a browser, again and again, each time in a new tab."""
        from playwright.sync_api import sync_playwright

        from tests.app.test_browser import ARGS, CHROMIUM, Tab

        asked = itertools.cycle(QUESTIONS)
        runaway = itertools.cycle(RUNAWAY)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS, env=dict(self.environment))
            while self.going():
                tab = Tab(browser, address)
                try:
                    with self.visiting:
                        self._pages(tab, (next(asked), next(asked), next(runaway)))
                except Exception as e:
                    self.told.pages.append(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
                finally:
                    tab.page.close()
                if self.told.warm_s is None:
                    self.told.warm_s = self.elapsed_s
                time.sleep(1)
            browser.close()

    def _pages(self, tab: Any, questions: Sequence[str]) -> None:
        from app.experiments import CORE, pages_of

        tab.open()
        for title in (page.title for page in (*pages_of("gravity"), *CORE)):  # the last one takes the questions
            tab.go(title)
            self.told.counts["pages"] += 1
            tab.check()
            if not self.going():
                return
        for question in questions:
            area = tab.page.locator("[data-testid=stMain] textarea")
            area.fill(question)
            area.press("Control+Enter")
            tab.settle()
            said = tab.page.inner_text("[data-testid=stMain]")
            self.told.counts["questions"] += 1
            is_refused = question in RUNAWAY or "nowhere" in question
            if ("No answer." in said) != is_refused:
                self.told.pages.append(f"the SQL page said neither answer nor line to: {question}")
            tab.check()

    # -- samples

    def sample(self, server: psutil.Process) -> dict[str, float]:
        """What the app and the folder hold now."""
        temporary = [p for p in self.runs.rglob(".*.tmp*") if p.is_file()]
        kept = [
            p for p in self.tmp.rglob("*") if p.is_file() and "playwright" not in str(p) and "chromium" not in str(p)
        ]
        return {
            "at_s": round(self.elapsed_s, 1),
            "rss_mb": server.memory_info().rss / 1e6,
            "fds": server.num_fds(),
            "threads": server.num_threads(),
            "children": len(server.children(recursive=True)),
            "temp_files": len(temporary),
            "tmpdir_files": len(kept),
            "tmpdir_mb": sum(_size(p) for p in kept) / 1e6,
            "runs_mb": sum(_size(p) for p in self.runs.rglob("*") if p.is_file()) / 1e6,
        }

    def watch(self, server: psutil.Process) -> None:
        """A sample every now and then, until everything is at rest."""
        while not self.is_over.wait(EVERY_S):
            with suppress(FileNotFoundError):  # a folder that goes while it is listed
                self.told.samples.append(self.sample(server))

    def all_at_once(self) -> dict[str, float]:
        """Everything until the time is up; the last sample, taken at rest."""
        with self.app() as (address, server):
            works = [self._thread(self.write), self._thread(self.read), self._thread(lambda: self.visit(address))]
            watching = self._thread(lambda: self.watch(server))
            for work in works:
                work.join()
            self.is_over.set()
            watching.join()
            time.sleep(5)
            if server.poll() is not None:
                self.told.failures.append(f"the app ended by itself with {server.returncode}")
                return {}
            return self.sample(server)

    def _thread(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Exception:
                self.told.failures.append(f"the soak itself: {' | '.join(traceback.format_exc().splitlines()[-3:])}")
                self.is_over.set()

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1][:300]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was listed
        return 0


def _wait_for(url: str, server: psutil.Popen) -> None:
    for _ in range(480):
        if server.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.25)
    raise RuntimeError("the app does not answer")


# -- the verdict


@dataclass(frozen=True)
class Line:
    """One measure over time: its first, median and last value; its slope; what it rose by, between thirds."""

    name: str
    first: float
    median: float
    last: float
    per_hour: float
    rose: float
    is_flat: bool


def lines(samples: Sequence[dict[str, float]]) -> list[Line]:
    """Of each measure, how it went. With few samples all are called flat."""
    found = []
    for name in [n for n in (samples[0] if samples else {}) if n != "at_s"]:
        values, hours = [s[name] for s in samples], [s["at_s"] / 3600 for s in samples]
        third = max(len(values) // 3, 1)
        rose = statistics.median(values[-third:]) - statistics.median(values[:third])
        slope = statistics.linear_regression(hours, values).slope if len(set(hours)) > 1 else 0.0
        is_flat = len(values) < ENOUGH or rose <= GROWTH.get(name, float("inf"))
        found.append(Line(name, values[0], statistics.median(values), values[-1], slope, rose, is_flat))
    return found


def verdict(told: Told, went: Sequence[Line], rest: Mapping[str, float]) -> list[str]:
    """What is wrong; nothing where all is well."""
    wrong = [f"{line.name} rose by {line.rose:.1f}" for line in went if not line.is_flat]
    wrong += [f"{n} at rest: {rest[n]:.0f}, expected {most}" for n, most in LEFT.items() if rest.get(n, 0) > most]
    wrong += [f"differs: {run}" for run in told.differing]
    wrong += [f"failed: {failure}" for failure in told.failures] + [f"page: {page}" for page in told.pages]
    if not told.counts["runs ended identical"] or not told.counts["pages"]:
        wrong.append("too little happened: no run ended, or no page was seen")
    return wrong


def main() -> int:
    """Soak, show, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write samples, counts and verdict there")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        soak = Soak(folder, 60 * options.minutes, options.seed)
        rest = soak.all_at_once()
        warm = [s for s in soak.told.samples if s["at_s"] >= (soak.told.warm_s or 0)]
        went = lines(warm)
        wrong = verdict(soak.told, went, rest)
        print(f"{'':14}{'first':>10}{'median':>10}{'last':>10}{'per hour':>12}{'rose by':>10}   at rest")
        for line in went:
            numbers = (
                f"{line.first:>10.1f}{line.median:>10.1f}{line.last:>10.1f}{line.per_hour:>12.1f}{line.rose:>10.1f}"
            )
            print(
                f"{line.name:14}{numbers}   {rest.get(line.name, float('nan')):.1f}{'' if line.is_flat else '   NOT FLAT'}"
            )
        judged = "" if len(warm) >= ENOUGH else "; too few to judge growth"
        print(f"{len(warm)} samples after a warm-up of {soak.told.warm_s or 0:.0f} s{judged}")
        print(", ".join(f"{n} {name}" for name, n in sorted(soak.told.counts.items())))
        print("\n".join(wrong) or "all flat, all identical, no failure")
        if options.json:
            told = vars(soak.told) | {"lines": [asdict(line) for line in went], "rest": rest, "wrong": wrong}
            options.json.write_text(json.dumps(told, indent=1))
        return 1 if wrong else 0
    finally:
        for child in psutil.Process().children(recursive=True):  # where it was broken off
            with suppress(psutil.Error):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
