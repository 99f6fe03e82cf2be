"""What pages of gravity ask: each page's questions in the module of its name; here the filters they share, with their
SQL, and what several of them ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from app import queries
from app.selection import Selection
from harness.run import RunPaths, seed_of

EXAMPLES: dict[str, str] = {
    "Rates": (
        "SELECT condition, count(*) AS prompts, avg(rate) AS violation_rate\nFROM violation\nGROUP BY ALL\nORDER BY ALL"
    ),
    "Backfire": (
        "-- where the ban raised the pressure\n"
        "SELECT prompt_id, condition, p0, p1, delta\nFROM suppression\nWHERE delta < 0\nORDER BY delta"
    ),
    "Failures": (
        "SELECT o.prompt_id, o.condition, p.target, c.answer, o.taxonomy\n"
        "FROM outcomes o\n"
        "JOIN prompts p USING (prompt_id)\n"
        "JOIN completions c USING (prompt_id, condition)\n"
        "WHERE o.outcome = 'failure' AND c.mode = 'greedy'\n"
        "ORDER BY ALL"
    ),
    "Spellings": (
        "SELECT prompt_id, unnest(sequences) AS token_ids, exp(unnest(logprobs)) AS probability\n"
        "FROM psem\nWHERE condition = 'baseline'\nORDER BY prompt_id, probability DESC"
    ),
    "Lens": (
        "SELECT layer, outcome, mean AS p_target, n\nFROM lens_moments\n"
        "WHERE measure = 'p_target' AND step_kind = 'first' AND measured = condition\nORDER BY ALL"
    ),
    "Patches": (
        "SELECT patch, layer, avg(delta_p) AS mean_delta_p, avg(flipped::INT) AS flipped\n"
        "FROM patching\nGROUP BY ALL\nORDER BY abs(mean_delta_p) DESC"
    ),
}
"""Questions that the page SQL offers, by title."""
EVERY: tuple[str, list[Any]] = ("TRUE", [])
"""Keeps every prompt, as `View.where` keeps those of the filters."""


@dataclass(frozen=True)
class View(Selection):
    """What is looked at: a run, and the filters that all pages share.

    `condition` is the one compared with baseline; `category` and `outcome` are None for all; `prompt_id` and `pin` are
    the chosen prompt and the one it is compared with.
    """

    conditions: tuple[str, ...]
    condition: str
    category: str | None
    outcome: str | None
    prompt_id: str | None
    pin: str | None

    @property
    def is_whole(self) -> bool:
        """Whether the filters keep every prompt."""
        return self.category is None and self.outcome is None

    def where(self, prompt: str = "prompt_id") -> tuple[str, list[Any]]:
        """A condition in SQL that keeps the prompts of the filters, and its parameters; `prompt` is the column's name."""
        parts, params = ["TRUE"], []
        if self.category is not None:
            parts.append(f"{prompt} IN (SELECT prompt_id FROM prompts WHERE category = ?)")
            params.append(self.category)
        if self.outcome is not None:
            parts.append(f"{prompt} IN (SELECT prompt_id FROM outcomes WHERE condition = ? AND outcome = ?)")
            params += [self.condition, self.outcome]
        return " AND ".join(parts), params

    def where_chosen(self) -> tuple[str, list[Any]]:
        """The same for the chosen prompt and the pinned one; for those of the filters where none is chosen."""
        if self.prompt_id is None:
            return self.where()
        return "list_contains(?, prompt_id)", [[i for i in (self.prompt_id, self.pin) if i is not None]]

    def prompt_ids(self) -> list[str]:
        """Ids of the prompts that the filters keep, in order."""
        where, params = self.where()
        rows = queries.ask(self.paths, f"SELECT prompt_id FROM prompts WHERE {where} ORDER BY prompt_id", params)
        return list(rows["prompt_id"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return seed_of(self.manifest)


def conditions(paths: RunPaths) -> list[str]:
    """The run's conditions, baseline first."""
    if "contexts" not in queries.tables(paths):
        return []
    rows = queries.ask(paths, "SELECT DISTINCT condition FROM contexts ORDER BY condition <> 'baseline', condition")
    return list(rows["condition"])


def prompts(paths: RunPaths) -> pd.DataFrame:
    """prompt_id, category, question, target of every prompt, by id; no row in a run without prompts."""
    if "prompts" not in queries.tables(paths):
        return pd.DataFrame(columns=["prompt_id", "category", "question", "target"])
    return queries.ask(paths, "SELECT prompt_id, category, question, target FROM prompts ORDER BY prompt_id")


def token_texts(paths: RunPaths, token_ids: Sequence[int]) -> dict[int, str]:
    """The text of each of these ids; ids the run does not know are shown by number."""
    wanted = sorted(set(map(int, token_ids)))
    if "vocabulary" not in queries.tables(paths):
        return {n: f"[{n}]" for n in wanted}
    rows = queries.ask(paths, "SELECT token_id, text FROM vocabulary WHERE list_contains(?, token_id)", [wanted])
    return {n: f"[{n}]" for n in wanted} | dict(zip(rows["token_id"], rows["text"], strict=True))


def prompts_of_items(paths: RunPaths, items: Sequence[str | None]) -> pd.DataFrame:
    """prompt_id of each of these keys of items, None where one names no prompt of the run."""
    named = [item.split("|")[0] if isinstance(item, str) else None for item in items]
    if "prompts" not in queries.tables(paths):
        return pd.DataFrame({"prompt_id": [None] * len(named)}, dtype=object)
    wanted = sorted({name for name in named if name is not None})
    found = queries.ask(paths, "SELECT prompt_id FROM prompts WHERE list_contains(?, prompt_id)", [wanted])
    known = set(found["prompt_id"])
    return pd.DataFrame({"prompt_id": [name if name in known else None for name in named]}, dtype=object)
