"""Streams that people read: they may be closed, broken or full at any moment, and obey what is written to them.

Uses the standard library alone, and knows nothing of the project.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

_AS_CODES: dict[int, str] = {
    **{n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"},
    **{n: f"\\u{n:04x}" for n in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def plain(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters, and those that turn a line around, as codes.

    A prompt, a model's answer or a manifest of somebody else's may hold any of them.
    """
    return text.translate(_AS_CODES)


class Steady(io.TextIOBase):
    """A stream that outlives its reader: what nobody can read any more is no reason for a run to end.

    Asks `stream` for the real one at each write. `lost` is why nothing is written any more, once that is so.
    """

    def __init__(self, stream: Callable[[], TextIO]):
        self._stream = stream
        self._lost: tuple[TextIO, OSError] | None = None

    @property
    def lost(self) -> OSError | None:
        return self._lost[1] if self._lost is not None and self._lost[0] is self._stream() else None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The real stream's."""
        return getattr(self._stream(), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person sees it."""
        with suppress(OSError, ValueError):
            return self._stream().isatty()
        return False

    def fileno(self) -> int:
        """The real stream's."""
        return self._stream().fileno()

    def write(self, text: str, /) -> int:
        """Write what can be written; the length of the text, whatever became of it."""
        if self.lost is None:
            try:
                self._stream().write(text)
            except UnicodeEncodeError:
                self._stream().write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError as e:
                self._lose(e)
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        if self.lost is None:
            try:
                self._stream().flush()
            except OSError as e:
                self._lose(e)

    def _lose(self, error: OSError) -> None:
        self._lost = (self._stream(), error)
        with suppress(OSError, ValueError):  # or Python would try once more at its end, and exit with 120
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def hold_standard_files() -> None:
    """Give those of stdin, stdout and stderr that came closed something in their place: stderr in that of stdout.

    Otherwise the next file that is opened gets such a number, a store say, and what is meant for people is written into it.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: one of these
    if 2 in closed:
        sys.stderr = _opened(2)
    if 1 in closed:
        os.dup2(2, 1)
        sys.stdout = _opened(1)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _opened(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
