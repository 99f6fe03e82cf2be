"""The settings of logit-diff amplification: the section `[lda]`."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from harness.settings import ExperimentSettings, Names, Section, shortened, words_of

FORMATS = ("raw", "chat", "alpaca")
PLACE = "{prompt}"


def _named(detectors: dict[str, Any]) -> dict[str, Any]:
    """Names of detectors go into keys, tables and figures: a bar would make two keys one."""
    for name in detectors:
        if not re.fullmatch(r"[\w.][\w. -]{0,63}", name):
            raise ValueError(
                "expected names of detectors of at most 64 letters, digits, spaces and . _ -, "
                f"found the name {shortened(name)}"
            )
    return detectors


def _arms(alphas: tuple[float, ...]) -> tuple[float, ...]:
    """By size, so that the order of arms is the same whoever asks."""
    if not alphas:
        raise ValueError("expected at least one arm, found none")
    plain = [a + 0.0 for a in alphas]  # −0 is 0
    for n, alpha in enumerate(plain):
        if not math.isfinite(alpha) or abs(alpha) > _MOST_ALPHA:
            raise ValueError(f"expected arms between −{_MOST_ALPHA:g} and {_MOST_ALPHA:g}, found {alpha:g}")
        if alpha in plain[:n]:
            raise ValueError(f"expected each arm once, found {alpha:g} twice")
    return tuple(sorted(plain))


_MOST_ALPHA = 1e6
"""Where the float32 numbers of both models leave nothing of each other."""


def _format(value: str) -> str:
    if value not in FORMATS and value.count(PLACE) != 1:
        raise ValueError(f"expected {', '.join(FORMATS)}, or a template of your own with {PLACE} in it once")
    return value


class DetectorSettings(Section):
    """A rule on a completion's text: what must be in it. Exactly one of `any_of` and `regex`."""

    any_of: Names = ()
    """Literal phrases, whatever the case; one of them is enough."""
    regex: str | None = None
    """A regular expression in RE2's syntax, which takes linear time; `(?i)` in front for any case."""
    word: bool = False
    """What is found must stand between signs that are neither letters nor digits, or at the ends."""
    at_start: Names = ()
    """Phrases whose exact probability to begin a completion is computed, without sampling; case as written."""

    @model_validator(mode="after")
    def _is_one_rule(self) -> "DetectorSettings":
        if bool(self.any_of) == (self.regex is not None):
            found = "both" if self.any_of else "neither"
            raise ValueError(f"expected any_of (phrases) or regex (a pattern), found {found}")
        if any(not phrase.strip() for phrase in (*self.any_of, *self.at_start)) or self.regex == "":
            raise ValueError("expected phrases and patterns that are not empty")
        return self


class LdaSettings(ExperimentSettings):
    """What is measured: arms, sampling, what is looked for in completions."""

    ALIASES: ClassVar[Mapping[str, str]] = {"MODEL_AFTER_ID": "model.name", "MODEL_BEFORE_ID": "other.name"}
    alphas: Annotated[tuple[float, ...], BeforeValidator(words_of), AfterValidator(_arms)] = (-1.0, 0.0, 1.0, 2.0)
    """The arms: how much of the difference after − before is added. 0 is the model after, −1 the one before."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Tokens less probable than this share of the most probable one, by the model after, cannot appear; 0 is off."""
    temperature: Annotated[float, Field(ge=0, le=1e4)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 150
    num_samples: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Completions a prompt and arm."""
    stop_at_eos: bool = True
    """Off goes on to `max_new_tokens` whatever the models say; what stands behind the end of text is never judged."""
    format: Annotated[str, AfterValidator(_format)] = "raw"
    """`raw`, `chat` (the model's own template), `alpaca`, or a template with {prompt}, and {system} where wanted."""
    system_prompt: str = ""
    """For formats that have a place for it."""
    detectors: Annotated[dict[str, DetectorSettings], BeforeValidator(words_of), AfterValidator(_named)] = Field(
        default_factory=dict
    )
    """What is looked for in completions, by name."""
    min_chars: Annotated[int, Field(ge=0)] = 0
    """Prompts of fewer characters are left out."""
    max_chars: Annotated[int, Field(ge=1)] | None = None
    """Prompts of more characters are left out."""
    natural_rate: Literal["auto", "required", "off"] = "auto"
    """The rate at α = 0, reweighted from all arms. `auto`: wherever nothing is cut off; `required`: else an error."""
    common_noise: bool = True
    """The same sample has the same noise in every arm: contrasts are tighter, pooled estimates wider."""
    keep_logits: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Of the first sample of every prompt and arm, keep this many most probable tokens of both models a step; 0: none."""
    server: str = ""
    """Address of a `harness serve lda` of the same pair that makes the rollouts; empty: they are made here."""
    server_batch: Annotated[int, Field(ge=1, le=4096)] = 8
    """Prompts in one request to such a server, and in one decoder here."""

    @model_validator(mode="after")
    def _natural_where_nothing_is_cut(self) -> "LdaSettings":
        if self.natural_rate == "required" and (why := self.cut):
            raise ValueError(f"natural_rate: it cannot be had with {why}: what is cut off is in no rollout")
        return self

    @property
    def cut(self) -> str:
        """Which setting keeps tokens from being drawn as an arm has them; empty where none does."""
        if self.temperature != 1:
            return f"temperature {self.temperature:g} (1 is needed)"
        if self.top_p != 1:
            return f"top_p {self.top_p:g} (1 is needed)"
        return f"floor {self.floor:g} (0 is needed)" if self.floor else ""
