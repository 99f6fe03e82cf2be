"""From a name to a language model that can be measured: a hub id at a pinned revision, a local folder, a GGUF file, or
`random:<shape>`.

`identify` says what a name stands for (revision, hashes) without loading weights; `load` gives an `LM` whose parts have
been found and checked. Safetensors, and GGUF dequantised (`gguf.py`). The checkpoint's generation_config is recorded and
never applied.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging

from harness import tally
from harness.errors import EnvironmentFault, HarnessError, ModelError
from harness.files import check_regular, read_json_object
from harness.models import attend, gguf, shapes
from harness.models.anatomy import Anatomy, PreTrainedModel, close, dissect
from harness.text.words import Vocabulary

transformers_logging.disable_progress_bar()

RANDOM = "random:"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
_HUB_FILES = [*_TOKENIZER_FILES, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
_MOST_TEXT_BYTES = 256_000_000
"""Of a checkpoint's files but its weights; the largest tokenizers known are a tenth of this."""
_MOST_INTEGER = 10**12
_MOST_PARTS = 10_000
"""Layers, heads or experts of a configuration: a thousand times what there is, and little enough to be counted out."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


_GATED = "harness_gate"
_MOST_CHAT_STEPS = 1_000_000
"""Lines of a chat template's program, and of what it calls; those that people publish take some hundreds."""


@lru_cache(maxsize=4)
def _check_template(template: object) -> None:
    """Raises ValueError for powers, TypeError for what is no text: one step of `9 ** 9 ** 9` takes longer than anybody waits."""
    if not isinstance(template, str):
        raise TypeError(f"expected text, found {type(template).__name__}")
    if any((kind, value) == ("operator", "**") for _, kind, value in jinja2.Environment().lex(template)):
        raise ValueError("it raises a number to a power (**)")


@contextmanager
def at_most_steps(limit: int) -> Iterator[None]:
    """Lets the block run that many lines of Python and no more, then raises TimeoutError in it: no clock decides."""
    left, before = limit, sys.gettrace()

    def step(frame: object, event: str, arg: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TimeoutError(f"it has not come to an end in {limit:,} steps")
        return step

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


@dataclass(frozen=True)
class ModelSpec:
    """What to load and how. `dtype` is `auto` (the checkpoint's own) or a torch name; `device` is resolved already."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    random_tokenizer: Path | None = None
    """The tokenizer folder that `random:` shapes borrow; they have none of their own."""
    sha256: str | None = None
    """What a GGUF file has to be, where that is known beforehand."""


@dataclass(frozen=True)
class ModelIdentity:
    """What decides a model's results, and what is worth recording about it. `path` and `about` decide nothing."""

    name: str
    revision: str
    weights_sha256: str
    tokenizer_sha256: str
    config_sha256: str
    dtype: str
    path: Path | None = field(compare=False)
    about: dict = field(compare=False, hash=False)

    @property
    def num_layers(self) -> int:
        """Blocks of the decoder, as the configuration has it."""
        config = self.about["config"]
        config = config.get("text_config", config)
        return int(
            config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"]
        )  # GPT-2 and its kin

    def fingerprint(self) -> dict[str, str]:
        return {
            k: getattr(self, k) for k in ("revision", "weights_sha256", "tokenizer_sha256", "config_sha256", "dtype")
        }


class Codec:
    """A tokenizer with the two calls used here: `encode` a text, `decode` ids without cleaning anything up.

    Special tokens decode to nothing: they are not text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self.all_special_ids: list[int] = list(tokenizer.all_special_ids)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def largest_id(self) -> int:
        """The largest id of its vocabulary, added tokens among them."""
        return max(self.tokenizer.get_vocab().values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without specials; much faster than one by one."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def decode(self, token_ids: Sequence[int]) -> str:
        # The backend itself: called once a token, transformers' wrapper takes ten times as long as the decoding.
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def name_of(self, token_id: int) -> str:
        """A token as the tokenizer's own vocabulary has it; for specials, which decode to nothing."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def context(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a prompt with the specials this tokenizer puts in front, and each token's [start, end) in it."""
        coded = self.tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
        ids, offsets = list(coded["input_ids"]), [(int(a), int(b)) for a, b in coded["offset_mapping"]]
        if ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(str(self.tokenizer.eos_token)):
            ids, offsets = (
                ids[:-1],
                offsets[:-1],
            )  # a tokenizer that closes every text would end the prompt before it is answered
        return ids, offsets

    def chat(self, text: str, system: str = "") -> str:
        """`text` as a user's message in the model's own chat template, up to where the answer begins; behind a system
        message where one is given."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "a prompt in chat form needs a tokenizer with a chat template; this one has none: turn chat off"
            )
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            templates: Any = self.tokenizer.chat_template  # one, or some by name
            for template in templates.values() if isinstance(templates, dict) else [templates]:
                _check_template(template)
            with at_most_steps(_MOST_CHAT_STEPS):
                made: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # a template is a program of somebody else's: it may fail in any way
            raise ModelError(f"the model's chat template cannot be used: {_one_line(e)}; turn chat off") from e
        if system and system.strip() not in made:
            raise ModelError("the model's chat template has no place for a system prompt; leave it out")
        return str(made)

    def chat_context(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `context`, for a text that already holds the template's own specials."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(coded["input_ids"]), [(int(a), int(b)) for a, b in coded["offset_mapping"]]


@dataclass
class LM:
    """A loaded model, its tokenizer and its parts; everything measured here goes through `hidden` and `logits`."""

    model: PreTrainedModel
    codec: Codec
    vocabulary: Vocabulary
    anatomy: Anatomy
    identity: ModelIdentity
    max_positions: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(
        self, token_ids: Int[Tensor, "R T"], layout: attend.Layout, cache: DynamicCache | None = None
    ) -> Float[Tensor, "R T D"]:
        """Final-norm output for every token, seeing what `layout` allows. Appends the tokens to `cache`, where given.

        Where the layout has cells, just those tokens are computed, without padding.
        """
        decoder, cells = self.model.base_model, layout.cells
        before = cache.get_seq_length() if cache is not None else 0
        with attend.use(layout, is_cached=cache is not None):
            output = decoder(
                input_ids=token_ids if cells is None else cells.gather(token_ids),
                position_ids=layout.q_positions if cells is None else cells.gather(layout.q_positions),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        if cache is not None:
            assert cache.get_seq_length() == before + token_ids.shape[1], (
                "a forward must grow the cache by its own tokens"
            )
        return output if cells is None else cells.spread(output)

    def logits(self, hidden: Float[Tensor, "*rows D"], tokens: slice | None = None) -> Float[Tensor, "*rows V"]:
        """The model's own logits for just these rows, in float32 (float64 for a float64 model); of some tokens alone."""
        head = self.anatomy.head
        if tokens is None:
            raw = head(hidden)
        elif type(head) is nn.Linear:
            raw = nn.functional.linear(hidden, head.weight[tokens], None if head.bias is None else head.bias[tokens])
        else:
            raw = head(hidden)[..., tokens]
        raw = self.anatomy.to_logits(raw)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def new_cache(self) -> attend.GridCache:
        """An empty cache for `hidden` to grow."""
        return attend.GridCache()


def identify(spec: ModelSpec) -> ModelIdentity:
    """What `spec` stands for: the resolved revision and hashes. Reads files (and the hub, for an id), loads no weights."""
    if spec.name.startswith(RANDOM):
        return _identify_random(spec)
    if gguf.is_named(spec.name):
        return _identify_gguf(spec)
    folder, revision = _resolve(spec)
    _check_files(folder)
    config = _read_config(folder, spec)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        found = f"only {', '.join(others[:3])}" if others else "no weight file"
        raise ModelError(
            f"{folder}: expected *.safetensors weights, found {found}; convert the checkpoint to safetensors"
        )
    sizes = {p.name: _num_parameters(p) for p in weights}
    _check_promises(folder, config, sizes)
    hashes = {p.name: _file_sha256(p) for p in weights}
    wishes = _read_json(folder / "generation_config.json") or None
    _check_stop_ids(folder, (wishes or {}).get("eos_token_id"))
    return ModelIdentity(
        name=spec.name,
        revision=revision,
        weights_sha256=_digest(hashes),
        tokenizer_sha256=_tokenizer_sha256(folder),
        # Of what a checkpoint wants for generation only the tokens that end a text are heeded, so they count.
        config_sha256=_digest([_config_dict(config), (wishes or {}).get("eos_token_id")]),
        dtype=_resolve_dtype(spec, config),
        path=folder,
        about={
            "config": _config_dict(config),
            "generation_config": wishes,
            "num_parameters": sum(sum(found) for found in sizes.values()),
            "chat_template_sha256": _chat_template_sha256(folder),
            "weight_files": {p.name: {"bytes": p.stat().st_size, "sha256": hashes[p.name]} for p in weights},
        },
    )


def load(spec: ModelSpec, identity: ModelIdentity | None = None) -> LM:
    """The model `spec` names, in eval mode on its device, with its parts found and their identities checked.

    Raises ModelError when a file is missing or an identity does not hold, EnvironmentFault when it does not fit.
    """
    identity = identity or identify(spec)
    dtype = _DTYPES[identity.dtype]
    try:
        if identity.path is None:
            config = shapes.config_of(spec.name.removeprefix(RANDOM))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attend.registered())
        else:
            if gguf.is_named(spec.name):
                config = _gguf_config(gguf.read_header(identity.path))
                model, info = gguf.load_model(identity.path, config, dtype, attend.registered())
            else:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    identity.path,
                    dtype=dtype,
                    attn_implementation=attend.registered(),
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=spec.trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
                model, info = loaded
            # Transformers fills what a checkpoint lacks with random numbers and goes on.
            wrong = sorted(info["missing_keys"]) + [str(m[0]) for m in info["mismatched_keys"]]
            if wrong:
                shown = ", ".join(wrong[:3])
                raise ModelError(f"{spec.name}: {len(wrong)} weights are missing or of another shape, such as {shown}")
        model = model.to(spec.device).eval()  # type: ignore[arg-type]
    except torch.OutOfMemoryError as e:
        raise EnvironmentFault(
            f"{spec.name}: its weights do not fit on {spec.device}; take a smaller model or dtype"
        ) from e
    except HarnessError:
        raise
    except Exception as e:  # transformers fails in any way on a configuration that is not what it expects
        raise ModelError(f"{spec.name}: cannot be loaded: {_one_line(e)}") from e
    model.requires_grad_(False)
    codec = load_codec(spec, identity)
    try:
        return assemble(model, codec, identity)
    except (HarnessError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # weights of another kind than the configuration says fail anywhere in a forward
        raise ModelError(f"{spec.name}: its parts cannot be told apart and checked: {_one_line(e)}") from e


def assemble(model: PreTrainedModel, codec: Codec, identity: ModelIdentity) -> LM:
    """An LM from a model built with the harness attention and its tokenizer; checks the identities (module docstring)."""
    config = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{identity.name}: expected a model with an output head, found none; use a causal language model"
        )
    size = head.weight.shape[0]
    if len(codec) > size:
        raise ModelError(
            f"{identity.name}: the tokenizer has {len(codec)} ids, the model {size}; they do not belong together"
        )
    if (largest := codec.largest_id) >= size:  # ids may have gaps
        raise ModelError(
            f"{identity.name}: the tokenizer gives the id {largest}, the model has {size}; they do not belong together"
        )
    if not codec.encode("Answer", add_special_tokens=False):
        raise ModelError(f"{identity.name}: its tokenizer gives no token for a word; fetch or copy it again")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{identity.name}: its weight {name} holds {parameter.dtype}, expected numbers with a fraction"
            )
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{identity.name}: its weight {name} holds NaN or infinity; fetch or copy it again")
    probe = _probe_ids(size, config, model.device)
    anatomy = dissect(model, probe, identity.name)
    _gate(anatomy)
    _check_attention(model, probe, config, identity.name)
    vocabulary = Vocabulary.of(codec, stop_ids_of(codec, identity), size)
    max_positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20
    return LM(model, codec, vocabulary, anatomy, identity, max_positions)


@lru_cache(maxsize=2)
def shared(spec: ModelSpec, identity: ModelIdentity | None = None) -> LM:
    """As `load`, kept for the stages of one process; holds two models, for experiments that compare a pair."""
    return load(spec, identity)


@lru_cache(maxsize=4)
def load_codec(spec: ModelSpec, identity: ModelIdentity) -> Codec:
    """Just the tokenizer. For `random:` shapes the one in `spec.random_tokenizer`."""
    folder = identity.path or spec.random_tokenizer
    try:
        if identity.path is not None and gguf.is_named(spec.name):
            tokenizer = gguf.load_tokenizer(identity.path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
            )
    except HarnessError:
        raise
    except Exception as e:  # the library's own errors are plain Exceptions
        raise ModelError(f"{spec.name}: expected a tokenizer in {folder}: {_one_line(e)}") from e
    if not tokenizer.is_fast:
        raise ModelError(
            f"{spec.name}: expected a fast tokenizer (tokenizer.json), which gives character offsets; found none"
        )
    return Codec(tokenizer)


_DEQUANTISED = (
    "The weights were rounded to blocks of {types} and are computed with in {dtype}: results are exact for these "
    "dequantised weights, and are not those of the checkpoint that was rounded."
)


def _identify_gguf(spec: ModelSpec) -> ModelIdentity:
    """The file's hash decides weights and tokenizer; the configuration is the one that transformers makes of it."""
    _check_no_revision(spec)
    path = Path(spec.name).expanduser()
    header = gguf.read_header(path)
    config = _gguf_config(header)
    _check_promises(path, config, {path.name: [math.prod(t.shape) for t in header.tensors]})
    stops = gguf.ending_ids(header)
    _check_stop_ids(path, stops)
    sha256 = _file_sha256(path)
    if spec.sha256 not in (None, sha256):
        raise ModelError(
            f"{path}: is damaged: expected sha256 {spec.sha256}, found {sha256}; fetch it again (harness fetch)"
        )
    dtype = "float32" if spec.dtype == "auto" else _resolve_dtype(spec, config)
    types = header.quantised_types
    template = header.settings.get("tokenizer.chat_template")
    return ModelIdentity(
        name=spec.name,
        revision="local",
        weights_sha256=sha256,
        tokenizer_sha256=sha256,
        config_sha256=_digest([_config_dict(config), stops]),
        dtype=dtype,
        path=path,
        about={
            "config": _config_dict(config),
            "generation_config": {"eos_token_id": stops} if stops else None,
            "num_parameters": sum(math.prod(t.shape) for t in header.tensors),
            "chat_template_sha256": _digest(template) if template else None,
            "weight_files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256}},
            "tensor_types": header.num_tensors_by_type,
            "dequantised_from": types,
            "dequantised": _DEQUANTISED.format(types=" and ".join(types), dtype=dtype) if types else None,
        },
    )


@lru_cache(maxsize=2)
def _gguf_config(header: gguf.Header) -> PreTrainedConfig:
    """The configuration in a GGUF file, its numbers checked before anything is built of them."""
    values = gguf.config_values(header)
    _check_numbers(header.path, values)
    _check_stop_ids(header.path, values.get("eos_token_id"))
    try:
        config = AutoConfig.for_model(**values)
    except Exception as e:  # as in _read_config
        raise ModelError(f"{header.path}: its configuration cannot be used: {_one_line(e)}") from e
    gguf.check_heeded(header, config)
    return config


def _identify_random(spec: ModelSpec) -> ModelIdentity:
    shape = spec.name.removeprefix(RANDOM)
    _check_no_revision(spec)
    if shape not in shapes.NAMES:
        raise ModelError(f"model.name: no shape {shape!r}; the shapes are {', '.join(shapes.NAMES)}")
    if spec.random_tokenizer is None or not (spec.random_tokenizer / "tokenizer.json").exists():
        raise ModelError(
            f"{spec.name}: needs a tokenizer to borrow, found none at {spec.random_tokenizer}; set paths.data"
        )
    config = shapes.config_of(shape)
    return ModelIdentity(
        name=spec.name,
        revision="random",
        weights_sha256=f"torch {torch.__version__.split('+')[0]}, torch.manual_seed(0)",
        tokenizer_sha256=_tokenizer_sha256(spec.random_tokenizer),
        config_sha256=_digest(_config_dict(config)),
        dtype=_resolve_dtype(spec, config),
        path=None,
        about={"config": _config_dict(config), "generation_config": None, "weight_files": {}},
    )


def _resolve(spec: ModelSpec) -> tuple[Path, str]:
    """The local folder of a name and its revision; an id is fetched from the hub, or found in its cache when offline."""
    folder = Path(spec.name)
    try:
        folder = folder.expanduser()
        is_folder = bool(spec.name) and folder.is_dir()
    except (OSError, RuntimeError):  # a name too long to be one, a person who has no home
        is_folder = False
    if is_folder:
        _check_no_revision(spec)
        return folder, "local"
    if spec.name.startswith((".", "/", "~")) or not re.fullmatch(
        r"[\w.-]{1,200}(/[\w.-]{1,200})?", spec.name, re.ASCII
    ):
        shown = repr(spec.name if len(spec.name) <= 200 else f"{spec.name[:199]}…")
        raise ModelError(f"model.name: no folder {shown}; give a folder, a hub id (owner/name) or random:<shape>")
    path = _snapshot(spec)
    return path, path.name


def _snapshot(spec: ModelSpec) -> Path:
    """The folder of a hub id at its revision, named by the commit: fetched where missing, from the cache when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(*, offline: bool) -> Path:
        return Path(
            snapshot_download(spec.name, revision=spec.revision, allow_patterns=_HUB_FILES, local_files_only=offline)
        )

    try:
        try:
            return get(offline=False)
        except LocalEntryNotFoundError:
            raise
        except ConnectionError:  # older hub clients do not fall back to the cache by themselves
            return get(offline=True)
    except LocalEntryNotFoundError as e:
        raise ModelError(
            f"model.name: {spec.name!r} is no folder here, is not in the Hugging Face cache, and the hub cannot be reached; "
            "give a folder, or download the model first"
        ) from e
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise ModelError(f"model.name: {spec.name!r} cannot be had from the hub: {_one_line(e)}") from e


def _check_no_revision(spec: ModelSpec) -> None:
    if spec.revision is not None:
        raise ModelError(
            f"model.revision: {spec.revision!r} is given, and {spec.name!r} is no hub id; only what is on the hub has revisions"
        )


def _check_files(folder: Path) -> None:
    """Raises ModelError unless every file that is going to be read is a regular one, and belongs to this model alone."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: expected a model's config.json, found none; is this a checkpoint folder?")
    texts = {".json", ".jinja", ".txt", ".model"}
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        try:
            if path.suffix in texts or path.suffix == ".safetensors":
                check_regular(path, _MOST_TEXT_BYTES if path.suffix in texts else None)
        except OSError as e:
            raise ModelError(f"{path}: cannot be read: {e.strerror}") from e
    if (folder / "adapter_config.json").exists():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{folder}: an adapter of {base!r}, expected a whole model; merge it into its base model and save that"
        )
    for path in sorted(folder.glob("*.safetensors.index.json")):
        named = _read_json(path).get("weight_map")
        for name in named.values() if isinstance(named, dict) else [named]:
            # Only what lies in the folder is hashed, and nothing else may decide results.
            if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
                raise ModelError(
                    f"{path}: expected names of safetensors files in the same folder, found {_shown(name)}"
                )
            if not (folder / name).exists():
                raise ModelError(
                    f"{folder}: {path.name} names the weight file {_shown(name)}, which is missing; fetch it again"
                )
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _read_json(folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in one of a checkpoint's files; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        return read_json_object(path, _MOST_TEXT_BYTES)
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be used: {_one_line(e)}") from e


def _read_config(folder: Path, spec: ModelSpec) -> object:
    raw = _read_json(folder / "config.json")
    _check_numbers(folder / "config.json", raw)
    if raw.get("quantization_config"):
        raise ModelError(
            f"{folder}: quantised weights (quantization_config), which are not supported; use the unquantised model"
        )
    named = raw.get("transformers_weights")
    if named is not None and not (isinstance(named, str) and re.fullmatch(r"[^/]+\.safetensors", named)):
        raise ModelError(
            f"{folder}: config.json names {_shown(named)} as its weights; expected a safetensors file of this folder"
        )
    _check_stop_ids(folder, raw.get("eos_token_id"))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except Exception as e:  # transformers fails in any way on a configuration that is not what it expects
        raise ModelError(f"{folder}: its config.json cannot be used: {_one_line(e)}") from e


def _check_numbers(path: Path, tree: object, where: str = "") -> None:
    """Raises ModelError for numbers that no model has, before lists as long as they are are made of them."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _check_numbers(path, value, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, int) and not isinstance(tree, bool):
        name = where.rsplit(".", 1)[-1]
        counts_parts = re.search(r"(^n|num)_.*(layer|head|expert|block)|^n_?(layer|head)s?$", name) is not None
        least, most = (0, _MOST_PARTS) if counts_parts else (-_MOST_INTEGER, _MOST_INTEGER)
        if name.endswith(("_size", "_dim", "n_embd", "_embeddings")):
            least = 0
        if not least <= tree <= most:
            shown = str(tree) if abs(tree) < 10**30 else "a number of more than 30 digits"
            raise ModelError(f"{path}: {where}: expected {least} to {most:,}, found {shown}")


def _check_stop_ids(folder: Path, ids: object) -> None:
    for found in ids if isinstance(ids, list) else [ids]:
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31):
            raise ModelError(f"{folder}: eos_token_id: expected a token id or a list of them, found {_shown(found)}")


def _check_promises(folder: Path, config: Any, file_to_numels: Mapping[str, Sequence[int]]) -> None:
    """Raises ModelError where a configuration describes a model that its weight files are far too small for.

    Transformers would make what is missing, of any size, before it says that it was.
    """
    numels = [n for found in file_to_numels.values() for n in found]
    decoder = config.get_text_config(decoder=True)
    layers, width, vocabulary = (
        value if isinstance(value := getattr(decoder, name, None), int) else 0
        for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    inner = getattr(decoder, "intermediate_size", None)
    largest = width * max(vocabulary, inner if isinstance(inner, int) else 0)
    for told, promised, there in (("layers", layers, len(numels)), ("numbers in one weight", largest, sum(numels))):
        if promised > there:
            raise ModelError(
                f"{folder}: its configuration wants {promised:,} {told}, and all its weights together are {there:,}; "
                "they do not belong together"
            )


def _resolve_dtype(spec: ModelSpec, config: object) -> str:
    """`auto` is the checkpoint's own dtype on every device: a device must not decide results."""
    wanted = spec.dtype
    if wanted == "auto":
        wanted = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if wanted not in _DTYPES:
        raise ModelError(f"model.dtype: expected one of auto, {', '.join(_DTYPES)}; found {wanted!r}")
    return wanted


def _config_dict(config: object) -> dict:
    """The configuration without what only says who wrote it."""
    values = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    return {
        k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }


def stop_ids_of(codec: Codec, identity: ModelIdentity) -> set[int]:
    """Every id that ends a text: the tokenizer's and the checkpoint's own (an instruct model often has several)."""
    declared: list[Any] = [codec.tokenizer.eos_token_id]
    for source in (identity.about.get("config") or {}, identity.about.get("generation_config") or {}):
        ids = source.get("eos_token_id")
        declared += ids if isinstance(ids, list) else [ids]
    return {int(i) for i in declared if i is not None}


def _gate(anatomy: Anatomy) -> None:
    """Counts the tokens that go through each block, and hands each the tokens that its layer computes (see `cells`)."""
    share = 1 / len(anatomy.blocks)

    def enter(layer: int, _block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        layout = attend.active()
        cut = None if layout is None or layout.cells is None else layout.cells.enter(layer, args, kwargs)
        args, kwargs = cut or (args, kwargs)
        resid = args[0] if args else kwargs["hidden_states"]
        tally.add(resid.shape[0] * resid.shape[1] * share)
        return cut

    for layer, block in enumerate(anatomy.blocks):
        if not hasattr(block, _GATED):  # a model may be assembled twice
            setattr(block, _GATED, block.register_forward_pre_hook(partial(enter, layer), with_kwargs=True))


def _probe_ids(size: int, config: object, device: torch.device) -> Tensor:
    """Two short rows of arbitrary ids, longer than a small sliding window so that a window shows."""
    window = getattr(config, "sliding_window", None) or 0
    length = window + 8 if window <= 256 else 24
    return (torch.arange(2 * length, device=device).reshape(2, length) * 7919 + 13) % size


def _check_attention(model: PreTrainedModel, probe: Tensor, config: object, name: str) -> None:
    """Our attention under a layout must give what the family's own eager attention gives with its own masks."""
    positions = torch.arange(probe.shape[1], device=probe.device).expand_as(probe)
    with torch.no_grad():
        with attend.use(attend.Layout(positions, positions)), attend.watch_windows() as windows:
            ours = model(input_ids=probe, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation("eager")
        try:
            theirs = model(input_ids=probe, position_ids=positions, use_cache=False).logits
        finally:
            model.set_attn_implementation(attend.NAME)
    if not windows:
        raise ModelError(f"{name}: its attention cannot be replaced (it bypasses transformers' attention interface)")
    if not close(
        ours.float() if model.dtype == torch.float32 else ours,
        theirs.float() if model.dtype == torch.float32 else theirs,
    ):
        raise ModelError(
            f"{name}: breaks 'harness attention = eager attention'; its attention has a term that is not known here"
        )
    types = getattr(config, "layer_types", None) or []
    for layer, kind in enumerate(types):
        if kind == "sliding_attention" and windows.get(layer) is None:
            raise ModelError(
                f"{name}: layer {layer} has a sliding window that its attention does not announce; not supported"
            )


def _num_parameters(path: Path) -> list[int]:
    """Numbers in each weight of a file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{path}: not a whole safetensors file: {_one_line(e)}; fetch or copy it again") from e


def _chat_template_sha256(folder: Path) -> str | None:
    """Hash of the chat template, wherever the tokenizer keeps it."""
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return _file_sha256(alone)
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    return _digest(template) if template else None


def _tokenizer_sha256(folder: Path) -> str:
    return _digest({n: _file_sha256(folder / n) for n in _TOKENIZER_FILES if (folder / n).exists()})


def _file_sha256(path: Path) -> str:
    """A file's sha256. In the hub's cache a weight file is a link to a blob that is named by it: no need to read 15 GB."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    said = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(said.split())[:300] or type(error).__name__


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
