"""The manifest of a run on disk: read as input of a stranger, written whole at every change, with a heartbeat.

What stands in it is `Manifest`'s to say.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import RunError
from harness.files import read_unlinked, replacing
from harness.run.manifest import Manifest
from harness.run.paths import RunPaths

HEARTBEAT_S = 5.0
MANIFEST_BYTES = 64_000_000
"""No manifest is longer: one of 100,000 prompts has 9 MB."""


def read_manifest(paths: RunPaths) -> Manifest:
    """A run's manifest as it stands. Raises RunError when it is missing or not readable."""
    return read_manifest_file(paths.manifest)


def read_manifest_file(path: Path) -> Manifest:
    """The manifest in a file, wherever it lies. Raises RunError when it is missing or no manifest."""
    try:
        tree = json.loads(read_unlinked(path, MANIFEST_BYTES))
    except FileNotFoundError as e:
        raise RunError(f"{path.parent}: expected a {path.name}, found none; it is no run") from e
    except OSError as e:
        raise RunError(f"{path}: not readable: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(tree, dict) or "run_id" not in tree or "fingerprint" not in tree:
        raise RunError(f"{path}: expected a manifest with run_id and fingerprint, found something else")
    return Manifest.of(tree)


class ManifestFile:
    """A run's manifest on disk: every change is a whole new file, renamed into place; a thread keeps its heartbeat."""

    def __init__(self, paths: RunPaths, manifest: Manifest):
        self.paths = paths
        self._now = manifest
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def create(
        cls,
        paths: RunPaths,
        content: Mapping[str, Any],
        run_id: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "ManifestFile":
        """Write the first manifest of a new run, with the status `running` and no stage that has ended.

        Its `run_id` is that of the folder it will have. Keys of `content` are those that a manifest has, `facts` are an
        experiment's own, by any names.
        """
        paths.log.parent.mkdir(parents=True, exist_ok=True)
        manifest = Manifest.new(run_id or paths.run_id, now_text(), content, facts or {})
        file = cls(paths, manifest)
        file.update(status="running", heartbeat=now_text())
        return file

    @classmethod
    def reopen(cls, paths: RunPaths) -> "ManifestFile":
        """The manifest of a run that is there already."""
        return cls(paths, read_manifest(paths))

    @property
    def now(self) -> Manifest:
        """What it says by now."""
        return self._now

    def with_changes(self, **changes: Any) -> Manifest:
        """What the manifest would be with these keys set."""
        with self._lock:
            return self._now.changed(**changes)

    def update(self, **changes: Any) -> None:
        """Set some keys and write the whole file anew. A key that a manifest has not, or a value of another kind, is a mistake
        of ours (see `Manifest.changed`), and nothing is written."""
        with self._lock:
            self._now = self._now.changed(**changes)
            with replacing(self.paths.manifest) as temporary:
                temporary.write_text(json.dumps(self._now.tree, indent=2, ensure_ascii=False) + "\n", "utf-8")

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
