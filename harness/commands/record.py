"""`harness serve --serve.record`: a run of what a service is asked and answers, from its first request to its seal."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from harness import log
from harness.commands.launch import content_of, root_of, surroundings, write_diff
from harness.errors import EnvironmentFault, HarnessError
from harness.experiments.requests import KIND, SCHEMA, TABLE, failed_in
from harness.experiments.weights import Models, slug_of
from harness.run import ManifestFile, RunPaths, choosing, fingerprint, new_run, new_run_id, now_text
from harness.serving.record import Exchange, Recording
from harness.settings import BUNDLED_MODELS, Resolved
from harness.store import Store, seal

SEAL_S = 2.0
"""Of the seconds that a signal leaves, what the last rows and the seal are given."""


def check(root: Path) -> None:
    """Raises HarnessError where no run can be made in this folder: to be told before a model is loaded."""
    root_of(root, "new")
    if not os.access(root, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"paths.runs: cannot write to {root}, where serve.record keeps a run; set paths.runs to a writable folder"
        )


@contextmanager
def recorded(resolved: Resolved, experiment: str, models: Models, argv: list[str]) -> Iterator[Recording]:
    """A new run, and what takes exchanges for it while the block runs. Sealed when that has ended.

    Raises EnvironmentFault at the end where answered requests could not be written: the run then says how many, and has
    no seal.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        paths = stack.enter_context(_new(resolved, experiment, models, argv))
        warnings = log.to_file(paths.log)
        manifest = ManifestFile.reopen(paths)
        rows = stack.enter_context(_Rows(paths))

        def ended(status: str, **more: Any) -> dict[str, Any]:
            seconds = round(time.perf_counter() - start, 3)
            return {
                "status": status,
                "ended": now_text(),
                "seconds": seconds,
                "warnings": dict(warnings.counts),
                **more,
            }

        logger.info("recording in {}", paths.folder)
        recording = Recording(rows)
        try:
            with manifest.beating():
                with recording:
                    yield recording
                if num := recording.num_waiting:
                    raise EnvironmentFault(
                        f"{num} answered requests could not be recorded in {paths.folder}: {recording.problem}"
                    )
                _seal(paths, rows.store, manifest, ended)
        except BaseException as e:
            with suppress(HarnessError, OSError):  # the first error is the one to be told
                manifest.update(**ended("failed", reason=f"{type(e).__name__}: {e}"))
            raise
    logger.info("recorded {:,} requests: see `harness show {}`", recording.num_written, paths.run_id)


def _new(resolved: Resolved, experiment: str, models: Models, argv: list[str]) -> AbstractContextManager[RunPaths]:
    settings = resolved.settings
    own = {name: value for name, value, _ in resolved.rows() if name.startswith(f"{experiment}.")}
    other = models.other_identity
    parts = {
        "kind": KIND,
        "experiment": experiment,
        "model": models.identity.fingerprint(),
        **({"other": other.fingerprint()} if other is not None else {}),
        "settings": own,  # what a request leaves out is as they have it
    }
    here = surroundings(experiment, models.device, resolved)
    names = [name for name in (settings.model.name, settings.other.name) if name]
    content = content_of(experiment, parts, models, resolved, argv, here)
    content |= {"kind": KIND, "planted": all(name in BUNDLED_MODELS for name in names)}
    run_id = new_run_id(f"{KIND}-{slug_of(settings.model.name)}", fingerprint(parts), datetime.now(UTC))
    return _made(settings.paths.runs, run_id, content)


@contextmanager
def _made(root: Path, run_id: str, content: dict[str, Any]) -> Iterator[RunPaths]:
    with ExitStack() as stack:
        with choosing(root_of(root, "new")):
            paths = stack.enter_context(new_run(root, run_id, partial(_lay, content)))
        yield paths


def _lay(content: dict[str, Any], paths: RunPaths, run_id: str) -> None:
    ManifestFile.create(paths, content, run_id)
    write_diff(paths)
    with Store(paths.results, SCHEMA) as store:
        store.publish(paths.live)


class _Rows:
    """The table `requests` of a run, and the snapshot of it that readers open. One thread at a time."""

    def __init__(self, paths: RunPaths):
        self._paths = paths
        self._store: Store | None = Store(paths.results, SCHEMA)
        self._has_news = False

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self._paths.results, SCHEMA)
        return self._store

    def __call__(self, first: int, exchanges: Sequence[Exchange]) -> None:
        try:
            store = self.store
            if exchanges:
                store.append(TABLE, [{"request_id": first + n, **e.row()} for n, e in enumerate(exchanges)])
                self._has_news = True
            if self._has_news:
                self._has_news = not store.publish_if_due(self._paths.live)
        except BaseException:
            self._close()  # after some errors DuckDB takes nothing more until a file is opened anew, as the next call does
            raise

    def _close(self) -> None:
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _seal(paths: RunPaths, store: Store, manifest: ManifestFile, ended: Any) -> None:
    """The end of every run: snapshot, digests, seal, and the manifest last."""
    store.publish(paths.live)
    tables = store.seal(paths.row_digests)
    last = ended(
        "finished",
        num_failed=failed_in(store),
        tables={name: table.rows for name, table in tables.items()},
        table_sha256={name: tables[name].sha256 for name in SCHEMA.measured},
        sanity=[],
    )
    seal.write(paths, SCHEMA, tables, manifest.with_changes(**last).tree)
    manifest.update(**last)
