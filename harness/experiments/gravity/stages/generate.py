"""Stages `greedy` and `samples`: what the model really answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness.engine import Tables
from harness.engine.executors import Item, ItemResult
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Admitted, Inputs, item_key
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.load import LM, ModelIdentity, ModelSpec, shared
from harness.models.noise import row_key
from harness.text.detect import answer_of


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
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("prompts", "contexts")
    row_bytes: ClassVar[int] = 400

    @property
    def name(self) -> str:
        return "greedy" if self.mode == "greedy" else "samples"

    def params(self) -> dict[str, Any]:
        return {
            "conditions": list(self.conditions), "num_samples": self.num_samples,
            "max_new_tokens": self.sampling.max_new_tokens, "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p, "stop_at_newline": self.sampling.stop_at_newline,
            "only_single_token": self.admitted.single_token, "only_selected": self.admitted.selected,
        }  # fmt: skip

    def items(self, tables: Tables) -> list[Item]:
        admitted = {p["prompt_id"] for p in tables["prompts"] if self.admitted(p)}
        return [
            Item(
                item_key(row["prompt_id"], row["condition"], self.mode, sample_id),
                len(row["token_ids"]) / self.num_samples + self.sampling.max_new_tokens,
                (row["prompt_id"], row["condition"], sample_id, tuple(row["token_ids"])),
                item_key(row["prompt_id"], row["condition"]),
            )
            for row in tables["contexts"]
            if row["prompt_id"] in admitted and row["condition"] in self.conditions
            for sample_id in range(self.num_samples)
        ]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item]) -> list[ItemResult]:
        requests = [
            Request(token_ids, row_key(self.seed, prompt_id, condition, sample_id))
            for prompt_id, condition, sample_id, token_ids in (i.payload for i in items)
        ]
        completions = decode([context], requests, self.sampling)
        return [self._result(context, i, c) for i, c in zip(items, completions, strict=True)]

    def _result(self, lm: LM, item: Item, done: Completion | ItemFailed) -> ItemResult:
        if isinstance(done, ItemFailed):
            return ItemResult.failed(item.key, done)
        prompt_id, condition, sample_id, _ = item.payload
        text = lm.codec.decode(done.token_ids)
        row = {
            "prompt_id": prompt_id, "condition": condition, "mode": self.mode, "sample_id": sample_id,
            "token_ids": done.token_ids, "text": text, "answer": answer_of(text), "finish_reason": done.finish_reason,
            "logprobs": done.logprobs, "margins": done.margins,
        }  # fmt: skip
        return ItemResult(item.key, {"completions": [row]})


class Greedy:
    """Table-of-contents entry: one greedy completion a prompt and condition."""

    name: ClassVar[str] = "greedy"
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = False

    @staticmethod
    def build(given: Inputs) -> Generate:
        e = given.experiment
        sampling = Sampling(e.max_new_tokens_greedy, 0.0, 1.0, e.stop_at_newline)
        return Generate(
            given.model, given.identity, _admitted(given), "greedy", tuple(given.conditions), 1, sampling, given.seed
        )


class Samples:
    """Table-of-contents entry: `num_samples` sampled completions a prompt and condition asked for."""

    name: ClassVar[str] = "samples"
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = False

    @staticmethod
    def build(given: Inputs) -> Generate:
        e = given.experiment
        sampling = Sampling(e.max_new_tokens_samples, e.temperature, e.top_p, e.stop_at_newline)
        conditions = e.sample_conditions or tuple(given.conditions)
        return Generate(
            given.model, given.identity, _admitted(given), "sample", conditions, e.num_samples, sampling, given.seed
        )


def _admitted(given: Inputs) -> Admitted:
    return Admitted("single_token" in given.stages, "select" in given.stages)
