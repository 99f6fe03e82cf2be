"""How two manifests differ, by the dotted name of each leaf, and which of that may change the last bits of a result.

Pure functions on what a manifest's JSON says; opens no file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from harness.errors import DamagedManifest

ABSENT = "(absent)"
"""Stands for the value of a key that one of two manifests does not have."""
_PARTS = (
    ("identity", "fingerprint_parts"), ("settings", "settings"), ("code", "code"), ("packages", "packages"),
    ("numerics", "numerics"), ("machine", "machine"),
)  # fmt: skip
_HARDWARE = ("cpu", "cpu_capability", "blas", "gpus", "torch", "cuda", "cudnn", "driver", "python", "device", "threads",
             "cublas_workspace_config")  # fmt: skip


class Difference(NamedTuple):
    """One key on which two fingerprints, or two manifests, differ; `ABSENT` where one does not have it."""

    key: str
    old: Any
    new: Any


def setting(manifest: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value that a setting had in a run, by its dotted name; `default` where its manifest does not say."""
    settings = manifest.get("settings")
    told = settings.get(name) if isinstance(settings, Mapping) else None
    return told.get("value", default) if isinstance(told, Mapping) else default


def own_setting(manifest: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """As `setting`, of the experiment's own section: a run that is older than these sections have names calls it `experiment`."""
    found = setting(manifest, f"{manifest.get('experiment')}.{name}", _NO)
    return setting(manifest, f"experiment.{name}", default) if found is _NO else found


_NO = object()


def seed_of(manifest: Mapping[str, Any]) -> int:
    """The run's seed: what is resampled again for a picture takes the draws that its stored numbers took."""
    seed = setting(manifest, "runtime.seed", 0)
    return seed if isinstance(seed, int) and seed >= 0 else 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every leaf on which two nested mappings differ, by dotted name."""
    a, b = (dict(_leaves(json.loads(json.dumps(tree, default=str)))) for tree in (old, new))  # as the manifest has them
    absent = object()
    return [
        Difference(k, a.get(k, ABSENT), b.get(k, ABSENT))
        for k in sorted({*a, *b})
        if a.get(k, absent) != b.get(k, absent)
    ]


def manifest_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Difference]]:
    """(part, difference) of every leaf on which two runs' manifests differ, what decides results first: `identity`,
    `settings` (values, whatever their source), `code`, `packages`, `numerics`, `machine`."""
    found = []
    for part, name in _PARTS:
        trees = [tree if isinstance(tree := m.get(name), Mapping) else {} for m in (old, new)]
        if part == "settings":
            trees = [
                {_today(k, m): v.get("value") for k, v in t.items() if isinstance(v, Mapping)}
                for t, m in zip(trees, (old, new), strict=True)
            ]
        if part == "machine":  # what of it was used
            used = [{n: m[n] for n in ("device", "threads") if n in m} for m in (old, new)]
            trees = [{**tree, **u} for tree, u in zip(trees, used, strict=True)]
        found += [(part, d) for d in differences(*trees) if d.key]
    return found


def _today(name: str, manifest: Mapping[str, Any]) -> str:
    """A recorded setting's name as it would be recorded today."""
    section, _, rest = name.partition(".")
    return f"{manifest.get('experiment')}.{rest}" if section == "experiment" else name


def bit_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Of code, versions and machine, what may change the last bits of a result where it differs."""
    return [
        d._replace(key=f"{part}.{d.key}")
        for part, d in manifest_differences(old, new)
        if part == "numerics"
        or (part, d.key) == ("code", "source_sha256")
        or (part == "machine" and d.key.split(".")[0] in _HARDWARE)
        or (part == "packages" and ABSENT not in (d.old, d.new))  # what only one side has, neither side used
    ]


def environment_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Everything that may change the last bits of a result: `bit_differences`, also between a run and those who went on
    with it, and how the items were cut into batches. Empty: the bits must agree."""
    resumed = [
        Difference(f"resumed.{change['key']}", change["old"], change["new"])
        for manifest in (one, other)
        for resume in manifest.get("resumed") or ()
        for change in resume.get("bit_differences") or ()
    ]
    plans = [
        {name: {"sizes": told.get("sizes") or [], "retried": told.get("retried") or 0} for name, told in stages.items()}
        for stages in (one.get("stages") or {}, other.get("stages") or {})
    ]
    shared = plans[0].keys() & plans[1].keys()
    batches = differences(*({name: plan[name] for name in shared} for plan in plans))
    return [*bit_differences(one, other), *resumed, *(d._replace(key=f"stages.{d.key}") for d in batches)]


def told(changes: Sequence[Difference], most: int = 300) -> str:
    """One line that names each, its values cut to `most` characters."""
    return "; ".join(f"{d.key}: was {shortened(d.old, most)}, is {shortened(d.new, most)}" for d in changes)


def shortened(value: Any, most: int = 80) -> str:
    """A manifest's value as text that fits a line."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(v, Mapping) for v in tree):
        names = [value.get("name", i) if isinstance(value, Mapping) else i for i, value in enumerate(tree)]
        if len(set(map(str, names))) < len(names):  # two GPUs of one name are two
            names = list(range(len(tree)))
        for name, value in zip(names, tree, strict=True):
            yield from _leaves(value, f"{prefix}.{name}")
    else:
        yield prefix, tree


# -- what a manifest is: it may come from a stranger, or a hand may have been in it

_Count = Annotated[int, Field(ge=0)]


class _Setting(BaseModel):
    value: Any


class _StagePart(BaseModel):
    name: str


class _Parts(BaseModel):
    stages: list[_StagePart] = []


class _StageReport(BaseModel):
    sizes: list[Annotated[int, Field(ge=1)]] | None = None
    retried: _Count | None = None


class _Prompts(BaseModel):
    path: str | None = None
    row_hashes: dict[str, str] | None = None
    rejected: dict[str, _Count] | None = None


class _Model(BaseModel):
    name: str | None = None
    revision: str | None = None
    dtype: str | None = None


class _Change(BaseModel):
    key: str
    old: Any
    new: Any


class _Resume(BaseModel):
    bit_differences: list[_Change] | None = None


class _Measurement(BaseModel):
    measurement: str
    ok: bool | None


class _Shape(BaseModel):
    """What is read of a manifest, anywhere; the rest of it is its own affair."""

    run_id: Annotated[str, Field(min_length=1, max_length=255)]
    fingerprint: str
    experiment: str | None = None
    parent: str | None = None
    status: str | None = None
    reason: str | None = None
    created: str | None = None
    heartbeat: str | None = None
    ended: str | None = None
    device: str | None = None
    planted: bool | None = None
    argv: list[str] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    num_failed: _Count | None = None
    warnings: dict[str, _Count] | None = None
    settings: dict[str, _Setting] | None = None
    fingerprint_parts: _Parts | None = None
    stages: dict[str, _StageReport] | None = None
    recorded_sizes: dict[str, list[Annotated[int, Field(ge=1)]]] | None = None
    resumed: list[_Resume] | None = None
    accepted_differences: list[_Change] | None = None
    prompts: _Prompts | None = None
    code: dict[str, Any] | None = None
    packages: dict[str, Any] | None = None
    numerics: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    model: _Model | None = None
    tables: dict[str, _Count] | None = None
    table_sha256: dict[str, str] | None = None
    sanity: list[_Measurement] | None = None


def check_shape(manifest: Mapping[str, Any]) -> None:
    """Raises DamagedManifest where a part that is read somewhere is not of the kind that a manifest has."""
    try:
        _Shape.model_validate(manifest, strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedManifest(
            f"the manifest of {shortened(manifest.get('run_id'))} is damaged: {shortened(where)}: {first['msg'].lower()}"
        ) from e
