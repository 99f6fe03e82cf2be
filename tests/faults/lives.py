"""Lives: commands of harness in forks of one process that has imported everything, each life with a fault of its own.

`python -m tests.faults.lives` is that process. It reads a request a line and answers it with a line: all lives of a
request start at one moment, and the answer comes when the last has ended. A life costs milliseconds before its work.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import injector
from tests.faults.injector import Call, Fault, journal_of

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
"""A life that lasts longer hangs, and is killed."""


@dataclass(frozen=True)
class Life:
    """What one process does: commands one after the other, up to the first that does not end with 0."""

    commands: Sequence[Sequence[str]]
    folder: Path
    """The folder that its faults concern."""
    fault: Fault = field(default_factory=Fault)
    more_memory: int | None = None
    """Bytes of address space that it may take beyond what it starts with."""
    cgroup: Path | None = None
    """A control group to join."""
    repeats: bool = False
    """Whether it does its commands over and over, whatever they end with, until the other lives have ended."""
    store: str = "whole"
    """`split` puts in a store that commits marks and rows apart: what the tests must catch."""


_REMEMBERED = "FAULTS_REMEMBERED"
"""The variable that names the folder of what is remembered between lives."""


class Said(NamedTuple):
    """One command of a life, its exit code, and what it wrote."""

    command: list[str]
    code: int
    errors: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What it says it ended with."""
        return [line for line in self.errors.splitlines() if line.startswith("harness: ")]

    @property
    def is_clean(self) -> bool:
        """One line and no traceback."""
        return "Traceback (most recent call last)" not in self.errors and len(self.lines) <= 1


class Lived(NamedTuple):
    """What became of a life. `exit` is negative where a signal ended it, None where it hung."""

    exit: int | None
    said: list[Said]
    calls: list[Call]
    errors: str
    output: str
    seconds: float

    @property
    def hit(self) -> Call | None:
        """The call at which its fault happened."""
        return next((c for c in self.calls if c.is_hit), None)


class Lives:
    """A process that forks lives, with the injector in it."""

    def __init__(self, remembers: bool = True) -> None:
        """With `remembers` the certificate, which is most of the time of a small run, is computed in the first life only."""
        self._notes = tempfile.TemporaryDirectory(prefix="faults-notes-")
        self._number = 0
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HARNESS_")} | {
            "LD_PRELOAD": str(injector.compiled()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg", _REMEMBERED: str(Path(self._notes.name) / "remembered") if remembers else "",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.lives"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> "Lives":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._notes.cleanup()

    def live(self, life: Life) -> Lived:
        """One life, to its end."""
        return self.together([life])[0]

    def together(self, lives: Sequence[Life], limit_s: float = LIMIT_S) -> list[Lived]:
        """Several lives that start at one moment."""
        notes = []
        for _ in lives:
            self._number += 1
            notes.append(Path(self._notes.name) / str(self._number))
            notes[-1].mkdir()
        request = {"limit_s": limit_s, "lives": [_to_json(life, note) for life, note in zip(lives, notes, strict=True)]}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks lives has died"
        return [_lived(end, note) for end, note in zip(json.loads(answer), notes, strict=True)]


def _to_json(life: Life, note: Path) -> dict[str, Any]:
    return {
        "commands": [list(c) for c in life.commands], "folder": str(life.folder), "fault": life.fault.to_json(),
        "more_memory": life.more_memory, "cgroup": str(life.cgroup) if life.cgroup else None, "repeats": life.repeats,
        "store": life.store, "note": str(note),
    }  # fmt: skip


def _lived(end: Mapping[str, Any], note: Path) -> Lived:
    said = note / "said"
    told = [Said(**json.loads(line)) for line in said.read_text("utf-8").splitlines()] if said.exists() else []
    errors, output = ((note / name).read_text("utf-8", errors="replace") for name in ("errors", "output"))
    calls = journal_of(note / "journal")
    for file in note.iterdir():
        file.unlink()
    note.rmdir()
    return Lived(end["exit"], told, calls, errors, output, end["seconds"])


# -- the process that forks


def serve() -> None:
    """Answer requests until the input ends."""
    warm()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_live_together(request["lives"], request["limit_s"])), flush=True)


def warm() -> None:
    """Import whatever a run and its report import, late imports too: a first fork does both and tells their modules.

    Only imports: what is used starts threads, and a fork would be without them.
    """
    import torch

    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if pid == 0:
            _tell_modules(Path(folder))
        os.waitpid(pid, 0)
        names = (Path(folder) / "modules").read_text("utf-8").splitlines()
    for name in names:
        with contextlib.suppress(Exception):  # made on the fly, or not for this system
            importlib.import_module(name)


def _tell_modules(folder: Path) -> None:
    from harness import cli
    from tests.faults.experiment import report, run

    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    codes = [cli.main(command) for command in (run(folder / "runs"), report(folder / "runs"))]
    (folder / "modules").write_text("\n".join(sorted(sys.modules)), "utf-8")
    os._exit(max(codes))


def _live_together(lives: Sequence[Mapping[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    gate, open_gate = os.pipe()
    flag = Path(lives[0]["note"]) / "over"
    children: dict[int, int] = {}
    for number, life in enumerate(lives):
        pid = os.fork()
        if pid == 0:
            os.close(open_gate)
            _live(life, gate, flag)
        children[pid] = number
    os.close(gate)
    start = time.perf_counter()
    os.close(open_gate)
    ends: list[dict[str, Any]] = [{"exit": None, "seconds": 0.0} for _ in lives]
    waiting = {n for n, life in enumerate(lives) if not life["repeats"]}
    hung = False
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            number = children.pop(pid)
            code = None if hung else os.waitstatus_to_exitcode(status)
            ends[number] = {"exit": code, "seconds": time.perf_counter() - start}
            waiting.discard(number)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it had started
        if not waiting and not flag.exists():
            flag.touch()
        if not hung and time.perf_counter() - start > limit_s:
            hung = True
            for child in children:
                os.kill(child, signal.SIGKILL)
        if pid == 0:
            time.sleep(0.002)
    return ends


def _live(life: Mapping[str, Any], gate: int, flag: Path) -> None:
    """In the child: wait for the others, then do the commands. Does not return."""
    os.setpgid(0, 0)
    note = Path(life["note"])
    for number, name in ((0, "input"), (1, "output"), (2, "errors")):
        file = os.open(note / name, os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)
    code = 70
    try:
        if life["store"] == "split":
            from tests.faults.experiment import put_in_split_store

            put_in_split_store()
        _mark_stages()
        if os.environ[_REMEMBERED]:
            _remember_certificate(Path(os.environ[_REMEMBERED]))
        if life["cgroup"]:
            Path(life["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
        injector.arm(Path(life["folder"]), note / "journal", Fault.of_json(life["fault"]))
        os.read(gate, 1)
        if life["more_memory"]:
            most = _address_space() + life["more_memory"]
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        while True:
            for command in life["commands"]:
                code = _do(command, note)
                if code and not life["repeats"]:
                    break
            if not life["repeats"] or flag.exists():
                break
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _do(command: Sequence[str], note: Path) -> int:
    """One command as `harness` does it, with what it wrote to stderr noted."""
    from harness import cli

    injector.mark(command[0])
    start, before = time.perf_counter(), os.fstat(2).st_size
    try:
        code = cli.main(command)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:  # as the interpreter would
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        sys.stdout.flush()
    errors = os.pread(2, 20_000, before).decode(errors="replace")
    line = json.dumps(
        {"command": list(command), "code": code, "errors": errors, "seconds": time.perf_counter() - start}
    )
    with (note / "said").open("a") as file:
        file.write(line + "\n")
    return code


def _mark_stages() -> None:
    """Let the journal say which stage is at work: the progress bar is told, and tells it on."""
    from harness import log

    class Telling(log.ConsoleProgress):
        def stage_started(self, stage: str, total: int, done: int, length: float, length_done: float) -> None:
            injector.mark(stage)
            super().stage_started(stage, total, done, length, length_done)

        def stage_finished(self, stage: str) -> None:
            injector.mark("between stages")
            super().stage_finished(stage)

    log.ConsoleProgress = Telling


def _remember_certificate(folder: Path) -> None:
    """Let a measurement of the certificate that an earlier life made be read, not made: nothing is written in making it."""
    from harness.experiments.gravity import certificate

    measure = certificate.measure
    folder.mkdir(exist_ok=True)

    def remembered(bench: certificate.Bench, task: certificate.Task) -> list[certificate.Verdict]:
        texts = [s.token_ids for s in task.company]
        asked = repr((task.kind, task.name, task.is_alone, texts, bench.sampler, bench.is_full))
        kept = folder / hashlib.sha256(asked.encode()).hexdigest()
        if not kept.exists():
            beside = kept.with_name(f"{kept.name}.{os.getpid()}")
            beside.write_bytes(pickle.dumps(measure(bench, task)))
            beside.replace(kept)
        return pickle.loads(kept.read_bytes())

    certificate.measure = remembered


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    serve()
