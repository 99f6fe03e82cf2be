"""A prompt's tokens as cells of text that a terminal shows and does not obey, and how they are laid out in lines.

A prompt may be anybody's. Knows no run and no Textual.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from unicodedata import combining

from rich.cells import cell_len

from harness.terminal import plain

CONTINUED = "·"
"""Stands for a token that is a further part of the character before it."""
_SHOWN_AS = {"\n": "⏎", "\t": "⇥"}
_MOVING = frozenset((*range(0xFE00, 0xFE10), *range(0x1F3FB, 0x1F400), *range(0xE0100, 0xE01F0)))
"""Selectors of variants and of skin: printable, and not two terminals agree how wide what stands before them becomes."""


@lru_cache(maxsize=65536)
def visible(text: str) -> str:
    """Text with everything that is not printable as a code, so that it neither moves a cursor nor hides."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c.isprintable() and ord(c) not in _MOVING else _SHOWN_AS.get(c) or _code(c) for c in text
    )  # fmt: skip


def _code(c: str) -> str:
    told = plain(c)
    if told != c:
        return told
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


class Cell(NamedTuple):
    """A token as it is shown."""

    text: str
    is_special: bool
    is_counted: bool
    """Whether the statistics have it."""
    row: int | None
    """Its row in the prompt's activations; None where they were not dumped."""
    part: int = 1
    of: int = 1
    """Which of so many tokens of one character it is."""
    ends_line: bool = False


@dataclass(frozen=True)
class Context:
    """A prompt as the model saw it."""

    prompt_id: str
    text: str
    cells: tuple[Cell, ...]
    spans: tuple[tuple[int, int], ...]
    """Characters of each token in `text`."""

    def token_at(self, char: int) -> int | None:
        """The token that holds a character; None where none does."""
        return next((n for n, (a, b) in enumerate(self.spans) if a <= char < b), None)


def context_of(row: Mapping[str, Any], special: Collection[int]) -> Context:
    """A row of `contexts` in cells; bytes of one character, spread over tokens, are shown at the first of them."""
    ids = row["token_ids"] or []
    pieces, offsets, counted = (row[name] or [] for name in ("pieces", "offsets", "is_counted"))
    row_of = {position: n for n, position in enumerate(row["positions"] or [])}
    text = row["text"] or ""
    spans = tuple((int(offsets[n][0]), int(offsets[n][1])) if n < len(offsets) else (0, 0) for n in range(len(ids)))
    cells = [
        Cell(
            shown, ids[n] in special, bool(counted[n]) if n < len(counted) else True, row_of.get(n), part, of,
            ends_line="\n" in raw,
        )
        for n, (raw, shown, part, of) in enumerate(_texts(text, spans, pieces))
    ]  # fmt: skip
    return Context(row["prompt_id"], text, tuple(cells), spans)


def _texts(text: str, spans: Sequence[tuple[int, int]], pieces: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Of every token its raw text, what is shown, and which part of how many it is."""
    found: list[tuple[str, str, int, int]] = []
    end, n = 0, 0
    while n < len(spans):
        a, b = spans[n]
        if a >= b:  # a token of no text: one that the tokenizer put there
            piece = (pieces[n] if n < len(pieces) else "") or ""
            found.append((piece, visible(piece), 1, 1))
            n += 1
            continue
        num = 1
        while n + num < len(spans) and spans[n + num] == (a, b):
            num += 1
        # Some tokenizers leave the space in front out of a token's characters.
        start = end if end < a and text[end:a].isspace() else max(a, end)
        raw = text[start:b]
        shown = visible(raw)
        if raw and combining(raw[0]):
            shown = "◌" + shown
        found.append((raw, shown or CONTINUED, 1, num))
        found += [("", CONTINUED, k, num) for k in range(2, num + 1)]
        end, n = max(end, b), n + num
    return found


class Piece(NamedTuple):
    """A stretch of one line that belongs to one token."""

    token: int
    text: str
    width: int


@dataclass(frozen=True)
class Layout:
    """Tokens in lines of a width, and the line that each token begins in."""

    lines: tuple[tuple[Piece, ...], ...]
    line_of: tuple[int, ...]

    def token_at(self, line: int, column: int) -> int | None:
        """The token at a place on the screen."""
        if not 0 <= line < len(self.lines):
            return None
        at = 0
        for piece in self.lines[line]:
            at += piece.width
            if column < at:
                return piece.token
        return None


def layout(cells: Sequence[Cell], width: int, least: int = 1) -> Layout:
    """Cells one after another in lines of this many columns; a cell takes `least` columns or more, and one that is longer
    than a line goes on in the next."""
    lines: list[list[Piece]] = [[]]
    line_of: list[int] = []
    width, used = max(width, least, 2), 0
    for n, cell in enumerate(cells):
        shown = f"░{cell.text}░" if cell.is_special else cell.text
        room = max(cell_len(shown), least)
        if used + room > width and used:
            lines.append([])
            used = 0
        line_of.append(len(lines) - 1)
        for part in _cut(shown, width):
            if used + max(cell_len(part), least) > width and used:
                lines.append([])
                used = 0
            taken = max(cell_len(part), least)
            lines[-1].append(Piece(n, part + " " * (taken - cell_len(part)), taken))
            used += taken
        if cell.ends_line:
            lines.append([])
            used = 0
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    return Layout(tuple(map(tuple, lines)), tuple(line_of))


def _cut(text: str, width: int) -> list[str]:
    """Text in pieces of at most so many columns."""
    if cell_len(text) <= width:
        return [text]
    parts, part, used = [], "", 0
    for c in text:
        wide = cell_len(c)
        if used + wide > width:
            parts.append(part)
            part, used = "", 0
        part, used = part + c, used + wide
    return [*parts, part]
