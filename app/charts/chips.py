"""Text token by token, each token a chip coloured by a number, as data (`app.chips` draws it); and text with parts marked."""

from collections.abc import Sequence
from dataclasses import dataclass

OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Chip:
    """One token: its text, its background (a CSS colour, '' for none), a line under it, an outline, and what hovering says."""

    text: str
    colour: str = ""
    note: str = ""
    is_marked: bool = False
    is_missing: bool = False
    underline: str = ""


def shade(value: float | None, top: float, colour: tuple[int, int, int] = (0, 114, 178)) -> str:
    """A CSS colour whose opacity is value / top, in 0 to 1; '' for none."""
    if value is None or value != value or top <= 0:
        return ""
    return f"rgba({colour[0]}, {colour[1]}, {colour[2]}, {min(1.0, max(0.0, value / top)):.3f})"


def in_place(text: str | None, spans: Sequence[Sequence[int]] | None) -> str:
    """The text with each span, in characters (code points), between ⟦ and ⟧."""
    if not isinstance(text, str):
        return ""
    found, done = "", 0
    known = spans if spans is not None and hasattr(spans, "__len__") else []  # a data frame says NA, not None
    for start, end in sorted((int(a), int(b)) for a, b in known):
        if start < done:  # overlaps the one before, which is marked
            continue
        found += f"{text[done:start]}{OPEN}{text[start:end]}{CLOSE}"
        done = end
    return found + text[done:]
