"""The deliberately plain reference: one prompt at a time, no padding, no cache, eager attention, full logits.

Written to be checked by eye and slow on purpose. The tests, `harness sanity` and `harness bench` hold the fast paths
against it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from harness.models import attend
from harness.models.anatomy import first_tensor, record_outputs
from harness.models.decode import Completion, Request, Sampling, sample
from harness.models.inside import Probe
from harness.models.load import LM
from harness.models.patch import Pair


@contextmanager
def eager(lm: LM) -> Iterator[None]:
    """The family's own eager attention for the time of the block."""
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(attend.NAME)


@torch.inference_mode()
def next_logits(lm: LM, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
    """Logits after every token of one text, by a plain Hugging Face call; float32, or float64 of a float64 model."""
    with eager(lm):
        logits = lm.model(input_ids=torch.tensor([list(token_ids)], device=lm.device), use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sequence_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln P(sequence | context), one forward of context + sequence."""
    log_p = next_logits(lm, [*context, *sequence]).log_softmax(-1).double()
    at = range(len(context) - 1, len(context) + len(sequence) - 1)
    return float(sum(log_p[i, token] for i, token in zip(at, sequence, strict=True)))


def word_end_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln of the mass of next tokens that end a word, after context + sequence."""
    p = next_logits(lm, [*context, *sequence])[-1].softmax(-1).double()
    return float(p[torch.from_numpy(lm.vocabulary.ends_word).to(p.device)].sum().log())


def complete(lm: LM, request: Request, sampling: Sampling) -> Completion:
    """One completion, the whole text forwarded again for every token."""
    done = Completion()
    key: Int[Tensor, " 1"] = torch.tensor([request.key], dtype=torch.long, device=lm.device)
    for step in range(sampling.max_new_tokens):
        logits = next_logits(lm, [*request.context, *done.token_ids])[-1:]
        token = int(logits.argmax() if sampling.temperature == 0 else sample(logits, key, step, sampling))
        best = logits[0].topk(2).values
        logprob, margin = float(logits.log_softmax(-1)[0, token]), float(best[0] - best[1])
        if not done.append(token, logprob, margin, lm.vocabulary, sampling.stop_at_newline):
            break
    return done


def attention_rows(lm: LM, token_ids: Sequence[int], at: int) -> Float[np.ndarray, "L H S"]:
    """Every head's attention row of one token, out of the full maps that Hugging Face returns."""
    with torch.inference_mode(), eager(lm):
        maps = lm.model(input_ids=_row(lm, token_ids), use_cache=False, output_attentions=True).attentions
    return np.stack([m[0, :, at, : at + 1].double().cpu().numpy() for m in maps])


@torch.inference_mode()
def layers(lm: LM, probe: Probe, at: int, emitted: int) -> dict[str, np.ndarray]:
    """Lens, decomposition, residual norms and neurons of one token, a layer at a time, from one eager forward with
    every output recorded."""
    a = lm.anatomy
    parts: dict[str, nn.Module] = {f"block {n}": block for n, block in enumerate(a.blocks)}
    parts |= {f"attention {n}": module for n, module in enumerate(a.attention_out)}
    entered: list[Tensor] = []
    neurons: dict[int, Tensor] = {}
    handles = [a.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]  # fmt: skip

    def keep(n: int) -> Callable[[nn.Module, tuple], None]:
        return lambda _module, args: neurons.update({n: args[0]})

    handles += [module.register_forward_pre_hook(keep(n)) for n, module in enumerate(a.neurons or ())]
    try:
        with eager(lm), record_outputs(parts) as outputs:
            final = lm.model(input_ids=_row(lm, probe.tokens), use_cache=False).logits[0, at]
    finally:
        for handle in handles:
            handle.remove()
    final = final.to(torch.promote_types(final.dtype, torch.float32)).log_softmax(-1).double()
    targets = torch.tensor(probe.targets, device=lm.device, dtype=torch.long)

    def lens(resid: Tensor) -> Tensor:
        return lm.logits(a.final_norm(resid[None, None]))[0, 0].log_softmax(-1).double()

    found: dict[str, list[Any]] = {}
    before = entered[0]
    for n in range(len(a.blocks)):
        after = outputs[f"block {n}"]
        middle = before[0, at] + a.multiplier * outputs[f"attention {n}"][0, at]
        log_p = lens(after[0, at])
        for name, value in {
            "p_in": lens(before[0, at])[targets].exp().sum(), "p_attn": lens(middle)[targets].exp().sum(),
            "p_out": log_p[targets].exp().sum(), "p_emitted": log_p[emitted].exp(),
            "entropy": -(log_p.exp() * log_p).sum(), "kl_final": (final.exp() * (final - log_p)).sum(),
        }.items():  # fmt: skip
            found.setdefault(name, []).append(float(value))
        found.setdefault("resid_norm", []).append(after[0].double().norm(dim=-1).cpu().numpy())
        if a.neurons is not None:
            values = neurons[n][0, at].double().cpu().numpy()
            found.setdefault("neurons", []).append(values)
        before = after
    return {name: np.array(values) for name, values in found.items()}


@torch.inference_mode()
def patched(
    lm: LM, pair: Pair, patch: str, layer: int, sequences: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[Float[np.ndarray, " N"], Completion]:
    """ln P of each sequence and the greedy completion with one patch at one layer ('' for none), by Hugging Face's own
    caches: each forward gets a copy of the cache it goes on from."""
    with eager(lm):
        cache = DynamicCache()
        lm.model(input_ids=_row(lm, pair.target[:-1]), past_key_values=cache, use_cache=True)
        if patch.startswith("kv_"):
            _copy_keys(lm, pair, patch, layer, cache)
        with _patched_forward(lm, pair, patch, layer):
            logits = lm.model(
                input_ids=_row(lm, pair.target[-1:]), past_key_values=cache, use_cache=True,
                attention_mask=torch.ones(1, len(pair.target), dtype=torch.long, device=lm.device),
            ).logits[0, -1]  # fmt: skip
        logprobs = []
        for sequence in sequences:
            own, after, log_p = copy.deepcopy(cache), logits, 0.0
            for n, token in enumerate(sequence):
                log_p += float(after.to(torch.promote_types(after.dtype, torch.float32)).log_softmax(-1)[token])
                if n + 1 < len(sequence):
                    after = lm.model(input_ids=_row(lm, [token]), past_key_values=own, use_cache=True).logits[0, -1]
            logprobs.append(log_p)
        done = Completion()
        for step in range(sampling.max_new_tokens):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best, token = wide.topk(2).values, int(wide.argmax())
            logprob, margin = float(wide.log_softmax(-1)[token]), float(best[0] - best[1])
            goes_on = done.append(token, logprob, margin, lm.vocabulary, sampling.stop_at_newline)
            if not goes_on or step + 1 == sampling.max_new_tokens:
                break
            logits = lm.model(input_ids=_row(lm, [token]), past_key_values=cache, use_cache=True).logits[0, -1]
    return np.array(logprobs), done


def _copy_keys(lm: LM, pair: Pair, patch: str, layer: int, cache: DynamicCache) -> None:
    """Token by token, from the source text moved so that the token stands where it is going to be read."""
    move = pair.question if patch == "kv_question" else pair.instruction
    assert move is not None, f"{patch} needs its span"
    shift = move.shift if lm.anatomy.is_relative else 0
    source = DynamicCache()
    positions = torch.arange(len(pair.source), device=lm.device)[None] + shift
    lm.model(input_ids=_row(lm, pair.source), position_ids=positions, past_key_values=source, use_cache=True)
    for n in range(move.length):
        for kind in ("keys", "values"):
            value = getattr(source.layers[layer], kind)[0, :, move.start + n]
            getattr(cache.layers[layer], kind)[0, :, move.to + n] = value


@contextmanager
def _patched_forward(lm: LM, pair: Pair, patch: str, layer: int) -> Iterator[None]:
    """The one forward of the target's last token in which activations are replaced, or attention is blocked."""
    a = lm.anatomy
    handles = []
    if patch in ("resid", "attn", "mlp"):
        module = {"resid": a.blocks, "attn": a.attention_out, "mlp": a.mlp_out}[patch][layer]
        with record_outputs({"it": module}) as outputs:
            lm.model(input_ids=_row(lm, pair.source), use_cache=False)
        value = outputs["it"][0, -1]

        def replace(_module: nn.Module, _args: object, output: object) -> object:
            tensor = first_tensor(output)
            assert tensor is not None, "a block's part must give a tensor"
            changed = tensor.clone()
            changed[0, -1] = value
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(module.register_forward_hook(replace))
    elif patch == "knockout_instruction":
        assert pair.prohibition is not None, "a knockout needs its span"
        start, end = pair.prohibition
        module = next(
            m for m in a.blocks[layer].modules() if getattr(m, "layer_idx", None) == layer and m is not a.blocks[layer]
        )

        def block(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone()
            mask[..., start:end] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        handles.append(module.register_forward_pre_hook(block, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(lm: LM, token_ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(token_ids)], device=lm.device)
