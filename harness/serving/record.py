"""What a service was asked and what it answered, handed to a writer that has a thread of its own.

The event loop never waits for it: an exchange is put on a list in memory, and the thread hands on what has come, every so
often. Where that fails, nothing is dropped: it is tried again, and until it succeeds no request is taken. Knows no file and
no store.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from loguru import logger
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from harness.serving.queue import Refused

EVERY_S = 1.0
"""A killed process loses no more than the exchanges of so long."""
_MOST = 10_000
_MOST_BYTES = 256_000_000
"""Exchanges that may wait for the writer, and their bytes; beyond, requests are refused until it has caught up."""
_AT_ONCE = 1_000
"""So many are written without waiting for the next time."""
_MOST_PATH = 2_000
_STATE = "record_as"


class Exchange(NamedTuple):
    """A request and its answer."""

    time: datetime
    """When it came, in UTC, without a zone."""
    path: str
    status: int | None
    """None: whoever asked had gone, or the service had ended, before there was an answer."""
    request: bytes | None
    """The body as it came; None where it did not come whole, or was not looked at."""
    answer: bytes | Callable[[], Any] | None
    """The body as it went; or what gives it, as JSON can hold it."""
    is_whole: bool
    """Whether the answer went to its end."""
    seconds: float
    num_bytes: int

    def row(self) -> dict[str, Any]:
        """As a table has it, both bodies text."""
        answer = json.dumps(self.answer(), ensure_ascii=False) if callable(self.answer) else _text(self.answer)
        return {
            "time": self.time,
            "path": _text(self.path[:_MOST_PATH]),
            "status": self.status,
            "request": _text(self.request),
            "answer": _text(answer),
            "is_whole": self.is_whole,
            "seconds": self.seconds,
        }


def _text(body: bytes | str | None) -> str | None:
    """What a table takes, whatever a stranger sent."""
    body = body.encode("utf-8", "replace") if isinstance(body, str) else body
    return None if body is None else body.decode("utf-8", "replace")


Write = Callable[[int, Sequence[Exchange]], None]
"""Keeps exchanges, the first of which has this number, for good; also called with none, when nothing came for a while. One that
failed may have kept some, and gets them again."""


class Recording:
    """Exchanges on their way to `write`, which a thread calls while this is entered: every `every_s` seconds, and at the end."""

    def __init__(
        self, write: Write, every_s: float = EVERY_S, most: int = _MOST, most_bytes: int = _MOST_BYTES
    ) -> None:
        self._act, self._every_s, self._most, self._most_bytes = write, every_s, most, most_bytes
        self._changed = threading.Condition()
        self._waiting: deque[Exchange] = deque()
        self._num_bytes = 0
        self._is_ending = False
        self._thread = threading.Thread(target=self._keep_writing, name="recording", daemon=True)
        self.num_written = 0
        self.problem: str | None = None
        """Why nothing can be written at present."""

    def __enter__(self) -> "Recording":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Returns when all is written, or a last attempt has failed: then `num_waiting` is not 0."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Exchanges that are not written yet."""
        return len(self._waiting)

    def add(self, exchange: Exchange) -> None:
        """Takes an exchange in, whatever is waiting already: who looked at `refusal` before it began may end it."""
        with self._changed:
            self._waiting.append(exchange)
            self._num_bytes += exchange.num_bytes
            if len(self._waiting) >= _AT_ONCE:
                self._changed.notify()

    def refusal(self) -> Refused | None:
        """Why no request should be taken now; None where it would be recorded."""
        if self.problem is not None:
            return Refused(503, "recorder", f"the service records what it answers, and cannot: {self.problem}", 5)
        if not self._thread.is_alive():
            return Refused(503, "recorder", "the service records what it answers, and its recording has ended", 5)
        if len(self._waiting) >= self._most or self._num_bytes >= self._most_bytes:
            return Refused(
                503, "recorder", "the service records what it answers, and its disk is behind; come again", 1
            )
        return None

    def _keep_writing(self) -> None:
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(self._has_cause, self._every_s)
                is_last = self._is_ending
                now = list(islice(self._waiting, len(self._waiting)))
            self._write(now)

    def _has_cause(self) -> bool:
        return self._is_ending or (self.problem is None and len(self._waiting) >= _AT_ONCE)

    def _write(self, now: Sequence[Exchange]) -> None:
        try:
            self._act(self.num_written + 1, now)
        except Exception as e:  # whatever it is, these exchanges are still here, and are tried again
            line = " ".join(f"{e}".split())[:300] or type(e).__name__
            if self.problem is None:
                logger.error("nothing can be recorded ({}): requests are refused until it can", line)
            self.problem = line
            return
        with self._changed:
            for _ in now:
                self._num_bytes -= self._waiting.popleft().num_bytes
        self.num_written += len(now)
        if self.problem is not None:
            self.problem = None
            logger.info("what is answered is recorded again")


class Overheard:
    """A request as it comes in, and its answer as it goes out: `received` and `sent` stand in the ways of both."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._state: dict[str, Any] = scope.setdefault("state", {})
        self._time, self._start = datetime.now(UTC).replace(tzinfo=None), time.perf_counter()
        self._request, self._answer = bytearray(), bytearray()
        self._num_sent = 0
        self._has_request = self._is_whole = False
        self.status: int | None = None

    def received(self, receive: Receive) -> Receive:
        """What hands the request on, and hears it."""

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._request += message.get("body", b"")
                self._has_request = not message.get("more_body", False)
            return message

        return heard

    def sent(self, send: Send) -> Send:
        """What hands the answer on, and hears it."""

        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message["type"] == "http.response.body":
                body = message.get("body", b"")
                self._num_sent += len(body)
                if _STATE not in self._state:
                    self._answer += body
            await send(message)
            # Only now: a client that left takes the task that sends with it.
            self._is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        return heard

    def exchange(self) -> Exchange:
        """What was heard by now."""
        return Exchange(
            self._time,
            self._scope["path"],
            self.status,
            bytes(self._request) if self._has_request else None,
            self._state.get(_STATE) or (bytes(self._answer) if self.status is not None else None),
            self._is_whole,
            time.perf_counter() - self._start,
            len(self._request) + self._num_sent,
        )


def record_as(request: Request, answer: Callable[[], Any]) -> None:
    """What is recorded of an answer that goes out in pieces, in place of their bytes. `answer` gives it as JSON can hold it, and
    is called, from another thread, when the last piece has gone."""
    setattr(request.state, _STATE, answer)
