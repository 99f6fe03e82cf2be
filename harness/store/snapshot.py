"""Which file of a run tells its rows as they stand: its snapshot, or where that is behind or broken a copy of its store."""

from loguru import logger

from harness.errors import RunError, StoreError, machine_fault
from harness.run import RunPaths, is_held, read_manifest
from harness.store.reader import Reader, open_copy
from harness.store.schema import AlteredStore, Schema

_PUBLISHED = ("finished", "interrupted")
"""A run that ended so has published after its last row."""


def open_snapshot(paths: RunPaths, schema: Schema, *, threads: int | None = None) -> Reader:
    """The rows of a run as they stand, for reading alone: of a killed run the last ones too. Nothing of the run is written,
    and nobody who goes on with it is kept waiting."""
    if not paths.results.exists() and not paths.live.exists():
        raise RunError(f"run {paths.run_id} has no results yet")
    broken: StoreError | None = None
    if paths.live.exists() and (read_manifest(paths).status in _PUBLISHED or is_held(paths)):
        try:
            return Reader(paths.live, schema, threads=threads)
        except AlteredStore:
            raise
        except StoreError as e:  # the store itself may be sound
            broken = e
    if not paths.results.exists():
        return Reader(paths.live, schema, threads=threads)
    try:
        reader = open_copy(paths.results, schema, threads=threads)
    except (StoreError, OSError) as e:
        if broken is not None or not paths.live.exists():
            raise broken or machine_fault(e) or StoreError(f"{paths.results}: cannot be read: {e}") from e
        reader = Reader(paths.live, schema, threads=threads)
        logger.warning("the last rows of the run cannot be read ({}); showing its snapshot", e)
    if broken is not None:
        logger.warning("{}; showing the store itself", broken)
    return reader or Reader(paths.live, schema, threads=threads)
