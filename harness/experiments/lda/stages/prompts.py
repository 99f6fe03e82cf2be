"""Stage `prompts`: every prompt as the text and the token ids that both models continue."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.lda import formats
from harness.experiments.lda.inputs import CONDITION, Both, Inputs
from harness.experiments.lda.prompts import Prompt
from harness.models.load import Codec

_LENGTH = 64  # per item: rendering and tokenising take the same time for a short and a long prompt


@dataclass(frozen=True)
class Prompts:
    """Writes `prompts` and `contexts`. Uses the tokenizer, not the models."""

    prompts: tuple[Prompt, ...]
    both: Both
    format: str
    system_prompt: str
    name = "prompts"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "Prompts":
        return cls(given.prompts, given.both, given.settings.format, given.settings.system_prompt)

    def params(self) -> dict[str, Any]:
        return {"format": self.format, "system_prompt": self.system_prompt}

    def items(self, tables: AnyTables) -> list[Item[Prompt]]:
        return [Item(p.prompt_id, _LENGTH, p) for p in self.prompts]

    def setup(self) -> Codec:
        return self.both.codec

    def run(self, context: Codec, items: Sequence[Item[Prompt]]) -> list[ItemResult]:
        return [self._one(context, i.payload) for i in items]

    def _one(self, codec: Codec, prompt: Prompt) -> ItemResult:
        row = context_row(codec, prompt, self.format, self.system_prompt)
        num_common = self.both.pairing.num_common
        if not row["token_ids"]:
            return ItemResult.failed(prompt.prompt_id, "the text has no token: nothing to go on from")
        if (largest := max(row["token_ids"])) >= num_common:
            told = f"holds the id {largest} ({codec.name_of(largest)!r}), not one of the {num_common:,} that both models have"
            return ItemResult.failed(prompt.prompt_id, told)
        return ItemResult(prompt.prompt_id, {"prompts": [prompt_row(prompt)], "contexts": [row]})


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A row of `prompts`."""
    return {
        "prompt_id": prompt.prompt_id,
        "category": prompt.category,
        "question": prompt.text,
        "row_hash": prompt.row_hash,
    }


def context_row(codec: Codec, prompt: Prompt, form: str, system: str) -> dict[str, Any]:
    """A row of `contexts`."""
    text = formats.text_of(form, prompt.text, system, codec)
    token_ids, offsets = formats.tokens_of(form, text, codec)
    return {
        "prompt_id": prompt.prompt_id,
        "condition": CONDITION,
        "text": text,
        "token_ids": token_ids,
        "offsets": [list(o) for o in offsets],
    }
