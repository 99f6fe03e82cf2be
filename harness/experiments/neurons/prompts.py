"""Prompt files of the neuron experiment: a text a row, and which logit its neurons are held against."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from harness.text.records import Columns, Record, Rejection, accepted, text_of

_COLUMNS = Columns(
    ("text",),
    ("prompt_id", "category", "target", "contrast"),
    known_as={"prompt_id": ("id", "probe_id"), "text": ("prompt", "question")},
)
_NO_CATEGORY = "all"


@dataclass(frozen=True)
class Prompt:
    """One text, as it is, spaces at its ends included. `target` and `contrast` go before the settings'; `row_hash` changes
    when any other field does."""

    prompt_id: str
    category: str
    text: str
    target: str
    contrast: str
    row_hash: str

    @classmethod
    def of(cls, text: str, prompt_id: str = "", category: str = "", target: str = "", contrast: str = "") -> "Prompt":
        """A prompt with its hash; one without an id is named after its text."""
        category = category or _NO_CATEGORY
        name = prompt_id or f"{category}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        told = json.dumps([name, category, text, target, contrast], ensure_ascii=False)
        return cls(name, category, text, target, contrast, hashlib.sha256(told.encode()).hexdigest())


@dataclass(frozen=True)
class PromptSet:
    """What a prompt file holds, in file order; `sha256` is of the bytes that were parsed."""

    path: Path | None
    prompts: tuple[Prompt, ...]
    rejections: tuple[Rejection, ...]
    sha256: str


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a .jsonl, .ndjson, .json, .csv or .parquet file, and the rows refused.

    Rules, in the order they are tried: empty_field, duplicate (the same text, target and contrast).
    Raises PromptFileError, one line, for anything that is wrong with the file and not with a row.
    """

    def broken(prompt: Prompt) -> tuple[str, str] | None:
        return None if prompt.text.strip() else ("empty_field", "text is empty")

    found = accepted(
        path,
        _COLUMNS,
        lambda r: _prompt(path, r),
        broken,
        lambda p: (p.text, p.target, p.contrast),
        "the same text and target",
    )
    return PromptSet(path, *found)


def one_prompt(text: str) -> PromptSet:
    """A text given in the settings."""
    return PromptSet(None, (Prompt.of(text, "text"),), (), hashlib.sha256(text.encode()).hexdigest())


def _prompt(path: Path, row: Record) -> Prompt:
    def cell(name: str, *, is_exact: bool = False) -> str:
        value = row.cells.get(name)
        return "" if value is None else text_of(path, f"{row.where}, field '{name}'", value, is_exact=is_exact)

    exact = (cell(name, is_exact=True) for name in ("text", "target", "contrast"))
    text, target, contrast = exact
    return Prompt.of(text, cell("prompt_id"), cell("category"), target, contrast)
