"""What a run of amplification is made of: prompts, two models that go together, detectors; checked before anything is
computed."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.engine import Tables
from harness.engine.estimate import spread
from harness.errors import SettingsError
from harness.experiments.experiment import Prepared
from harness.experiments.lda import formats
from harness.experiments.lda.prompts import Prompt, PromptSet, read_prompts
from harness.experiments.lda.settings import LdaSettings
from harness.experiments.weights import Models
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.pairing import Pairing, pair_up
from harness.models.rollout import Pair, Rule
from harness.settings import BUNDLED_MODELS, BUNDLED_PROMPTS, Resolved, Settings
from harness.text.detectors import BadPattern, Detector
from harness.text.phrases import Beginnings, beginnings
from harness.text.prompts import take
from harness.text.records import rejections_told

CONDITION = "lda"
"""Of the context that all arms of a prompt go on from."""
MODE = "sample"
_BUNDLED = 100
"""Prompts of the bundled set that a run takes."""


@dataclass(frozen=True)
class Both:
    """The two models: what to load, and what was found."""

    after: ModelSpec
    of_after: ModelIdentity
    before: ModelSpec
    of_before: ModelIdentity

    @property
    def codec(self) -> Codec:
        """The tokenizer, that of the model after: the ids mean the same in the other."""
        return load_codec(self.after, self.of_after)

    @property
    def pairing(self) -> Pairing:
        """How they go together. Raises NoPair."""
        return _paired(self)

    def loaded(self, *, after: bool = True, before: bool = True) -> Pair:
        """Those of them that are asked for, kept for the stages of one process."""
        return Pair(
            shared(self.after, self.of_after) if after else None,
            shared(self.before, self.of_before) if before else None,
            self.pairing.num_common,
        )

    def for_arms(self, alphas: tuple[float, ...], rule: Rule) -> Pair:
        """The models that these arms need; the floor is what the model after finds plausible."""
        return self.loaded(after=alphas != (-1.0,) or rule.floor > 0, before=alphas != (0.0,))


@lru_cache(maxsize=4)
def _paired(both: Both) -> Pairing:
    before = load_codec(both.before, both.of_before)
    return pair_up(both.codec, before, both.of_after, both.of_before)


@dataclass(frozen=True)
class Inputs:
    """What stages are built from."""

    prompts: tuple[Prompt, ...]
    both: Both
    settings: LdaSettings
    detectors: Mapping[str, Detector]
    stages: tuple[str, ...]
    seed: int

    @property
    def arms(self) -> dict[str, float]:
        """α by the name of its condition, the smallest first."""
        return {arm_name(alpha): alpha for alpha in self.settings.alphas}

    @property
    def rule(self) -> Rule:
        """How tokens are drawn."""
        own = self.settings
        return Rule(own.temperature, own.top_p, own.floor, own.stop_at_eos)

    @property
    def phrases(self) -> dict[str, tuple[str, ...]]:
        """By detector the phrases whose exact rate is asked for."""
        return {name: d.at_start for name, d in self.settings.detectors.items() if d.at_start}


def arm_name(alpha: float) -> str:
    """The condition of an arm."""
    return f"alpha={int(alpha) if alpha.is_integer() else alpha!r}"


def item_key(*parts: object) -> str:
    """An item's content key."""
    return "|".join(map(str, parts))


def prepare(resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
    """Check all input: prompts, pair, format, detectors. Loads no weights."""
    settings, own = resolved.settings, resolved.own(LdaSettings)
    detectors = {name: _detector(name, own) for name in own.detectors}
    prompt_set = read_prompts(prompts_path(settings), own.min_chars, own.max_chars)
    chosen = take(prompt_set.prompts, settings.data.prompts_of(_BUNDLED))
    both = both_of(models)
    pairing = both.pairing
    formats.check(own.format, own.system_prompt, both.codec)
    for name, detector in own.detectors.items():
        for phrase in detector.at_start:
            _beginnings_of(name, phrase, both.codec)
    given = Inputs(chosen, both, own, detectors, stages, settings.runtime.seed)

    def some(number: int, names: tuple[str, ...]) -> Inputs:
        return replace(given, prompts=tuple(spread(chosen, number, lambda p: len(p.text))), stages=names)

    return Prepared(
        given,
        parts={"prompts": {"sha256": _hash_of(sorted(p.row_hash for p in chosen)), "number": len(chosen)}},
        num_subjects=len(chosen),
        about=f"{len(chosen)} prompts × {len(own.alphas)} arms (α = {', '.join(f'{a:g}' for a in own.alphas)}) × "
        f"{own.num_samples} samples, {len(detectors)} detectors; {pairing.num_common:,} ids in common",
        facts={
            "planted": settings.model.name in BUNDLED_MODELS and settings.other.name in BUNDLED_MODELS,
            "prompts": {
                "path": str(prompt_set.path),
                "sha256": prompt_set.sha256,
                "read": len(prompt_set.prompts),
                "used": len(chosen),
                "rejected": dict(Counter(r.rule for r in prompt_set.rejections)),
                "row_hashes": {p.prompt_id: p.row_hash for p in chosen},
            },
            "pair": {"sha256": pairing.sha256(), "num_common": pairing.num_common, "warning": pairing.warning},
        },
        some=some,
        num_contexts=len(chosen),
        warnings=tuple(_warnings(own, pairing, prompt_set)),
        events=tuple(("rejected_prompt", f"row {r.row}: {r.rule}: {r.detail}") for r in prompt_set.rejections),
    )


def both_of(models: Models) -> Both:
    """The two models of a command's settings. Raises SettingsError where the second is not named."""
    if models.other_spec is None or models.other_identity is None:
        raise SettingsError("experiment lda compares two models: name the one before with --other")
    return Both(models.spec, models.identity, models.other_spec, models.other_identity)


def prompts_path(settings: Settings) -> Path:
    """The prompt file of these settings; that of the bundled pair where none is named."""
    if settings.data.prompts == BUNDLED_PROMPTS:
        return settings.paths.data_folder / "models" / "lda" / "planted.jsonl"
    return Path(settings.data.prompts)


@lru_cache(maxsize=256)
def beginnings_of(codec: Codec, phrase: str) -> Beginnings:
    """The ways to begin with a phrase; each phrase is asked for with every prompt. Raises ValueError."""
    return beginnings(phrase, codec)


def contexts_of(tables: Tables, prompt_ids: list[str]) -> dict[str, tuple[int, ...]]:
    """The token ids of these prompts' contexts."""
    keys = [{"prompt_id": prompt_id, "condition": CONDITION} for prompt_id in dict.fromkeys(prompt_ids)]
    return {
        row["prompt_id"]: tuple(row["token_ids"])
        for row in tables.rows_with("contexts", keys, ("prompt_id", "condition", "token_ids"))
    }


def _detector(name: str, own: LdaSettings) -> Detector:
    given = own.detectors[name]
    try:
        return Detector.of(given.any_of, given.regex, word=given.word)
    except BadPattern as e:
        raise SettingsError(f"lda.detectors.{name}: {e}; RE2's syntax is at github.com/google/re2/wiki/Syntax") from e


def _beginnings_of(name: str, phrase: str, codec: Codec) -> None:
    try:
        beginnings_of(codec, phrase)
    except ValueError as e:
        raise SettingsError(f"lda.detectors.{name}.at_start: {e}") from e


def _warnings(own: LdaSettings, pairing: Pairing, prompt_set: PromptSet) -> list[str]:
    told = [f"the pair: {pairing.warning}"] if pairing.warning else []
    if not own.detectors:
        told.append(
            "no detector is named ([lda.detectors.NAME] any_of = [...]): completions are made, and none is judged"
        )
    if own.detectors and own.natural_rate == "auto" and own.cut:
        told.append(f"no natural rate can be given with {own.cut}: what is cut off is in no rollout")
    return told + rejections_told(prompt_set.path, prompt_set.rejections)


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def detector_params(own: LdaSettings) -> dict[str, Any]:
    """What decides verdicts, for the fingerprint."""
    return {name: d.model_dump(mode="json", exclude={"at_start"}) for name, d in own.detectors.items()}
