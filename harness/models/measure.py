"""What is read off activations: lens statistics, span masses and the ratios made of them. Pure functions on tensors.

Logarithms are natural; the arithmetic is float32 (float64 of a float64 model), sums over probabilities float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-9
"""Added to every denominator of an attention ratio, against one over nothing."""
SPANS = ("instruction", "negation", "mention", "question")
"""The order of span masses here."""


@dataclass(frozen=True)
class LensRows:
    """What the unembedding of N residual vectors says, one entry a vector."""

    p_target: Float[Tensor, " N"]
    p_emitted: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    kl_final: Float[Tensor, " N"]
    top_ids: Int[Tensor, "N C"]
    top_probs: Float[Tensor, "N C"]


def target_mass(
    log_p: Float[Tensor, "N V"], targets: Int[Tensor, "N C"], is_target: Bool[Tensor, "N C"]
) -> Float[Tensor, " N"]:
    """Probability of each row's own set of tokens; `targets` is padded, and `is_target` says with what."""
    picked = log_p.gather(1, targets).double().exp()
    return picked.masked_fill(~is_target, 0.0).sum(-1)


def lens_rows(
    log_p: Float[Tensor, "N V"],
    final: Float[Tensor, "N V"],
    targets: Int[Tensor, "N C"],
    is_target: Bool[Tensor, "N C"],
    emitted: Int[Tensor, " N"],
    top_k: int = 5,
) -> LensRows:
    """Statistics of lens distributions against the model's final ones, both as log-probabilities.

    `kl_final` is KL(final ‖ lens) in nats: what a code made for the lens costs when the model's own answer is drawn
    (Belrose et al. 2023, arXiv 2303.08112).
    """
    p = log_p.exp()
    # Where a probability is 0 its term is 0, not 0 × -inf.
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    p_final = final.exp()
    kl = torch.where(p_final > 0, p_final * (final - log_p), 0.0).sum(-1).clamp_min(0.0)
    top_probs, top_ids = p.topk(min(top_k, p.shape[1]), dim=-1)
    p_emitted = log_p.gather(1, emitted[:, None])[:, 0].double().exp()
    return LensRows(
        target_mass(log_p, targets, is_target), p_emitted, entropy.double(), kl.double(), top_ids, top_probs.double()
    )


def span_masses(weights: Float[Tensor, "R H Q S"], spans: Bool[Tensor, "R C S"]) -> Float[Tensor, "R H Q C"]:
    """m(span): the attention that falls on each span's tokens, summed."""
    return torch.einsum("rhqs,rcs->rhqc", weights, spans.to(weights.dtype))


def attention_ratios(
    masses: Float[np.ndarray, "*rows 4"], lengths: Sequence[int | None]
) -> Mapping[str, Float[np.ndarray, "*rows"] | None]:
    """IAR, NF, TMF and PI (docs/method.md, Terms) from the masses of `SPANS`, and the same per token (`*_token`: m / |span|).

    IAR = m(instruction) / (m(instruction) + m(question)), NF = m(negation) / m(instruction),
    TMF = m(mention) / m(instruction), PI = TMF − NF. A ratio whose span does not exist (length None) is None.
    """
    found: dict[str, Float[np.ndarray, "*rows"] | None] = {}
    for suffix, scale in (("", [1.0] * 4), ("_token", [1.0 / n if n else 1.0 for n in lengths])):
        instruction, negation, mention, question = (masses[..., i] * scale[i] for i in range(4))
        have = dict(zip(SPANS, (n is not None for n in lengths), strict=True))
        iar = instruction / (instruction + question + EPSILON)
        nf = negation / (instruction + EPSILON)
        tmf = mention / (instruction + EPSILON)
        is_whole = have["instruction"]
        found[f"iar{suffix}"] = iar if is_whole and have["question"] else None
        found[f"nf{suffix}"] = nf if is_whole and have["negation"] else None
        found[f"tmf{suffix}"] = tmf if is_whole and have["mention"] else None
        found[f"pi{suffix}"] = tmf - nf if is_whole and have["negation"] and have["mention"] else None
    return found
