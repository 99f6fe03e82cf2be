"""`harness runs`, `harness show` and `harness export`: what is on disk, for people and for other programs."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from rich.markup import escape
from rich.table import Table

from harness import log, summary
from harness.errors import EnvironmentFault, RunError, StoreError
from harness.run import RunPaths, find_run, list_runs, locked, read_manifest, state
from harness.store import SCHEMA_VERSION, Reader, Store


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
        table.add_row(*(escape("" if c is None else f"{c:.0f}" if isinstance(c, float) else str(c)) for c in cells))
    log.print_out(table)


def print_run(root: Path, wanted: str) -> None:
    """Manifest, progress, warnings and headline results of one run."""
    paths = find_run(root, wanted)
    manifest = read_manifest(paths)
    reader = open_snapshot(paths)
    facts = Table(show_header=False, box=None)
    for name, value in _facts(manifest, reader):
        facts.add_row(name, value.replace("[", "\\["))
    log.print_out(facts)
    progress = Table(title="Stages", title_justify="left")
    for column in ("stage", "status", "items", "done", "failed", "seconds", "tokens"):
        progress.add_column(column, justify="left" if column in ("stage", "status") else "right")
    for row in reader.query("SELECT s.* FROM stages s ORDER BY s.rowid"):
        progress.add_row(
            row["stage"], row["status"], str(row["num_items"]), str(row["num_done"]), str(row["num_failed"]),
            f"{row['seconds']:.1f}", f"{row['tokens']:,}",
        )  # fmt: skip
    log.print_out(progress)
    events = reader.query("SELECT * FROM events WHERE level IN ('warning', 'error') ORDER BY event_id LIMIT 20")
    for event in events:
        log.print_out(
            f"{event['level']}: {event['kind']} {event['item_key'] or ''} {event['message']}".replace("[", "\\[")
        )
    log.print_out(*summary.render(summary.summarise(reader), manifest))
    reader.close()


def export(root: Path, wanted: str, to: Path, form: Literal["parquet", "csv", "jsonl"]) -> None:
    """Every table and view of a run as one file each, and its manifest beside them."""
    paths = find_run(root, wanted)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentFault(f"--to: cannot write to {to}: {e.strerror}") from e
    reader = open_snapshot(paths)
    # `attention` again with a row a head: a hundred times as many rows, and nothing that is not in `attention`.
    names = [name for name in reader.tables() if name != "attention_heads"]
    rows = {name: reader.export(name, to / f"{name}.{form}", form) for name in names}
    (to / "manifest.json").write_text(paths.manifest.read_text("utf-8"), "utf-8")
    log.print_out(f"{paths.run_id}: {len(rows)} tables and views, {sum(rows.values()):,} rows, in {to}")
    reader.close()


def open_snapshot(paths: RunPaths) -> Reader:
    """The run's snapshot. Where nobody computes the run, one is published first: a killed run's last rows count too."""
    if not paths.results.exists() and not paths.live.exists():
        raise RunError(f"run {paths.run_id} has no results yet")
    if paths.live.exists() and read_manifest(paths).get("status") == "finished":
        with suppress(StoreError):  # a snapshot that cannot be read is made again
            reader = Reader(paths.live)  # it published after its last row
            if reader.schema_version == SCHEMA_VERSION:
                return reader
            reader.close()
    if not paths.results.exists():
        return Reader(paths.live)  # all there is: a new, empty store must not take its place
    try:
        with locked(paths), Store(paths.results) as store:
            store.publish(paths.live)
    except RunError:
        logger.info("the run is being computed: showing its snapshot")
    except (StoreError, OSError) as e:
        if not paths.live.exists():
            raise
        reader = Reader(paths.live)
        logger.warning("the snapshot could not be renewed ({}); showing the one that is there", e)
        return reader
    return Reader(paths.live)


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
