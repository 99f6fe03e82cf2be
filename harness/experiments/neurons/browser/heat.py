"""Activations as colours: green above zero, orange below, the stronger the further. Where a terminal has no colours, as signs.

Knows no run and no Textual.
"""

from functools import lru_cache
from math import isfinite, log10
from typing import Literal

from rich.color import Color
from rich.style import Style

Depth = Literal["mono", "16", "full"]
"""How many colours a terminal has: none, sixteen, or enough for shades."""
THRESHOLD = 5e-5
"""Activations no further from zero than this are shown as none."""
GROUND, INK = (18, 19, 22), (228, 228, 228)
_GREEN, _ORANGE = (52, 168, 83), (240, 140, 30)
_LEVELS = 48  # shades that are told apart, so that styles can be kept
_COARSE = ((0.75, 3), (0.35, 2), (0.10, 1))
"""Steps of sixteen colours: at what share of the scale each begins."""


def opacity(share: float) -> float:
    """How strong the colour of an activation is: .05 to 1 for |a| from none to the whole of the scale, by a logarithm."""
    return 0.05 + 0.95 * log10(1 + 9 * min(1.0, max(0.0, share)))


def style_of(value: float, scale: float, depth: Depth) -> Style:
    """The style of a token with this activation; an empty one for none, and where there are no colours."""
    share = _share(value, scale)
    if not share or depth == "mono":
        return Style.null()
    if depth == "16":
        return _coarse(next((step for least, step in _COARSE if share >= least), 0), value > 0)
    return _shade(round(opacity(share) * _LEVELS), value > 0)


def sign_of(value: float, scale: float) -> str:
    """An activation in two signs: `+9` is the whole of the scale, `-1` a ninth of it; two spaces for less than half of that."""
    level = round(9 * _share(value, scale))
    return f"{'+' if value > 0 else '-'}{level}" if level else "  "


def bar(share: float) -> str:
    """One sign whose height is a share of 1."""
    return "▁▂▃▄▅▆▇█"[min(7, max(0, int(share * 8)))] if isfinite(share) else " "


def _share(value: float, scale: float) -> float:
    if not isfinite(value) or not scale > 0 or abs(value) <= THRESHOLD:
        return 0.0
    return min(1.0, abs(value) / scale)


@lru_cache(maxsize=256)
def _shade(level: int, is_positive: bool) -> Style:
    part = level / _LEVELS
    mixed = [round(g + (c - g) * part) for g, c in zip(GROUND, _GREEN if is_positive else _ORANGE, strict=True)]
    is_light = mixed[0] * 0.299 + mixed[1] * 0.587 + mixed[2] * 0.114 > 110
    return Style(bgcolor=Color.from_rgb(*mixed), color=Color.from_rgb(*((0, 0, 0) if is_light else INK)))


@lru_cache(maxsize=16)
def _coarse(step: int, is_positive: bool) -> Style:
    name = "green" if is_positive else "yellow"  # what terminals call yellow is orange or brown
    return (
        Style.null(),
        Style(color=name),
        Style(bgcolor=name, color="black"),
        Style(bgcolor=f"bright_{name}", color="black", bold=True),
    )[step]
