"""A run with too little memory: what it says, and whether it goes on to the same rows when it has enough."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.experiments.gravity.schema import SCHEMA
from tests.faults.experiment import Whole, only_run, run
from tests.faults.kills import judge_end, last_line
from tests.faults.lives import Life, Lives

MORE_MB = (4, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048)
"""Address space beyond what a process has once everything is imported."""
GROUP_MB = (8, 16, 32, 48, 64, 96, 128, 256, 512)
"""Memory that a control group may hold."""


@dataclass
class Cramped:
    """One run with a limit, and what became of it."""

    kind: str
    more_mb: int
    exit: int | None = None
    line: str = ""
    num_splits: int = 0
    is_identical: bool = False
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def cramp(lives: Lives, root: Path, whole: Whole, more_mb: int, group: Path | None = None) -> Cramped:
    """The run under a limit of address space, or in a control group; then the same command without."""
    start = time.perf_counter()
    found = Cramped("control group" if group else "address space", more_mb)
    root.mkdir(parents=True)
    limit = None if group else more_mb * 2**20
    lived = lives.live(Life([run(root)], root, more_memory=limit, cgroup=group))
    found.exit, found.line = lived.exit, last_line(lived)
    is_clean = all(s.is_clean for s in lived.said)
    is_killed = group is not None and lived.exit == -9  # by the kernel, which leaves nobody to say a line
    if not is_killed and lived.exit not in (0, 4):
        found.findings.append(f"exit {lived.exit}: {found.line}")
    elif not is_clean:
        found.findings.append(f"a traceback, or more than a line, exit {lived.exit}: {found.line}")
    elif lived.exit == 4 and not any(s.lines for s in lived.said):
        found.findings.append(f"no line that tells why: {found.line}")
    lived = lives.live(Life([run(root)], root))
    if lived.exit != 0:
        found.findings.append(f"it does not go on: exit {lived.exit}: {last_line(lived)}")
    found.num_splits = _splits(root)
    ended = judge_end(root, whole)
    found.is_identical = not ended.different
    # Batches that were split round otherwise in the last bits; rows then need not be the same.
    found.findings += [t for t in ended.findings if not (found.num_splits and t.startswith("other rows"))]
    found.seconds = time.perf_counter() - start
    return found


def _splits(root: Path) -> int:
    from harness.store import Reader

    paths = only_run(root)
    if paths is None or not paths.live.exists():
        return 0
    with Reader(paths.live, SCHEMA) as reader:
        return int(reader.query("SELECT count(*) AS n FROM batches WHERE status = 'split'")[0]["n"])


@contextmanager
def control_group(limit_mb: int) -> Iterator[Path | None]:
    """A new control group (version 2, or 1) with this limit; None where none can be made."""
    name = f"harness-faults-{os.getpid()}"
    for parent, file in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        group = parent / name
        try:
            group.mkdir()
            if not (group / file).exists():  # a plain folder, where version 1 is mounted beneath
                raise FileNotFoundError(group / file)
            (group / file).write_text(str(limit_mb * 2**20))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            with suppress(OSError):
                group.rmdir()
        return
    yield None


def cramp_often(lives: Lives, folder: Path, whole: Whole) -> list[Cramped]:
    """Every size, of address space and, where that can be, of a control group."""
    found = []
    for more_mb in MORE_MB:
        root = folder / f"space-{more_mb}"
        found.append(cramp(lives, root, whole, more_mb))
        shutil.rmtree(root)
    for limit_mb in GROUP_MB:
        with control_group(limit_mb) as group:
            if group is None:
                break
            root = folder / f"group-{limit_mb}"
            found.append(cramp(lives, root, whole, limit_mb, group))
            shutil.rmtree(root)
    return found


def tables(found: Sequence[Cramped]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Title, columns and rows of what is printed."""
    rows = [
        (c.kind, c.more_mb, c.exit, c.num_splits, "yes" if c.is_identical else "NO", len(c.findings), c.line)
        for c in found
    ]
    columns = ("limit", "MB", "exit", "splits", "identical after", "findings", "its last line")
    return [("Runs with little memory", columns, rows)]
