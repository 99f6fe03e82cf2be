"""Stage `select` (optional): a set of prompts balanced over categories and pressure bins.

Solved once, as one integer program, and never relaxed in silence: a prompt is admitted by the stated rules or not at
all, and `prompts.tier` says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.gravity.bins import bin_of
from harness.experiments.gravity.inputs import Admitted, Inputs
from harness.experiments.gravity.settings import SelectSettings
from harness.text.prompts import letters

ADMITTED = "balanced"
"""The tier of a prompt that keeps all the rules; there is no other."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt that may be selected."""

    prompt_id: str
    category: str
    target: str
    p0: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """All prompts that may be selected."""

    all: tuple[Candidate, ...]


@dataclass(frozen=True)
class Select:
    """Sets `prompts.tier`. Later stages measure only the prompts admitted."""

    rules: SelectSettings
    admitted: Admitted
    name = "select"
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "category", "target", "single_token", "tier"),
            "psem": ("prompt_id", "condition", "p_sem"),
        }
    )
    row_bytes = 100_000

    @classmethod
    def build(cls, given: Inputs) -> "Select":
        return cls(given.settings.select, Admitted("single_token" in given.stages, selected=False))

    def params(self) -> dict[str, Any]:
        return self.rules.model_dump()

    def items(self, tables: AnyTables) -> list[Item[Candidates]]:
        p0 = {row["prompt_id"]: row["p_sem"] for row in tables["psem"] if row["condition"] == "baseline"}
        candidates = [
            Candidate(p["prompt_id"], p["category"], letters(p["target"]), p0[p["prompt_id"]])
            for p in tables["prompts"]
            if p["prompt_id"] in p0 and self.admitted(p)
        ]
        return [Item("selection", 1, Candidates(tuple(candidates)))]

    def most_items(self, num_subjects: int) -> int:
        return 1

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Candidates]]) -> list[ItemResult]:
        chosen = choose(items[0].payload.all, **self.rules.model_dump())
        changes = [{"prompt_id": prompt_id, "tier": ADMITTED} for prompt_id in chosen]
        return [ItemResult(items[0].key, {}, updates={"prompts": changes})]


def choose(candidates: Sequence[Candidate], min_p0: float, per_bin: int, max_categories: int) -> list[str]:
    """Ids of the most prompts with P0 ≥ `min_p0`, at most `per_bin` in a category's bin, and each target in at most
    `max_categories` categories; among equal counts those with the highest P0.

    One binary variable a prompt and one a (target, category) pair, solved to optimality by HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: half a second that every command would pay
    from scipy.sparse import coo_array

    kept = sorted((c for c in candidates if c.p0 >= min_p0), key=lambda c: c.prompt_id)
    if not kept:
        return []
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys((c.target, c.category) for c in kept))}
    n = len(kept)
    rows: list[tuple[Mapping[int, float], float]] = []
    cells: dict[tuple[str, int], dict[int, float]] = {}
    spread: dict[str, dict[int, float]] = {}
    for i, c in enumerate(kept):
        rows.append(
            ({i: 1.0, n + pairs[c.target, c.category]: -1.0}, 0.0)
        )  # a prompt takes its (target, category) pair
        cells.setdefault((c.category, bin_of(c.p0)), {})[i] = 1.0
    for (target, _category), j in pairs.items():
        spread.setdefault(target, {})[n + j] = 1.0
    rows += [(cell, float(per_bin)) for cell in cells.values()]
    rows += [(used, float(max_categories)) for used in spread.values()]
    data, row_at, column_at = zip(
        *((v, r, c) for r, (terms, _) in enumerate(rows) for c, v in terms.items()), strict=True
    )
    matrix = coo_array((data, (row_at, column_at)), shape=(len(rows), n + len(pairs))).tocsr()
    # The count decides; P0 only breaks ties, so all P0 together weigh less than one prompt.
    cost = np.concatenate([[-1.0 - 0.5 * c.p0 / n for c in kept], np.zeros(len(pairs))])
    solution = milp(
        cost,
        constraints=LinearConstraint(matrix, ub=np.array([bound for _, bound in rows])),  # type: ignore[arg-type]
        bounds=Bounds(0, 1),
        integrality=np.ones(n + len(pairs)),
        options={"mip_rel_gap": 0.0},
    )
    assert solution.x is not None, f"the selection has no solution: {solution.message}"
    return [c.prompt_id for c, x in zip(kept, solution.x[:n], strict=True) if x > 0.5]
