"""Who computes a run: one process at a time, in a folder that appears whole."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from loguru import logger

from harness.errors import EnvironmentFault, RunError
from harness.files import NotRegular, open_regular, refuse_special, refuse_strange, sweep, sync_folder
from harness.run.paths import RunPaths

LOCK_PATIENCE_S = 1.0
"""How long a run that is held is waited for: a reader that asks whether it is held holds it for a moment itself."""
_ASIDE = ".making"


@contextmanager
def locked(paths: RunPaths, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Holds the run for this process, and removes what a killed one left half written in it.

    Raises RunError when another one holds it, also after `patience_s`; the kernel frees it at any death.
    """
    paths.folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(paths) as file:
        _hold(file, paths, patience_s)
        try:
            refuse_strange(paths.folder)  # what is written by name must not land elsewhere
        except NotRegular as e:
            raise RunError(
                f"{e.filename}: {e.strerror}; a run's folder holds files and folders of its own alone"
            ) from e
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        sweep(paths.folder, but=paths.report)
        sweep(paths.report, only_dead=True)  # a page may be made of a run that goes on
        shutil.rmtree(paths.spill, ignore_errors=True)
        yield


def is_held(paths: RunPaths) -> bool:
    """Whether a process computes this run now. Holds it for no longer than it takes to ask."""
    try:
        with open_regular(paths.lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock was ever made, or none can be on this file system
        return False
    return False


def _lock_file(paths: RunPaths) -> TextIO:
    try:
        refuse_special(paths.lock)  # through a link, another file would be emptied
        number = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except NotRegular as e:
        raise RunError(f"{paths.lock}: {e.strerror}; a run's folder is to be taken as it was made") from e
    except OSError as e:
        raise EnvironmentFault(f"{paths.lock}: cannot be written: {e.strerror}") from e
    return os.fdopen(number, "a+")


def _hold(file: TextIO, paths: RunPaths, patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            if time.monotonic() < give_up:
                time.sleep(0.02)
                continue
            file.seek(0)
            raise RunError(
                f"run {paths.run_id} is being computed by another process ({file.read(200).strip() or 'unknown'}); "
                f"watch it with `harness show {paths.run_id}`"
            ) from e
        return


@contextmanager
def choosing(root: Path) -> Iterator[None]:
    """Among processes that start runs under `root`, one at a time chooses which, or makes a new one.

    Sweeps what was left of folders that were being made. Where the file system has no locks, nothing is held.
    """
    number = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is starting a run in {}: waiting for it", root)
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        for left in root.glob(f".*{_ASIDE}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(number)


def make_folder(folder: Path) -> None:
    """A folder for runs, or for one. Raises EnvironmentFault where it cannot be made, and says what to try."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentFault(
            f"paths.runs: cannot write to {folder}: {e.strerror}; set paths.runs to a writable folder, or in a container "
            'run as its owner: --user "$(id -u):$(id -g)"'
        ) from e


@contextmanager
def new_run(root: Path, run_id: str, lay: Callable[[RunPaths, str], None]) -> Iterator[RunPaths]:
    """A new run, held for this process. Its folder is made aside, filled by `lay` with all that a run has from its first
    moment, and appears whole: `lay` gets the paths to write to and the id that the run will have.
    """
    name, n = run_id, 1
    while (root / name).exists():  # a second run in the same second
        n += 1
        name = f"{run_id}-{n}"
    aside = RunPaths(root / f".{name}{_ASIDE}")
    make_folder(aside.folder)
    try:
        with locked(aside):
            lay(aside, name)
            sync_folder(aside.folder)
            paths = RunPaths(root / name)
            aside.folder.rename(paths.folder)
            sync_folder(root)
            yield paths
    finally:
        shutil.rmtree(aside.folder, ignore_errors=True)
