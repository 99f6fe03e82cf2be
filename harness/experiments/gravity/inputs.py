"""What stages are built from: one frozen bundle, made once by the launcher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.engine import Tables
from harness.experiments.gravity.conditions import Template
from harness.models.load import ModelIdentity, ModelSpec
from harness.settings import ExperimentSettings
from harness.text.prompts import Prompt


@dataclass(frozen=True)
class Inputs:
    """Prompts, conditions and model of an experiment, and its settings."""

    prompts: tuple[Prompt, ...]
    conditions: Mapping[str, Template]
    model: ModelSpec
    identity: ModelIdentity
    experiment: ExperimentSettings
    stages: tuple[str, ...]
    seed: int
    data_folder: Path
    budget_s: float | None = None
    """Seconds that the certificate may take, where the run's own length is known beforehand; decides no result."""


@dataclass(frozen=True)
class Admitted:
    """Which prompts go on to a stage: the optional filters that are part of this run."""

    single_token: bool
    selected: bool

    def __call__(self, prompt: Mapping[str, Any]) -> bool:
        """`prompt` is a row of the table `prompts`."""
        return (not self.single_token or bool(prompt["single_token"])) and (
            not self.selected or prompt["tier"] is not None
        )


def item_key(*parts: object) -> str:
    """An item's content key."""
    return "|".join(map(str, parts))


def contexts_of(tables: Tables, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The token ids of contexts, by prompt and condition."""
    keys = [{"prompt_id": prompt_id, "condition": condition} for prompt_id, condition in dict.fromkeys(wanted)]
    rows = tables.rows_with("contexts", keys, ("prompt_id", "condition", "token_ids"))
    return {(row["prompt_id"], row["condition"]): tuple(row["token_ids"]) for row in rows}
