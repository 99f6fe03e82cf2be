"""Surprisal from a model: -ln p(token | the tokens before it). Knows no run and no table."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from harness import tally
from harness.errors import NOT_FINITE, NotFinite
from harness.models import plain
from harness.models.attend import right_padded
from harness.models.load import LM

Tokens = Sequence[int]


@torch.inference_mode()
def surprisals(lm: LM, texts: Sequence[Tokens]) -> list[Float[np.ndarray, " N"]]:
    """Nats of every token but a text's first, one forward for all texts; each has two tokens or more.

    Raises NotFinite where the logits of any text are not finite: a neighbour in the batch may have caught it.
    """
    tokens, layout = right_padded(texts, lm.device)
    with tally.prefilling():
        hidden = lm.hidden(tokens, layout)
    found = [_read(lm, row[: len(text) - 1], text) for row, text in zip(hidden, texts, strict=True)]
    if not all(np.isfinite(nats).all() for nats in found):
        raise NotFinite(NOT_FINITE)
    return found


def plain_surprisals(lm: LM, text: Tokens) -> Float[np.ndarray, " N"]:
    """The same of one text, by a plain Hugging Face call: slow, and easy to check by eye."""
    log_p = plain.next_logits(lm, text)[:-1].log_softmax(-1)
    return np.array([-float(log_p[n, token]) for n, token in enumerate(text[1:])])


def _read(lm: LM, hidden: Float[torch.Tensor, "N D"], text: Tokens) -> Float[np.ndarray, " N"]:
    log_p = lm.logits(hidden).log_softmax(-1)
    emitted = torch.tensor(text[1:], device=log_p.device)[:, None]
    return -log_p.gather(1, emitted)[:, 0].double().cpu().numpy()
