"""The deliberately plain reference: one prompt at a time, no padding, no cache, eager attention, full logits.

Written to be checked by eye and slow on purpose. The tests, `harness sanity` and `harness bench` hold the fast paths
against it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.models import attend
from harness.models.decode import Completion, Request, Sampling, sample
from harness.models.load import LM


@contextmanager
def eager(lm: LM) -> Iterator[None]:
    """The family's own eager attention for the time of the block."""
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(attend.NAME)


@torch.inference_mode()
def next_logits(lm: LM, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
    """Logits after every token of one text, by a plain Hugging Face call; float32, or float64 of a float64 model."""
    with eager(lm):
        logits = lm.model(input_ids=torch.tensor([list(token_ids)], device=lm.device), use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sequence_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln P(sequence | context), one forward of context + sequence."""
    log_p = next_logits(lm, [*context, *sequence]).log_softmax(-1).double()
    at = range(len(context) - 1, len(context) + len(sequence) - 1)
    return float(sum(log_p[i, token] for i, token in zip(at, sequence, strict=True)))


def word_end_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln of the mass of next tokens that end a word, after context + sequence."""
    p = next_logits(lm, [*context, *sequence])[-1].softmax(-1).double()
    return float(p[torch.from_numpy(lm.vocabulary.ends_word).to(p.device)].sum().log())


def complete(lm: LM, request: Request, sampling: Sampling) -> Completion:
    """One completion, the whole text forwarded again for every token."""
    done = Completion()
    key: Int[Tensor, " 1"] = torch.tensor([request.key], dtype=torch.long, device=lm.device)
    for step in range(sampling.max_new_tokens):
        logits = next_logits(lm, [*request.context, *done.token_ids])[-1:]
        token = int(logits.argmax() if sampling.temperature == 0 else sample(logits, key, step, sampling))
        best = logits[0].topk(2).values
        done.token_ids.append(token)
        done.logprobs.append(float(logits.log_softmax(-1)[0, token]))
        done.margins.append(float(best[0] - best[1]))
        if token in lm.vocabulary.stop_ids:
            done.finish_reason = "stop"
        elif sampling.stop_at_newline and lm.vocabulary.has_newline[token]:
            done.finish_reason = "newline"
        if done.finish_reason != "length":
            break
    return done
