"""The stages of surprisal: from texts to tokens, and from tokens to nats."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.engine import Artifact, BatchOutput, Item, ItemResult, Tables
from harness.experiments.experiment import Entry
from harness.models.load import LM, Codec, ModelIdentity, ModelSpec, load_codec, shared
from harness_toy.certificate import build_certificate
from harness_toy.forward import Tokens, surprisals
from harness_toy.inputs import Inputs, Text
from harness_toy.settings import UNITS


@dataclass(frozen=True)
class Texts:
    """Writes `texts`: each with its token ids. Uses the tokenizer, not the model."""

    texts: tuple[Text, ...]
    model: ModelSpec
    identity: ModelIdentity
    name = "texts"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 1_000

    @classmethod
    def build(cls, given: Inputs) -> "Texts":
        return cls(given.texts, given.model, given.identity)

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: Tables) -> list[Item[Text]]:
        return [Item(text.name, 64, text) for text in self.texts]

    def setup(self) -> Codec:
        return load_codec(self.model, self.identity)

    def run(self, context: Codec, items: Sequence[Item[Text]]) -> list[ItemResult]:
        return [ItemResult(i.key, {"texts": [text_row(context, i.payload)]}) for i in items]


def text_row(codec: Codec, text: Text) -> dict[str, Any]:
    """A row of `texts`."""
    token_ids, _ = codec.context(text.text)
    return {"text_id": text.name, "text": text.text, "token_ids": token_ids}


@dataclass(frozen=True)
class Surprisal:
    """Writes `surprisals`, and a file a batch with the surprisal of every token, a tensor a text."""

    unit: str
    model: ModelSpec
    identity: ModelIdentity
    name = "surprisal"
    version = 1
    reads = MappingProxyType({"texts": ("text_id", "token_ids")})
    row_bytes = 100
    file_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "Surprisal":
        return cls(given.settings.unit, given.model, given.identity)

    def params(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def items(self, tables: Tables) -> list[Item[Tokens]]:
        return [Item(r["text_id"], len(r["token_ids"]), tuple(r["token_ids"])) for r in tables.streamed("texts")]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Tokens]]) -> BatchOutput:
        fitting = [i for i in items if 2 <= len(i.payload) <= context.max_positions]
        nats = surprisals(context, [i.payload for i in fitting]) if fitting else []
        found = {i.key: UNITS[self.unit] * n for i, n in zip(fitting, nats, strict=True)}
        results = [self._result(i, found.get(i.key), context.max_positions) for i in items]
        return BatchOutput(results, artifacts=(self._file(found),) if found else ())

    def _result(self, item: Item[Tokens], values: np.ndarray | None, most: int) -> ItemResult:
        if values is None:
            return ItemResult.failed(item.key, f"expected 2 to {most} tokens, found {len(item.payload)}")
        row = {"text_id": item.key, "num_tokens": len(values), "mean": float(values.mean())}
        return ItemResult(item.key, {"surprisals": [row]})

    def _file(self, values: Mapping[str, np.ndarray]) -> Artifact:
        """Named by what is in it: the same batch gives the same file again, and another batch another one."""
        name = hashlib.sha256("\0".join(values).encode()).hexdigest()[:16]
        tensors = {key: v.astype(np.float32) for key, v in values.items()}
        first = next(iter(tensors.values()))
        return Artifact(
            f"{self.name}/{name}.safetensors", {"unit": self.unit}, "surprisal", first.shape, "float32",
            partial(save_file, tensors),
        )  # fmt: skip


STAGES = (
    Entry("texts", Texts.build),
    Entry("surprisal", Surprisal.build, needs=("texts",)),
    Entry("sanity", build_certificate, needs=("texts",)),
)
"""The table of contents, in the order of running."""
