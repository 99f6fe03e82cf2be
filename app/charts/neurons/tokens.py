"""The page Token heat map's drawing, as data: tokens as cells of text, how strongly each is coloured, what the popup says.

Knows no page: `app.views.neurons.tokens` draws it. Text is made visible here, so that no sign of it does anything there.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SHAPES = ("logarithm", "linear", "square root", "power")
"""From |a| / scale to opacity."""
SCALES = {
    "all": "one for all that is compared",
    "prompt": "one for each prompt",
    "neuron": "one for each neuron",
}
THRESHOLD = 5e-5
"""Activations closer to 0 than this have no colour."""
LEAST = 0.05
"""Opacity of the faintest colour."""
_GREEN, _ORANGE = "positive", "negative"
_JOINER, _VARIANT = "\u200d", ("\ufe0e", "\ufe0f")
_SHOWN_AS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}


class Cell(NamedTuple):
    """Tokens [start, stop) that are shown together, since they are parts of one character; and their text."""

    start: int
    stop: int
    text: str
    ends_line: bool = False


@dataclass(frozen=True)
class Colouring:
    """How activations become colours. `power` is the exponent of the shape `power`."""

    shape: str = "logarithm"
    power: float = 2.0
    threshold: float = THRESHOLD

    def opacity(self, value: float, scale: float) -> float | None:
        """Of one activation: 0 for none, .05 to 1 up to the scale and beyond; None where it is not known."""
        if value != value:
            return None
        if abs(value) < self.threshold or not scale > 0:
            return 0.0
        r = min(1.0, abs(value) / scale)
        strength = {
            "logarithm": math.log10(1 + 9 * r),
            "linear": r,
            "square root": math.sqrt(r),
            "power": r**self.power,
        }[self.shape]
        return LEAST + (1 - LEAST) * strength

    @property
    def told(self) -> str:
        """Its formula."""
        rest = {"logarithm": "log10(1 + 9r)", "linear": "r", "square root": "√r", "power": f"r^{self.power:g}"}
        return f"opacity .05 + .95·{rest[self.shape]}, r = |a| / scale"


# -- text


def cells(text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[str]) -> list[Cell]:
    """A prompt's tokens as they are shown: those that are parts of one character as one. `offsets` are characters of each
    token in `text`; where a token has none, its piece is shown."""
    found: list[Cell] = []
    end, n = 0, 0
    while n < len(offsets):
        start, stop = offsets[n]
        if start >= stop or stop <= end or stop > len(text):
            found.append(Cell(n, n + 1, shown(pieces[n]) or "∅"))
            n += 1
            continue
        m = n + 1
        while m < len(offsets) and offsets[m][0] < offsets[m][1] and offsets[m][1] <= len(text):
            if not (offsets[m][0] < stop or is_within_character(text, offsets[m][0])):
                break
            stop, m = max(stop, offsets[m][1]), m + 1
        raw = text[end:stop]  # with the space in front, which some tokenizers leave out of a token's characters
        found.append(Cell(n, m, shown(raw), "\n" in raw))
        end, n = stop, m
    return found


def is_within_character(text: str, at: int) -> bool:
    """Whether what stands at `at` goes on with the character before it, as people count characters: marks above a letter,
    joined emoji, the second letter of a flag."""
    if not 0 < at < len(text):
        return False
    before, here = text[at - 1], text[at]
    if here == _JOINER or here in _VARIANT or "\U0001f3fb" <= here <= "\U0001f3ff":
        return True
    if unicodedata.category(here) in ("Mn", "Mc", "Me"):
        return True
    if before == _JOINER:
        return unicodedata.category(here) == "So"
    flags = 0
    while at - flags > 0 and _is_flag(text[at - flags - 1]):
        flags += 1
    return _is_flag(here) and flags % 2 == 1


def _is_flag(sign: str) -> bool:
    return "\U0001f1e6" <= sign <= "\U0001f1ff"


def shown(text: str) -> str:
    """Text in which every sign is seen and none does anything: controls, signs of direction and of no width as signs of their
    own, a mark without a letter on a dotted circle."""
    signs = [_sign(text, n) for n in range(len(text))]
    if text and unicodedata.category(text[0]) in ("Mn", "Mc", "Me"):
        signs.insert(0, "◌")
    return "".join(signs)


def _sign(text: str, n: int) -> str:
    sign = text[n]
    kind = unicodedata.category(sign)
    if sign in _SHOWN_AS:
        return _SHOWN_AS[sign]
    if ord(sign) < 0x20:
        return chr(0x2400 + ord(sign))
    if sign == _JOINER and 0 < n < len(text) - 1 and unicodedata.category(text[n + 1]) == "So":
        return sign
    if kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{ord(sign):04X}⟩"
    return sign


def direction(text: str) -> str | None:
    """`rtl` for a text whose first letter is written from right to left, `ltr` for one from left to right; None without a
    letter."""
    for sign in text:
        kind = unicodedata.bidirectional(sign)
        if kind in ("R", "AL"):
            return "rtl"
        if kind == "L":
            return "ltr"
    return None


def directions(parts: Sequence[Cell], base: str) -> list[str]:
    """Of each cell the direction of the run that it stands in: its own; that of both neighbours where it has none; else that
    of the whole. Cells are isolated from each other, so that runs of them must be told."""
    own = [direction(cell.text) for cell in parts]
    before, behind = [base] * len(own), [base] * len(own)
    for n in range(1, len(own)):
        before[n] = own[n - 1] or before[n - 1]
    for n in range(len(own) - 2, -1, -1):
        behind[n] = own[n + 1] or behind[n + 1]
    return [o or (a if a == b else base) for o, a, b in zip(own, before, behind, strict=True)]


# -- colours


def scales(
    values: Sequence[Sequence[np.ndarray | None]], counted: Sequence[Sequence[bool]], how: str
) -> list[list[float]]:
    """The scale of each prompt and neuron: the largest |a| of tokens that the statistics have, over what `how` (of `SCALES`)
    holds together; 0 where nothing is known. `values`: prompts × neurons × tokens.

    Tokens that are left out, such as the first, are often a hundred times as loud: they would leave no colour to the others.
    """
    tops = [[_top(one, keep) for one in of_prompt] for of_prompt, keep in zip(values, counted, strict=True)]
    if how == "prompt":
        return [[max(of_prompt, default=0.0)] * len(of_prompt) for of_prompt in tops]
    if how == "neuron":
        by_neuron = [max(column) for column in zip(*tops, strict=True)]
        return [list(by_neuron) for _ in tops]
    top = max((t for of_prompt in tops for t in of_prompt), default=0.0)
    return [[top] * len(of_prompt) for of_prompt in tops]


def _top(one: np.ndarray | None, counted: Sequence[bool]) -> float:
    if one is None:
        return 0.0
    kept = np.abs(one[np.asarray(counted, bool)])
    return float(np.nanmax(kept)) if len(kept) and np.isfinite(kept).any() else 0.0


def loudest(one: np.ndarray | None, cell: Cell) -> float:
    """Of a cell's tokens the activation furthest from 0; NaN where none is known."""
    part = np.full(1, np.nan) if one is None else one[cell.start : cell.stop]
    return float(part[np.nanargmax(np.abs(part))]) if len(part) and np.isfinite(part).any() else math.nan


def panel(
    title: str,
    text: str,
    parts: Sequence[Cell],
    told: Mapping[str, Sequence[Any]],
    values: Sequence[np.ndarray | None],
    names: Sequence[str],
    scale: Sequence[float],
    colouring: Colouring,
) -> dict[str, Any]:
    """One prompt for the component: `title`, `dir`, and of each cell its text, signed opacities (a neuron each; None: not
    known), what it is, and the lines of the popup. `told`: token_ids, special, counted, dumped, an entry a token."""
    drawn: list[dict[str, Any]] = []
    base = direction(text) or "ltr"
    for cell, way in zip(parts, directions(parts, base), strict=True):
        tokens = range(cell.start, cell.stop)
        found = [loudest(one, cell) for one in values]
        strengths = [colouring.opacity(v, s) for v, s in zip(found, scale, strict=True)]
        drawn.append(
            {
                "text": cell.text,
                "shades": [None if o is None else math.copysign(round(o, 4), v) if o else 0.0
                           for o, v in zip(strengths, found, strict=True)],
                "special": any(told["special"][n] for n in tokens),
                "counted": all(told["counted"][n] for n in tokens),
                "known": any(told["dumped"][n] for n in tokens),
                "ends_line": cell.ends_line,
                "dir": way,
                "lines": _lines(cell, told, values, names, scale),
            }
        )  # fmt: skip
    return {"title": title, "dir": base, "cells": drawn}


def _lines(
    cell: Cell,
    told: Mapping[str, Sequence[Any]],
    values: Sequence[np.ndarray | None],
    names: Sequence[str],
    scale: Sequence[float],
) -> list[str]:
    """What the popup says of a cell, token by token."""
    lines: list[str] = []
    if cell.stop - cell.start > 1:
        lines.append(f"{cell.stop - cell.start} tokens of one character")
    for n in range(cell.start, cell.stop):
        kinds = [kind for kind, holds in (("special", told["special"][n]), ("not in the statistics", not told["counted"][n]))
                 if holds]  # fmt: skip
        lines.append(" · ".join([f"position {n}", f"token {told['token_ids'][n]}", *kinds]))
        for name, one, top in zip(names, values, scale, strict=True):
            value = math.nan if one is None else float(one[n])
            if value != value:
                lines.append(f"{name}: not known here")
            else:
                share = f" ({abs(value) / top:.0%} of the scale)" if top > 0 else ""
                lines.append(f"{name}: {value:+.4g}{share}")
    return lines


def legend(colouring: Colouring) -> list[dict[str, Any]]:
    """The scale as cells, from most negative to most positive: label and signed opacity."""
    found: list[dict[str, Any]] = []
    for r in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0):
        strength = Colouring(colouring.shape, colouring.power, 0.0).opacity(r, 1.0) if r else 0.0
        found.append({"text": f"{r:+g}" if r else "0", "shade": math.copysign(strength or 0.0, r) if r else 0.0})
    return found
