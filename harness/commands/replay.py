"""A recorded run made ready to be measured again: the settings it had, and what of it is not as it was."""

import os
from pathlib import Path
from typing import Any

from harness import environment
from harness.commands import given
from harness.commands.launch import Plan, prepare
from harness.commands.recognise import experiment_of
from harness.errors import HarnessError, RunError
from harness.experiments import registry
from harness.run import Manifest
from harness.run.differences import Difference, differences, shortened
from harness.run.manifest import RecordedCode, RecordedPrompts
from harness.settings import Resolved

_TRUST = ("model.trust_remote_code", "other.trust_remote_code")
_LOCAL = "paths."
"""Settings that say where things are on the machine that ran it."""


def settings_of(manifest: Manifest, state: Path) -> dict[str, Any]:
    """The settings of a recorded run by dotted name: its commit for the branch it named, and the threads it really had.

    Not among them: trust in a model's code, which is given anew or not at all, and paths that this user, whose state is
    in `state`, did not give. Raises RunError for a run that was not computed from settings, but asked for by clients.
    """
    if manifest.kind is not None:
        raise RunError(
            f"run {manifest.run_id} holds what a service was asked: nothing of it is measured again; ask the same requests, "
            "with the seeds that its answers name"
        )
    values = _recorded(manifest)
    values = {name: value for name, value in values.items() if name not in (*_TRUST, *_strange_paths(manifest, state))}
    if manifest.device == "cpu" and manifest.threads:
        values["runtime.threads"] = min(manifest.threads, os.cpu_count() or 1)
    for section, model in (("model", manifest.model), ("other", manifest.other)):
        if model.revision not in (None, "local", "random"):
            values[f"{section}.revision"] = model.revision
    return values


def prepare_again(manifest: Manifest, resolved: Resolved) -> tuple[Plan, list[Difference]]:
    """The plan of a recorded run, from settings that rest on `settings_of`, and what is not as it was: model, data or code.

    Raises HarnessError where something is not there at all, or has to be named by this user.
    """
    strange = _strange_paths(manifest, resolved.settings.paths.state_folder)
    asked = [name for name in strange if name not in resolved.sources]
    if asked:
        named = " and ".join(f"{name} = {shortened(strange[name])}" for name in asked)
        raise RunError(
            f"run {manifest.run_id} records {named}, which this user did not give: "
            "no path that a run's folder names is opened; say where it is with "
            + " ".join(f"{given.FLAGS[name]} PATH" for name in asked)
        )
    try:
        plan = prepare(resolved, experiment_of(manifest))
    except HarnessError as e:
        raise type(e)(f"run {manifest.run_id} cannot be measured again here: {e}") from e
    return plan, [*_differences_of_parts(manifest, plan), *_difference_of_code(manifest, plan)]


def _recorded(manifest: Manifest) -> dict[str, Any]:
    if not manifest.settings:
        raise RunError(f"the manifest of {manifest.run_id} has no settings: it cannot be measured again from it")
    return {name: told.value for name, told in manifest.settings.items() if not name.startswith(_LOCAL)}


def _strange_paths(manifest: Manifest, state: Path) -> dict[str, str]:
    values = _recorded(manifest)
    return {} if given.is_own(values, manifest.given_here, state) else given.recorded_paths(values)


def _differences_of_parts(manifest: Manifest, plan: Plan) -> list[Difference]:
    found = []
    for change in differences(manifest.part("fingerprint_parts"), plan.parts):
        if change.key == "prompts.sha256":
            found.append(Difference("data (prompts.sha256)", change.old, f"{change.new}{_rows_told(manifest, plan)}"))
        else:
            found.append(change)
    return found


def _rows_told(manifest: Manifest, plan: Plan) -> str:
    here = RecordedPrompts.model_validate(plan.prepared.facts.get("prompts") or {})
    was, now = manifest.prompts.row_hashes, here.row_hashes
    groups = {
        "changed": [i for i in was.keys() & now.keys() if was[i] != now[i]],
        "missing": list(was.keys() - now.keys()),
        "new": list(now.keys() - was.keys()),
    }
    counted = [f"{len(ids)} {how}, such as {min(ids)}" for how, ids in groups.items() if ids]
    return f" (prompts: {', '.join(counted)})" if was and counted else ""


def _difference_of_code(manifest: Manifest, plan: Plan) -> list[Difference]:
    outside = registry.folder_outside(plan.experiment.name)
    was, now = manifest.code, RecordedCode.model_validate(environment.code(outside))
    if was.source_sha256 == now.source_sha256:
        return []
    return [Difference("code", _code_told(was), _code_told(now))]


def _code_told(code: RecordedCode) -> str:
    dirty = " with uncommitted changes" if code.git_dirty else ""
    return f"commit {(code.git_commit or 'unknown')[:12]}{dirty}, sources {(code.source_sha256 or 'not recorded')[:12]}"
