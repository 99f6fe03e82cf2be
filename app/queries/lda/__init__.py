"""What pages of amplification ask: each page's questions in the module of its name; here the filters they share, with
their SQL, and what several of them ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from app import queries
from app.selection import Selection
from harness.experiments.lda.schema import NATURAL as NATURAL
from harness.run import Manifest, RunPaths, own_setting

EXAMPLES: dict[str, str] = {
    "Rates": (
        "SELECT detector, alpha, sum(num_hits) AS hits, sum(num_rollouts) AS rollouts, avg(rate) AS rate\n"
        "FROM hit_rates JOIN arms USING (condition)\nGROUP BY ALL\nORDER BY ALL"
    ),
    "Hits": (
        "SELECT h.detector, h.condition, h.prompt_id, h.sample_id, h.first_step, h.text AS found, c.answer\n"
        "FROM hits h JOIN completions c USING (prompt_id, condition, mode, sample_id)\n"
        "WHERE h.is_hit\nORDER BY ALL"
    ),
    "Prompts": (
        "-- where amplification shows most\n"
        "SELECT h.detector, p.question, a.alpha, h.rate\n"
        "FROM hit_rates h JOIN prompts p USING (prompt_id) JOIN arms a USING (condition)\n"
        "ORDER BY h.rate DESC, h.detector, h.prompt_id, a.alpha\nLIMIT 50"
    ),
    "Exact": (
        "-- the probability that an answer begins with a detector's phrase, by arm\n"
        "SELECT detector, alpha, avg(exp(logp)) AS exact\n"
        "FROM exact_rates JOIN arms USING (condition)\nGROUP BY ALL\nORDER BY ALL"
    ),
    "Raised tokens": (
        "SELECT v.text, d.place, d.mean, d.sd, d.share_positive, d.n\n"
        "FROM token_diffs d JOIN vocabulary v USING (token_id)\nORDER BY d.mean DESC\nLIMIT 50"
    ),
    "Branches": (
        "-- at which token rollouts part from those at α = 0\n"
        "SELECT condition, branch_step, count(*) AS rollouts\nFROM rollout_summaries\nGROUP BY ALL\nORDER BY ALL"
    ),
}
"""Questions that the page SQL offers, by title."""


class Arm(NamedTuple):
    """One value of α."""

    condition: str
    alpha: float

    @property
    def label(self) -> str:
        """α as the arm's name has it, so that two arms never have one label."""
        return self.condition.partition("=")[2] or self.condition


@dataclass(frozen=True)
class View(Selection):
    """What is looked at: a run, and the filters that all pages share. `category` is None for all; `detector` and
    `prompt_id` are the chosen ones, None where there is none."""

    arms: tuple[Arm, ...]
    """The smallest α first."""
    detectors: tuple[str, ...]
    detector: str | None
    category: str | None
    prompt_id: str | None

    def where(self, prompt: str = "prompt_id") -> tuple[str, list[Any]]:
        """A condition in SQL that keeps the prompts of the filters, and its parameters; `prompt` is the column's name."""
        if self.category is None:
            return "TRUE", []
        return f"{prompt} IN (SELECT prompt_id FROM prompts WHERE category = ?)", [self.category]

    def alpha_of(self, condition: str) -> float:
        """α of an arm, by its name."""
        return next(arm.alpha for arm in self.arms if arm.condition == condition)

    @property
    def is_noise_common(self) -> bool:
        """Whether the same sample has the same noise in every arm: only then rollouts can be held against each other."""
        return own_setting(self.manifest, "common_noise", True) is not False


def arms(paths: RunPaths) -> tuple[Arm, ...]:
    """The run's arms, the smallest α first."""
    if "arms" not in queries.tables(paths):
        return ()
    rows = queries.ask(paths, "SELECT condition, alpha FROM arms ORDER BY alpha")
    return tuple(Arm(str(c), float(a)) for c, a in zip(rows["condition"], rows["alpha"], strict=True))


def detectors(paths: RunPaths, manifest: Manifest) -> tuple[str, ...]:
    """Every detector that the run was asked for, in that order, and those that it has rows of besides."""
    asked = own_setting(manifest, "detectors", {})
    found: set[str] = set()
    for table in ("hits", "exact_rates"):
        if table in queries.tables(paths):
            found |= set(map(str, queries.ask(paths, f"SELECT DISTINCT detector FROM {table}")["detector"]))
    return tuple(dict.fromkeys([*(asked if isinstance(asked, dict) else ()), *sorted(found)]))


def prompts(paths: RunPaths) -> pd.DataFrame:
    """prompt_id, category, question of every prompt, by id; no row in a run without prompts."""
    if "prompts" not in queries.tables(paths):
        return pd.DataFrame(columns=["prompt_id", "category", "question"])
    return queries.ask(paths, "SELECT prompt_id, category, question FROM prompts ORDER BY prompt_id")


def prompts_of_items(paths: RunPaths, items: Sequence[str | None]) -> pd.DataFrame:
    """prompt_id of each of these keys of items, None where one names no prompt of the run."""
    known = set(prompts(paths)["prompt_id"])
    named = [item.split("|")[0] if isinstance(item, str) else None for item in items]
    return pd.DataFrame({"prompt_id": [name if name in known else None for name in named]}, dtype=object)
