"""The manifest of a run on disk: read as input of a stranger, written whole at every change, with a heartbeat."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness.errors import RunError
from harness.files import read_unlinked, replacing
from harness.run.differences import check_shape
from harness.run.paths import RunPaths

HEARTBEAT_S = 5.0
MANIFEST_BYTES = 64_000_000
"""No manifest is longer: one of 100,000 prompts has 9 MB."""
STALE_AFTER_S = 30.0
"""A run whose heartbeat is older than this is not running any more, whatever its manifest says."""
Status = Literal["running", "finished", "failed", "interrupted"]


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
