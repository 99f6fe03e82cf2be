"""The service of logit-diff amplification: completions of a pair of models over HTTP (docs/serving.md).

A request is given its place in the queue, then formatted and tokenised, then waits for the worker; its completions join a
batch with those of others that are drawn by the same rule. A text follows from prompt, arm, seed and sample alone, whoever
else is served meanwhile.
"""

import asyncio
import hashlib
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from starlette.types import Receive, Scope, Send

from harness.errors import HarnessError, ItemFailed, NotFinite, SettingsError
from harness.experiments.lda import formats
from harness.experiments.lda.settings import LdaSettings
from harness.experiments.weights import Models, slug_of
from harness.models.device import CudaMemory
from harness.models.load import LM, Codec, ModelIdentity, load_codec, shared
from harness.models.noise import row_key
from harness.models.pairing import Pairing, pair_up
from harness.models.rollout import Ask, Decoder, Pair, Rollout, Rule
from harness.serving import http
from harness.serving.growing import Growing
from harness.serving.http import Outcomes, Service, unless_gone
from harness.serving.metrics import Metrics
from harness.serving.queue import Job, Limits, Queue, Refused
from harness.serving.record import record_as
from harness.serving.worker import Worker
from harness.settings import Resolved, ServeSettings

STREAM = "lda"
"""The part of a noise key that says what the noise is for, as in a run."""
MODELS = {"after": 0.0, "before": -1.0, "lda": None}
"""Models of OpenAI's endpoints, and the arm that each is; None: the request's own."""
_MOST_ALPHA = 1e6
_CPU_TOKENS = 8192
_GPU_SHARE = 0.4
"""Of the free memory, for caches: a batch that changes holds the old one beside the new."""
_SPECIALS = 8
"""Tokens that a tokenizer may put around a text."""


# ---- what may be asked --------------------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        """JSON can spell halves of surrogate pairs, which no tokenizer reads and no answer can hold."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as e:
                    raise ValueError(f"expected text in UTF-8, found half a character at {e.start}") from e
        return value


def _alpha(value: float) -> float:
    if not abs(value) <= _MOST_ALPHA:
        raise ValueError(f"expected an arm between −{_MOST_ALPHA:g} and {_MOST_ALPHA:g}")
    return value + 0.0  # −0 is 0


def _alphas(values: list[float]) -> list[float]:
    for n, value in enumerate(values):
        if value in values[:n]:
            raise ValueError(f"expected each arm once, found {value:g} twice")
    return values


Alpha = Annotated[float, AfterValidator(_alpha)]
Floor = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0, le=1e4)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Key = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10**9)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Generate(_Body):
    """`POST /generate`: the completions of both models. What is left out is as the service's settings have it."""

    prompt: str
    max_new_tokens: Count | None = None
    do_sample: bool = True
    temperature: Temperature | None = None
    top_p: TopP | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    seed: Seed | None = None


class GenerateLda(Generate):
    """`POST /generate_lda`: a completion under one arm."""

    alpha: Alpha = 1.0
    floor: Floor | None = None


class GenerateLdaBatch(_Body):
    """`POST /generate_lda_batch`: completions of several prompts under several arms, with the same noise in each arm.

    A prompt's noise is that of its text; `prompt_ids` make it another's, such as that of a run.
    """

    prompts: Annotated[list[str], Field(min_length=1)]
    alpha: Alpha | None = None
    alphas: Annotated[list[Alpha], Field(min_length=1, max_length=1000), AfterValidator(_alphas)] | None = None
    num_samples: Count = 1
    max_new_tokens: Count | None = None
    do_sample: bool = True
    temperature: Temperature | None = None
    top_p: TopP | None = None
    floor: Floor | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    seed: Seed | None = None
    prompt_ids: list[str] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerateLdaBatch":
        if self.alpha is not None and self.alphas is not None:
            raise ValueError("expected alpha or alphas, found both")
        if self.prompt_ids is not None and len(self.prompt_ids) != len(self.prompts):
            raise ValueError(f"expected {len(self.prompts)} prompt_ids, one a prompt, found {len(self.prompt_ids)}")
        return self


class StreamOptions(_Body):
    """What a stream ends with."""

    include_usage: bool = False


class Completions(_Body):
    """`POST /v1/completions`: OpenAI's legacy shape, with `alpha` and `floor` beside it.

    Of its fields that would change a distribution only the value that does nothing is taken.
    """

    model: str
    prompt: str | Annotated[list[str], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=4096)] = 1
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    alpha: Alpha | None = None
    floor: Floor | None = None
    user: str | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Completions":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: expected n ({self.n}) or nothing, found {self.best_of}")
        if self.stream and self.logprobs is not None:
            raise ValueError("logprobs: not given in a stream; leave out one of the two")
        if "" in self.stops:
            raise ValueError("stop: expected strings that are not empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a completion, and is not part of it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Rollouts(_Body):
    """`POST /rollouts`: what `rollouts` gives for these contexts, to be computed in a batch of their own.

    An ask is [context, key, alpha, max_new_tokens]. `arms`: those that every text is scored under.
    """

    pair_sha256: str
    contexts: list[list[TokenId]]
    asks: list[Annotated[tuple[int, Key, Alpha, Count], BeforeValidator(_tuple)]]
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    floor: Floor = 0.0
    stop_at_end: bool = True
    arms: Annotated[list[Alpha], Field(max_length=1000)] = []

    @model_validator(mode="after")
    def _fits_together(self) -> "Rollouts":
        if bad := [ask[0] for ask in self.asks if not 0 <= ask[0] < len(self.contexts)]:
            raise ValueError(f"asks: expected a context's number below {len(self.contexts)}, found {bad[0]}")
        return self


# ---- what is computed ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What rows that share a decoder have in common. `which`: the models that are run, `after`, `before` or `both`."""

    rule: Rule
    arms: tuple[float, ...] = ()
    which: str = "both"


class Drawn(NamedTuple):
    """One completion that was asked for: of which prompt (by number), under which arm, which sample."""

    prompt: int
    alpha: float
    sample: int


class Read(NamedTuple):
    """A prompt as the models read it: its text, its ids, what its noise belongs to; or why it cannot be read."""

    text: str
    ids: tuple[int, ...]
    prompt_id: str
    error: ItemFailed | None = None


@dataclass(frozen=True)
class Wanted:
    """A request, in the words of this module."""

    prompts: Sequence[str]
    drawn: Sequence[Drawn]
    rule: Rule
    seed: int
    max_new_tokens: int
    form: str
    system: str = ""
    prompt_ids: Sequence[str] | None = None
    stops: tuple[str, ...] = ()

    @property
    def which(self) -> str:
        """The models that these arms need; the floor is what the model after finds plausible."""
        arms = {one.alpha for one in self.drawn}
        if arms == {0.0}:
            return "after"
        return "before" if arms == {-1.0} and not self.rule.floor else "both"


class Amplifier:
    """A pair of models that completions can be asked of, and the bounds of what may be asked."""

    def __init__(
        self, after: LM, before: LM, pairing: Pairing, settings: LdaSettings, serve: ServeSettings, budget: int
    ):
        """`budget`: padded tokens of a batch. Raises HarnessError where the settings' own format cannot be used."""
        formats.check(settings.format, settings.system_prompt, after.codec)
        self.pair = Pair(after, before, pairing.num_common)
        self.pairing, self.settings, self.serve = pairing, settings, serve
        self.codec: Codec = after.codec
        self.names = {"after": slug_of(pairing.after.model), "before": slug_of(pairing.before.model)}
        self.pair_sha256 = pairing.sha256()
        self.created = int(time.time())
        # An id that one of the models has no row for would be no error of the device, but its end.
        embeddings: list[Any] = [lm.model.get_input_embeddings() for lm in self.pair.lms]
        self._num_ids = min(one.weight.shape[0] for one in embeddings)
        self.queue = Queue(
            Limits(
                serve.max_queued_requests,
                serve.max_queued_rows,
                serve.max_queued_tokens,
                serve.max_client_batch,
                serve.timeout_s,
            )
        )
        self.metrics = Metrics(self.queue)
        self.worker = Worker(self.queue, self.decoder_of, budget, serve.batch_wait_ms / 1000, self.metrics)

    def decoder_of(self, batch: Batch) -> Decoder:
        """An empty decoder for rows of this kind."""
        after, before = (lm if batch.which in (name, "both") else None for name, lm in self._sides())
        return Decoder(Pair(after, before, self.pair.num_common), batch.rule, batch.arms)

    def _sides(self) -> tuple[tuple[str, LM | None], ...]:
        return ("after", self.pair.after), ("before", self.pair.before)

    # -- from a request to rows

    def wanted(
        self,
        body: Generate | GenerateLdaBatch,
        prompts: Sequence[str],
        alphas: Sequence[float],
        num_samples: int = 1,
        floor: float | None = None,
    ) -> Wanted:
        """A request of the three endpoints of our own, with the settings' values for what it leaves out."""
        own, form = self.settings, self.settings.format
        if body.apply_chat_template:
            form = "chat"
        elif body.apply_chat_template is False and form == "chat":
            form = "raw"
        given = body.temperature, body.top_p, floor
        mine = own.temperature, own.top_p, own.floor
        temperature, top_p, floor = (b if a is None else a for a, b in zip(given, mine, strict=True))
        return Wanted(
            prompts,
            drawn_of(len(prompts), alphas, num_samples),
            Rule(temperature if body.do_sample else 0.0, top_p, floor, own.stop_at_eos),
            _seed(body.seed),
            body.max_new_tokens or min(own.max_new_tokens, self.serve.max_new_tokens),
            form,
            own.system_prompt if body.system_prompt is None else body.system_prompt,
            body.prompt_ids if isinstance(body, GenerateLdaBatch) else None,
        )

    def place(self, wanted: Wanted) -> Job:
        """A place in the queue, from what is known of a request before it is read. Raises Refused."""
        serve = self.serve
        self.queue.check_size(len(wanted.drawn))  # before anything is done for each of them
        if (longest := max(map(len, wanted.prompts))) > serve.max_prompt_chars or (
            len(wanted.system) > serve.max_prompt_chars
        ):
            raise Refused(
                413, "max_prompt_chars", f"expected prompts of at most {serve.max_prompt_chars:,} characters "
                f"(serve.max_prompt_chars), found {max(longest, len(wanted.system)):,}",
            )  # fmt: skip
        self.check_length(wanted.max_new_tokens)
        # A token is at least a byte, but for those around a text.
        around = len(wanted.system.encode()) + len(wanted.form.encode()) + 512 + _SPECIALS
        most = max(self.pair.max_positions, wanted.max_new_tokens)
        tokens = [min(most, len(p.encode()) + around + wanted.max_new_tokens) for p in wanted.prompts]
        per_prompt = len(wanted.drawn) // len(wanted.prompts)
        return self.queue.admit(len(wanted.drawn), per_prompt * sum(tokens))

    def check_length(self, max_new_tokens: int) -> None:
        """Raises Refused for completions longer than the service makes."""
        if max_new_tokens > self.serve.max_new_tokens:
            raise Refused(
                400, "max_new_tokens", f"expected at most {self.serve.max_new_tokens:,} new tokens "
                f"(serve.max_new_tokens), found {max_new_tokens:,}",
            )  # fmt: skip

    def read(self, wanted: Wanted) -> list[Read]:
        """The prompts, formatted and tokenised. Raises HarnessError where the format does not serve."""
        formats.check(wanted.form, wanted.system, self.codec)
        found = []
        for n, prompt in enumerate(wanted.prompts):
            text = formats.text_of(wanted.form, prompt, wanted.system, self.codec)
            ids = tuple(formats.tokens_of(wanted.form, text, self.codec)[0])
            name = wanted.prompt_ids[n] if wanted.prompt_ids else f"http:{hashlib.sha256(text.encode()).hexdigest()}"
            found.append(Read(text, ids, name, self.unreadable(ids, wanted.max_new_tokens)))
        return found

    def unreadable(self, ids: Sequence[int], max_new_tokens: int) -> ItemFailed | None:
        """Why the models cannot go on from these ids."""
        most = self.pair.max_positions - max_new_tokens
        if not 1 <= len(ids) <= most:
            return ItemFailed(
                f"expected 1 to {max(most, 0):,} tokens of context beside {max_new_tokens:,} new ones, found {len(ids):,}"
            )
        if (largest := max(ids)) >= self._num_ids:
            return ItemFailed(f"expected tokens that both models have, found the id {largest}")
        return None

    async def completed(
        self, request: Request, wanted: Wanted, growing: Sequence[Growing] = ()
    ) -> tuple[list[Read], list[Rollout | HarnessError]]:
        """The prompts as they were read, and the completions in the order of `wanted.drawn`."""
        job = self.place(wanted)
        try:
            read = await asyncio.to_thread(self.read, wanted)
            outcomes = Outcomes(len(wanted.drawn))
            follow = [partial(_follow, one) for one in growing]
            self.submit(job, wanted, read, outcomes.tell, follow)
            return read, await unless_gone(request, outcomes.all())
        finally:
            self.queue.cancel(job)

    def submit(
        self,
        job: Job,
        wanted: Wanted,
        read: Sequence[Read],
        tell: Callable[[int, Any], None],
        follow: Sequence[Callable[[Rollout], bool]] = (),
    ) -> None:
        """Hand the rows in, whose ends go to `tell`, by place; of those that cannot be it is told at once."""
        rows, places = [], []
        for place, one in enumerate(wanted.drawn):
            prompt = read[one.prompt]
            if prompt.error is not None:
                tell(place, prompt.error)
                continue
            key = row_key(wanted.seed, prompt.prompt_id, STREAM, one.sample)
            ask = Ask(prompt.ids, key, one.alpha, wanted.max_new_tokens)
            rows.append((ask, len(ask.context) + ask.max_new_tokens, follow[place] if follow else None))
            places.append(place)
        batch = Batch(wanted.rule, which=wanted.which)
        self.queue.submit(job, batch, rows, lambda n, outcome: tell(places[n], outcome))

    # -- from rollouts to answers

    def answer_of(self, rollout: Rollout) -> list[int]:
        """Its tokens without the one that ended it."""
        return rollout.token_ids[:-1] if self.has_ended(rollout) else rollout.token_ids

    def has_ended(self, rollout: Rollout) -> bool:
        """Whether the models themselves ended it."""
        return rollout.finish_reason == "stop"

    def result(
        self, wanted: Wanted, read: Sequence[Read], one: Drawn, outcome: Rollout | HarnessError
    ) -> dict[str, Any]:
        """One completion as our own endpoints tell it; or its error."""
        prompt = read[one.prompt]
        asked = {"prompt": wanted.prompts[one.prompt], "alpha": one.alpha, "seed": wanted.seed, "models": self.names}
        if isinstance(outcome, HarnessError):
            return {"error": http.one_line(outcome), **asked}
        completion = self.codec.decode(self.answer_of(outcome))
        return {
            **asked,
            "formatted_prompt": prompt.text,
            "completion": completion,
            "text": prompt.text + completion,
            "tokens_generated": len(outcome.token_ids),
            "stopped_early": self.has_ended(outcome),
            "finish_reason": outcome.finish_reason,
        }


def drawn_of(num_prompts: int, alphas: Sequence[float], num_samples: int) -> list[Drawn]:
    """Every sample of every arm of every prompt, in this order: prompts, arms, samples."""
    # Counted by who places them before they are made: a request may ask for billions.
    return _Product(num_prompts, tuple(alphas), num_samples)  # type: ignore[return-value]


class _Product(Sequence[Drawn]):
    """A list of that many, of which none is there until it is looked at."""

    def __init__(self, num_prompts: int, alphas: tuple[float, ...], num_samples: int):
        self._sizes, self._alphas = (num_prompts, len(alphas), num_samples), alphas

    def __len__(self) -> int:
        return math.prod(self._sizes)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        rest, sample = divmod(place, self._sizes[2])
        prompt, arm = divmod(rest, self._sizes[1])
        return Drawn(prompt, self._alphas[arm], sample)


def _seed(given: int | None) -> int:
    # Small enough to be the same number in every language that reads JSON.
    return secrets.randbelow(2**53) if given is None else given


def _follow(growing: Growing, rollout: Rollout) -> bool:
    return growing.add(rollout.token_ids)


def _raise_first(outcomes: Sequence[Rollout | HarnessError]) -> list[Rollout]:
    """Of an answer that is one: the first thing that is wrong with it."""
    for outcome in outcomes:
        if isinstance(outcome, HarnessError):
            raise outcome
    return list(outcomes)  # type: ignore[arg-type]


def _raise_ours(outcomes: Sequence[Rollout | HarnessError]) -> None:
    """What is wrong with the service, and not with a row: the client may ask again."""
    for outcome in outcomes:
        if isinstance(outcome, HarnessError) and not isinstance(outcome, ItemFailed):
            raise outcome


# ---- the endpoints ------------------------------------------------------------------------------------------------


def app_of(amplifier: Amplifier, keys: tuple[bytes, ...] = ()) -> Service:
    """The service of a pair, ready to be run."""
    bounds = http.Bounds(amplifier.serve.max_body_bytes, keys, is_own=http.is_own(amplifier.serve.host))
    service = http.service_of("harness lda", amplifier.queue, amplifier.worker, amplifier.metrics, bounds)
    app = service.app
    pairing = amplifier.pairing

    @app.get("/tokenizer_compatibility")
    async def compatibility() -> dict[str, Any]:
        return {
            "compatible": True,
            "vocab_size_1": pairing.after.vocab_size,
            "vocab_size_2": pairing.before.vocab_size,
            "vocabs_match": pairing.vocabs_match,
            "num_common": pairing.num_common,
            "warning": pairing.warning,
            "models": amplifier.names,
            "pair_sha256": amplifier.pair_sha256,
        }

    @app.post("/generate")
    async def generate(body: Generate, request: Request) -> dict[str, Any]:
        wanted = amplifier.wanted(body, [body.prompt], [0.0, -1.0])
        read, outcomes = await amplifier.completed(request, wanted)
        after, before = (
            amplifier.result(wanted, read, one, outcome)
            for one, outcome in zip(wanted.drawn, _raise_first(outcomes), strict=True)
        )
        return {"after": after, "before": before, "models": amplifier.names, "seed": wanted.seed}

    @app.post("/generate_lda")
    async def generate_lda(body: GenerateLda, request: Request) -> dict[str, Any]:
        wanted = amplifier.wanted(body, [body.prompt], [body.alpha], floor=body.floor)
        read, outcomes = await amplifier.completed(request, wanted)
        return amplifier.result(wanted, read, wanted.drawn[0], _raise_first(outcomes)[0])

    @app.post("/generate_lda_batch")
    async def generate_lda_batch(body: GenerateLdaBatch, request: Request) -> dict[str, Any]:
        alphas = body.alphas or [1.0 if body.alpha is None else body.alpha]
        wanted = amplifier.wanted(body, body.prompts, alphas, body.num_samples, body.floor)
        read, outcomes = await amplifier.completed(request, wanted)
        _raise_ours(outcomes)
        results = [
            {**amplifier.result(wanted, read, one, outcome), "prompt_index": one.prompt, "sample": one.sample}
            for one, outcome in zip(wanted.drawn, outcomes, strict=True)
        ]
        return {
            "results": results,
            "models": amplifier.names,
            "batch_size": len(results),
            "num_failed": sum("error" in result for result in results),
            "seed": wanted.seed,
        }

    @app.post("/rollouts")
    async def rollouts(body: Rollouts, request: Request) -> Response:
        answer = {"pair_sha256": amplifier.pair_sha256, "rollouts": await _rollouts(amplifier, body, request)}
        return Response(json.dumps(answer, allow_nan=False), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(amplifier, name) for name in MODELS]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _arm_of(name, None)
        return _model(amplifier, name)

    @app.post("/v1/completions")
    async def completions(body: Completions, request: Request) -> Response:
        wanted = _wanted_of(body)
        if body.stream:
            return await _streamed(amplifier, body, wanted, request)
        growing = [Growing(amplifier.codec.decode, wanted.stops) for _ in wanted.drawn] if wanted.stops else []
        read, outcomes = await amplifier.completed(request, wanted, growing)
        return JSONResponse(_completions(amplifier, body, wanted, read, _raise_first(outcomes)))

    return service


# ---- rollouts for a run elsewhere ---------------------------------------------------------------------------------


async def _rollouts(amplifier: Amplifier, body: Rollouts, request: Request) -> list[dict[str, Any]]:
    if body.pair_sha256 != amplifier.pair_sha256:
        raise Refused(
            409, "pair", f"expected rollouts of the pair {amplifier.pair_sha256}, which is served here, "
            f"found {http.one_line(body.pair_sha256, 80)}",
        )  # fmt: skip
    if not body.asks:
        return []
    contexts = [tuple(ids) for ids in body.contexts]
    amplifier.queue.check_size(len(body.asks))
    amplifier.check_length(max(ask[3] for ask in body.asks))
    tokens = [len(contexts[n]) + most for n, _, _, most in body.asks]
    job = amplifier.queue.admit(len(body.asks), sum(tokens))
    try:
        outcomes = Outcomes(len(body.asks))
        rows, places = [], []
        errors = {(n, most): amplifier.unreadable(contexts[n], most) for n, _, _, most in body.asks}
        for place, (n, key, alpha, most) in enumerate(body.asks):
            if (error := errors[n, most]) is not None:
                outcomes.tell(place, error)
                continue
            rows.append((Ask(contexts[n], key, alpha, most), tokens[place], None))
            places.append(place)
        batch = Batch(Rule(body.temperature, body.top_p, body.floor, body.stop_at_end), tuple(body.arms))
        # A batch of their own: what company does to the last bits of a float would else be in the numbers.
        amplifier.queue.submit(job, batch, rows, lambda n, o: outcomes.tell(places[n], o), is_whole=True)
        found = await unless_gone(request, outcomes.all())
    finally:
        amplifier.queue.cancel(job)
    _raise_ours(found)
    return await asyncio.to_thread(lambda: [_told(outcome) for outcome in found])


def _told(outcome: Rollout | ItemFailed) -> dict[str, Any]:
    """A rollout as JSON has it. Floats are as they are (`repr` gives them back); null is NaN, and infinities are words."""
    if isinstance(outcome, ItemFailed):
        return {"error": http.one_line(outcome), "is_finite": not isinstance(outcome, NotFinite)}
    lists = ("logp_after", "logp_before", "logp_arm", "margins", "mass_removed")
    return {
        "token_ids": outcome.token_ids,
        **{name: list(map(_number, getattr(outcome, name))) for name in lists},
        "arm_steps": [list(map(_number, step)) for step in outcome.arm_steps],
        "finish_reason": outcome.finish_reason,
    }


def _number(value: float) -> float | str | None:
    return value if math.isfinite(value) else None if math.isnan(value) else repr(value)


# ---- OpenAI's shape -----------------------------------------------------------------------------------------------


def _arm_of(model: str, alpha: float | None) -> float:
    if model not in MODELS:
        raise Refused(404, "model_not_found", f"no model {http.one_line(model, 80)!r}; there are {', '.join(MODELS)}")
    arm = MODELS[model]
    if arm is None:
        return 1.0 if alpha is None else alpha
    if alpha is not None and alpha != arm:
        raise Refused(400, "alpha", f"alpha: the model {model!r} is the arm {arm:g}; ask `lda` for {alpha:g}")
    return arm


def _wanted_of(body: Completions) -> Wanted:
    alpha = _arm_of(body.model, body.alpha)
    return Wanted(
        body.prompts,
        drawn_of(len(body.prompts), [alpha], body.n),
        Rule(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.floor or 0.0,
        ),
        _seed(body.seed),
        16 if body.max_tokens is None else body.max_tokens,  # OpenAI's own default
        "raw",
        stops=body.stops,
    )


def _model(amplifier: Amplifier, name: str) -> dict[str, Any]:
    told = amplifier.names.get(name, f"{amplifier.names['after']} amplified against {amplifier.names['before']}")
    return {"id": name, "object": "model", "created": amplifier.created, "owned_by": "harness", "description": told}


def _completions(
    amplifier: Amplifier, body: Completions, wanted: Wanted, read: Sequence[Read], rollouts: Sequence[Rollout]
) -> dict[str, Any]:
    choices = []
    for place, rollout in enumerate(rollouts):
        ids = amplifier.answer_of(rollout)
        growing = Growing(amplifier.codec.decode, wanted.stops)
        offsets = []
        for n in range(len(ids)) if body.logprobs is not None else ():
            offsets.append(len(growing.text))
            growing.add(ids[: n + 1])
        text = growing.end(ids)
        choices.append(
            {
                "index": place,
                "text": text,
                "logprobs": None if body.logprobs is None else _logprobs(amplifier, body, rollout, offsets, len(text)),
                "finish_reason": "stop" if growing.is_cut else rollout.finish_reason,
            }
        )
    return _head(amplifier, body, wanted) | {
        "choices": choices,
        "usage": _usage(read, [len(r.token_ids) for r in rollouts]),
    }


def _logprobs(
    amplifier: Amplifier, body: Completions, rollout: Rollout, offsets: Sequence[int], num_chars: int
) -> dict[str, Any]:
    """OpenAI's legacy shape. Of each token the log-probability under its arm's own full distribution, temperature and top-p
    not applied; `top_logprobs` has the chosen token alone, whatever number was asked for."""
    kept = [n for n, offset in enumerate(offsets) if offset < max(num_chars, 1)]
    tokens = [amplifier.codec.decode([rollout.token_ids[n]]) for n in kept]
    logps = [rollout.logp_arm[n] for n in kept]
    return {
        "tokens": tokens,
        "token_logprobs": logps,
        "top_logprobs": [{t: p} for t, p in zip(tokens, logps, strict=True)] if body.logprobs else None,
        "text_offset": [offsets[n] for n in kept],
    }


def _head(amplifier: Amplifier, body: Completions, wanted: Wanted) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "alpha": wanted.drawn[0].alpha,
        "seed": wanted.seed,
    }


def _usage(read: Sequence[Read], written: Sequence[int]) -> dict[str, int]:
    of_prompts = sum(len(prompt.ids) for prompt in read)
    return {
        "prompt_tokens": of_prompts,
        "completion_tokens": sum(written),
        "total_tokens": of_prompts + sum(written),
    }


class _Stream(StreamingResponse):
    """Server-sent events; whoever leaves, its job is cancelled."""

    def __init__(self, content: AsyncIterator[str], over: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


async def _streamed(amplifier: Amplifier, body: Completions, wanted: Wanted, request: Request) -> Response:
    """Pieces of text as they come. What is refused before the first one is refused with its status."""
    job = amplifier.place(wanted)
    try:
        read = await asyncio.to_thread(amplifier.read, wanted)
        outcomes = Outcomes(len(wanted.drawn))
        growing = [Growing(amplifier.codec.decode, wanted.stops) for _ in wanted.drawn]
        follow = [partial(_say, one, place, outcomes) for place, one in enumerate(growing)]

        def tell(place: int, outcome: Any) -> None:
            outcomes.say((place, "", outcome))

        if error := next((prompt.error for prompt in read if prompt.error is not None), None):
            raise error
        amplifier.submit(job, wanted, read, tell, follow)
        first = await unless_gone(request, outcomes.event())
        if isinstance(first[2], HarnessError):
            raise first[2]
    except BaseException:
        amplifier.queue.cancel(job)
        raise
    told = _Told(_head(amplifier, body, wanted), len(growing))
    record_as(request, told.answer)
    events = _events(amplifier, body, told, read, growing, outcomes, first)
    return _Stream(events, lambda: amplifier.queue.cancel(job))


def _say(growing: Growing, place: int, outcomes: Outcomes, rollout: Rollout) -> bool:
    is_over = growing.add(rollout.token_ids)
    if piece := growing.news():
        outcomes.say((place, piece, None))
    return is_over


class _Told:
    """What a stream has told by now: its events, and the answer that they are the pieces of."""

    def __init__(self, head: Mapping[str, Any], num: int):
        self._head, self._texts = head, [list[str]() for _ in range(num)]
        self._reasons: list[str | None] = [None] * num
        self._last: dict[str, Any] = {}

    def piece(self, place: int, text: str, reason: str | None) -> str:
        """The event of a piece of text; with the last one of its choice, why that ended."""
        self._texts[place].append(text)
        self._reasons[place] = reason
        return _event({**self._head, "choices": [_choice(place, text, reason)]})

    def usage(self, usage: Mapping[str, int]) -> str:
        self._last = {"usage": usage}
        return _event({**self._head, "choices": [], **self._last})

    def error(self, error: Mapping[str, Any]) -> str:
        self._last = dict(error)
        return _event(error)

    def answer(self) -> dict[str, Any]:
        """In the shape that it would have had in one piece."""
        choices = [
            _choice(place, "".join(pieces), reason)
            for place, (pieces, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
        ]
        return {**self._head, "choices": choices, **self._last}


def _choice(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}


async def _events(
    amplifier: Amplifier,
    body: Completions,
    told: _Told,
    read: Sequence[Read],
    growing: Sequence[Growing],
    outcomes: Outcomes,
    event: tuple[int, str, Any],
) -> AsyncIterator[str]:
    written = []
    while True:
        place, piece, outcome = event
        if piece:
            yield told.piece(place, piece, None)
        if isinstance(outcome, HarnessError):
            status = http.status_of(outcome)
            yield told.error(http.error_body("/v1/completions", status, http.one_line(outcome), type(outcome).__name__))
            return
        if outcome is not None:
            one = growing[place]
            one.end(amplifier.answer_of(outcome))
            yield told.piece(place, one.news(is_over=True), "stop" if one.is_cut else outcome.finish_reason)
            written.append(len(outcome.token_ids))
            if len(written) == len(growing):
                break
        event = await outcomes.event()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield told.usage(_usage(read, written))
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# ---- from settings to a service -----------------------------------------------------------------------------------


def service_of(resolved: Resolved, models: Models, keys: tuple[bytes, ...] = ()) -> Service:
    """The service that these settings describe, its models loaded. Raises HarnessError."""
    spec, identity = models.spec, models.identity
    other_spec, other_identity = models.other_spec, models.other_identity
    if other_spec is None or other_identity is None:
        raise SettingsError("other.name: expected the model before; give --other NAME")
    codecs = load_codec(spec, identity), load_codec(other_spec, other_identity)
    pairing = pair_up(*codecs, identity, other_identity)  # before any weight is loaded
    after, before = shared(spec, identity), shared(other_spec, other_identity)
    settings, serve = resolved.own(LdaSettings), resolved.command_section(ServeSettings)
    budget = resolved.settings.batching.max_tokens
    if not isinstance(budget, int):
        reserve = int(resolved.settings.batching.reserve_gb * 1e9)
        budget = budget_of(models.device, (identity, other_identity), reserve)
    return app_of(Amplifier(after, before, pairing, settings, serve, budget), keys)


def budget_of(device: str, identities: Sequence[ModelIdentity], reserve_bytes: int) -> int:
    """Padded tokens of a batch: on a GPU those whose keys and values take a share of what is free."""
    if device != "cuda":
        return _CPU_TOKENS
    free = CudaMemory(reserve_bytes).capacity_bytes() or 0
    held = torch.cuda.memory_allocated()
    return max(_CPU_TOKENS, int(_GPU_SHARE * max(0, free - held) / sum(map(_bytes_a_token, identities))))


def _bytes_a_token(identity: ModelIdentity) -> int:
    """Of keys and values in all layers."""
    config = identity.about["config"]
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    width = config.get("hidden_size") or config.get("n_embd") or 1
    head_width = config.get("head_dim") or width // heads
    return (
        2
        * identity.num_layers
        * (config.get("num_key_value_heads") or heads)
        * head_width
        * _item_bytes(identity.dtype)
    )


def _item_bytes(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)
