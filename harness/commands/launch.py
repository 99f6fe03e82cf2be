"""A run of any experiment, from resolved settings to its end. Everything a run is made of comes together here.

Knows no experiment by name.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from rich.table import Table

from harness import environment, log
from harness.commands import given, show
from harness.engine import AnyStage, Engine, Limits, StageReport
from harness.engine.estimate import Estimate, Forecast, StageEstimate, duration, measure
from harness.engine.executors import Accelerator, Executor, Host, executor_of
from harness.engine.stop import StopNow, StopSignal
from harness.errors import HarnessError, RunError, SettingsError, Stopped
from harness.experiments import registry
from harness.experiments.certificate import MOST_S as CERTIFICATE_MOST_S
from harness.experiments.certificate import NAME as CERTIFICATE
from harness.experiments.certificate import Certificate
from harness.experiments.experiment import Contents, Experiment, Prepared
from harness.experiments.remarks import agrees
from harness.experiments.weights import Models, slug_of, told_of
from harness.files import replacing
from harness.models import device, noise
from harness.run import (
    ManifestFile,
    RunPaths,
    choosing,
    find_run,
    fingerprint,
    list_runs,
    locked,
    make_folder,
    new_run,
    new_run_id,
    now_text,
    read_manifest,
)
from harness.run.differences import Difference, bit_differences, differences, shortened
from harness.settings import ExperimentSettings, Resolved, Settings
from harness.store import Store, TableSeal, seal

_CERTIFICATE_SHARE = 0.04
"""What the certificate may take of a run."""
_LEAST_SUBJECTS, _LEAST_WORK = 24, 4e9
"""Subjects, and contexts × parameters, of a run that is long enough for an estimate: 32 contexts of a model with 135 million."""
_TOLD = 4
"""Stages that the line of an estimate names."""


@dataclass(frozen=True)
class Plan:
    """An experiment ready to run: its stages, and everything that decides its results."""

    experiment: Experiment
    stages: tuple[AnyStage, ...]
    parts: dict[str, Any]
    fingerprint: str
    slug: str
    prepared: Prepared
    models: Models

    @property
    def device(self) -> str:
        return self.models.device

    @property
    def inputs(self) -> Any:
        """What the stages are built from: the experiment's own."""
        return self.prepared.given


@dataclass(frozen=True)
class Origin:
    """The run that another one repeats, what is known not to be as it was, and how its stages were cut into batches."""

    run_id: str
    accepted: tuple[Difference, ...] = ()
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Ended(NamedTuple):
    """A run that has come to its end, and the exit code that tells how."""

    paths: RunPaths
    code: int


def prepare(resolved: Resolved, experiment: Experiment) -> Plan:
    """Check all input and say what would be run. Writes nothing, loads no weights."""
    settings = resolved.settings
    names = Contents(experiment).wanted(resolved.own(ExperimentSettings).stages)
    _check_other(settings, experiment)
    models = Models(settings, device.resolve_device(settings.runtime.device))
    prepared = experiment.prepare(resolved, models, names)
    built = Contents(experiment).build(prepared.given, names)
    other = models.other_identity
    parts = {
        "experiment": experiment.name,
        "model": models.identity.fingerprint(),
        **({"other": other.fingerprint()} if other is not None else {}),
        **prepared.parts,
        "stages": [{"name": s.name, "version": s.version, **s.params()} for s in built],
        "seed": settings.runtime.seed,
    }
    return Plan(experiment, built, parts, fingerprint(parts), slug_of(settings.model.name), prepared, models)


def _check_other(settings: Settings, experiment: Experiment) -> None:
    name = settings.other.name
    if name and experiment.other_model == "none":
        raise SettingsError(f"--other {name}: experiment {experiment.name} takes one model; leave it out")
    if not name and experiment.other_model == "required":
        raise SettingsError(f"experiment {experiment.name} compares two models: name the second one with --other")


def say_estimate(plan: Plan, settings: Settings) -> int:
    """Print what a new run would take, stage by stage; the exit code. Writes no run."""
    _warn(plan)
    logger.info("a new run would be {}", _describe(plan))
    with StopSignal() as stop, stop.droppable(), stop.at_once():
        whole = _estimated(plan, settings, stop)
    log.print_out(*estimate_table(whole))
    return 0


def estimate_table(whole: Estimate) -> Iterator[object]:
    """An estimate for people: a row a stage, and what it rests on."""
    table = Table(title="Estimate", title_justify="left")
    for column in ("stage", "items", "tokens", "time", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, s in whole.stages.items():
        items, tokens = (f"{n:,}" if n else "" for n in (s.items, s.tokens))
        table.add_row(name, items, tokens, duration(s.seconds), f"{s.seconds / (whole.seconds or 1):.0%}")
    yield table
    yield (
        f"{duration(whole.seconds)} in all, as {whole.num_subjects} of {whole.of_subjects} subjects say, which took "
        f"{duration(whole.cost_s)}. What rests on results that are not there yet is an upper bound."
    )


def start(
    plan: Plan,
    resolved: Resolved,
    resume: str = "auto",
    retry_failed: bool = False,
    argv: list[str] | None = None,
    origin: Origin | None = None,
    asked_sha256: str | None = None,
) -> Ended:
    """Start or go on with the run of a plan, to its end. With `origin` it repeats that run. `asked_sha256`: by which the same
    command is recognised once the run is finished, see `asked`."""
    settings = resolved.settings
    here = surroundings(plan.experiment.name, plan.device, resolved)
    _warn(plan)
    if settings.runtime.device == "auto" and device.is_gpu_unused(plan.device):
        logger.warning("torch sees no GPU: computing on the CPU; in a container add `--gpus all`, see `harness doctor`")
    with ExitStack() as stack:
        with choosing(root_of(settings.paths.runs, resume)):
            found = _find_run(settings.paths.runs, plan, resume, origin)
            if found is None:
                content = content_of(plan.experiment.name, plan.parts, plan.models, resolved, argv or [], here, origin)
                content["asked_sha256"] = asked_sha256
                run_id = new_run_id(plan.slug, plan.fingerprint, datetime.now(UTC))
                paths = stack.enter_context(new_run(settings.paths.runs, run_id, partial(_lay, plan, content)))
            else:
                paths = found
        if found is not None:
            if not retry_failed and _finished(found):
                return Ended(found, show.print_finished(plan.experiment, found))
            stack.enter_context(locked(found))
            if not retry_failed and _finished(found):  # by another process, since it was looked at
                return Ended(found, show.print_finished(plan.experiment, found))
        warnings = log.to_file(paths.log)
        store = stack.enter_context(Store(paths.results, plan.experiment.schema))
        manifest = ManifestFile.reopen(paths)
        if found is not None:
            _go_on(paths, store, manifest, here, argv, asked_sha256)
        logger.info("run {} ({}), {}", paths.run_id, "continued" if found else "new", _describe(plan))
        code = _execute(plan, settings, paths, store, manifest, retry_failed, warnings)
    if code in (0, 1):
        log.print_out(
            *show.headlines_of(plan.experiment, paths),
            _next_steps(plan.experiment.name, paths.run_id, settings.paths.runs),
        )
    if lost := log.lost_output():
        logger.warning("results could not be printed ({}): see `harness show {}`", lost.strerror or lost, paths.run_id)
    return Ended(paths, code)


def _lay(plan: Plan, content: dict[str, Any], paths: RunPaths, run_id: str) -> None:
    """What a new run has from its first moment: its manifest, a store with what was refused, and a snapshot of it."""
    ManifestFile.create(paths, content, run_id, plan.prepared.facts)
    write_diff(paths)
    with Store(paths.results, plan.experiment.schema) as store:
        for kind, message in plan.prepared.events:
            store.event("warning", kind, message)
        store.publish(paths.live)


def _go_on(
    paths: RunPaths,
    store: Store,
    manifest: ManifestFile,
    here: Mapping[str, Any],
    argv: list[str] | None,
    asked_sha256: str | None,
) -> None:
    store.event("info", "resume", f"continued by: {' '.join(argv or [])}")
    was, now = manifest.now.tree, manifest.with_changes(**here).tree
    apart = [d._asdict() for d in bit_differences(was, now)]
    resumed = [*(was.get("resumed") or []), {"time": now_text(), "argv": argv, "bit_differences": apart}]
    ended = dict.fromkeys(seal.LAST_KEYS)
    manifest.update(
        asked_sha256=asked_sha256, **ended, status="running", heartbeat=now_text(), reason=None, resumed=resumed
    )
    seal.remove(paths)  # only now: a finished run without its seal could never be sealed again


def _execute(
    plan: Plan,
    settings: Settings,
    paths: RunPaths,
    store: Store,
    manifest: ManifestFile,
    retry_failed: bool,
    warnings: log.WarningCount,
) -> int:
    """Run the stages; leave a manifest that tells the truth however it ends."""
    limits = replace(_limits(settings), sizes=manifest.now.recorded_sizes)
    start = time.perf_counter()
    reports: dict[str, Any] = dict(manifest.now.part("stages"))

    def after_stage(report: StageReport) -> None:
        reports[report.name] = asdict(report)
        manifest.update(stages=reports)

    def ended(status: str, **more: Any) -> dict[str, Any]:
        seconds = round((manifest.now.seconds or 0.0) + time.perf_counter() - start, 3)
        counts = dict(warnings.counts)
        return {"status": status, "ended": now_text(), "seconds": seconds, "warnings": counts, **more}

    def measured() -> dict[str, TableSeal]:
        """Everything, from the estimate to the digests of what was measured."""
        with stop.droppable(), stop.at_once():
            whole = _estimate_once(plan, settings, store, manifest, stop)
        chosen = plan.stages if whole is None else _within(plan.stages, _CERTIFICATE_SHARE * _others_s(whole))
        known_s = {name: stage.seconds for name, stage in manifest.now.stages.items() if stage.seconds is not None}
        forecast = Forecast(whole, known_s)
        rates = {n: s.seconds / s.length for n, s in whole.stages.items() if s.length} if whole else {}
        with log.ConsoleProgress(forecast) as progress:
            engine = Engine(store, paths, _executor(plan, settings), replace(limits, rates=rates), progress, stop)
            engine.run(chosen, after_stage, retry_failed)
            progress.doing("all stages", "making a digest of every row")
            with stop.droppable(), stop.at_once():
                store.publish(paths.live)
                return store.seal(paths.row_digests)

    store.publish(paths.live)
    stop = StopSignal()
    try:
        with stop, manifest.beating():
            try:
                tables = measured()
            except (Stopped, StopNow) as e:  # in here: a further signal must not cut short what is written now
                store.publish(paths.live)
                manifest.update(**ended("interrupted", reason=str(e)))
                logger.warning("{}; nothing is lost: type the same command again to go on with {}", e, paths.run_id)
                return Stopped.exit_code
    except BaseException as e:
        logger.error("run {} stopped: {}", paths.run_id, e)
        with _best_effort():
            manifest.update(**ended("failed", reason=f"{type(e).__name__}: {e}"))
        with _best_effort():
            store.publish(paths.live)
        raise
    failed = sum(r["num_failed"] for r in store.stage_rows())
    certificate = store.table("sanity")
    apart = [v["measurement"] for v in certificate if v["ok"] is False]
    if apart:
        logger.error(
            "the fast path and the plain reference disagree on {}: do not trust this run; see `harness show {}`",
            ", ".join(apart),
            paths.run_id,
        )
    if failed:
        logger.error(
            "{} items failed; see `harness show {}`; `{} --retry-failed` tries just those",
            failed,
            paths.run_id,
            registry.run_command(plan.experiment.name),
        )
    last = ended(
        "finished",
        num_failed=failed,
        tables={name: table.rows for name, table in tables.items()},
        table_sha256={name: tables[name].sha256 for name in plan.experiment.schema.measured},
        sanity=certificate,
    )
    seal.write(paths, plan.experiment.schema, tables, manifest.with_changes(**last).tree)
    manifest.update(**last)
    return 1 if failed or not agrees(certificate) else 0


def _limits(settings: Settings) -> Limits:
    given = settings.batching.max_tokens
    return Limits(given if isinstance(given, int) else None, int(settings.runtime.reserve_disk_gb * 1e9))


def _accelerator(plan: Plan, settings: Settings) -> Accelerator:
    return device.CudaMemory(int(settings.batching.reserve_gb * 1e9)) if plan.device == "cuda" else Host()


def _executor(plan: Plan, settings: Settings) -> Executor:
    return executor_of(settings.runtime.executor, _accelerator(plan, settings))


def _within(stages: Sequence[AnyStage], seconds: float) -> tuple[AnyStage, ...]:
    """The stages, the certificate among them with what it may take of the run."""
    return tuple(s.within(seconds) if isinstance(s, Certificate) else s for s in stages)


def _estimate_once(
    plan: Plan, settings: Settings, store: Store, manifest: ManifestFile, stop: StopSignal
) -> Estimate | None:
    """The run's estimate: made before its first batch, kept in its manifest. None where the run is too small for one."""
    if (known := manifest.now.estimate) is not None:
        return Estimate.recorded(known)
    if store.stage_rows() or not _is_long(plan):
        return None
    whole = _estimated(plan, settings, stop)
    manifest.update(estimate=whole.record())
    longest = sorted(whole.stages.items(), key=lambda item: -item[1].seconds)[:_TOLD]
    logger.info(
        "about {} in all: {}; tried on {} of {} subjects in {}",
        duration(whole.seconds),
        ", ".join(f"{name} {duration(s.seconds)}" for name, s in longest),
        whole.num_subjects,
        whole.of_subjects,
        duration(whole.cost_s),
    )
    return whole


def _estimated(plan: Plan, settings: Settings, stop: StopSignal) -> Estimate:
    """The experiment on a few of its subjects, without what is optional and without the certificate, which has a budget."""
    contents, prepared = Contents(plan.experiment), plan.prepared
    asked = [s.name for s in plan.stages if s.name not in (*contents.optional, CERTIFICATE)]
    names = contents.wanted(asked) if asked else ()

    def build(number: int) -> tuple[AnyStage, ...]:
        return contents.build(prepared.some(number, names), names)

    logger.info("trying every stage on a few subjects, to say how long the run takes…")
    logger.disable("harness.engine")  # an item that fails is told of when its turn comes
    try:
        with log.ConsoleProgress() as shown:
            executor = _executor(plan, settings)
            whole = measure(
                build, plan.experiment.schema, prepared.num_subjects, executor, _limits(settings), stop, shown
            )
    finally:
        logger.enable("harness.engine")
    if any(s.name == CERTIFICATE for s in plan.stages):
        seconds = min(CERTIFICATE_MOST_S, _CERTIFICATE_SHARE * whole.seconds)
        whole = whole.with_stage(CERTIFICATE, StageEstimate(seconds, 0, 0, 0.0))
    return whole


def _others_s(whole: Estimate) -> float:
    return sum(s.seconds for name, s in whole.stages.items() if name != CERTIFICATE)


def _is_long(plan: Plan) -> bool:
    weights = int(plan.models.identity.about.get("num_parameters") or 0)
    return plan.prepared.num_subjects >= _LEAST_SUBJECTS and plan.prepared.num_contexts * weights >= _LEAST_WORK


def root_of(root: Path, resume: str) -> Path:
    """The folder of runs, made where it is missing and a run may be new."""
    if resume not in ("auto", "new"):
        find_run(root, resume)
    if "?" in str(root.resolve()):
        raise RunError(f"paths.runs: {root}: DuckDB cannot keep a store under a path with a question mark; rename it")
    make_folder(root)
    return root


def _find_run(root: Path, plan: Plan, resume: str, origin: Origin | None) -> RunPaths | None:
    """The run to go on with; None where a new one is to be made. A run that repeats another one goes on only as that."""
    if resume not in ("auto", "new"):
        paths = find_run(root, resume)
        manifest = read_manifest(paths)
        if manifest.kind is not None:
            raise RunError(f"run {paths.run_id} holds what a service was asked: there is nothing in it to go on with")
        if manifest.fingerprint != plan.fingerprint:
            changes = differences(manifest.part("fingerprint_parts"), plan.parts)
            told = (
                "; ".join(f"{c.key}: was {shortened(c.old)}, now {shortened(c.new)}" for c in changes) or "its format"
            )
            raise RunError(
                f"run {paths.run_id} cannot be continued with other settings: {told}; it was started by "
                f"`{' '.join(manifest.argv)}`; use its settings, or --resume new"
            )
        return paths
    if resume == "new":
        return None
    parent = origin.run_id if origin else None
    same = [
        e
        for e in list_runs(root)
        if e.manifest and e.manifest.fingerprint == plan.fingerprint and e.manifest.parent == parent
    ]
    unfinished = [e for e in same if e.manifest and e.manifest.status != "finished"]
    if unfinished or (same and origin is None):
        return (unfinished or same)[0].paths
    return None


def _finished(paths: RunPaths) -> bool:
    return read_manifest(paths).status == "finished"


def surroundings(experiment: str, device_name: str, resolved: Resolved) -> dict[str, Any]:
    """Code, versions, machine and torch's switches, for a manifest. Sets the threads and switches that it tells of."""
    threads = device.set_threads(resolved.settings.runtime.threads)
    numerics = device.be_exact()
    return {
        "code": environment.code(registry.folder_outside(experiment)),
        "packages": environment.packages(),
        "lock_sha256": environment.lock_sha256(resolved.settings.paths.data_folder),
        "machine": environment.machine(),
        "device": device_name,
        "threads": threads,
        "numerics": {**numerics, "attention": "harness (SDPA, explicit where a model soft-caps or has sinks)"},
    }


def content_of(
    experiment: str,
    parts: Mapping[str, Any],
    models: Models,
    resolved: Resolved,
    argv: list[str],
    here: Mapping[str, Any],
    origin: Origin | None = None,
) -> dict[str, Any]:
    """What the manifest of a new run begins with: `parts` decide its results, `here` are its `surroundings`."""
    values = {name: value for name, value, _ in resolved.rows()}
    other = models.other_identity
    return {
        "experiment": experiment,
        "parent": origin.run_id if origin else None,
        "accepted_differences": [d._asdict() for d in origin.accepted] if origin else [],
        "recorded_sizes": dict(origin.sizes) if origin else {},
        "fingerprint": fingerprint(parts),
        "fingerprint_parts": parts,
        "argv": argv,
        "settings": {name: {"value": value, "source": source} for name, value, source in resolved.rows()},
        "given_here": given.mark(values, resolved.settings.paths.state_folder),
        **here,
        "random_numbers": noise.RULE,
        "model": told_of(models.identity),
        **({"other": told_of(other)} if other is not None else {}),
    }


def write_diff(paths: RunPaths) -> None:
    """Keep the uncommitted changes of the code that runs, where there are any."""
    diff = environment.tree_diff()
    if diff:
        with replacing(paths.tree_diff) as temporary:
            temporary.write_bytes(diff)


def _describe(plan: Plan) -> str:
    other = plan.models.settings.other.name
    against = f" and {slug_of(other)}" if other else ""
    return (
        f"{plan.prepared.about}, model {plan.slug}{against} {plan.models.identity.dtype} on {plan.device}, "
        f"stages {', '.join(s.name for s in plan.stages)}"
    )


def _warn(plan: Plan) -> None:
    for line in plan.prepared.warnings:
        logger.warning("{}", line)


def _next_steps(experiment: str, run_id: str, runs: Path) -> str:
    """Where to look next, for somebody who has just seen a run end."""
    return (
        f"Results are in {runs / run_id}. Next: `harness report {run_id}` (one page with every figure), "
        f"`harness export {run_id} --to DIR --format parquet`, or another model: "
        f"`{registry.run_command(experiment)} --model ID_OR_PATH`."
    )


@contextmanager
def _best_effort() -> Iterator[None]:
    """For what is written on the way down: a second error must not hide the first."""
    try:
        yield
    except (HarnessError, OSError) as e:
        logger.error("and then: {}", e)
