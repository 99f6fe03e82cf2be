"""What a target's logit does when neurons are set to something else: measured, one row an intervention.

Every intervention on a neuron is a' = λ·a + μ: to zero (0, 0), to its mean (0, mean), to its value elsewhere (0, value), a
sign turned (−1, 0), something added (1, δ). Single neurons enter at their own layer (`cells.Late`), below which their rows
equal the untouched one. Sets are kept or dropped as a whole, in every layer at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.models.attend import active
from harness.models.cells import late_cells
from harness.models.neurons import watched
from harness.models.patch import enter_late
from harness.models.scene import Scene, Scores, chunked, rows_at_once

_MOST_TOKENS = 4_096
"""Of a forward."""
_MOST_LOGITS = 1 << 25
"""Rows × vocabulary of a forward."""


@dataclass(frozen=True)
class Change:
    """a' = λ·a + μ, with a μ for every neuron of every layer."""

    factor: float
    shift: Float[Tensor, "L M"]


class Effects(NamedTuple):
    """Of the untouched prompt, and of each neuron's intervention alone; arrays of float64."""

    clean: dict[str, float]
    changed: dict[str, Float[np.ndarray, " K"]]


@torch.no_grad()
def effects(scene: Scene, neurons: Int[np.ndarray, "K 2"], change: Change) -> Effects:
    """value, logit, logp and contrast with each of `neurons` (layer, index) changed alone."""
    size = _rows(scene) - 1  # the untouched row is among them every time: it leads the others to their layers
    pieces = chunked(len(neurons), max(1, size)) or [range(0)]
    found = [_one_by_one(scene, neurons[places.start : places.stop], change) for places in pieces]
    clean = {name: float(value[0]) for name, value in found[0]._asdict().items()}
    changed = {
        name: np.concatenate([getattr(scores, name)[1:].double().cpu().numpy() for scores in found]) for name in clean
    }
    return Effects(clean, changed)


def _one_by_one(scene: Scene, neurons: Int[np.ndarray, "K 2"], change: Change) -> Scores:
    lm, count = scene.circuit.lm, scene.num_edited
    layers = [-1, *neurons[:, 0].tolist()]
    late = enter_late(layers, [()] * len(layers), scene.circuit.num_layers)
    cells = late_cells(len(layers), scene.width, late, lm.device)
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for row, (layer, neuron) in enumerate(neurons.tolist(), 1):
        by_layer.setdefault(layer, []).append((row, neuron))

    def put(layer: int, packed: Tensor) -> Tensor | None:
        here = by_layer.get(layer)
        if here is None:
            return None
        layout = active()
        assert layout is not None, "rows enter late"
        assert layout.cells is not None
        rows, which = (torch.tensor(x, device=packed.device) for x in zip(*here, strict=True))
        at = layout.cells.at(layer).source[rows, :count]  # [rows, C]
        changed = packed.clone()
        shift = change.shift[layer, which].to(packed.dtype)[:, None]
        changed[0, at, which[:, None]] = change.factor * packed[0, at, which[:, None]] + shift
        return changed

    with watched(lm, put, sorted(by_layer) or None):
        return scene.score(scene.hidden(len(layers), cells))


class Set(NamedTuple):
    """The first `size` neurons of an order that are kept (all others are changed), or the only ones changed."""

    order: int
    size: int
    is_kept: bool


@torch.no_grad()
def sets(
    scene: Scene,
    places: Int[Tensor, "O L M"],
    wanted: Sequence[Set],
    change: Change,
    layers: Sequence[int] | None = None,
) -> Float[np.ndarray, " N"]:
    """The target's value with each set kept or dropped. `places[o, l, m]`: a neuron's place in order o, from 0.

    Neurons of other layers than `layers` are left as they are.
    """
    count, values = scene.num_edited, []
    for some in chunked(len(wanted), _rows(scene)):
        rows = [wanted[n] for n in some]
        order = torch.tensor([r.order for r in rows], device=places.device)
        size = torch.tensor([r.size for r in rows], device=places.device)[:, None]
        is_kept = torch.tensor([r.is_kept for r in rows], device=places.device)[:, None]

        def put(layer: int, a: Tensor, order: Tensor = order, size: Tensor = size, is_kept: Tensor = is_kept) -> Tensor:
            is_changed = ((places[order, layer] < size) ^ is_kept)[:, None]  # [R, 1, M]
            own = a[:, :count]
            made = torch.where(is_changed, change.factor * own + change.shift[layer].to(a.dtype), own)
            return torch.cat([made, a[:, count:]], 1)

        with watched(scene.circuit.lm, put, layers):
            values.append(scene.value(scene.hidden(len(rows))).double().cpu().numpy())
    return np.concatenate(values) if values else np.zeros(0)


def _rows(scene: Scene) -> int:
    head = scene.circuit.lm.anatomy.head.weight
    assert isinstance(head, Tensor), "a head is a matrix"
    vocabulary = head.shape[0]
    return max(2, min(rows_at_once(scene, _MOST_TOKENS), _MOST_LOGITS // vocabulary))
