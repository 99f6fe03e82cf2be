"""The most probable tokens of two models at every step of texts that are given: what `amplify` made its choices from."""

from collections.abc import Sequence

import numpy as np
import torch

from harness import tally
from harness.models.amplify import log_probs
from harness.models.attend import right_padded
from harness.models.rollout import Pair


@torch.inference_mode()
def most_probable(
    pair: Pair, texts: Sequence[tuple[Sequence[int], Sequence[int]]], number: int
) -> list[dict[str, np.ndarray]]:
    """For each (context, completion) `after_ids`, `after_logps`, `before_ids`, `before_logps` [T, k], in nats, of the steps
    at which the completion's tokens were chosen; of a model that is left out nothing. k is at most the common vocabulary."""
    whole = [[*context, *completion[:-1]] for context, completion in texts]
    tokens, layout = right_padded(whole, pair.device)
    found: list[dict[str, np.ndarray]] = [{} for _ in texts]
    for name, lm in (("after", pair.after), ("before", pair.before)):
        if lm is None:
            continue
        with tally.prefilling():
            hidden = lm.hidden(tokens, layout)
        for n, (context, completion) in enumerate(texts):
            steps = hidden[n, len(context) - 1 : len(context) - 1 + len(completion)]
            table = log_probs(lm.logits(steps), pair.num_common)
            best = table.topk(min(number, table.shape[1]), dim=-1)
            found[n][f"{name}_ids"] = best.indices.to(torch.int32).cpu().numpy()
            found[n][f"{name}_logps"] = best.values.float().cpu().numpy()
    return found
