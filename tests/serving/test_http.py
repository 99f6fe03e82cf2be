"""A real server on this machine's own address, and clients of every kind."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Response

from harness.errors import SettingsError
from harness.serving import http
from harness.serving.http import Bounds, keys_of, service_of
from harness.serving.metrics import Metrics
from harness.serving.queue import Limits, Queue
from tests.serving.live import Live, amplifier_of, head, raw, served, serving, told, until

KEY = b"a-key-of-some-length"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """With small bounds."""
    with served(
        amplifier_of(max_body_bytes=20_000, max_prompt_chars=500, max_client_batch=64, max_new_tokens=100)
    ) as live:
        yield live


def body_of(value: Any) -> bytes:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head("/generate_lda", len(content), "Connection: close\r\n") + content


# ---- what every service has -------------------------------------------------------------------------------------


def test_it_says_that_it_is_alive_ready_and_what_it_counts(live: Live) -> None:
    assert live.client.get("/health").json() == {"status": "alive"}
    assert live.client.get("/ready").json() == {"status": "ready"}
    live.made("/generate_lda", prompt="a")
    text = live.client.get("/metrics").text
    for name in ("queued_requests", "queued_rows", "queued_tokens", "batch_rows_bucket", "queued_seconds_sum"):
        assert f"harness_{name}" in text
    for name in ("computing_seconds_count", "new_tokens_total", "prompt_tokens_total", "refusals", "running_rows"):
        assert f"harness_{name}" in text
    assert live.metric("harness_new_tokens_total") > 0
    assert live.metric("harness_answers_total", path="/generate_lda", status="200") >= 1


def test_two_services_of_one_process_count_apart() -> None:
    one, other = (Metrics(Queue(Limits(1, 1, 1, 1, 1.0))) for _ in range(2))
    one.new_tokens.inc()
    assert other.registry.get_sample_value("harness_new_tokens_total") == 0


# ---- keys -------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_answered_but_that_it_lives() -> None:
    with served(keys=(b"another-key", KEY)) as live:
        assert live.client.get("/health").status_code == live.client.get("/ready").status_code == 200
        for header in (
            None,
            "Bearer",
            "Bearer wrong-key-entirely",
            f"Basic {KEY.decode()}",
            KEY.decode(),
            "Bearer \xe9",
        ):
            headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
            for path in ("/generate_lda", "/v1/completions", "/nothing"):
                answer = live.client.post(path, json={"prompt": "a"}, headers=headers)
                assert answer.status_code == 401, header
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                line = answer.json()["error"]["message"] if path.startswith("/v1") else answer.json()["detail"]
                assert "expected a key" in line
        assert live.client.get("/metrics").status_code == 401
        for key in ("another-key", KEY.decode()):
            answer = live.client.post("/generate_lda", json={"prompt": "a"}, headers={"Authorization": f"bearer {key}"})
            assert answer.status_code == 200
        # Refused before its body is read.
        found = raw(live, head("/generate_lda", 10**6) + b"{")
        assert b" 401 " in found.partition(b"\r\n")[0]


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr(http.hmac, "compare_digest", compare)
    with served(keys=(b"first-key", b"second-key")) as live:
        assert live.client.get("/v1/models", headers={"Authorization": "Bearer first-key"}).status_code == 200
    assert compared == [b"first-key", b"second-key"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"short", b"with a space\n", b"k\xc3\xa9y-of-letters", b"x" * 600])
def test_a_file_without_a_key_that_serves_is_refused(content: bytes) -> None:
    with pytest.raises(SettingsError, match=r"serve\.api_key_file: expected keys"):
        keys_of(content)
    assert keys_of(b"one-key-here\n\n  other-key-here \n") == (b"one-key-here", b"other-key-here")


# ---- one line for what is wrong ---------------------------------------------------------------------------------

WRONG: tuple[tuple[str, Any, int, str], ...] = (
    ("/generate_lda", {}, 422, "prompt: Field required"),
    ("/generate_lda", {"prompt": 5}, 422, "prompt: Input should be a valid string; found 5"),
    ("/generate_lda", {"prompt": None}, 422, "prompt: "),
    ("/generate_lda", {"prompt": "a", "alpha": "1"}, 422, "alpha: Input should be a valid number; found '1'"),
    ("/generate_lda", {"prompt": "a", "alpha": True}, 422, "alpha: "),
    ("/generate_lda", {"prompt": "a", "alpha": 1e7}, 422, "alpha: expected an arm between"),
    ("/generate_lda", b'{"prompt": "a", "alpha": NaN}', 422, "alpha: Input should be a finite number"),
    ("/generate_lda", b'{"prompt": "a", "alpha": -Infinity}', 422, "alpha: Input should be a finite number"),
    ("/generate_lda", b'{"prompt": "a", "alpha": 1e999}', 422, "alpha: Input should be a finite number"),
    ("/generate_lda", b'{"prompt": "\\ud800"}', 422, "prompt: expected text in UTF-8"),
    ("/generate_lda", {"prompt": "a", "floor": 1.0}, 422, "floor: Input should be less than 1; found 1.0"),
    ("/generate_lda", {"prompt": "a", "temperature": -1}, 422, "temperature: "),
    ("/generate_lda", {"prompt": "a", "top_p": 0}, 422, "top_p: "),
    ("/generate_lda", {"prompt": "a", "seed": 2**63}, 422, "seed: "),
    ("/generate_lda", {"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens: "),
    ("/generate_lda", {"prompt": "a", "max_new_tokens": 101}, 400, "at most 100 new tokens (serve.max_new_tokens), found 101"),
    ("/generate_lda", {"prompt": "a", "model": "/etc/passwd"}, 422, "model: Extra inputs are not permitted"),
    ("/generate_lda", {"prompt": "a" * 501}, 413, "at most 500 characters (serve.max_prompt_chars), found 501"),
    ("/generate_lda", {"prompt": ""}, 400, "tokens of context"),
    ("/generate_lda", {"prompt": "a", "system_prompt": "b"}, 400, "has no place for it"),
    ("/generate_lda", {"prompt": "a", "apply_chat_template": True}, 400, "chat template"),
    ("/generate_lda", [], 422, "the body: "),
    ("/generate_lda", b"", 422, "the body: Field required"),
    ("/generate_lda", b"{", 400, "the body is no JSON"),
    ("/generate_lda", b"\xff\xfe", 400, "body"),
    ("/generate_lda", b"[" * 15_000, 400, "body"),
    ("/generate_lda", b'{"prompt": ' + b"9" * 10_000 + b"}", 400, "body"),
    ("/generate_lda_batch", {"prompts": []}, 422, "prompts: "),
    ("/generate_lda_batch", {"prompts": "a"}, 422, "prompts: "),
    ("/generate_lda_batch", {"prompts": ["a"], "alphas": [1, 0, 1.0]}, 422, "alphas: expected each arm once, found 1 twice"),
    ("/generate_lda_batch", {"prompts": ["a"], "alphas": [0, -0.0]}, 422, "alphas: expected each arm once, found 0 twice"),
    ("/generate_lda_batch", {"prompts": ["a"], "alphas": []}, 422, "alphas: "),
    ("/generate_lda_batch", {"prompts": ["a"], "alpha": 1, "alphas": [1]}, 422, "expected alpha or alphas, found both"),
    ("/generate_lda_batch", {"prompts": ["a"], "prompt_ids": []}, 422, "expected 1 prompt_ids"),
    ("/generate_lda_batch", {"prompts": ["a"], "num_samples": 65}, 413, "at most 64 completions a request"),
    ("/generate_lda_batch", {"prompts": ["a"], "num_samples": 10**9}, 413, "found 1,000,000,000"),
    ("/generate_lda_batch", {"prompts": ["a"] * 1000, "num_samples": 10**9}, 413, "at most 64 completions a request"),
    ("/rollouts", {"pair_sha256": "x", "contexts": [[1]], "asks": [[0, 1, 1.0, 2]]}, 409, "expected rollouts of the pair"),
    ("/rollouts", {"pair_sha256": "x", "contexts": [[1]], "asks": [[1, 1, 1.0, 2]]}, 422, "expected a context's number below 1"),
    ("/rollouts", {"pair_sha256": "x", "contexts": [[-1]], "asks": []}, 422, "contexts.0.0: "),
    ("/v1/completions", {"model": "../x", "prompt": "a"}, 404, "no model '../x'; there are after, before, lda"),
    ("/v1/completions", {"model": "after", "prompt": "a", "alpha": 1}, 400, "the model 'after' is the arm 0"),
    ("/v1/completions", {"model": "lda", "prompt": "a", "stop": ["a"] * 5}, 422, "stop"),
    ("/v1/completions", {"model": "lda", "prompt": "a", "stop": ""}, 422, "stop: expected strings that are not empty"),
    ("/v1/completions", {"model": "lda", "prompt": "a", "logprobs": 6}, 422, "logprobs: "),
    ("/v1/completions", {"model": "lda", "prompt": "a", "echo": True}, 422, "echo: "),
    ("/v1/completions", {"model": "lda", "prompt": "a", "presence_penalty": 0.5}, 422, "presence_penalty: "),
    ("/v1/completions", {"model": "lda", "prompt": "a", "logprobs": 1, "stream": True}, 422, "not given in a stream"),
    ("/v1/completions", {"model": "lda", "prompt": [1, 2]}, 422, "prompt"),
    ("/nothing", {}, 404, "no such endpoint: /nothing"),
)  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "line"), WRONG)
def test_what_is_wrong_is_one_line(live: Live, path: str, body: Any, status: int, line: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = live.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]["message"] if path.startswith("/v1/") else answer.json()["detail"]
    assert line in said
    assert "\n" not in said
    assert len(said) <= 500
    assert live.service.queue.is_idle, "nothing is left in the queue"


def test_what_is_left_out_stays_within_the_services_bounds() -> None:
    with served(amplifier_of(max_new_tokens=5)) as live:
        assert live.made("/generate_lda", prompt="a", seed=0)["tokens_generated"] <= 5


def test_another_content_type_is_no_json(live: Live) -> None:
    """A page in a browser can send such a request to this machine without asking; it is not read as JSON."""
    answer = live.client.post("/generate_lda", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422


def test_an_answer_is_json_whatever_the_text(live: Live) -> None:
    for prompt in ("\x00", "\u2028", "😀" * 100, "</script>", "{prompt}{system}"):
        assert live.made("/generate_lda", prompt=prompt, seed=0)["formatted_prompt"] == prompt


# ---- hostile ----------------------------------------------------------------------------------------------------


def test_a_body_is_counted_as_it_comes_whatever_its_head_says(live: Live) -> None:
    found = raw(live, head("/generate_lda", 10**9))
    assert b" 413 " in found.partition(b"\r\n")[0], "by its own word"
    assert "at most 20,000 bytes (serve.max_body_bytes)" in told(found)["detail"]
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    found = raw(live, head("/generate_lda", None), *[chunk] * 1000)
    assert b" 413 " in found.partition(b"\r\n")[0], "in chunks, of which there is no end"
    assert raw(live, body_of({"prompt": "a"})).startswith(b"HTTP/1.1 200"), "the control"


def test_a_body_that_never_ends_is_given_up() -> None:
    queue = Queue(Limits(1, 1, 1, 1, 1.0))

    class Idle:
        is_alive = True

        def start(self) -> None: ...

        def stop(self) -> None: ...

    service = service_of("x", queue, Idle(), Metrics(queue), Bounds(1000, body_s=0.3))

    @service.app.post("/generate_lda")
    async def echo(body: dict[str, int]) -> dict[str, int]:
        return body

    with serving(service) as live:
        found = raw(live, head("/generate_lda", 500) + b"{")
        assert b" 408 " in found.partition(b"\r\n")[0]
        assert b"within 0.3 s" in found
        assert live.made("/generate_lda", a=1) == {"a": 1}


def test_a_flood_of_headers_is_refused(live: Live) -> None:
    flood = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 1000) for n in range(1000))
    found = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n")
    assert not found or b" 400 " in found.partition(b"\r\n")[0]
    assert raw(live, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert live.client.get("/health").status_code == 200


def test_a_head_that_drips_in_does_not_hold_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEAD_S", 0.3)
    with served() as live:
        with socket.create_connection(live.address, timeout=60) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nX")
            assert sock.recv(100) == b"", "closed"
        with socket.create_connection(live.address, timeout=60) as sock:
            assert sock.recv(100) == b"", "silence too"
        # Control: who has sent a head has time for the rest.
        with socket.create_connection(live.address, timeout=60) as sock:
            content = b'{"prompt": "a"}'
            sock.sendall(head("/generate_lda", len(content)))
            time.sleep(0.6)
            sock.sendall(content)
            assert sock.recv(20).startswith(b"HTTP/1.1 200")


def test_a_million_prompts_are_refused_and_soon() -> None:
    with served(amplifier_of(max_body_bytes=20_000_000)) as live:
        start = time.monotonic()
        answer = live.post("/generate_lda_batch", prompts=["a"] * 1_000_000)
        assert answer.status_code == 413
        assert "found 1,000,000" in answer.json()["detail"]
        many = {f"field{n}": n for n in range(200_000)}
        answer = live.post("/generate_lda", prompt="a", **many)
        assert answer.status_code == 422
        assert "200000 more" in answer.json()["detail"] or "199999 more" in answer.json()["detail"]
        assert time.monotonic() - start < 60
        assert live.service.queue.is_idle


def test_too_many_connections_are_refused() -> None:
    from harness.experiments.lda.service import app_of

    with serving(app_of(amplifier_of()), most_connections=5) as live:
        held = [socket.create_connection(live.address, timeout=60) for _ in range(6)]
        try:
            until(lambda: len(live.server.server_state.connections) >= 6)
            assert raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
                b"HTTP/1.1 503"
            )
        finally:
            for sock in held:
                sock.close()
        until(lambda: len(live.server.server_state.connections) == 0)
        assert raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("evil.example", 403),
     ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("10.0.0.1", 403), ("[::2]", 403)],
)  # fmt: skip
def test_a_page_whose_name_was_pointed_here_is_refused(live: Live, host: str, status: int) -> None:
    assert live.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_with_a_key_any_name_will_do() -> None:
    with served(keys=(KEY,)) as live:
        headers = {"Host": "evil.example", "Authorization": f"Bearer {KEY.decode()}"}
        assert live.client.get("/v1/models", headers=headers).status_code == 200


def test_an_answer_that_nobody_reads_does_not_hold_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: one that is read is whole."""
    monkeypatch.setattr(http, "_READ_S", 0.3)
    with served() as live:
        long = "x" * 50_000_000

        @live.service.app.get("/long")
        async def answer() -> Response:
            return Response(long)

        with socket.create_connection(live.address, timeout=60) as sock:
            sock.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: len(live.server.server_state.connections) == 1)
            until(lambda: len(live.server.server_state.connections) == 0)
        assert live.client.get("/long").text == long


# ---- stopping ---------------------------------------------------------------------------------------------------


def test_a_service_that_stops_takes_no_request_and_lets_what_runs_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    amplifier = amplifier_of(max_new_tokens=2000)
    turn, may_go_on = amplifier.worker.turn, threading.Event()

    def held() -> None:  # what runs is not over before the service was asked: it listens for as long as something runs
        turn()
        if amplifier.worker.num_running:
            may_go_on.wait(60)

    monkeypatch.setattr(amplifier.worker, "turn", held)
    with served(amplifier) as live:
        answers: list[Any] = []
        work = threading.Thread(
            target=lambda: answers.append(live.post("/generate_lda", prompt="a", max_new_tokens=200, alpha=0))
        )
        work.start()
        until(lambda: amplifier.worker.num_running == 1)
        live.server.stop(signal.SIGTERM)
        until(lambda: live.service.is_draining)
        late = live.post("/generate_lda", prompt="a")
        assert (late.status_code, late.headers.get("Retry-After")) == (503, "5")
        assert live.client.get("/ready").status_code == 503
        assert live.client.get("/health").status_code == 200
        may_go_on.set()
        work.join(60)
        assert answers[0].status_code == 200, "what ran has finished"
        until(lambda: live.server.lifespan.shutdown_event.is_set())


def test_what_does_not_finish_in_time_is_told_so() -> None:
    from harness.experiments.lda.service import app_of

    amplifier = amplifier_of(max_new_tokens=100_000, lms=None)
    with serving(app_of(amplifier), grace_s=0.5) as live:
        answers: list[Any] = []
        body = {"prompts": ["a"], "num_samples": 50, "max_new_tokens": 1500}
        work = threading.Thread(target=lambda: answers.append(live.post("/generate_lda_batch", **body)))
        work.start()
        until(lambda: amplifier.worker.num_running > 0)
        live.server.stop()
        work.join(60)
        assert answers[0].status_code == 503
        assert "stopped before this was done" in answers[0].json()["detail"]
