"""`harness runs` and `harness show`: what is on disk, for people."""

from pathlib import Path
from typing import Any

from rich.table import Table

from harness import log
from harness.experiments.gravity import summary
from harness.experiments.gravity.schema import SCHEMA
from harness.run import find_run, list_runs, read_manifest, state
from harness.store import Reader, open_snapshot


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
    reader = open_snapshot(paths, SCHEMA)
    facts = Table(show_header=False, box=None)
    for name, value in _facts(manifest, reader):
        facts.add_row(name, value)
    log.print_out(facts)
    progress = Table(title="Stages", title_justify="left")
    for column in (
        "stage",
        "status",
        "items",
        "done",
        "failed",
        "seconds",
        "tokens",
        "of contexts",
        "padding",
        "tokens/s",
    ):
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
