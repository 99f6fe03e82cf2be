"""Where a word stands in a completion, in characters and in tokens.

Works on token ids and a function that decodes them; knows no tokenizer, no prompt and no store.

Present means: caseless, with non-alphanumeric characters or the ends on both sides. The raw text is never
rewritten, because its offsets are what token spans refer to. It is cut in clusters (a character and the marks
that combine with it), each cluster is folded for comparison, and each border between clusters remembers its raw
offset. A match must begin and end on such borders: "cafe" is not in "café", however the accent is encoded.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from harness.errors import ItemFailed

Decode = Callable[[Sequence[int]], str]
"""Token ids to text: nothing cleaned up, special tokens skipped."""

_BROKEN = "\ufffd"  # what decoders write for bytes that are not, or not yet, UTF-8

# A run of alphanumerics; a single inner hyphen or apostrophe (the typographic ones too) does not end it.
_ONE_WORD = re.compile(r"[^\W_]+(?:[-'\u2010\u2011\u2019][^\W_]+)*")


class MappingError(ItemFailed):
    """Tokens and text that cannot be put side by side."""


@dataclass(frozen=True)
class Occurrence:
    """One place of the word; both spans are half-open, `token_span` counts from the first completion token."""

    char_span: tuple[int, int]
    token_span: tuple[int, int]


@dataclass(frozen=True)
class Detection:
    """The verdict on one completion: `answer` is `text` up to its first newline, `occurrences` covers `text`."""

    text: str
    answer: str
    word_present: bool
    """In the answer."""
    word_present_full: bool
    """In the whole text."""
    format_ok: bool
    """The answer is exactly one word, whichever."""
    first_step: int | None
    """The first token of the first occurrence; None unless that lies in the answer."""
    occurrences: tuple[Occurrence, ...]


def detect(token_ids: Sequence[int], word: str, decode: Decode) -> Detection:
    """Finds `word` in a completion. No tokens at all is simply "absent".

    Decodes once when the word is absent, otherwise also each prefix and each occurrence.
    Raises MappingError when an occurrence cannot be traced to the tokens that spell it.
    """
    text = decode(token_ids) if len(token_ids) else ""
    answer = answer_of(text)
    occurrences: tuple[Occurrence, ...] = ()
    if char_spans := find_word(text, word):
        token_spans = token_char_spans(token_ids, decode)
        occurrences = tuple(
            Occurrence(span, _covering_tokens(span, token_spans, token_ids, word, decode)) for span in char_spans
        )
    # The newline that ends the answer is itself a boundary, so cutting there makes and unmakes no occurrence.
    in_answer = [one for one in occurrences if one.char_span[1] <= len(answer)]
    return Detection(
        text=text,
        answer=answer,
        word_present=bool(in_answer),
        word_present_full=bool(occurrences),
        format_ok=is_one_word(answer),
        first_step=in_answer[0].token_span[0] if in_answer else None,
        occurrences=occurrences,
    )


def answer_of(text: str) -> str:
    """The text up to its first newline."""
    return text.partition("\n")[0]


def is_one_word(answer: str) -> bool:
    """Whether there is exactly one word, whatever surrounds it; "well-known" and "don't" are one."""
    # A mark belongs to the letter before it, so without its marks a word is a plain run of alphanumerics.
    bare = answer if answer.isascii() else "".join(char for char in answer if not _is_mark(char))
    return len(_ONE_WORD.findall(bare)) == 1


def find_word(text: str, word: str) -> list[tuple[int, int]]:
    """Character spans of `word` in the raw `text`, in order, none overlapping another.

    The neighbours decide, not the word's own edges; a neighbour is alphanumeric when its base character is.
    """
    needle = _fold_word(word)
    assert needle, "find_word needs a word that is not empty"
    folded, raw_at = _fold(text)
    spans: list[tuple[int, int]] = []
    at = folded.find(needle)
    while at >= 0:
        end = at + len(needle)
        if at in raw_at and end in raw_at and _is_bounded(text, raw_at[at], raw_at[end]):
            spans.append((raw_at[at], raw_at[end]))
            at = folded.find(needle, end)
        else:
            at = folded.find(needle, at + 1)
    return spans


def token_char_spans(token_ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """For each token the [start, end) of `decode(token_ids)` that it writes or helps to write.

    All tokens that make one character together have that character in their span; a token that adds no text has
    an empty one. The spans leave no character out. Decodes every prefix, so the cost is quadratic in the tokens.
    Raises MappingError when a later token changes earlier text, unless it completes or spoils its last character.
    """
    prefixes = [decode(token_ids[: index + 1]) for index in range(len(token_ids))]
    text = prefixes[-1] if prefixes else ""
    spans: list[tuple[int, int]] = []
    settled, previous = 0, ""  # how much of `text` the tokens so far have written
    for index, prefix in enumerate(prefixes):
        is_silent = prefix == previous
        if is_silent and not decode(token_ids[index : index + 1]):
            spans.append((settled, settled))  # a special token, possibly amid the bytes of a character
            continue
        start, agreed = settled, _common_length(prefix, text)
        # A byte-fallback decoder withdraws a finished character when the next byte proves wrong, and restores it
        # when that byte's own character is finished: so what once agreed stays settled.
        settled = max(settled, agreed)
        if agreed < len(prefix):
            _check_unfinished(prefix, text, agreed, index, token_ids[index])
            spans.append((start, min(settled + 1, len(text))))
        elif is_silent and prefix.endswith(_BROKEN):
            spans.append((settled - 1, settled))  # one more byte of a character that never became whole
        else:
            spans.append((start, settled))
        previous = prefix
    return spans


def _check_unfinished(prefix: str, text: str, agreed: int, index: int, token_id: int) -> None:
    """Raises MappingError unless `prefix` leaves `text` only by a character whose bytes are not all there yet."""
    rest, replacement = prefix[agreed:], text[agreed : agreed + 1]
    # Bytes that begin a character end as that character or as U+FFFD: never as ASCII, never as nothing.
    is_unfinished = replacement >= "\x80" and not rest.strip(_BROKEN)
    is_spoilt = replacement == _BROKEN
    if not (is_unfinished or is_spoilt):
        raise MappingError(
            f"expected the first {index + 1} tokens to decode to a beginning of the whole text, "
            f"found {rest[:40]!r} where the text has {text[agreed : agreed + 40]!r}, "
            f"at token {index} (id {token_id}), character {agreed}; decode without any clean-up"
        )


def _covering_tokens(
    char_span: tuple[int, int],
    token_spans: Sequence[tuple[int, int]],
    token_ids: Sequence[int],
    word: str,
    decode: Decode,
) -> tuple[int, int]:
    """The least token range that covers the characters; MappingError when it does not decode to the word."""
    first_char, end_char = char_span
    touching = [index for index, (start, end) in enumerate(token_spans) if max(start, first_char) < min(end, end_char)]
    first, end = touching[0], touching[-1] + 1
    found = decode(token_ids[first:end])
    # No boundary test: the range's outer tokens may hold other characters, or parts of them.
    if _fold_word(word) not in _fold(found).text:
        raise MappingError(
            f"expected tokens [{first}, {end}) to decode to {word!r}, which stands at characters "
            f"[{first_char}, {end_char}), found {found!r}; decode must not depend on the tokens before a range"
        )
    return first, end


class _Folded(NamedTuple):
    text: str
    raw_at: Mapping[int, int] | range
    """From an offset in `text` to the raw offset, for cluster borders and the end only."""


def _fold(text: str) -> _Folded:
    if text.isascii():  # nearly every completion: one character a cluster, and every offset its own
        return _Folded(text.lower(), range(len(text) + 1))
    starts = [index for index, char in enumerate(text) if index == 0 or not _is_mark(char)]
    raw_at: dict[int, int] = {}
    pieces: list[str] = []
    length = 0
    for start, end in pairwise([*starts, len(text)]):
        raw_at[length] = start
        pieces.append(_fold_cluster(text[start:end]))
        length += len(pieces[-1])
    raw_at[length] = len(text)
    return _Folded("".join(pieces), raw_at)


@lru_cache(maxsize=8192)
def _fold_cluster(cluster: str) -> str:
    """Compatibility caseless matching, Unicode Standard section 3.13, D146.

    Decomposed at the end, not composed: only then do letters spread over several clusters (Korean jamo, half-width
    kana) fold like the single character that means the same.
    """
    folded = unicodedata.normalize("NFD", cluster).casefold()
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", folded).casefold())


@lru_cache(maxsize=8192)
def _fold_word(word: str) -> str:
    return _fold(word).text


def _is_mark(char: str) -> bool:
    # No mark lies below U+0300, and no character outside category M has a combining class.
    return char >= "\u0300" and unicodedata.category(char).startswith("M")


def _is_bounded(text: str, start: int, end: int) -> bool:
    before = start - 1
    while before > 0 and _is_mark(text[before]):
        before -= 1
    is_open_left = before < 0 or not text[before].isalnum()
    return is_open_left and not text[end : end + 1].isalnum()


def _common_length(left: str, right: str) -> int:
    if right.startswith(left):
        return len(left)
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))
