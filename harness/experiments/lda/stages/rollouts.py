"""Stage `rollouts`: completions of every prompt under every arm, with what each model and each arm said of every token."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.engine import AnyTables, Artifact, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.lda.inputs import CONDITION, MODE, Both, Inputs, contexts_of, item_key
from harness.models.best import most_probable
from harness.models.load import Codec
from harness.models.noise import row_key
from harness.models.rollout import Ask, Pair, Rollout, Rule, in_parts, rollouts

Roll = Callable[[Sequence[Ask], Rule, Sequence[float]], list[Rollout | ItemFailed]]
"""What makes rollouts: here, or at a server."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One rollout to make; the ids of its context come when its batch is about to run."""

    prompt_id: str
    condition: str
    sample_id: int
    token_ids: tuple[int, ...] = ()


@dataclass
class Work:
    """What a process needs for the items."""

    roll: Roll
    codec: Codec
    stop_ids: frozenset[int]
    pair: Pair | None
    """Where tables of logits are kept too."""


@dataclass(frozen=True)
class Rollouts:
    """Writes `completions` and `rollouts`, and where the settings ask for it a file of the first sample's logits. An item is
    one rollout; those of one prompt share its prefill in a batch, and whatever their texts have in common."""

    both: Both
    arms: Mapping[str, float]
    rule: Rule
    num_samples: int
    max_new_tokens: int
    common_noise: bool
    keep_logits: int
    seed: int
    server: str
    """Where rollouts are made; empty: here. Decides no row."""
    num_contexts: int
    """Prompts in one request to a server, and in one decoder here: the numbers are the same to the last bit."""
    name = "rollouts"
    version = 1
    reads = MappingProxyType({"contexts": ("prompt_id", "condition", "token_ids")})
    loads_ahead = 16_384

    @classmethod
    def build(cls, given: Inputs) -> "Rollouts":
        """The stage of a run, which asks a server where the settings name one."""
        own = given.settings
        return cls(
            given.both,
            given.arms,
            given.rule,
            own.num_samples,
            own.max_new_tokens,
            own.common_noise,
            own.keep_logits,
            given.seed,
            own.server,
            own.server_batch,
        )

    @property
    def row_bytes(self) -> int:
        return 300 + (28 + 4 * len(self.arms)) * self.max_new_tokens

    @property
    def file_bytes(self) -> int:
        return 16 * self.keep_logits * self.max_new_tokens // self.num_samples

    def params(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "alphas": list(self.arms.values()),
            "num_samples": self.num_samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": rule.temperature,
            "top_p": rule.top_p,
            "floor": rule.floor,
            "stop_at_eos": rule.stop_at_end,
            "common_noise": self.common_noise,
            "keep_logits": self.keep_logits,
        }

    def items(self, tables: AnyTables) -> list[Item[Asked]]:
        found = []
        for row in Tables.of(tables).streamed("contexts", ("prompt_id", "token_ids")):
            prompt_id = row["prompt_id"]
            length = len(row["token_ids"]) / (self.num_samples * len(self.arms)) + self.max_new_tokens
            found += [
                Item(item_key(prompt_id, condition, MODE, n), length, Asked(prompt_id, condition, n), prompt_id)
                for condition in self.arms
                for n in range(self.num_samples)
            ]
        return found

    def load(self, tables: Tables, items: Sequence[Item[Asked]]) -> list[Item[Asked]]:
        token_ids = contexts_of(tables, [i.payload.prompt_id for i in items])
        return [replace(i, payload=replace(i.payload, token_ids=token_ids[i.payload.prompt_id])) for i in items]

    def setup(self) -> Work:
        codec, stops = self.both.codec, frozenset(self.both.pairing.after.stop_ids)
        if not self.server:
            pair = self.both.for_arms(tuple(self.arms.values()), self.rule)
            return Work(partial(_rolled, pair, self.num_contexts), codec, stops, pair if self.keep_logits else None)
        from harness.experiments.lda.remote import Remote

        remote = Remote(self.server, self.both.pairing.sha256(), self.num_contexts)
        return Work(
            remote.rollouts,
            codec,
            stops,
            self.both.for_arms(tuple(self.arms.values()), self.rule) if self.keep_logits else None,
        )

    def run(self, context: Work, items: Sequence[Item[Asked]]) -> list[ItemResult]:
        asks = [self._ask(i.payload) for i in items]
        alphas = tuple(self.arms.values())
        arms = () if alphas in ((0.0,), (-1.0,)) else alphas
        done = context.roll(asks, self.rule, arms)
        kept = self._kept(context, items, done)
        return [self._result(context, i, d, kept.get(i.key)) for i, d in zip(items, done, strict=True)]

    def _ask(self, asked: Asked) -> Ask:
        """The arm is not in the noise: the same sample has the same in every arm, unless the settings say otherwise."""
        noise = CONDITION if self.common_noise else asked.condition
        key = row_key(self.seed, asked.prompt_id, noise, asked.sample_id)
        return Ask(asked.token_ids, key, self.arms[asked.condition], self.max_new_tokens)

    def _result(self, work: Work, item: Item[Asked], done: Rollout | ItemFailed, logits: Artifact | None) -> ItemResult:
        if isinstance(done, ItemFailed):
            return ItemResult.failed(item.key, done)
        asked = item.payload
        key = {
            "prompt_id": asked.prompt_id,
            "condition": asked.condition,
            "mode": MODE,
            "sample_id": asked.sample_id,
        }
        # A model that runs alone is scored by nobody else: its own arm is what it drew from.
        of_arms = done.arm_steps if done.arm_steps and done.arm_steps[0] else [[x] for x in done.logp_arm]
        completion = {
            **key,
            "token_ids": done.token_ids,
            "text": work.codec.decode(done.token_ids),
            "answer": work.codec.decode(answer_ids(done.token_ids, work.stop_ids)),
            "finish_reason": done.finish_reason,
            "logprobs": done.logp_arm,
            "margins": done.margins,
        }
        rollout = {
            **key,
            "logp_after": _known(done.logp_after),
            "logp_before": _known(done.logp_before),
            "logp_arm": done.logp_arm,
            "arm_logps": [math.fsum(column) for column in zip(*of_arms, strict=True)],
            "arm_steps": [x for step in of_arms for x in step],
            "mass_removed": done.mass_removed,
        }
        rows = {"completions": [completion], "rollouts": [rollout]}
        return ItemResult(item.key, rows, artifacts=(logits,) if logits else ())

    def _kept(
        self, work: Work, items: Sequence[Item[Asked]], done: Sequence[Rollout | ItemFailed]
    ) -> dict[str, Artifact]:
        """Files of logits by item: of the first sample of each prompt and arm."""
        if work.pair is None:
            return {}
        first = [
            (i, d)
            for i, d in zip(items, done, strict=True)
            if i.payload.sample_id == 0 and isinstance(d, Rollout) and d.token_ids
        ]
        texts = [(i.payload.token_ids, d.token_ids) for i, d in first]
        found = most_probable(work.pair, texts, self.keep_logits) if texts else []
        return {i.key: self._file(i, tensors) for (i, _), tensors in zip(first, found, strict=True)}

    def _file(self, item: Item[Asked], tensors: Mapping[str, np.ndarray]) -> Artifact:
        asked = item.payload
        keys = {"prompt_id": asked.prompt_id, "condition": asked.condition, "sample_id": str(asked.sample_id)}
        name = sha256(item.key.encode()).hexdigest()[:24]
        shape = next(iter(tensors.values())).shape
        return Artifact(
            f"{self.name}/{name}.safetensors", keys, "logits", shape, "int32", partial(save_file, dict(tensors))
        )


def _rolled(
    pair: Pair, num_contexts: int, asks: Sequence[Ask], rule: Rule, arms: Sequence[float]
) -> list[Rollout | ItemFailed]:
    """Made here, in the parts in which a server is asked."""
    found: dict[int, Rollout | ItemFailed] = {}
    for places in in_parts(asks, num_contexts):
        found |= zip(places, rollouts(pair, [asks[n] for n in places], rule, arms), strict=True)
    return [found[n] for n in range(len(asks))]


def answer_ids(token_ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The tokens before the end of text: what is behind it is never judged."""
    return list(_until(token_ids, stop_ids))


def _until(token_ids: Sequence[int], stop_ids: frozenset[int]) -> Iterator[int]:
    for token in token_ids:
        if token in stop_ids:
            return
        yield token


def _known(logps: Sequence[float]) -> list[float] | None:
    """None for a model that was not run."""
    return None if any(x != x for x in logps) else list(logps)
