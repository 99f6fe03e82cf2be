"""The neurons of an MLP: their activations, and the matrix through which they write.

A neuron's activation is one number of what goes *into* the last projection of a block's MLP, after gate and product; its
write direction is a column of that projection. Found by structure (`anatomy`), so never by a hook's name. A mixture of
experts has no such list.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness.errors import ItemFailed, ModelError
from harness.models import attend, norms
from harness.models.anatomy import close, record_outputs
from harness.models.attend import right_padded
from harness.models.load import LM
from harness.models.norms import Norm


@dataclass(frozen=True)
class Outlet:
    """How the neurons of one block write into the residual stream: through W_out, a norm in some families, a multiplier."""

    module: nn.Module
    """The projection."""
    is_transposed: bool
    """Its weight is [M, D] (GPT-2's Conv1D) and not [D, M]."""
    post: tuple[nn.Module, Norm] | None
    """The norm behind the projection, of families that have one (Gemma 2, OLMo 2)."""
    multiplier: float

    @property
    def weight(self) -> Float[Tensor, "D M"]:
        """W_out: a neuron a column."""
        weight = self.module.weight
        assert isinstance(weight, Tensor), "found by having one"
        return weight.T if self.is_transposed else weight

    @property
    def bias(self) -> Float[Tensor, " D"] | None:
        """What the projection adds whatever the neurons do; None where it adds nothing."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Circuit:
    """What attribution needs of a model beside its anatomy. Made once a model by `circuit_of`."""

    lm: LM
    outlets: tuple[Outlet, ...]
    final: Norm
    """The last norm; where a family has none, one that changes nothing."""
    norms: tuple[tuple[nn.Module, Norm], ...]
    """Every norm over the residual stream."""

    @property
    def num_layers(self) -> int:
        return len(self.outlets)

    @cached_property
    def num_neurons(self) -> int:
        """Neurons of one layer, M."""
        return self.outlets[0].weight.shape[1]

    @property
    def width(self) -> int:
        """Numbers of the residual stream, D."""
        return self.outlets[0].weight.shape[0]

    def raw_logits(self, hidden: Float[Tensor, "*rows D"], ids: Int[Tensor, " N"]) -> Float[Tensor, "*rows N"]:
        """Logits of some tokens before any soft cap, in float32 or wider; `hidden` is the final norm's output."""
        head = self.lm.anatomy.head
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if type(head) is nn.Linear:
            raw = nn.functional.linear(hidden, head.weight[ids], None if head.bias is None else head.bias[ids])
        else:
            raw = head(hidden)[..., ids]
        return raw.to(wide) * self.lm.anatomy.logit_scale

    def unembedding(self, ids: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        """Rows and biases of the head for some tokens, times the family's scale of logits."""
        head, scale = self.lm.anatomy.head, self.lm.anatomy.logit_scale
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor), "a head is a matrix"
        rows = weight[ids]
        return rows * scale, rows.new_zeros(len(ids)) if bias is None else bias[ids] * scale


def check_neurons(lm: LM) -> tuple[nn.Module, ...]:
    """The projections whose inputs are the neurons. Raises ModelError where a block has no single one."""
    if lm.anatomy.neurons is None:
        kind = getattr(lm.model.config, "model_type", "this family")
        raise ModelError(
            f"{lm.identity.name}: {kind}: a block has no single list of MLP neurons (a mixture of experts has none); "
            "take a dense model"
        )
    return lm.anatomy.neurons


@torch.no_grad()
def circuit_of(lm: LM) -> Circuit:
    """The parts that attribution rests on, each an identity checked on a short text.

    Raises ModelError that names the identity which does not hold, or for a mixture of experts.
    """
    modules = check_neurons(lm)
    anatomy, name = lm.anatomy, lm.identity.name
    like = next(anatomy.decoder.parameters())
    tokens = torch.arange(8, device=lm.device)[None] * 31 % len(lm.codec)
    positions = torch.arange(8, device=lm.device)[None]
    inputs: dict[int, Tensor] = {}
    ends: dict[int, Tensor] = {}
    handles = []
    for n, (module, end) in enumerate(zip(modules, anatomy.mlp_out, strict=True)):
        handles.append(module.register_forward_pre_hook(_keeping(inputs, n)))
        handles.append(end.register_forward_pre_hook(_keeping(ends, n)))
    named = {f"out.{n}": m for n, m in enumerate(modules)} | {f"end.{n}": m for n, m in enumerate(anatomy.mlp_out)}
    try:
        with record_outputs({**named, "norm": anatomy.final_norm, "last": anatomy.blocks[-1]}) as outputs:
            lm.hidden(tokens, attend.Layout(positions, positions))
    finally:
        for handle in handles:
            handle.remove()
    width = outputs["out.0"].shape[-1]
    found = norms.norms_of(anatomy.decoder, width, like)
    outlets = []
    for n, (module, end) in enumerate(zip(modules, anatomy.mlp_out, strict=True)):
        written, added = outputs[f"out.{n}"], outputs[f"end.{n}"]
        post = None
        if not torch.equal(written, added):
            if end not in found or n not in ends or not torch.equal(ends[n], written):
                raise ModelError(f"{name}: breaks 'what neurons write = the MLP's part of the stream' in layer {n}")
            post = (end, found[end])
        outlets.append(Outlet(module, _is_transposed(module, inputs[n], written, name), post, anatomy.multiplier))
    final = found.get(anatomy.final_norm)
    if final is None:
        if not isinstance(anatomy.final_norm, nn.Identity):
            raise ModelError(f"{name}: breaks 'final norm = gain × scale × stream'; its logits cannot be taken apart")
        final = Norm(torch.ones(width, device=lm.device), torch.zeros(width, device=lm.device), False)
    return Circuit(lm, tuple(outlets), final, tuple(found.items()))


def _keeping(into: dict[int, Tensor], n: int) -> Callable[[nn.Module, tuple], None]:
    def keep(_module: nn.Module, args: tuple) -> None:
        if args:
            into[n] = args[0]

    return keep


def _is_transposed(module: nn.Module, read: Tensor, written: Tensor, name: str) -> bool:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor), "found by having one"
    for is_transposed in (False, True):
        matrix = weight.T if is_transposed else weight
        if matrix.shape != (written.shape[-1], read.shape[-1]):
            continue
        made = read @ matrix.T
        if close(made if bias is None else made + bias, written):
            return is_transposed
    raise ModelError(f"{name}: breaks 'projection = matrix × neurons'; its neurons have no write directions")


class _Enough(Exception):
    """The last layer that was asked for has been seen."""


@contextmanager
def watched(
    lm: LM, receive: Callable[[int, Tensor], Tensor | None], layers: Sequence[int] | None = None, *, stop: bool = False
) -> Iterator[None]:
    """Forwards inside the block hand `receive(layer, activations)` what goes into each projection; a tensor that it gives
    goes in instead. With `stop` the forward ends behind the last of `layers`, by an exception that ends the block."""
    modules = check_neurons(lm)
    wanted = range(len(modules)) if layers is None else layers
    last = max(wanted)

    def hook(layer: int) -> Callable[[nn.Module, tuple], tuple | None]:
        def see(_module: nn.Module, args: tuple) -> tuple | None:
            given = receive(layer, args[0])
            if stop and layer == last:
                raise _Enough
            return None if given is None else (given, *args[1:])

        return see

    handles = [modules[layer].register_forward_pre_hook(hook(layer)) for layer in wanted]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def check_length(lm: LM, tokens: Sequence[int]) -> ItemFailed | None:
    """Why these tokens cannot be forwarded."""
    if not tokens:
        return ItemFailed("expected a text of at least one token, found none")
    if len(tokens) > lm.max_positions:
        return ItemFailed(f"needs {len(tokens)} positions, the model has {lm.max_positions}; shorten the text")
    return None


@torch.inference_mode()
def read(
    lm: LM,
    texts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
    receive: Callable[[int, Float[Tensor, "K M"]], None],
) -> None:
    """One forward of `texts`, ended behind the last layer wanted: `receive(layer, rows)` gets the activations at `positions`
    of each text, text by text. No head is run, no padding computed, and a beginning in common is computed once."""
    tokens, layout = right_padded(texts, lm.device)
    assert layout.cells is not None, "right-padded texts are laid out in cells"
    source = layout.cells.source
    index = torch.cat([source[n, torch.tensor(at, device=source.device)] for n, at in enumerate(positions) if len(at)])

    def hand(layer: int, packed: Tensor) -> None:
        receive(layer, packed[0][index])

    with watched(lm, hand, layers, stop=True):
        lm.hidden(tokens, layout)
