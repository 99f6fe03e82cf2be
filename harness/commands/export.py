"""`harness export`: every table and view of a run as a file, for other programs."""

from pathlib import Path

from harness import log
from harness.errors import EnvironmentFault, RunError
from harness.experiments.gravity.schema import SCHEMA
from harness.files import read_unlinked, replacing, sweep
from harness.run import MANIFEST_BYTES, find_run
from harness.store import Format, open_snapshot


def export(root: Path, wanted: str, to: Path, form: Format, *, is_safe: bool = False) -> None:
    """Every table and view of a run as one file each, and its manifest beside them; with `is_safe`, for spreadsheets."""
    if is_safe and form != "csv":
        raise RunError(f"--safe: quotes cells of CSV files for spreadsheets; expected --format csv, found {form}")
    paths = find_run(root, wanted)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentFault(f"--to: cannot write to {to}: {e.strerror}") from e
    sweep(to, only_dead=True)
    with open_snapshot(paths, SCHEMA) as reader:
        names = [name for name in reader.tables() if name not in reader.schema.not_exported]
        done = [reader.export(name, to / f"{name}.{form}", form, is_safe=is_safe) for name in names]
    with replacing(to / "manifest.json") as temporary:
        temporary.write_bytes(read_unlinked(paths.manifest, MANIFEST_BYTES))
    log.print_out(f"{paths.run_id}: {len(done)} tables and views, {sum(d.num_rows for d in done):,} rows, in {to!s}")
    if is_safe:
        log.print_out(
            f"{sum(d.num_defused for d in done):,} cells that a spreadsheet would take for formulas begin with an apostrophe now."
        )
