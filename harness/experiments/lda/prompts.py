"""Prompt files of amplification: a text a row, and whatever it is called and filed under."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from harness.text.prompts import fold
from harness.text.records import Columns, Record, Rejection, accepted, text_of

_COLUMNS = Columns(("prompt",), ("prompt_id", "category"), known_as={"prompt": ("question",)})
_NO_CATEGORY = "all"


@dataclass(frozen=True)
class Prompt:
    """One text to be continued; `row_hash` changes when any other field does."""

    prompt_id: str
    category: str
    text: str
    row_hash: str


@dataclass(frozen=True)
class PromptSet:
    """What a prompt file holds, in file order; `sha256` is of the bytes that were parsed."""

    path: Path
    prompts: tuple[Prompt, ...]
    rejections: tuple[Rejection, ...]
    sha256: str


def read_prompts(path: Path, min_chars: int = 0, max_chars: int | None = None) -> PromptSet:
    """The prompts of a .jsonl, .ndjson, .json, .csv or .parquet file, and the rows refused.

    Rules, in the order they are tried: empty_field, too_short, too_long, duplicate (compared by NFKC, whatever case and spaces).
    Raises PromptFileError, one line, for anything that is wrong with the file and not with a row.
    """

    def broken(prompt: Prompt) -> tuple[str, str] | None:
        size = len(prompt.text)
        if not size:
            return "empty_field", "prompt is empty"
        if size < min_chars:
            return "too_short", f"{size} characters, and lda.min_chars is {min_chars}"
        if max_chars is not None and size > max_chars:
            return "too_long", f"{size} characters, and lda.max_chars is {max_chars}"
        return None

    found = accepted(path, _COLUMNS, lambda r: _prompt(path, r), broken, lambda p: fold(p.text), "the same prompt")
    return PromptSet(path, *found)


def _prompt(path: Path, row: Record) -> Prompt:
    def cell(name: str) -> str:
        value = row.cells.get(name)
        return "" if value is None else text_of(path, f"{row.where}, field '{name}'", value)

    text, category = cell("prompt"), cell("category") or _NO_CATEGORY
    prompt_id = cell("prompt_id") or f"{category}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    told = json.dumps([prompt_id, category, text], ensure_ascii=False)
    return Prompt(prompt_id, category, text, hashlib.sha256(told.encode()).hexdigest())
