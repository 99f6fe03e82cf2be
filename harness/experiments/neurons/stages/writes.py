"""Stage `writes`: the tokens whose logits a neuron's output raises and lowers, per unit of its activation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.experiments.neurons.inputs import Inputs, Measuring, measuring
from harness.experiments.neurons.tokens import one_id
from harness.models.load import ModelIdentity, ModelSpec, load_codec

_LENGTH = 8_192
"""Of an item: a layer is a batch of its own."""
_MOST_LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Job:
    """A layer's neurons; None: all of them."""

    layer: int
    neurons: tuple[int, ...] | None


@dataclass(frozen=True)
class Writes:
    """Writes `neuron_writes`: the direction carried through post-norm gain, final gain and head, at scale 1 of every norm."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    which: str
    top: int
    tokens: tuple[str, ...]
    name = "writes"
    version = 1
    reads = MappingProxyType({"influence": ("layer", "neuron"), "top_neurons": ("layer", "neuron")})

    @classmethod
    def build(cls, given: Inputs) -> "Writes":
        """The stage of a run."""
        own = given.settings
        return cls(given.model, given.identity, given.layers, own.writes, own.top_writes, own.write_tokens)

    @property
    def row_bytes(self) -> int:
        return 500 * 20 * self.top

    def params(self) -> dict[str, Any]:
        return {"writes": self.which, "top_writes": self.top, "tokens": list(self.tokens), "layers": list(self.layers)}

    def items(self, tables: AnyTables) -> list[Item[Job]]:
        if self.which == "off":
            return []
        if self.which == "all":
            return [Item(f"layer-{n:03d}", _LENGTH, Job(n, None)) for n in self.layers]
        named: dict[int, set[int]] = {n: set() for n in self.layers}
        for table in ("influence", "top_neurons"):
            for batch in Tables.of(tables).batches(table, ("layer", "neuron")):
                pairs = np.stack([batch.column(c).to_numpy(zero_copy_only=False) for c in ("layer", "neuron")], 1)
                for layer, neuron in np.unique(pairs, axis=0).tolist():
                    named[layer].add(neuron)
        return [
            Item(f"layer-{n:03d}|{_digest(sorted(some))}", _LENGTH, Job(n, tuple(sorted(some))))
            for n, some in named.items()
            if some
        ]

    def most_items(self, num_subjects: int) -> int:
        """For the estimate."""
        return len(self.layers)

    def setup(self) -> Measuring:
        return measuring(self.model, self.identity, has_relp=False)

    def run(self, context: Measuring, items: Sequence[Item[Job]]) -> list[ItemResult]:
        codec = load_codec(self.model, self.identity)
        explicit = [one_id(codec, given, "neurons.write_tokens", has_sequence=False) for given in self.tokens]
        return [
            ItemResult(
                i.key,
                {"neuron_writes": _rows(context, i.payload, self.top, explicit)},
                replaces={"neuron_writes": {"layer": i.payload.layer}},
            )
            for i in items
        ]


def _digest(neurons: Sequence[int]) -> str:
    return hashlib.sha256(repr(neurons).encode()).hexdigest()[:16]


@torch.inference_mode()
def _rows(context: Measuring, job: Job, top: int, explicit: Sequence[int]) -> list[dict[str, Any]]:
    circuit = context.circuit
    neurons = list(range(circuit.num_neurons) if job.neurons is None else job.neurons)
    vocabulary = torch.arange(len(circuit.lm.codec), device=circuit.lm.device)
    head, _ = circuit.unembedding(vocabulary)
    directions = _directions(context, job.layer, neurons)
    top, size = min(top, len(vocabulary)), max(1, _MOST_LOGITS // len(vocabulary))
    rows = []
    for start in range(0, len(neurons), size):
        logits = (directions[start : start + size] @ head.to(directions).T).float()
        high, low = logits.topk(top), (-logits).topk(top)
        named = logits[:, torch.tensor(explicit, dtype=torch.long, device=logits.device)].tolist()
        columns = [x.tolist() for x in (high.indices, high.values, low.indices, -low.values)]
        for n, (top_ids, top_logits, low_ids, low_logits, own) in enumerate(zip(*columns, named, strict=True), start):
            rows.append(
                {
                    "layer": job.layer, "neuron": neurons[n], "top_ids": top_ids, "top_logits": top_logits,
                    "low_ids": low_ids, "low_logits": low_logits,
                    "explicit": [{"token_id": t, "logit": v} for t, v in zip(explicit, own, strict=True)],
                }
            )  # fmt: skip
    return rows


def _directions(context: Measuring, layer: int, neurons: Sequence[int]) -> Tensor:
    """What goes into the head [N, D] for a unit of each neuron's activation, every norm at scale 1."""
    circuit = context.circuit
    outlet = circuit.outlets[layer]
    found = outlet.weight[:, torch.tensor(neurons, device=circuit.lm.device)].T * outlet.multiplier
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    one = torch.ones(len(found), 1, device=found.device, dtype=found.dtype)
    if outlet.post is not None:
        found = outlet.post[1].apply(found, one)
    return circuit.final.apply(found, one)
