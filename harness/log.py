"""What a person sees: loguru to the console and to a file, a progress bar on a terminal, plain lines elsewhere.

Called by entry points only.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from loguru import logger
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.segment import Segment

from harness.engine import BatchReport
from harness.engine.estimate import Forecast, duration
from harness.errors import EnvironmentFault
from harness.terminal import Steady, plain

_FIRST_S = 4.0
"""Without a terminal, a stage that takes longer has its first line then; and none comes sooner after another."""
_EVERY = 0.1
"""Share of a stage's time until now that passes before the next line."""
_MOST_S = 60.0
_TICK_S = 0.5


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
    """Shows an engine at work: items done of all, items/s, tokens/s forwarded, batch size, GPU memory, and what is left of the
    stage and of the run. On a terminal a bar; elsewhere a line some seconds after a stage begins, then ever fewer.
    """

    def __init__(self, forecast: Forecast | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._bar = _bar() if console.is_terminal else None
        self._forecast = forecast or Forecast()
        self._clock = clock
        self._task: TaskID | None = None
        self._stage = self._what = self._detail = ""
        self._total = self._done = self._first = self._tokens = 0
        self._start = self._due = clock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._keep_telling, name="progress", daemon=True)

    def __enter__(self) -> "ConsoleProgress":
        if self._bar:
            self._bar.start()
        else:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar:
            self._bar.stop()

    def doing(self, stage: str, what: str) -> None:
        self._begin(stage)
        self._what = what
        self._show()

    def stage_started(self, stage: str, total: int, done: int, length: float, length_done: float) -> None:
        self._begin(stage)
        self._total, self._done, self._first = total, done, done
        self._forecast.started(stage, length, length_done)
        self._show()

    def batch_done(self, batch: BatchReport) -> None:
        self._done += batch.num_items
        self._tokens += batch.tokens
        self._forecast.advanced(batch.length, self._clock() - self._start)
        self._detail = self._rates(batch)
        self._show()

    def stage_finished(self, stage: str) -> None:
        self._forecast.ended()
        if self._bar and self._task is not None:
            self._bar.stop_task(self._task)
        self._stage, self._task = "", None
        if self._done > self._first:
            elapsed = self._clock() - self._start
            logger.info("{} done: {} items in {:.1f} s", stage, self._done - self._first, elapsed)

    def tell_if_due(self) -> None:
        """A line, where it is time for one."""
        now = self._clock()
        if not self._stage or now < self._due:
            return
        self._due = now + min(max(_FIRST_S, _EVERY * (now - self._start)), _MOST_S)
        logger.info("{}", f"{self._stage} {self._done}/{self._total or '?'}  {self._told()}")

    def _begin(self, stage: str) -> None:
        if stage != self._stage:
            self._stage, self._what, self._detail = stage, "", ""
            self._total = self._done = self._first = self._tokens = 0
            self._start = self._clock()
            self._due = self._start + _FIRST_S
            if self._bar:
                self._task = self._bar.add_task(stage, total=None, detail="")

    def _show(self) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=self._total or None, completed=self._done, detail=self._told())

    def _keep_telling(self) -> None:
        # From a thread: loading and long batches give no other moment.
        while not self._ended.wait(_TICK_S):
            self.tell_if_due()

    def _told(self) -> str:
        left, whole = self._forecast.stage_left_s(), self._forecast.run_left_s()
        told = [self._what and f"{self._what}…", self._detail]
        told += [
            "" if left is None else f"{duration(left)} left",
            "" if whole is None else f"{duration(whole)} of the run",
        ]
        return "  ".join(part for part in told if part) or "first batch…"

    def _rates(self, batch: BatchReport) -> str:
        elapsed = max(self._clock() - self._start, 1e-6)
        text = f"{(self._done - self._first) / elapsed:,.0f} items/s"
        if self._tokens:
            text += f"  {self._tokens / elapsed:,.0f} tokens/s"
        text += f"  batch {batch.num_items}"
        return text + (f"  {batch.peak_bytes / 1e9:.1f} GB" if batch.peak_bytes else "")


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
    )


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
