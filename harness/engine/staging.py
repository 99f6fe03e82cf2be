"""Files of batches: written aside by whoever computes them, claimed by the driver once it is sure of them.

A kill at any moment leaves a file that no row tells of, never a row without its file.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from harness.engine.executors import Computed, Job, StagedFile
from harness.engine.stage import AnyStage, Artifact, BatchOutput, kind_of
from harness.errors import EnvironmentFault, machine_fault
from harness.files import file_sha256, sync_files, sync_folder


def compute(stage: AnyStage, context: Any, job: Job) -> Computed:
    """Run a stage on a job, and leave its files in the job's folder. This is what a worker does.

    The results come back without content: a file goes from where it is made to the disk, and no further.
    """
    given = (job.before,) if kind_of(stage) != "map" else ()
    found = stage.run(context, job.items, *given)
    output = found if isinstance(found, BatchOutput) else BatchOutput(found)
    assert output.state is None or given, f"stage {stage.name}: a state, from a stage that is no fold or loop"
    made: list[tuple[Artifact, str | None, bool]] = [
        (a, r.key, False) for r in output.results if r.error is None for a in r.artifacts
    ]
    made += [(a, None, False) for a in output.artifacts]
    if output.state is not None:
        made.append((output.state, None, True))
    ats = [_write(artifact, job, "state" if is_state else "files") for artifact, _, is_state in made]
    with _writing("files"):
        sync_files(ats)
    files = [_staged(at, *told) for at, told in zip(ats, made, strict=True)]
    unwritten = [(r.key, a.path) for r in output.results if r.error is not None for a in r.artifacts]
    results = [replace(r, artifacts=()) if r.artifacts else r for r in output.results]
    return Computed(results, tuple(files), tuple(unwritten))


def _write(artifact: Artifact, job: Job, aside: str) -> Path:
    """Write one file into the job's folder; where."""
    parts = PurePosixPath(artifact.path).parts
    is_inside = bool(parts) and parts[0] != "/" and ".." not in parts
    assert is_inside, f"{artifact.path}: leads out of its folder"
    assert job.staging is not None, f"{artifact.path}: nowhere to write files in this run"
    at = job.staging / aside / artifact.path
    with _writing(at):
        at.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(artifact.content, bytes):
            at.write_bytes(artifact.content)
        else:
            artifact.content(at)
    return at


def _staged(at: Path, artifact: Artifact, item: str | None, is_state: bool) -> StagedFile:
    """A file as it lies: read again in pieces rather than hashed on the way, since what counts is what the disk holds."""
    with _writing(at):
        return StagedFile(replace(artifact, content=b""), at, file_sha256(at), at.stat().st_size, item, is_state)


def claim(names: Sequence[tuple[StagedFile, Path]]) -> None:
    """Give staged files their names in the run, for good; an older one under such a name is replaced."""
    for file, path in names:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file.at.replace(path)
    for folder in dict.fromkeys(path.parent for _, path in names):
        with _writing(folder):
            sync_folder(folder)


@contextmanager
def _writing(what: Path | str) -> Iterator[None]:
    """What a disk refuses is the machine's fault, and ends the run with one line that names what was written."""
    try:
        yield
    except (OSError, SafetensorError) as e:  # not every one of them names a file
        told = getattr(e, "strerror", None) or e
        raise machine_fault(e) or EnvironmentFault(f"{what}: cannot be written: {told}") from e


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
    """Remove, in this order, those that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below it."""
    if not folder.is_symlink():
        for where, _, names in os.walk(folder):
            yield from (Path(where) / name for name in names)
