"""What a run of the neuron experiment is made of: prompts, targets, background, layers; checked before anything is computed."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from harness.engine import FileHandle, Tables
from harness.engine.estimate import spread
from harness.errors import RunError, SettingsError
from harness.experiments.experiment import Prepared
from harness.experiments.neurons.packs import Layer, Open, merged
from harness.experiments.neurons.prompts import Prompt, PromptSet, one_prompt, read_prompts
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.neurons.tokens import functional_ids, ids_of, one_id
from harness.experiments.weights import Models
from harness.files import read_regular
from harness.models.attribution import Acts, acts_of
from harness.models.load import LM, RANDOM, Codec, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.neurons import Circuit, circuit_of
from harness.settings import BUNDLED_PROMPTS, PLANTED_MODELS, Resolved, Settings
from harness.text.prompts import take
from harness.text.records import rejections_told
from harness.tolerance import HALF

CONDITION = "neurons"
"""Of the one context that a prompt has."""
BUNDLED = "bundled"
_MOST_TEXT_BYTES = 64_000_000
_NUM_BUNDLED = 200
BYTES = {"off": 0, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Corpus:
    """The background: texts that peaks are compared with. `name` is `off` where there is none."""

    name: str
    texts: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Inputs:
    """What stages are built from."""

    prompts: tuple[Prompt, ...]
    model: ModelSpec
    identity: ModelIdentity
    settings: NeuronsSettings
    layers: tuple[int, ...]
    corpus: Corpus
    functional: tuple[str, ...]
    cache: Path
    """Where background statistics are kept for other runs of the model."""
    stages: tuple[str, ...]
    seed: int

    @property
    def codec(self) -> Codec:
        """The model's tokenizer."""
        return load_codec(self.model, self.identity)

    @property
    def functional_ids(self) -> frozenset[int]:
        """Tokens that are function words."""
        return _functional(self.codec, self.functional)

    def lm(self) -> LM:
        """The model in its own dtype, kept for the stages of one process."""
        return shared(self.model, self.identity)


@lru_cache(maxsize=4)
def _functional(codec: Codec, words: tuple[str, ...]) -> frozenset[int]:
    return functional_ids(codec, words)


@dataclass(frozen=True)
class Measuring:
    """A model as attribution and interventions use it: computed in float32 or wider, its parts found."""

    circuit: Circuit
    acts: Acts | None


@lru_cache(maxsize=2)
def measuring(model: ModelSpec, identity: ModelIdentity, *, has_relp: bool) -> Measuring:
    """The model for gradients and differences of logits: half precision would round them away."""
    if identity.dtype in HALF:
        model, identity = replace(model, dtype="float32"), replace(identity, dtype="float32")
    circuit = circuit_of(shared(model, identity))
    return Measuring(circuit, acts_of(circuit) if has_relp else None)


def item_key(*parts: object) -> str:
    """An item's content key."""
    return "|".join(map(str, parts))


def file_name(*parts: object) -> str:
    """A short name of a file that holds what these parts say."""
    return hashlib.blake2b(item_key(*parts).encode(), digest_size=12).hexdigest()


def prepare(resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
    """Check all input: prompts, targets, layers, background. Loads no weights."""
    settings, own = resolved.settings, resolved.own(NeuronsSettings)
    prompt_set = _prompts(settings, own)
    chosen = take(prompt_set.prompts, settings.data.prompts_of(_NUM_BUNDLED) if not own.text else None)
    codec = load_codec(models.spec, models.identity)
    layers = _layers(own, models.identity)
    _check_target(own, chosen, codec)
    corpus = _corpus(own, settings)
    functional = _functional_words(own, settings)
    given = Inputs(
        chosen, models.spec, models.identity, own, layers, corpus, functional,
        settings.paths.cache_folder / "neurons", stages, settings.runtime.seed,
    )  # fmt: skip

    def some(number: int, names: tuple[str, ...]) -> Inputs:
        return replace(given, prompts=tuple(spread(chosen, number, lambda p: len(p.text))), stages=names)

    path = BUNDLED if prompt_set.path is None else str(prompt_set.path)
    return Prepared(
        given,
        parts={
            "prompts": {"sha256": _hash_of(sorted(p.row_hash for p in chosen)), "number": len(chosen)},
            "background": corpus.sha256,
            "functional": _hash_of(functional),
        },
        num_subjects=len(chosen),
        about=f"{len(chosen)} prompts, {len(layers)} of {models.identity.num_layers} layers, target {own.target}"
        + _dump_told(own, chosen, codec, models.identity, len(layers)),
        facts={
            "planted": settings.model.name in PLANTED_MODELS,
            "prompts": {
                "path": "neurons.text" if own.text else path,
                "sha256": prompt_set.sha256,
                "read": len(prompt_set.prompts),
                "used": len(chosen),
                "rejected": dict(Counter(r.rule for r in prompt_set.rejections)),
                "row_hashes": {p.prompt_id: p.row_hash for p in chosen},
            },
            "background": {"name": corpus.name, "sha256": corpus.sha256, "texts": len(corpus.texts)},
        },
        some=some,
        num_contexts=len(chosen),
        warnings=tuple(_warnings(own, prompt_set, chosen, is_planted=settings.model.name in PLANTED_MODELS)),
        events=tuple(("rejected_prompt", f"row {r.row}: {r.rule}: {r.detail}") for r in prompt_set.rejections),
    )


def _warnings(own: NeuronsSettings, prompt_set: PromptSet, chosen: Sequence[Prompt], *, is_planted: bool) -> list[str]:
    told = []
    named = sum(bool(p.target) for p in chosen)
    if named and own.target in ("top1_logit", "last_token") and not is_planted:
        told.append(
            f"{named} prompts name a target, and neurons.target = {own.target} chooses its own; for theirs give "
            "--neurons.target next_token"
        )
    return told + (rejections_told(prompt_set.path, prompt_set.rejections) if prompt_set.path else [])


def _prompts(settings: Settings, own: NeuronsSettings) -> PromptSet:
    is_bundled = settings.data.prompts == BUNDLED_PROMPTS
    if own.text:
        if not is_bundled:
            raise SettingsError("neurons.text: expected a text or a prompt file (--prompts), found both")
        return one_prompt(own.text)
    if not is_bundled:
        return read_prompts(Path(settings.data.prompts))
    if settings.model.name not in PLANTED_MODELS and not settings.model.name.startswith(RANDOM):
        raise SettingsError(
            "expected prompts, found none: give --prompts FILE ({id, text} a row) or --neurons.text 'The capital of Texas is'"
        )
    return read_prompts(settings.paths.data_folder / "neurons" / "planted.jsonl")


def _layers(own: NeuronsSettings, identity: ModelIdentity) -> tuple[int, ...]:
    if beyond := [n for n in own.layers if n >= identity.num_layers]:
        raise SettingsError(f"neurons.layers: expected 0 to {identity.num_layers - 1}, found {beyond[0]}")
    return own.layers or tuple(range(identity.num_layers))


def _check_target(own: NeuronsSettings, prompts: Sequence[Prompt], codec: Codec) -> None:
    if own.target in ("next_token", "sequence"):
        if own.token:
            token_ids_of(codec, own.token, own.target, "neurons.token")
        elif missing := [p for p in prompts if not p.target]:
            raise SettingsError(
                f"neurons.token: target = {own.target} needs a token, and {len(missing)} of {len(prompts)} prompts name none "
                f"(the first: {missing[0].prompt_id[:80]!r}); give --neurons.token ' Austin', or a column target"
            )
    elif own.token:
        raise SettingsError(
            f"neurons.token: found {own.token[:80]!r} with target = {own.target}, which chooses its own; "
            "give --neurons.target next_token"
        )
    if own.contrast:
        one_id(codec, own.contrast, "neurons.contrast", has_sequence=False)
    for given in own.write_tokens:
        one_id(codec, given, "neurons.write_tokens", has_sequence=False)


def token_ids_of(codec: Codec, given: str, mode: str, what: str) -> list[int]:
    """A named target's ids. Raises SettingsError."""
    return ids_of(codec, given, what) if mode == "sequence" else [one_id(codec, given, what, has_sequence=True)]


def _lines(path: Path, what: str) -> tuple[str, ...]:
    try:
        content = read_regular(path, _MOST_TEXT_BYTES).decode("utf-8-sig")
    except OSError as e:
        raise SettingsError(f"{what}: {path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise SettingsError(f"{what}: {path}: expected UTF-8, found {e.object[e.start]:#04x} at byte {e.start}") from e
    if "\0" in content:
        raise SettingsError(f"{what}: {path}: expected text, found a NUL at character {content.index(chr(0))}")
    found = tuple(line.rstrip("\r") for line in content.split("\n") if line.strip())
    if not found:
        raise SettingsError(f"{what}: {path}: expected a text a line, found none")
    return found


def _corpus(own: NeuronsSettings, settings: Settings) -> Corpus:
    if own.background == "off":
        return Corpus("off", (), "off")
    bundled = settings.paths.data_folder / "neurons" / "background_en.txt"
    texts = _lines(bundled if own.background == BUNDLED else Path(own.background), "neurons.background")
    texts = tuple(dict.fromkeys(texts))
    return Corpus(own.background, texts, _hash_of(texts))


def _functional_words(own: NeuronsSettings, settings: Settings) -> tuple[str, ...]:
    if own.functional_tokens == "off":
        return ()
    bundled = settings.paths.data_folder / "neurons" / "functional_en.txt"
    path = bundled if own.functional_tokens == BUNDLED else Path(own.functional_tokens)
    return _lines(path, "neurons.functional_tokens")


def num_neurons(identity: ModelIdentity) -> int:
    """Neurons of a layer, as the configuration has it; for estimates alone."""
    config = identity.about["config"]
    config = config.get("text_config") or config
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    return int(config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim") or 4 * hidden)


def _dump_told(
    own: NeuronsSettings, prompts: Sequence[Prompt], codec: Codec, identity: ModelIdentity, num_layers: int
) -> str:
    """What the files will take: known before anything is computed."""
    if own.dump == "off":
        return ""
    lengths = [len(ids) for ids in codec.encode_all([p.text for p in prompts])]
    if own.positions != "all":
        most = 1 if own.positions == "last" else int(own.positions.partition(":")[2])
        lengths = [min(n, most) for n in lengths]
    size = sum(lengths) * num_layers * num_neurons(identity) * BYTES[own.dump]
    return f"; a dump of {sum(lengths):,} tokens: {size / 1e9:.2f} GB"


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- what stages read -----------------------------------------------------------------------------------------------


def contexts_of(tables: Tables, prompt_ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of `contexts` by prompt."""
    keys = [{"prompt_id": prompt_id, "condition": CONDITION} for prompt_id in dict.fromkeys(prompt_ids)]
    return {row["prompt_id"]: row for row in tables.rows_with("contexts", keys, ("prompt_id", "condition", *columns))}


def files_of(tables: Tables, stage: str) -> list[FileHandle]:
    """A stage's files, in the order of their names, which is that of the plan."""
    rows = [r for r in tables["artifacts"] if r["kind"] == stage]
    return [tables.file(r["path"]) for r in sorted(rows, key=lambda r: r["path"])]


@dataclass(frozen=True)
class Means:
    """Mean and standard deviation of every neuron over a corpus, [L, M]; rows of layers that were not read are NaN."""

    mean: Float[np.ndarray, "L M"]
    sd: Float[np.ndarray, "L M"]


def layers_of(files: Sequence[FileHandle], layers: Sequence[int]) -> Iterator[tuple[int, Layer]]:
    """Packs merged, a layer at a time."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        opened = [Open(stack.enter_context(file.open())) for file in files]
        for layer in layers:
            yield layer, merged(opened, layer)


@lru_cache(maxsize=2)
def _means(files: tuple[FileHandle, ...], layers: tuple[int, ...], num_layers: int) -> Means:
    found = dict(layers_of(files, layers))
    blank = np.full_like(next(iter(found.values())).moments.mean, np.nan)
    return Means(
        np.stack([found[n].moments.mean if n in found else blank for n in range(num_layers)]),
        np.stack([found[n].moments.sd if n in found else blank for n in range(num_layers)]),
    )


def means_of(tables: Tables, layers: Sequence[int], num_layers: int) -> Means:
    """Over the background; over the prompts themselves where there is none. Raises RunError where there is neither."""
    for stage in ("background", "partials"):
        if files := files_of(tables, stage):
            return _means(tuple(files), tuple(layers), num_layers)
    raise RunError("no statistics of activations are there to ablate to; run the stage background or partials")
