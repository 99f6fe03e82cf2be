"""Stage `prompts`: every prompt as tokens, which of them are dumped, and which count in statistics."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.neurons.inputs import CONDITION, Inputs
from harness.experiments.neurons.prompts import Prompt
from harness.experiments.neurons.settings import NeuronsSettings
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec

_LENGTH = 64  # per item: tokenising takes the same time for a short and a long prompt


@dataclass(frozen=True)
class Prompts:
    """Writes `prompts` and `contexts`. Uses the tokenizer, not the model."""

    prompts: tuple[Prompt, ...]
    model: ModelSpec
    identity: ModelIdentity
    settings: NeuronsSettings
    seed: int
    name = "prompts"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "Prompts":
        return cls(given.prompts, given.model, given.identity, given.settings, given.seed)

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {"positions": own.positions, "skip_first": own.skip_first, "prepend_bos": own.prepend_bos}

    def items(self, tables: AnyTables) -> list[Item[Prompt]]:
        return [Item(p.prompt_id, _LENGTH, p) for p in self.prompts]

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item[Prompt]]) -> list[ItemResult]:
        return [self._one(context, i.payload) for i in items]

    def _one(self, codec: Codec, prompt: Prompt) -> ItemResult:
        row = context_row(codec, prompt, self.settings, self.seed)
        if not row["token_ids"]:
            return ItemResult.failed(prompt.prompt_id, "the text has no token")
        if not counted(row):
            told = f"no counted token among its {len(row['token_ids'])}: specials and the first {self.settings.skip_first} "
            return ItemResult.failed(prompt.prompt_id, told + "(neurons.skip_first) are left out; give a longer text")
        own = {
            "prompt_id": prompt.prompt_id,
            "category": prompt.category,
            "text": prompt.text,
            "target": prompt.target or None,
            "contrast": prompt.contrast or None,
            "row_hash": prompt.row_hash,
        }
        return ItemResult(prompt.prompt_id, {"prompts": [own], "contexts": [row]})


def context_row(codec: Codec, prompt: Prompt, own: NeuronsSettings, seed: int) -> dict[str, Any]:
    """A row of `contexts`. `is_counted` has an entry a token."""
    tokens = codec.context if own.prepend_bos else codec.chat_context
    token_ids, offsets = tokens(prompt.text)
    special = set(codec.all_special_ids)
    return {
        "prompt_id": prompt.prompt_id,
        "condition": CONDITION,
        "text": prompt.text,
        "token_ids": token_ids,
        "pieces": [codec.name_of(i) for i in token_ids],
        "offsets": [list(o) for o in offsets],
        "positions": _positions(own.positions, len(token_ids), f"{seed}|positions|{prompt.prompt_id}"),
        "is_counted": [n >= own.skip_first and token not in special for n, token in enumerate(token_ids)],
    }


def counted(context: dict[str, Any]) -> tuple[int, ...]:
    """The positions of a context that statistics are of."""
    return tuple(n for n in context["positions"] if context["is_counted"][n])


def _positions(wanted: str, num: int, noise: str) -> list[int]:
    if wanted == "all" or not num:
        return list(range(num))
    if wanted == "last":
        return [num - 1]
    return sorted(random.Random(noise).sample(range(num), min(num, int(wanted.partition(":")[2]))))
