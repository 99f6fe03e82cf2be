"""Several processes that start the same run at one moment, and readers that hammer it: one computes, none is lost."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.run import list_runs
from tests.faults.experiment import Whole, looks, only_run, rows_of, run
from tests.faults.kills import judge_end, last_line, plain
from tests.faults.lives import LIMIT_S, ROOT, Life, Lives, Said


@dataclass
class Crowd:
    """Processes that started together, and what came of it."""

    num: int
    state: str
    """`new`: nothing is there; `stopped`: a run waits to be gone on with."""
    is_forked: bool
    exits: dict[str, int] = field(default_factory=dict)
    num_runs: int = 0
    num_reads: int = 0
    reads: dict[str, int] = field(default_factory=dict)
    """How often the readers' commands ended with which code."""
    is_identical: bool = False
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def reading(root: Path, to: Path) -> list[list[str]]:
    """Every command that reads a run."""
    given = ["--paths.runs", str(root)]
    return [*looks(root), ["export", "latest", "--to", str(to), *given],
            ["diff", "latest", "latest", *given]]  # fmt: skip


def start_together(lives: Lives, root: Path, whole: Whole, num: int, state: str, num_readers: int = 0) -> Crowd:
    """`num` lives do the same command at one moment, while readers read."""
    root.mkdir(parents=True)
    if state == "stopped":
        _stop_one(lives, root, whole)
    readers = [
        Life([command], root, repeats=True)
        for command in [*reading(root, root.with_name(root.name + "-export")), _report(root)][:num_readers]
    ]
    lived = lives.together([*(Life([run(root)], root) for _ in range(num)), *readers])
    runners, read = lived[:num], [said for one in lived[num:] for said in one.said]
    crowd = Crowd(num, state, True, dict(Counter(str(one.exit) for one in runners)))
    crowd.seconds = max(one.seconds for one in runners)
    crowd.num_reads = len(read)
    crowd.reads = dict(sorted(Counter(f"{s.command[0]} {s.code}" for s in read).items()))
    for one in runners:
        if one.exit not in (0, 2) or any(not s.is_clean for s in one.said):
            crowd.findings.append(f"a process ended with {one.exit}: {last_line(one)}")
    crowd.findings += [
        f"reader `{s.command[0]}` ended with {s.code}: {plain(_last(s))}"
        for s in read
        if not s.is_clean or s.code not in (0, 2)
    ]
    crowd.findings += [f"`{one.said[-1].command[0]}`: a reader hangs" for one in lived[num:] if one.exit is None]
    _judge(crowd, root, whole)
    return crowd


def _report(root: Path) -> list[str]:
    return ["report", "latest", "--paths.runs", str(root), "--to", str(root.with_name(root.name + "-report"))]


def _last(said: Said) -> str:
    return (said.errors.strip().splitlines() or ["nothing"])[-1]


def _stop_one(lives: Lives, root: Path, whole: Whole) -> None:
    from tests.faults.injector import Fault

    lives.live(Life([run(root)], root, Fault(whole.num_run_calls // 2)))


def _judge(crowd: Crowd, root: Path, whole: Whole) -> None:
    crowd.num_runs = len(list_runs(root))
    codes = Counter(crowd.exits)
    if codes["0"] != 1:
        crowd.findings.append(f"{codes['0']} processes say that they computed the run, 1 should")
    paths = only_run(root)
    crowd.is_identical = paths is not None and rows_of(paths) == whole.rows
    crowd.findings += [text for text in judge_end(root, whole).findings if not text.startswith("report/")]


def start_real(root: Path, whole: Whole, num: int) -> Crowd:
    """As `start_together`, with processes of their own: `python -m harness run`, from the start of the interpreter."""
    import time

    start = time.perf_counter()
    root.mkdir(parents=True)
    command = [sys.executable, "-m", "harness", *run(root)]
    started = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(num)
    ]
    said = [(p.communicate(timeout=LIMIT_S)[1], p.returncode) for p in started]
    crowd = Crowd(num, "new", False, dict(Counter(str(code) for _, code in said)))
    for errors, code in said:
        lines = [line for line in errors.splitlines() if line.startswith("harness: ")]
        if code not in (0, 2) or "Traceback" in errors or len(lines) != (code != 0):
            crowd.findings.append(f"a process ended with {code}: {plain((errors.strip().splitlines() or [''])[-1])}")
    crowd.seconds = time.perf_counter() - start
    _judge(crowd, root, whole)
    return crowd


def crowds(lives: Lives, folder: Path, whole: Whole, times: int, has_real: bool) -> list[Crowd]:
    """2, 5 and 10 at once, on a new and on a stopped run, alone and with readers; then processes of their own."""
    found = []
    for turn in range(times):
        for num in (2, 5, 10):
            for state in ("new", "stopped"):
                for num_readers in (0, 6):
                    root = folder / f"{turn}-{num}-{state}-{num_readers}"
                    found.append(start_together(lives, root, whole, num, state, num_readers))
                    if not found[-1].findings:
                        shutil.rmtree(root)
    return found + ([start_real(folder / f"real-{num}", whole, num) for num in (2, 5, 10)] if has_real else [])


def tables(found: Sequence[Crowd]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Title, columns and rows of what is printed."""
    rows = []
    for c in found:
        who = f"{c.num} {'forked' if c.is_forked else 'processes'}"
        exits = " ".join(f"{n}×{code}" for code, n in sorted(c.exits.items()))
        same = "yes" if c.is_identical else "NO"
        rows.append((who, c.state, exits, c.num_runs, c.num_reads, same, len(c.findings), f"{c.seconds:.1f}"))
    columns = ("at once", "run", "exit codes", "run folders", "reads", "identical", "findings", "seconds")
    read = Counter[str]()
    for c in found:
        read.update(c.reads)
    reads = [(name.rsplit(" ", 1)[0], name.rsplit(" ", 1)[1], n) for name, n in sorted(read.items())]
    return [
        ("Processes that start the same run", columns, rows),
        ("Readers meanwhile", ("command", "exit", "times"), reads),
    ]
