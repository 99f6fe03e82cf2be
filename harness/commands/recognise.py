"""Which experiment a run on disk is of: its manifest says so, as far as that experiment is installed here."""

from harness.errors import RunError, SettingsError
from harness.experiments import registry
from harness.experiments.experiment import Experiment
from harness.run import Manifest, RunPaths, read_manifest
from harness.store import Reader
from harness.store.snapshot import open_snapshot


def experiment_of(manifest: Manifest) -> Experiment:
    """The experiment of a run, see `registry.of_run`.

    Raises RunError where it is not installed here, or cannot be imported.
    """
    try:
        return registry.of_run(manifest)
    except SettingsError as e:
        raise RunError(
            f"run {manifest.run_id} is of an experiment that is not at hand: {e}; its manifest can be read, its tables cannot"
        ) from e


def open_run(paths: RunPaths, *, threads: int | None = None) -> Reader:
    """The rows of a run as they stand, for reading alone."""
    return open_snapshot(paths, experiment_of(read_manifest(paths)).schema, threads=threads)
