"""Checkpoints in one GGUF file (llama.cpp's format), by transformers' own GGUF support: weights are dequantised at load.

The file is a stranger's: `read_header` bounds every count, length and place in it by the file's own size before anything is
allocated, and only then do the libraries see it. What transformers would skip in silence (a tensor, a setting of the
architecture, a way to split text) is refused by its name. Knows nothing of identities; `load` checks those.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from harness.errors import EnvironmentFault, ModelError
from harness.files import check_regular
from harness.models.anatomy import PreTrainedModel

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "accelerate")
_MOST_STRING_BYTES = 16_000_000  # a chat template has thousands of bytes
_MOST_ELEMENTS = 4_000_000
"""Of all arrays of a file together: its tokens, merges, scores and types; the largest vocabularies have a million of them."""
_MOST_ENTRIES = 100_000  # settings, and tensors
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Ways to split text that take each digit alone and then split as GPT-2 does (llama.cpp, src/llama-vocab.cpp)."""
_AS_GPT2 = {
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "jina-v2-es",
    "jina-v2-de",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
}


class Placed(NamedTuple):
    """One tensor of a file: shape as torch has it, ggml's type, and where its bytes are from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says before its weights, every place in it checked. Of an array of texts `settings` has the length."""

    path: Path
    settings: dict[str, Any] = field(repr=False)
    tensors: tuple[Placed, ...] = field(repr=False)

    @property
    def architecture(self) -> str:
        return self.settings["general.architecture"]

    @property
    def num_tensors_by_type(self) -> dict[str, int]:
        """How many tensors are stored in each of ggml's types, the most frequent first."""
        return dict(Counter(t.kind for t in self.tensors).most_common())

    @property
    def quantised_types(self) -> list[str]:
        """Those of them whose values were rounded to blocks."""
        return [kind for kind in self.num_tensors_by_type if kind not in (*_PLAIN_TYPES, "BF16")]


def is_named(name: str) -> bool:
    """Whether a model's name means a GGUF file, there or not."""
    try:
        return name.lower().endswith(SUFFIX) and not Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def read_header(path: Path) -> Header:
    """The header of a GGUF file; the same one again while the file does not change.

    Raises ModelError for what is no whole GGUF file of one model, EnvironmentFault where the packages to read it are missing.
    """
    try:
        check_regular(path)
        found = path.stat()
    except OSError as e:
        raise ModelError(f"{path}: cannot be read as a GGUF file: {e.strerror}") from e
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(
            f"{path}: a GGUF file needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
            "pip install 'harness[gguf]'"
        )
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name, re.IGNORECASE):
        raise ModelError(
            f"{path}: one of several parts, which are not supported; merge them (llama-gguf-split --merge)"
        )
    return _read_header(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=2)
def _read_header(path: Path, size: int, *_changes_with_the_file: int) -> Header:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Bytes(path, content, min(size, len(content))).header()
    except (OSError, ValueError, struct.error) as e:
        raise ModelError(f"{path}: not a whole GGUF file: {e}; fetch or copy it again") from e


class _Bytes:
    """Reads a GGUF header from front to back. Raises ValueError for what leaves the file or the limits of this module."""

    def __init__(self, path: Path, content: mmap.mmap, size: int):
        self._path, self._content, self._size = path, content, size
        self._at = 0
        self._elements = 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise ValueError("expected the letters GGUF at its start")
        version = self._number("I")
        if version not in (2, 3):
            big_endian = " (written for a big-endian machine?)" if version & 0xFFFF == 0 and version else ""
            raise ValueError(f"expected version 2 or 3, found {version}{big_endian}")
        num_tensors, num_settings = self._count(), self._count()
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            key = self._text()
            if key in settings:
                raise ValueError(f"the setting {key[:100]!r} is there twice")
            settings[key] = self._value(self._number("I"))
        if not isinstance(settings.get("general.architecture"), str):
            raise ValueError("it names no architecture (general.architecture)")  # noqa: TRY004
        if settings.get("general.type", "model") != "model":
            raise ValueError(f"it is no model but of the kind {settings['general.type']!r:.100}")
        if settings.get("split.count", 0) not in (0, 1):
            raise ValueError(f"one of {settings['split.count']} parts, which are not supported; merge them")
        return Header(self._path, settings, self._tensors(num_tensors, settings))

    def _tensors(self, number: int, settings: Mapping[str, Any]) -> tuple[Placed, ...]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        told: list[tuple[str, tuple[int, ...], str, int, int]] = []
        for _ in range(number):
            name = self._text()
            num_dimensions = self._number("I")
            if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"the tensor {name[:100]!r} has {num_dimensions} dimensions")
            shape = tuple(reversed([self._number("Q") for _ in range(num_dimensions)]))
            number_of_kind, offset = self._number("I"), self._number("Q")
            try:
                kind = GGMLQuantizationType(number_of_kind)
            except ValueError:
                raise ValueError(f"the tensor {name[:100]!r} is of the unknown type {number_of_kind}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block or 0 in shape:
                raise ValueError(f"the tensor {name[:100]!r} of shape {shape} cannot be of the type {kind.name}")
            told.append((name, shape, kind.name, offset, math.prod(shape) // block * block_bytes))
        alignment = settings.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MOST_ALIGNMENT:
            raise ValueError(f"general.alignment: expected 1 to {_MOST_ALIGNMENT}, found {alignment!r:.100}")
        start = -(-self._at // alignment) * alignment
        tensors = tuple(Placed(n, shape, kind, start + offset, size) for n, shape, kind, offset, size in told)
        self._check_places(tensors, start)
        return tensors

    def _check_places(self, tensors: tuple[Placed, ...], start: int) -> None:
        """Every tensor has bytes of its own in the file: none can be made to stand for many."""
        if len({t.name for t in tensors}) < len(tensors):
            raise ValueError("two of its tensors have the same name")
        end, before = start, ""
        for tensor in sorted(tensors, key=lambda t: t.start):
            if tensor.start < end and before:
                raise ValueError(f"its tensors {before[:100]!r} and {tensor.name[:100]!r} overlap")
            end, before = tensor.start + tensor.num_bytes, tensor.name
            if end > self._size:
                raise ValueError(
                    f"its tensor {tensor.name[:100]!r} would end at byte {end:,}, and the file has {self._size:,}"
                )

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a setting is of the unknown type {kind}")
        kind, length = self._number("I"), self._number("Q")
        if kind not in (*_SCALARS, _STRING):
            raise ValueError(f"an array holds values of the type {kind}, expected numbers or texts")
        self._elements += length
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(f"its arrays have more than {_MOST_ELEMENTS:,} elements")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._number("Q"))
            return _Length(length)
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{length}{code}", self._take(length * struct.calcsize(f"<{code}"))))

    def _text(self) -> str:
        length = self._number("Q")
        if length > _MOST_STRING_BYTES:
            raise ValueError(f"a text of {length:,} bytes, expected at most {_MOST_STRING_BYTES:,}")
        return self._take(length).decode()

    def _count(self) -> int:
        count = self._number("Q")
        if count > _MOST_ENTRIES:
            raise ValueError(f"{count:,} settings or tensors, expected at most {_MOST_ENTRIES:,}")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, length: int) -> bytes:
        start = self._at
        self._skip(length)
        return self._content[start : self._at]

    def _skip(self, length: int) -> None:
        if length > self._size - self._at:
            raise ValueError(f"it ends at byte {self._size:,}, in the middle of its header")
        self._at += length


# ---- what transformers makes of it


def config_values(header: Header) -> dict[str, Any]:
    """The configuration as transformers reads it from the file, as values that nothing has been built of yet.

    Raises ModelError for an architecture that transformers cannot map.
    """
    _check_splitting(header)
    with _parsed_once(header):
        try:
            values, _ = PreTrainedConfig.get_config_dict(
                str(header.path.parent), gguf_file=_name(header.path), local_files_only=True
            )
        except Exception as e:  # transformers fails in any way on what it does not expect
            if re.search(r"architecture.*not supported", str(e)):
                raise ModelError(
                    f"{header.path}: its architecture {header.architecture!r:.100} is none that transformers can read from "
                    "GGUF; use the model's safetensors checkpoint"
                ) from e
            told = " ".join(str(e).split())[:300] or type(e).__name__
            raise ModelError(f"{header.path}: its settings cannot be used: {told}") from e
    return values


def check_heeded(header: Header, config: Any) -> None:
    """Raises ModelError for a setting of the architecture that transformers leaves aside, unless `config` says the same."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    decoder = config.get_text_config(decoder=True)
    mapping = GGUF_CONFIG_MAPPING.get(decoder.model_type.removesuffix("_text"), {})
    prefix = f"{header.architecture}."
    for key, value in header.settings.items():
        setting = key.removeprefix(prefix)
        if not key.startswith(prefix) or mapping.get(setting) is not None:
            continue
        same = _SAID_OTHERWISE.get(setting)
        if same is None or not _is_close(same(decoder), value):
            raise ModelError(
                f"{header.path}: transformers does not heed its setting {key[:100]} = {value!r:.100}, so results would not "
                "be the model's; use its safetensors checkpoint"
            )


def _head_dim(config: Any) -> Any:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_dim(config: Any) -> Any:
    rope = getattr(config, "rope_parameters", None) or {}
    return _head_dim(config) * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)


def _attribute(name: str, config: Any) -> Any:
    return getattr(config, name, None)


_SAID_OTHERWISE: dict[str, Callable[[Any], Any]] = {
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "rope.dimension_count": _rotary_dim,
    "rope.scaling.type": lambda _: "none",
    "rope.scaling.finetuned": lambda _: False,
    "attention.causal": lambda _: True,
    "attn_logit_softcapping": partial(_attribute, "attn_logit_softcapping"),
    "final_logit_softcapping": partial(_attribute, "final_logit_softcapping"),
    "attention.sliding_window": partial(_attribute, "sliding_window"),
    "vocab_size": partial(_attribute, "vocab_size"),
}
"""Settings that transformers has no entry for, and what its configuration says of the same thing."""


def _is_close(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file holds, its chat template with it."""
    header = read_header(path)
    _check_splitting(header)
    with _parsed_once(header):
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=_name(path), local_files_only=True, clean_up_tokenization_spaces=False
        )
    if header.settings.get("tokenizer.ggml.pre") in _DIGITS_APART:  # which transformers splits as GPT-2 does
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _check_splitting(header: Header) -> None:
    """Raises ModelError for a byte-level vocabulary whose way to split text is not known: ids would not be the model's."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, way = (header.settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    known = _DIGITS_APART | _AS_GPT2 | set(GGUF_PRE_TOKENIZER_SPLITS)
    if kind == "gpt2" and way is not None and way not in known:
        raise ModelError(
            f"{header.path}: its tokenizer splits text in a way that is not known here (tokenizer.ggml.pre = "
            f"{way!r:.100}); use the model's safetensors checkpoint"
        )


def ending_ids(header: Header) -> list[Any]:
    """Ids that end a turn or a message, beside the tokenizer's own end of text (which the configuration has)."""
    names = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return [header.settings[name] for name in names if name in header.settings]


def load_model(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, dict]:
    """The model with its weights dequantised to `dtype`, and what transformers says of its loading (missing keys).

    Raises ModelError for a tensor that has no place in the model: transformers would leave it out in silence.
    """
    from transformers import GgufConfig
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    header = read_header(path)
    with _parsed_once(header):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=_name(path),
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, info = loaded
        processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
        places = get_gguf_hf_weights_map(model, processor)
    apart = {"output.weight"} if header.architecture == "gpt2" else set()  # which transformers places by itself
    homeless = [t.name for t in header.tensors if t.name not in places and t.name not in apart]
    if homeless:
        raise ModelError(
            f"{path}: {len(homeless)} of its tensors have no place in transformers' {config.model_type} model, such as "
            f"{', '.join(homeless[:3])[:200]}, so results would not be the model's; use its safetensors checkpoint"
        )
    return model, info


def _name(path: Path) -> str:
    return str(path.absolute())  # a bare name is first looked for in the working folder


@contextmanager
def _parsed_once(header: Header) -> Iterator[None]:
    """Inside, transformers takes its GGUF reader's answers from `header`, and gguf's table of tensor names is made once.

    By itself it has the file parsed by `GGUFReader` three times (numpy objects for each of 98,000 strings, 3 s a time for a
    vocabulary of 49,152) and makes that table once a module (397 times for 30 layers, 6 s). Values are the same, a test
    compares them.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as legacy

    with ExitStack() as stack:
        stack.enter_context(patch.object(gguf, "GGUFReader", lambda _: _as_reader(header)))
        stack.enter_context(patch.object(gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)))
        stack.enter_context(patch.object(legacy, "tqdm", lambda tensors, **_: tensors))  # a bar among our lines
        yield


def _as_reader(header: Header) -> Any:
    """What `gguf.GGUFReader` would give, as far as transformers asks: fields of the settings, tensors with their data."""
    fields = {key: _as_field(key, value) for key, value in header.settings.items()}
    return SimpleNamespace(fields=fields, tensors=_Tensors(header))


def _as_field(key: str, value: Any) -> Any:
    """A setting as the parts, places of data and types that a `gguf.ReaderField` has.

    Of a vocabulary only the size is asked for here; its tokens, merges and scores transformers reads by another reader.
    """
    length = value if isinstance(value, _Length) else len(value) if isinstance(value, list) else None
    if length is not None and (isinstance(value, _Length) or key.startswith("tokenizer.")):
        return SimpleNamespace(parts=_Blanks(), data=range(length), types=[_ARRAY, _STRING])
    if isinstance(value, str):
        return SimpleNamespace(parts=[value.encode()], data=[0], types=[_STRING])
    if isinstance(value, list):
        kind = _kind_of(value[0]) if value else _STRING
        return SimpleNamespace(parts=[[v] for v in value], data=range(len(value)), types=[_ARRAY, kind])
    return SimpleNamespace(parts=[[value]], data=[0], types=[_kind_of(value)])


def _kind_of(value: bool | int | float) -> int:
    return 7 if isinstance(value, bool) else 11 if isinstance(value, int) else 12


class _Length(int):
    """The number of texts in an array whose texts nobody asked for."""


class _Blanks:
    """Elements of an array of which only the number counts."""

    def __getitem__(self, index: int) -> bytes:
        return b""


class _Tensors:
    """A file's tensors with their data, mapped and not read; as often as they are asked for."""

    def __init__(self, header: Header):
        self._header = header

    def __iter__(self) -> Iterator[Any]:
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        content = np.memmap(self._header.path, mode="r")
        for tensor in self._header.tensors:
            kind = GGMLQuantizationType[tensor.kind]
            data = content[tensor.start : tensor.start + tensor.num_bytes]
            if plain := _PLAIN_TYPES.get(tensor.kind):
                data = data.view(plain).reshape(tensor.shape)
            else:
                data = data.reshape(quant_shape_to_byte_shape(tensor.shape, kind))
            yield SimpleNamespace(name=tensor.name, tensor_type=kind, data=data)
