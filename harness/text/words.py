"""How a word can be spelled as tokens: surface forms, prefix-free sequences, the trie that scores them all at once,
and which tokens begin at a word boundary.

Pure functions on strings and token ids; knows no model and no tensor library.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Tokens = tuple[int, ...]

ENDINGS = ("", ".", ",", "!", "?", " ")
"""What may follow the word in a spelling of it (docs/method.md, Pressure)."""
PAPER_ENDINGS = ("", " ", ".", ". ")
"""What the paper counts as separate events (arXiv 2601.08070): they overlap."""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this module needs."""

    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def __len__(self) -> int: ...


def normalise(text: str) -> str:
    """The word that a spelling stands for: NFKC, case folded, everything but letters and digits at the ends removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    start, end = 0, len(folded)
    while start < end and not folded[start].isalnum():
        start += 1
    while end > start and not folded[end - 1].isalnum():
        end -= 1
    return folded[start:end]


def surface_forms(word: str, endings: Sequence[str] = ENDINGS) -> list[str]:
    """V(X): case {as given, lower, Title, UPPER} × {bare, one leading space} × `endings`, without repeats."""
    cases = dict.fromkeys((word, word.lower(), word.capitalize(), word.upper()))
    return [lead + case + ending for case in cases for lead in ("", " ") for ending in endings]


def token_sequences(
    word: str, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], endings: Sequence[str]
) -> list[Tokens]:
    """S(X): the distinct tokenisations of the surface forms whose decoding normalises back to the word."""
    wanted = normalise(word)
    sequences = dict.fromkeys(tuple(encode(form)) for form in surface_forms(word, endings))
    return [s for s in sequences if s and normalise(decode(s)) == wanted]


def prefix_free(sequences: Iterable[Tokens]) -> list[Tokens]:
    """The sequences that extend no other one: disjoint events, so that their probabilities sum to at most 1."""
    kept: list[Tokens] = []
    known: set[Tokens] = set()
    for sequence in sorted(set(sequences), key=lambda s: (len(s), s)):
        if not any(sequence[:n] in known for n in range(1, len(sequence))):
            known.add(sequence)
            kept.append(sequence)
    return kept


@dataclass(frozen=True)
class Trie:
    """The nodes that must be forwarded after a context to know the probability of every sequence.

    Node i carries `tokens[i]`, hangs on node `parents[i]` (-1: the context) at `depths[i]` (0: right after the
    context). A parent stands before its children. `steps[j]` spells sequence j as (node that predicts, token) pairs,
    -1 for the context's last token; `ends[j]` is the node that holds sequence j whole, or -1 where it was not asked for.
    """

    sequences: tuple[Tokens, ...]
    tokens: Tokens
    parents: Tokens
    depths: Tokens
    steps: tuple[tuple[tuple[int, int], ...], ...]
    ends: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestry(self) -> np.ndarray:
        """Bool [nodes, nodes]: which nodes a node may look at, itself included."""
        seen = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def build_trie(sequences: Iterable[Tokens], whole: Iterable[Tokens] = ()) -> Trie:
    """The smallest trie for `sequences`; those in `whole` are forwarded to their end, so that what follows is known."""
    all_sequences = tuple(dict.fromkeys([*sequences, *whole]))
    assert all(all_sequences), "an empty sequence has no probability"
    needed = {s[:n] for s in all_sequences for n in range(1, len(s))} | set(whole)
    order = sorted(needed, key=lambda s: (len(s), s))
    node_of: dict[Tokens, int] = {(): -1} | {prefix: i for i, prefix in enumerate(order)}
    return Trie(
        sequences=all_sequences,
        tokens=tuple(prefix[-1] for prefix in order),
        parents=tuple(node_of[prefix[:-1]] for prefix in order),
        depths=tuple(len(prefix) - 1 for prefix in order),
        steps=tuple(tuple((node_of[s[:i]], token) for i, token in enumerate(s)) for s in all_sequences),
        ends=tuple(node_of.get(s, -1) for s in all_sequences),
    )


@dataclass(frozen=True)
class WordForms:
    """What has to be scored for one target: the prefix-free events, the paper's overlapping ones, and their trie."""

    events: tuple[Tokens, ...]
    ends_at_boundary: tuple[bool, ...]
    paper: tuple[Tokens, ...]
    trie: Trie

    @property
    def first_tokens(self) -> Tokens:
        """The tokens that some prefix-free spelling starts with."""
        return tuple(dict.fromkeys(s[0] for s in self.events))


def word_forms(word: str, tokenizer: Tokenizer) -> WordForms:
    """Every spelling of `word` under one tokenizer, arranged so that one tree forward scores them all."""

    forms = surface_forms(word, tuple(dict.fromkeys(ENDINGS + PAPER_ENDINGS)))
    encode = dict(zip(forms, tokenizer.encode_all(forms), strict=True)).__getitem__
    events = prefix_free(token_sequences(word, encode, tokenizer.decode, ENDINGS))
    paper = token_sequences(word, encode, tokenizer.decode, PAPER_ENDINGS)
    at_boundary = tuple(not _continues_word(tokenizer.decode(s)[-1]) for s in events)
    open_ended = [s for s, ended in zip(events, at_boundary, strict=True) if not ended]
    return WordForms(tuple(events), at_boundary, tuple(paper), build_trie([*events, *paper], whole=open_ended))


@dataclass(frozen=True)
class Vocabulary:
    """What each token id does to a text that ends in a letter, found by decoding it behind one.

    `ends_word` [V]: the text it adds begins with a non-alphanumeric character, or the text ends there, so that a word
    standing before it is complete. A token that begins inside a UTF-8 character is not counted: its character is unknown.
    `has_newline` [V]: the text it adds contains a newline. `stop_ids`: ids that end a text.
    """

    ends_word: np.ndarray
    has_newline: np.ndarray
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: Iterable[int], size: int) -> "Vocabulary":
        """Classify ids 0..size-1 (`size`: the model's vocabulary; ids the tokenizer does not know end nothing)."""
        stop = frozenset(stop_ids)
        anchor = _anchor(tokenizer)
        before = tokenizer.decode(anchor)
        ends, newline = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for token, added in _pieces(tokenizer, anchor, before, min(size, len(tokenizer))):
            ends[token] = bool(added) and not _continues_word(added[0])
            newline[token] = "\n" in added
        for token in tokenizer.all_special_ids:
            if token < size:
                ends[token] = token in stop
        ends[[t for t in stop if t < size]] = True
        return cls(ends, newline, stop)


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text that each id adds behind a letter, id by id: leading spaces included, '' for specials, and U+FFFD where a
    token is a part of a character."""
    anchor = _anchor(tokenizer)
    texts = [""] * len(tokenizer)
    for token, added in _pieces(tokenizer, anchor, tokenizer.decode(anchor), len(tokenizer)):
        texts[token] = added
    return texts


def _continues_word(char: str) -> bool:
    """Letters, digits and combining marks continue a word; U+FFFD stands for half a character, which may be a letter."""
    return char.isalnum() or char == "\ufffd" or unicodedata.category(char).startswith("M")


def _anchor(tokenizer: Tokenizer) -> list[int]:
    """One letter's ids: behind it a token shows the text it adds (a sentence-piece's own leading space included)."""
    return list(tokenizer.encode("a", add_special_tokens=False))


def _pieces(tokenizer: Tokenizer, anchor: list[int], before: str, size: int) -> Iterator[tuple[int, str]]:
    for token in range(size):
        text = tokenizer.decode([*anchor, token])
        if text.startswith(before):
            yield token, text[len(before) :]
