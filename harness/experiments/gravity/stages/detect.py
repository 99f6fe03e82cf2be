"""Stage `detect`: whether each completion says the word, where, and in which tokens (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.engine import Tables
from harness.engine.executors import Item, ItemResult
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec
from harness.text.detect import detect

_LENGTH = 8  # per item: a batch of 1,024 completions takes some tens of milliseconds


@dataclass(frozen=True)
class Detect:
    """Writes `detections`, one row a completion. The token ids are the authority, not the stored text."""

    model: ModelSpec
    identity: ModelIdentity
    name: ClassVar[str] = "detect"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("greedy",)
    optional: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("prompts", "completions")
    row_bytes: ClassVar[int] = 250

    @classmethod
    def build(cls, given: Inputs) -> "Detect":
        return cls(given.model, given.identity)

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Tables) -> list[Item]:
        targets = {p["prompt_id"]: p["target"] for p in tables["prompts"]}
        return [
            Item(
                item_key(row["prompt_id"], row["condition"], row["mode"], row["sample_id"]),
                _LENGTH,
                (
                    {k: row[k] for k in ("prompt_id", "condition", "mode", "sample_id")},
                    row["token_ids"],
                    targets[row["prompt_id"]],
                ),
            )
            for row in tables["completions"]
        ]

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item]) -> list[ItemResult]:
        return [_one(context, item) for item in items]


def _one(codec: Codec, item: Item) -> ItemResult:
    key, token_ids, target = item.payload
    try:
        found = detect(token_ids, target, codec.decode)
    except ItemFailed as e:
        return ItemResult.failed(item.key, e)
    row = key | {
        "word_present": found.word_present,
        "word_present_full": found.word_present_full,
        "format_ok": found.format_ok,
        "num_occurrences": len(found.occurrences),
        "first_step": found.first_step,
        "char_spans": [list(o.char_span) for o in found.occurrences],
        "token_spans": [list(o.token_span) for o in found.occurrences],
    }
    return ItemResult(item.key, {"detections": [row]})
