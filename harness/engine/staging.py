"""Files of batches: written aside by whoever computes them, claimed by the driver once it is sure of them.

A kill at any moment leaves a file that no row tells of, never a row without its file.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from harness.engine.executors import Computed, Job, StagedFile
from harness.engine.stage import AnyStage, Artifact, BatchOutput, kind_of
from harness.errors import EnvironmentFault, machine_fault
from harness.files import file_sha256, sync_folder


def compute(stage: AnyStage, context: Any, job: Job) -> Computed:
    """Run a stage on a job, and leave its files in the job's folder. This is what a worker does.

    The results come back without content: a file goes from where it is made to the disk, and no further.
    """
    given = (job.before,) if kind_of(stage) != "map" else ()
    found = stage.run(context, job.items, *given)
    output = found if isinstance(found, BatchOutput) else BatchOutput(found)
    assert output.state is None or given, f"stage {stage.name}: a state, from a stage that is no fold or loop"
    files = [_stage(a, job, r.key) for r in output.results if r.error is None for a in r.artifacts]
    files += [_stage(a, job) for a in output.artifacts]
    if output.state is not None:
        files.append(replace(_stage(output.state, job, aside="state"), is_state=True))
    unwritten = [(r.key, a.path) for r in output.results if r.error is not None for a in r.artifacts]
    results = [replace(r, artifacts=()) if r.artifacts else r for r in output.results]
    return Computed(results, tuple(files), tuple(unwritten))


def _stage(artifact: Artifact, job: Job, item: str | None = None, aside: str = "files") -> StagedFile:
    parts = PurePosixPath(artifact.path).parts
    is_inside = bool(parts) and parts[0] != "/" and ".." not in parts
    assert is_inside, f"{artifact.path}: leads out of its folder"
    assert job.staging is not None, f"{artifact.path}: nowhere to write files in this run"
    at = job.staging / aside / artifact.path
    try:
        at.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(artifact.content, bytes):
            at.write_bytes(artifact.content)
        else:
            artifact.content(at)
        with at.open("rb+") as file:
            os.fsync(file.fileno())
        # Read again in pieces rather than hashed on the way: what counts is what the disk holds.
        digest, size = file_sha256(at), at.stat().st_size
    except (OSError, SafetensorError) as e:
        told = getattr(e, "strerror", None) or e
        raise machine_fault(e) or EnvironmentFault(f"{at}: cannot be written: {told}") from e
    return StagedFile(replace(artifact, content=b""), at, digest, size, item)


def claim(file: StagedFile, path: Path) -> None:
    """Give a staged file its name in the run, for good; an older one under that name is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.at.replace(path)
        sync_folder(path.parent)
    except OSError as e:
        raise machine_fault(e) or EnvironmentFault(f"{path}: cannot be written: {e.strerror}") from e


def sweep_staged(folder: Path) -> int:
    """Remove all that lies staged; how many files that were. The caller knows that nobody writes there."""
    num = sum(1 for _ in files_below(folder))
    drop_folder(folder)
    return num


def drop_folder(folder: Path) -> None:
    """Remove a folder with all in it, whether it is there or not; of a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def drop_if_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below it."""
    if not folder.is_symlink():
        for where, _, names in os.walk(folder):
            yield from (Path(where) / name for name in names)
