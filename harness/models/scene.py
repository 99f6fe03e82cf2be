"""A prompt up to the token behind which a target is read, and rows that differ in their neurons' activations there.

What stands before that token is forwarded once; each row then is one token (and, of a target of several tokens, those before
the last). Where neurons of all positions are meant, a row is the whole text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from harness import tally
from harness.models.attend import Layout, right_padded
from harness.models.cells import Cells
from harness.models.neurons import Circuit
from harness.models.patch import fork


@dataclass(frozen=True)
class Target:
    """What a prompt's neurons are held against: the logit of one token behind `tokens`, less that of `contrast` where there
    is one; of several tokens (`ids`) the log-probability of all of them."""

    tokens: tuple[int, ...]
    ids: tuple[int, ...]
    contrast: int | None = None
    is_sequence: bool = False

    @property
    def position(self) -> int:
        """Where the target is read."""
        return len(self.tokens) - 1


class Scores(NamedTuple):
    """Of R rows, in float32 or wider. `value`: what is attributed. `logit` is the first token's, before any soft cap, as
    `contrast` is of the token to be subtracted (NaN without one); `logp` the log-probability of the whole target."""

    value: Float[Tensor, " R"]
    logit: Float[Tensor, " R"]
    logp: Float[Tensor, " R"]
    contrast: Float[Tensor, " R"]


class Scene:
    """One prompt and target, ready for rows. `is_upto`: rows are whole texts, their neurons those of all positions."""

    def __init__(self, circuit: Circuit, target: Target, *, is_upto: bool = False):
        self.circuit, self.target, self.is_upto = circuit, target, is_upto
        lm = circuit.lm
        told = target.ids[:-1] if target.is_sequence else ()
        cut = 0 if is_upto else target.position
        self.suffix = (*target.tokens[cut:], *told)
        self.num_edited = target.position + 1 - cut
        """The first columns of a row: those whose neurons are meant."""
        self._cut = cut
        self._ids = torch.tensor(target.ids, device=lm.device)
        self._prefix: DynamicCache | None = None
        if cut:
            # Without gradients, yet no inference tensors: autograd may not save those.
            with torch.no_grad(), tally.prefilling():
                tokens, layout = right_padded([target.tokens[:cut]], lm.device, is_apart=True)
                self._prefix = lm.new_cache()
                lm.hidden(tokens, layout, self._prefix)

    @property
    def device(self) -> torch.device:
        return self.circuit.lm.device

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return len(self.suffix)

    def hidden(self, num_rows: int, cells: Cells | None = None) -> Float[Tensor, "R T D"]:
        """The final norm's output of so many rows, one forward."""
        lm, width = self.circuit.lm, self.width
        tokens = torch.tensor([self.suffix], device=lm.device).expand(num_rows, -1)
        positions = torch.arange(self._cut + width, device=lm.device).expand(num_rows, -1)
        allowed = None
        if self._cut:
            allowed = torch.ones(width, self._cut + width, dtype=torch.bool, device=lm.device).tril(self._cut)
            allowed = allowed.expand(num_rows, -1, -1)
        layout = Layout(positions[:, self._cut :], positions, allowed, cells=cells)
        return lm.hidden(tokens, layout, None if self._prefix is None else fork(self._prefix, num_rows))

    def score(self, hidden: Float[Tensor, "R T D"]) -> Scores:
        """What the rows say of the target."""
        at, target = self.num_edited - 1, self.target
        here = hidden[:, at]
        logit = self.circuit.raw_logits(here, self._ids[:1])[:, 0]
        contrast = torch.full_like(logit, torch.nan)
        value = logit
        if target.contrast is not None:
            contrast = self.circuit.raw_logits(here, torch.tensor([target.contrast], device=here.device))[:, 0]
            value = logit - contrast
        logp = self._logp(hidden)
        return Scores(logp if target.is_sequence else value, logit, logp, contrast)

    def value(self, hidden: Float[Tensor, "R T D"]) -> Float[Tensor, " R"]:
        """As `score`, what is attributed alone: no distribution is made where none is needed."""
        if self.target.is_sequence:
            return self._logp(hidden)
        here = hidden[:, self.num_edited - 1]
        ids = (
            self._ids
            if self.target.contrast is None
            else self._ids.new_tensor([*self.target.ids, self.target.contrast])
        )
        found = self.circuit.raw_logits(here, ids)
        return found[:, 0] if self.target.contrast is None else found[:, 0] - found[:, 1]

    def _logp(self, hidden: Tensor) -> Tensor:
        at = self.num_edited - 1
        ids = self._ids if self.target.is_sequence else self._ids[:1]
        total = torch.zeros(len(hidden), device=hidden.device)
        for n, token in enumerate(ids.tolist()):
            logits = self.circuit.lm.logits(hidden[:, at + n])
            total = total + (logits[:, token] - logits.logsumexp(-1))
        return total


def rows_at_once(scene: Scene, most_tokens: int) -> int:
    """Rows of one forward within so many tokens."""
    return max(1, most_tokens // scene.width)


def chunked(num: int, size: int) -> Sequence[range]:
    """0 … num − 1 in pieces."""
    return [range(start, min(start + size, num)) for start in range(0, num, size)]
