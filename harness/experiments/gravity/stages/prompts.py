"""Stage `prompts`: every prompt in every condition, as text, token ids and spans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.gravity.conditions import Spans, Template, token_span
from harness.experiments.gravity.inputs import Inputs
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec
from harness.text.prompts import Prompt

_LENGTH = 64  # per item: rendering and tokenising take the same time for a short and a long prompt


@dataclass(frozen=True)
class Prompts:
    """Writes `prompts` and `contexts`. Uses the tokenizer, not the model."""

    prompts: tuple[Prompt, ...]
    conditions: Mapping[str, Template]
    model: ModelSpec
    identity: ModelIdentity
    chat: bool
    name = "prompts"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "Prompts":
        return cls(given.prompts, given.conditions, given.model, given.identity, given.settings.chat)

    def params(self) -> dict[str, Any]:
        return {"chat": self.chat}

    def items(self, tables: AnyTables) -> list[Item[Prompt]]:
        return [Item(p.prompt_id, _LENGTH, p) for p in self.prompts]

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item[Prompt]]) -> list[ItemResult]:
        return [self._one(context, item.payload) for item in items]

    def _one(self, codec: Codec, prompt: Prompt) -> ItemResult:
        row = {
            "prompt_id": prompt.prompt_id,
            "category": prompt.category,
            "question": prompt.question,
            "target": prompt.target,
            "source": prompt.source,
            "style": prompt.style,
            "row_hash": prompt.row_hash,
            "single_token": len(codec.encode(" " + prompt.target, add_special_tokens=False)) == 1,
            "alternatives": list(prompt.alternatives),
        }
        contexts = [context_row(codec, prompt, name, template, self.chat) for name, template in self.conditions.items()]
        return ItemResult(prompt.prompt_id, {"prompts": [row], "contexts": contexts})


def context_row(codec: Codec, prompt: Prompt, condition: str, template: Template, chat: bool) -> dict[str, Any]:
    """A row of `contexts`: one prompt in one condition, as the model sees it."""
    text, spans = template.render(prompt), template.spans(prompt)
    if chat:
        wrapped = codec.chat(text)
        shift = wrapped.find(text)
        # A template may trim its message; spans would then be wrong, so they are left out rather than guessed.
        spans = Spans(*(s and (s[0] + shift, s[1] + shift) for s in spans)) if shift >= 0 else Spans(*[None] * 4)
        text = wrapped
    token_ids, offsets = codec.chat_context(text) if chat else codec.context(text)
    in_tokens = {name: token_span(span, offsets) for name, span in spans._asdict().items()}
    return {
        "prompt_id": prompt.prompt_id,
        "condition": condition,
        "text": text,
        "token_ids": token_ids,
        "offsets": [list(o) for o in offsets],
        "spans": {name: list(span) if span else None for name, span in in_tokens.items()},
    }
