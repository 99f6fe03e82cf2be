"""Stage `diff_tokens`: how much likelier each token is in the model after than in the one before, over all contexts.

A fold: what is kept is sums over contexts, and the analysis makes rows of the last of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from safetensors.numpy import save_file

from harness.engine import AnyTables, Artifact, BatchOutput, FileHandle, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.lda.inputs import CONDITION, Both, Inputs, contexts_of
from harness.models.raised import NUM_TOP, PARTS, PLACES, Sums, raised
from harness.models.rollout import Pair

KIND = "token_diffs"
"""Of the files with sums."""


@dataclass(frozen=True)
class DiffTokens:
    """Writes no rows: its state is `Sums` of all prompts, as safetensors."""

    both: Both
    name = "diff_tokens"
    kind = "fold"
    keeps = "last"
    version = 1
    reads = MappingProxyType({"contexts": ("prompt_id", "condition", "token_ids")})
    loads_ahead = 8_192
    row_bytes = 100

    @classmethod
    def build(cls, given: Inputs) -> "DiffTokens":
        return cls(given.both)

    def params(self) -> dict[str, Any]:
        return {"num_top": NUM_TOP}

    def items(self, tables: AnyTables) -> list[Item[tuple[int, ...]]]:
        return [
            Item(row["prompt_id"], len(row["token_ids"]), ())
            for row in Tables.of(tables).streamed("contexts", ("prompt_id", "token_ids"))
        ]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[tuple[int, ...]]]:
        token_ids = contexts_of(tables, [i.key for i in items])
        return [replace(i, payload=token_ids[i.key]) for i in items]

    def setup(self) -> Pair:
        return self.both.loaded()

    def run(self, context: Pair, items: Sequence[Item[tuple[int, ...]]], before: FileHandle | None) -> BatchOutput:
        found = raised(context, [i.payload for i in items])
        sums = read_sums(before) if before else Sums.none(context.num_common)
        results = []
        for item, one in zip(items, found, strict=True):
            if isinstance(one, ItemFailed):
                results.append(ItemResult.failed(item.key, one))
            else:
                sums = sums + one
                results.append(ItemResult(item.key, {}))
        keys = {"condition": CONDITION, "places": ",".join(PLACES)}
        write = partial(save_file, sums.tensors())
        state = Artifact("sums.safetensors", keys, KIND, sums.n.shape, "int64", write)
        return BatchOutput(results, state=state)


def read_sums(file: FileHandle) -> Sums:
    """Raises RunError where the file is not the one that was written."""
    with file.open() as tensors:
        return Sums.of({part: tensors.get_tensor(part) for part in PARTS})
