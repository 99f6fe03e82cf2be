"""Stage `detect`: whether each completion says the word, where, and in which tokens (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec
from harness.text.detect import detect

_LENGTH = 8  # per item: a batch of 1,024 completions takes some tens of milliseconds


@dataclass(frozen=True, slots=True)
class Which:
    """A completion by its key."""

    prompt_id: str
    condition: str
    mode: str
    sample_id: int


@dataclass(frozen=True, slots=True)
class Completed:
    """A completion to look at, and the word to look for. Both come when its batch is about to run."""

    which: Which
    token_ids: tuple[int, ...] = ()
    target: str = ""


_KEY = tuple(Which.__annotations__)


@dataclass(frozen=True)
class Detect:
    """Writes `detections`, one row a completion. The token ids are the authority, not the stored text."""

    model: ModelSpec
    identity: ModelIdentity
    name = "detect"
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "target"),
            "completions": (*_KEY, "token_ids"),
        }
    )
    loads_ahead = 16_384
    row_bytes = 250

    @classmethod
    def build(cls, given: Inputs) -> "Detect":
        return cls(given.model, given.identity)

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: AnyTables) -> list[Item[Completed]]:
        return [
            Item(item_key(*(row[c] for c in _KEY)), _LENGTH, Completed(Which(**row)))
            for row in Tables.of(tables).streamed("completions", _KEY)
        ]

    def load(self, tables: Tables, items: Sequence[Item[Completed]]) -> list[Item[Completed]]:
        wanted = [i.payload.which for i in items]
        rows = tables.rows_with("completions", [asdict(w) for w in wanted])
        token_ids = {Which(*(row[c] for c in _KEY)): tuple(row["token_ids"]) for row in rows}
        ids = [{"prompt_id": prompt_id} for prompt_id in dict.fromkeys(w.prompt_id for w in wanted)]
        targets = {p["prompt_id"]: p["target"] for p in tables.rows_with("prompts", ids)}
        return [
            Item(i.key, i.length, Completed(w, token_ids[w], targets[w.prompt_id]), i.group)
            for i, w in zip(items, wanted, strict=True)
        ]

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item[Completed]]) -> list[ItemResult]:
        return [_one(context, item) for item in items]


def _one(codec: Codec, item: Item[Completed]) -> ItemResult:
    try:
        found = detect(item.payload.token_ids, item.payload.target, codec.decode)
    except ItemFailed as e:
        return ItemResult.failed(item.key, e)
    row = asdict(item.payload.which) | {
        "word_present": found.word_present,
        "word_present_full": found.word_present_full,
        "format_ok": found.format_ok,
        "num_occurrences": len(found.occurrences),
        "first_step": found.first_step,
        "char_spans": [list(o.char_span) for o in found.occurrences],
        "token_spans": [list(o.token_span) for o in found.occurrences],
    }
    return ItemResult(item.key, {"detections": [row]})
