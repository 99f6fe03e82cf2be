"""Stage `vocabulary`: the text of every token id, so that a run can be read where its tokenizer is not at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec
from harness.text.words import token_texts


@dataclass(frozen=True)
class TokenTexts:
    """Writes `vocabulary`, one row a token id. Special tokens go by their name."""

    model: ModelSpec
    identity: ModelIdentity
    name = "vocabulary"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 5_000_000

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: AnyTables) -> list[Item[None]]:
        return [Item("tokens", 1)]

    def most_items(self, num_subjects: int) -> int:
        return 1

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item[None]]) -> list[ItemResult]:
        special = set(context.all_special_ids)
        rows = [
            {"token_id": n, "text": context.name_of(n) if n in special else text, "is_special": n in special}
            for n, text in enumerate(token_texts(context))
        ]
        return [ItemResult(item.key, {"vocabulary": rows}) for item in items]
