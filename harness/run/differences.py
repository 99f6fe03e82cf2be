"""How two manifests differ, by the dotted name of each leaf, and which of that may change the last bits of a result.

Pure functions on trees of JSON, as a manifest keeps its own whole (`Manifest.tree`); opens no file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ABSENT = "(absent)"
"""Stands for the value of a key that one of two manifests does not have."""
_PARTS = (
    ("identity", "fingerprint_parts"),
    ("settings", "settings"),
    ("code", "code"),
    ("packages", "packages"),
    ("numerics", "numerics"),
    ("machine", "machine"),
)
_HARDWARE = (
    "cpu",
    "cpu_capability",
    "blas",
    "gpus",
    "torch",
    "cuda",
    "cudnn",
    "driver",
    "python",
    "device",
    "threads",
    "cublas_workspace_config",
)


class Difference(NamedTuple):
    """One key on which two fingerprints, or two manifests, differ; `ABSENT` where one does not have it."""

    key: str
    old: Any
    new: Any


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
