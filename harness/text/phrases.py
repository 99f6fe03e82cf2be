"""How a completion can begin with a phrase: the token sequences whose text does, as many as are worth following.

A phrase has a handful of tokenisations that a model uses and very many that it could. All of them are disjoint events, so
the exact probability of the phrase is a sum over all. Here the tokenizer's own is followed to its end, then the others sign by
sign, up to a number of nodes, and of those the first step that was not taken is kept: what those steps hold together bounds
what was left out. Signs come before tokens, since a model that has said some of a phrase in an unusual way has done an
improbable thing already: on the bundled pair 64 nodes leave less than 1e-6 to the bound, where the fewest tokens first left
3e-4 even of 256.

Pure functions on strings and token ids; knows no model and no tensor library.
"""

import bisect
import heapq
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from harness.text.words import Tokenizer, Tokens, Trie, build_trie, token_texts

LEADS = (" ", "")
"""What may stand before the phrase where a completion begins."""
MOST_NODES = 64


@dataclass(frozen=True)
class Beginnings:
    """Token sequences whose text begins with a phrase, none of which begins another, and their trie.

    `whole`: their text begins with it, and would not without the last token. `open`: beginnings of further ones that
    were not followed: their probability is at least that of all that `whole` lacks. A text that holds a part of a
    character, which no phrase does, is in neither.
    """

    whole: tuple[Tokens, ...]
    open: tuple[Tokens, ...]
    trie: Trie


def beginnings(phrase: str, tokenizer: Tokenizer, most_nodes: int = MOST_NODES) -> Beginnings:
    """The ways to begin with `phrase`, behind one space or none: the tokenizer's own, then the others, a sign further each.

    Raises ValueError where the tokenizer has none.
    """
    pieces = _pieces(tokenizer)
    forms = [lead + phrase for lead in LEADS]
    sayable = [_sayable(form, pieces) for form in forms]
    # (whether the tokenizer would say it otherwise, characters said, tokens so far, form)
    waiting: list[tuple[bool, int, Tokens, int]] = [
        (False, 0, (), n) for n, is_sayable in enumerate(sayable) if phrase and is_sayable[0]
    ]
    heapq.heapify(waiting)
    if not waiting:
        raise ValueError(f"no sequence of tokens begins with {phrase!r}")
    usual = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
    whole: list[Tokens] = []
    left_open: list[Tokens] = []
    num_nodes = 0
    while waiting:
        _, said, sequence, n = heapq.heappop(waiting)
        if sequence and num_nodes >= most_nodes:
            left_open.append(sequence)
            continue
        num_nodes += bool(sequence)
        rest = forms[n][said:]
        whole += [(*sequence, token) for token in pieces.saying(rest)]
        for size in range(1, len(rest)):
            if sayable[n][said + size]:
                for token in pieces.exact.get(rest[:size], ()):
                    grown = (*sequence, token)
                    is_unusual = not any(way[: len(grown)] == grown for way in usual)
                    heapq.heappush(waiting, (is_unusual, said + size, grown, n))
    # The forms meet where a lone space is a token: behind it the rest is said as if there were none.
    whole, left_open = (list(dict.fromkeys(found)) for found in (whole, left_open))
    return Beginnings(tuple(whole), tuple(left_open), build_trie([*whole, *left_open]))


@dataclass(frozen=True)
class _Pieces:
    """The tokens of a vocabulary by the text that they add."""

    exact: dict[str, tuple[int, ...]]
    ordered: tuple[tuple[str, int], ...]
    """By text, for the tokens that begin with one."""

    def saying(self, text: str) -> list[int]:
        """Tokens that say `text`, and maybe more."""
        start = bisect.bisect_left(self.ordered, (text, -1))
        return [token for _, token in takewhile(lambda pair: pair[0].startswith(text), self.ordered[start:])]


@lru_cache(maxsize=4)
def _pieces(tokenizer: Tokenizer) -> _Pieces:
    exact: dict[str, list[int]] = {}
    for token, text in enumerate(token_texts(tokenizer)):
        if text and "\ufffd" not in text:
            exact.setdefault(text, []).append(token)
    ordered = sorted((text, token) for text, tokens in exact.items() for token in tokens)
    return _Pieces({text: tuple(tokens) for text, tokens in exact.items()}, tuple(ordered))


def _sayable(form: str, pieces: _Pieces) -> tuple[bool, ...]:
    """For every place in `form` whether tokens can say the rest of it, the last of which may say more."""
    found = [False] * len(form) + [True]
    for place in range(len(form) - 1, -1, -1):
        rest = form[place:]
        found[place] = bool(pieces.saying(rest)) or any(
            found[place + size] and rest[:size] in pieces.exact for size in range(1, len(rest))
        )
    return tuple(found)
