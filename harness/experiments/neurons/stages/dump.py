"""Stage `dump`: whole activations of every prompt's tokens, a file a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.engine import AnyTables, Artifact, BatchOutput, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.neurons.inputs import BYTES, CONDITION, Inputs, contexts_of, file_name, num_neurons
from harness.experiments.neurons.settings import DumpDtype
from harness.models.load import LM, ModelIdentity, ModelSpec, shared
from harness.models.neurons import check_length, check_neurons, read

KIND = "dump"
_TOKENS = 32
"""Of a prompt, for the estimate of disk."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens, and those of them whose activations are kept."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Dump:
    """Writes `neuron_rows`, and files with tensors `a.<layer>` [rows, M]: prompt after prompt, their positions in order."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    dtype: DumpDtype
    name = "dump"
    version = 1
    reads = MappingProxyType({"contexts": ("prompt_id", "condition", "token_ids", "positions")})
    row_bytes = 200

    @classmethod
    def build(cls, given: Inputs) -> "Dump":
        return cls(given.model, given.identity, given.layers, given.settings.dump)

    @property
    def file_bytes(self) -> int:
        return _TOKENS * len(self.layers) * num_neurons(self.identity) * BYTES[self.dtype]

    def params(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "dtype": self.dtype}

    def items(self, tables: AnyTables) -> list[Item[Any]]:
        if self.dtype == "off":
            return []
        rows = Tables.of(tables).streamed("contexts", ("prompt_id", "token_ids"))
        return [Item(row["prompt_id"], len(row["token_ids"])) for row in rows]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Text]]:
        found = contexts_of(tables, [i.key for i in items], ("token_ids", "positions"))
        return [
            replace(i, payload=Text(tuple(found[i.key]["token_ids"]), tuple(found[i.key]["positions"]))) for i in items
        ]

    def setup(self) -> LM:
        lm = shared(self.model, self.identity)
        check_neurons(lm)
        return lm

    def run(self, context: LM, items: Sequence[Item[Text]]) -> BatchOutput:
        made = _dumped(context, [i.payload for i in items], self.layers, getattr(torch, self.dtype))
        if len(items) > 1 and any(isinstance(m, ItemFailed) for m in made):
            # One text may have another's NaN (0 × NaN): each says its own alone.
            made = [_dumped(context, [i.payload], self.layers, getattr(torch, self.dtype))[0] for i in items]
        results, tensors, end = [], {layer: [] for layer in self.layers}, 0
        name = f"{KIND}/{file_name(*[i.key for i in items])}.safetensors"
        for item, one in zip(items, made, strict=True):
            if isinstance(one, ItemFailed):
                results.append(ItemResult.failed(item.key, one))
                continue
            start, end = end, end + len(item.payload.positions)
            for layer, rows in one.items():
                tensors[layer].append(rows)
            row = {"prompt_id": item.key, "path": name, "row_start": start, "row_end": end, "dtype": self.dtype}
            results.append(ItemResult(item.key, {"neuron_rows": [row]}))
        if not end:
            return BatchOutput(results)
        whole = {f"a.{layer}": torch.cat(rows).contiguous() for layer, rows in tensors.items()}
        first = next(iter(whole.values()))
        file = Artifact(name, {"condition": CONDITION}, KIND, tuple(first.shape), self.dtype, partial(save_file, whole))
        return BatchOutput(results, (file,))


def _dumped(
    lm: LM, texts: Sequence[Text], layers: Sequence[int], dtype: torch.dtype
) -> list[dict[int, Tensor] | ItemFailed]:
    """Each text's rows by layer, on the host."""
    failed = [check_length(lm, t.tokens) for t in texts]
    good = [t for t, wrong in zip(texts, failed, strict=True) if wrong is None]
    sizes = [len(t.positions) for t in good]
    rows: dict[int, Tensor] = {}

    def receive(layer: int, values: Tensor) -> None:
        rows[layer] = values.to(dtype).to("cpu", non_blocking=True)

    if good:
        read(lm, [t.tokens for t in good], [t.positions for t in good], layers, receive)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
    parts = {layer: iter(values.split(sizes)) for layer, values in rows.items()}
    found: list[dict[int, Tensor] | ItemFailed] = []
    for text, wrong in zip(texts, failed, strict=True):
        own = {} if wrong else {layer: next(some) for layer, some in parts.items()}
        found.append(wrong or _bad(text, own, dtype) or own)
    return found


def _bad(text: Text, rows: dict[int, Tensor], dtype: torch.dtype) -> ItemFailed | None:
    for layer, values in sorted(rows.items()):
        is_bad = ~values.isfinite().all(1)
        if bool(is_bad.any()):
            at = text.positions[int(is_bad.nonzero()[0])]
            told = f"layer {layer}, position {at}: an activation is no finite number"
            if dtype == torch.float16:
                told += " in float16, which ends at 65,504 (neurons.dump = bfloat16 goes further)"
            return ItemFailed(told)
    return None
