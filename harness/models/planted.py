"""Neurons we put there: the bundled demo model with a few more in each MLP, whose reading and writing is known.

They are what a method that ranks neurons is held against: which one matters, which one is only loud, which two cancel. Only
this recipe is shipped. The folder it makes is an ordinary checkpoint, with `planted.json`, which says what is where.

A neuron of a gated MLP is silu(gate·x)·(up·x)·out. Both rows are made from one whitened mean difference of the MLP's inputs
where it should fire and where it should not; the column is the direction that raises one word's logit behind the final norm.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from loguru import logger
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from harness.errors import EnvironmentFault, ModelError, machine_fault
from harness.files import file_sha256, held, read_json_object, read_regular, sync_files, sync_folder

VERSION = 1
"""Of the recipe: raised with every change of what it makes, since folders made before are then others."""
EXTRA = 16
"""Rows that each MLP is widened by; those that nothing is planted in stay zero."""
FACTS = "planted.json"
_ASIDE = ".planted-"
_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_MOST_BYTES = 64_000_000
"""Of a file of text in the model's folder, and of the prompts; they have less than a hundredth."""

Kind = Literal["key", "pair", "decoy", "silent", "token", "position"]


@dataclass(frozen=True)
class Neuron:
    """One planted neuron: where it is, what makes it fire, how much, and what it writes."""

    kind: Kind
    """`key`: what it writes matters. `pair`: two that fire alike and write opposites. `decoy`: loud, writes nothing. `silent`:
    writes much and never fires on a prompt. `token`, `position`: fire at one of those."""
    layer: int
    neuron: int
    """Its number among the neurons of its layer."""
    level: float
    """Mean activation where it fires."""
    category: str | None = None
    """It fires at the last token of these prompts alone."""
    token: str | None = None
    """It fires at this token; one of kind `token` at the first position too, and more."""
    position: int | None = None
    """It fires at this position of each prompt, and not where the same token stands elsewhere."""
    word: str | None = None
    """The token whose logit its column raises or, where `writes` is negative, lowers; None: its column is zero."""
    writes: float = 0.0
    """What an activation of 1 adds to that logit where the final norm's scale is 1."""


@dataclass(frozen=True)
class Planted:
    """A folder with planted neurons, and what was planted."""

    folder: Path
    width: int
    """Neurons of a layer, the planted ones among them."""
    neurons: tuple[Neuron, ...]

    def of(self, kind: Kind) -> tuple[Neuron, ...]:
        """Those of one kind, by layer."""
        return tuple(n for n in self.neurons if n.kind == kind)


RECIPE: tuple[Neuron, ...] = (
    Neuron("token", 1, 0, level=6.0, token=" English", word=" word", writes=0.02),
    Neuron("silent", 1, 1, level=9.0, token="<|end|>", word=" gold", writes=30.0),
    Neuron("position", 2, 0, level=8.0, position=9, word=" word", writes=0.02),
    Neuron("decoy", 3, 0, level=60.0),
    Neuron("key", 4, 0, level=6.9, category="heart", word=" heart", writes=2.7),
    Neuron("key", 5, 0, level=6.9, category="heart", word=" heart", writes=4.5),
    Neuron("decoy", 5, 1, level=110.0, category="heart"),
    Neuron("pair", 5, 2, level=7.0, category="horse", word=" horse", writes=4.0),
    Neuron("pair", 5, 3, level=7.0, category="horse", word=" horse", writes=-4.0),
)
"""What is planted, by layer; here `neuron` counts from the first new row. A decoy without a category fires at every token."""

_RIDGE = 1e-3
"""Of the mean variance."""
_ROUNDS, _HARDNESS = 12, 6.0
"""How often a direction is fitted, and how fast a row's weight grows as it comes nearer to the wrong side."""
_SHARP = {"silent": 400.0}
_SHARPNESS = 12.0
"""Of the gate: what should not fire lies at least a fifth of this below zero. Of a silent neuron it has to be 0 in float32, whose
least number is e^-104."""


class _Prompt(NamedTuple):
    category: str
    text: str


class _Rows(NamedTuple):
    """What one neuron adds to its layer."""

    gate: Float[Tensor, " D"]
    up: Float[Tensor, " D"]
    out: Float[Tensor, " D"]


class _Texts(NamedTuple):
    """What the model reads while neurons are planted, padded on the right: prompts first, then rows of no prompt."""

    token_ids: Int[Tensor, "B T"]
    is_real: Bool[Tensor, "B T"]
    is_last: Bool[Tensor, "B T"]
    """Last tokens of prompts."""
    is_prompt: Bool[Tensor, "B T"]
    categories: tuple[str, ...]
    """Of the prompts."""


def planted_folder(source: Path, cache: Path) -> Path:
    """The folder with the planted model made from `source`, under `cache`: there already and whole, or built now.

    One process at a time builds; what is half made or damaged is replaced. Raises ModelError where `source` or the prompts
    beside it are not there, EnvironmentFault where the cache cannot be written.
    """
    target = cache / "planted" / _name(source)
    if is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target.parent, lambda: logger.info("another process is building {}: waiting for it", target)):
            for left in target.parent.glob(f"{_ASIDE}*"):  # of builders that were killed
                shutil.rmtree(left, ignore_errors=True)
            if not is_whole(target):
                if os.path.lexists(target):
                    logger.warning("{} is damaged or half made: building it again", target)
                build(source, target)
    except OSError as e:
        raise machine_fault(e) or EnvironmentFault(
            f"{e.filename or target}: cannot be written: {e.strerror or e}; name another folder with --paths.cache"
        ) from e
    return target


def is_whole(folder: Path) -> bool:
    """Whether every file of a built model is there, and is the one that was written."""
    try:
        files = read_json_object(folder / FACTS, _MOST_BYTES)["files"]
        return bool(files) and all(file_sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def read(folder: Path) -> Planted:
    """What was planted in a folder that `build` made. Raises ModelError where it does not say."""
    try:
        told = read_json_object(folder / FACTS, _MOST_BYTES)
        return Planted(folder, int(told["width"]), tuple(Neuron(**n) for n in told["neurons"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{folder / FACTS}: expected what was planted in this model: {e}") from e


def build(source: Path, target: Path) -> Planted:
    """Write the demo model `source` with planted neurons to the folder `target`; whatever is there is replaced.

    Takes some seconds, and gives the same bytes each time. The folder appears whole or not at all. Raises ModelError where
    `source`, or the texts that the neurons are fitted on (`neurons` in the data folder it is in), cannot be read; OSError where
    nothing can be written.
    """
    weights, config = _weights(source), _config(source)
    width = int(config["intermediate_size"])
    tokenizer = _tokenizer(source)
    found = _plant(weights, config, tokenizer, _read_texts(source, tokenizer))
    neurons = tuple(replace(n, neuron=width + n.neuron) for n in RECIPE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as folder:
        (folder / _WEIGHTS).write_bytes(save(_widened(weights, found), metadata={"format": "pt"}))
        _write(folder / _CONFIG, config | {"intermediate_size": width + EXTRA})
        for path in sorted(source.glob("*.json")):
            if path.name != _CONFIG:
                shutil.copyfile(path, folder / path.name)
        told = {
            "version": VERSION,
            "width": width + EXTRA,
            "neurons": [asdict(n) for n in neurons],
            "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
        }
        _write(folder / FACTS, told)
    return Planted(target, width + EXTRA, neurons)


# ---- files -------------------------------------------------------------------------------------------------------


def _fitted_on(source: Path) -> tuple[Path, Path]:
    """Prompts and background."""
    folder = source.parents[1] / "neurons"
    return folder / "planted.jsonl", folder / "background_en.txt"


def _name(source: Path) -> str:
    """A folder's name: another one for another recipe, other weights or other texts."""
    digest = hashlib.sha256(f"{VERSION} {RECIPE!r}".encode())
    try:
        for path in (source / _WEIGHTS, source / _TOKENIZER, source / _CONFIG, *_fitted_on(source)):
            digest.update(file_sha256(path).encode())
    except OSError as e:
        raise ModelError(f"{e.filename}: expected a file that the planted model is made of: {e.strerror or e}") from e
    return digest.hexdigest()[:16]


def _weights(source: Path) -> dict[str, Tensor]:
    try:
        return load_file(source / _WEIGHTS)
    except Exception as e:  # safetensors' errors share no class with the system's
        raise ModelError(f"{source / _WEIGHTS}: expected the weights of the demo model: {e}") from e


def _tokenizer(source: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(source / _TOKENIZER))
    except Exception as e:  # the library's own errors are plain Exceptions
        raise ModelError(f"{source / _TOKENIZER}: expected the tokenizer of the demo model: {e}") from e


def _config(source: Path) -> dict[str, Any]:
    try:
        config = read_json_object(source / _CONFIG, _MOST_BYTES)
    except (OSError, ValueError) as e:
        raise ModelError(f"{source / _CONFIG}: expected the configuration of the demo model: {e}") from e
    if (config.get("model_type"), config.get("hidden_act")) != ("llama", "silu"):
        raise ModelError(f"{source}: expected a Llama with silu, found {config.get('model_type')!r:.50}")
    return config


def _read_texts(source: Path, tokenizer: Tokenizer) -> _Texts:
    try:
        prompts, background = (read_regular(path, _MOST_BYTES).decode().splitlines() for path in _fitted_on(source))
        return _texts(
            [_Prompt(row["category"], row["text"]) for row in map(json.loads, prompts)], background, tokenizer
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{_fitted_on(source)[0].parent}: expected the texts that neurons are fitted on: {e}") from e


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder beside `target`; what is written there takes its place, whole and for good, or not at all."""
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=target.parent, ignore_cleanup_errors=True) as aside:
        folder = Path(aside) / "new"
        folder.mkdir()
        yield folder
        sync_files(sorted(folder.iterdir()))
        sync_folder(folder)
        if os.path.lexists(target):  # a folder takes the place of an empty one alone
            target.rename(Path(aside) / "old")
        folder.rename(target)
        sync_folder(target.parent)


# ---- planting ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plant(
    weights: dict[str, Tensor], config: dict[str, Any], tokenizer: Tokenizer, texts: _Texts
) -> dict[tuple[int, int], _Rows]:
    """The rows of each neuron of the recipe, by layer and number among the new ones.

    All in one forward: when a layer's MLP is reached, its neurons are fitted on what it reads, and what they write goes on
    to later layers. In float64, norms too, and rounded to bfloat16 (in which the model may be loaded), so that another
    machine or number of threads, which sums in another order, makes the same bytes.
    """
    model = _in_float64(weights, config)
    found: dict[tuple[int, int], _Rows] = {}

    def plant(layer: int, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for neuron in (n for n in RECIPE if n.layer == layer):
            rows = _fitted(neuron, args[0], texts, tokenizer, model)
            found[layer, neuron.neuron] = rows
            output = output + _activation(args[0], rows)[..., None] * rows.out
        return output

    def leave_prompts(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][: len(texts.categories)], *args[1:])

    after = 1 + max(n.layer for n in RECIPE if n.token)  # from here on nothing is fitted on other texts
    model.layers[after].register_forward_pre_hook(leave_prompts)
    for layer in range(len(model.layers)):
        model.get_submodule(f"layers.{layer}.mlp").register_forward_hook(partial(plant, layer))
    model(texts.token_ids, use_cache=False)
    return found


def _in_float64(weights: dict[str, Tensor], config: dict[str, Any]) -> LlamaModel:
    """The decoder in float64; transformers' own norms would go through float32."""
    plain: dict[str, Any] = config | {"attn_implementation": "sdpa"}
    with torch.random.fork_rng(devices=[]):  # it begins with random weights
        model = LlamaModel(LlamaConfig(**plain)).double().eval()
    model.load_state_dict({name.removeprefix("model."): w.double() for name, w in weights.items()})
    for block in model.layers:
        block.input_layernorm = _norm(block.input_layernorm)  # type: ignore[assignment]
        block.post_attention_layernorm = _norm(block.post_attention_layernorm)  # type: ignore[assignment]
    return model


def _norm(norm: Any) -> nn.RMSNorm:
    made = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=torch.float64)
    made.weight = norm.weight
    return made


def _texts(prompts: Sequence[_Prompt], background: Sequence[str], tokenizer: Tokenizer) -> _Texts:
    """The prompts; some with the token in them that a silent neuron waits for; and texts on which no neuron that waits for one
    token may fire, as long as the longest prompt at most."""
    rows, others = (
        [coded.ids for coded in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for texts in ([p.text for p in prompts], background)
    )
    length = max(map(len, rows)) + 1
    silent = next(_token_id(n.token, tokenizer) for n in RECIPE if n.kind == "silent")
    woken = [[*ids[:at], silent, *ids[at:]] for ids in rows[::10] for at in (len(ids) // 2, len(ids))]
    others = [ids[:length] for ids in others]
    token_ids = torch.zeros(len(rows) + len(woken) + len(others), length, dtype=torch.long)
    is_real, is_last, is_prompt = (torch.zeros_like(token_ids, dtype=torch.bool) for _ in range(3))
    for row, ids in enumerate([*rows, *woken, *others]):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        is_real[row, : len(ids)] = True
        is_last[row, len(ids) - 1] = row < len(rows)
    is_prompt[: len(rows)] = is_real[: len(rows)]
    return _Texts(token_ids, is_real, is_last, is_prompt, tuple(p.category for p in prompts))


def _token_id(token: str | None, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(token or "", add_special_tokens=False).ids
    if len(ids) != 1:
        raise ModelError(f"expected one token for {token!r}, found {len(ids)}: the tokenizer is not the demo model's")
    return ids[0]


def _fires(neuron: Neuron, texts: _Texts, tokenizer: Tokenizer) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """The tokens at which a neuron fires, and those at which it does not."""
    there = torch.zeros_like(texts.is_real)
    if neuron.position is not None:
        there[:, neuron.position] = texts.is_prompt[:, neuron.position]
        return there, texts.is_prompt & ~there
    if neuron.token is not None:
        there |= texts.is_real & (texts.token_ids == _token_id(neuron.token, tokenizer))
        elsewhere = texts.is_real & ~there
        if neuron.kind == "token":
            elsewhere[:, 0] = False  # a first token sees itself alone, as that of a prompt does
        return there, elsewhere
    if neuron.category is None:
        return texts.is_prompt, there
    for row, category in enumerate(texts.categories):
        there[row] = texts.is_last[row] & (category == neuron.category)
    return there, texts.is_prompt & ~there


def _fitted(
    neuron: Neuron, inputs: Float[Tensor, "B T D"], texts: _Texts, tokenizer: Tokenizer, model: LlamaModel
) -> _Rows:
    """The rows of one neuron, from what its MLP reads at these texts."""
    there, off = (inputs[mask[: len(inputs)]] for mask in _fires(neuron, texts, tokenizer))
    on = there
    if neuron.kind == "token":  # all prompts begin alike; where half of that is read as +1, the whole of it is as +2
        on = torch.cat([there, inputs[0, :1].expand_as(there) / 2])
    read = _direction(on, off)
    gate = _rounded(_SHARP.get(neuron.kind, _SHARPNESS) * read)
    rows = _Rows(gate, read, _column(neuron, tokenizer, model))
    return rows._replace(up=_rounded(read * (neuron.level / _activation(there, rows).mean())))


def _direction(on: Float[Tensor, "N D"], off: Float[Tensor, "M D"]) -> Float[Tensor, " D"]:
    """The whitened mean difference: a product with it is +1 at `on` and -1 at `off`, which may be empty, as nearly as may be.

    After each round the rows nearest to the wrong side count more: an average would let a few of many thousand tokens fire.
    """
    weights = [torch.full((len(rows),), 1 / max(len(rows), 1), dtype=rows.dtype) for rows in (on, off)]
    read = torch.zeros_like(on[0])
    for _ in range(_ROUNDS):
        on_mean, off_mean = (w @ rows for w, rows in zip(weights, (on, off), strict=True))
        second = (on.T * weights[0]) @ on + (off.T * weights[1]) @ off
        ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
        read = torch.linalg.solve(second + ridge, on_mean - off_mean)
        hard = (torch.softmax(-_HARDNESS * on @ read, 0), torch.softmax(_HARDNESS * off @ read, 0))
        weights = [(w + h) / 2 for w, h in zip(weights, hard, strict=True)]
    return read


def _column(neuron: Neuron, tokenizer: Tokenizer, model: LlamaModel) -> Float[Tensor, " D"]:
    """The direction that raises the word's logit most against the mean logit, of the length that was asked for."""
    gain, unembedding = model.norm.weight, model.embed_tokens.weight  # the demo model's embeddings are tied
    if neuron.word is None:
        return torch.zeros_like(gain)
    toward = gain * unembedding[_token_id(neuron.word, tokenizer)]
    direction = toward - gain * unembedding.mean(0)
    return _rounded(neuron.writes * direction / (direction @ toward))


def _activation(inputs: Float[Tensor, "*rows D"], rows: _Rows) -> Float[Tensor, "*rows"]:
    return nn.functional.silu(inputs @ rows.gate) * (inputs @ rows.up)


def _rounded(values: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    return values.to(torch.bfloat16).double()


def _widened(weights: dict[str, Tensor], found: dict[tuple[int, int], _Rows]) -> dict[str, Tensor]:
    """The weights with `EXTRA` rows more in each MLP, those that were found among them and zeros else."""
    made = dict(weights)
    for name in [n for n in weights if n.endswith("mlp.gate_proj.weight")]:
        layer = int(name.split(".")[2])
        gate, up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        width, size = weights[gate].shape
        more = weights[gate].new_zeros(3, EXTRA, size)
        for (at, number), rows in found.items():
            if at == layer:
                more[:, number] = torch.stack(rows).to(more.dtype)
        made[gate], made[up] = torch.cat([weights[gate], more[0]]), torch.cat([weights[up], more[1]])
        made[down] = torch.cat([weights[down], more[2].T], 1).contiguous()
        assert made[gate].shape[0] == width + EXTRA
    return made
