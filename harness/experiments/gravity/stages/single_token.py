"""Stage `single_token` (optional): keep the prompts whose target, with its leading space, is one token.

The kept rows are files of the run, one and one summary a category, under `artifacts/single_token/`: a prompt file that
another run can be given. Later stages of this run measure only the prompts that were kept.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine import AnyTables, Artifact, Item, ItemResult
from harness.experiments.gravity.inputs import Inputs

_FIELDS = ("prompt_id", "category", "question", "target", "source", "style", "alternatives")


@dataclass(frozen=True, slots=True)
class Category:
    """All prompts of one category: rows of `prompts`."""

    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class SingleToken:
    """Writes files, and no rows but theirs: `prompts.single_token` is known already."""

    name = "single_token"
    version = 1
    reads = MappingProxyType({"prompts": (*_FIELDS, "single_token")})
    row_bytes = 1_000
    file_bytes = 100_000

    @classmethod
    def build(cls, given: Inputs) -> "SingleToken":
        return cls()

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: AnyTables) -> list[Item[Category]]:
        by_category: dict[str, list[dict[str, Any]]] = {}
        for row in tables["prompts"]:
            by_category.setdefault(row["category"], []).append(row)
        return [Item(category, len(rows), Category(tuple(rows))) for category, rows in by_category.items()]

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Category]]) -> list[ItemResult]:
        return [ItemResult(item.key, {}, artifacts=tuple(_files(item.key, item.payload.rows))) for item in items]


def _files(category: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Artifact]:
    """The prompts of a category that are kept, as a prompt file, and what became of all of them."""
    kept = [row for row in rows if row["single_token"]]
    lines = (json.dumps({f: row[f] for f in _FIELDS}, ensure_ascii=False) + "\n" for row in kept)
    summary = {
        "category": category,
        "prompts": len(rows),
        "kept": len(kept),
        "removed": sorted(r["target"] for r in rows if not r["single_token"]),
    }
    start = f"single_token/{_file_name(category)}"
    for path, text, number in (
        (f"{start}_validated.jsonl", "".join(lines), len(kept)),
        (f"{start}_summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n", 1),
    ):
        yield Artifact(path, {"category": category}, "prompts", (number,), "json", text.encode())


def _file_name(category: str) -> str:
    """A category as the start of a file's name; where that is not the category itself, with a hash: two may look alike."""
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in category)[:64]
    return name if name == category else f"{name}_{hashlib.blake2b(category.encode(), digest_size=4).hexdigest()}"
