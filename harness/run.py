"""What a run is: its fingerprint and id, its folder, its manifest, and the lock that keeps it to one process.

Knows no stage, no model and no table.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from loguru import logger

from harness.errors import EnvironmentFault, RunError
from harness.files import (
    NotRegular,
    is_folder,
    open_regular,
    read_unlinked,
    refuse_special,
    refuse_strange,
    replacing,
    sweep,
    sync_folder,
)
from harness.manifests import check_shape, shortened

FORMAT = 1
"""Version of what the fingerprint hashes."""
HEARTBEAT_S = 5.0
MANIFEST_BYTES = 64_000_000
"""No manifest is longer: one of 100,000 prompts has 9 MB."""
LOCK_PATIENCE_S = 1.0
"""How long a run that is held is waited for: a reader that asks whether it is held holds it for a moment itself."""
STALE_AFTER_S = 30.0
"""A run whose heartbeat is older than this is not running any more, whatever its manifest says."""

Status = Literal["running", "finished", "failed", "interrupted"]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 of everything that decides results, whatever the order it was given in."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def new_run_id(slug: str, digest: str, now: datetime) -> str:
    """UTC time + slug + first hex of the fingerprint; ids sort by time."""
    clean = "".join(c if c.isalnum() else "-" for c in slug.lower()).strip("-")[:24].strip("-")
    return f"{now:%Y%m%d-%H%M%S}-{clean or 'run'}-{digest[:8]}"


@dataclass(frozen=True)
class RunPaths:
    """The only place that knows what a run's files are called."""

    folder: Path

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def results(self) -> Path:
        """The store; its writer alone opens it."""
        return self.folder / "results.duckdb"

    @property
    def spill(self) -> Path:
        """Where its writer keeps what does not fit into memory; gone when it ends."""
        return self.folder / "results.duckdb.tmp"

    @property
    def live(self) -> Path:
        """A snapshot of the store, for every reader."""
        return self.folder / "live.duckdb"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "run.log"

    @property
    def lock(self) -> Path:
        return self.folder / "run.lock"

    @property
    def artifacts(self) -> Path:
        """Files too big for the store, each a row of its table `artifacts`."""
        return self.folder / "artifacts"

    @property
    def report(self) -> Path:
        """What `harness report` writes: a page and its figures."""
        return self.folder / "report"

    @property
    def seal(self) -> Path:
        """What a finished run was: a copy of its manifest and the digests of its tables."""
        return self.folder / "seal.json"

    @property
    def row_digests(self) -> Path:
        """Key and digest of every row, the seal's other half."""
        return self.folder / "seal.parquet"

    @property
    def tree_diff(self) -> Path:
        """Uncommitted changes of the code that made the run."""
        return self.folder / "working_tree.diff"


def read_manifest(paths: RunPaths) -> dict[str, Any]:
    """A run's manifest as it stands. Raises RunError when it is missing or not readable."""
    return read_manifest_file(paths.manifest)


def read_manifest_file(path: Path) -> dict[str, Any]:
    """The manifest in a file, wherever it lies. Raises RunError when it is missing or no manifest."""
    try:
        manifest = json.loads(read_unlinked(path, MANIFEST_BYTES))
    except FileNotFoundError as e:
        raise RunError(f"{path.parent}: expected a {path.name}, found none; it is no run") from e
    except OSError as e:
        raise RunError(f"{path}: not readable: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(manifest, dict) or "run_id" not in manifest or "fingerprint" not in manifest:
        raise RunError(f"{path}: expected a manifest with run_id and fingerprint, found something else")
    check_shape(manifest)
    return manifest


def state(manifest: Mapping[str, Any], now: datetime | None = None) -> str:
    """The status a reader should show: `stopped` for a run that says `running` and whose heartbeat is stale."""
    status = str(manifest.get("status", "unknown"))
    if status != "running":
        return status
    try:
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(str(manifest["heartbeat"]))).total_seconds()
    except (KeyError, ValueError, TypeError):
        return "stopped"
    return "stopped" if age > STALE_AFTER_S else "running"


class Manifest:
    """A run's manifest on disk: every change is a whole new file, renamed into place; a thread keeps its heartbeat."""

    def __init__(self, paths: RunPaths, content: dict[str, Any]):
        self.paths = paths
        self._content = content
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def create(cls, paths: RunPaths, content: dict[str, Any], run_id: str | None = None) -> "Manifest":
        """Write the first manifest of a new run, with the status `running`. Its `run_id` is that of the folder it will have."""
        paths.log.parent.mkdir(parents=True, exist_ok=True)
        manifest = cls(paths, {"run_id": run_id or paths.run_id, "created": now_text(), **content})
        manifest.update(status="running", heartbeat=now_text())
        return manifest

    @classmethod
    def reopen(cls, paths: RunPaths) -> "Manifest":
        """The manifest of a run that is there already."""
        return cls(paths, read_manifest(paths))

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self._content.get(key, default)

    def with_changes(self, **changes: Any) -> dict[str, Any]:
        """What the manifest would be with these keys set."""
        with self._lock:
            return {**self._content, **changes}

    def update(self, **changes: Any) -> None:
        """Set some keys and write the whole file anew."""
        with self._lock:
            self._content |= changes
            with replacing(self.paths.manifest) as temporary:
                temporary.write_text(
                    json.dumps(self._content, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8"
                )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """A heartbeat while the block runs. A heartbeat that cannot be written is not worth a run."""

        def beat() -> None:
            while not self._stop.wait(HEARTBEAT_S):
                try:
                    self.update(heartbeat=now_text())
                except OSError:
                    continue

        self._stop.clear()
        self._thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()


def now_text() -> str:
    """This moment in UTC, as the manifest writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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


_ASIDE = ".making"


class RunEntry(NamedTuple):
    """One folder of runs: its manifest, or why it cannot be read."""

    paths: RunPaths
    manifest: dict[str, Any] | None
    problem: str | None

    def facts(self) -> dict[str, Any]:
        """One row of a list of runs; of a broken run its name, `broken` and the reason."""
        manifest = self.manifest or {}
        model, prompts, stages = (
            part if isinstance(part := manifest.get(name), Mapping) else {} for name in ("model", "prompts", "stages")
        )
        return {
            "run": self.paths.run_id,
            "status": state(manifest) if self.manifest else "broken",
            "model": str(model.get("name", "")).rsplit("/", 1)[-1],
            "prompts": prompts.get("used"),
            "stages done": ", ".join(stages),
            "failed": manifest.get("num_failed"),
            "seconds": manifest.get("seconds"),
            "created": manifest.get("created"),
            "reason": self.problem or manifest.get("reason") or "",
        }


def list_runs(root: Path) -> list[RunEntry]:
    """Every run under `root`, newest first; a broken one is an entry with its reason."""
    entries = []
    folders = (p for p in root.glob("*") if not p.name.startswith(".") and p.is_dir())
    for folder in sorted(folders, key=lambda p: p.name, reverse=True):
        paths = RunPaths(folder)
        try:
            entries.append(RunEntry(paths, read_manifest(paths), None))
        except RunError as e:
            entries.append(RunEntry(paths, None, str(e)))
    return entries


def find_run(root: Path, wanted: str) -> RunPaths:
    """The run with this id, this unique prefix of one, or the `latest`. Raises RunError when there is no such one."""
    names = [entry.paths.run_id for entry in list_runs(root) if entry.manifest is not None]
    if wanted == "latest":
        if not names:
            raise RunError(f"no run in {root} yet; start one with `harness run`")
        return RunPaths(root / names[0])
    if is_folder(root / wanted) and wanted not in names and wanted not in ("", "."):
        read_manifest(RunPaths(root / wanted))  # says what is wrong with it
    matches = [wanted] if wanted in names else [n for n in names if wanted and n.startswith(wanted)]
    if len(matches) != 1:
        found = (
            f"{len(matches)} runs begin so: {', '.join(matches[:4])}" if matches else f"found none among {len(names)}"
        )
        raise RunError(
            f"expected a run_id in {root}, a unique prefix of one, or `latest`; got {shortened(repr(wanted))}; {found}"
        )
    return RunPaths(root / matches[0])
