"""Rules on a completion's text, and when each of them has fired.

Patterns are RE2's: matching takes time linear in the text, whatever a pattern is. A rule that has fired in a beginning of a
text has fired in the text, unless its verdict waits for the end (`$`, `\\b`): so the step at which it fires is found by
bisection.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import re2

from harness.text.detect import Decode, token_char_spans

_WAITS = re.compile(r"\$|\\[bBz]")
"""Parts of a pattern whose truth at the end of a beginning may be another in the whole text. Some that are found are harmless
(`[$]`): such a pattern is taken to wait, which is always right."""
_EDGE = r"[^\p{L}\p{N}\p{M}]"
"""What may stand beside a word. `_` is neither letter nor digit: it ends a word, which `\\b` would not have."""
MOST_PATTERN = 10_000
_MOST_MEMORY = 64 << 20
"""Bytes that a compiled pattern may take."""


class BadPattern(ValueError):
    """A pattern that RE2 does not take; its text says why, in one line."""


class Hit(NamedTuple):
    """Where a detector fired: steps of the first token of what was found and of the token with which it was sure, counted
    from 0; the characters, half-open; and these characters."""

    first_step: int
    end_step: int
    char_span: tuple[int, int]
    text: str


@dataclass(frozen=True)
class Detector:
    """A rule: one of the literal phrases, whatever the case, or a pattern; `word`: between signs that are neither letters nor
    digits, or at the ends of the text. Made by `of`, which checks it."""

    any_of: tuple[str, ...] = ()
    regex: str | None = None
    word: bool = False

    @classmethod
    def of(cls, any_of: Sequence[str] = (), regex: str | None = None, *, word: bool = False) -> "Detector":
        """Raises BadPattern."""
        made = cls(tuple(any_of), regex, word)
        made._whole  # noqa: B018 - compiled now, so that a pattern that does not compile is told of before a run begins
        made._early  # noqa: B018
        if made.regex is not None and _compiled(made.regex, made.regex).search("") is not None:
            raise BadPattern(f"{made.regex[:80]!r} fires in the empty text, and so in every one")
        return made

    def find(self, token_ids: Sequence[int], text: str, decode: Decode, last_step: int) -> Hit | None:
        """The first place where `text`, which these tokens decode to, has it; None: it has not. `last_step` is that of the
        token with which the text came to its end, which may be one that adds nothing to it.

        Raises MappingError where tokens and text cannot be put side by side.
        """
        span = self.span(text)
        if span is None:
            return None
        spans = token_char_spans(token_ids, decode)
        first = _step_of(spans, span[0])
        end = _step_of(spans, sure - 1) if (sure := self._sure_after(text)) else last_step
        return Hit(first, max(first, end), span, text[span[0] : span[1]])

    def span(self, text: str) -> tuple[int, int] | None:
        """[start, end) in characters of the first place; None where there is none, or it is empty."""
        found = self._whole.search(text)
        if found is None:
            return None
        start, end = found.span(1)
        return (start, end) if end > start else None

    def _sure_after(self, text: str) -> int | None:
        """How many characters suffice for the verdict; None where it takes the whole text, and that it ended."""
        if self._early is None or not self._fires(text):
            return None
        low, high = 0, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fires(text[:middle]) else (middle, high)
        return high

    def _fires(self, text: str) -> bool:
        assert self._early is not None
        found = self._early.search(text)
        return found is not None and found.end(1) > found.start(1)

    @cached_property
    def _core(self) -> str:
        if self.regex is not None:
            return f"({_without_groups(self.regex)})"
        # The longest first: of two phrases that begin at one place the longer one is told.
        phrases = sorted(dict.fromkeys(self.any_of), key=lambda p: (-len(p), p))
        return f"((?i:{'|'.join(map(re2.escape, phrases))}))"

    @cached_property
    def _whole(self) -> Any:
        edges = (rf"(?:\A|{_EDGE})", rf"(?:\z|{_EDGE})") if self.word else ("", "")
        return _compiled(self.regex, edges[0] + self._core + edges[1])

    @cached_property
    def _early(self) -> Any:
        """As `_whole`, but true of a text only where it is true of all that begin with it; None where there is no such."""
        if self.regex is not None and _WAITS.search(self.regex):
            return None
        return _compiled(self.regex, rf"(?:\A|{_EDGE}){self._core}{_EDGE}") if self.word else self._whole


def _without_groups(pattern: str) -> str:
    """The pattern, checked by itself: `a)(b` is no pattern, and would be one between brackets."""
    if len(pattern) > MOST_PATTERN:
        raise BadPattern(f"expected a pattern of at most {MOST_PATTERN:,} characters, found {len(pattern):,}")
    _compiled(pattern, pattern)
    return pattern


def _compiled(given: str | None, pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error as e:
        told = e.args[0].decode("utf-8", "replace") if e.args and isinstance(e.args[0], bytes) else str(e)
        shown = (given or pattern)[:80]
        raise BadPattern(f"{shown!r} is no pattern of RE2: {' '.join(told.split())[:200]}") from e


def _step_of(spans: Sequence[tuple[int, int]], char: int) -> int:
    """The token that completes a character: the last of those that help to write it."""
    return max(n for n, (start, end) in enumerate(spans) if start <= char < end)
