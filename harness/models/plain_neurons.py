"""The plain reference for neurons: one text at a time, no padding, no cache, eager attention, every hook in its own forward.

Held against `neurons`, `attribution` and `ablate` by the certificate and the tests; of their arithmetic nothing is used here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from harness.models.anatomy import first_tensor
from harness.models.load import LM
from harness.models.plain import eager
from harness.models.scene import Target

Edit = Callable[[int, Tensor], Tensor | None]
"""Of a layer's neurons [1, T, M]: what goes on in their place."""


@contextmanager
def _hooked(lm: LM, edit: Edit) -> Iterator[None]:
    assert lm.anatomy.neurons is not None, "a dense model"

    def hook(layer: int) -> Callable[[nn.Module, tuple], tuple | None]:
        def see(_module: nn.Module, args: tuple) -> tuple | None:
            made = edit(layer, args[0])
            return None if made is None else (made, *args[1:])

        return see

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in enumerate(lm.anatomy.neurons)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(lm: LM, tokens: Sequence[int]) -> Float[np.ndarray, "L T M"]:
    """What goes into the last projection of every layer's MLP."""
    seen: dict[int, np.ndarray] = {}

    def keep(layer: int, a: Tensor) -> None:
        seen[layer] = a[0].double().cpu().numpy()

    with torch.no_grad(), eager(lm), _hooked(lm, keep):
        lm.model(input_ids=torch.tensor([list(tokens)], device=lm.device), use_cache=False)
    return np.stack([seen[n] for n in sorted(seen)])


def _value(lm: LM, target: Target) -> Tensor:
    """What is attributed, from a whole forward with full logits; the soft cap of a family that has one is undone."""
    told = target.ids[:-1] if target.is_sequence else ()
    ids = torch.tensor([[*target.tokens, *told]], device=lm.device)
    logits = lm.model(input_ids=ids, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at = target.position
    if target.is_sequence:
        log_p = logits.log_softmax(-1)
        return torch.stack([log_p[at + n, token] for n, token in enumerate(target.ids)]).sum()
    config = lm.model.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    raw = torch.atanh(logits[at] / cap) * cap if cap else logits[at]
    return raw[target.ids[0]] if target.contrast is None else raw[target.ids[0]] - raw[target.contrast]


def value(lm: LM, target: Target, edit: Edit | None = None) -> float:
    """The target's logit, difference of logits or log-probability, with neurons edited."""
    with torch.no_grad(), eager(lm), _hooked(lm, edit or (lambda _layer, _a: None)):
        return float(_value(lm, target))


def gradients(lm: LM, target: Target) -> Float[np.ndarray, "L T M"]:
    """∂value/∂activation of every neuron at every position of the context."""
    leaves: list[Tensor] = []

    def lay(_layer: int, a: Tensor) -> Tensor:
        leaves.append(a if a.requires_grad else a.detach().requires_grad_(True))
        return leaves[-1]

    with torch.enable_grad(), eager(lm), _hooked(lm, lay):
        found = torch.autograd.grad(_value(lm, target), leaves, allow_unused=True)
    size = len(target.tokens)
    return np.stack(
        [
            np.zeros((size, a.shape[-1])) if g is None else g[0, :size].double().cpu().numpy()
            for g, a in zip(found, leaves, strict=True)
        ]
    )


@torch.no_grad()
def direct(lm: LM, target: Target, layer: int, neuron: int) -> float:
    """dla of one neuron: its output carried forward by hand, through norms that are ratios of what came out to what went in."""
    anatomy = lm.anatomy
    assert anatomy.neurons is not None, "a dense model"
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, output: object) -> None:
            given, made = first_tensor(args), first_tensor(output)
            assert given is not None, "parts take tensors"
            assert made is not None, "and give them"
            kept[name] = (given[0, target.position].double(), made[0, target.position].double())

        return hook

    parts = {"out": anatomy.neurons[layer], "part": anatomy.mlp_out[layer], "norm": anatomy.final_norm}
    handles = [m.register_forward_hook(keep(name)) for name, m in parts.items()]
    try:
        with eager(lm):
            lm.model(input_ids=torch.tensor([list(target.tokens)], device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    module = anatomy.neurons[layer]
    weight = module.weight.double()  # type: ignore[union-attr]
    column = weight[neuron] if type(module).__name__ == "Conv1D" else weight[:, neuron]  # type: ignore[index]
    written = column * kept["out"][0][neuron]
    if not torch.equal(kept["part"][1], kept["out"][1]):
        written = _through(anatomy.mlp_out[layer], *kept["part"], written)
    if not isinstance(anatomy.final_norm, nn.Identity):
        written = _through(anatomy.final_norm, *kept["norm"], written * anatomy.multiplier)
    rows = anatomy.head.weight.double()  # type: ignore[union-attr]
    logit = rows[target.ids[0]] @ written  # type: ignore[index]
    if target.contrast is not None:
        logit = logit - rows[target.contrast] @ written  # type: ignore[index]
    return float(logit) * anatomy.logit_scale


def _through(norm: nn.Module, given: Tensor, made: Tensor, part: Tensor) -> Tensor:
    """A part of what went into a norm, as it came out of it."""
    bias = getattr(norm, "bias", None)
    is_centred = "LayerNorm" in type(norm).__name__ or isinstance(norm, nn.LayerNorm)
    whole = given - given.mean() if is_centred else given
    ratio = (made - (0 if bias is None else bias.double())) / whole
    return ratio * (part - part.mean() if is_centred else part)
