"""Stages `greedy` and `samples`: what the model really answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Admitted, Inputs, contexts_of, item_key
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.load import LM, ModelIdentity, ModelSpec, shared
from harness.models.noise import row_key
from harness.text.detect import answer_of


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion to make; the ids of its context come when its batch is about to run."""

    prompt_id: str
    condition: str
    sample_id: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generate:
    """Writes `completions` of one mode. An item is one completion; those of one prompt share its prefill in a batch."""

    model: ModelSpec
    identity: ModelIdentity
    admitted: Admitted
    mode: Literal["greedy", "sample"]
    conditions: tuple[str, ...]
    num_samples: int
    sampling: Sampling
    seed: int
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "single_token", "tier"),
            "contexts": ("prompt_id", "condition", "token_ids"),
        }
    )
    loads_ahead = 16_384
    row_bytes = 400

    @property
    def name(self) -> str:
        return "greedy" if self.mode == "greedy" else "samples"

    def params(self) -> dict[str, Any]:
        return {
            "conditions": list(self.conditions),
            "num_samples": self.num_samples,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "stop_at_newline": self.sampling.stop_at_newline,
            "only_single_token": self.admitted.single_token,
            "only_selected": self.admitted.selected,
        }

    def items(self, tables: AnyTables) -> list[Item[Answer]]:
        given = Tables.of(tables)
        admitted = {p["prompt_id"] for p in given["prompts"] if self.admitted(p)}
        found = []
        for row in given.streamed("contexts"):
            prompt_id, condition = row["prompt_id"], row["condition"]
            if prompt_id not in admitted or condition not in self.conditions:
                continue
            length = len(row["token_ids"]) / self.num_samples + self.sampling.max_new_tokens
            group = item_key(prompt_id, condition)
            found += [
                Item(item_key(prompt_id, condition, self.mode, n), length, Answer(prompt_id, condition, n), group)
                for n in range(self.num_samples)
            ]
        return found

    def load(self, tables: Tables, items: Sequence[Item[Answer]]) -> list[Item[Answer]]:
        token_ids = contexts_of(tables, ((i.payload.prompt_id, i.payload.condition) for i in items))
        return [
            replace(i, payload=replace(i.payload, token_ids=token_ids[i.payload.prompt_id, i.payload.condition]))
            for i in items
        ]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Answer]]) -> list[ItemResult]:
        requests = [
            Request(p.token_ids, row_key(self.seed, p.prompt_id, p.condition, p.sample_id))
            for p in (i.payload for i in items)
        ]
        completions = decode([context], requests, self.sampling)
        return [self._result(context, i, c) for i, c in zip(items, completions, strict=True)]

    def _result(self, lm: LM, item: Item[Answer], done: Completion | ItemFailed) -> ItemResult:
        if isinstance(done, ItemFailed):
            return ItemResult.failed(item.key, done)
        asked = item.payload
        text = lm.codec.decode(done.token_ids)
        row = {
            "prompt_id": asked.prompt_id,
            "condition": asked.condition,
            "mode": self.mode,
            "sample_id": asked.sample_id,
            "token_ids": done.token_ids,
            "text": text,
            "answer": answer_of(text),
            "finish_reason": done.finish_reason,
            "logprobs": done.logprobs,
            "margins": done.margins,
        }
        return ItemResult(item.key, {"completions": [row]})


def greedy(given: Inputs) -> Generate:
    """One completion of every context, its tokens the likeliest."""
    e = given.settings
    sampling = Sampling(e.max_new_tokens_greedy, 0.0, 1.0, e.stop_at_newline)
    return Generate(
        given.model, given.identity, _admitted(given), "greedy", tuple(given.conditions), 1, sampling, given.seed
    )


def samples(given: Inputs) -> Generate:
    """As many drawn completions as the settings say, under the conditions they name."""
    e = given.settings
    sampling = Sampling(e.max_new_tokens_samples, e.temperature, e.top_p, e.stop_at_newline)
    conditions = e.sample_conditions or tuple(given.conditions)
    return Generate(
        given.model, given.identity, _admitted(given), "sample", conditions, e.num_samples, sampling, given.seed
    )


def _admitted(given: Inputs) -> Admitted:
    return Admitted("single_token" in given.stages, "select" in given.stages)
