"""How a completion can begin with a phrase: the token sequences whose text does, as many as are worth following.

A phrase has a handful of tokenisations that a model uses and very many that it could. All of them are disjoint events, so
the exact probability of the phrase is a sum over all. Here the tokenizer's own and then the shortest are followed to their
end, up to a number of nodes, and of the others the first step that was not taken is kept: what those steps hold together
bounds what was left out.

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
MOST_NODES = 256


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
    """The ways to begin with `phrase`, behind one space or none: the tokenizer's own, then those of fewest tokens.

    Raises ValueError where the tokenizer has none.
    """
    pieces = _pieces(tokenizer)
    forms = [lead + phrase for lead in LEADS]
    least = [_least(form, pieces) for form in forms]
    # (whether the tokenizer would say it otherwise, tokens that it takes at least, tokens so far, form, characters said)
    waiting: list[tuple[bool, int, Tokens, int, int]] = [
        (False, of[0], (), n, 0) for n, of in enumerate(least) if phrase and of[0] is not None
    ]
    heapq.heapify(waiting)
    if not waiting:
        raise ValueError(f"no sequence of tokens begins with {phrase!r}")
    usual = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
    whole: list[Tokens] = []
    left_open: list[Tokens] = []
    num_nodes = 0
    while waiting:
        _, _, sequence, n, said = heapq.heappop(waiting)
        if sequence and num_nodes >= most_nodes:
            left_open.append(sequence)
            continue
        num_nodes += bool(sequence)
        rest = forms[n][said:]
        whole += [(*sequence, token) for token in pieces.saying(rest)]
        for size in range(1, len(rest)):
            still = least[n][said + size]
            if still is not None:
                for token in pieces.exact.get(rest[:size], ()):
                    grown = (*sequence, token)
                    is_unusual = not any(way[: len(grown)] == grown for way in usual)
                    heapq.heappush(waiting, (is_unusual, len(grown) + still, grown, n, said + size))
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


def _least(form: str, pieces: _Pieces) -> tuple[int | None, ...]:
    """For every place in `form` the fewest tokens that say the rest of it, the last of which may say more."""
    least: list[int | None] = [None] * len(form) + [0]
    for place in range(len(form) - 1, -1, -1):
        rest = form[place:]
        ways = [1] if pieces.saying(rest) else []
        ways += [
            1 + left
            for size in range(1, len(rest))
            if rest[:size] in pieces.exact and (left := least[place + size]) is not None
        ]
        least[place] = min(ways, default=None)
    return tuple(least)
