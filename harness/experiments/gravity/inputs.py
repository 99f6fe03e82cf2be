"""What a run of semantic gravity is made of: prompts, conditions and a model, checked before anything is computed."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.engine import Tables
from harness.engine.estimate import spread
from harness.errors import SettingsError, nearest
from harness.experiments.experiment import Prepared
from harness.experiments.gravity.conditions import BUILT_IN, Template
from harness.experiments.gravity.settings import GravitySettings, TemplateSettings
from harness.experiments.weights import Models
from harness.models.load import ModelIdentity, ModelSpec, load_codec
from harness.settings import BUNDLED_PROMPTS, DEMO_MODEL, PLANTED_MODELS, Resolved, Settings
from harness.text.prompts import Prompt, read_prompts, take
from harness.text.records import rejections_told


@dataclass(frozen=True)
class Inputs:
    """Prompts, conditions and model of an experiment, and its settings: what stages are built from."""

    prompts: tuple[Prompt, ...]
    conditions: Mapping[str, Template]
    model: ModelSpec
    identity: ModelIdentity
    settings: GravitySettings
    stages: tuple[str, ...]
    seed: int


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


def prepare(resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
    """Check all input: conditions, prompts, model. Loads no weights."""
    settings, own = resolved.settings, resolved.own(GravitySettings)
    conditions = conditions_of(own)
    for name in own.sample_conditions:
        if name not in conditions:
            raise SettingsError(
                f"gravity.sample_conditions: no condition {name!r} in this run{nearest(name, list(conditions))}"
            )
    _check_patched(resolved, own, conditions)
    prompt_set = read_prompts(prompts_path(settings))
    chosen = take(prompt_set.prompts, settings.data.num_prompts)
    spec, identity = models.spec, models.identity
    if own.chat:
        load_codec(spec, identity).chat("")  # refused here rather than once for every item
    given = Inputs(chosen, conditions, spec, identity, own, stages, settings.runtime.seed)

    def some(number: int, names: tuple[str, ...]) -> Inputs:
        return replace(given, prompts=tuple(spread(chosen, number, lambda p: len(p.question))), stages=names)

    return Prepared(
        given,
        parts={
            "prompts": {"sha256": _hash_of(sorted(p.row_hash for p in chosen)), "number": len(chosen)},
            "conditions": {name: asdict(t) for name, t in conditions.items()},
        },
        num_subjects=len(chosen),
        about=f"{len(chosen)} prompts × {len(conditions)} conditions ({', '.join(conditions)})",
        facts={
            "planted": settings.model.name in (DEMO_MODEL, *PLANTED_MODELS),
            "prompts": {
                "path": str(prompt_set.path),
                "sha256": prompt_set.sha256,
                "read": len(prompt_set.prompts),
                "used": len(chosen),
                "rejected": dict(Counter(r.rule for r in prompt_set.rejections)),
                "row_hashes": {p.prompt_id: p.row_hash for p in chosen},
            },
        },
        some=some,
        num_contexts=len(chosen) * len(conditions),
        warnings=tuple(rejections_told(prompt_set.path, prompt_set.rejections)),
        events=tuple(("rejected_prompt", f"row {r.row}: {r.rule}: {r.detail}") for r in prompt_set.rejections),
    )


def conditions_of(own: GravitySettings) -> dict[str, Template]:
    """The conditions of this run by name, checked. Own templates stand beside the built-in ones and may replace them."""
    templates = {name: _template(t) for name, t in own.templates.items()}
    wanted = own.conditions
    if isinstance(wanted, dict):
        known = {**BUILT_IN, **templates, **{name: _template(t) for name, t in wanted.items()}}
        names = list(known)
    else:
        known, names = {**BUILT_IN, **templates}, list(dict.fromkeys(wanted))
    if not names:
        raise SettingsError("gravity.conditions: expected at least one condition, found none")
    for name in names:
        if name not in known:
            raise SettingsError(
                f"gravity.conditions: no condition {name!r}{nearest(name, list(known))}; there are {', '.join(known)}; "
                "write your own under [gravity.templates]"
            )
        known[name].check(name)
    return {name: known[name] for name in names}


def prompts_path(settings: Settings) -> Path:
    """The prompt file of these settings; the bundled one where none is named."""
    if settings.data.prompts == BUNDLED_PROMPTS:
        return settings.paths.data_folder / "prompts" / "gravity.jsonl"
    return Path(settings.data.prompts)


def _template(given: TemplateSettings) -> Template:
    return Template(given.text, given.instruction, given.negation)


def _check_patched(resolved: Resolved, own: GravitySettings, conditions: Mapping[str, Template]) -> None:
    """A condition to patch that was asked for must be there; where the default one is not, nothing is patched."""
    name, setting = own.patching.condition, "gravity.patching.condition"
    others = [c for c in conditions if c != "baseline"]
    if setting in resolved.sources and name not in others:
        raise SettingsError(
            f"{setting}: expected a condition of this run other than baseline ({', '.join(others) or 'there is none'}), "
            f"found {name!r}{nearest(name, others)}"
        )


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def contexts_of(tables: Tables, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, ...]]:
    """The token ids of contexts, by prompt and condition."""
    keys = [{"prompt_id": prompt_id, "condition": condition} for prompt_id, condition in dict.fromkeys(wanted)]
    rows = tables.rows_with("contexts", keys, ("prompt_id", "condition", "token_ids"))
    return {(row["prompt_id"], row["condition"]): tuple(row["token_ids"]) for row in rows}
