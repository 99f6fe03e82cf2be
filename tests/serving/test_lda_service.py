"""The service of amplification against `rollouts` in process: one text for one seed, whoever else is served."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch

from harness.errors import EnvironmentFault, ItemFailed, NotFinite, SettingsError
from harness.experiments.lda import remote
from harness.experiments.lda.remote import Remote, checked_url
from harness.experiments.lda.service import STREAM, Amplifier
from harness.models.noise import row_key
from harness.models.rollout import Ask, Decoder, Pair, Rollout, Rule, rollouts
from harness.serving import worker as workers
from harness.text.words import Vocabulary
from tests.models.test_decode import poisoned_lm, random_ids
from tests.serving.live import NEW, Live, amplifier_of, head, served, until
from tests.tiny import tiny_lm

FAMILIES = ("tiny-llama", "tiny-gemma2", "tiny-gpt2", "tiny-qwen3")
ALPHAS = (-1.0, 0.0, 0.7, 2.0)
PROMPTS = ("What is the capital of France?", "a", "The early bird catches the worm, they say.")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with served() as live:
        yield live


def prompt_id(text: str) -> str:
    import hashlib

    return f"http:{hashlib.sha256(text.encode()).hexdigest()}"


def in_process(
    amplifier: Amplifier,
    prompts: Sequence[str],
    alphas: Sequence[float],
    samples: int,
    seed: int,
    rule: Rule,
    new: int = NEW,
) -> list[str]:
    """The texts that the batch endpoint is to give, by `rollouts` itself."""
    asks = [
        Ask(tuple(amplifier.codec.context(p)[0]), row_key(seed, prompt_id(p), STREAM, s), alpha, new)
        for p in prompts
        for alpha in alphas
        for s in range(samples)
    ]
    found = rollouts(amplifier.pair, asks, rule)
    assert all(isinstance(r, Rollout) for r in found)
    return [amplifier.codec.decode(amplifier.answer_of(r)) for r in found]  # type: ignore[arg-type]


def texts(answer: Any) -> list[str]:
    return [result["completion"] for result in answer["results"]]


# ---- one text for one seed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_one_text_alone_among_others_and_in_process(family: str) -> None:
    """Control: another seed gives another text."""
    amplifier = amplifier_of(family)
    with served(amplifier) as live:
        body = {"prompts": list(PROMPTS), "alphas": list(ALPHAS), "num_samples": 2, "seed": 7}
        want = in_process(amplifier, PROMPTS, ALPHAS, 2, 7, Rule())
        assert texts(live.made("/generate_lda_batch", **body)) == want

        def others(n: int) -> None:
            live.made("/generate_lda", prompt=f"company {n}" * (1 + n % 5), alpha=n / 10, max_new_tokens=5 + n)

        with ThreadPoolExecutor(33) as pool:
            company = [pool.submit(others, n) for n in range(32)]
            among = pool.submit(live.made, "/generate_lda_batch", **body)
            assert texts(among.result()) == want
            for other in company:
                other.result()
        alone = [
            live.made("/generate_lda", prompt=p, alpha=alpha, seed=7)["completion"] for p in PROMPTS for alpha in ALPHAS
        ]
        assert alone == want[::2], "the first sample is that of a request of one"
        assert texts(live.made("/generate_lda_batch", **{**body, "seed": 8})) != want
    assert len(set(want)) > len(want) // 2


def test_arms_share_their_noise_and_the_arms_that_are_models_are_those_models(live: Live) -> None:
    both = live.made("/generate", prompt="hello", seed=1)
    after = live.made("/generate_lda", prompt="hello", seed=1, alpha=0)
    before = live.made("/generate_lda", prompt="hello", seed=1, alpha=-1)
    assert both["after"]["completion"] == after["completion"] != before["completion"] == both["before"]["completion"]
    for model, want in (("after", after), ("before", before)):
        made = live.made("/v1/completions", model=model, prompt="hello", seed=1, max_tokens=NEW)
        assert made["choices"][0]["text"] == want["completion"]


def test_a_request_without_a_seed_gets_one_and_is_told_it(live: Live) -> None:
    first = live.made("/generate_lda", prompt="hello")
    again = live.made("/generate_lda", prompt="hello", seed=first["seed"])
    assert first == again
    assert live.made("/generate_lda", prompt="hello")["completion"] != first["completion"]


def test_the_fields_of_an_answer_are_those_of_the_contract(live: Live) -> None:
    told = live.made("/generate_lda", prompt="hello", seed=1)
    fields = "prompt formatted_prompt completion text alpha models tokens_generated stopped_early finish_reason seed"
    assert set(told) == set(fields.split())
    assert told["text"] == told["formatted_prompt"] + told["completion"]
    assert (told["alpha"], told["tokens_generated"], told["stopped_early"]) == (1.0, NEW, False)
    batch = live.made("/generate_lda_batch", prompts=["a", "b"], alphas=[2, 0], num_samples=2)
    order = [(r["prompt_index"], r["alpha"], r["sample"]) for r in batch["results"]]
    assert order == [(p, alpha, s) for p in range(2) for alpha in (2.0, 0.0) for s in range(2)]
    assert batch["batch_size"] == 8
    pair = live.client.get("/tokenizer_compatibility").json()
    assert {"compatible", "vocab_size_1", "vocab_size_2", "vocabs_match", "warning", "pair_sha256"} <= set(pair)


def test_greedy_needs_no_seed_and_prompt_ids_are_the_names_of_the_noise(live: Live) -> None:
    greedy = [live.made("/generate_lda", prompt="hello", do_sample=False, seed=n)["completion"] for n in (1, 2)]
    assert greedy[0] == greedy[1]
    asked = {"prompts": ["hello", "hello"], "alpha": 1.0, "seed": 3}
    same = texts(live.made("/generate_lda_batch", **asked))
    assert same[0] == same[1]
    named = texts(live.made("/generate_lda_batch", **asked, prompt_ids=["x", "y"]))
    assert named[0] != named[1]
    amplifier_codec = tiny_lm("tiny-llama").codec
    ask = Ask(tuple(amplifier_codec.context("hello")[0]), row_key(3, "x", STREAM, 0), 1.0, NEW)
    (want,) = rollouts(Pair(tiny_lm("tiny-llama"), tiny_lm("tiny-llama", seed=1), 257), [ask], Rule())
    assert isinstance(want, Rollout)
    assert named[0] == amplifier_codec.decode(want.token_ids)


@pytest.mark.parametrize("more", [{"temperature": 0.7}, {"top_p": 0.8}, {"floor": 0.05}, {"do_sample": False}])
def test_rules_are_drawn_as_in_process(live: Live, more: dict[str, Any]) -> None:
    amplifier = amplifier_of()
    rule = Rule(0.0) if more == {"do_sample": False} else Rule(**more)
    want = in_process(amplifier, PROMPTS, ALPHAS, 1, 5, rule)
    body = {"prompts": list(PROMPTS), "alphas": list(ALPHAS), "seed": 5, **more}
    assert texts(live.made("/generate_lda_batch", **body)) == want


def test_an_end_of_text_ends_a_text_and_is_no_part_of_it() -> None:
    lms = []
    for lm in (tiny_lm("tiny-llama"), tiny_lm("tiny-llama", seed=1)):
        size = lm.vocabulary.ends_word.size
        ends = frozenset(range(0, 256, 3)) | {256}
        lms.append(replace(lm, vocabulary=Vocabulary(lm.vocabulary.ends_word, np.zeros(size, dtype=bool), ends)))
    amplifier = amplifier_of(lms=(lms[0], lms[1]))
    with served(amplifier) as live:
        made = live.made("/generate_lda_batch", prompts=["hello"], alpha=1, num_samples=20, seed=0)["results"]
        ended = [r for r in made if r["stopped_early"]]
        assert ended
        assert all(r["finish_reason"] == "stop" for r in ended)
        assert texts({"results": made}) == in_process(amplifier, ["hello"], [1.0], 20, 0, Rule())
        short = [r for r in ended if r["tokens_generated"] == 1]
        assert all(r["completion"] == "" for r in short)


# ---- failures stay alone ----------------------------------------------------------------------------------------


def test_a_row_whose_logits_are_not_finite_fails_alone() -> None:
    (poison,) = tiny_lm("tiny-llama").codec.encode("!", add_special_tokens=False)
    amplifier = amplifier_of(lms=(poisoned_lm(poison), tiny_lm("tiny-llama", seed=1)))
    with served(amplifier) as live:
        made = live.made("/generate_lda_batch", prompts=["well", "ill!", "well too"], alpha=1, seed=0, max_new_tokens=1)
        assert ["error" in r for r in made["results"]] == [False, True, False]
        assert made["num_failed"] == 1
        assert "not finite" in made["results"][1]["error"]
        answer = live.post("/generate_lda", prompt="ill!", max_new_tokens=1)
        assert (answer.status_code, "not finite" in answer.json()["detail"]) == (500, True)
        assert live.client.get("/ready").status_code == 200


def test_a_prompt_that_fits_no_model_is_an_item_of_a_batch_and_an_error_alone() -> None:
    lms = replace(tiny_lm("tiny-llama"), max_positions=40), tiny_lm("tiny-llama", seed=1)
    with served(amplifier_of(lms=lms)) as live:
        made = live.made("/generate_lda_batch", prompts=["a", "b" * 100, "c"], alpha=1)
        assert ["error" in r for r in made["results"]] == [False, True, False]
        answer = live.post("/generate_lda", prompt="b" * 100)
        assert answer.status_code == 400
        assert "expected 1 to 28 tokens of context beside 12 new ones, found 100" in answer.json()["detail"]


def test_a_token_that_one_model_lacks_does_not_end_the_worker() -> None:
    amplifier = amplifier_of()
    with served(amplifier) as live:
        sha = amplifier.pair_sha256
        told = live.made("/rollouts", pair_sha256=sha, contexts=[[9999], [5]], asks=[[0, 1, 1.0, 3], [1, 1, 1.0, 3]])
        assert ["error" in r for r in told["rollouts"]] == [True, False]
        assert live.client.get("/ready").status_code == 200


def test_out_of_memory_in_the_decoder_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    amplifier = amplifier_of()
    want = in_process(amplifier, PROMPTS, ALPHAS, 2, 7, Rule())
    step, failures = Decoder.step, []

    def cramped(decoder: Decoder) -> Any:
        if len(decoder) > 7:
            failures.append(len(decoder))
            raise torch.OutOfMemoryError("cramped")
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", cramped)
    with served(amplifier) as live:
        made = live.made("/generate_lda_batch", prompts=list(PROMPTS), alphas=list(ALPHAS), num_samples=2, seed=7)
        assert texts(made) == want
        pieces = list(streamed(live, prompt="hello", n=9, seed=1, max_tokens=NEW))
        assert joined(pieces) == [
            c["text"] for c in plain(live, prompt="hello", n=9, seed=1, max_tokens=NEW)["choices"]
        ]
    assert failures, "the control: it did run out"


def test_a_worker_that_dies_fails_what_waits_and_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(decoder: Decoder) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    amplifier = amplifier_of()
    monkeypatch.setattr(Decoder, "step", dies)
    with served(amplifier) as live:
        answer = live.post("/generate_lda", prompt="a")
        assert (answer.status_code, "ended unexpectedly" in answer.json()["detail"]) == (500, True)
        assert live.post("/generate_lda", prompt="a").status_code == 503
        assert live.client.get("/ready").status_code == 503
        assert live.client.get("/health").status_code == 200


def test_a_request_that_is_not_begun_in_time_is_503() -> None:
    amplifier = amplifier_of(budget=50, timeout_s=0.5)
    gate = threading.Event()
    step = Decoder.step
    with pytest.MonkeyPatch.context() as patch, served(amplifier) as live:
        patch.setattr(Decoder, "step", lambda d: gate.wait(60) and step(d))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(live.post, "/generate_lda", prompt="a" * 30, alpha=0)
            until(lambda: amplifier.worker.num_running == 1)
            second = pool.submit(live.post, "/generate_lda", prompt="b" * 30, alpha=0)
            answer = second.result()  # though the worker stands still
            assert answer.status_code == 503
            assert "not begun within 0.5 s (serve.timeout_s)" in answer.json()["detail"]
            gate.set()
            assert first.result().status_code == 200
        assert live.metric("harness_refusals_total", reason="timeout") == 1


# ---- who goes away ----------------------------------------------------------------------------------------------


def steps_of(patch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step, as they are made."""
    step, seen = Decoder.step, []

    def counted(decoder: Decoder) -> Any:
        seen.append(len(decoder))
        time.sleep(0.02)  # so that a client can go while it runs
        return step(decoder)

    patch.setattr(Decoder, "step", counted)
    return seen


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows_with_the_next_step(is_stream: bool) -> None:
    amplifier = amplifier_of(budget=5000)
    with pytest.MonkeyPatch.context() as patch, served(amplifier) as live:
        seen = steps_of(patch)
        body = {"model": "lda", "prompt": "hello", "n": 10, "max_tokens": 1000, "stream": is_stream}
        content = json.dumps(body).encode()
        with socket.create_connection(live.address, timeout=60) as sock:
            sock.sendall(head("/v1/completions", len(content)) + content)
            until(lambda: len(seen) > 3)
            assert amplifier.worker.num_running > 0
            assert amplifier.queue.num_rows > 0, "some wait still"
            while is_stream and b"data: " not in sock.recv(100_000):
                pass
        until(lambda: amplifier.queue.is_idle)
        at = len(seen)
        until(lambda: amplifier.worker.num_running == 0)
        assert len(seen) - at <= 1, "one step, which was being made"
        assert amplifier.queue.num_rows == 0
        assert live.made("/generate_lda", prompt="a", seed=0)


def test_nobody_is_cut_off_by_who_goes_away() -> None:
    amplifier = amplifier_of()
    want = in_process(amplifier, PROMPTS, ALPHAS, 2, 7, Rule(), new=40)
    with pytest.MonkeyPatch.context() as patch, served(amplifier) as live:
        steps_of(patch)
        with ThreadPoolExecutor(9) as pool:
            body = {"prompts": list(PROMPTS), "alphas": list(ALPHAS), "num_samples": 2, "seed": 7, "max_new_tokens": 40}
            stays = pool.submit(live.made, "/generate_lda_batch", **body)
            leavers = [pool.submit(_leave_soon, live.url, n) for n in range(8)]
            assert texts(stays.result()) == want
            for leaver in leavers:
                leaver.result()
        until(lambda: amplifier.queue.is_idle)


def _leave_soon(url: str, n: int) -> None:
    with httpx.Client(base_url=url, timeout=0.05 + 0.05 * n) as client, suppress(httpx.HTTPError):
        client.post("/generate_lda", json={"prompt": "x" * 40, "max_new_tokens": 1000})


# ---- a crowd ----------------------------------------------------------------------------------------------------


def test_200_clients_against_a_queue_of_32_get_200_or_429_and_memory_stays_flat() -> None:
    amplifier = amplifier_of(max_queued_requests=32, budget=1000, timeout_s=30.0)
    counts: dict[int, int] = {}
    counting = threading.Lock()
    with served(amplifier) as live:
        longest = 0.0

        def come(n: int) -> None:
            nonlocal longest
            # Not httpx: 200 of its clients are 200 TLS contexts, whose memory would hide the service's.
            client = HTTPConnection(*live.address, timeout=60)
            while time.monotonic() < end:
                start = time.monotonic()
                body = json.dumps({"prompt": f"client {n}", "alpha": n % 3})
                client.request("POST", "/generate_lda", body, {"Content-Type": "application/json"})
                answer = client.getresponse()
                answer.read()
                with counting:
                    counts[answer.status] = counts.get(answer.status, 0) + 1
                    longest = max(longest, time.monotonic() - start)
                if answer.status == 429:
                    assert int(answer.headers["Retry-After"]) >= 1
                    time.sleep(0.05)
            client.close()

        rss = []
        for seconds in (2.0, 2.0, 2.0):
            end = time.monotonic() + seconds
            threads = [threading.Thread(target=come, args=(n,)) for n in range(200)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            rss.append(psutil.Process().memory_info().rss)
        assert set(counts) == {200, 429}, counts
        assert counts[200] > 32
        assert counts[429] > 32
        assert longest < 30.0
        until(lambda: amplifier.queue.is_idle)
        assert amplifier.queue.num_requests == amplifier.queue.num_rows == amplifier.queue.num_tokens == 0
        assert live.metric("harness_refusals_total", reason="queued_requests") == counts[429]
        assert rss[2] - rss[1] < 40e6, rss


# ---- OpenAI's shape ---------------------------------------------------------------------------------------------


def plain(live: Live, **body: Any) -> Any:
    return live.made("/v1/completions", **{"model": "lda", **body})


def streamed(live: Live, **body: Any) -> Iterator[Any]:
    """The events of a stream; its last one must say that it is done."""
    with live.client.stream("POST", "/v1/completions", json={"model": "lda", "stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return iter([json.loads(line.removeprefix("data: ")) for line in lines[:-1]])


def joined(events: Sequence[Any]) -> list[str]:
    found: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[n] for n in sorted(found)]


def test_a_stream_is_the_text_in_pieces(live: Live) -> None:
    body = {"prompt": ["hello", "b"], "n": 3, "seed": 1, "max_tokens": 20}
    want = plain(live, **body)
    events = list(streamed(live, **body, stream_options={"include_usage": True}))
    assert joined(events) == [c["text"] for c in want["choices"]]
    assert len(events) > 12, "in pieces"
    assert events[-1]["usage"] == want["usage"]
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert sorted(reasons) == sorted(c["finish_reason"] for c in want["choices"])
    assert {e["seed"] for e in events} == {1}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_cuts_the_text_and_ends_the_row(live: Live, is_stream: bool) -> None:
    whole = plain(live, prompt="hello", seed=1, max_tokens=60)["choices"][0]["text"]
    stop = whole[5:7]
    at = whole.find(stop)
    before = live.metric("harness_new_tokens_total")
    if is_stream:
        events = list(streamed(live, prompt="hello", seed=1, max_tokens=60, stop=["nowhere", stop]))
        assert joined(events) == [whole[:at]]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = plain(live, prompt="hello", seed=1, max_tokens=60, stop=["nowhere", stop])["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[:at], "stop")
    assert live.metric("harness_new_tokens_total") - before < 40, "it was not written to its end"


def test_log_probabilities_are_those_of_the_tokens_drawn_under_their_arm(live: Live) -> None:
    (choice,) = plain(live, prompt="hello", seed=1, max_tokens=9, logprobs=3, temperature=0.5, alpha=2)["choices"]
    told = choice["logprobs"]
    amplifier = amplifier_of()
    ask = Ask(tuple(amplifier.codec.context("hello")[0]), row_key(1, prompt_id("hello"), STREAM, 0), 2.0, 9)
    (want,) = rollouts(amplifier.pair, [ask], Rule(0.5))
    assert isinstance(want, Rollout)
    assert np.allclose(told["token_logprobs"], want.logp_arm, atol=1e-4)
    assert {len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {9}
    assert all(list(top.values()) == [p] for top, p in zip(told["top_logprobs"], told["token_logprobs"], strict=True))
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    assert plain(live, prompt="hello", max_tokens=2)["choices"][0]["logprobs"] is None


def test_openais_own_client_is_served(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["after", "before", "lda"]
        assert client.models.retrieve("lda").id == "lda"
        made = client.completions.create(
            model="lda", prompt=["hello", "b"], n=2, max_tokens=8, temperature=0.9, top_p=0.95, seed=4, logprobs=1,
            stop=["zzz"], extra_body={"alpha": 1.5, "floor": 0.001},
        )  # fmt: skip
        assert [c.index for c in made.choices] == [0, 1, 2, 3]
        assert made.usage is not None
        assert made.usage.completion_tokens == 32
        assert made.choices[0].logprobs is not None
        stream = client.completions.create(model="after", prompt="hello", max_tokens=8, seed=4, stream=True)
        text = "".join(event.choices[0].text for event in stream)
        assert text == client.completions.create(model="after", prompt="hello", max_tokens=8, seed=4).choices[0].text
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.completions.create(model="gpt", prompt="a")
        with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
            client.completions.create(model="lda", prompt="a", temperature=-1)
        with pytest.raises(openai.BadRequestError, match="tokens of context"):
            client.completions.create(model="lda", prompt="", stream=True)


def test_an_error_in_a_stream_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = amplifier_of().pair
    context = tuple(tiny_lm("tiny-llama").codec.context("hello")[0])
    ask = Ask(context, row_key(1, prompt_id("hello"), STREAM, 0), 1.0, 20)
    (done,) = rollouts(usual, [ask], Rule())
    assert isinstance(done, Rollout)
    poison = next(t for t in done.token_ids[3:] if t not in (*context, *done.token_ids[:3]))
    with served(amplifier_of(lms=(poisoned_lm(poison), tiny_lm("tiny-llama", seed=1)))) as live:
        body = {"model": "lda", "prompt": "hello", "seed": 1, "max_tokens": 20, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        last = (
            json.loads(lines[-1].removeprefix("data: ")) if response.status_code == 200 else json.loads("".join(lines))
        )
        assert "not finite" in last["error"]["message"]


# ---- rollouts for a run elsewhere -------------------------------------------------------------------------------

CONTEXTS = [random_ids(30, 0), random_ids(1, 1), random_ids(18, 1), random_ids(40, 1)]
ASKS = [
    Ask(context, row_key(0, f"p{n}", "lda", s), alpha, 6)
    for n, context in enumerate(CONTEXTS)
    for s in range(2)
    for alpha in ALPHAS
]


def assert_equal(got: Sequence[Any], want: Sequence[Any], atol: float = 0.0) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert type(g) is type(w)
        if isinstance(w, ItemFailed):
            assert str(g) == str(w)
            continue
        assert (g.token_ids, g.finish_reason) == (w.token_ids, w.finish_reason)
        for name in ("logp_after", "logp_before", "logp_arm", "margins", "mass_removed", "arm_steps"):
            one, other = (np.asarray(getattr(x, name), dtype=np.float64) for x in (g, w))
            if atol:
                assert np.allclose(one, other, rtol=0, atol=atol, equal_nan=True), name
            else:
                assert one.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_remote_rollouts_are_those_of_this_process_bit_for_bit(family: str) -> None:
    """Whoever else is served. Control: in other company the texts are the same and the last bits are not."""
    amplifier = amplifier_of(family)
    with served(amplifier) as live, Remote(live.url, amplifier.pair_sha256, 100) as there:
        stop = threading.Event()

        def company() -> None:
            while not stop.is_set():
                live.made("/generate_lda_batch", prompts=["some company"] * 3, alpha=1, max_new_tokens=10)

        thread = threading.Thread(target=company)
        thread.start()
        try:
            for rule, arms in ((Rule(), ALPHAS), (Rule(0.8, 0.9, 0.01, False), ()), (Rule(0.0), (0.0, 3.0))):
                assert_equal(there.rollouts(ASKS, rule, arms), rollouts(amplifier.pair, ASKS, rule, arms))
        finally:
            stop.set()
            thread.join(60)
        with Remote(live.url, amplifier.pair_sha256, 2) as halves:
            got = halves.rollouts(ASKS, Rule(), ALPHAS)
            half = len(ASKS) // 2
            assert_equal(
                got, [r for part in (ASKS[:half], ASKS[half:]) for r in rollouts(amplifier.pair, part, Rule(), ALPHAS)]
            )
            assert_equal(got, rollouts(amplifier.pair, ASKS, Rule(), ALPHAS), atol=2e-3)
        with pytest.raises(AssertionError):
            assert_equal(there.rollouts([replace(a, key=a.key + 1) for a in ASKS], Rule()), got)


def test_remote_failures_are_those_of_this_process() -> None:
    lms = poisoned_lm(77), tiny_lm("tiny-llama", seed=1)
    amplifier = amplifier_of(lms=lms)
    asks = [replace(ASKS[0], context=(5, 77)), *ASKS[:4]]
    with served(amplifier) as live, Remote(live.url, amplifier.pair_sha256, 8) as there:
        got, want = there.rollouts(asks, Rule()), rollouts(amplifier.pair, asks, Rule())
        assert isinstance(got[0], NotFinite)
        assert str(got[0]) == str(want[0])
        assert sum(isinstance(r, ItemFailed) for r in got) == sum(isinstance(r, ItemFailed) for r in want)
        assert there.rollouts([], Rule()) == []


def test_infinities_and_nan_come_through() -> None:
    done = Rollout([1], [-np.inf], [float("nan")], [-1.5], [np.inf], [0.1], [[-np.inf, np.nan, -2.0]])
    from harness.experiments.lda.service import _told

    sent = json.loads(json.dumps(_told(done), allow_nan=False))
    answers = iter([{"pair_sha256": "p"}, {"rollouts": [sent]}])
    there = Remote("http://x", "p", 1, transport=httpx.MockTransport(lambda _: httpx.Response(200, json=next(answers))))
    assert_equal(there.rollouts([Ask((1,), 0, 1.0, 1)], Rule(), (0.0, 1.0, 2.0)), [done])


def test_another_pair_is_refused_with_both_hashes(live: Live) -> None:
    with pytest.raises(SettingsError, match=r"lda\.server: .* another pair: expected 0{64}, found [0-9a-f]{64}"):
        Remote(live.url, "0" * 64, 8)


class Scripted:
    """A server that answers as it is told, one after the other, and a clock that sleeping moves."""

    def __init__(self, *answers: Any):
        self.answers, self.slept, self.now = list(answers), [], 0.0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def remote(self) -> Remote:
        transport = httpx.MockTransport(self)
        return Remote("http://there:8000", "p", 1, sleep=self.sleep, clock=lambda: self.now, transport=transport)


PAIR = httpx.Response(200, json={"pair_sha256": "p"})


def test_a_full_or_starting_server_is_asked_again_when_it_says() -> None:
    there = Scripted(
        httpx.ConnectError("refused"), httpx.Response(503, json={"detail": "x"}), PAIR,
        httpx.Response(429, headers={"Retry-After": "7"}), httpx.Response(429, headers={"Retry-After": "9999"}),
        httpx.Response(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), httpx.Response(200, json={"rollouts": []}),
    )  # fmt: skip
    remote_ = there.remote()
    assert remote_._asked("POST", "/rollouts", {}) == {"rollouts": []}
    assert there.slept == [2.0, 2.0, 7.0, 60.0, 2.0]


@pytest.mark.parametrize("answer", [httpx.ConnectError("refused"), httpx.Response(503, json={"detail": "stopping"})])
def test_a_server_that_cannot_be_reached_is_given_up_after_some_minutes(answer: Any) -> None:
    there = Scripted(answer)
    with pytest.raises(
        EnvironmentFault, match=r"http://there:8000 gave no answer in 300 s .*(refused|stopping)"
    ) as found:
        there.remote()
    assert found.value.exit_code == 4
    assert 250 < there.now <= 300


@pytest.mark.parametrize(
    ("answer", "kind", "line"),
    [
        (httpx.Response(401, json={"detail": "expected a key"}), SettingsError, "401 expected a key"),
        (httpx.Response(413, json={"detail": "too many"}), SettingsError, "too many; give a smaller lda.server_batch"),
        (httpx.Response(500, json={"detail": "died"}), EnvironmentFault, "failed: 500 died"),
        (httpx.Response(301, headers={"Location": "http://elsewhere"}), SettingsError, "301"),
        (httpx.Response(200, content=b"<html>"), EnvironmentFault, "expected JSON"),
        (httpx.Response(200, json=[]), EnvironmentFault, "expected a JSON object"),
        (httpx.Response(200, json={"rollouts": [{}]}), EnvironmentFault, "expected rollouts"),
        (httpx.Response(200, json={"rollouts": [5]}), EnvironmentFault, "expected rollouts"),
        (httpx.Response(200, json={"rollouts": []}), EnvironmentFault, "expected 1 rollouts"),
    ],
)
def test_what_a_server_says_wrong_is_one_line(answer: httpx.Response, kind: type[Exception], line: str) -> None:
    with pytest.raises(kind) as found:
        Scripted(PAIR, answer).remote().rollouts([Ask((1,), 0, 1.0, 1)], Rule())
    assert line in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x",
        "file:///etc/passwd",
        "x:8000",
        "http://",
        "http://u:p@x",
        "http://x?a=1",
        "http://x#a",
        "http://[x",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"lda\.server: expected an address"):
        checked_url(url)
    assert checked_url(" http://x:8000/ ") == "http://x:8000"
    assert checked_url("https://x/lda/") == "https://x/lda"


def test_certificates_are_verified() -> None:
    """Control of what is never written: nothing here turns it off."""
    import inspect

    assert "verify" not in inspect.getsource(remote).replace("verified", "")
    assert workers is not None
