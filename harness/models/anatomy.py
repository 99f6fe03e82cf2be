"""Where the parts of a decoder are, found by what they compute rather than by what they are called.

The blocks are the one module list as long as the configuration says; the final norm is what runs between the last
block and the head; the two contributions to the residual stream are the outputs of the two children of a block that
add up to its change. Each find is an identity checked on a few tokens, and a model that breaks one is refused with
the name of that identity: a measurement on parts wrongly guessed would look fine and mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import ModelError
from harness.tolerance import LOADED

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # its module takes seconds to import, and a command that loads no model need not wait for it
    PreTrainedModel = nn.Module

_SHIFT = 3
"""Places by which a text is moved to see whether that matters."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one decoder.

    `attention_out[l]` and `mlp_out[l]` are the modules whose outputs are added to the residual stream (after a family's
    sandwich norms), each times `multiplier`; `blocks[l]` gives the raw residual stream after block l.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    attention_out: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    multiplier: float
    final_norm: nn.Module
    head: nn.Module
    to_logits: Callable[[Tensor], Tensor]
    logit_scale: float
    """What the head's output is multiplied by, before any soft cap."""
    neurons: tuple[nn.Module, ...] | None
    """Per block the projection whose *input* are the MLP's neurons (after the gate); None where a block has no single
    one (mixtures of experts)."""
    is_relative: bool
    """Whether only distances between positions matter (rotary embeddings), so that a text may stand anywhere."""


def first_tensor(output: object) -> Tensor | None:
    """The tensor a module returned, alone or as the first of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def record_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules during the block, in call order; the hooks are always removed."""
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                outputs[name] = tensor

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(keep(name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of their dtype."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-30)
    tolerance = LOADED[str(a.dtype).removeprefix("torch.")]
    return bool(((a - b).abs().max() / scale).item() <= tolerance) and bool(a.isfinite().all())


def dissect(model: PreTrainedModel, token_ids: Tensor, name: str) -> Anatomy:
    """Find the parts of `model` and check the identities that every measurement here rests on.

    `token_ids` [B, T] are any valid ids. Raises ModelError that names the first identity which does not hold.
    Costs a handful of forwards of those tokens.
    """
    config = model.config.get_text_config(decoder=True)
    decoder, blocks = _find_blocks(model, config.num_hidden_layers, name)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name}: expected a decoder with an output head, found none; use a causal language model")
    position_ids = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    inputs = {"input_ids": token_ids, "position_ids": position_ids, "use_cache": False}
    wide = torch.promote_types(model.dtype, torch.float32)
    with torch.no_grad():
        plain = model(**inputs).logits
        parts = {f"decoder.{k}": m for k, m in decoder.named_children()}
        parts |= {f"block.{i}": b for i, b in enumerate(blocks)} | {"block.in": blocks[0]}
        head_input: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _m, args: head_input.append(args[0]))
        block_input: list[Tensor] = []
        handle_in = blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: block_input.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            with record_outputs(parts) as outputs:
                hooked = model(**inputs).logits
        finally:
            handle.remove()
            handle_in.remove()
        if not torch.equal(plain, hooked):
            raise ModelError(f"{name}: breaks 'forward with hooks = forward without'; it cannot be measured")
        final_norm = _find_final_norm(decoder, blocks, outputs, head_input[0], name)
        to_logits = _head_function(config)
        resid = outputs[f"block.{len(blocks) - 1}"]
        if not close(to_logits(head(final_norm(resid))).to(wide), plain.to(wide)):
            raise ModelError(f"{name}: breaks 'last-layer lens = logits'; its head is not norm, projection and cap")
        attention_out, mlp_out, multiplier = _find_contributions(model, blocks, block_input[0], inputs, name)
        neurons = _find_neurons(model, blocks, mlp_out, inputs)
        shifted = model(**{**inputs, "position_ids": position_ids + _SHIFT}).logits
    is_relative = close(plain.to(wide), shifted.to(wide))
    return Anatomy(
        decoder, blocks, attention_out, mlp_out, multiplier, final_norm, head, to_logits, _logit_scale(config), neurons,
        is_relative,
    )  # fmt: skip


def _find_blocks(model: PreTrainedModel, num_layers: int, name: str) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    found = [
        (parent, tuple(child))
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers and len({type(m) for m in child}) == 1
    ]
    if len(found) != 1:
        raise ModelError(
            f"{name}: expected one list of {num_layers} equal blocks, found {len(found)}; this family is not supported"
        )
    return found[0]


def _find_final_norm(
    decoder: nn.Module, blocks: tuple[nn.Module, ...], outputs: dict[str, Tensor], head_input: Tensor, name: str
) -> nn.Module:
    """The child of the decoder that turned the last block's output into what the head received."""
    for child_name, child in decoder.named_children():
        output = outputs.get(f"decoder.{child_name}")
        if output is not None and output.shape == head_input.shape and torch.equal(output, head_input):
            return child
    if torch.equal(outputs[f"block.{len(blocks) - 1}"], head_input):
        return nn.Identity()
    raise ModelError(f"{name}: expected a final norm between the last block and the head, found none")


def _head_function(config: object) -> Callable[[Tensor], Tensor]:
    """What a family does to the head's output: divide (Granite), multiply (Cohere), soft-cap (Gemma 2)."""
    divide = getattr(config, "logits_scaling", None)
    multiply = getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def to_logits(raw: Tensor) -> Tensor:
        if divide:
            raw = raw / divide
        if multiply:
            raw = raw * multiply
        return torch.tanh(raw / cap) * cap if cap else raw

    return to_logits


def _logit_scale(config: object) -> float:
    """The factor of `_head_function`."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def _find_contributions(
    model: PreTrainedModel, blocks: tuple[nn.Module, ...], first_input: Tensor, inputs: dict, name: str
) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...], float]:
    """The two children of every block with resid_in + m·(attention + mlp) = resid_out, and that multiplier m.

    The pair is found on the first block by trying all of them in call order, then checked on every block.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    named = {f"{i}.{k}": m for i, b in enumerate(blocks) for k, m in b.named_children()}
    named |= {str(i): b for i, b in enumerate(blocks)}
    with record_outputs(named) as outputs:
        model(**inputs)
    resid_in = [first_input, *(outputs[str(i)] for i in range(len(blocks) - 1))]
    change = [(outputs[str(i)].to(wide) - resid_in[i].to(wide)) for i in range(len(blocks))]
    called = [k.split(".", 1)[1] for k, v in outputs.items() if k.startswith("0.") and v.shape == first_input.shape]
    for attention, mlp in combinations(called, 2):
        scale = _multiplier(outputs[f"0.{attention}"].to(wide) + outputs[f"0.{mlp}"].to(wide), change[0])

        def adds_up(i: int, attention: str = attention, mlp: str = mlp, scale: float = scale) -> bool:
            if f"{i}.{attention}" not in outputs or f"{i}.{mlp}" not in outputs:
                return False
            parts = outputs[f"{i}.{attention}"].to(wide) + outputs[f"{i}.{mlp}"].to(wide)
            # Rounded as the model rounds: in half precision the sum of three is no closer than its last bit.
            return close((resid_in[i].to(wide) + scale * parts).to(model.dtype), outputs[str(i)])

        if all(adds_up(i) for i in range(len(blocks))):
            pick = [dict(b.named_children()) for b in blocks]
            return tuple(p[attention] for p in pick), tuple(p[mlp] for p in pick), scale
    raise ModelError(
        f"{name}: breaks 'resid_in + attention + mlp = resid_out'; found no two parts of a block that add up"
    )


def _find_neurons(
    model: PreTrainedModel, blocks: tuple[nn.Module, ...], mlp_out: tuple[nn.Module, ...], inputs: dict
) -> tuple[nn.Module, ...] | None:
    """The last projection called in each block, where its output is the MLP's contribution, or is normed into it."""
    last: dict[int, tuple[nn.Module, Tensor]] = {}
    ends: dict[int, tuple[Tensor | None, Tensor | None]] = {}
    handles = []

    def keep_last(i: int) -> Callable:
        def hook(module: nn.Module, _args: object, output: object) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                last[i] = (module, tensor)

        return hook

    def keep_ends(i: int) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: object) -> None:
            ends[i] = (first_tensor(args), first_tensor(output))

        return hook

    try:
        for i, block in enumerate(blocks):
            handles.append(mlp_out[i].register_forward_hook(keep_ends(i)))
            for module in block.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and not list(module.children()):
                    handles.append(module.register_forward_hook(keep_last(i)))
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for i in range(len(blocks)):
        if i not in last or not any(
            end is not None and end.shape == last[i][1].shape and torch.equal(end, last[i][1]) for end in ends[i]
        ):
            return None
    return tuple(last[i][0] for i in range(len(blocks)))


def _multiplier(contribution: Tensor, change: Tensor) -> float:
    """Least squares scale between the two; 1 where it is 1 up to rounding (Granite scales its sublayers)."""
    scale = float((contribution * change).sum() / (contribution * contribution).sum().clamp_min(1e-30))
    return 1.0 if abs(scale - 1) < 1e-2 else scale
