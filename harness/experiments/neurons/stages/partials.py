"""Stages `partials` and `background`: statistics of every neuron over packs of texts, a file a pack; no activations kept."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from loguru import logger
from safetensors import safe_open
from safetensors.numpy import save_file

from harness.engine import AnyTables, Artifact, Item, ItemResult, Tables
from harness.experiments.neurons.inputs import CONDITION, Corpus, Inputs, contexts_of, file_name, num_neurons
from harness.experiments.neurons.packs import Bad, Pack, Text, arrays_of, pack_of
from harness.experiments.neurons.prompts import Prompt
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.neurons.stages.prompts import context_row, counted
from harness.models.load import LM, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.neurons import check_length, check_neurons

_CPU_TOKENS = 4_096
_GPU_TOKENS = 65_536
"""Of a forward within a pack; halved where memory runs out."""
_BYTES_A_NEURON = 700


@dataclass(frozen=True, slots=True)
class Members:
    """A pack before its texts are read: the ordinal of the first of them, and their prompts."""

    first: int
    prompt_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pack with its texts."""

    first: int
    texts: tuple[Text, ...]


def plan_of(contexts: Iterator[dict[str, Any]], size: int) -> list[tuple[str, int, Members]]:
    """(key, tokens, members) of each pack of so many prompts, in the order of their table. A key names what is in it."""
    found: list[tuple[str, int, Members]] = []
    some: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    first = 0

    def close() -> None:
        nonlocal first
        told = hashlib.sha256(repr(some).encode()).hexdigest()[:16]
        key = f"{len(found):06d}-{told}"
        found.append((key, sum(len(t) for _, t, _ in some), Members(first, tuple(name for name, _, _ in some))))
        first += len(some)
        some.clear()

    for row in contexts:
        some.append((row["prompt_id"], tuple(row["token_ids"]), counted(row)))
        if len(some) == size:
            close()
    if some:
        close()
    return found


_COLUMNS = ("prompt_id", "condition", "token_ids", "positions", "is_counted")


@dataclass(frozen=True)
class Partials:
    """Writes files of statistics over the prompts, and `left_out`."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    size: int
    top: int
    functional: tuple[str, ...]
    functional_ids: Callable[[], frozenset[int]]
    name = "partials"
    version = 1
    reads = MappingProxyType({"contexts": _COLUMNS})
    row_bytes = 500

    @classmethod
    def build(cls, given: Inputs) -> "Partials":
        """The stage of a run."""
        own = given.settings
        return cls(
            given.model, given.identity, given.layers, own.pack, own.top_examples, given.functional,
            lambda: given.functional_ids,
        )  # fmt: skip

    @property
    def file_bytes(self) -> int:
        return len(self.layers) * num_neurons(self.identity) * _BYTES_A_NEURON

    def params(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "pack": self.size, "top_examples": self.top}

    def items(self, tables: AnyTables) -> list[Item[Members]]:
        return [Item(key, n, m) for key, n, m in plan_of(Tables.of(tables).streamed("contexts", _COLUMNS), self.size)]

    def most_items(self, num_subjects: int) -> int:
        """For the estimate."""
        return -(-num_subjects // self.size)

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Loaded]]:
        found = []
        for item in items:
            rows = contexts_of(tables, item.payload.prompt_ids, _COLUMNS[2:])
            texts = tuple(Text(i, tuple(rows[i]["token_ids"]), counted(rows[i])) for i in item.payload.prompt_ids)
            found.append(replace(item, payload=Loaded(item.payload.first, texts)))
        return found

    def setup(self) -> LM:
        return _checked(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Loaded]]) -> list[ItemResult]:
        return [self._one(context, item) for item in items]

    def _one(self, lm: LM, item: Item[Loaded]) -> ItemResult:
        pack = _made(
            lm,
            item.payload.texts,
            self.layers,
            first=item.payload.first,
            top=self.top,
            functional=self.functional_ids(),
        )
        if not pack.num_texts:
            return ItemResult.failed(
                item.key, f"none of its {len(item.payload.texts)} texts can be used: {_told(pack.bad)}"
            )
        return ItemResult(
            item.key, {"left_out": _left_out(self.name, pack.bad)}, artifacts=(_file(self.name, item.key, pack),)
        )


@dataclass(frozen=True)
class Background:
    """Writes files of statistics over the background corpus. They are kept for other runs of the model."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    corpus: Corpus
    settings: NeuronsSettings
    cache: Path
    name = "background"
    version = 1
    reads = MappingProxyType({})
    row_bytes = 500

    @classmethod
    def build(cls, given: Inputs) -> "Background":
        return cls(given.model, given.identity, given.layers, given.corpus, given.settings, given.cache)

    @property
    def file_bytes(self) -> int:
        return len(self.layers) * num_neurons(self.identity) * 128

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {
            "corpus": self.corpus.sha256, "layers": list(self.layers), "pack": own.pack, "positions": own.positions,
            "skip_first": own.skip_first, "prepend_bos": own.prepend_bos,
        }  # fmt: skip

    def items(self, tables: AnyTables) -> list[Item[tuple[str, ...]]]:
        size = self.settings.pack
        packs = [self.corpus.texts[n : n + size] for n in range(0, len(self.corpus.texts), size)]
        return [
            Item(f"{n:06d}-{file_name(*texts)[:16]}", max(1, sum(map(len, texts)) // 4), texts)
            for n, texts in enumerate(packs)
        ]

    def most_items(self, num_subjects: int) -> int:
        """For the estimate: as many packs whatever the prompts are."""
        return len(self.items({}))

    def setup(self) -> "_Lazy":
        return _Lazy(self.model, self.identity)

    def run(self, context: "_Lazy", items: Sequence[Item[tuple[str, ...]]]) -> list[ItemResult]:
        return [self._one(context, item) for item in items]

    def _one(self, context: "_Lazy", item: Item[tuple[str, ...]]) -> ItemResult:
        kept = self.cache / f"{self._name_of(item, context)}.safetensors"
        if (content := _known(kept)) is not None:
            logger.info("background: {} is known from an earlier run ({})", item.key, kept)
            return ItemResult(item.key, {}, artifacts=(_bytes(self.name, item.key, content),))
        codec = load_codec(self.model, self.identity)
        prompts = [Prompt.of(text, f"{item.key}-{n}") for n, text in enumerate(item.payload)]
        rows = [context_row(codec, prompt, self.settings, 0) for prompt in prompts]
        texts = [Text(r["prompt_id"], tuple(r["token_ids"]), counted(r)) for r in rows if counted(r)]
        if not texts:
            return ItemResult.failed(item.key, "none of its texts has a counted token")
        pack = _made(context.lm, texts, self.layers)
        if not pack.num_texts:
            return ItemResult.failed(item.key, f"none of its {len(texts)} texts can be used: {_told(pack.bad)}")
        file = _file(self.name, item.key, pack)
        if not pack.bad:
            _keep(kept, file)
        return ItemResult(item.key, {"left_out": _left_out(self.name, pack.bad)}, artifacts=(file,))

    def _name_of(self, item: Item[tuple[str, ...]], context: "_Lazy") -> str:
        """By all that decides the numbers."""
        return file_name(
            item.key, sorted(self.identity.fingerprint().items()), sorted(self.params().items()), self.version,
            torch.__version__, self.model.device,
        )  # fmt: skip


class _Lazy:
    """A model that is loaded when it is needed: what is known from an earlier run needs none."""

    def __init__(self, model: ModelSpec, identity: ModelIdentity):
        self._model, self._identity = model, identity

    @property
    def lm(self) -> LM:
        return _checked(self._model, self._identity)


def _checked(model: ModelSpec, identity: ModelIdentity) -> LM:
    lm = shared(model, identity)
    check_neurons(lm)
    return lm


def _made(lm: LM, texts: Sequence[Text], layers: Sequence[int], **more: Any) -> Pack:
    """A pack's statistics; a text that is too long for the model is left out of them, as if it gave no numbers."""
    long = [t for t in texts if check_length(lm, t.tokens) is not None]
    fitting = [t for t in texts if check_length(lm, t.tokens) is None]
    tokens = _CPU_TOKENS if lm.device.type == "cpu" else _GPU_TOKENS
    while True:
        try:
            pack = pack_of(lm, fitting, layers, tokens, **more)
            break
        except torch.OutOfMemoryError:
            if tokens < 2 * max(len(t.tokens) for t in fitting):
                raise
            tokens //= 2
    return pack._replace(bad=pack.bad + [Bad(t.name, -1, lm.max_positions) for t in long])


def _left_out(stage: str, bad: Sequence[Bad]) -> list[dict[str, Any]]:
    return [{"stage": stage, "prompt_id": b.name, "layer": b.layer, "position": b.position} for b in bad]


def _told(bad: Sequence[Bad]) -> str:
    shown = [
        f"{b.name}: too long"
        if b.layer < 0
        else f"{b.name}: layer {b.layer}, position {b.position} is no finite number"
        for b in bad[:3]
    ]
    return "; ".join(shown) + ("" if len(bad) <= len(shown) else f" and {len(bad) - len(shown)} more")


def _file(stage: str, key: str, pack: Pack) -> Artifact:
    arrays = arrays_of(pack)
    size = len(next(iter(pack.layers.values())).max_peak)
    return Artifact(
        f"{stage}/{key}.safetensors", {"condition": CONDITION}, stage, (len(pack.layers), size), "float64",
        partial(save_file, arrays),
    )  # fmt: skip


def _bytes(stage: str, key: str, content: bytes) -> Artifact:
    return Artifact(f"{stage}/{key}.safetensors", {"condition": CONDITION}, stage, (), "float64", content)


def _known(path: Path) -> bytes | None:
    """A kept file, unless it is none or another one than its name says."""
    try:
        with safe_open(path, "numpy") as tensors:
            if "num" not in tensors.keys():  # noqa: SIM118
                return None
        return path.read_bytes()
    except Exception:  # whatever is wrong with it: it can be made again
        return None


def _keep(path: Path, file: Artifact) -> None:
    """Keep a file for other runs; where that cannot be, this run needs it no less."""
    assert not isinstance(file.content, bytes), "made here"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        file.content(part)
        part.replace(path)
    except OSError as e:
        logger.warning("background: statistics cannot be kept for other runs ({}): {}", path.parent, e.strerror or e)
