"""Tokens that pass through a model, counted where they are forwarded; whoever runs a batch takes the difference.

One meaning everywhere: a token is counted when it goes through the layers, and one that goes through some of them
counts as that share. Knows no tensor, so that the engine can read it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """Tokens forwarded so far in this process."""

    tokens: float = 0.0
    prefill: float = 0.0
    """Of them, those of contexts; the others are a word's candidate tokens and new tokens of answers."""
    padding: float = 0.0
    """Computed and thrown away; not among `tokens`."""

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(self.tokens - other.tokens, self.prefill - other.prefill, self.padding - other.padding)


_now = Tally()
_prefill_share: ContextVar[float] = ContextVar("prefill_share", default=0.0)


def now() -> Tally:
    """What has been forwarded until now; subtract an earlier one."""
    return _now


def add(tokens: float, padding: float = 0.0) -> None:
    """Count tokens that went through a model (or their share of it)."""
    global _now
    _now = Tally(_now.tokens + tokens, _now.prefill + tokens * _prefill_share.get(), _now.padding + padding)


@contextmanager
def prefilling(share: float = 1.0) -> Iterator[None]:
    """Of what is forwarded inside the block, this share are tokens of contexts."""
    token = _prefill_share.set(share)
    try:
        yield
    finally:
        _prefill_share.reset(token)
