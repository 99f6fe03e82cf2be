"""A command that asks for what a finished run already has, recognised without torch and without a look at the model: those
take several seconds, and such a command has nothing else to do.

Everything that decides a run's fingerprint goes into one hash: settings, code, packages, accelerators, and the files that the
settings name, by place, size and time of change. An equal hash means an equal fingerprint; another one means nothing, and
the question is asked in full.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import environment
from harness.commands import given
from harness.experiments import registry
from harness.experiments.experiment import Experiment
from harness.run import Manifest, RunPaths, list_runs
from harness.settings import Resolved

_MOST_FILES = 2_000
"""Of a folder; beyond, looking at them all is no short cut any more."""


def hash_of(resolved: Resolved, experiment: Experiment) -> str | None:
    """What is asked for, as it stands now; None where that is not on this machine alone: a model on the hub may move."""
    values = {name: value for name, value, _ in resolved.rows()}
    files: list[tuple[str, int, int]] = []
    try:
        if not all(_is_here(values.get(name)) for name in ("model.name", "other.name")):
            return None
        paths = {Path(p) for p in given.recorded_paths(values).values()} | {resolved.settings.paths.data_folder}
        for path in sorted(paths):
            files += _lying(path, _MOST_FILES - len(files))
    except (OSError, RuntimeError, ValueError, _TooMany):  # a loop of links is a RuntimeError, a null byte a ValueError
        return None  # whatever is wrong with a path is told when it is asked for in full
    outside = registry.folder_outside(experiment.name)
    told = {
        "experiment": experiment.name,
        "settings": values,
        "code": environment.source_sha256(*([outside] if outside else [])),
        "python": sys.version,
        "packages": environment.packages(),
        "accelerators": environment.accelerators(),
        "files": files,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def finished_run(root: Path, asked: str) -> RunPaths | None:
    """The newest run that was asked for so and is finished; None where one of the same fingerprint is still to be ended."""
    manifests = [(e.paths, e.manifest) for e in list_runs(root) if e.manifest and not e.manifest.parent]
    for paths, manifest in manifests:
        if manifest.asked_sha256 == asked and _is_finished(manifest):
            same = [m for _, m in manifests if m.fingerprint == manifest.fingerprint]
            return paths if all(map(_is_finished, same)) else None
    return None


class _TooMany(Exception):
    """More files than are looked at."""


def _is_here(name: object) -> bool:
    """Whether a model's name stands for files of this machine, or for none."""
    return given.is_name(str(name or "")) or Path(str(name)).exists()


def _is_finished(manifest: Manifest) -> bool:
    return manifest.status == "finished"


def _lying(path: Path, at_most: int) -> list[tuple[str, int, int]]:
    """(place, bytes, time of change) of a file, or of every file in a folder."""
    found = []
    for file in _files(path.resolve()):
        if len(found) >= at_most:
            raise _TooMany
        stat = file.stat()
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _files(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else iter([path])
