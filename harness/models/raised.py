"""Which tokens one of two models finds likelier than the other, over many contexts (*Diff Mining*: the tokens that a
fine-tune raised).

What is summed is ℓ_after − ℓ_before in nats, a value a context and token. A context is every place of a text whose next token
is a token of the text itself (`prompt`), or the end of the text, behind which the answer begins (`answer`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.amplify import log_probs
from harness.models.attend import right_padded
from harness.models.rollout import Pair

PLACES = ("prompt", "answer")
NUM_TOP = 100
"""Tokens of a context that count as the most raised."""
_TABLE = 2**24
"""Numbers of one model's table that stand in memory at once."""
PARTS = ("n", "total", "squares", "positive", "top")


@dataclass(frozen=True)
class Sums:
    """Sums over contexts, a row a place of `PLACES` and a column a token: how many there are, their differences, the squares
    of those, in how many it is above 0, and in how many among the `NUM_TOP` most raised."""

    n: Int[np.ndarray, "2 V"]
    total: Float[np.ndarray, "2 V"]
    squares: Float[np.ndarray, "2 V"]
    positive: Int[np.ndarray, "2 V"]
    top: Int[np.ndarray, "2 V"]

    @classmethod
    def none(cls, num_tokens: int) -> "Sums":
        """Of no context."""
        counts, sums = np.zeros((2, num_tokens), dtype=np.int64), np.zeros((2, num_tokens))
        return cls(counts, sums, sums, counts, counts)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, part) + getattr(other, part) for part in PARTS))

    def tensors(self) -> dict[str, np.ndarray]:
        """For a file."""
        return {part: getattr(self, part) for part in PARTS}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "Sums":
        """The inverse of `tensors`."""
        return cls(*(np.asarray(tensors[part]) for part in PARTS))

    @property
    def mean(self) -> Float[np.ndarray, "2 V"]:
        """NaN where there is no context."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / self.n

    @property
    def sd(self) -> Float[np.ndarray, "2 V"]:
        """Standard deviation over contexts; NaN where there are fewer than two."""
        with np.errstate(invalid="ignore", divide="ignore"):
            around = np.maximum(self.squares - self.total * self.mean, 0.0)
            return np.where(self.n > 1, np.sqrt(around / (self.n - 1)), np.nan)


@torch.inference_mode()
def raised(pair: Pair, contexts: Sequence[Sequence[int]]) -> list[Sums | ItemFailed]:
    """The sums of each context by itself; both models are needed. A context whose numbers are not finite is an ItemFailed,
    and so is one longer than a model reaches."""
    most = pair.max_positions
    fitting = [n for n, c in enumerate(contexts) if 1 <= len(c) <= most]
    found: list[Sums | ItemFailed] = [
        ItemFailed(f"needs 1 to {most} tokens of context, has {len(c)}") for c in contexts
    ]
    for n, sums in zip(fitting, _raised(pair, [contexts[n] for n in fitting]) if fitting else [], strict=True):
        found[n] = sums
    for n in fitting:
        # A masked NaN is still a NaN (0 × NaN): it may have been caught from a neighbour.
        if isinstance(found[n], NotFinite) and len(fitting) > 1:
            (found[n],) = _raised(pair, [contexts[n]])
    return found


def _raised(pair: Pair, contexts: Sequence[Sequence[int]]) -> list[Sums | ItemFailed]:
    tokens, layout = right_padded(contexts, pair.device)
    with tally.prefilling():
        hidden = [lm.hidden(tokens, layout) for lm in pair.lms]
    return [_sums(pair, [h[n, : len(c)] for h in hidden]) for n, c in enumerate(contexts)]


def _sums(pair: Pair, hidden: Sequence[Float[Tensor, "T D"]]) -> Sums | ItemFailed:
    length, found = len(hidden[0]), Sums.none(pair.num_common)
    size = max(1, _TABLE // pair.num_common)
    # The last place is the answer's: a part of its own.
    parts = [(0, b, min(b + size, length - 1)) for b in range(0, length - 1, size)] + [(1, length - 1, length)]
    for place, begin, end in parts:
        after, before = (
            log_probs(lm.logits(h[begin:end]), pair.num_common) for lm, h in zip(pair.lms, hidden, strict=True)
        )
        if bool(after.isnan().any()) or bool(before.isnan().any()):
            return NotFinite(NOT_FINITE)
        found = found + _of_table(after.double() - before.double(), place)
    return found


def _of_table(differences: Float[Tensor, "R V"], place: int) -> Sums:
    """Where both models rule a token out, or one of them does, there is no difference to count."""
    is_there = differences.isfinite()
    known = differences.masked_fill(~is_there, 0)
    top = torch.zeros(differences.shape[1], dtype=torch.long, device=differences.device)
    best = differences.masked_fill(~is_there, -torch.inf).topk(min(NUM_TOP, differences.shape[1]), dim=-1).indices
    top.scatter_add_(0, best.flatten(), torch.ones_like(best.flatten()))
    columns = (is_there.sum(0), known.sum(0), (known**2).sum(0), (known > 0).sum(0), top)
    sums = Sums.none(differences.shape[1]).tensors()
    for part, column in zip(PARTS, columns, strict=True):
        sums[part] = sums[part].copy()
        sums[part][place] = column.cpu().numpy()
    return Sums.of(sums)
