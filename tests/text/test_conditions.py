"""Templates and spans: every span is checked by slicing the text it points into, and by where it was put."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import SettingsError
from harness.experiments.gravity.conditions import BUILT_IN, FIELDS, Span, Template, token_span
from harness.models.load import Codec
from harness.text.prompts import Prompt
from tests.tiny import byte_tokenizer

patient = settings(deadline=None)  # a busy machine is no failure
BASELINE, NEGATIVE = BUILT_IN["baseline"], BUILT_IN["negative"]
PROHIBITION = 'Answer with exactly one English word.\nDo not use the word "{}" anywhere in your answer.'

nasty = st.sampled_from(
    ["{question}", "{target}", "{category}", "{", "}", "{}", "{0}", "%s", "\\1", "\\g<0>", "$^.*+?[(|", "Do not use",
     "never say", "word", "Question:", "Answer:", '"', "____", " ", "é", "e\u0301", "🚀", "ﷺ"]
)  # fmt: skip
line = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))
# Fields are stripped and not empty when they come from a file.
pieces = st.lists(nasty | st.text(line, max_size=8), min_size=1, max_size=6).map("".join).filter(str.strip)
values = st.text(line, min_size=1, max_size=8).filter(lambda text: text == text.strip())
targets = st.sampled_from(["word", "Do", "use", "milk", "Answer", "question", "é", "\\1"]) | values


def prompt(question: str = "Q?", target: str = "milk", category: str = "idioms", style: str | None = None) -> Prompt:
    return Prompt("id", category, question, target, None, style, (), "hash")


def cut(text: str, span: Span | None) -> str | None:
    return None if span is None else text[span[0] : span[1]]


def cuts(template: Template, given_: Prompt) -> tuple[str | None, ...]:
    """What instruction, negation, mention and question point at."""
    return tuple(cut(template.render(given_), span) for span in template.spans(given_))


# ---- the two built-in conditions ------------------------------------------------------------------------------


def test_the_built_in_conditions_are_the_two_texts_of_the_paper() -> None:
    assert list(BUILT_IN) == ["baseline", "negative"]
    asked = prompt("What do cows give?", "milk")
    assert BASELINE.render(asked) == (
        "Answer with exactly one English word.\n"  #
        "Question: What do cows give?\n"
        "Answer:"
    )
    assert NEGATIVE.render(asked) == (
        "Answer with exactly one English word.\n"
        'Do not use the word "milk" anywhere in your answer.\n'
        "Question: What do cows give?\n"
        "Answer:"
    )
    for name, template in BUILT_IN.items():
        template.check(name)


@patient
@given(pieces, targets, st.booleans())
def test_the_negative_conditions_spans_cut_out_its_parts_whatever_the_prompt_says(
    question: str, target: str, repeat: bool
) -> None:
    asked = prompt(question + target if repeat else question, target)
    text = f"{PROHIBITION.format(target)}\nQuestion: {asked.question}\nAnswer:"
    assert NEGATIVE.render(asked) == text
    assert cuts(NEGATIVE, asked) == (PROHIBITION.format(target), "Do not use", target, asked.question)
    spans = NEGATIVE.spans(asked)
    # By place too: a target such as "word" occurs in many places, and only one is the mention.
    assert spans.instruction == (0, len(PROHIBITION.format(target)))
    assert spans.negation == (38, 48)
    assert spans.mention == (59, 59 + len(target))
    assert spans.question == (len(text) - len("\nAnswer:") - len(asked.question), len(text) - len("\nAnswer:"))


@patient
@given(pieces, targets)
def test_the_baseline_has_an_instruction_and_a_question_and_no_more(question: str, target: str) -> None:
    asked = prompt(question + target, target)
    assert BASELINE.render(asked) == f"Answer with exactly one English word.\nQuestion: {asked.question}\nAnswer:"
    assert cuts(BASELINE, asked) == ("Answer with exactly one English word.", None, None, asked.question)


def test_looking_for_the_words_in_the_text_would_find_other_ones() -> None:
    """The control of the two laws above: searching the rendered text, instead of following the template, goes wrong."""
    asked = prompt("Do not use this word. Which word?", "word")
    text = NEGATIVE.render(asked)
    _, negation, mention, _ = NEGATIVE.spans(asked)
    assert mention is not None
    assert negation is not None
    assert text.find("word") != mention[0]
    assert text.rfind("Do not use") != negation[0]
    assert "Do not use" in BASELINE.render(asked)
    assert BASELINE.spans(asked).negation is None
    assert NEGATIVE.text.format(question="{target}", target="x") == NEGATIVE.render(prompt("{target}", "x"))
    assert NEGATIVE.text.replace("{question}", "{target}").replace("{target}", "x") != NEGATIVE.render(
        prompt("{target}", "x")
    )


# ---- any template ---------------------------------------------------------------------------------------------


@patient
@given(
    st.lists(st.sampled_from(["Say it. ", "\n", "{", "}", "{ }", "A: ", "é🚀", " ", ""]), min_size=5, max_size=5),
    st.permutations(FIELDS), pieces, targets, values, values,
)  # fmt: skip
def test_any_template_renders_and_its_spans_follow_the_pieces_it_was_made_of(
    literals: list[str], fields: list[str], question: str, target: str, category: str, style: str
) -> None:
    asked = prompt(question, target, category, style)
    made, text, places, line_start = literals[0], literals[0], {}, {}
    newline = made.rfind("\n")
    for name, literal in zip(fields, literals[1:], strict=True):
        value = getattr(asked, name)
        places[name], line_start[name] = (len(text), len(text) + len(value)), newline + 1
        text += value
        newline = len(text) + literal.rfind("\n") if "\n" in literal else newline
        text += literal
        made += "{" + name + "}" + literal  # so {{target} may come about: a stray brace leaves the field as it is
    template = Template(made)
    template.check("made")
    assert template.render(asked) == text
    spans = template.spans(asked)
    assert (spans.question, spans.mention, spans.negation) == (places["question"], places["target"], None)
    before = text[: line_start["question"]]
    assert cut(text, spans.instruction) == (before.strip() or None)
    if spans.instruction:
        assert spans.instruction[0] == len(before) - len(before.lstrip())


def test_with_the_question_first_there_is_no_instruction_before_it_and_the_rest_is_found() -> None:
    template = Template("Question: {question}\nDo not use {target}.\nAnswer:")
    template.check("question_first")
    asked = prompt("Which white drink?", "milk")
    assert template.render(asked) == "Question: Which white drink?\nDo not use milk.\nAnswer:"
    assert cuts(template, asked) == (None, "Do not use", "milk", "Which white drink?")
    named = Template(template.text, instruction="Do not use {target}.", negation="not")
    named.check("question_first")
    assert cuts(named, asked) == ("Do not use milk.", "not", "milk", "Which white drink?")


def test_a_template_may_name_the_category_instead_of_the_word() -> None:
    template = Template("One word.\nAvoid the usual {category} ({style}).\nQ: {question}\nA:")
    template.check("category_ban")
    asked = prompt("A penny saved?", "earned", "idioms", "blank_end")
    assert template.render(asked) == "One word.\nAvoid the usual idioms (blank_end).\nQ: A penny saved?\nA:"
    assert cuts(template, asked) == ("One word.\nAvoid the usual idioms (blank_end).", "Avoid", None, "A penny saved?")
    assert "()" in template.render(prompt())  # a prompt without a style


def test_an_instruction_and_a_negation_named_in_the_settings_win_over_the_usual_ones() -> None:
    text = 'Please. Do not use X.\nLeave "{target}" out. Q: {question}\nA:'
    asked = prompt("Which?", "milk")
    assert cuts(Template(text), asked) == ("Please. Do not use X.", "Do not use", "milk", "Which?")
    named = Template(text, instruction='Do not use X.\nLeave "{target}" out.', negation='Leave "{target}" out')
    named.check("named")
    assert cuts(named, asked) == ('Do not use X.\nLeave "milk" out.', 'Leave "milk" out', "milk", "Which?")


def test_parts_that_stand_against_a_field_keep_to_their_side() -> None:
    template = Template(
        "{category}{target}\nnever{target}{question}{target}", instruction="never", negation="{target}{q"
    )
    asked = prompt("Q", "milk", "idioms")
    spans = template.spans(asked)
    text = template.render(asked)
    assert text == "idiomsmilk\nnevermilkQmilk"
    assert (cut(text, spans.instruction), cut(text, spans.mention), cut(text, spans.question)) == ("never", "milk", "Q")
    assert spans.mention == (6, 10)  # the first of the three


@pytest.mark.parametrize(
    "cue",
    ["Do not use", "do not say", "Don't use", "Never mention", "never", "You must not", "Avoid using", "Refrain from saying"],
)  # fmt: skip
def test_the_usual_prohibitions_are_found_whole(cue: str) -> None:
    asked = prompt()
    template = Template(f"{cue} the word {{target}}.\n{{question}}")
    found = cuts(template, asked)[1]
    assert found == cue.removeprefix("You ")


@pytest.mark.parametrize(
    "text", ["Answer with {target}", "A notable word", "Whenever asked", "Use one word", "Do note it"]
)
def test_words_that_only_look_like_a_prohibition_are_none(text: str) -> None:
    assert Template(f"{text}.\n{{question}}").spans(prompt()).negation is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (Template("no field at all"), ["{question} once", "0 times"]),
        (Template("{question} {question}"), ["{question} once", "2 times"]),
        (Template("{question} {answer}"), ["{answer}", "{target}", "{category}"]),
        (Template("{question} {0}"), ["{0}"]),
        (Template("{question!r}"), ["name alone in braces", "'{question!r}'"]),
        (Template("{question}", instruction="not\nthere"), [".instruction", "not\\nthere"]),
        (Template("{question}", negation="Do not"), [".negation", "'Do not'"]),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_in_one_line(template: Template, told: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        template.check("mine")
    message = str(caught.value)
    assert "gravity.conditions.mine" in message
    assert "\n" not in message
    for words in told:
        assert words in message


# ---- characters to tokens -------------------------------------------------------------------------------------


tilings = st.lists(st.integers(0, 4), min_size=1, max_size=8)


@patient
@given(
    tilings, st.lists(st.integers(0, 2), min_size=8, max_size=8), st.integers(0, 12), st.integers(1, 8), st.booleans()
)
def test_a_token_span_is_the_least_range_that_leaves_no_touching_token_out(
    sizes: list[int], gaps: list[int], start: int, size: int, special: bool
) -> None:
    offsets, at = [(0, 0)] if special else [], 0
    for length, gap in zip(sizes, gaps, strict=False):
        offsets.append((at + gap, at + gap + length))  # gaps are spaces that a tokenizer trims from its offsets
        at += gap + length
    span = (start, start + size)
    assert token_span(span, offsets) == least_cover(span, offsets)


def least_cover(span: Span, offsets: list[Span]) -> Span | None:
    """By trying every range: the shortest outside of which no token shares a character with the span."""

    def shares(token: Span) -> bool:
        return bool(set(range(*token)) & set(range(*span)))

    if not any(map(shares, offsets)):
        return None
    ranges = [(0, len(offsets)), *combinations(range(len(offsets) + 1), 2)]
    covering = [(a, b) for a, b in ranges if not any(map(shares, offsets[:a] + offsets[b:]))]
    return min(covering, key=lambda r: r[1] - r[0])


def test_a_token_span_takes_in_the_token_that_carries_the_leading_space() -> None:
    with_space = [(0, 0), (0, 2), (2, 6), (6, 11), (11, 12)]  # <s> Do ␣not ␣milk .
    without = [(0, 0), (0, 2), (3, 6), (7, 11), (11, 12)]  # the same, spaces trimmed
    for offsets in (with_space, without):
        assert token_span((7, 11), offsets) == (3, 4)
        assert token_span((3, 11), offsets) == (2, 4)
        assert token_span((0, 2), offsets) == (1, 2)  # not the special at (0, 0)
    assert token_span((6, 7), with_space) == (3, 4)
    assert token_span((6, 7), without) is None  # a space that no token holds


def test_no_part_and_a_part_no_token_touches_give_no_token_span() -> None:
    assert token_span(None, [(0, 3)]) is None
    assert token_span((3, 5), [(0, 3), (5, 6)]) is None
    assert token_span((0, 5), []) is None
    assert token_span((0, 5), [(0, 0), (0, 0)]) is None


@patient
@given(pieces, st.sampled_from(["milk", "é", "🚀"]))
def test_tokens_of_a_real_context_cut_out_the_parts_they_are_said_to(question: str, target: str) -> None:
    codec = Codec(byte_tokenizer())
    asked = prompt(question, target)
    text = NEGATIVE.render(asked)
    ids, offsets = codec.context(text)
    for char_span in NEGATIVE.spans(asked):
        assert char_span is not None
        found = token_span(char_span, offsets)
        assert found is not None
        assert codec.decode(ids[slice(*found)]) == text[slice(*char_span)]
