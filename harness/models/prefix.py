"""The common start of a batch's contexts, forwarded once. Every prompt of a condition opens with the same words."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from harness.models.attend import Layout
from harness.models.load import LM

_WORTH = 0.08
"""Share of a batch's tokens that must be saved before a forward of its own, and masks for the rest, pay."""


def shared_length(contexts: Sequence[Sequence[int]], padded_tokens: int) -> int:
    """Tokens that all contexts start with, the last token of the shortest left out; 0 where sharing does not pay."""
    limit = min(map(len, contexts)) - 1
    length = next((i for i in range(limit) if len({c[i] for c in contexts}) > 1), limit)
    return length if length * (len(contexts) - 1) > _WORTH * padded_tokens else 0


def shared_cache(lm: LM, tokens: Sequence[int], rows: int) -> DynamicCache:
    """A cache of `rows` rows that hold these tokens, forwarded as one row; empty for no tokens."""
    cache = lm.new_cache()
    if tokens:
        positions = torch.arange(len(tokens), device=lm.device)[None]
        lm.hidden(torch.tensor([list(tokens)], device=lm.device), Layout(positions, positions), cache)
        cache.batch_repeat_interleave(rows)
    return cache
