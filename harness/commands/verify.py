"""`harness verify`: whether a run is still what it was, hangs together, and gives the same numbers when measured again."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from harness import log
from harness.commands.findings import Check, checks_of, print_checks
from harness.commands.recognise import experiment_of
from harness.commands.remeasure import measured_again
from harness.errors import DamagedManifest, RunError, Stopped, StoreError
from harness.files import file_sha256, is_file, open_inside, sha256
from harness.run import Manifest, RunPaths, find_run, fingerprint, is_held, read_manifest
from harness.run.differences import told
from harness.settings import Resolved
from harness.store import AlteredStore, Reader, Row, Schema, open_copy, seal
from harness.store.seal import Seal


def command(root: Path, wanted: str, again: Callable[[Manifest], Resolved], num_batches: int, seed: int) -> int:
    """Print every check of a run; 1 where one failed. `again` gives the settings that a recorded run had."""
    paths = _find(root, wanted)
    log.print_out(f"Verifying {paths.run_id}")
    was = _moment(paths)
    shown = print_checks(examine(paths, again, num_batches, seed))
    failed, skipped = (sum(check.verdict == verdict for check in shown) for verdict in ("FAIL", "skip"))
    left_out = f" ({skipped} left out)" if skipped else ""
    nothing_again = num_batches > 0 and not any(c.name.startswith("again ") and c.verdict != "skip" for c in shown)
    unmeasured = " Nothing was measured again." if nothing_again else ""
    log.print_out((f"{failed} checks failed{left_out}." if failed else f"Every check holds{left_out}.") + unmeasured)
    if failed and _moment(paths) != was:
        raise Stopped(
            f"run {paths.run_id} went on while it was verified, so these findings mean nothing; type it again"
        )
    return 1 if failed else 0


def _moment(paths: RunPaths) -> tuple[object, ...]:
    """What changes when a run goes on or ends."""
    found = (p.stat() if p.exists() else None for p in (paths.results, paths.seal))
    return is_held(paths), *((s.st_ino, s.st_mtime_ns) if s else None for s in found)


def examine(paths: RunPaths, again: Callable[[Manifest], Resolved], num_batches: int, seed: int) -> Iterator[Check]:
    """Every check, as it is made: manifest, rows, snapshot, keys, files, and `num_batches` of each stage once more."""
    sealed = None
    try:
        sealed = seal.read(paths)
    except RunError as e:
        yield Check("FAIL", "seal", str(e))
    if sealed is not None and _is_unfinished(paths):
        yield Check(
            "skip", "seal", "the run was stopped between its seal and its last manifest: its command finishes it"
        )
        sealed = None
    try:
        manifest = Manifest.of(sealed.manifest) if sealed else read_manifest(paths)
    except RunError as e:
        yield Check("FAIL", "manifest", str(e))
        return
    is_running = is_held(paths)
    yield from _of_manifest(paths, manifest, sealed)
    try:
        schema = experiment_of(manifest).schema
    except RunError as e:
        yield Check("FAIL", "experiment", str(e))
        return
    yield from _of_rows(paths, schema, sealed)
    if not (paths.results.exists() or paths.live.exists() or sealed or manifest.status == "finished"):
        yield Check("skip", "store", "the run has no results yet")
        return
    try:
        # One thread: means of views must have the bits that the run's own had.
        with _reader(paths, schema, sealed, is_running) as reader:
            yield from _of_schema(reader, sealed)
            yield from checks_of("keys", _broken_keys(reader, manifest), "every row belongs to those it rests on")
            yield from checks_of("files", _broken_files(paths, reader), _files_told(paths, reader))
            yield from measured_again(manifest, reader, again, num_batches, seed)
    except AlteredStore as e:
        yield from checks_of("schema", e.problems, "")
    except StoreError as e:
        yield Check("FAIL", "store", str(e))


def _is_unfinished(paths: RunPaths) -> bool:
    """Whether the manifest is one of a run that is under way, in all that an end writes."""
    with suppress(RunError):
        now = read_manifest(paths)
        return now.status == "running" and not any(now.tree.get(key) for key in seal.LAST_KEYS)
    return False


def _reader(paths: RunPaths, schema: Schema, sealed: Seal | None, is_running: bool) -> Reader:
    """The results of a run that ended, else what readers of a running or stopped one get. A run that goes on meanwhile
    leaves this reader the file it has."""
    if sealed is None and not is_running and paths.results.exists():
        return open_copy(paths.results, schema, threads=1) or Reader(paths.live, schema, threads=1)
    return Reader(paths.live if is_running else paths.results, schema, threads=1)


def _find(root: Path, wanted: str) -> RunPaths:
    """As `find_run`; a folder whose manifest cannot be read is found by its whole name: it is here to be looked at."""
    try:
        return find_run(root, wanted)
    except DamagedManifest:
        return RunPaths(root / wanted)
    except RunError:
        if wanted and is_file(RunPaths(root / wanted).seal):
            return RunPaths(root / wanted)
        raise


# -- what was sealed


def _of_manifest(paths: RunPaths, manifest: Manifest, sealed: Seal | None) -> Iterator[Check]:
    if sealed is None and not paths.seal.exists():  # a damaged one was named already
        should = manifest.status == "finished" and manifest.says("table_sha256")
        yield Check(
            "FAIL" if should else "skip",
            "seal",
            f"{paths.seal.name} is missing: what rows and manifest were cannot be told"
            if should
            else "there is none: the run is not finished, or was made by an older harness",
        )
    elif sealed:
        try:
            problems = [told([change], most=80) for change in seal.changed_keys(sealed, paths)]
        except RunError as e:
            problems = [str(e)]
        yield from checks_of("manifest", problems, f"as it was sealed, {manifest.ended}")
    problems = []
    if fingerprint(manifest.part("fingerprint_parts")) != manifest.fingerprint:
        problems.append("fingerprint: it is not that of fingerprint_parts")
    if manifest.run_id != paths.run_id:
        problems.append(f"run_id: {manifest.run_id} lies in a folder called {paths.run_id}")
    yield from checks_of("identity", problems, f"fingerprint {manifest.fingerprint[:12]}")
    expected = manifest.code.diff_sha256
    if expected:
        yield from checks_of("code", _broken_diff(paths, expected), f"{paths.tree_diff.name} is the one that was saved")


def _broken_diff(paths: RunPaths, expected: str) -> Iterator[str]:
    try:
        if file_sha256(paths.tree_diff) != expected:
            yield f"{paths.tree_diff.name}: it was changed"
    except OSError as e:
        yield f"{paths.tree_diff.name}: cannot be read: {e.strerror}"


def _of_rows(paths: RunPaths, schema: Schema, sealed: Seal | None) -> Iterator[Check]:
    if sealed is None:
        return
    num_rows = sum(table.rows for table in sealed.tables.values())
    for name, store in (("rows", paths.results), ("snapshot", paths.live)):
        problems = seal.changed_rows(sealed, paths, store, schema)
        yield from checks_of(name, problems, f"{num_rows:,} rows of {len(sealed.tables)} tables as they were sealed")


# -- whether it hangs together


def _of_schema(reader: Reader, sealed: Seal | None) -> Iterator[Check]:
    schema = reader.schema
    if sealed and reader.schema_version not in (sealed.schema, schema.version):
        yield Check("FAIL", "schema", f"version {reader.schema_version}, and it was sealed as {sealed.schema}")
        return
    if reader.version != schema.newest:
        yield Check("skip", "schema", f"version {reader.schema_version}, of another harness")
        return
    yield Check("ok", "schema", f"version {schema.version}, {len(schema.tables) + len(schema.views)} tables and views")


def _broken_keys(reader: Reader, manifest: Manifest) -> Iterator[str]:
    for name, sql in reader.schema.orphans.items():
        for row in reader.query(sql):
            yield f"{name}: no row it belongs to for {_values(row)}"
    for name, sql in reader.schema.sense.items():
        for row in reader.query(sql):
            yield f"{name}: {_values(row)}"
    if manifest.status == "finished":
        planned = [stage.name for stage in manifest.fingerprint_parts.stages]
        done = {r["stage"] for r in reader.query("SELECT stage FROM stages WHERE status <> 'running'")}
        yield from (f"stages: {name} was planned and is not there" for name in planned if name not in done)
        for name, count in manifest.tables.items():
            rows = reader.query(f"SELECT count(*) AS n FROM {name}")[0]["n"] if name in reader.tables() else "no table"
            if rows != count:
                yield f"{name}: the manifest counts {count} rows, found {rows}"


def _broken_files(paths: RunPaths, reader: Reader) -> Iterator[str]:
    for row in reader.query("SELECT path, sha256, bytes FROM artifacts ORDER BY path"):
        try:
            with open_inside(paths.artifacts, row["path"]) as file:
                found, size = sha256(file), os.fstat(file.fileno()).st_size
        except (OSError, ValueError) as e:
            yield f"{paths.artifacts.name}/{row['path']}: cannot be read: {getattr(e, 'strerror', None) or e}"
            continue
        if found != row["sha256"]:
            how = "its bytes were changed" if size == row["bytes"] else f"{size} bytes instead of {row['bytes']}"
            yield f"{paths.artifacts.name}/{row['path']}: {how}"


def _files_told(paths: RunPaths, reader: Reader) -> str:
    known = {row["path"] for row in reader.query("SELECT path FROM artifacts")}
    there = {
        (Path(where) / name).relative_to(paths.artifacts).as_posix()
        for where, _, names in os.walk(paths.artifacts)
        for name in names
    }
    extra = f"; {len(there - known)} more that no row speaks of" if there - known else ""
    return f"{len(known)} artifacts as their rows say{extra}"


def _values(row: Row) -> str:
    return ", ".join(str(v) for v in row.values())
