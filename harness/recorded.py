"""A recorded run made ready to be measured again: the settings it had, and what of it is not as it was."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from harness import environment
from harness.errors import HarnessError, RunError
from harness.launch import Plan, prepare
from harness.manifests import Difference, differences
from harness.settings import Resolved

_LOCAL = "paths."
"""Settings that say where things are on the machine that ran it."""


class _Setting(BaseModel):
    value: Any


class _StagePart(BaseModel):
    name: str


class _Parts(BaseModel):
    stages: list[_StagePart] = []


class _StageReport(BaseModel):
    sizes: list[int] | None = None


class _Prompts(BaseModel):
    row_hashes: dict[str, str] | None = None


class _Shape(BaseModel):
    """What is read here and in what rests on this; the rest of a manifest is its own affair."""

    settings: dict[str, _Setting] | None = None
    fingerprint_parts: _Parts | None = None
    stages: dict[str, _StageReport] | None = None
    prompts: _Prompts | None = None
    code: dict[str, Any] | None = None
    packages: dict[str, Any] | None = None
    numerics: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    tables: dict[str, int] | None = None
    table_sha256: dict[str, str] | None = None


def check_shape(manifest: Mapping[str, Any]) -> None:
    """Raises RunError where a part that is read here is not of the kind that a manifest has: a hand may have been in it."""
    try:
        _Shape.model_validate(manifest)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"the manifest of {manifest['run_id']} is damaged: {where}: {first['msg'].lower()}") from e


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recorded run by dotted name: its commit for the branch it named, and the threads it really had."""
    check_shape(manifest)
    recorded = manifest.get("settings")
    if not recorded:
        raise RunError(f"the manifest of {manifest['run_id']} has no settings: it cannot be measured again from it")
    values = {name: told["value"] for name, told in recorded.items() if not name.startswith(_LOCAL)}
    if manifest.get("device") == "cpu" and manifest.get("threads"):
        values["runtime.threads"] = manifest["threads"]
    revision = (manifest.get("model") or {}).get("revision")
    if revision not in (None, "local", "random"):
        values["model.revision"] = revision
    return values


def prepare_again(manifest: Mapping[str, Any], resolved: Resolved) -> tuple[Plan, list[Difference]]:
    """The plan of a recorded run, from settings that rest on `settings_of`, and what is not as it was: model, data or code.

    Raises HarnessError where something is not there at all.
    """
    try:
        plan = prepare(resolved, str(manifest.get("experiment") or "gravity"))
    except HarnessError as e:
        raise type(e)(f"run {manifest['run_id']} cannot be measured again here: {e}") from e
    return plan, [*_differences_of_parts(manifest, plan), *_difference_of_code(manifest)]


def _differences_of_parts(manifest: Mapping[str, Any], plan: Plan) -> list[Difference]:
    found = []
    for change in differences(manifest.get("fingerprint_parts") or {}, plan.parts):
        if change.key == "prompts.sha256":
            found.append(Difference("data (prompts.sha256)", change.old, f"{change.new}{_rows_told(manifest, plan)}"))
        else:
            found.append(change)
    return found


def _rows_told(manifest: Mapping[str, Any], plan: Plan) -> str:
    was: Mapping[str, str] = (manifest.get("prompts") or {}).get("row_hashes") or {}
    now = {p.prompt_id: p.row_hash for p in plan.inputs.prompts}
    groups = {
        "changed": [i for i in was.keys() & now.keys() if was[i] != now[i]],
        "missing": list(was.keys() - now.keys()),
        "new": list(now.keys() - was.keys()),
    }
    counted = [f"{len(ids)} {how}, such as {min(ids)}" for how, ids in groups.items() if ids]
    return f" (prompts: {', '.join(counted)})" if was and counted else ""


def _difference_of_code(manifest: Mapping[str, Any]) -> list[Difference]:
    was, now = manifest.get("code") or {}, environment.code()
    if was.get("source_sha256") == now["source_sha256"]:
        return []
    return [Difference("code", _code_told(was), _code_told(now))]


def _code_told(code: Mapping[str, Any]) -> str:
    commit = str(code.get("git_commit") or "unknown")[:12]
    dirty = " with uncommitted changes" if code.get("git_dirty") else ""
    return f"commit {commit}{dirty}, sources {str(code.get('source_sha256') or 'not recorded')[:12]}"
