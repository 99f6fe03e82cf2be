"""Text in pieces is the text whole, cut at the first stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.models.load import Codec
from harness.serving.growing import Growing
from tests.tiny import byte_tokenizer

CODEC = Codec(byte_tokenizer())
TEXTS = st.text(alphabet="ab é€😀\n", max_size=30)


def ids_of(text: str) -> list[int]:
    return CODEC.encode(text, add_special_tokens=False)


def pieces(ids: Sequence[int], stops: Sequence[str], steps: Sequence[int] = ()) -> tuple[list[str], Growing]:
    """What is handed out when ids come one by one, or as many as `steps` says."""
    growing, found = Growing(CODEC.decode, stops), []
    for n in steps or range(1, len(ids) + 1):
        is_over = growing.add(ids[:n])
        found.append(growing.news())
        if is_over:
            break
    growing.end(ids)
    return [*found, growing.news(is_over=True)], growing


def cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


@given(TEXTS, st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=4), max_size=4))
def test_the_pieces_are_the_whole_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    found, growing = pieces(ids_of(text), stops)
    assert "".join(found) == growing.text
    # Where two stop strings end at one letter the one that was whole first cuts, which may stand behind the other's begin.
    whole = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    want = cut(text[: whole[0]], stops) if whole else text
    assert growing.text == want
    assert growing.is_cut is bool(whole)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_the_pieces_of_any_bytes_are_what_they_decode_to(ids: list[int]) -> None:
    found, growing = pieces(ids, [])
    assert "".join(found) == growing.text
    assert len(growing.text) == len(CODEC.decode(ids)) or "�" in CODEC.decode(ids)


@given(st.text(alphabet="aé€😀", max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    found, _ = pieces(ids_of(text), ["zz"])
    assert "�" not in "".join(found)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    """Control: without it the beginning would be out before the end comes."""
    found, growing = pieces(ids_of("one END two"), ["END"])
    assert found == ["o", "n", "e", " ", "", "", "", ""]
    assert growing.text == "one "
    assert pieces(ids_of("one END two"), [])[0][4] == "E"


def test_a_completion_that_begins_again_is_not_told_twice() -> None:
    ids = ids_of("hello")
    found, _ = pieces(ids, [], [1, 2, 3, 1, 2, 3, 4, 5])
    assert "".join(found) == "hello"


@pytest.mark.parametrize("stops", [["a"], ["a", "aa"], ["ba", "a"]])
def test_of_several_stop_strings_the_first_cuts(stops: list[str]) -> None:
    assert pieces(ids_of("xbaab"), stops)[1].text == ("xb" if "ba" not in stops else "x")
