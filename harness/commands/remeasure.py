"""Whether a run's numbers come out again: some of its batches computed once more, and compared with what it keeps."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.commands.diff import TableDrift, table_drift
from harness.commands.findings import Check, checks_of
from harness.commands.launch import Plan, surroundings
from harness.commands.replay import prepare_again
from harness.engine import AnyStage, Tables, collect
from harness.engine.chain import States
from harness.engine.executors import Host, Job, Outcome, executor_of
from harness.engine.plan import Plan as Batches
from harness.engine.stage import kind_of, loaded
from harness.engine.staging import compute, drop_folder
from harness.errors import HarnessError
from harness.models import device
from harness.run import Manifest, RunPaths
from harness.run.differences import ABSENT, Difference, environment_differences, shortened, told
from harness.settings import Resolved
from harness.store import Batch, BatchResult, Reader, Row, Schema
from harness.tolerance import TOLERANCE


def measured_again(
    manifest: Manifest,
    reader: Reader,
    again: Callable[[Manifest], Resolved],
    num_batches: int,
    seed: int,
) -> Iterator[Check]:
    """Batches of each stage, drawn at random, computed as the run computed them, each beside its rows.

    The rows must be the same bits where hardware, versions and code are the recorded ones, and the same up to rounding
    elsewhere. `again` gives the settings that a recorded run had.
    """
    if not num_batches:
        yield Check("skip", "again", "no batch was asked for")
        return
    try:
        resolved = again(manifest)
        plan, changes = prepare_again(manifest, resolved)
    except HarnessError as e:
        yield Check("skip", "again", str(e))
        return
    altered, others = _by_stage(changes)
    decisive = [d for d in others if d.key != "code"]
    if decisive:
        yield Check("FAIL", "again", f"this is not what was measured: {told(decisive)}")
        return
    here = surroundings(plan.experiment.name, plan.device, resolved)
    apart = environment_differences(manifest.tree, {**here, "stages": manifest.part("stages")})
    tolerance = 0.0 if not apart else TOLERANCE[plan.models.identity.dtype].nats
    how = (
        "bit for bit"
        if not apart
        else f"within {tolerance:g}, since here is not as there: {shortened(told(apart), 200)}"
    )
    yield Check("ok", "again", f"up to {num_batches} batches a stage, sample {seed}; rows must agree {how}")
    for name in sorted(altered.keys() - {stage.name for stage in plan.stages}):
        yield _altered(name, altered[name])
    for stage in plan.stages:
        if stage.name in altered:
            yield _altered(stage.name, altered[stage.name])
            continue
        try:
            yield from _stage_again(
                stage, plan, resolved, reader, num_batches, random.Random(f"{seed} {stage.name}"), tolerance
            )
        except HarnessError as e:
            yield Check("FAIL", f"again {stage.name}", str(e))


def _by_stage(changes: Sequence[Difference]) -> tuple[dict[str, list[Difference]], list[Difference]]:
    """What is another stage than the one that was run, by its name, and every other difference."""
    altered: dict[str, list[Difference]] = {}
    others = []
    for change in changes:
        part, _, rest = change.key.partition(".")
        if part == "stages" and rest:
            altered.setdefault(rest.partition(".")[0], []).append(change)
        else:
            others.append(change)
    return altered, others


def _altered(stage: str, changes: Sequence[Difference]) -> Check:
    name = next((d for d in changes if d.key == f"stages.{stage}.name"), None)
    if name is None:
        why = f"this is not the stage that was run: {told(changes)}"
    else:
        why = "the run has no such stage" if name.old == ABSENT else "there is no such stage any more"
    return Check("skip", f"again {stage}", why)


def _stage_again(
    stage: AnyStage,
    plan: Plan,
    resolved: Resolved,
    reader: Reader,
    num_batches: int,
    rng: random.Random,
    tolerance: float,
) -> Iterator[Check]:
    """Some of a stage's batches, computed as the run computed them, each beside its rows."""
    told_of = reader.query("SELECT * FROM stages WHERE stage = ?", [stage.name])
    batches = Batches(
        [
            Batch(
                r["stage"], r["batch_id"], tuple(r["keys"]), r["padded_tokens"], r["parent"], r["attempt"], r["status"]
            )
            for r in reader.query("SELECT * FROM batches WHERE stage = ? ORDER BY batch_id", [stage.name])
        ],
        is_loop=kind_of(stage) == "loop",
    )
    done = [b for b in batches if b.status == "done"]
    if not told_of or not done:
        return  # it was not reached
    if told_of[0].get("num_rows") == 0:  # an older store does not count them
        yield Check("skip", f"again {stage.name}", "it wrote no rows to compare with")
        return
    artifacts = RunPaths(reader.path.parent).artifacts
    tables = Tables(reader, stage.reads, artifacts)
    items = {i.key: i for i in stage.items(tables)}
    states = None
    if kind_of(stage) != "map":
        rows = reader.query("SELECT path, sha256, bytes FROM artifacts")
        states = States(stage.name, batches, artifacts, rows, getattr(stage, "keeps", "last"))
        done = [b for b in done if states.is_before_known(b)]
    chosen = sorted(rng.sample(done, min(num_batches, len(done))), key=lambda b: b.batch_id)
    last = {key: b.batch_id for b in done for key in b.keys}  # an item that was tried again has its rows from there
    gone = {b.batch_id: [k for k in b.keys if k not in items or last[k] != b.batch_id] for b in chosen}
    reserve = int(resolved.settings.batching.reserve_gb * 1e9)
    accelerator = device.CudaMemory(reserve) if plan.device == "cuda" else Host()
    executor = executor_of(resolved.settings.runtime.executor, accelerator)
    with TemporaryDirectory(prefix="harness-again-") as aside:
        jobs = (
            Job(
                b,
                loaded(stage, tables, [items[k] for k in b.keys if k in items]),
                Path(aside) / str(b.batch_id),
                states.before(b) if states else None,
            )
            for b in chosen
        )
        for outcome in executor.map(stage.setup, partial(compute, stage), jobs):
            batch: Batch = outcome.token
            problems = list(_problems_again(outcome, batch, gone[batch.batch_id], reader, states, tolerance))
            drop_folder(Path(aside) / str(batch.batch_id))
            fine = f"batch {batch.batch_id} of {len(done)}, {len(batch.keys)} items: the same rows"
            yield from checks_of(f"again {stage.name}", problems, fine)


def _problems_again(
    outcome: Outcome, batch: Batch, gone: list[str], reader: Reader, states: States | None, tolerance: float
) -> Iterator[str]:
    where = f"batch {batch.batch_id}"
    if outcome.error or outcome.out_of_memory:
        yield f"{where}: {outcome.error or 'out of memory'}"
        return
    failed = set(reader.failed(batch.stage))
    failing = {f.key: f.message for f in collect(batch, outcome, gone).failures}
    yield from (f"{where}: {key} fails now: {told}" for key, told in failing.items() if key not in failed)
    kept = [key for key in batch.keys if key not in gone]
    yield from (f"{where}: {key} failed in the run and does not now" for key in kept if key in failed - failing.keys())
    without = [key for key in batch.keys if key not in kept or key in failed]
    for table, rows in _rows_of(outcome, collect(batch, outcome, without), {*without, *failing}, states):
        drift = table_drift(table, reader.same_rows(table, rows))
        yield from (f"{where}: {line}" for line in _apart(drift, tolerance, reader.schema))


def _rows_of(
    outcome: Outcome, result: BatchResult, without: set[str], states: States | None
) -> Iterator[tuple[str, list[Row]]]:
    """What the batch would write, by table and columns; files by their hashes."""
    for rows in (result.rows, result.updates):
        for table, given in rows.items():
            alike: dict[tuple[str, ...], list[Row]] = {}
            for row in given:
                alike.setdefault(tuple(row), []).append(row)
            yield from ((table, group) for group in alike.values())
    files = []
    for f in outcome.files:
        path = states.path(outcome.token, f.artifact.path) if f.is_state and states else f.artifact.path
        if f.item not in without and not (
            f.is_state and states and not states.has(path)
        ):  # states may have been let go
            files.append({"path": path, "sha256": f.sha256, "bytes": f.bytes})
    if files:
        yield "artifacts", files


def _apart(drift: TableDrift, tolerance: float, schema: Schema) -> Iterator[str]:
    if drift.only_other and not (tolerance and drift.table in schema.grows):
        yield f"{drift.table}: {drift.only_other} rows of it are not in the run"
    if tolerance and drift.table in schema.derived:
        return
    for c in drift.columns:
        if tolerance and c.column in schema.ranks:
            continue
        if c.scaled > tolerance:
            size = f", by up to {c.max_abs:.2e}" if c.max_abs is not None else ""
            yield f"{drift.table}.{c.column}: {c.num_rows} of {drift.num_rows} rows are not the same{size}; furthest: {c.worst}"
