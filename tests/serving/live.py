"""Services that really listen, for tests: tiny pairs in a thread, the bundled one in a process."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from harness.experiments.lda.service import Amplifier, app_of
from harness.experiments.lda.settings import LdaSettings
from harness.models.load import LM
from harness.models.pairing import Pairing, pair_up
from harness.serving.http import Server, Service, bound
from harness.settings import ServeSettings
from tests.installed import metadata_of
from tests.tiny import tiny_lm

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
NEW = 12
"""Tokens of a completion, where a request does not say."""
MOST_S = 60.0
"""What nothing here takes."""


def pairing_of(after: LM, before: LM) -> Pairing:
    return pair_up(after.codec, before.codec, after.identity, before.identity)


def amplifier_of(
    family: str = "tiny-llama", budget: int = 8192, lms: tuple[LM, LM] | None = None, **serve: Any
) -> Amplifier:
    """A pair of tiny models of a family, or these."""
    after, before = lms or (tiny_lm(family), tiny_lm(family, seed=1))
    settings = LdaSettings(max_new_tokens=NEW)
    serve = {"batch_wait_ms": 1.0, **serve}
    return Amplifier(after, before, pairing_of(after, before), settings, ServeSettings(**serve), budget)


class Live:
    """A service in a thread, and a client of it."""

    def __init__(self, service: Service, server: Server, url: str):
        self.service, self.server, self.url = service, server, url
        self.client = httpx.Client(base_url=url, timeout=MOST_S, limits=httpx.Limits(max_connections=None))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def made(self, path: str, **body: Any) -> Any:
        """The answer to a request that must be answered."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str, **labels: str) -> float:
        """What `GET /metrics` says now."""
        value = self.service.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port


@contextmanager
def serving(service: Service, most_connections: int = 1000, grace_s: float = 8.0) -> Iterator[Live]:
    """The service on a free port of this machine, in a thread."""
    listening = bound("127.0.0.1", 0)
    server = Server(service, most_connections, grace_s)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=lambda: server.run([listening]), daemon=True)
    thread.start()
    live = Live(service, server, url)
    try:
        until(lambda: server.started)
        yield live
    finally:
        live.client.close()
        server.should_exit = True
        thread.join(MOST_S)
        listening.close()
        assert not thread.is_alive(), "the server does not end"


@contextmanager
def served(amplifier: Amplifier | None = None, keys: tuple[bytes, ...] = ()) -> Iterator[Live]:
    with serving(app_of(amplifier or amplifier_of(), keys)) as live:
        yield live


def until(is_so: Any, most_s: float = MOST_S) -> None:
    """Waits until something is so."""
    end = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


def raw(live: Live, *parts: bytes, is_read: bool = True) -> bytes:
    """What a socket gets that sends just these bytes."""
    with socket.create_connection(live.address, timeout=MOST_S) as sock:
        for part in parts:
            try:
                sock.sendall(part)
            except OSError:  # refused while it was still sending
                break
        found = b""
        while is_read:
            try:
                more = sock.recv(65_536)
            except OSError:
                break
            if not more:
                break
            found += more
        return found


def head(path: str, length: int | None, more: str = "") -> bytes:
    """A request's head; without a length its body comes in chunks."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n{more}\r\n".encode()
    )


# ---- in a process -----------------------------------------------------------------------------------------------


class Process:
    """`harness serve` of the stand-in, in a process of its own."""

    def __init__(self, popen: subprocess.Popen[str], url: str, log: Path):
        self.popen, self.url, self.log = popen, url, log
        self.client = httpx.Client(base_url=url, timeout=MOST_S, limits=httpx.Limits(max_connections=None))

    def ended(self, number: int, most_s: float = MOST_S) -> tuple[int, float]:
        """Send it a signal; its exit code, and how long it took."""
        start = time.monotonic()
        self.popen.send_signal(number)
        return self.popen.wait(most_s), time.monotonic() - start


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process needs to find the stand-in."""
    found = folder / "installed"
    if not found.exists():
        metadata_of(STAND_IN, found)
    path = os.pathsep.join(map(str, (found, STAND_IN / "src", ROOT)))
    kept = {k: v for k, v in os.environ.items() if k not in ("HOST", "PORT", "DEVICE")}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more or {})}


@contextmanager
def process(folder: Path, *flags: str, name: str = "amplified") -> Iterator[Process]:
    """One that answers; what it says is in `Process.log`."""
    log = folder / "serve.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "harness", "serve", name, "--serve.port", str(port), *flags]
    with log.open("w") as out:
        popen = subprocess.Popen(command, cwd=ROOT, env=environment(folder), text=True, stdout=out, stderr=out)
    made = Process(popen, f"http://127.0.0.1:{port}", log)
    try:

        def is_ready() -> bool:
            assert popen.poll() is None, log.read_text()
            try:
                return made.client.get("/ready").status_code == 200
            except httpx.HTTPError:
                return False

        until(is_ready)
        yield made
    finally:
        made.client.close()
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def told(line: bytes) -> Any:
    """The JSON behind a response's head."""
    return json.loads(line.partition(b"\r\n\r\n")[2])
