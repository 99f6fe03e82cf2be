"""Reading and replacing activations during a forward: `capture` and `patch`, which always leave the model as it was.

Knows the anatomy of a decoder and nothing of what is done with the numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.models.anatomy import Anatomy, first_tensor
from harness.models.attend import active, watch_rows
from harness.models.cells import Cells


@dataclass
class Captured:
    """What a forward of R rows left at the Q query tokens asked for, layer by layer.

    `resid[0]` is what enters the first block, `resid[l + 1]` the raw output of block l (before any final norm).
    `attention` and `mlp` are what those parts add to the residual stream, the family's multiplier included.
    """

    resid: list[Float[Tensor, "R Q D"]] = field(default_factory=list)
    attention: list[Float[Tensor, "R Q D"]] = field(default_factory=list)
    mlp: list[Float[Tensor, "R Q D"]] = field(default_factory=list)
    resid_norm: list[Float[Tensor, "R T"]] = field(default_factory=list)
    """Euclidean norm of each block's output at every token, in float32."""
    top_neurons: list[Int[Tensor, "R Q N"]] = field(default_factory=list)
    top_values: list[Float[Tensor, "R Q N"]] = field(default_factory=list)
    """The MLP neurons of largest magnitude, with their signed activations; empty where a family has no such list."""


@contextmanager
def capture(
    anatomy: Anatomy,
    at: Int[Tensor, "R Q"],
    num_neurons: int = 0,
    rows: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Captured]:
    """Collects one forward's activations at the query tokens `at`; `rows(layer, weights [R, H, Q, S])` gets attention.

    Each part is reduced on the device when it passes; nothing of the size of a whole layer's activations is kept.
    """
    found = Captured()
    wide = torch.promote_types(next(anatomy.decoder.parameters()).dtype, torch.float32)

    def pick(x: Tensor) -> Tensor:
        cells = _cells(None)
        if cells is not None:
            return x[0][cells.source.gather(1, at)]
        return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.resid.append(pick(args[0] if args else kwargs["hidden_states"]))

    def leave(_module: nn.Module, _args: object, output: object) -> None:
        resid = _tensor(output)
        found.resid.append(pick(resid))
        norms, cells = resid.to(wide).norm(dim=-1), _cells(None)
        found.resid_norm.append(norms if cells is None else cells.spread(norms))

    def part(into: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _args, output: into.append(pick(_tensor(output)) * anatomy.multiplier)

    def neurons(_module: nn.Module, args: tuple) -> None:
        values = pick(args[0])
        top = values.abs().topk(min(num_neurons, values.shape[-1]), dim=-1).indices
        found.top_neurons.append(top)
        found.top_values.append(values.gather(-1, top))

    with _hooks() as handles:
        handles.append(anatomy.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        for block, attention, mlp in zip(anatomy.blocks, anatomy.attention_out, anatomy.mlp_out, strict=True):
            handles.append(attention.register_forward_hook(part(found.attention)))
            handles.append(mlp.register_forward_hook(part(found.mlp)))
            handles.append(block.register_forward_hook(leave))
        if num_neurons and anatomy.neurons is not None:
            handles.extend(module.register_forward_pre_hook(neurons) for module in anatomy.neurons)
        if rows is None:
            yield found
        else:
            with watch_rows(at, rows):
                yield found


@dataclass(frozen=True)
class Edit:
    """Put `values` [N, D] in place of what a module of block `layer` gives at token `column` of the batch rows `rows` [N]."""

    module: nn.Module
    rows: Int[Tensor, " N"]
    column: int
    values: Float[Tensor, "N D"]
    layer: int | None = None
    """Needed where rows enter late (see `cells`)."""


@contextmanager
def patch(edits: Sequence[Edit]) -> Iterator[None]:
    """Forwards inside the block run with every edit made; each module's output is copied, never written into."""

    def hook(edit: Edit) -> Callable[[nn.Module, object, object], object]:
        def replace(_module: nn.Module, _args: object, output: object) -> object:
            changed = _tensor(output).clone()
            cells = _cells(edit.layer)
            if cells is None:
                changed[edit.rows, edit.column] = edit.values.to(changed.dtype)
            else:
                changed[0, cells.source[edit.rows, edit.column]] = edit.values.to(changed.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return replace

    with _hooks() as handles:
        handles.extend(edit.module.register_forward_hook(hook(edit)) for edit in edits)
        yield


def _cells(layer: int | None) -> Cells | None:
    """Where the tokens of the forward going on stand; None where they come as a grid."""
    layout = active()
    return None if layout is None or layout.cells is None else layout.cells.at(layer)


@contextmanager
def _hooks() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: object) -> Tensor:
    tensor = first_tensor(output)
    assert tensor is not None, "a block's part must give a tensor"
    return tensor
