"""Other libraries on the same weights, asked for what the fast path measures: whom `harness bench` holds it against.

transformers' `generate` for sampling, nnsight and TransformerLens for the lens and for patching, llama.cpp for sampling from
a GGUF file. Each is used the way its users do, batched where it can be. None is needed: one that is missing, or cannot
take the model, says why in a line. Knows no clock.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from harness.models.anatomy import first_tensor
from harness.models.decode import Sampling
from harness.models.load import LM
from harness.models.patch import Pair
from harness.text.words import Tokens

Hook = Callable[[nn.Module, tuple[Any, ...]], None]


class Asked(NamedTuple):
    """One context whose last token is looked at, and the tokens whose probabilities are added up there."""

    tokens: Tokens
    targets: Tokens


class Absent(Exception):
    """A peer that cannot be held against this model here; the text says why."""


@runtime_checkable
class Library(Protocol):
    """What is asked of an interpretability library on one model."""

    name: str

    def lens(self, asked: Sequence[Asked]) -> list[Float[np.ndarray, " L"]]:
        """The probability of each context's targets by the logit lens, after every block."""
        ...

    def patched(self, pair: Pair, sequences: Sequence[Tokens], layers: Sequence[int]) -> Float[np.ndarray, " N"]:
        """The probability of the sequences together after the pair's target, whose last token has, in one block of
        `layers` after the other, the output that the source's last token has there."""
        ...


def twin(lm: LM, attention: str, at_head: Hook | None = None) -> PreTrainedModel:
    """The same weights, not copied, in modules of their own: what a peer hooks or switches there, ours never meets.

    What passes its blocks is in the tally like everything else; `at_head` is called whenever its head is.
    """
    weights = {id(tensor): tensor for tensor in [*lm.model.parameters(), *lm.model.buffers()]}
    own = copy.deepcopy(lm.model, weights)
    own.set_attn_implementation(attention)
    own.generation_config = GenerationConfig()  # what a checkpoint wishes would be mixed into every call
    head = own.get_output_embeddings()
    assert head is not None, "the model was assembled with one"
    if at_head is not None:
        head.register_forward_pre_hook(at_head)
    return own


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    contexts: Sequence[Tokens],
    num_samples: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
) -> list[Tokens]:
    """transformers' own sampling, all contexts in one left-padded batch: `num_samples` after each, one context after the other.

    The law is that of `decode`, the random numbers are torch's. A sample ends with the token that stopped it.
    """
    width, device = max(map(len, contexts)), model.device
    tokens = torch.tensor([[*[0] * (width - len(c)), *c] for c in contexts], device=device)
    mask = torch.tensor([[*[0] * (width - len(c)), *[1] * len(c)] for c in contexts], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        num_return_sequences=num_samples,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        draw: Any = model.generate  # for a type checker it may be anything that a module holds
        made = draw(input_ids=tokens, attention_mask=mask, generation_config=config)
    return [_up_to_stop(row, stop_ids) for row in made[:, width:].tolist()]


def _up_to_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> Tokens:
    end = next((n for n, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tuple(tokens[: end + 1])


def libraries(lm: LM, at_head: Hook) -> tuple[list[Library], list[str]]:
    """Those that can take this model here, and a line for each that cannot."""
    found: list[Library] = []
    missing = []
    for make in (NNsight, TransformerLens):
        try:
            found.append(make(lm, at_head))
        except Absent as e:
            missing.append(str(e))
    return found, missing


@contextmanager
def willing(name: str) -> Iterator[None]:
    """Whatever a peer raises inside the block is Absent: a library fails in any way on a model it does not know."""
    try:
        yield
    except Exception as e:
        raise Absent(f"{name} is left out: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e


def _imported(module: str, package: str, unused: str) -> Any:
    try:
        return import_module(module)
    except ImportError as e:
        why = "it is not installed" if (e.name or "").split(".")[0] == module.split(".")[0] else f"it lacks {e.name}"
        raise Absent(f"{package} is left out ({unused}): {why}") from e


def _versioned(name: str, package: str) -> str:
    try:
        return f"{name} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # run from its sources
        return name


class NNsight:
    """A trace a batch of contexts; a patched layer is a trace of all its word's spellings.

    A `with` block of a trace is taken as source code and run beside the forward: what leaves it must be saved.
    """

    def __init__(self, lm: LM, at_head: Hook):
        nnsight = _imported("nnsight", "nnsight", "lens, patching")
        self.name = _versioned("nnsight", "nnsight")
        with willing(self.name):
            own = twin(lm, "sdpa", at_head)
            self._save = nnsight.save
            self._model = nnsight.NNsight(own)
            paths = {id(module): path for path, module in lm.model.named_modules()}
            self._blocks = [_at(self._model, paths[id(block)]) for block in lm.anatomy.blocks]
            self._norm, self._head = (_at(self._model, paths[id(m)]) for m in (lm.anatomy.final_norm, lm.anatomy.head))
            self._to_logits = lm.anatomy.to_logits
            self._device = lm.device

    def lens(self, asked: Sequence[Asked]) -> list[Float[np.ndarray, " L"]]:
        save, blocks, norm, head, final = self._save, self._blocks, self._norm, self._head, self._to_logits
        tokens, mask = self._padded([a.tokens for a in asked])
        rows = torch.arange(len(asked), device=self._device)
        last = mask.sum(-1) - 1
        with (
            torch.inference_mode(),
            self._model.trace(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1),
        ):
            lens = save([_masses(final(head(norm(_tensor(b.output)[rows, last]))), asked) for b in blocks])
        return list(np.stack(lens, 1))

    def patched(self, pair: Pair, sequences: Sequence[Tokens], layers: Sequence[int]) -> Float[np.ndarray, " N"]:
        save, blocks = self._save, [self._blocks[layer] for layer in layers]
        source, _ = self._padded([pair.source])
        with torch.inference_mode(), self._model.trace(input_ids=source, use_cache=False, logits_to_keep=1):
            values = save([_tensor(b.output)[0, -1].clone() for b in blocks])
        at = len(pair.target) - 1
        tokens, mask = self._padded([(*pair.target, *s[:-1]) for s in sequences])
        width = tokens.shape[1] - at
        found = []
        for block, value in zip(blocks, values, strict=True):
            with (
                torch.inference_mode(),
                self._model.trace(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=width),
            ):
                _tensor(block.output)[:, at] = value
                logits = save(self._model.output.logits)
            found.append(_together(logits, sequences))
        return np.array(found)

    def _padded(self, texts: Sequence[Tokens]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        width = max(map(len, texts))
        tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in texts], device=self._device)
        mask = torch.tensor([[*[1] * len(t), *[0] * (width - len(t))] for t in texts], device=self._device)
        return tokens, mask


class TransformerLens:
    """The bridge, without any of the rewriting of weights that it offers; a context, or a patched layer's spelling, at a time."""

    def __init__(self, lm: LM, at_head: Hook):
        bridge = _imported("transformer_lens.model_bridge", "TransformerLens", "lens, patching").TransformerBridge
        self.name = _versioned("TransformerLens", "transformer-lens")
        with willing(self.name):
            own = twin(lm, "eager", at_head)
            self._model = bridge.boot_transformers(lm.identity.name, hf_model=own, tokenizer=lm.codec.tokenizer)
            self._names = [f"blocks.{n}.hook_resid_post" for n in range(self._model.cfg.n_layers)]
            self._device = lm.device

    @torch.inference_mode()
    def lens(self, asked: Sequence[Asked]) -> list[Float[np.ndarray, " L"]]:
        found = []
        for one in asked:
            cache = self._look(one.tokens)
            last = torch.cat([cache[name][:, -1:] for name in self._names])
            found.append(_masses(self._model.unembed(self._model.ln_final(last))[:, 0], [one] * len(self._names)))
        return found

    @torch.inference_mode()
    def patched(self, pair: Pair, sequences: Sequence[Tokens], layers: Sequence[int]) -> Float[np.ndarray, " N"]:
        cache, at = self._look(pair.source), len(pair.target) - 1
        found = []
        for name in (self._names[layer] for layer in layers):
            value = cache[name][0, -1]

            def put(resid: Tensor, hook: object, value: Tensor = value) -> Tensor:
                changed = resid.clone()
                changed[0, at] = value
                return changed

            total = 0.0
            for sequence in sequences:
                tokens = torch.tensor([[*pair.target, *sequence[:-1]]], device=self._device)
                logits = self._model.run_with_hooks(tokens, fwd_hooks=[(name, put)])[:, at:]
                total += _together(logits, [sequence])
            found.append(total)
        return np.array(found)

    def _look(self, tokens: Tokens) -> Any:
        return self._model.run_with_cache(
            torch.tensor([tokens], device=self._device), names_filter=lambda name: name in self._names
        )[1]


class LlamaCpp:
    """llama.cpp on the GGUF file itself, in its own quantised arithmetic; it keeps a prompt's cache between samples."""

    def __init__(self, lm: LM, path: Path, num_tokens: int):
        llama_cpp = _imported("llama_cpp", "llama-cpp-python", "sampling")
        self.name = _versioned("llama-cpp-python", "llama-cpp-python")
        with willing(self.name):
            self._model = llama_cpp.Llama(
                str(path),
                n_ctx=num_tokens,
                n_threads=torch.get_num_threads(),
                seed=0,
                verbose=False,
                n_gpu_layers=-1 if lm.device.type == "cuda" else 0,
            )

    def sample(
        self, contexts: Sequence[Tokens], num_samples: int, sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Tokens]:
        """`num_samples` after each context, one context after the other."""
        return [self._one(context, sampling, stop_ids) for context in contexts for _ in range(num_samples)]

    def _one(self, context: Tokens, sampling: Sampling, stop_ids: Sequence[int]) -> Tokens:
        made: list[int] = []
        for token in self._model.generate(
            list(context),
            top_k=0,
            top_p=sampling.top_p,
            min_p=0.0,
            typical_p=1.0,
            temp=sampling.temperature,
            repeat_penalty=1.0,
        ):
            made.append(int(token))
            if token in stop_ids or len(made) == sampling.max_new_tokens:
                break
        return tuple(made)


def _at(model: Any, path: str) -> Any:
    """The part of an nnsight model at a dotted path of torch's."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _tensor(output: Any) -> Tensor:
    tensor = first_tensor(output)
    assert tensor is not None, "a block must give a tensor"
    return tensor


def _masses(logits: Float[Tensor, "B V"], asked: Sequence[Asked]) -> Float[np.ndarray, " B"]:
    """The probability of each row's targets."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return np.array([float(log_p[n, list(a.targets)].double().exp().sum()) for n, a in enumerate(asked)])


def _together(logits: Float[Tensor, "B W V"], sequences: Sequence[Tokens]) -> float:
    """The probability of any of the sequences; row b's logits begin where sequence b's first token is predicted."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    places = [(b, n, token) for b, s in enumerate(sequences) for n, token in enumerate(s)]
    row, column, token = torch.tensor(places, device=logits.device).T
    sums = torch.zeros(len(sequences), dtype=torch.float64, device=logits.device)
    return float(sums.index_add_(0, row, log_p[row, column, token].double()).exp().sum())
