"""Which tokens of a grid of texts are computed: every distinct one, once, and only in the layers where it is distinct.

Attention wants a grid: a row a text, padded to the longest, each row with keys of its own. Everything else in a decoder
(projections, MLPs, norms, rotary tables), which is nearly all of its arithmetic, works token by token. So the tokens go
through the model as one row of N, without padding; a beginning that texts have in common stands in it once; and just
for attention, and for the cache, they are laid out in the grid (`Cells.spread`) and taken back (`Cells.gather`).

A row may also *enter late*: where two rows are equal up to some layer (a patch at layer 20 changes nothing below it),
one of them, the leader, stands for both there, and the other goes through the layers from its own on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Late:
    """Rows that equal another one below a layer: row r is computed from layer `entry[r]` on, and `leader[r]` stands for
    it before. A leader enters at layer 0."""

    entry: np.ndarray
    leader: np.ndarray


class Cells:
    """A grid [R, T] of texts, filled by N computed tokens.

    `source` [R, T] is the token that stands in each cell: several cells may show one, and a cell that holds none shows
    any. `row` and `column` [N] are one cell of each token, where its attention is computed.
    """

    def __init__(
        self, source: np.ndarray, row: np.ndarray, column: np.ndarray, device: torch.device, late: Late | None = None
    ):
        self.source: Int[Tensor, "R T"] = torch.from_numpy(np.ascontiguousarray(source)).to(device)
        self.row: Int[Tensor, " N"] = torch.from_numpy(np.ascontiguousarray(row)).to(device)
        self.column: Int[Tensor, " N"] = torch.from_numpy(np.ascontiguousarray(column)).to(device)
        self._layers = None if late is None else _Layers(source, row, column, device, late)

    def __len__(self) -> int:
        return len(self.row)

    def spread(self, packed: Shaped[Tensor, "1 N *rest"]) -> Shaped[Tensor, "R T *rest"]:
        """What was computed for the tokens, laid out in the grid."""
        return packed[0][self.source]

    def gather(self, grid: Shaped[Tensor, "R T *rest"]) -> Shaped[Tensor, "1 N *rest"]:
        """What stands in the tokens' own cells."""
        return grid[self.row, self.column][None]

    def at(self, layer: int | None) -> "Cells":
        """The cells of this layer: late rows are shown by their leaders until they enter."""
        return self if self._layers is None or layer is None else self._layers.at(layer)

    def enter(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A block's inputs for the tokens that are computed in it; None where they are all tokens."""
        return None if self._layers is None else self._layers.enter(layer, args, kwargs)


def shared_cells(
    contexts: Sequence[Sequence[int]], num_own: Sequence[int], device: torch.device, is_apart: bool = False
) -> Cells:
    """Cells of rows that hold a context each, from column 0 on, then `num_own` tokens of their own.

    A beginning that contexts have in common is computed once; with `is_apart` nothing is shared.
    """
    width = max(len(c) + n for c, n in zip(contexts, num_own, strict=True))
    # Where a cell stays empty, 0 is as good as any: nothing looks there, and a gather needs a number.
    source = np.zeros((len(contexts), width), dtype=np.int64)
    home: list[tuple[int, int]] = []
    # A token is known by the number of the one before it, so being known means that the whole beginning is the same.
    known: dict[tuple[int, int], int] = {}
    for r, (context, own) in enumerate(zip(contexts, num_own, strict=True)):
        # Numbers are not negative: a beginning that each row has for itself makes all that follows its own.
        before = -1 - r if is_apart else -1
        for c, token in enumerate(context):
            found = known.setdefault((before, token), len(home))
            if found == len(home):
                home.append((r, c))
            source[r, c] = before = found
        # Own tokens are never shared, even behind equal contexts: what stands there is the caller's to know.
        for c in range(len(context), len(context) + own):
            source[r, c] = len(home)
            home.append((r, c))
    row, column = np.array(home, dtype=np.int64).T
    return Cells(source, row, column, device)


def filled_cells(num_filled: Sequence[int], device: torch.device) -> Cells:
    """Cells of rows whose first `num_filled` columns hold a token each; the rest is padding."""
    row = np.repeat(np.arange(len(num_filled)), num_filled)
    column = np.concatenate([np.arange(n) for n in num_filled])
    source = np.zeros((len(num_filled), max(num_filled)), dtype=np.int64)
    source[row, column] = np.arange(len(row))
    return Cells(source, row, column, device)


def late_cells(rows: int, width: int, late: Late, device: torch.device) -> Cells:
    """Cells of a full grid in which rows enter late."""
    row, column = (x.ravel() for x in np.indices((rows, width)))
    return Cells(np.arange(rows * width).reshape(rows, width), row, column, device, late)


class _Layers:
    """The cells of each layer, where rows enter late."""

    def __init__(self, source: np.ndarray, row: np.ndarray, column: np.ndarray, device: torch.device, late: Late):
        assert not late.entry[late.leader].any(), "a leader is computed in every layer"
        self._num = len(row)
        # What stands for each token until its row enters.
        stands_in = source[late.leader[row], column]
        entry = late.entry[row]
        self._cells: dict[int, Cells] = {}
        self._active: dict[int, Tensor] = {}
        """Tokens that are computed from this layer on."""
        self._from: dict[int, Tensor] = {}
        """Where, among the tokens of the layer before, each of them comes from."""
        # Layers where nobody enters are as the one below them: as many cells as there are distinct entries will do.
        before = np.arange(len(row))
        for layer in sorted({0, *entry.tolist()}):
            is_active = entry <= layer
            number = np.cumsum(is_active) - 1
            # A leader is active in every layer, so what stands in has a number in each.
            now = np.where(is_active, number, number[stands_in])
            active = np.flatnonzero(is_active)
            self._cells[layer] = Cells(now[source], row[active], column[active], device)
            self._active[layer] = torch.from_numpy(active).to(device)
            # `before` of a row that enters here is still its leader's token: from that one's residual it goes on.
            self._from[layer] = torch.from_numpy(before[active]).to(device)
            before = now
        self._starts = np.array(sorted(self._cells))

    def at(self, layer: int) -> Cells:
        return self._cells[self._since(layer)]

    def _since(self, layer: int) -> int:
        return int(self._starts[np.searchsorted(self._starts, layer, side="right") - 1])

    def enter(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # The decoder hands every block the same tables, made for all tokens; only the residual stream has its own length.
        active = self._active[self._since(layer)]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                # By shape, since families name them otherwise: rotary tables and positions are [1, N, ...].
                of_tokens = value.ndim >= 2 and value.shape[0] == 1 and value.shape[1] == self._num
                return value[:, active] if of_tokens else value
            if isinstance(value, tuple | list):
                return type(value)(cut(v) for v in value)
            return value

        in_args = bool(args)
        resid = args[0] if in_args else kwargs["hidden_states"]
        # In other layers the stream already has the length of those that are active.
        if layer in self._from:
            resid = resid[:, self._from[layer]]
        rest = {name: cut(value) for name, value in kwargs.items() if name != "hidden_states"}
        if in_args:
            return (resid, *(cut(value) for value in args[1:])), rest
        return (), {"hidden_states": resid, **rest}
