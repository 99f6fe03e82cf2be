"""Stage `single_token` (optional): keep the prompts whose target, with its leading space, is one token.

The kept rows are written to data/validated_single_token/, one file and one summary a category; the originals are not
touched. Later stages of the run measure only the prompts that were kept.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.gravity.inputs import Inputs
from harness.files import replacing

_FIELDS = ("prompt_id", "category", "question", "target", "source", "style", "alternatives")
"""What a kept row is written with."""


@dataclass(frozen=True, slots=True)
class Category:
    """All prompts of one category: rows of `prompts`."""

    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class SingleToken:
    """Writes files, and no rows: `prompts.single_token` is known already."""

    folder: Path
    name: ClassVar[str] = "single_token"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = True
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"prompts": (*_FIELDS, "single_token")}
    row_bytes: ClassVar[int] = 100_000

    @classmethod
    def build(cls, given: Inputs) -> "SingleToken":
        return cls(
            (given.data_folder / "validated_single_token").resolve()
        )  # a link, in the image, to where one may write

    def params(self) -> dict[str, Any]:
        return {}

    def items(self, tables: AnyTables) -> list[Item[Category]]:
        by_category: dict[str, list[dict[str, Any]]] = {}
        for row in tables["prompts"]:
            by_category.setdefault(row["category"], []).append(row)
        return [Item(category, len(rows), Category(tuple(rows))) for category, rows in by_category.items()]

    def setup(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, context: None, items: Sequence[Item[Category]]) -> list[ItemResult]:
        for item in items:
            name = _file_name(item.key)
            kept = [row for row in item.payload.rows if row["single_token"]]
            with replacing(self.folder / f"{name}_validated.jsonl") as temporary:
                lines = (json.dumps({f: row[f] for f in _FIELDS}, ensure_ascii=False) + "\n" for row in kept)
                temporary.write_text("".join(lines), "utf-8")
            summary = {"category": item.key, "prompts": len(item.payload.rows), "kept": len(kept),
                       "removed": sorted(r["target"] for r in item.payload.rows if not r["single_token"])}  # fmt: skip
            with replacing(self.folder / f"{name}_summary.json") as temporary:
                temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return [ItemResult(item.key, {}) for item in items]


def _file_name(category: str) -> str:
    """A category as the start of a file's name; where that is not the category itself, with a hash: two may look alike."""
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in category)[:64]
    return name if name == category else f"{name}_{hashlib.blake2b(category.encode(), digest_size=4).hexdigest()}"
