"""`harness runs`, `harness show` and `harness export`: what is on disk, for people and for other programs."""

from pathlib import Path
from typing import Any

from loguru import logger
from rich.table import Table

from harness import log, summary
from harness.errors import EnvironmentFault, RunError, StoreError, machine_fault
from harness.files import read_unlinked, replacing, sweep
from harness.run import MANIFEST_BYTES, RunPaths, find_run, is_held, list_runs, read_manifest, state
from harness.store import AlteredStore, Format, Reader, open_copy


def print_runs(root: Path) -> None:
    """One line a run, newest first; a broken one with its reason."""
    entries = list_runs(root)
    if not entries:
        log.print_out(f"No run in {root} yet. Start one with `harness run`.")
        return
    table = Table()
    shown = ("run", "status", "model", "prompts", "stages done", "failed", "seconds", "reason")
    for column in shown:
        table.add_column(
            column, justify="right" if column in ("prompts", "failed", "seconds") else "left", overflow="fold"
        )
    for entry in entries:
        facts = entry.facts()
        cells = (facts[column] for column in shown)
        table.add_row(*("" if c is None else f"{c:.0f}" if isinstance(c, float) else str(c) for c in cells))
    log.print_out(table)


def print_run(root: Path, wanted: str) -> None:
    """Manifest, progress, warnings and headline results of one run."""
    paths = find_run(root, wanted)
    manifest = read_manifest(paths)
    reader = open_snapshot(paths)
    facts = Table(show_header=False, box=None)
    for name, value in _facts(manifest, reader):
        facts.add_row(name, value)
    log.print_out(facts)
    progress = Table(title="Stages", title_justify="left")
    shown = ("stage", "status", "items", "done", "failed", "seconds", "tokens", "of contexts", "padding", "tokens/s")
    for column in shown:
        progress.add_column(column, justify="left" if column in ("stage", "status") else "right")
    for row in reader.query("SELECT s.* FROM stages s ORDER BY s.rowid"):
        progress.add_row(
            row["stage"], row["status"], str(row["num_items"]), str(row["num_done"]), str(row["num_failed"]),
            f"{row['seconds']:.1f}", f"{row['tokens']:,}", f"{row.get('prefill_tokens') or 0:,}",
            f"{row.get('padding_tokens') or 0:,}",
            f"{row['tokens'] / row['seconds']:,.0f}" if row["tokens"] and row["seconds"] else "",
        )  # fmt: skip
    log.print_out(progress)
    events = reader.query("SELECT * FROM events WHERE level IN ('warning', 'error') ORDER BY event_id LIMIT 20")
    for event in events:
        log.print_out(f"{event['level']}: {event['kind']} {event['item_key'] or ''} {event['message']}")
    log.print_out(*summary.render(summary.summarise(reader, manifest), manifest))
    reader.close()


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
    with open_snapshot(paths) as reader:
        # `attention` again with a row a head: a hundred times as many rows, and nothing that is not in `attention`.
        names = [name for name in reader.tables() if name != "attention_heads"]
        done = [reader.export(name, to / f"{name}.{form}", form, is_safe=is_safe) for name in names]
    with replacing(to / "manifest.json") as temporary:
        temporary.write_bytes(read_unlinked(paths.manifest, MANIFEST_BYTES))
    log.print_out(f"{paths.run_id}: {len(done)} tables and views, {sum(d.num_rows for d in done):,} rows, in {to!s}")
    if is_safe:
        log.print_out(
            f"{sum(d.num_defused for d in done):,} cells that a spreadsheet would take for formulas begin with an apostrophe now."
        )


def open_snapshot(paths: RunPaths, *, threads: int | None = None) -> Reader:
    """The rows of a run as they stand, for reading alone: of a killed run the last ones too. Nothing of the run is written,
    and nobody who goes on with it is kept waiting."""
    if not paths.results.exists() and not paths.live.exists():
        raise RunError(f"run {paths.run_id} has no results yet")
    broken: StoreError | None = None
    if paths.live.exists() and (read_manifest(paths).get("status") in _PUBLISHED or is_held(paths)):
        try:
            return Reader(paths.live, threads=threads)
        except AlteredStore:
            raise
        except StoreError as e:  # the store itself may be sound
            broken = e
    if not paths.results.exists():
        return Reader(paths.live, threads=threads)
    try:
        reader = open_copy(paths.results, threads=threads)
    except (StoreError, OSError) as e:
        if broken is not None or not paths.live.exists():
            raise broken or machine_fault(e) or StoreError(f"{paths.results}: cannot be read: {e}") from e
        reader = Reader(paths.live, threads=threads)
        logger.warning("the last rows of the run cannot be read ({}); showing its snapshot", e)
    if broken is not None:
        logger.warning("{}; showing the store itself", broken)
    return reader or Reader(paths.live, threads=threads)


_PUBLISHED = ("finished", "interrupted")
"""A run that ended so has published after its last row."""


def _facts(manifest: dict[str, Any], reader: Reader) -> list[tuple[str, str]]:
    model, prompts, machine = (manifest.get(k) or {} for k in ("model", "prompts", "machine"))
    changed = {k: v for k, v in (manifest.get("settings") or {}).items() if v.get("source") != "default"}
    facts = [
        ("run", manifest["run_id"]),
        ("status", state(manifest) + (f" ({manifest['reason']})" if manifest.get("reason") else "")),
        ("experiment", str(manifest.get("experiment"))),
        *([("repeats", f"run {manifest['parent']}")] if manifest.get("parent") else []),
        ("created", str(manifest.get("created"))),
        ("snapshot", f"{reader.age_s:.0f} s old"),
        ("command", " ".join(manifest.get("argv") or [])),
        ("model", f"{model.get('name')}, revision {model.get('revision')}, {model.get('dtype')}"),
        ("prompts", f"{prompts.get('used')} of {prompts.get('path')}, rejected {prompts.get('rejected') or 'none'}"),
        ("machine", f"{machine.get('hostname')}, {machine.get('cpu')}, device {manifest.get('device')}"),
        ("code", f"commit {(manifest.get('code') or {}).get('git_commit')}"),
        ("fingerprint", str(manifest.get("fingerprint"))),
    ]
    return facts + [("setting", f"{name} = {v['value']} ({v['source']})") for name, v in changed.items()]
