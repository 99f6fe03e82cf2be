"""Spellings of a word under three kinds of tokenizer, against brute force: bytes, the demo's BPE, sentence-pieces."""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.models.load import Codec
from harness.text.detect import find_word
from harness.text.words import (
    ENDINGS,
    PAPER_ENDINGS,
    Tokens,
    Vocabulary,
    build_trie,
    normalise,
    prefix_free,
    surface_forms,
    token_sequences,
    word_forms,
)
from tests.tiny import byte_tokenizer

DEMO = Path(__file__).parents[2] / "data" / "models" / "demo"
CODECS = ("bytes", "demo", "pieces")
patient = settings(deadline=None)  # a busy machine is no failure
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=12)


@lru_cache
def codec_of(name: str) -> Codec:
    if name == "bytes":
        return Codec(byte_tokenizer())
    if name == "demo":
        return Codec(AutoTokenizer.from_pretrained(DEMO, local_files_only=True))
    return piece_codec("always")


@lru_cache
def piece_codec(prepend: str) -> Codec:
    """Sentence-pieces as in Llama 2: a space is part of the piece, the decoder drops the text's first one.

    Its alphabet has no capital, so that an upper-case spelling comes out as <unk>.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on a mat. a space, a cat! sat?\nspaceship\n"] * 50, trainer)
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"))


def encode(codec: Codec, text: str) -> list[int]:
    return codec.encode(text, add_special_tokens=False)


def vocabulary_of(codec: Codec, size: int | None = None) -> Vocabulary:
    end = codec.tokenizer.eos_token_id
    assert isinstance(end, int)
    return Vocabulary.of(codec, [end], size or len(codec))


def extends(longer: Tokens, shorter: Tokens) -> bool:
    return longer[: len(shorter)] == shorter


# ---- surface forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "cases"),
    [
        ("space", ["space", "Space", "SPACE"]),
        ("Paris", ["paris", "Paris", "PARIS"]),
        ("NASA", ["nasa", "Nasa", "NASA"]),
        ("iPhone", ["iphone", "Iphone", "IPHONE", "iPhone"]),
    ],
)
def test_surface_forms_are_every_case_with_and_without_a_space_and_every_ending(word: str, cases: list[str]) -> None:
    forms = surface_forms(word)
    assert set(forms) == {
        f"{lead}{case}{end}" for case in cases for lead in ("", " ") for end in ("", ".", ",", "!", "?", " ")
    }
    assert len(forms) == len(set(forms)) == 12 * len(cases)


def test_the_papers_set_is_24_strings_for_a_lower_case_word() -> None:
    forms = surface_forms("gold", PAPER_ENDINGS)
    bare = [f"{lead}{case}{trail}" for case in ("gold", "Gold", "GOLD") for lead in ("", " ") for trail in ("", " ")]
    stops = [f"{lead}{case}{stop}" for case in ("gold", "Gold", "GOLD") for lead in ("", " ") for stop in (".", ". ")]
    assert len(forms) == len(set(forms)) == 24
    assert set(forms) == {*bare, *stops}


@patient
@given(st.text("abcXYZ", min_size=2, max_size=6), st.text("abcXYZ", min_size=2, max_size=6))
def test_every_surface_form_stands_for_its_own_word_and_for_no_other(word: str, other: str) -> None:
    same = word.lower() == other.lower()
    assert {normalise(form) for form in surface_forms(word, (*ENDINGS, *PAPER_ENDINGS))} == {word.lower()}
    assert all((normalise(form) == normalise(other)) is same for form in surface_forms(word))


@pytest.mark.parametrize(
    ("text", "word"),
    [(" “Café”.", "café"), ("cafe\u0301", "café"), ("Ｐａｒｉｓ!", "paris"), ("STRASSE", "strasse"), ("straße", "strasse"),
     ("don't", "don't"), (" … ", ""), ("", "")],
)  # fmt: skip
def test_normalising_folds_case_width_and_accents_and_keeps_what_is_inside(text: str, word: str) -> None:
    assert normalise(text) == word


@patient
@given(st.text())
def test_normalising_strips_to_letters_and_digits_at_both_ends(text: str) -> None:
    found = normalise(text)
    assert found == "" or (found[0].isalnum() and found[-1].isalnum())


# ---- token sequences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("word", ["space", "Paris", "café", "kızı", "cat", "NASA"])
def test_token_sequences_are_the_tokenisations_that_decode_back_to_the_word(name: str, word: str) -> None:
    codec = codec_of(name)
    for endings in (ENDINGS, PAPER_ENDINGS):
        found = token_sequences(word, lambda text: encode(codec, text), codec.decode, endings)
        spelled = {tuple(encode(codec, form)) for form in surface_forms(word, endings)}
        assert len(found) == len(set(found))
        assert set(found) == {s for s in spelled if normalise(codec.decode(s)) == normalise(word)}


def test_a_spelling_that_stands_for_another_word_is_dropped() -> None:
    """The capital of dotless ı is I, which folds to i: KIZI is not kızı. Bytes lose nothing, so all else is kept."""
    codec = codec_of("bytes")
    found = token_sequences("kızı", lambda text: encode(codec, text), codec.decode, ("",))
    assert sorted(codec.decode(s) for s in found) == [" Kızı", " kızı", "Kızı", "kızı"]
    assert len(token_sequences("kizi", lambda text: encode(codec, text), codec.decode, ("",))) == 6  # control


def test_a_spelling_the_tokenizer_cannot_write_is_dropped() -> None:
    codec = codec_of("pieces")  # has no capitals
    found = token_sequences("space", lambda text: encode(codec, text), codec.decode, ENDINGS)
    assert found
    assert all(codec.decode(s).islower() for s in found)
    assert token_sequences("QQ", lambda text: encode(codec, text), codec.decode, ENDINGS) == []


def test_under_bytes_every_surface_form_is_a_sequence_of_its_own() -> None:
    forms = word_forms("space", codec_of("bytes"))
    assert len(forms.paper) == 24
    assert len(forms.events) == 6  # an ending extends the bare form, so 3 cases × 2 spacings are left


# ---- prefix-free ----------------------------------------------------------------------------------------------


@patient
@given(sequences)
def test_prefix_free_keeps_an_antichain_and_drops_only_what_extends_it(given_: list[Tokens]) -> None:
    kept = prefix_free(given_)
    assert len(kept) == len(set(kept))
    assert set(kept) <= set(given_)
    assert not any(extends(a, b) for a in kept for b in kept if a != b)
    for dropped in set(given_) - set(kept):
        assert any(extends(dropped, one) for one in kept)


@patient
@given(sequences, st.randoms(use_true_random=False))
def test_prefix_free_depends_on_neither_order_nor_repeats(given_: list[Tokens], rng: random.Random) -> None:
    shuffled = [*given_, *given_[:3]]
    rng.shuffle(shuffled)
    assert prefix_free(shuffled) == prefix_free(given_)


@patient
@given(sequences, st.integers(0, 2**32 - 1))
def test_prefix_free_probabilities_sum_to_at_most_one_under_any_model(given_: list[Tokens], seed: int) -> None:
    assert sum(probability(s, seed) for s in prefix_free(given_)) <= 1 + 1e-12  # rounding of a dozen additions


def test_overlapping_sequences_can_sum_to_more_than_one() -> None:
    """The control of the law above: the same sum over all sequences, the paper's way, is no probability."""
    chain = [(1,), (1, 1), (1, 1, 1)]
    sums = [sum(probability(s, seed) for s in chain) for seed in range(50)]
    assert max(sums) > 1
    assert max(probability(s, seed) for seed in range(50) for s in prefix_free(chain)) <= 1


def probability(sequence: Tokens, seed: int) -> float:
    """Of a sequence under a random model over three tokens, whose next-token law hangs on all that went before."""
    result = 1.0
    for n, token in enumerate(sequence):
        law = np.random.default_rng([seed, *(t + 1 for t in sequence[:n])]).dirichlet([0.3] * 3)
        result *= float(law[token])
    return result


# ---- tries ----------------------------------------------------------------------------------------------------


@patient
@given(sequences, sequences)
def test_a_trie_spells_every_sequence_and_has_parents_before_children(
    given_: list[Tokens], whole: list[Tokens]
) -> None:
    trie = build_trie(given_, whole)
    assert set(trie.sequences) == {*given_, *whole}
    assert len(trie.sequences) == len(set(trie.sequences))
    assert all(-1 <= parent < node for node, parent in enumerate(trie.parents))
    paths = [path_to(trie.tokens, trie.parents, node) for node in range(len(trie))]
    assert len(set(paths)) == len(paths)
    assert list(trie.depths) == [len(path) - 1 for path in paths]
    for sequence, steps, end in zip(trie.sequences, trie.steps, trie.ends, strict=True):
        assert tuple(token for _, token in steps) == sequence
        assert [paths[node] if node >= 0 else () for node, _ in steps] == [sequence[:n] for n in range(len(sequence))]
        assert end == -1 or paths[end] == sequence
        assert end >= 0 or sequence not in whole


@patient
@given(sequences, sequences)
def test_a_trie_has_no_node_that_is_not_needed(given_: list[Tokens], whole: list[Tokens]) -> None:
    """A prediction needs each proper prefix, a whole sequence itself; the last token of the others is never forwarded."""
    needed = {s[:n] for s in [*given_, *whole] for n in range(1, len(s))} | set(whole)
    trie = build_trie(given_, whole)
    assert len(trie) == len(trie.tokens) == len(trie.parents) == len(trie.depths) == len(needed)
    every_prefix = {s[:n] for s in given_ for n in range(1, len(s) + 1)}
    assert len(build_trie(given_)) <= len(every_prefix)
    assert len(build_trie(given_, given_)) == len(every_prefix)  # control: asked for whole, they do cost their ends


@patient
@given(sequences, sequences)
def test_a_node_sees_itself_and_its_ancestors_only(given_: list[Tokens], whole: list[Tokens]) -> None:
    trie = build_trie(given_, whole)
    paths = [path_to(trie.tokens, trie.parents, node) for node in range(len(trie))]
    expected = [[extends(mine, other) for other in paths] for mine in paths]
    assert trie.ancestry().tolist() == expected
    assert trie.ancestry().shape == (len(trie), len(trie))


def test_siblings_do_not_see_each_other_though_a_causal_mask_would_let_them() -> None:
    ancestry = build_trie([(1, 1, 5), (1, 2, 5), (1, 3, 5)]).ancestry()
    assert ancestry.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert (ancestry != np.tril(np.ones_like(ancestry))).any()


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(AssertionError, match="empty sequence"):
        build_trie([()])


def path_to(tokens: Sequence[int], parents: Sequence[int], node: int) -> Tokens:
    return (*path_to(tokens, parents, parents[node]), tokens[node]) if node >= 0 else ()


# ---- the forms of one word ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("word", ["space", "cat", "Paris", "café"])
def test_word_forms_hold_the_events_and_the_papers_sequences_on_one_trie(name: str, word: str) -> None:
    codec = codec_of(name)
    forms = word_forms(word, codec)
    sequences_of = [
        token_sequences(word, lambda text: encode(codec, text), codec.decode, endings)
        for endings in (ENDINGS, PAPER_ENDINGS)
    ]
    assert list(forms.events) == prefix_free(sequences_of[0])
    assert list(forms.paper) == sequences_of[1]
    assert set(forms.trie.sequences) == {*forms.events, *forms.paper}
    for sequence in (*forms.events, *forms.paper):
        assert forms.trie.sequences[forms.trie.sequences.index(sequence)] == sequence
    for event, is_ended in zip(forms.events, forms.ends_at_boundary, strict=True):
        if not is_ended:  # what follows it decides, so the model must be run to its end
            assert forms.trie.ends[forms.trie.sequences.index(event)] >= 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("word", ["space", "cat", "Paris", "NASA", "café", "TEKNOLOJİ", "Tİ"])
def test_an_event_is_at_a_boundary_when_a_letter_behind_it_leaves_the_word_whole(name: str, word: str) -> None:
    """p_word must count what detection counts. The lower case of İ is i and a combining dot: a mark ends no word."""
    codec = codec_of(name)
    forms = word_forms(word, codec)
    for event, is_ended in zip(forms.events, forms.ends_at_boundary, strict=True):
        text = codec.decode(event)
        spelling = text.strip(" .,!?")
        assert is_ended is bool(find_word(text + "x", spelling)), text
        assert find_word(text + " x", spelling)  # control: behind a space every one is whole


# ---- the vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("word", ["cat", "space", "sat"])
def test_a_token_ends_a_word_when_decoding_it_behind_one_leaves_the_word_whole(name: str, word: str) -> None:
    codec = codec_of(name)
    vocabulary = vocabulary_of(codec)
    ids = encode(codec, word)
    before = codec.decode(ids)
    assert before == word
    expected, newlines = [], []
    for token in range(len(codec)):
        text = codec.decode([*ids, token])
        added = text.removeprefix(before)
        is_whole = (0, len(word)) in find_word(text, word) and bool(added) and not added.startswith("\ufffd")
        expected.append(is_whole or token in vocabulary.stop_ids)
        newlines.append("\n" in added)
    assert vocabulary.ends_word.tolist() == expected
    assert vocabulary.has_newline.tolist() == newlines
    assert any(expected)
    assert not all(expected)
    assert any(newlines)


def test_the_bytes_that_end_a_word_are_the_signs_of_ascii() -> None:
    codec = codec_of("bytes")
    vocabulary = vocabulary_of(codec)
    byte_of = {encode(codec, chr(b))[0]: b for b in range(128)}  # ids follow the alphabet's order, not the bytes'
    ending = {byte_of.get(int(i)) for i in np.flatnonzero(vocabulary.ends_word)}
    assert ending == {b for b in range(128) if not chr(b).isalnum()} | {None}  # None: the end of text
    assert vocabulary.has_newline.sum() == 1
    assert vocabulary.has_newline[encode(codec, "\n")[0]]


def test_half_a_character_does_not_end_a_word() -> None:
    """0xC3 may begin é as well as ×. The plain rule, not alphanumeric, would take U+FFFD for a boundary."""
    codec = codec_of("bytes")
    vocabulary = vocabulary_of(codec)
    halves = [token for token in range(256) if codec.decode([token]) == "\ufffd"]
    assert len(halves) == 128
    assert not vocabulary.ends_word[halves].any()
    assert not "\ufffd".isalnum()  # control
    assert set(encode(codec, "é—×")) <= set(halves)


def test_special_tokens_end_nothing_unless_they_end_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    codec = Codec(tokenizer)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int)
    assert isinstance(pad, int)
    vocabulary = Vocabulary.of(codec, [end], len(codec))
    assert (bool(vocabulary.ends_word[end]), bool(vocabulary.ends_word[pad])) == (True, False)
    assert not vocabulary.has_newline[[end, pad]].any()
    both = Vocabulary.of(codec, [end, pad], len(codec))
    assert both.ends_word[[end, pad]].all()
    assert both.stop_ids == {end, pad}


def test_ids_beyond_the_tokenizer_end_nothing_unless_they_end_the_text() -> None:
    """A model's embedding is often padded, and a checkpoint may name a stop id outside of it."""
    codec = codec_of("bytes")
    padded = Vocabulary.of(codec, [258, 10**6], len(codec) + 3)
    assert len(padded.ends_word) == len(padded.has_newline) == 260
    assert padded.ends_word[257:].tolist() == [False, True, False]
    assert not padded.ends_word[256]  # special, and no stop id here
    assert padded.stop_ids == {258, 10**6}
    cut = Vocabulary.of(codec, [256], 100)
    assert cut.ends_word.tolist() == vocabulary_of(codec).ends_word[:100].tolist()


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_a_sentence_piece_with_its_own_space_ends_a_word(prepend: str) -> None:
    codec = piece_codec(prepend)
    vocabulary = vocabulary_of(codec)
    pieces = codec.tokenizer.convert_ids_to_tokens(list(range(len(codec))))
    spaced = [i for i, piece in enumerate(pieces) if piece.startswith("▁")]
    letters = [i for i, piece in enumerate(pieces) if piece[0].isalpha()]
    assert len(spaced) > 1
    assert len(letters) > 1
    assert vocabulary.ends_word[spaced].all()
    assert not vocabulary.ends_word[letters].any()
    # Control: decoded alone, such a piece loses its space where the decoder drops a text's first one.
    if prepend != "never":
        alone = [codec.decode([i]) for i in spaced if len(pieces[i]) > 1]
        assert alone
        assert all(text[0].isalpha() for text in alone)
