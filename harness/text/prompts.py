"""Prompt files in, checked prompts out, with the row number and the rule of every row refused.

A row that breaks a rule is listed and reading goes on; a file that is not what its name claims is a PromptFileError.
Knows no tokenizer, no template and no model: a target of many tokens is as welcome as one of a single token.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable
from unicodedata import normalize

from harness.text.records import Columns, Record, Rejection, accepted, described, fail, quoted, text_of

_REQUIRED = ("category", "question", "target")
_COLUMNS = Columns(_REQUIRED, ("prompt_id", "source", "style"), ("alternatives",))


@dataclass(frozen=True)
class Prompt:
    """One question with the word it asks for; `row_hash` changes when any other field does."""

    prompt_id: str
    category: str
    question: str
    target: str
    source: str | None
    style: str | None
    alternatives: tuple[str, ...]
    row_hash: str


@dataclass(frozen=True)
class PromptSet:
    """What a prompt file holds, in file order; `sha256` is of the bytes that were parsed."""

    path: Path
    prompts: tuple[Prompt, ...]
    rejections: tuple[Rejection, ...]
    sha256: str


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a .jsonl, .ndjson, .json, .csv or .parquet file, and the rows refused.

    Rules, in the order they are tried: empty_field, target_not_alphabetic, target_in_question, target_hidden,
    duplicate. Duplicates are looked for among accepted rows, so the first of two equal rows is kept.
    Raises PromptFileError, one line, for anything that is wrong with the file and not with a row.
    """
    prompts, rejections, sha256 = accepted(
        path,
        _COLUMNS,
        lambda row: _prompt(path, row),
        _broken_rule,
        lambda prompt: (fold(prompt.question), fold(prompt.target)),
        "the same question and target",
    )
    return PromptSet(path, prompts, rejections, sha256)


@runtime_checkable
class Categorised(Protocol):
    """Something of a category."""

    @property
    def category(self) -> str: ...


T = TypeVar("T", bound=Categorised)


def take(prompts: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """`limit` prompts in file order, drawn in turn from the categories so that a small sample holds every one.

    Categories take turns in order of first appearance, each giving its rows in file order; hence a smaller sample
    is part of every larger one. None, or a limit of at least len(prompts), keeps all.
    """
    assert limit is None or limit >= 0, f"limit counts prompts, got {limit}"
    category_to_places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        category_to_places.setdefault(prompt.category, []).append(place)
    turns = chain.from_iterable(zip_longest(*category_to_places.values()))
    drawn = [place for place in turns if place is not None][:limit]
    return tuple(prompts[place] for place in sorted(drawn))


def letters(text: str) -> str:
    """The letters of a text and nothing else, folded whatever the case, width, ligatures, spaces and signs."""
    return "".join(filter(str.isalpha, normalize("NFKC", text).casefold()))


# Rows to prompts


def fold(text: str) -> str:
    """The same for texts that read the same: whatever the case, width, ligatures and spaces."""
    return " ".join(normalize("NFKC", text).casefold().split())


def _prompt(path: Path, row: Record) -> Prompt:
    """A row with its fields stripped, defaulted and hashed; required fields may still be empty."""

    def text(name: str) -> str:
        value = row.cells.get(name)
        return "" if value is None else text_of(path, f"{row.where}, field '{name}'", value)

    where = f"{row.where}, field 'alternatives'"
    found = row.cells.get("alternatives")
    if found is not None and not isinstance(found, list):
        raise fail(path, where, f"expected a list of texts, found {described(found)}", 'write it as ["one", "two"]')
    alternatives = tuple(text_of(path, f"{where}, element {i}", value) for i, value in enumerate(found or [], 1))

    category, question, target = (text(name) for name in _REQUIRED)
    prompt = Prompt(
        prompt_id=text("prompt_id") or f"{category}_{target}_{hashlib.sha256(question.encode()).hexdigest()[:8]}",
        category=category,
        question=question,
        target=target,
        source=text("source") or None,
        style=text("style") or None,
        alternatives=tuple(filter(None, alternatives)),
        row_hash="",
    )
    fields = {name: value for name, value in asdict(prompt).items() if name != "row_hash"}
    canonical = json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return replace(prompt, row_hash=hashlib.sha256(canonical.encode()).hexdigest())


def _broken_rule(prompt: Prompt) -> tuple[str, str] | None:
    """The slug of the first rule a prompt breaks on its own, with what was found; None when it keeps them all."""
    for name in _REQUIRED:
        if not getattr(prompt, name):
            return "empty_field", f"{name} is empty"

    # NFC, so that an accent typed as a mark of its own counts as part of its letter. The letters are asked for as
    # well: a few symbols are alphabetic to Unicode and fold to nothing, which would be "hidden" in any question.
    shown, word = quoted(prompt.target), normalize("NFC", prompt.target)
    if not word.isalpha() or min(len(word), len(letters(word))) < 2:
        return "target_not_alphabetic", f"target {shown} is not one word of two or more letters"

    # As in detection, a word ends at any sign that is neither a letter nor a digit: "_" ends it, which \b would not.
    whole_word = rf"(?<![^\W_]){re.escape(fold(prompt.target))}(?![^\W_])"
    if re.search(whole_word, fold(prompt.question)):
        return "target_in_question", f"the question {quoted(prompt.question)} names the target {shown}"
    if letters(prompt.target) in letters(prompt.question):
        return "target_hidden", f"the target {shown} is spelled by letters in a row in {quoted(prompt.question)}"
    return None
