"""A reader's own question, answered in a process of its own: the system keeps it small, and it is killed when its time is up.

DuckDB looks at the clock and at its memory between vectors: one call of a function can run for hours, or fill the machine.
A process can be stopped at any moment. Knows nothing of what is asked: `store.ask_locked` says what a question may do.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import StoreError
from harness.files import open_regular

# The process that answers has its limits before it loads the store: it is imported where it is used.
if TYPE_CHECKING:
    from harness.store import Answer, Schema

MEMORY_BYTES = 3 * 2**30
"""Of addresses, for all of the process: half a GB is its code and stacks, one is what DuckDB allows itself."""
START_S = 60.0
"""For the process to begin; some tenths of a second where the machine is not busy."""
MAX_SENT_BYTES = 96_000_000
"""Of an answer as it is sent; `ask_locked` cuts one at 64 MB of values, and each column of each piece adds its frame."""
AT_ONCE = 2
"""Questions that are answered at a time; another waits for its turn."""

_MAX_FILES, _CORES = 64, 2
_GRACE_S = 5.0  # how much later the process ends itself, where nobody is left to end it
_PACKAGE = Path(__file__).resolve().parent.parent
_HANDED_ON = (
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "TZ",
)  # where some machines keep Python's libraries; the time zone
_READY = b"\n"
_SNAPSHOT = "the snapshot"  # what the process that answers calls it: it knows no path
_LESS = "ask for less, or for an aggregate"
_turns = threading.BoundedSemaphore(AT_ONCE)


# -- the one who asks


def answer(
    live: Path,
    schema: "Schema",
    sql: str,
    max_rows: int = 1_000,
    limit_s: float = 10.0,
    memory_bytes: int = MEMORY_BYTES,
) -> "Answer":
    """As `store.ask_locked`, in `limit_s` and `memory_bytes` whatever is asked; the time to begin is not counted.

    Raises StoreError, in one line, also where the process that answers died. Nothing of it is left, however it ended.
    """
    # The schema itself and not its experiment's name: what an experiment's package does when it is imported is its own.
    question = {"schema": schema.packed(), "sql": sql, "max_rows": max_rows, "limit_s": limit_s}
    sent_question = json.dumps(question).encode() + b"\n"
    with _turns, _opened(live) as snapshot:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = _started(theirs.fileno(), snapshot.fileno(), limit_s, memory_bytes)
            try:
                sent = _talk(ours, sent_question, limit_s)
                if sent is None:  # it is about to end, and how tells why
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_GRACE_S)
            finally:
                child.kill()
                how = child.wait()
    if sent is None:
        raise StoreError(_cause(how, limit_s))
    return _read(sent, str(live))


def _opened(live: Path) -> BufferedReader:
    """A snapshot: a file, and no link that could lead elsewhere."""
    try:
        return open_regular(live)
    except FileNotFoundError as e:
        raise StoreError(f"{live}: no snapshot yet; the run has not published one") from e
    except OSError as e:
        raise StoreError(f"{live}: cannot be opened as a snapshot: {e.strerror}") from e


def _started(channel: int, snapshot: int, limit_s: float, memory_bytes: int) -> subprocess.Popen[bytes]:
    # -s: no packages of the user's own; -P: none of the working folder; -B: it can write no file.
    told = map(str, (channel, snapshot, os.getpid(), limit_s, memory_bytes))
    environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    environment |= {"PYTHONPATH": str(_PACKAGE), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            [sys.executable, "-sPB", "-m", "harness.asking", *told],
            cwd="/",
            env=environment,
            pass_fds=(channel, snapshot),
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
        )
    except OSError as e:
        raise StoreError(f"the process that answers could not be started: {e.strerror}") from e


def _talk(channel: socket.socket, question: bytes, limit_s: float) -> bytearray | None:
    """What the process sends; None where it ends before it has sent all of it."""
    try:
        channel.settimeout(START_S)
        channel.sendall(question)
        if channel.recv(1) != _READY:
            return None
    except TimeoutError:
        raise StoreError(f"the process that answers did not begin within {START_S:g} s: the machine is busy") from None
    except OSError:  # it died with the question unread
        return None
    try:
        return _received(channel, time.monotonic() + limit_s)
    except TimeoutError:
        raise StoreError(f"stopped after {limit_s:g} s: {_LESS}") from None


def _received(channel: socket.socket, deadline: float) -> bytearray | None:
    """All that comes until the other side closes, if that is as much as it said at the start."""
    sent = bytearray()
    while len(sent) <= MAX_SENT_BYTES:
        channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            piece = channel.recv(2**18)
        except ConnectionError:
            return None
        if not piece:
            return sent if len(sent) >= 8 and len(sent) == _number(sent) else None
        sent += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    raise StoreError(f"expected an answer of at most {MAX_SENT_BYTES // 10**6} MB, found more: {_LESS}")


def _cause(how: int, limit_s: float) -> str:
    if -how in (signal.SIGXCPU, signal.SIGALRM):
        return f"stopped after {limit_s:g} s: {_LESS}"
    if how >= 0:
        return f"the process that answered died: exit code {how}"
    return f"the process that answered died: {signal.Signals(-how).name}; it may have needed more memory than there was"


def _read(sent: bytearray, live: str) -> "Answer":
    import pyarrow as pa

    from harness.store import Answer

    told, rows = _unpacked(sent)
    if "error" in told:
        raise StoreError(str(told["error"]).replace(_SNAPSHOT, live))
    try:
        table = pa.ipc.open_stream(rows).read_all()
        table.validate()
        return Answer(table, bool(told["is_cut"]), float(told["seconds"]))
    except (ValueError, KeyError, OSError, pa.ArrowException) as e:
        raise StoreError(f"the process that answered sent something else: {' '.join(str(e).split())}") from e


# -- what is sent: the length of all, the length of the head, the head as JSON, an Arrow stream


def _number(eight: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(eight[:8], "little")


def _packed(told: dict[str, Any], rows: memoryview | bytes = b"") -> list[bytes | memoryview]:
    head = json.dumps(told).encode()
    return [n.to_bytes(8, "little") for n in (16 + len(head) + len(rows), len(head))] + [head, rows]


def _unpacked(sent: bytearray) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(sent)
    end = 16 + _number(view[8:16])
    try:
        told = json.loads(bytes(view[16:end]))
    except ValueError as e:
        raise StoreError(f"the process that answered sent something else: {e}") from e
    return told, view[end:]


# -- the one who answers


def main(told: Sequence[str]) -> None:
    """Answer the one question that comes over a socket: `python -m harness.asking` and what `_started` gives it."""
    channel, snapshot, parent = map(int, told[:3])
    _limit_itself(parent, float(told[3]), int(told[4]))
    with socket.socket(fileno=channel) as asker:
        with asker.makefile("rb") as lines:
            question = json.loads(lines.readline())
        try:
            from harness import store

            asker.sendall(_READY)
            schema = store.Schema.unpacked(question.pop("schema"))
            found = store.ask_locked(Path(_SNAPSHOT), schema, file=os.fdopen(snapshot, "rb"), **question)
            sent = _packed({"is_cut": found.is_cut, "seconds": found.seconds}, _stream(found.rows))
        except StoreError as e:
            sent = _packed({"error": str(e)})
        except MemoryError:
            sent = _packed({"error": f"needed more memory than there was: {_LESS}"})
        for part in sent:
            asker.sendall(part)


def _stream(rows: Any) -> memoryview:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return memoryview(sink.getvalue())


def _limit_itself(parent: int, limit_s: float, memory_bytes: int) -> None:
    """From here on the system stops this process where it goes too far, and with the one that started it."""
    signal.setitimer(signal.ITIMER_REAL, START_S + limit_s + _GRACE_S)
    seconds = math.ceil(START_S + _CORES * limit_s + _GRACE_S)
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        # DuckDB begins a thread for every core it sees, each with a stack and a heap of its own: few here.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(os.getpid() + n) % len(cores)] for n in range(_CORES)})
        with contextlib.suppress(OSError):  # where memory is short, this process goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
