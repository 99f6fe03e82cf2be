"""The injector, from Python: built on first use, armed in the process that it was preloaded into.

Knows nothing of runs: a fault is a number of a call on files under a folder.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

_SOURCE = Path(__file__).with_name("inject.c")
_ACTIONS = {"kill": 1, "torn": 2, "fail": 3, "short": 4}
_CALLS = {"open": 1, "write": 2, "sync": 4, "truncate": 8, "rename": 16, "unlink": 32, "mkdir": 64, "link": 128}
ALL_CALLS = tuple(_CALLS)


@dataclass(frozen=True)
class Fault:
    """What happens at call number `at` (0: nothing, calls are only counted), of the `calls` on `files`."""

    at: int = 0
    action: Literal["kill", "torn", "fail", "short"] = "kill"
    """`kill` before the call; `torn`: half of a write, then the kill; `fail`; `short`: half of a write, then failures."""
    error: str = "EIO"
    is_lasting: bool = False
    """Whether every later call fails too."""
    calls: tuple[str, ...] = ALL_CALLS
    files: str = "*"
    """Pattern of the path below the folder; a star takes in slashes."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Fault":
        return cls(**{**content, "calls": tuple(content["calls"])})


class Call(NamedTuple):
    """One counted call, as the journal has it; `doing` is the last mark before it."""

    number: int
    name: str
    size: int
    path: str
    doing: str
    is_hit: bool


def why_not() -> str | None:
    """Why the injector cannot be used here; None where it can."""
    if not Path("/proc/self/fd").is_dir():
        return "faults are injected by LD_PRELOAD and /proc, which this system does not have"
    return None if shutil.which("gcc") else "faults are injected by a library that gcc builds, and there is no gcc"


def compiled() -> Path:
    """The built injector, in the temporary folder, under a name that follows from its source."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"harness-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"inject-{digest}.so"
    if not built.exists():
        beside = built.with_name(f".{built.name}.{os.getpid()}")
        command = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(beside), str(_SOURCE)]
        subprocess.run(command, check=True)
        beside.replace(built)
    return built


def arm(folder: Path, journal: Path, fault: Fault) -> None:
    """Count calls on files under `folder` in this process from now on, and let the fault happen."""
    calls = sum(_CALLS[name] for name in fault.calls)
    code = _injector().faults_arm(
        os.fsencode(folder.resolve()), fault.files.encode(), os.fsencode(journal), fault.at, _ACTIONS[fault.action],
        getattr(errno, fault.error), fault.is_lasting, calls,
    )  # fmt: skip
    assert code == 0, f"the injector could not be armed with {fault}"


def mark(doing: str) -> None:
    """Say in the journal what the process does from here on."""
    _injector().faults_mark(doing.encode())


def journal_of(path: Path) -> list[Call]:
    """Every call of a journal, in the order of their counting."""
    calls, doing = [], ""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        sign, number, name, size, told = line.split("\t", 4)
        if sign == "#":
            doing = told
        else:
            calls.append(Call(int(number), name, int(size), told, doing, sign == "!"))
    return calls


def _injector() -> ctypes.CDLL:
    found = ctypes.CDLL(None)  # what was preloaded
    found.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long] + 4 * [ctypes.c_int]
    found.faults_mark.argtypes = [ctypes.c_char_p]
    return found
