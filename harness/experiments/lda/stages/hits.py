"""Stage `hits`: whether each detector fires in each completion, where, and at which step that was sure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.lda.inputs import Both, Inputs, detector_params, item_key
from harness.experiments.lda.stages.rollouts import answer_ids
from harness.models.load import Codec
from harness.text.detectors import Detector

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
    """A completion to look at; its ids come when its batch is about to run."""

    which: Which
    token_ids: tuple[int, ...] = ()


_KEY = tuple(Which.__annotations__)


@dataclass(frozen=True)
class Hits:
    """Writes `hits`, one row a completion and detector. The token ids are the authority, not the stored text."""

    both: Both
    detectors: Mapping[str, Detector]
    given: Mapping[str, Any]
    name = "hits"
    version = 1
    reads = MappingProxyType({"completions": (*_KEY, "token_ids")})
    loads_ahead = 16_384

    @classmethod
    def build(cls, given: Inputs) -> "Hits":
        return cls(given.both, given.detectors, detector_params(given.settings))

    @property
    def row_bytes(self) -> int:
        return 100 * len(self.detectors)

    def params(self) -> dict[str, Any]:
        return {"detectors": dict(self.given)}

    def items(self, tables: AnyTables) -> list[Item[Completed]]:
        if not self.detectors:
            return []
        return [
            Item(item_key(*(row[c] for c in _KEY)), _LENGTH, Completed(Which(**row)))
            for row in Tables.of(tables).streamed("completions", _KEY)
        ]

    def load(self, tables: Tables, items: Sequence[Item[Completed]]) -> list[Item[Completed]]:
        wanted = [i.payload.which for i in items]
        rows = tables.rows_with("completions", [asdict(w) for w in wanted])
        token_ids = {Which(*(row[c] for c in _KEY)): tuple(row["token_ids"]) for row in rows}
        return [Item(i.key, i.length, Completed(w, token_ids[w]), i.group) for i, w in zip(items, wanted, strict=True)]

    def setup(self) -> Codec:
        return self.both.codec

    def run(self, context: Codec, items: Sequence[Item[Completed]]) -> list[ItemResult]:
        stops = frozenset(self.both.pairing.after.stop_ids)
        return [self._one(context, stops, item) for item in items]

    def _one(self, codec: Codec, stops: frozenset[int], item: Item[Completed]) -> ItemResult:
        token_ids = answer_ids(item.payload.token_ids, stops)
        text = codec.decode(token_ids)
        # The token that ended the text is part of what happened, and none of what is said.
        last = min(len(token_ids), len(item.payload.token_ids) - 1)
        key = asdict(item.payload.which)
        rows = []
        for name, detector in self.detectors.items():
            try:
                hit = detector.find(token_ids, text, codec.decode, last)
            except ItemFailed as e:
                return ItemResult.failed(item.key, e)
            rows.append(
                {
                    **key,
                    "detector": name,
                    "is_hit": hit is not None,
                    "first_step": hit and hit.first_step,
                    "end_step": hit and hit.end_step,
                    "char_span": hit and list(hit.char_span),
                    "text": hit and hit.text,
                }
            )
        return ItemResult(item.key, {"hits": rows})
