"""Calls that fail: a disk that is full, broken or read-only, at exact calls of every sort on every kind of file."""

import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.experiment import Whole, kind_of
from tests.faults.injector import Call, Fault
from tests.faults.kills import judge_end, last_line, ready, verify
from tests.faults.lives import Life, Lives

_MUTATING = ("open", "write", "sync", "truncate", "rename", "unlink", "mkdir", "link")
CALLS_OF = {
    "EIO": _MUTATING,
    "ENOSPC": ("open", "write", "truncate", "mkdir", "link"),
    "EDQUOT": ("open", "write", "truncate", "mkdir", "link"),
    "EROFS": ("open", "write", "truncate", "rename", "unlink", "mkdir", "link"),
    "EMFILE": ("open",),
}
"""Which calls can fail so. A full disk can still delete and rename."""
_CALL_OF = {
    "open": "open", "write": "write", "pwrite": "write", "writev": "write", "pwritev": "write", "sendfile": "write",
    "copy_file_range": "write", "fsync": "sync", "fdatasync": "sync", "ftruncate": "truncate", "fallocate": "truncate",
    "rename": "rename", "unlink": "unlink", "rmdir": "unlink", "mkdir": "mkdir", "link": "link",
}  # fmt: skip
HONEST = (0, 2, 4)
"""What a run may end with: 0 with every row there, 4 where the machine is at fault, 2 where a file cannot be used."""


@dataclass
class Refused:
    """One call that failed, and what became of the run."""

    error: str
    at: int
    how: str
    """`once`, `lasting`, or `short`: half of a write is written and everything after it fails."""
    doing: str = ""
    call: str = ""
    kind: str = ""
    is_refused: bool = False
    exit: int | None = None
    line: str = ""
    is_identical: bool = False
    """Whether the run that went on without the fault has the undisturbed run's rows."""
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def faults(calls: Sequence[Call], num: int, seed: int) -> list[Fault]:
    """`num` failing calls: every sort of call (kind of file, call) with every error, as far as they go."""
    draw = random.Random(seed)
    sorts: dict[tuple[str, str, str], list[Call]] = defaultdict(list)
    for call in calls:
        for error, possible in CALLS_OF.items():
            if _CALL_OF[call.name] in possible:
                sorts[kind_of(call), call.name, error].append(call)
    chosen = list(sorts)
    draw.shuffle(chosen)
    chosen = (chosen * (1 + num // len(chosen)))[:num]
    made = []
    for _, name, error in chosen:
        call = draw.choice(sorts[_, name, error])
        action = "short" if call.size > 1 and draw.random() < 0.3 else "fail"
        made.append(Fault(call.number, action, error, is_lasting=action == "short" or draw.random() < 0.6))
    return made


def only_its_calls(fault: Fault, calls: Sequence[Call]) -> Fault:
    """The same fault, its number counted among those calls alone that can fail so."""
    possible = CALLS_OF[fault.error]
    at = sum(_CALL_OF[c.name] in possible for c in calls if c.number <= fault.at)
    return Fault(at, fault.action, fault.error, fault.is_lasting, possible)


def refuse_at(lives: Lives, root: Path, fault: Fault, whole: Whole) -> Refused:
    """Let a call of a new run fail, judge how it ends, then do the same command without the fault."""
    start = time.perf_counter()
    how = "short" if fault.action == "short" else "lasting" if fault.is_lasting else "once"
    found = Refused(fault.error, fault.at, how)
    command, relative = ready(root, fault, whole)
    own = [c for c in whole.calls if (c.doing == "report") == (command[0] == "report")]
    first = own[0].number - 1
    lived = lives.live(
        Life([command], root, only_its_calls(relative, [c._replace(number=c.number - first) for c in own]))
    )
    found.exit, found.is_refused = lived.exit, lived.hit is not None
    if lived.hit:
        found.doing, found.call, found.kind = lived.hit.doing, lived.hit.name, kind_of(lived.hit)
    said = lived.said[0] if lived.said else None
    found.line = last_line(lived)
    if lived.exit not in HONEST:
        found.findings.append(f"exit {lived.exit}: {found.line}")
    if said is None or "Traceback (most recent call last)" in said.errors:
        found.findings.append(f"a traceback, exit {lived.exit}: {found.line}")
    elif lived.exit != 0 and not said.lines:
        found.findings.append(f"no line that tells why, exit {lived.exit}: {found.line}")
    elif len(said.lines) > 1:
        found.findings.append(f"more than one line, exit {lived.exit}: {found.line}")
    elif found.is_refused and lived.exit == 2:
        found.findings.append(f"exit 2, as if the input were at fault: {found.line}")
    if lived.exit == 0:
        found.findings += [f"exit 0, and {text}" for text in judge_end(root, whole).findings]
    lived = lives.live(Life([command], root))
    if lived.exit != 0:
        found.findings.append(f"it does not go on: exit {lived.exit}: {last_line(lived)}")
    ended = judge_end(root, whole)
    found.is_identical = not ended.different
    found.findings += [f"afterwards: {text}" for text in [*ended.findings, *verify(lives, root)]]
    found.seconds = time.perf_counter() - start
    return found


def refuse_often(
    lives: Lives, folder: Path, whole: Whole, drawn: Sequence[tuple[int, Fault]], until: float = math.inf
) -> list[Refused]:
    """Every fault in a run of its own. None begins after `until`."""
    found = []
    for number, fault in drawn:
        if time.perf_counter() > until:
            break
        root = folder / f"{number}-{fault.error}-{fault.at}"
        found.append(refuse_at(lives, root, fault, whole))
        if not found[-1].findings:
            shutil.rmtree(root)
    return found


def tables(found: Sequence[Refused]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Title, columns and rows of what is printed."""
    shown = []
    for title, key in (("by error", "error"), ("by file", "kind"), ("by call", "call")):
        by: dict[str, list[Refused]] = defaultdict(list)
        for r in found:
            by[getattr(r, key) or "(not reached)"].append(r)
        rows: list[tuple[Any, ...]] = [
            (name, len(rs), sum(r.is_refused for r in rs), *(sum(r.exit == code for r in rs) for code in (0, 1, 2, 3, 4)),
             sum(r.exit not in (0, 1, 2, 3, 4) for r in rs), sum(r.is_identical for r in rs),
             sum(bool(r.findings) for r in rs))
            for name, rs in sorted(by.items())
        ]  # fmt: skip
        total = tuple(sum(row[i] for row in rows) for i in range(1, 11))
        columns = (
            title,
            "places",
            "failed",
            *(f"exit {n}" for n in range(5)),
            "other",
            "identical after",
            "with findings",
        )
        shown.append((f"Failing calls {title}", columns, [*rows, ("all", *total)]))
    return shown
