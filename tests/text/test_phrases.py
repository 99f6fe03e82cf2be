"""The ways to begin with a phrase, against all sequences of a small vocabulary written out."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.text.phrases import LEADS, beginnings
from harness.text.words import Tokens


class Pieces:
    """A tokenizer of given pieces; id n is piece n, and 0 a special."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = ["", *pieces]
        self.all_special_ids = [0]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [self.pieces.index(c) for c in text]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(t, add_special_tokens=False) for t in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[t] for t in token_ids)

    def __len__(self) -> int:
        return len(self.pieces)


def written_out(phrase: str, tokenizer: Pieces, most: int) -> set[Tokens]:
    """Every sequence of at most so many tokens whose text begins with the phrase, and does not without its last one."""
    forms = tuple(lead + phrase for lead in LEADS)

    def begins(tokens: Sequence[int]) -> bool:
        return tokenizer.decode(tokens).startswith(forms)

    return {
        tokens
        for length in range(1, most + 1)
        for tokens in product(range(1, len(tokenizer)), repeat=length)
        if begins(tokens) and not begins(tokens[:-1])
    }


@settings(deadline=None, max_examples=60)
@given(
    st.text("ab ", min_size=1, max_size=4).filter(str.strip),
    st.lists(st.text("ab !", min_size=1, max_size=3), max_size=4, unique=True),
)
def test_every_way_is_found_once_and_none_begins_another(phrase: str, more: list[str]) -> None:
    tokenizer = Pieces(list(dict.fromkeys(["a", "b", " ", *more])))
    found = beginnings(phrase, tokenizer, most_nodes=10_000)
    assert found.open == ()
    assert len(set(found.whole)) == len(found.whole)
    most = len(phrase) + 1
    # A special adds no text: it could stand anywhere, and is no way to say something.
    assert set(found.whole) == written_out(phrase, tokenizer, most)
    for one in found.whole:
        assert not any(one[:n] in set(found.whole) for n in range(1, len(one)))


def test_what_is_left_open_and_what_is_whole_are_disjoint_and_cover_the_same() -> None:
    tokenizer = Pieces(["a", "b", "ab", "ba", "bab", " ", " a", "abab!"])
    whole = beginnings("ababab", tokenizer, most_nodes=10_000)
    cut = beginnings("ababab", tokenizer, most_nodes=4)
    assert cut.open
    assert set(cut.whole) < set(whole.whole)
    missing = set(whole.whole) - set(cut.whole)
    for one in missing:
        assert sum(one[: len(o)] == o for o in cut.open) == 1, "every one that is missing goes through one that is open"
    for one in cut.whole:
        assert not any(one[: len(o)] == o for o in cut.open)
    assert len(cut.trie) <= 4 + sum(len(o) - 1 for o in cut.open)
    # The tokenizer's own way is followed first, though it is the longest.
    own = tuple(tokenizer.encode("ababab", add_special_tokens=False))
    assert own in beginnings("ababab", tokenizer, most_nodes=16).whole
    assert own not in cut.whole


def test_probabilities_bound_the_truth() -> None:
    """Of a unigram model: what is whole is at most all, and with what is open at least all."""
    tokenizer = Pieces(["a", "b", "ab", "ba", " ", " a", "abb"])
    p = np.random.default_rng(0).dirichlet(np.ones(len(tokenizer)))

    def mass(sequences: Sequence[Tokens]) -> float:
        return float(sum(np.prod(p[list(s)]) for s in sequences))

    truth = mass(beginnings("abbaab", tokenizer, 10_000).whole)
    bounds = [
        (mass(b.whole), mass(b.whole) + mass(b.open))
        for b in (beginnings("abbaab", tokenizer, n) for n in range(1, 90))
    ]
    assert all(low <= truth + 1e-12 and truth <= high + 1e-12 for low, high in bounds)
    assert bounds[0][1] - bounds[0][0] > 0
    assert bounds[-1][0] == pytest.approx(truth)


@pytest.mark.parametrize("phrase", ["", "abc", "é"])
def test_a_phrase_that_no_tokens_say_is_refused(phrase: str) -> None:
    with pytest.raises(ValueError, match="no sequence of tokens begins with"):
        beginnings(phrase, Pieces(["a", "b", " "]))
