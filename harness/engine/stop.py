"""A signal ends a run cleanly: what must be written is written whole, the batch in progress may be dropped."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger

from harness.errors import Stopped

_GRACE_S = 3.0
"""Time the work in progress has to end after a signal, before it is dropped: about what a batch takes. The manifest, the
snapshot and the end of a process on a machine that is busy need the rest of 10 s."""
_SOON_S = 0.001
_AGAIN_S = 1.0
"""How often it is dropped until it is: the exception may come where it cannot be raised, as in a destructor."""


class StopNow(BaseException):
    """Drops the batch in progress; not an Exception, so that no handler on the way takes it for a failed item."""


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP (a terminal or connection that closed) into a clean end: the work in progress may
    finish, or is dropped after a few seconds.

    A commit is never interrupted. A second signal drops the work at once. Only the main thread can catch signals;
    elsewhere (tests, notebooks) this does nothing.
    """

    def __init__(self, grace_s: float = _GRACE_S):
        self.requested = False
        self.dropped = False
        """Whether the work in progress was dropped: an error of it is no result then, whatever a library made of it."""
        self._grace_s = grace_s
        self._shielded = 0
        self._droppable = False
        self._hurried = 0
        self._overdue = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # under nohup: a terminal that closes is no reason to stop
                self._old[number] = signal.signal(number, self._on_signal)
            self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        except ValueError:  # not the main thread
            self._old.clear()
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Nothing is dropped inside: what must be written is written whole."""
        self._shielded += 1
        try:
            yield
        finally:
            self._shielded -= 1
        self._drop_if_overdue()

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Work inside may be dropped; that reads as Stopped outside."""
        self.check()
        self._droppable = True
        try:
            yield
        except BaseException:
            if not self.dropped:
                raise
            raise Stopped("stopped by a signal; the work in progress was dropped") from None
        finally:
            self._droppable = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work inside is dropped without waiting for its end: what a few seconds make again is not worth them."""
        self.check()
        self._hurried += 1
        try:
            yield
        finally:
            self._hurried -= 1

    @contextmanager
    def patient(self, grace_s: float | None) -> Iterator[None]:
        """Work inside may go on so long after a signal before it is dropped; None: as long as any."""
        usual = self._grace_s
        self._grace_s = usual if grace_s is None else grace_s
        try:
            yield
        finally:
            self._grace_s = usual

    def check(self) -> None:
        """Raises Stopped once a signal has come. For moments in which nothing is lost by it."""
        if self.requested:
            raise Stopped("stopped by a signal")

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            self._on_alarm()
            return
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, _SOON_S if self._hurried else self._grace_s, _AGAIN_S)
        logger.warning("stopping" if self._hurried else "stopping: finishing the batch in progress (again to drop it)")

    def _on_alarm(self, *_: object) -> None:
        self._overdue = True
        self._drop_if_overdue()

    def _drop_if_overdue(self) -> None:
        if self._overdue and self._droppable and not self._shielded:
            self._overdue = False
            self.dropped = True
            raise StopNow
