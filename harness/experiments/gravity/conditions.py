"""Conditions: named templates that put a prompt's question and target in a text, and where each part stands in it.

Spans are [start, end), in characters of the rendered text, then in tokens of the context.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.errors import SettingsError
from harness.text.prompts import Prompt

Span = tuple[int, int]
FIELDS = ("question", "target", "category", "style")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TRICK = re.compile(rf"\{{\s*(?:{'|'.join(FIELDS)})\b(?!\}})[^{{}}\n]{{0,40}}\}}?")
"""A field with anything else in its braces: as Python would format it, and as nothing here does."""
_CUE = re.compile(
    r"\b(?:do not|don't|never|must not|may not|avoid|refrain from)"
    r"(?:\s+(?:use|say|write|mention|give|answer with|using|saying|writing|mentioning))?\b",
    re.IGNORECASE,
)


class Spans(NamedTuple):
    """Where the parts of a context are; None where a condition has no such part.

    `instruction` is all that stands before the question's line, in every condition, so that conditions compare;
    `negation` the cue ("Do not use"), `mention` the target inside the instruction, `question` the question itself.
    """

    instruction: Span | None
    negation: Span | None
    mention: Span | None
    question: Span | None


@dataclass(frozen=True)
class Template:
    """One condition's text. `instruction` and `negation` name those parts literally where the usual finding would miss."""

    text: str
    instruction: str | None = None
    negation: str | None = None

    def check(self, name: str) -> None:
        """Raises SettingsError for a template that cannot be rendered."""
        where = f"gravity.conditions.{name}"
        fields = _PLACEHOLDER.findall(self.text)
        if (trick := _TRICK.search(self.text)) is not None:
            raise SettingsError(
                f"{where}: expected a field's name alone in braces, as {{question}}, found {trick[0]!r}"
            )
        for unknown in sorted(set(fields) - set(FIELDS)):
            raise SettingsError(
                f"{where}: no field {{{unknown}}}; a template may use {', '.join(f'{{{f}}}' for f in FIELDS)}"
            )
        if fields.count("question") != 1:
            raise SettingsError(
                f"{where}: expected {{question}} once in the template, found it {fields.count('question')} times"
            )
        for part in ("instruction", "negation"):
            literal = getattr(self, part)
            if literal is not None and (not literal or literal not in self.text):
                raise SettingsError(
                    f"{where}.{part}: expected words of the template, found {literal!r}, which it does not contain"
                )

    def render(self, prompt: Prompt) -> str:
        return _PLACEHOLDER.sub(lambda m: str(getattr(prompt, m[1]) or ""), self.text)

    def spans(self, prompt: Prompt) -> Spans:
        """Character spans in `render(prompt)`."""
        shift = _Shift(self.text, prompt)
        question = next(m.span() for m in _PLACEHOLDER.finditer(self.text) if m[1] == "question")
        instruction = self._instruction(question)
        mention = next((m.span() for m in _PLACEHOLDER.finditer(self.text) if m[1] == "target"), None)
        return Spans(*(span and shift(span) for span in (instruction, self._negation(), mention, question)))

    def _instruction(self, question: Span) -> Span | None:
        if self.instruction is not None:
            start = self.text.index(self.instruction)
            return start, start + len(self.instruction)
        before = self.text[: self.text.rfind("\n", 0, question[0]) + 1]
        return (len(before) - len(before.lstrip()), len(before.rstrip())) if before.strip() else None

    def _negation(self) -> Span | None:
        if self.negation is not None:
            start = self.text.index(self.negation)
            return start, start + len(self.negation)
        found = _CUE.search(self.text)
        return found.span() if found else None


class _Shift:
    """Maps spans of the template to spans of the rendered text."""

    def __init__(self, template: str, prompt: Prompt):
        self.changes = [
            (m.start(), m.end(), len(str(getattr(prompt, m[1]) or ""))) for m in _PLACEHOLDER.finditer(template)
        ]

    def __call__(self, span: Span) -> Span:
        return self._at(span[0], is_end=False), self._at(span[1], is_end=True)

    def _at(self, position: int, is_end: bool) -> int:
        moved = position
        for start, end, size in self.changes:
            if end <= position if is_end else end <= position or start < position:
                moved += size - (end - start)
        return moved


BUILT_IN: dict[str, Template] = {
    "baseline": Template("Answer with exactly one English word.\nQuestion: {question}\nAnswer:"),
    "negative": Template(
        'Answer with exactly one English word.\nDo not use the word "{target}" anywhere in your answer.\n'
        "Question: {question}\nAnswer:"
    ),
}


def token_span(span: Span | None, offsets: Sequence[Span]) -> Span | None:
    """The least token range that covers a character span; None for none, or where no token touches it."""
    if span is None:
        return None
    touched = [i for i, (start, end) in enumerate(offsets) if end > start and end > span[0] and start < span[1]]
    return (touched[0], touched[-1] + 1) if touched else None
