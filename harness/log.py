"""What a person sees: loguru to the console and to a file, a progress bar on a terminal, plain lines elsewhere.

Called by entry points only.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from loguru import logger
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from harness.errors import EnvironmentFault
from harness.terminal import Steady, plain

_PLAIN_EVERY_S = 10.0


class _Plain(RenderHook):
    """Lets no control character through that Rich itself has not made."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [r if isinstance(r, Control) else _PlainText(r) for r in renderables]


class _PlainText:
    def __init__(self, thing: ConsoleRenderable):
        self._thing = thing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._thing, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def _console(stream: Steady, **options: Any) -> Console:
    # What is shown may be a stranger's: text is text, and no tag or :name: in it means anything.
    made = Console(file=cast("IO[str]", stream), highlight=False, markup=False, emoji=False, **options)
    made.push_render_hook(_Plain())
    return made


console = _console(Steady(lambda: sys.stderr), soft_wrap=True)
_stdout = Steady(lambda: sys.stdout)


class WarningCount:
    """How many warnings and errors were logged, for the summary."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, message: object) -> None:
        self.counts[message.record["level"].name.lower()] += 1  # type: ignore[attr-defined]


def to_console(verbose: bool = False) -> None:
    """Log lines on stderr, above a progress bar where there is one."""
    logger.remove()
    logger.add(
        lambda text: console.print(text, end="", markup=False),
        level="DEBUG" if verbose else "INFO",
        format="{time:HH:mm:ss} {level: <7} {message}",
        colorize=False,
    )


class _LogFile:
    """Lines appended to a file, for loguru. Where it cannot be written any more the console says so, once: a log is not worth
    a run."""

    def __init__(self, path: Path):
        self._path = path
        self._lost = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise EnvironmentFault(f"{path}: the log cannot be written: {e.strerror}") from e
        self._file = os.fdopen(number, "a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def write(self, message: str) -> None:
        if self._lost:
            return
        try:
            self._file.write(message)
            self._file.flush()
        except OSError as e:
            self._lost = True
            console.print(f"{self._path}: the log cannot be written any more: {e.strerror}", markup=False)

    def stop(self) -> None:
        with suppress(OSError):
            self._file.close()


def to_file(path: Path) -> WarningCount:
    """Everything as JSON lines in `path`, appended; and a count of the warnings."""
    logger.add(_LogFile(path), level="DEBUG", serialize=True, enqueue=False)
    warnings = WarningCount()
    logger.add(warnings, level="WARNING", format="{message}")
    return warnings


class ConsoleProgress:
    """Shows an engine at work: items done of all, items/s, tokens/s, time left, batch size, GPU memory."""

    def __init__(self) -> None:
        self._bar = _bar() if console.is_terminal else None
        self._task: object = None
        self._total = self._done = self._first = self._tokens = 0
        self._start = self._last_line = 0.0

    def __enter__(self) -> "ConsoleProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def stage_started(self, stage: str, total: int, done: int) -> None:
        self._total, self._done, self._first, self._tokens = total, done, done, 0
        self._start = time.perf_counter()
        self._last_line = self._start
        if self._bar:
            self._task = self._bar.add_task(stage, total=total, completed=done, detail="")

    def batch_done(self, stage: str, items: int, tokens: int, seconds: float, batch: int, peak_bytes: int) -> None:
        self._done += items
        self._tokens += tokens
        detail = self._rates(batch, peak_bytes)
        if self._bar:
            self._bar.update(self._task, completed=self._done, detail=detail)  # type: ignore[arg-type]
        elif time.perf_counter() - self._last_line > _PLAIN_EVERY_S:
            self._last_line = time.perf_counter()
            logger.info("{} {}/{}  {}  {} left", stage, self._done, self._total, detail, self._left())

    def stage_finished(self, stage: str) -> None:
        if self._bar:
            self._bar.stop_task(self._task)  # type: ignore[arg-type]
        if self._done > self._first:
            elapsed = time.perf_counter() - self._start
            logger.info("{} done: {} items in {:.1f} s", stage, self._done - self._first, elapsed)

    def _rates(self, batch: int, peak_bytes: int) -> str:
        elapsed = max(time.perf_counter() - self._start, 1e-6)
        text = f"{(self._done - self._first) / elapsed:,.0f} items/s"
        if self._tokens:
            text += f"  {self._tokens / elapsed:,.0f} tokens/s"
        text += f"  batch {batch}"
        return text + (f"  {peak_bytes / 1e9:.1f} GB" if peak_bytes else "")

    def _left(self) -> str:
        elapsed = time.perf_counter() - self._start
        rate = (self._done - self._first) / max(elapsed, 1e-6)
        seconds = int((self._total - self._done) / rate) if rate else 0
        return f"{seconds // 60}:{seconds % 60:02d}"


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=console,
    )  # fmt: skip


def print_out(*objects: object) -> None:
    """The result of a command, on stdout, one object after the other: logs and bars stay on stderr.

    Nothing is raised where nobody can read it any more; `lost_output` tells.
    """
    is_terminal = _stdout.isatty()
    out = _console(_stdout, soft_wrap=not is_terminal, width=None if is_terminal else 140)
    for thing in objects:
        out.print(thing)


def lost_output() -> OSError | None:
    """Why results cannot be printed any more; None while they can."""
    return _stdout.lost
