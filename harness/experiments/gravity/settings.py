"""The settings of semantic gravity: the section `[gravity]`."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from harness.settings import ExperimentSettings, Names, Section, shortened, words_of


def _named(templates: Any) -> Any:
    """Names of conditions go into keys, tables and figures: a bar would make two keys one."""
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w.][\w. -]{0,63}", name):
            raise ValueError(
                "expected names of conditions of at most 64 letters, digits, spaces and . _ -, "
                f"found the name {shortened(name)}"
            )
    return templates


class TemplateSettings(Section):
    """One condition's template."""

    text: str
    """The whole prompt, with {question} once and {target}, {category}, {style} where wanted."""
    instruction: str | None = None
    """The words of the template that instruct, where that is not all before the question's line."""
    negation: str | None = None
    """The words that forbid, where they are not found by themselves ("Do not use")."""


def _condition(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


Condition = Annotated[TemplateSettings, BeforeValidator(_condition)]


class SelectSettings(Section):
    """The rules of the optional stage `select`."""

    min_p0: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Lowest P0 of a selected prompt."""
    per_bin: Annotated[int, Field(ge=1)] = 100
    """Most prompts from one category in one of the bins [0,.2) [.2,.4) [.4,.6) [.6,.8) [.8,1]."""
    max_categories: Annotated[int, Field(ge=1)] = 2
    """Most categories in which one target may be selected."""


class StoredSettings(Section):
    """The prompts whose whole attention rows and residual streams are kept as files."""

    prompts: Names = ()
    """Their ids. Empty: chosen by outcome, see `max_per_category`."""
    max_per_category: Annotated[int, Field(ge=0)] = 20
    """Most prompts of a category whose greedy answer fails under some condition; as many that succeed are kept beside
    them. 0 keeps none."""


class PatchingSettings(Section):
    """The subset of prompts that activation patching takes, and between which conditions."""

    condition: str = "negative"
    """The condition that is patched with what `baseline` shows."""
    min_p0: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lowest P0 of the subset; unset computes it from the run's own P0 (its third quartile, kept within .7 and .95)."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """Most prompts of either outcome; unset takes all successes and as many failures."""


class GravitySettings(ExperimentSettings):
    """What is measured: conditions, stages, sampling."""

    conditions: Annotated[tuple[str, ...] | dict[str, Condition], BeforeValidator(words_of), AfterValidator(_named)] = (
        "baseline",
        "negative",
    )
    """Names of conditions to run, or a table of own templates, which are run beside the two built in."""
    templates: Annotated[dict[str, Condition], BeforeValidator(words_of), AfterValidator(_named)] = Field(
        default_factory=dict
    )
    """Own templates by name, for `conditions` to name."""
    chat: bool = False
    """Wrap every prompt in the model's chat template instead of completing raw text."""
    num_samples: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Sampled completions a prompt and condition."""
    sample_conditions: Names = ()
    """Conditions to sample under. Empty: all of `conditions`."""
    temperature: Annotated[float, Field(ge=1e-4, le=1e4)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""
    max_new_tokens_greedy: Annotated[int, Field(ge=1, le=100_000)] = 8
    max_new_tokens_samples: Annotated[int, Field(ge=1, le=100_000)] = 10
    stop_at_newline: bool = True
    """Off lets the model run on past its answer, as the paper did."""
    select: SelectSettings = SelectSettings()
    stored: StoredSettings = StoredSettings()
    patching: PatchingSettings = PatchingSettings()
