"""Detection against two byte-level tokenizers, one byte-fallback decoder, and slow references.

`pieces_decode` is the plainest byte-level tokenizer there is: token i is the i-th byte string.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from harness.errors import ItemFailed
from harness.text.detect import (
    Decode,
    Detection,
    MappingError,
    Occurrence,
    answer_of,
    detect,
    find_word,
    is_one_word,
    token_char_spans,
)

Form = Literal["NFC", "NFD"]
patient = settings(deadline=None)  # a busy machine is no failure
thorough = settings(deadline=None, max_examples=500)

ROCKET = "\N{ROCKET}"  # four bytes in UTF-8
ACUTE = "\N{COMBINING ACUTE ACCENT}"
E_ACUTE = "\N{LATIN SMALL LETTER E WITH ACUTE}"
BROKEN = "\N{REPLACEMENT CHARACTER}"
EOS = "<eos>"


# ---- tokenizers -----------------------------------------------------------------------------------------------


def byte_to_char() -> dict[int, str]:
    """GPT-2's table: a printable byte stands for itself, the others for the characters from U+0100, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(char): char for char in alphabet if ord(char) < 256}
    return own | dict(zip((b for b in range(256) if b not in own), (c for c in alphabet if ord(c) > 255), strict=True))


def byte_tokenizer() -> Tokenizer:
    """Bytes only: a token's id is its byte, 256 is the end of text."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in byte_to_char().items()}, merges=[]))
    return with_byte_level(tokenizer)


def trained_tokenizer() -> Tokenizer:
    """A small BPE whose merges cross spaces and cut the rocket's bytes."""
    tokenizer = with_byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f"{ROCKET} space", " Space, the space.", f" caf{E_ACUTE}", " spa", "pace", "ace ", "a place", "e s"]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return tokenizer


def with_byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


BYTES, TRAINED = byte_tokenizer(), trained_tokenizer()
either_tokenizer = pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])


def decode_of(tokenizer: Tokenizer) -> Decode:
    return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=True)


def detect_in(tokenizer: Tokenizer, text: str, word: str) -> Detection:
    token_ids = tokenizer.encode(text).ids
    detection = detect(token_ids, word, decode_of(tokenizer))
    assert detection.text == text
    return detection


def pieces_decode(pieces: Sequence[bytes]) -> Decode:
    return lambda token_ids: b"".join(pieces[i] for i in token_ids).decode("utf-8", errors="replace")


def spans_of(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    return token_char_spans(range(len(pieces)), pieces_decode(pieces))


def fallback_tokenizer(pieces: Sequence[str]) -> tuple[list[int], Decode]:
    """The decoder of the Llama family over the given pieces, one token each; `<0xF0>` is a byte."""
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=pieces[0]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return [vocab[piece] for piece in pieces], decode_of(tokenizer)


# ---- finding a word in text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("space", "space", ["space"]),
        (" space", "space", [" space"[1:]]),
        ("space.", "space", ["space"]),
        ("space,", "space", ["space"]),
        ('"space"', "space", ["space"]),
        ("space_", "space", ["space"]),
        ("_space", "space", ["space"]),
        ("space-time", "space", ["space"]),
        ("space\ttime", "space", ["space"]),
        ("space\ntime", "space", ["space"]),
        ("SPACE Space sPaCe", "space", ["SPACE", "Space", "sPaCe"]),
        ("space", "SPACE", ["space"]),
        ("space space,space", "space", ["space", "space", "space"]),
        ("spacetime", "space", []),
        ("airspace", "space", []),
        ("space2", "space", []),
        ("2space", "space", []),
        ("spac", "space", []),
        ("", "space", []),
        ("s pace", "space", []),
        (f"{ROCKET}space{ROCKET}", "space", ["space"]),
        ("space\u2122", "space", ["space"]),  # a trade mark folds to "tm", but is itself no letter
        ("space\u00b2", "space", []),  # a superscript two is a digit
        (f"space{E_ACUTE}", "space", []),
        ("\u7a7aspace", "space", []),
        ("\uff33\uff50\uff41\uff43\uff45!", "space", ["\uff33\uff50\uff41\uff43\uff45"]),  # full width
        ("space", "\uff33\uff50\uff41\uff43\uff45", ["space"]),
        ("\uff41space", "space", []),
    ],
)
def test_word_is_present_between_non_alphanumerics_and_absent_otherwise(text: str, word: str, found: list[str]) -> None:
    spans = find_word(text, word)
    assert [text[start:end] for start, end in spans] == found
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("target_form", ["NFC", "NFD"])
def test_accented_word_is_found_in_either_normal_form(form: Form, target_form: Form) -> None:
    accented = unicodedata.normalize(form, f"Caf{E_ACUTE}")
    target = unicodedata.normalize(target_form, f"caf{E_ACUTE}")
    text = f"Le {accented}, {ROCKET} {accented.upper()}."
    assert [text[a:b] for a, b in find_word(text, target)] == [accented, accented.upper()]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unaccented_word_is_not_in_the_accented_one(form: Form) -> None:
    text = unicodedata.normalize(form, f"caf{E_ACUTE} r{E_ACUTE}sum{E_ACUTE}")
    assert not any(find_word(text, word) for word in ("cafe", "caf", "resume", "rsum", "sum"))
    assert not find_word("cafe resume", unicodedata.normalize(form, f"caf{E_ACUTE}"))


def test_order_of_two_accents_does_not_matter() -> None:
    dot_below = "\N{COMBINING DOT BELOW}"
    assert find_word(f"so{ACUTE}{dot_below} x", f"so{dot_below}{ACUTE}") == [(0, 4)]


def test_mark_belongs_to_the_neighbour_before_it() -> None:
    assert not find_word(f"a{ACUTE}{ACUTE}space", "space")
    assert find_word(f"-{ACUTE}space", "space") == [(2, 7)]
    assert find_word(f"{ACUTE}space", "space") == [(1, 6)]
    assert not find_word(f"space{ACUTE}", "space")
    assert find_word(f"space.{ACUTE}", "space") == [(0, 5)]


@pytest.mark.parametrize(
    ("text", "word", "spans"),
    [
        ("\u0130\u0130 space", "space", [(3, 8)]),  # İ folds to two characters
        ("\u0130stanbul", "\u0130STANBUL", [(0, 8)]),
        ("\u0130stanbul", "i\u0307stanbul", [(0, 8)]),
        ("\u0130stanbul", "istanbul", []),  # the dot is a mark on the i
        ("\u00df stra\u00dfe x", "STRASSE", [(2, 8)]),
        ("STRASSE", "stra\u00dfe", [(0, 7)]),
        ("\u00df", "s", []),
        ("ma\u00df s", "s", [(4, 5)]),
        ("o\ufb03ce \ufb01sh", "office", [(0, 4)]),  # ligatures
        ("o\ufb03ce \ufb01sh", "ish", []),
        ("\u03a3\u039f\u03a6\u039f\u03a3", "\u03c3\u03bf\u03c6\u03bf\u03c2", [(0, 5)]),  # final sigma
        ("\u1fb3", "\u0391\u0399", [(0, 1)]),  # iota subscript against its capital
        ("\u03b1\u0345\u0301", "\u03b1\u0301\u0345", [(0, 3)]),  # marks are ordered before the subscript folds
        ("5 \u3392.", "MHz", [(2, 3)]),  # capitals that appear only when a square is taken apart
        ("\uff76\uff9e!", "\u30ac", [(0, 2)]),  # half-width kana: a letter for the mark
        ("\uff76\uff9e", "\u30ab", []),
        ("\u1112\u1161\u11ab", "\ud55c", [(0, 3)]),  # Korean, letter by letter
        ("\u1112\u1161\u11ab", "\ud558", []),
        ("\ufdfa space", "space", [(2, 7)]),  # one character that folds to eighteen, with spaces
    ],
)
def test_characters_that_fold_to_several_keep_the_index_map(text: str, word: str, spans: list[tuple[int, int]]) -> None:
    assert find_word(text, word) == spans


def test_occurrences_do_not_overlap() -> None:
    assert find_word("a b a b a b a", "a b a") == [(0, 5), (8, 13)]
    assert find_word("aaa aa", "aa") == [(4, 6)]
    assert find_word("ba a a", "a a") == [(3, 6)]  # a refused match takes nothing away


def test_find_word_refuses_an_empty_word() -> None:
    with pytest.raises(AssertionError, match="not empty"):
        find_word("space", "")


def slow_find_word(text: str, word: str) -> list[tuple[int, int]]:
    """Every slice between cluster borders, folded afresh, no map and no search."""

    def fold(part: str) -> str:
        folded = unicodedata.normalize("NFD", part).casefold()
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())

    starts = [i for i, char in enumerate(text) if i == 0 or not unicodedata.combining(char)]
    borders = sorted({*starts, len(text)})
    spans: list[tuple[int, int]] = []
    for i, start in enumerate(borders):
        for end in borders[i + 1 :]:
            left = text[borders[i - 1]] if i else " "
            right = text[end] if end < len(text) else " "
            is_free = not spans or spans[-1][1] <= start
            if is_free and fold(text[start:end]) == fold(word) and not left.isalnum() and not right.isalnum():
                spans.append((start, end))
    return spans


CROWDED = st.text(f"aAsS\u00df\u017fi\u0130\u0131e{E_ACUTE}{ACUTE}\u0307 -_2\uff53\ufb01f\n", max_size=12)


@given(CROWDED, CROWDED.filter(lambda word: word[:1].isalpha()).map(lambda word: word[:3]))
@thorough
def test_find_word_agrees_with_the_slow_reference(text: str, word: str) -> None:
    assert find_word(text, word) == slow_find_word(text, word)


@patient
@given(st.text(st.characters(max_codepoint=127)), st.sampled_from(["a", "ab", "0", "A0"]))
def test_ascii_shortcut_agrees_with_the_general_path(text: str, word: str) -> None:
    assert find_word(f"{text} {word}", word) == find_word(f"{text} {word}\u2003", word)


WORDS = st.text("abcdez\u00df\u00f1\u0153\u0436\u03b4\u03c3" + E_ACUTE, min_size=1, max_size=6)
SPELLINGS: list[Callable[[str], str]] = [
    str,
    str.upper,
    str.title,
    lambda word: unicodedata.normalize("NFD", word),
    lambda word: unicodedata.normalize("NFD", word.upper()),
    lambda word: "".join(chr(ord(char) + 0xFEE0) if char.isascii() else char for char in word),  # full width
]
BORDERS = st.sampled_from([*" .,;:!?-_\"'()\n\t", "\u2014", "\u201c", ROCKET])


@patient
@given(st.text(), BORDERS, WORDS, st.sampled_from(SPELLINGS), BORDERS, st.text(), st.sampled_from([BYTES, TRAINED]))
def test_planted_word_is_always_found_where_it_was_planted(
    before: str, left: str, word: str, spell: Callable[[str], str], right: str, after: str, tokenizer: Tokenizer
) -> None:
    planted = spell(word)
    start = len(before + left)
    detection = detect_in(tokenizer, before + left + planted + right + after, word)
    assert (start, start + len(planted)) in [occurrence.char_span for occurrence in detection.occurrences]
    for (a, b), tokens in ((one.char_span, one.token_span) for one in detection.occurrences):
        assert find_word(detection.text[a:b], word) == [(0, b - a)]
        ids = tokenizer.encode(detection.text).ids
        assert detection.text[a:b] in decode_of(tokenizer)(ids[slice(*tokens)])


@patient
@given(
    st.text(f" .-\n{ROCKET}"),
    st.sampled_from(["left", "right", "both"]),
    st.characters(exclude_categories=["Cs"]).filter(str.isalnum),
    WORDS,
    st.sampled_from(SPELLINGS),
    st.text(f" .-\n{ROCKET}"),
)
def test_word_glued_to_an_alphanumeric_is_absent(
    before: str, side: str, glue: str, word: str, spell: Callable[[str], str], after: str
) -> None:
    """The control of the test above: the same plant, with one character more."""
    glued = glue * (side != "right") + spell(word) + glue * (side != "left")
    detection = detect_in(BYTES, before + glued + after, word)
    assert not detection.word_present_full
    assert detection.occurrences == ()


# ---- answer and format ----------------------------------------------------------------------------------------


def test_answer_ends_at_the_first_newline() -> None:
    assert answer_of(" space\nQuestion:\n") == " space"
    assert answer_of("space") == "space"
    assert answer_of("\nspace") == ""
    assert answer_of("") == ""


PLAIN_WORDS = ["space", " Space.", '"space"', "**space**\r", "space_", "- space -", f"{ROCKET} space", "7"]
JOINED_WORDS = ["well-known", "a\u2010b", "a\u2011b", "don't", "don\u2019t", "'tis", "dogs'", "rock'n'roll"]
FOREIGN_WORDS = [f"cafe{ACUTE}.", f"r{E_ACUTE}sume{ACUTE}", "\u7a7a\u95f4"]
NO_WORDS = ["", "  ", "...", ROCKET, ACUTE]
SEVERAL_WORDS = ["outer space", "space, time", "space/time", "space\u2014time", f"cafe{ACUTE} noir", "a--b", "a - b"]
CUT_WORDS = ["it_is", "U.S.", "3.14"]


@pytest.mark.parametrize("answer", PLAIN_WORDS + JOINED_WORDS + FOREIGN_WORDS)
def test_one_word_is_one_word_whatever_surrounds_it(answer: str) -> None:
    assert is_one_word(answer)


@pytest.mark.parametrize("answer", NO_WORDS + SEVERAL_WORDS + CUT_WORDS)
def test_no_word_or_several_are_not_one_word(answer: str) -> None:
    assert not is_one_word(answer)


# ---- characters per token -------------------------------------------------------------------------------------


def slow_spans(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """For valid UTF-8 without U+FFFD: the characters whose bytes meet the token's bytes."""
    owner = [i for i, char in enumerate(b"".join(pieces).decode()) for _ in char.encode()]
    spans: list[tuple[int, int]] = []
    offset = 0
    for piece in pieces:
        touched = owner[offset : offset + len(piece)]
        border = owner[offset] if offset < len(owner) else len(b"".join(pieces).decode())
        spans.append((touched[0], touched[-1] + 1) if touched else (border, border))
        offset += len(piece)
    return spans


@st.composite
def byte_pieces(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole), unique=True)))
    return [whole[a:b] for a, b in pairwise([0, *(cut for cut in cuts if 0 < cut < len(whole)), len(whole)])]


VALID = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN), max_size=12).map(str.encode)
CHARS = st.sampled_from([*f"ab {E_ACUTE}\u20ac{BROKEN}", ROCKET]).map(str.encode)
MESSY = st.lists(CHARS | st.binary(min_size=1, max_size=2), max_size=8).map(b"".join)


@given(byte_pieces(VALID))
@example([b"a\xf0", b"\x9f\x9a", b"\x80 b"])
@thorough
def test_token_spans_are_exactly_the_characters_of_the_tokens_bytes(pieces: list[bytes]) -> None:
    assert spans_of(pieces) == slow_spans(pieces)


@given(byte_pieces(MESSY))
@thorough
def test_invalid_bytes_never_crash_and_no_character_is_left_out(pieces: list[bytes]) -> None:
    spans = spans_of(pieces)
    text = pieces_decode(pieces)(range(len(pieces)))
    assert len(spans) == len(pieces)
    assert {char for a, b in spans for char in range(a, b)} == set(range(len(text)))
    assert all(0 <= a <= b <= len(text) for a, b in spans)
    assert sorted(spans) == spans


def test_tokens_of_one_character_share_its_span() -> None:
    assert spans_of([b"a", b"\xf0", b"\x9f", b"\x9a", b"\x80", b"b"]) == [(0, 1), *[(1, 2)] * 4, (2, 3)]


def test_tokens_may_end_one_character_and_begin_the_next() -> None:
    assert spans_of([b"a\xc3", b"\xa9\xf0\x9f", b"\x9a\x80 b"]) == [(0, 2), (1, 3), (2, 5)]


def test_text_that_ends_within_a_character_gives_its_bytes_one_replacement() -> None:
    assert spans_of([b"a", b"\xf0", b"\x9f", b"\x9a"]) == [(0, 1), (1, 2), (1, 2), (1, 2)]


def test_written_replacement_character_is_a_character_like_any_other() -> None:
    assert spans_of([b"a", b"\xef", b"\xbf", b"\xbd", b"b"]) == [(0, 1), *[(1, 2)] * 3, (2, 3)]


def test_special_tokens_have_empty_spans_even_within_a_character() -> None:
    token_ids = [*b"a\xc3", 256, *b"\xa9", 256, *b"b\xf0", 256]
    expected = [(0, 1), (1, 2), (1, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)]
    assert token_char_spans(token_ids, decode_of(BYTES)) == expected


@either_tokenizer
@patient
@given(text=st.text())
def test_spans_of_a_real_tokenizer_cover_its_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).ids
    spans = token_char_spans(token_ids, decode_of(tokenizer))
    assert {char for a, b in spans for char in range(a, b)} == set(range(len(text)))
    vocab = char_bytes(tokenizer)
    if BROKEN not in text:
        assert spans == slow_spans([vocab[i] for i in token_ids])


def test_token_that_adds_nothing_in_its_place_has_an_empty_span() -> None:
    pieces = [b"a", b" ", b" ", b"b"]

    def squeezing(token_ids: Sequence[int]) -> str:
        return pieces_decode(pieces)(token_ids).replace("  ", " ")

    assert token_char_spans(range(4), squeezing) == [(0, 1), (1, 2), (2, 2), (2, 3)]


def test_no_tokens_have_no_spans() -> None:
    assert token_char_spans([], decode_of(BYTES)) == []


def test_byte_fallback_decoder_restores_a_character_it_withdrew() -> None:
    """It writes U+FFFD for every byte of a run until the run is whole, earlier finished characters included."""
    rocket = [f"<0x{byte:02X}>" for byte in ROCKET.encode()]
    token_ids, decode = fallback_tokenizer([*rocket, *rocket, "▁space"])
    assert token_char_spans(token_ids, decode) == [(0, 1)] * 4 + [(1, 2)] * 4 + [(2, 8)]


def test_byte_fallback_decoder_may_spoil_a_finished_character_for_good() -> None:
    rocket = [f"<0x{byte:02X}>" for byte in ROCKET.encode()]
    token_ids, decode = fallback_tokenizer(["▁the", *rocket, "<0xF0>", "▁space"])
    detection = detect(token_ids, "space", decode)
    assert detection.text == f"the{BROKEN * 5} space"
    assert detection.occurrences == (Occurrence((9, 14), (6, 7)),)


def test_stripped_leading_space_of_a_sentencepiece_decoder_moves_no_span() -> None:
    token_ids, decode = fallback_tokenizer(["▁out", "er", "▁", "sp", "ace", "▁space"])
    assert token_char_spans(token_ids, decode) == [(0, 3), (3, 5), (5, 6), (6, 8), (8, 11), (11, 17)]
    assert [one.token_span for one in detect(token_ids, "space", decode).occurrences] == [(3, 5), (5, 6)]


def test_decode_that_cleans_up_is_refused_by_name_of_the_token() -> None:
    pieces = [b"it", b" is", b" ", b".", b" space"]

    def tidy(token_ids: Sequence[int]) -> str:
        return pieces_decode(pieces)(token_ids).replace(" .", ".")

    with pytest.raises(MappingError, match=r"at token 2 \(id 2\), character 5; decode without any clean-up") as caught:
        token_char_spans(range(5), tidy)
    assert isinstance(caught.value, ItemFailed)
    assert "\n" not in str(caught.value)
    assert not detect(range(5), "time", tidy).word_present_full  # nothing to map, nothing to refuse


@pytest.mark.parametrize("whole", ["ab", "a"])
def test_broken_character_that_turns_into_ascii_or_nothing_is_refused(whole: str) -> None:
    prefixes = ["a", f"a{BROKEN}", whole]
    with pytest.raises(MappingError, match="at token 1 "):
        token_char_spans(range(3), lambda token_ids: prefixes[len(token_ids) - 1])


# ---- detection ------------------------------------------------------------------------------------------------


def char_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    table = {char: byte for byte, char in byte_to_char().items()}
    return {i: bytes(table[c] for c in token) for token, i in tokenizer.get_vocab().items() if token != EOS}


def spellings(vocab: dict[int, bytes], whole: bytes) -> Iterator[list[int]]:
    """Every sequence of tokens that spells the bytes."""
    if not whole:
        yield []
    for token_id, piece in vocab.items():
        if whole.startswith(piece):
            yield from ([token_id, *rest] for rest in spellings(vocab, whole[len(piece) :]))


def test_every_spelling_of_the_word_is_found_with_its_least_token_range() -> None:
    vocab, decode = char_bytes(TRAINED), decode_of(TRAINED)
    tried = 0
    for token_ids in spellings(vocab, b"e space."):
        (occurrence,) = detect(token_ids, "space", decode).occurrences
        first, end = occurrence.token_span
        assert occurrence.char_span == (2, 7)
        assert "space" in decode(token_ids[first:end])
        assert "space" not in decode(token_ids[first + 1 : end])
        assert "space" not in decode(token_ids[first : end - 1])
        tried += 1
    assert tried > 10  # the letters one by one, and many a way of joining them


@either_tokenizer
def test_detection_tells_answer_and_whole_text_apart(tokenizer: Tokenizer) -> None:
    detection = detect_in(tokenizer, " outer\nspace, Space", "space")
    assert (detection.answer, detection.format_ok) == (" outer", True)
    assert (detection.word_present, detection.word_present_full, detection.first_step) == (False, True, None)
    assert [occurrence.char_span for occurrence in detection.occurrences] == [(7, 12), (14, 19)]


@either_tokenizer
def test_repeated_words_come_in_order_and_the_first_gives_the_step(tokenizer: Tokenizer) -> None:
    detection = detect_in(tokenizer, " the space, Space-time\nSPACE", "space")
    assert detection.word_present
    assert not detection.format_ok
    spans = [occurrence.char_span for occurrence in detection.occurrences]
    assert [detection.text[a:b] for a, b in spans] == ["space", "Space", "SPACE"]
    assert detection.first_step == detection.occurrences[0].token_span[0]


def test_word_that_ends_at_the_newline_lies_in_the_answer() -> None:
    detection = detect_in(BYTES, "space\ntime", "space")
    assert (detection.word_present, detection.first_step, detection.format_ok) == (True, 0, True)
    assert detection.occurrences == (Occurrence((0, 5), (0, 5)),)


def test_leading_space_belongs_to_the_token_not_to_the_occurrence() -> None:
    pieces = [b" out", b"er", b" sp", b"ace", b"."]
    assert detect(range(5), "space", pieces_decode(pieces)).occurrences == (Occurrence((7, 12), (2, 4)),)


def test_emoji_split_over_tokens_before_the_word_shifts_nothing() -> None:
    pieces = [b" \xf0", b"\x9f\x9a", b"\x80 sp", b"ace"]
    detection = detect(range(4), "space", pieces_decode(pieces))
    assert detection.text == f" {ROCKET} space"
    assert detection.occurrences == (Occurrence((3, 8), (2, 4)),)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@either_tokenizer
def test_accent_split_over_tokens_within_the_word_is_mapped_whole(form: Form, tokenizer: Tokenizer) -> None:
    text = unicodedata.normalize(form, f"{ROCKET}\u00c9t{E_ACUTE}")
    detection = detect_in(tokenizer, text, f"{E_ACUTE}t{E_ACUTE}")
    assert [occurrence.char_span for occurrence in detection.occurrences] == [(1, len(text))]
    first, end = detection.occurrences[0].token_span
    token_ids = tokenizer.encode(text).ids
    assert end == len(token_ids)
    assert text[1:] in decode_of(tokenizer)(token_ids[first:end])
    assert text[1:] not in decode_of(tokenizer)(token_ids[first + 1 : end])


def test_word_before_a_truncated_character_is_present() -> None:
    detection = detect([*b" space\xf0\x9f"], "space", decode_of(BYTES))
    assert detection.text == f" space{BROKEN}"
    assert detection.occurrences == (Occurrence((1, 6), (1, 6)),)


def test_special_tokens_are_left_out_at_the_edges_and_kept_inside() -> None:
    detection = detect([256, *b"spa", 256, *b"ce", 256], "space", decode_of(BYTES))
    assert detection.occurrences == (Occurrence((0, 5), (1, 7)),)
    assert detection.first_step == 1


def test_empty_completion_is_absent_without_error() -> None:
    def strict(token_ids: Sequence[int]) -> str:
        assert len(token_ids), "some decoders refuse an empty list"
        return decode_of(BYTES)(token_ids)

    absent = Detection("", "", False, False, False, None, ())
    assert detect([], "space", strict) == detect([256], "space", strict) == absent


def test_absent_word_costs_one_decode() -> None:
    calls: list[int] = []

    def counting(token_ids: Sequence[int]) -> str:
        calls.append(len(token_ids))
        return decode_of(BYTES)(token_ids)

    assert not detect([*b"spacetime"], "space", counting).word_present
    assert calls == [9]


def test_range_that_does_not_decode_to_the_word_is_refused_with_both_texts() -> None:
    pieces = [b"the", b" sp", b"ace"]

    def first_piece_matters(token_ids: Sequence[int]) -> str:
        return pieces_decode(pieces)(token_ids) if token_ids[0] == 0 else "?"

    with pytest.raises(MappingError, match=r"tokens \[1, 3\) to decode to 'space'.*\[4, 9\), found '\?'"):
        detect(range(3), "space", first_piece_matters)
