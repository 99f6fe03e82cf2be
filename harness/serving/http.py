"""A service over HTTP: what is common to all, whatever it computes.

Bodies are bounded and timed, keys compared in constant time, everything that is refused is one line; a client that goes away
takes its work with it, and a signal ends the process cleanly; what is asked and answered can be recorded. Knows no experiment
and no model.
"""

import asyncio
import hmac
import ipaddress
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import h11
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from loguru import logger
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from harness.errors import HarnessError, ItemFailed, NotFinite, SettingsError
from harness.serving.metrics import CONTENT_TYPE, Metrics
from harness.serving.queue import Broken, Queue, Refused
from harness.serving.record import Overheard, Recording

GRACE_S = 8.0
"""What runs may go on for so long after a signal."""
_AFTER_S = 1.0
"""And its answers have so long to be sent."""
_TICK_S = 0.1
_HEAD_S = 10.0
"""A request's head must be whole by then, and its body by this:"""
_BODY_S = 30.0
_READ_S = 60.0
"""An answer of which nothing is read for so long is broken off."""
_MOST_HEAD_BYTES = 32_768
_KEEP_ALIVE_S = 10
_OPEN = ("/health", "/ready")
"""What may be asked without a key: it says nothing but that."""
_LOOKING = ("GET", "HEAD", "OPTIONS")
"""Requests that have nothing computed; they are not recorded."""
_SHOWN = 200
_T = TypeVar("_T")


class Working(Protocol):
    """Who computes, see `worker.Worker`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    @property
    def is_alive(self) -> bool: ...


@dataclass(frozen=True)
class Bounds:
    """What a client may send: bytes of a body; with which keys, where there are any. `is_own`: it listens on this machine's
    own address, and is to be asked by one of its names."""

    max_body_bytes: int
    keys: tuple[bytes, ...] = ()
    body_s: float = _BODY_S
    is_own: bool = False


@dataclass
class Service:
    """A service that can be run: its app, who may wait, who computes, what is counted, and what is recorded where it is."""

    app: FastAPI
    queue: Queue
    worker: Working
    metrics: Metrics
    is_draining: bool = field(default=False)
    recording: Recording | None = field(default=None)

    def record(self, recording: Recording) -> None:
        """From now on every exchange goes there; before the service is run."""
        self.recording = recording
        self.metrics.watch(recording)

    def drain(self) -> None:
        """Admit no request any more; those that were admitted go on."""
        self.is_draining = True
        self.queue.close(lambda: Refused(503, "stopping", "the service is stopping; ask another one", 5))

    @property
    def is_ready(self) -> bool:
        return self.worker.is_alive and not self.is_draining and self.unrecorded is None

    @property
    def unrecorded(self) -> Refused | None:
        """Why what is asked now could not be recorded, as it should be."""
        return None if self.recording is None else self.recording.refusal()


def is_own(host: str) -> bool:
    """Whether only this machine can reach an address of this name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_of(content: bytes) -> tuple[bytes, ...]:
    """The keys in a file, one a line. Raises SettingsError where there is none, or one that no header can hold."""
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys or any(not re.fullmatch(rb"[\x21-\x7e]{8,512}", key) for key in keys):
        raise SettingsError(
            "serve.api_key_file: expected keys of 8 to 512 characters, one a line, without spaces; found "
            + ("none" if not keys else "another line")
        )
    return keys


def service_of(title: str, queue: Queue, worker: Working, metrics: Metrics, bounds: Bounds) -> Service:
    """An app with what every service has; endpoints are added to it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        ticking = asyncio.create_task(_tick(queue))
        try:
            yield
        finally:
            ticking.cancel()
            queue.fail_all(Refused(503, "stopping", "the service was stopped"))
            worker.stop()

    # The pages of documentation would fetch scripts from elsewhere.
    app = FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None)
    service = Service(app, queue, worker, metrics)
    app.add_middleware(_Guard, bounds=bounds, service=service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _http)
    app.add_exception_handler(HarnessError, _refused)
    app.add_exception_handler(Exception, _broken)
    app.state.metrics = metrics

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.is_ready
        cannot = "broken" if service.unrecorded is None else "not recording"
        status = "ready" if is_ready else "stopping" if service.is_draining else cannot
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def told() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return service


async def _tick(queue: Queue) -> None:
    while True:  # whatever the worker does: what waits too long is told so
        await asyncio.sleep(min(_TICK_S, queue.limits.timeout_s / 4))
        queue.expire()


# ---- answers to what is wrong -----------------------------------------------------------------------------------


def error_body(path: str, status: int, line: str, code: str | None = None) -> dict[str, Any]:
    """The one line, in OpenAI's shape where OpenAI's endpoints were asked."""
    if not path.startswith("/v1/"):
        return {"detail": line}
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": line, "type": kind, "param": None, "code": code}}


def status_of(error: HarnessError) -> int:
    """The status of HTTP that an error of ours is."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, Broken | NotFinite) or error.exit_code == 4:
        return 500
    return 400 if isinstance(error, ItemFailed) or error.exit_code == 2 else 500


def one_line(text: object, most: int = 500) -> str:
    """Printable text in one line."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * most])
    line = " ".join(line.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _answer(request: Request, status: int, line: str, code: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse(error_body(request.url.path, status, one_line(line), code), status, headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        line, status = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", 400
    else:
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        line = f"{where[:_SHOWN] or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
        shown = first.get("input")
        if isinstance(shown, str | int | float | bool | None) and first["type"] != "missing":
            line += f"; found {repr(shown)[:_SHOWN]}"
        line += f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        status = 422
    request.app.state.metrics.refusals.labels("invalid").inc()
    return _answer(request, status, line)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    line = str(error.detail)
    if error.status_code == 404 and line == "Not Found":
        line = f"no such endpoint: {request.url.path[:_SHOWN]}"
    return _answer(request, error.status_code, line, headers=error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HarnessError)
    status = status_of(error)
    reason = error.reason if isinstance(error, Refused) else type(error).__name__
    request.app.state.metrics.refusals.labels(reason).inc()
    wait = error.retry_after_s if isinstance(error, Refused) else None
    return _answer(request, status, str(error), reason, None if wait is None else {"Retry-After": str(wait)})


async def _broken(request: Request, error: Exception) -> Response:
    # Without the values of variables, which loguru would add: they are what clients asked.
    logger.error("{} failed:\n{}", request.url.path, "".join(traceback.format_exception(error)))
    return _answer(request, 500, f"an error of the service: {type(error).__name__}; see its log")


class _Guard:
    """In front of everything: keys, and the size and time of bodies, counted as they come; and whoever records."""

    def __init__(self, app: ASGIApp, bounds: Bounds, service: Service):
        self._app, self._bounds, self._service, self._metrics = app, bounds, service, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.num_answering += 1
        try:
            await self._within(scope, receive, counted)
        finally:
            self._metrics.num_answering -= 1
            is_known = any(scope["path"] == getattr(route, "path", None) for route in scope["app"].routes)
            self._metrics.answers.labels(scope["path"] if is_known else "other", str(status)).inc()

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._bounds.is_own and not self._bounds.keys and not _names_this(headers.get(b"host", b"")):
            # A page in a browser may have its own name point here, and is then let read what it asked for (DNS rebinding).
            line = "expected to be asked as localhost or 127.0.0.1; with serve.api_key_file any name will do"
            await self._refuse(scope, receive, send, 403, line, "host")
            return
        if scope["path"] not in _OPEN and not self._may(headers.get(b"authorization", b"")):
            line = "expected a key that the service knows (Authorization: Bearer KEY)"
            await self._refuse(scope, receive, send, 401, line, "key", {"WWW-Authenticate": "Bearer"})
            return
        # Who has no key leaves no row: a stranger could fill the disk.
        recording = None if scope["method"] in _LOOKING else self._service.recording
        if recording is None:
            await self._asked(scope, receive, send)
        elif (refusal := recording.refusal()) is not None:
            wait = {"Retry-After": str(refusal.retry_after_s)}
            await self._refuse(scope, receive, send, refusal.status, str(refusal), refusal.reason, wait)
        else:
            heard = Overheard(scope)
            try:
                await self._asked(scope, receive, heard.sent(send), heard)
            except Exception:  # it is answered with this, further out
                heard.status = heard.status or 500
                raise
            finally:
                recording.add(heard.exchange())

    async def _asked(self, scope: Scope, receive: Receive, send: Send, heard: Overheard | None = None) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > self._bounds.max_body_bytes):
            await self._refuse(scope, receive, send, 413, self._too_large, "body")
            return
        bounded = self._bounded(receive)
        await self._app(scope, bounded if heard is None else heard.received(bounded), send)

    def _may(self, given: bytes) -> bool:
        if not self._bounds.keys:
            return True
        scheme, _, key = given.partition(b" ")
        # Every key is compared, whichever fits: time tells nothing.
        found = [hmac.compare_digest(key.strip(), known) for known in self._bounds.keys]
        return any(found) and scheme.lower() == b"bearer"

    def _bounded(self, receive: Receive) -> Receive:
        bounds, num_bytes, is_whole = self._bounds, 0, False
        deadline = time.monotonic() + bounds.body_s

        async def bounded() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._metrics.refusals.labels("body_time").inc()
                line = f"expected a whole body within {bounds.body_s:g} s"
                raise HTTPException(408, line, {"Connection": "close"}) from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
            if num_bytes > bounds.max_body_bytes:
                self._metrics.refusals.labels("body").inc()
                raise HTTPException(413, self._too_large, {"Connection": "close"})
            return message

        return bounded

    @property
    def _too_large(self) -> str:
        return f"expected a body of at most {self._bounds.max_body_bytes:,} bytes (serve.max_body_bytes)"

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, status: int, line: str, reason: str, more: Any = None
    ) -> None:
        self._metrics.refusals.labels(reason).inc()
        headers = {"Connection": "close", **(more or {})}
        await JSONResponse(error_body(scope["path"], status, line), status, headers)(scope, receive, send)


def _names_this(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    bare = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return not bare or is_own(bare)


# ---- waiting for the worker, and for the client -------------------------------------------------------------------


class Outcomes:
    """What a job's rows give, handed from the worker's thread to the event loop."""

    def __init__(self, num: int):
        self._loop = asyncio.get_running_loop()
        self._results: list[Any] = [None] * num
        self._left = num
        self._counting = threading.Lock()
        self._done = asyncio.Event()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def tell(self, place: int, outcome: Any) -> None:
        """From any thread."""
        self._results[place] = outcome
        with self._counting:
            self._left -= 1
            is_done = not self._left
        if is_done:
            self._call(self._done.set)

    def say(self, event: Any) -> None:
        """From any thread: something that `events` hands on."""
        self._call(self._events.put_nowait, event)

    def _call(self, act: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it who waited
            self._loop.call_soon_threadsafe(act, *args)

    async def all(self) -> list[Any]:
        """The results and errors, in order."""
        if self._left:
            await self._done.wait()
        return self._results

    async def event(self) -> Any:
        """The next of what is said."""
        return await self._events.get()


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` gives. Raises Refused, which nobody reads, once the client has gone away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(499, "gone", "the client went away")
    finally:
        task.cancel()
        gone.cancel()


async def left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- the process ------------------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """HTTP whose heads must be whole in time, and whose answers must be read: else a connection could be held for ever."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self._late is None and not self.transport.is_closing():
                self._expect_head()
        else:
            self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._mind(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_minding()
        super().resume_writing()

    def _mind(self, before: int) -> None:
        """End the connection if by then no more of what is to be sent has been taken."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < before:
                self._mind(left)
            else:
                self.transport.abort()

        self._unread = self.loop.call_later(_READ_S, look)

    def _stop_minding(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_minding()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(_HEAD_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Serves until a signal: then no new request begins, what runs may finish, and a second signal ends it at once."""

    def __init__(self, service: Service, most_connections: int, grace_s: float = GRACE_S):
        super().__init__(
            uvicorn.Config(
                service.app,
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_S,
                limit_concurrency=most_connections,
                timeout_graceful_shutdown=round(_AFTER_S),
            )
        )
        self._service, self._grace_s = service, grace_s
        self._asked_at: float | None = None
        self._idle_since: float | None = None

    def stop(self, *_: object) -> None:
        """As a signal does."""
        if self._asked_at is not None:
            self.should_exit = self.force_exit = True
            return
        self._asked_at = time.monotonic()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's own, which raises the signal again when all has ended well."""
        old: dict[int, Any] = {}
        with suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    old[number] = signal.signal(number, self.stop)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        is_over = await super().on_tick(counter)
        if self._asked_at is None or is_over:
            return is_over
        service = self._service
        if not service.is_draining:
            logger.warning("stopping: what runs may finish (again to end at once)")
            service.drain()
        now = time.monotonic()
        if now - self._asked_at > self._grace_s:
            service.queue.fail_all(Refused(503, "stopping", "the service was stopped before this was done"))
            return True
        if not service.queue.is_idle:
            self._idle_since = None
            return False
        # Answers are still to be sent; a body that is still to come is no reason to stay.
        self._idle_since = self._idle_since or now
        return not service.metrics.num_answering or now - self._idle_since > _AFTER_S


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there once it is served; 0 is any free port. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def run(service: Service, listening: Sequence[socket.socket], most_connections: int, grace_s: float = GRACE_S) -> None:
    """Serve on these sockets until a signal has ended it; what runs then may go on for `grace_s` seconds."""
    Server(service, most_connections, grace_s).run(list(listening))
