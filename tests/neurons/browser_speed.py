"""How long `harness browse RUN` takes to its first screen, and from a key to the screen, as a terminal sees it:
`python -m tests.neurons.browser_speed RUN_FOLDER`. No test: figures are of the machine.

`cold`: the run's files are not in the page cache.
"""

import argparse
import os
import pty
import select
import statistics
import struct
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

_QUIET_S = 0.012
"""A screen is drawn when nothing more comes for this long; not counted."""
_KEYS = {
    "token": b"\x1b[A", "layer": b"\x1b[D", "neuron": b"n", "100 neurons": b"\x1b[6~", "prompt": b"]",
    "ranked": b"j", "ranking": b"r", "window": b"a", "effects": b"e",
}  # fmt: skip


class _Terminal:
    def __init__(self, command: Sequence[str], columns: int, lines: int):
        self._began = time.perf_counter()
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.environ.update(TERM="xterm-256color", COLORTERM="truecolor")
            os.execv(command[0], list(command))
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, text: bytes, most_s: float = 20.0) -> float:
        """Seconds from the start until this text has come."""
        seen = b""
        while text not in seen:
            ready, _, _ = select.select([self._fd], [], [], most_s)
            assert ready, f"{text!r} has not come in {most_s} s: {seen[-2000:]!r}"
            seen += os.read(self._fd, 1 << 16)
        return time.perf_counter() - self._began

    def settle(self, quiet_s: float = 0.5) -> None:
        while select.select([self._fd], [], [], quiet_s)[0]:
            os.read(self._fd, 1 << 16)

    def press(self, key: bytes) -> float | None:
        """Seconds until the last byte of what a key draws; None where it draws nothing."""
        self.settle(0.05)
        start = last = time.perf_counter()
        os.write(self._fd, key)
        wait = 2.0
        while select.select([self._fd], [], [], wait)[0]:
            os.read(self._fd, 1 << 16)
            last, wait = time.perf_counter(), _QUIET_S
        return last - start if last > start else None

    def end(self) -> None:
        os.write(self._fd, b"q")
        with suppress(OSError):  # the other end is closed
            self.settle()
        os.waitpid(self._pid, 0)
        os.close(self._fd)


def _forget(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="tests.neurons.browser_speed", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args(argv)
    command = [sys.executable, "-m", "harness", "browse", str(args.run.resolve())]
    size = sum(path.stat().st_size for path in args.run.rglob("*.safetensors"))
    print(f"files of activations: {size / 1e9:.2f} GB\n\n| screen | figure | median | most |\n|---|---|---|---|")
    for columns, lines in ((80, 24), (160, 50)):
        starts = []
        for _ in range(5):
            terminal = _Terminal(command, columns, lines)
            starts.append(terminal.until(b"prompt "))
            terminal.end()
        _say(columns, lines, "start", starts)
        _forget(args.run)
        terminal = _Terminal(command, columns, lines)
        _say(columns, lines, "start, cold", [terminal.until(b"prompt ")])
        terminal.settle()
        for name, key in _KEYS.items():
            _forget(args.run)
            first = terminal.press(key)
            took = [t for _ in range(args.times) if (t := terminal.press(key)) is not None]
            _say(columns, lines, f"{name}, cold", [first] if first is not None else [])
            _say(columns, lines, name, took)
        terminal.end()


def _say(columns: int, lines: int, what: str, seconds: Sequence[float]) -> None:
    if seconds:
        told = [f"{1000 * s:.0f} ms" for s in (statistics.median(seconds), max(seconds))]
        print(f"| {columns}×{lines} | {what} | {told[0]} | {told[1]} |", flush=True)


if __name__ == "__main__":
    main()
