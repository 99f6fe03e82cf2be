"""The only place that knows what the files of a run are called."""

from dataclasses import dataclass
from pathlib import Path


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
    def staged(self) -> Path:
        """Files of batches in progress: on the same file system as `artifacts`, where they are renamed to."""
        return self.artifacts / ".staged"

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
