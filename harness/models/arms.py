"""Exact probabilities of given token sequences under every arm, without sampling: one tree forward a model.

Both models score the same trie behind each context; the arms are arithmetic on the same rows. So a whole curve over α costs
what two forwards do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.amplify import arm_log_probs, log_probs
from harness.models.load import LM
from harness.models.rollout import Pair
from harness.models.score import rows_of_trees, too_long, tree_batch
from harness.text.words import Trie

_ROWS = 256
"""Rows whose distributions under both models stand in memory at once."""


@dataclass(frozen=True)
class ArmScores:
    """What every arm says of a trie's sequences after one context: `logprobs` [K, S], in nats."""

    logprobs: np.ndarray


@torch.inference_mode()
def score_arms(
    pair: Pair, contexts: Sequence[Sequence[int]], tries: Sequence[Trie], alphas: Sequence[float]
) -> list[ArmScores | ItemFailed]:
    """Every arm's scores of every trie's sequences after its context; both models are needed.

    An item whose numbers are not finite, or which is longer than one of the models reaches, comes back as ItemFailed.
    """
    refusals = [
        next((why for lm in pair.lms if (why := too_long(lm, c, t)) is not None), None)
        for c, t in zip(contexts, tries, strict=True)
    ]
    results: list[ArmScores | ItemFailed | None] = list(refusals)
    kept = [n for n, why in enumerate(refusals) if why is None]
    if kept:
        scores = _scored(pair, [contexts[n] for n in kept], [tries[n] for n in kept], tuple(alphas))
        for n, score in zip(kept, scores, strict=True):
            results[n] = score
        # A masked NaN is still a NaN (0 × NaN), so an item may have caught it from a neighbour in its batch.
        bad = [n for n in kept if isinstance(results[n], NotFinite)]
        for n in bad if len(kept) > 1 else ():
            (results[n],) = _scored(pair, [contexts[n]], [tries[n]], tuple(alphas))
    return [r for r in results if r is not None]


def _scored(
    pair: Pair, contexts: Sequence[Sequence[int]], tries: Sequence[Trie], alphas: tuple[float, ...]
) -> list[ArmScores | ItemFailed]:
    tokens, layout = tree_batch(contexts, tries, pair.device)
    num_tokens, num_nodes = len(layout.cells or tokens), sum(map(len, tries))
    with tally.prefilling(1 - num_nodes / num_tokens):
        heads = [(lm, rows_of_trees(lm.hidden(tokens, layout), contexts, tries)) for lm in pair.lms]
    starts = np.cumsum([0] + [1 + len(t) for t in tries])
    # Sequences that begin alike want the same numbers, which are read once.
    wanted: list[dict[int, int]] = [{} for _ in range(int(starts[-1]))]
    """Per row the tokens that are wanted of it, and the column of each."""
    for start, trie in zip(starts, tries, strict=False):
        for node, token in (step for steps in trie.steps for step in steps):
            columns = wanted[int(start) + 1 + node]
            columns.setdefault(token, len(columns))
    picked, is_finite = _picked(pair, heads, wanted, alphas)
    results: list[ArmScores | ItemFailed] = []
    for n, trie in enumerate(tries):
        # One bad row fails its whole item: a sum of the other sequences would pass for the phrase's probability.
        if not is_finite[starts[n] : starts[n + 1]].all():
            results.append(NotFinite(NOT_FINITE))
            continue
        first = int(starts[n]) + 1
        sums = [sum(picked[first + node, wanted[first + node][token]] for node, token in steps) for steps in trie.steps]
        results.append(ArmScores(np.stack(sums, axis=-1)))
    return results


def _picked(
    pair: Pair,
    heads: Sequence[tuple[LM, Float[Tensor, "N D"]]],
    wanted: Sequence[dict[int, int]],
    alphas: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """[N, T, K] of the wanted tokens of each row, and [N] whether all that either model says there is a number."""
    widest = max(1, *map(len, wanted))
    tokens = torch.zeros(len(wanted), widest, dtype=torch.long, device=pair.device)
    for row, columns in enumerate(wanted):
        if columns:
            tokens[row, : len(columns)] = torch.tensor(list(columns), device=pair.device)
    picked, finite = [], []
    for part in torch.arange(len(wanted), device=pair.device).split(_ROWS):
        after, before = (log_probs(lm.logits(rows[part]), pair.num_common) for lm, rows in heads)
        picked.append(arm_log_probs(after, before, tokens[part], alphas))
        finite.append(~(after.isnan().any(-1) | before.isnan().any(-1)))
    return torch.cat(picked).cpu().numpy(), torch.cat(finite).cpu().numpy()
