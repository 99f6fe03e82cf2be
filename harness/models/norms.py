"""Norms found by what they compute, and held at one forward's scale: then they are linear, and a sum can go through them.

y = s(x) · γ ⊙ (x − c·mean(x)) + β with one number s(x) a token is LayerNorm (c = 1) and RMSNorm (c = 0), with or without
gain and bias, whatever a family calls them and however it stores its gain (Gemma's 1 + w).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harness.models.anatomy import close

_PROBES = (1.0, 10.0)
"""Sizes of the vectors that a module is tried with: what is a norm gives the same for all."""


@dataclass(frozen=True)
class Norm:
    """The gain and bias of a norm over D numbers; `is_centred`: it takes the mean away."""

    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"]
    is_centred: bool

    def centred(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """x − c·mean(x)."""
        return x - x.mean(-1, keepdim=True) if self.is_centred else x

    def scale(self, x: Float[Tensor, "*rows D"], y: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows 1"]:
        """s with which the norm made y of x: least squares, since every family adds its own little number under the root."""
        along = self.gain * self.centred(x)
        return ((y - self.bias) * along).sum(-1, keepdim=True) / (along * along).sum(-1, keepdim=True).clamp_min(1e-30)

    def apply(self, x: Float[Tensor, "*rows D"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows D"]:
        """The norm at a scale that is given, without its bias: linear in x."""
        return scale * self.gain * self.centred(x)

    def back(self, direction: Float[Tensor, "*rows D"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows D"]:
        """The adjoint of `apply`: ⟨direction, apply(x)⟩ = ⟨back(direction), x⟩."""
        return self.centred(scale * self.gain * direction)


def norm_of(module: nn.Module, width: int, like: Tensor) -> Norm | None:
    """What `module` is as a norm over `width` numbers; None where it is none. `like` gives device and dtype."""
    if list(module.children()) or any(p.shape != (width,) for p in module.parameters()):
        return None
    if isinstance(module, nn.Identity):
        return None
    try:
        with torch.no_grad():
            return _norm_of(module, width, like)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):  # it takes something else than a tensor
        return None


def _norm_of(module: nn.Module, width: int, like: Tensor) -> Norm | None:
    wide = torch.promote_types(like.dtype, torch.float32)

    def of(x: Tensor) -> Tensor:
        y = module(x.to(like.dtype))
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise TypeError
        return y.to(wide)

    # No number is small and the mean is 0, so that the gain can be read off by division.
    signs = torch.ones(1, width, device=like.device, dtype=wide)
    signs[:, 1::2] = -1
    if width % 2:
        signs[:, -1] = 0 if width == 1 else 2
        signs[:, 0] = signs[:, 0] if width == 1 else -1
    there, back = of(signs), of(-signs)
    norm = Norm(((there - back) / 2 / signs)[0], ((there + back) / 2)[0], False)
    angles = torch.arange(width, device=like.device, dtype=wide)
    probes = torch.stack([torch.cos(angles * k + k) + 0.3 * k for k in (0.7, 1.9, 2.3)])
    found = [of(size * probes) for size in _PROBES]
    for is_centred in (False, True):
        tried = Norm(norm.gain, norm.bias, is_centred)
        scales = [tried.scale(size * probes, y) for size, y in zip(_PROBES, found, strict=True)]
        is_same = close((scales[0] / scales[1]).to(like.dtype), torch.full_like(scales[0], 10.0).to(like.dtype))
        if is_same and all(
            close((tried.apply(size * probes, s) + norm.bias).to(like.dtype), y.to(like.dtype))
            for size, s, y in zip(_PROBES, scales, found, strict=True)
        ):
            return tried
    return None


def norms_of(decoder: nn.Module, width: int, like: Tensor) -> dict[nn.Module, Norm]:
    """Every norm over the residual stream's `width` numbers in a decoder."""
    return {m: n for m in decoder.modules() if (n := norm_of(m, width, like)) is not None}


@contextmanager
def frozen(norms: Sequence[tuple[nn.Module, Norm]]) -> Iterator[None]:
    """Gradients of forwards inside the block take every norm's scale for a constant. What is computed stays the same."""

    def hook(norm: Norm):
        def replace(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            wide = torch.promote_types(x.dtype, torch.float32)
            scale = norm.scale(x.detach().to(wide), output.detach().to(wide))
            linear = norm.apply(x.to(wide), scale).to(output.dtype)
            return output.detach() + (linear - linear.detach())

        return replace

    handles = [module.register_forward_hook(hook(norm)) for module, norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
