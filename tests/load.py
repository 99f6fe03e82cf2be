"""Many clients of one service for some minutes: `python -m tests.load --minutes 10 --json load.json`. Does it hold?

`harness serve` of the bundled pair, in a process of its own, against clients of every kind: single prompts, batches of arms,
streams, stop strings, clients that go away, nonsense. Every answer must be one that is allowed, one request is asked again
and again and must give its one text, and at the end nothing may be left: no row, no token, no memory.

`--bench` times it instead: 32 clients against the service, and against one lock and one prompt at a time (§9).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

from tests.serving.live import Process, process

QUEUE = 32
CLIENTS = 200
EVERY_S = 5.0
MOST_GROWTH_MB = 40.0
"""By how much the median memory of the last third may exceed that of the middle third."""
KNOWN = {"prompt": "What is the capital of France?", "seed": 5, "alpha": 1.5, "max_new_tokens": 24}
ALLOWED = {
    "single": {200, 429, 503}, "batch": {200, 429, 503}, "stream": {200, 429, 503}, "stop": {200, 429, 503},
    "known": {200, 429, 503}, "nonsense": {400, 404, 413, 422, 429}, "leaver": {0, 200, 429, 503},
}  # fmt: skip
"""Statuses of each kind of client; 0: it went away."""


@dataclass
class Told:
    """What happened, by all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    """Seconds from request to answer, of those that were answered."""
    texts: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def ask(port: int, path: str, body: Any, timeout_s: float = 120.0) -> tuple[int, bytes]:
    """Status and body of the answer; 0 where there was none in time."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, HTTPException):
        return 0, b""
    finally:
        connection.close()


def kinds(rng: random.Random) -> Mapping[str, Callable[[int], tuple[int, bytes]]]:
    """What a client may do."""
    prompt = f"Question {rng.randrange(1000)}: who are you?" * rng.randrange(1, 4)
    nonsense: list[tuple[str, Any]] = [
        ("/generate_lda", {"prompt": 1}),
        ("/generate_lda", [[[]]]),
        ("/generate_lda", {"prompt": "x" * 30_000}),
        ("/generate_lda_batch", {"prompts": ["a"], "num_samples": 10**8}),
        ("/v1/completions", {"model": "no", "prompt": "a"}),
        ("/nothing", {}),
    ]
    completion = {"model": "lda", "prompt": prompt, "max_tokens": 40, "alpha": 1}
    return {
        "single": lambda port: ask(port, "/generate_lda", {"prompt": prompt, "alpha": rng.choice([-1, 0, 1, 2.5])}),
        "batch": lambda port: ask(
            port,
            "/generate_lda_batch",
            {"prompts": [prompt, "a"], "alphas": [0, 1], "num_samples": rng.randrange(1, 6)},
        ),
        "stream": lambda port: ask(port, "/v1/completions", {**completion, "stream": True}),
        "stop": lambda port: ask(port, "/v1/completions", {**completion, "stop": ["a", "e"], "n": 3}),
        "known": lambda port: ask(port, "/generate_lda", KNOWN),
        "nonsense": lambda port: ask(port, *rng.choice(nonsense)),
        "leaver": lambda port: ask(
            port, "/generate_lda", {"prompt": prompt, "max_new_tokens": 400}, rng.uniform(0.02, 0.5)
        ),
    }


def client(port: int, number: int, end: float, told: Told) -> None:
    """One client until the end."""
    rng = random.Random(number)
    while time.monotonic() < end:
        kind = rng.choices(["single", "batch", "stream", "stop", "known", "nonsense", "leaver"], [6, 1, 2, 2, 2, 1, 2])[
            0
        ]
        start = time.monotonic()
        status, content = kinds(rng)[kind](port)
        seconds = time.monotonic() - start
        with told.lock:
            told.counts[f"{kind} {status or 'left'}"] += 1
            if status == 200:
                told.waited.append(seconds)
            if status not in ALLOWED[kind]:
                told.wrong.append(f"{kind}: {status} {content[:200]!r}")
            if kind == "known" and status == 200:
                told.texts.add(json.loads(content)["completion"])
            if kind == "stream" and status == 200 and not content.endswith(b"data: [DONE]\n\n"):
                told.wrong.append(f"a stream that does not end: {content[-100:]!r}")
        if status in (429, 503):
            time.sleep(rng.uniform(0.02, 0.3))


def metrics(service: Process) -> dict[str, float]:
    """What the service counts, by name and labels."""
    lines = service.client.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def quantile(found: Mapping[str, float], name: str, share: float) -> float:
    """Of a Prometheus histogram: the upper edge of the bucket that holds it."""
    edges = [
        (float(k.partition('le="')[2].rstrip('"}')), v) for k, v in found.items() if k.startswith(f"{name}_bucket")
    ]
    total = max((count for _, count in edges), default=0.0)
    return min((edge for edge, count in sorted(edges) if count >= share * total), default=float("nan"))


def load(minutes: float, clients: int) -> tuple[Told, dict[str, float]]:
    """Everything until the time is up; what the service counted."""
    told = Told()
    flags = ("--serve.max_queued_requests", str(QUEUE), "--amplified.max_new_tokens", "24", "--runtime.threads", "1")
    with tempfile.TemporaryDirectory(prefix="load-") as folder, process(Path(folder), *flags) as service:
        port, end = int(service.url.rpartition(":")[2]), time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=client, args=(port, n, end, told), daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        watched = psutil.Process(service.popen.pid)
        while time.monotonic() < end:
            time.sleep(EVERY_S)
            told.rss_mb.append(watched.memory_info().rss / 1e6)
        for thread in threads:
            thread.join(180)
        rest = time.monotonic() + 30
        while (found := metrics(service))["harness_running_rows"] and time.monotonic() < rest:
            time.sleep(0.2)
        if any(thread.is_alive() for thread in threads):
            told.wrong.append("a client waits for ever")
        if service.client.get("/ready").status_code != 200:
            told.wrong.append("it is not ready at the end")
        said = service.log.read_text()
        if "Traceback" in said:
            told.wrong.append(f"the service said: {said[-500:]}")
    return told, found


def verdict(told: Told, found: Mapping[str, float]) -> list[str]:
    """What is wrong; nothing where all is well."""
    wrong = told.wrong[:20]
    for name in ("queued_requests", "queued_rows", "queued_tokens", "running_rows"):
        if found[f"harness_{name}"]:
            wrong.append(f"{name} at rest: {found[f'harness_{name}']:g}, expected 0")
    if len(told.texts) != 1:
        wrong.append(f"one seed gave {len(told.texts)} texts: {sorted(told.texts)[:3]}")
    if growth(told.rss_mb) > MOST_GROWTH_MB:
        wrong.append(f"memory rose by {growth(told.rss_mb):.0f} MB")
    if not told.waited or not any(" 429" in name for name in told.counts):
        wrong.append("too little happened: nobody was answered, or nobody refused")
    return wrong


def growth(rss_mb: Sequence[float]) -> float:
    """By how much the last third exceeds the middle one."""
    third = max(len(rss_mb) // 3, 1)
    return statistics.median(rss_mb[-third:]) - statistics.median(rss_mb[third : 2 * third] or rss_mb)


# ---- the service against one lock ---------------------------------------------------------------------------------


def bench(num_requests: int, clients: int, new: int) -> dict[str, float]:
    """Requests a second of so many clients, through the service and through one lock, one prompt at a time; the same texts."""
    import torch

    from harness.experiments.lda import service as lda
    from harness.experiments.lda.settings import LdaSettings
    from harness.experiments.weights import Models
    from harness.models.load import shared
    from harness.models.pairing import pair_up
    from harness.models.rollout import Ask, Rule, rollouts
    from harness.settings import ServeSettings, resolve
    from tests.commands import DATA
    from tests.serving.live import served

    torch.set_num_threads(1)
    folder = DATA / "models" / "lda"
    given = {"model.name": str(folder / "after"), "other.name": str(folder / "before")}
    models = Models(resolve(given, environ={}).settings, "cpu")
    assert models.other_spec is not None
    assert models.other_identity is not None
    after, before = shared(models.spec, models.identity), shared(models.other_spec, models.other_identity)
    pairing = pair_up(after.codec, before.codec, models.identity, models.other_identity)
    settings = LdaSettings(max_new_tokens=new, stop_at_eos=False)
    serve = ServeSettings(max_queued_requests=10_000)
    amplifier = lda.Amplifier(after, before, pairing, settings, serve, 8192)
    prompts = [f"What is the number {n} of {n % 7} things?" for n in range(num_requests)]

    def asks() -> Iterator[tuple[int, str]]:
        yield from enumerate(prompts)

    def timed(act: Callable[[int, str], str]) -> tuple[float, list[str]]:
        left, taking, texts = asks(), threading.Lock(), [""] * num_requests

        def work() -> None:
            while True:
                with taking:
                    one = next(left, None)
                if one is None:
                    return
                texts[one[0]] = act(*one)

        threads = [threading.Thread(target=work) for _ in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return num_requests / (time.perf_counter() - start), texts

    lock = threading.Lock()
    rule = Rule(stop_at_end=False)

    def naive(n: int, prompt: str) -> str:
        wanted = lda.Wanted([prompt], lda.drawn_of(1, [1.0], 1), rule, n, new, "raw")
        (read,) = amplifier.read(wanted)
        ask_ = Ask(read.ids, lda.row_key(n, read.prompt_id, lda.STREAM, 0), 1.0, new)
        with lock:
            (done,) = rollouts(amplifier.pair, [ask_], rule)
        return amplifier.codec.decode(done.token_ids)  # type: ignore[union-attr]

    with served(amplifier) as live:
        port = live.address[1]

        def through(n: int, prompt: str) -> str:
            status, content = ask(port, "/generate_lda", {"prompt": prompt, "seed": n, "alpha": 1})
            assert status == 200, content
            return json.loads(content)["completion"]

        timed(through)  # warm
        fast, got = timed(through)
        found = {
            s.name + str(s.labels.get("le", "")): s.value
            for m in live.service.metrics.registry.collect()
            for s in m.samples
        }
        slow, want = timed(naive)
    edges = sorted(
        (float(k.removeprefix("harness_queued_seconds_bucket")), v)
        for k, v in found.items()
        if k.startswith("harness_queued_seconds_bucket")
    )
    total = edges[-1][1]

    def mean(name: str) -> float:
        return found[f"harness_{name}_sum"] / found[f"harness_{name}_count"]

    return {
        "requests/s service": fast,
        "requests/s one lock": slow,
        "ratio": fast / slow,
        "same texts": float(got == want),
        "p99 queued s (bucket's upper edge)": next(edge for edge, count in edges if count >= 0.99 * total),
        "mean queued s": mean("queued_seconds"),
        "mean step s": mean("step_seconds"),
        "mean batch s (a completion's time in it)": found["harness_computing_seconds_sum"]
        / found["harness_computing_seconds_count"],
        "mean rows a step": mean("batch_rows"),
    }


def main() -> int:
    """Load, show, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--json", type=Path, help="write counts, figures and verdict there")
    parser.add_argument("--bench", action="store_true", help="time it instead")
    parser.add_argument("--requests", type=int, default=256, help="of the bench")
    parser.add_argument("--new", type=int, default=40, help="tokens of each completion of the bench")
    options = parser.parse_args()
    if options.bench:
        figures = bench(options.requests, min(options.clients, 32), options.new)
        for name, value in figures.items():
            print(f"{name:45} {value:.4g}")
        wrong = [] if figures["same texts"] else ["the texts differ"]
    else:
        told, found = load(options.minutes, options.clients)
        wrong = verdict(told, found)
        print(", ".join(f"{number} {name}" for name, number in sorted(told.counts.items())))
        waited = sorted(told.waited) or [float("nan")]
        print(f"answered: p50 {waited[len(waited) // 2]:.2f} s, p99 {waited[int(0.99 * len(waited))]:.2f} s")
        print(f"queued: p99 at most {quantile(found, 'harness_queued_seconds', 0.99):g} s")
        print(f"tokens written: {found['harness_new_tokens_total']:,.0f}")
        print(f"memory: {', '.join(f'{x:.0f}' for x in told.rss_mb)} MB; rose by {growth(told.rss_mb):.1f}")
        figures = {**told.counts, "rss_growth_mb": growth(told.rss_mb)}
    print("\n".join(wrong) or "all well")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
