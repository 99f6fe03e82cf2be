"""`harness runs` and `harness show`: what is on disk, for people."""

from pathlib import Path

from rich.table import Table

from harness import log
from harness.commands.recognise import experiment_of
from harness.experiments import registry
from harness.experiments.experiment import Experiment
from harness.experiments.remarks import certificate_lines, lines, of_certificate
from harness.run import Manifest, RunPaths, find_run, list_runs, read_manifest, state
from harness.run.manifest import RecordedModel, RecordedPrompts
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
    experiment = experiment_of(manifest)
    reader = open_snapshot(paths, experiment.schema)
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
            row["stage"],
            row["status"],
            str(row["num_items"]),
            str(row["num_done"]),
            str(row["num_failed"]),
            f"{row['seconds']:.1f}",
            f"{row['tokens']:,}",
            f"{row.get('prefill_tokens') or 0:,}",
            f"{row.get('padding_tokens') or 0:,}",
            f"{row['tokens'] / row['seconds']:,.0f}" if row["tokens"] and row["seconds"] else "",
        )
    if manifest.kind is None:
        log.print_out(progress)
    events = reader.query("SELECT * FROM events WHERE level IN ('warning', 'error') ORDER BY event_id LIMIT 20")
    for event in events:
        log.print_out(f"{event['level']}: {event['kind']} {event['item_key'] or ''} {event['message']}")
    log.print_out(*headlines(experiment, reader, manifest))
    reader.close()


def print_finished(experiment: Experiment, paths: RunPaths) -> int:
    """What a run came to that was finished before it was asked for; the exit code that it ended with."""
    manifest = read_manifest(paths)
    failed = manifest.num_failed or 0
    log.print_out(*headlines_of(experiment, paths))
    log.print_out(f"Run {paths.run_id} is finished already: nothing to do. (--resume new measures it all again.)")
    if failed:
        retry = f"{registry.run_command(experiment.name)} --retry-failed"
        log.print_out(f"{failed} items failed; `{retry}` tries just those.")
    return 1 if failed or not all(measured.ok for measured in manifest.sanity) else 0


def headlines_of(experiment: Experiment, paths: RunPaths) -> list[object]:
    """As `headlines`, of the run that lies here."""
    with Reader(paths.live, experiment.schema) as reader:
        return headlines(experiment, reader, read_manifest(paths))


def headlines(experiment: Experiment, reader: Reader, manifest: Manifest) -> list[object]:
    """What a run came to, for a terminal: the experiment's results, the certificate, and what is to be known of them."""
    shown = experiment.render(reader, manifest)
    if "sanity" in reader.tables():
        verdicts = reader.query("SELECT * FROM sanity ORDER BY measurement")
        shown += certificate_lines(verdicts, is_whole="sanity" in manifest.stages)
    remarks = [*experiment.remarks(reader, manifest), *of_certificate(reader, manifest)]
    shown += [f"Note: {line}" for line in lines(remarks)]
    failed = int(reader.query("SELECT coalesce(sum(num_failed), 0) AS n FROM stages")[0]["n"])
    if failed:
        shown.append(f"{failed} items failed: they are rows of the table `events`.")
    told = ", ".join(f"{n} {level}s" if n != 1 else f"1 {level}" for level, n in manifest.warnings.items())
    if told:
        shown.append(f"{told} in the log (logs/run.log).")
    if manifest.planted:
        shown.append(experiment.planted)
    return shown


def _facts(manifest: Manifest, reader: Reader) -> list[tuple[str, str]]:
    machine = manifest.machine
    facts = [
        ("run", manifest.run_id),
        ("status", state(manifest) + (f" ({manifest.reason})" if manifest.reason else "")),
        ("experiment", str(manifest.experiment) + (f", {manifest.kind}" if manifest.kind else "")),
        *([("repeats", f"run {manifest.parent}")] if manifest.parent else []),
        ("created", str(manifest.created)),
        ("snapshot", f"{reader.age_s:.0f} s old"),
        ("command", " ".join(manifest.argv)),
        ("model", _model_told(manifest.model)),
        *([("prompts", _prompts_told(manifest.prompts))] if manifest.part("prompts") else []),
        *([("other model", _model_told(manifest.other))] if manifest.part("other") else []),
        ("machine", f"{machine.hostname}, {machine.cpu}, device {manifest.device}"),
        ("code", f"commit {manifest.code.git_commit}"),
        ("fingerprint", manifest.fingerprint),
    ]
    changed = {name: told for name, told in manifest.settings.items() if told.source != "default"}
    return facts + [("setting", f"{name} = {told.value} ({told.source})") for name, told in changed.items()]


def _model_told(model: RecordedModel) -> str:
    return f"{model.name}, revision {model.revision}, {model.dtype}"


def _prompts_told(prompts: RecordedPrompts) -> str:
    return f"{prompts.used} of {prompts.path}, rejected {prompts.rejected or 'none'}"
