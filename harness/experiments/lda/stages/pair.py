"""Stage `pair`: whether ids mean the same in both models, and the arms that are drawn from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.lda.inputs import Both, Inputs
from harness.models.pairing import Pairing
from harness.models.rollout import Rule


@dataclass(frozen=True)
class PairUp:
    """Writes `pair` and `arms`. Uses both tokenizers, and neither model."""

    both: Both
    arms: Mapping[str, float]
    rule: Rule
    name = "pair"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "PairUp":
        return cls(given.both, given.arms, given.rule)

    def params(self) -> dict[str, Any]:
        rule = self.rule
        told = {"floor": rule.floor, "temperature": rule.temperature, "top_p": rule.top_p}
        return {"alphas": list(self.arms.values()), **told}

    def items(self, tables: AnyTables) -> list[Item[None]]:
        return [Item("pair", 1)]

    def most_items(self, num_subjects: int) -> int:
        return 1

    def setup(self) -> Pairing:
        return self.both.pairing

    def run(self, context: Pairing, items: Sequence[Item[None]]) -> list[ItemResult]:
        rule = self.rule
        arms = [
            {"condition": c, "alpha": a, "floor": rule.floor, "temperature": rule.temperature, "top_p": rule.top_p}
            for c, a in self.arms.items()
        ]
        return [ItemResult(item.key, {"pair": pair_rows(context), "arms": arms}) for item in items]


def pair_rows(pairing: Pairing) -> list[dict[str, Any]]:
    """The rows of `pair`."""
    return [
        {
            "side": name,
            "model": side.model,
            "revision": side.revision,
            "vocab_size": side.vocab_size,
            "head_rows": side.head_rows,
            "num_common": pairing.num_common,
            "vocabs_match": pairing.vocabs_match,
            "special_match": pairing.special_match,
            "stop_ids": list(side.stop_ids),
            "template_sha256": side.template_sha256,
            "warning": pairing.warning,
        }
        for name, side in (("after", pairing.after), ("before", pairing.before))
    ]
