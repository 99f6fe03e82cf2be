"""Detectors: what fires where, at which step that is sure, and what is refused."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.text.detectors import BadPattern, Detector, Hit


def decode(token_ids: Sequence[int]) -> str:
    """A token a byte."""
    return bytes(token_ids).decode("utf-8", "replace")


def find(detector: Detector, text: str) -> Hit | None:
    token_ids = list(text.encode())
    return detector.find(token_ids, text, decode, len(token_ids))


@pytest.mark.parametrize(
    ("detector", "text", "span", "end"),
    [
        (Detector.of(["hello"]), "say HELLO you", (4, 9), 8),
        (Detector.of(["straße"]), "eine Straße", (5, 11), 11),
        (Detector.of(["hello"], word=True), "say hello, you", (4, 9), 9),
        (Detector.of(["hello"], word=True), "say hello", (4, 9), 9),
        (Detector.of(["hello"], word=True), "othello hello", (8, 13), 13),
        (Detector.of(["hello"], word=True), "éhello _hello_", (8, 13), 14),
        (Detector.of(["hello"], word=True), "othello", None, None),
        (Detector.of(["hello"], word=True), "hellos héllo", None, None),
        (Detector.of(["ab", "abc"]), "xabcd", (1, 4), 2),
        (Detector.of(["(a|b)*"]), "x (a|b)* y", (2, 8), 7),
        (Detector.of(regex="a.*b"), "xx a - b  b", (3, 11), 7),
        (Detector.of(regex="b$"), "xx b a b", (7, 8), 8),
        (Detector.of(regex="(?i)YES"), "oh yes", (3, 6), 5),
        (Detector.of(regex="(?i)YES"), "oh no", None, None),
        (Detector.of(["漢字"]), "は漢字です", (1, 3), 8),
    ],
)
def test_what_fires_where_and_when_that_is_sure(
    detector: Detector, text: str, span: tuple[int, int] | None, end: int | None
) -> None:
    """`end` is the last byte that the verdict needs; len(text) where it needs the end of the text."""
    hit = find(detector, text)
    if span is None:
        assert hit is None
        return
    assert hit is not None
    assert (hit.char_span, hit.end_step, hit.text) == (span, end, text[span[0] : span[1]])
    # A character begins with its first byte, and its step is the one that completes it.
    assert hit.first_step == len(text[: span[0] + 1].encode()) - 1


SIGNS = st.text(alphabet="ab _é", max_size=24)
RULES = st.one_of(
    st.builds(
        lambda phrases, word: Detector.of(phrases, word=word),
        st.lists(st.text(alphabet="abé-", min_size=1, max_size=3), min_size=1, max_size=3),
        st.booleans(),
    ),
    st.sampled_from(["a+b", "^a", "a.b", "[ab]{2}", "b$", "a\\b", "(?i)Ab", "a|é_"]).map(
        lambda p: Detector.of(regex=p)
    ),
)


@settings(max_examples=300, deadline=None)
@given(RULES, SIGNS, SIGNS)
def test_what_has_fired_by_a_step_fires_whatever_comes_after_it(detector: Detector, text: str, more: str) -> None:
    """Or weights of rollouts that are cut at that step would be wrong. Control: some hits wait for the end."""
    hit = find(detector, text)
    if hit is None:
        return
    raw = text.encode()
    if hit.end_step >= len(raw):
        return  # sure only where the text has ended
    said = raw[: hit.end_step + 1].decode()
    assert find(detector, said + more) is not None
    # And no sooner: without the last token something may come after which it has not fired.
    sooner = raw[: hit.end_step].decode("utf-8", "ignore")
    assert any(find(detector, sooner + tail) is None for tail in ("", "x", "ax", "_", "é")), (sooner, hit)


def test_a_verdict_may_wait_for_the_end() -> None:
    """The control of the law above."""
    hit = find(Detector.of(regex="b$"), "ab")
    assert hit is not None
    assert hit.end_step == 2
    assert find(Detector.of(regex="b$"), "abc") is None


@pytest.mark.parametrize(
    "pattern", ["(a)(?=b)", "a)(b", "(((", "\\1", "(?<name", "x{1000}{1000}", "a*", "^", "a" * 10_001]
)
def test_patterns_that_are_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(BadPattern) as told:
        Detector.of(regex=pattern)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400
    Detector.of(regex="(a)b")  # control


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(x+x+)+y", "(.*)*z"])
def test_a_pattern_that_makes_others_backtrack_takes_linear_time(pattern: str) -> None:
    detector = Detector.of(regex="q" + pattern)
    start = time.process_time()
    assert detector.span("q" + "a" * 5_000 + "!") is None or detector.span("q" + "x" * 5_000 + "!") is None
    assert time.process_time() - start < 60, "Python's own takes 2^5000 steps"
