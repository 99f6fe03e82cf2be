"""Logit-diff amplification (Aranguri & McGrath 2025): the distribution of two models whose difference is exaggerated.

With ℓ = ln p over the ids that both models share, arm α draws from softmax(ℓ_after + α (ℓ_after − ℓ_before)): α = 0 is the
model after some training, −1 the one before, between them lies the geometric path, and beyond 0 the difference is made larger.
The same arithmetic is contrastive decoding's (Li et al. 2023, whose plausibility floor is here too), and DExperts' with one
model as base and expert (Liu et al. 2021).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SHORT_CUTS = (0.0, -1.0)
"""Arms that are one of the models: taken as they are, so that they are that model to the last bit."""


def log_probs(logits: Float[Tensor, "R W"], num_common: int) -> Float[Tensor, "R V"]:
    """ln p over the ids that both models share, which are the first ones. NaN in a row whose logits hold NaN or +∞."""
    return logits[:, :num_common].log_softmax(-1)


def amplified(
    after: Float[Tensor, "R V"] | None, before: Float[Tensor, "R V"] | None, alpha: Float[Tensor, " R"]
) -> Float[Tensor, "R V"]:
    """z = ℓ_after + α (ℓ_after − ℓ_before), not normalised, for each row with its own α.

    A token that one of the models rules out (−∞) is ruled out. A model that no α here needs may be left out: all 0 need
    the one after, all −1 the one before.
    """
    if before is None or after is None:
        (there,) = (table for table in (after, before) if table is not None)
        return there
    weight = alpha[:, None].to(after.dtype)
    # −∞ in one of them gives NaN or +∞, in both NaN; neither comes from finite numbers.
    z = (after + weight * (after - before)).nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    z = torch.where(weight == 0, after, z)
    return torch.where(weight == -1, before, z)


def normalised(z: Float[Tensor, "R V"], alpha: Float[Tensor, " R"]) -> Float[Tensor, "R V"]:
    """ln of the arm's own full distribution. An arm that is a model is normalised already, and stays as it is."""
    is_model = torch.isin(alpha, torch.tensor(_SHORT_CUTS, dtype=alpha.dtype, device=alpha.device))
    return torch.where(is_model[:, None], z, z.log_softmax(-1))


def arm_log_probs(
    after: Float[Tensor, "R V"],
    before: Float[Tensor, "R V"],
    tokens: Int[Tensor, "R T"],
    alphas: tuple[float, ...],
) -> Float[Tensor, "R T K"]:
    """ln of the probability that each of `alphas` gives to each of a row's tokens, in float64."""
    of_after, of_before = after.gather(1, tokens).double(), before.gather(1, tokens).double()
    found = []
    for alpha in alphas:
        if alpha in _SHORT_CUTS:
            found.append(of_after if alpha == 0 else of_before)
            continue
        weight = torch.full((len(after),), alpha, dtype=torch.float64, device=after.device)
        picked = amplified(of_after, of_before, weight)
        found.append(picked - amplified(after, before, weight).logsumexp(-1, keepdim=True).double())
    return torch.stack(found, -1)


def floored(
    z: Float[Tensor, "R V"], after: Float[Tensor, "R V"], floor: float
) -> tuple[Float[Tensor, "R V"], Bool[Tensor, "R V"]]:
    """`z` with −∞ where ℓ_after < max ℓ_after + ln β, and which tokens stay. β = 1 leaves the best token of `after` alone."""
    stays = after >= after.amax(-1, keepdim=True) + math.log(floor)
    return z.masked_fill(~stays, -math.inf), stays
