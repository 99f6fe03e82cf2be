"""`harness run`: from resolved settings to a finished run. Everything a run is made of comes together here."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from rich.table import Table

from harness import log
from harness.engine import Engine, Limits, Stage, StageReport
from harness.engine.estimate import Estimate, Forecast, StageEstimate, duration, measure, spread
from harness.engine.executors import Accelerator, Executor, Host, executor_of
from harness.engine.stop import StopNow, StopSignal
from harness.errors import HarnessError, ModelError, RunError, SettingsError, Stopped
from harness.experiments.gravity import stages, summary
from harness.experiments.gravity.conditions import BUILT_IN, Template
from harness.experiments.gravity.inputs import Inputs
from harness.files import is_file, replacing
from harness.models import device, noise
from harness.models.fetch import FETCHABLE, path_of
from harness.models.load import ModelIdentity, ModelSpec, identify, load_codec
from harness.run import (
    Manifest,
    RunPaths,
    choosing,
    environment,
    find_run,
    fingerprint,
    given,
    list_runs,
    locked,
    make_folder,
    new_run,
    new_run_id,
    now_text,
    read_manifest,
)  # fmt: skip
from harness.run.differences import Difference, bit_differences, differences, shortened
from harness.settings import BUNDLED_PROMPTS, DEMO_MODEL, Resolved, Settings, TemplateSettings, nearest
from harness.store import MEASURED, Reader, Store, TableSeal, seal
from harness.text.prompts import PromptSet, read_prompts, take

_CERTIFICATE = "sanity"
_CERTIFICATE_SHARE, _CERTIFICATE_MOST_S = 0.04, 60.0
"""What the certificate may take of a run."""
_LEAST_PROMPTS, _LEAST_WORK = 24, 4e9
"""Prompts, and contexts × parameters, of a run that is long enough for an estimate: 32 contexts of a model with 135 million."""
_TOLD = 4
"""Stages that the line of an estimate names."""


@dataclass(frozen=True)
class Plan:
    """An experiment ready to run: its stages, and everything that decides its results."""

    experiment: str
    stages: tuple[Stage, ...]
    parts: dict[str, Any]
    fingerprint: str
    slug: str
    inputs: Inputs
    prompt_set: PromptSet
    device: str


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


def prepare(resolved: Resolved, experiment: str = "gravity") -> Plan:
    """Check all input and say what would be run. Writes nothing, loads no weights."""
    settings = resolved.settings
    if experiment not in stages.EXPERIMENTS:
        raise SettingsError(
            f"no experiment {experiment!r}{nearest(experiment, list(stages.EXPERIMENTS))}; there are: gravity"
        )
    names = stages.wanted(experiment, settings.experiment.stages)
    conditions = conditions_of(settings)
    for name in settings.experiment.sample_conditions:
        if name not in conditions:
            raise SettingsError(
                f"experiment.sample_conditions: no condition {name!r} in this run{nearest(name, list(conditions))}"
            )
    _check_patched(resolved, conditions)
    where = device.resolve_device(settings.runtime.device)
    prompt_set = read_prompts(prompts_path(settings))
    chosen = take(prompt_set.prompts, settings.data.num_prompts)
    spec = model_spec(settings, where)
    identity = identify(spec)
    if settings.experiment.chat:
        load_codec(spec, identity).chat("")  # refused here rather than once for every item
    given = Inputs(
        chosen,
        conditions,
        spec,
        identity,
        settings.experiment,
        names,
        settings.runtime.seed,
    )
    built = stages.build(experiment, given)
    parts = {
        "experiment": experiment,
        "model": identity.fingerprint(),
        "prompts": {"sha256": _hash_of(sorted(p.row_hash for p in chosen)), "number": len(chosen)},
        "conditions": {name: asdict(t) for name, t in conditions.items()},
        "stages": [{"name": s.name, "version": s.version, **s.params()} for s in built],
        "seed": settings.runtime.seed,
    }
    return Plan(experiment, built, parts, fingerprint(parts), _slug(settings.model.name), given, prompt_set, where)


def _check_patched(resolved: Resolved, conditions: Mapping[str, Template]) -> None:
    """A condition to patch that was asked for must be there; where the default one is not, nothing is patched."""
    name, setting = resolved.settings.experiment.patching.condition, "experiment.patching.condition"
    others = [c for c in conditions if c != "baseline"]
    if setting in resolved.sources and name not in others:
        raise SettingsError(
            f"{setting}: expected a condition of this run other than baseline ({', '.join(others) or 'there is none'}), "
            f"found {name!r}{nearest(name, others)}"
        )


def run(
    resolved: Resolved, experiment: str = "gravity", resume: str = "auto", retry_failed: bool = False,
    argv: list[str] | None = None, is_dry: bool = False,
) -> int:  # fmt: skip
    """The whole command; its exit code. Raises HarnessError for what cannot be started. `is_dry`: say what it would take."""
    plan = prepare(resolved, experiment)
    if is_dry:
        return say_estimate(plan, resolved.settings)
    return start(plan, resolved, resume, retry_failed, argv).code


def say_estimate(plan: Plan, settings: Settings) -> int:
    """Print what a new run would take, stage by stage; the exit code. Writes no run."""
    _say_rejections(plan.prompt_set)
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
        f"{duration(whole.seconds)} in all, as {whole.num_prompts} of {whole.of_prompts} prompts say, which took "
        f"{duration(whole.cost_s)}. What rests on results that are not there yet is an upper bound."
    )


def start(
    plan: Plan, resolved: Resolved, resume: str = "auto", retry_failed: bool = False, argv: list[str] | None = None,
    origin: Origin | None = None,
) -> Ended:  # fmt: skip
    """Start or go on with the run of a plan, to its end. With `origin` it repeats that run."""
    settings = resolved.settings
    here = surroundings(plan, resolved)
    _say_rejections(plan.prompt_set)
    if settings.runtime.device == "auto" and device.is_gpu_unused(plan.device):
        logger.warning("torch sees no GPU: computing on the CPU; in a container add `--gpus all`, see `harness doctor`")
    with ExitStack() as stack:
        with choosing(_root(settings.paths.runs, resume)):
            found = _find_run(settings.paths.runs, plan, resume, origin)
            if found is None:
                content = _manifest(plan, resolved, argv or [], here, origin)
                run_id = new_run_id(plan.slug, plan.fingerprint, datetime.now(UTC))
                paths = stack.enter_context(new_run(settings.paths.runs, run_id, partial(_lay, plan, content)))
            else:
                paths = found
        if found is not None:
            if not retry_failed and _finished(found):
                return Ended(found, _report_finished(found))
            stack.enter_context(locked(found))
            if not retry_failed and _finished(found):  # by another process, since it was looked at
                return Ended(found, _report_finished(found))
        warnings = log.to_file(paths.log)
        store = stack.enter_context(Store(paths.results))
        manifest = Manifest.reopen(paths)
        if found is not None:
            _go_on(paths, store, manifest, here, argv)
        logger.info("run {} ({}), {}", paths.run_id, "continued" if found else "new", _describe(plan))
        code = _execute(plan, settings, paths, store, manifest, retry_failed, warnings)
    if code in (0, 1):
        with Reader(paths.live) as reader:
            manifest = read_manifest(paths)
            log.print_out(*summary.render(summary.summarise(reader, manifest), manifest))
        log.print_out(summary.next_steps(paths.run_id, settings.paths.runs))
    if lost := log.lost_output():
        logger.warning("results could not be printed ({}): see `harness show {}`", lost.strerror or lost, paths.run_id)
    return Ended(paths, code)


def _lay(plan: Plan, content: dict[str, Any], paths: RunPaths, run_id: str) -> None:
    """What a new run has from its first moment: its manifest, a store with what was refused, and a snapshot of it."""
    Manifest.create(paths, content, run_id)
    _write_diff(paths)
    with Store(paths.results) as store:
        for r in plan.prompt_set.rejections:
            store.event("warning", "rejected_prompt", f"row {r.row}: {r.rule}: {r.detail}")
        store.publish(paths.live)


def _go_on(paths: RunPaths, store: Store, manifest: Manifest, here: Mapping[str, Any], argv: list[str] | None) -> None:
    store.event("info", "resume", f"continued by: {' '.join(argv or [])}")
    apart = [d._asdict() for d in bit_differences(manifest.with_changes(), manifest.with_changes(**here))]
    resumed = [*(manifest.get("resumed") or []), {"time": now_text(), "argv": argv, "bit_differences": apart}]
    ended = dict.fromkeys(seal.LAST_KEYS)
    manifest.update(**ended, status="running", heartbeat=now_text(), reason=None, resumed=resumed)
    seal.remove(paths)  # only now: a finished run without its seal could never be sealed again


def _execute(
    plan: Plan, settings: Settings, paths: RunPaths, store: Store, manifest: Manifest, retry_failed: bool,
    warnings: log.WarningCount,
) -> int:  # fmt: skip
    """Run the stages; leave a manifest that tells the truth however it ends."""
    limits = replace(_limits(settings), sizes=manifest.get("recorded_sizes") or {})
    start = time.perf_counter()
    reports: dict[str, Any] = dict(manifest.get("stages") or {})

    def after_stage(report: StageReport) -> None:
        reports[report.name] = asdict(report)
        manifest.update(stages=reports)

    def ended(status: str, **more: Any) -> dict[str, Any]:
        seconds = round(float(manifest.get("seconds") or 0) + time.perf_counter() - start, 3)
        counts = dict(warnings.counts)
        return {"status": status, "ended": now_text(), "seconds": seconds, "warnings": counts, **more}

    def measured() -> dict[str, TableSeal]:
        """Everything, from the estimate to the digests of what was measured."""
        with stop.droppable(), stop.at_once():
            whole = _estimate_once(plan, settings, store, manifest, stop)
        chosen = plan.stages if whole is None else _build(plan, budget_s=_CERTIFICATE_SHARE * _others_s(whole))
        forecast = Forecast(whole, {name: told["seconds"] for name, told in reports.items()})
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
            "{} items failed; see `harness show {}`; `harness run --retry-failed` tries just those",
            failed,
            paths.run_id,
        )
    last = ended(
        "finished",
        num_failed=failed,
        tables={name: table.rows for name, table in tables.items()},
        table_sha256={name: tables[name].sha256 for name in MEASURED},
        sanity=certificate,
    )
    seal.write(paths, tables, manifest.with_changes(**last))
    manifest.update(**last)
    return 1 if failed or not _agrees(certificate) else 0


def _agrees(certificate: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every measurement was made and agrees."""
    return all(v["ok"] for v in certificate)


def _limits(settings: Settings) -> Limits:
    given = settings.batching.max_tokens
    return Limits(given if isinstance(given, int) else None, int(settings.runtime.reserve_disk_gb * 1e9))


def _accelerator(plan: Plan, settings: Settings) -> Accelerator:
    return device.CudaMemory(int(settings.batching.reserve_gb * 1e9)) if plan.device == "cuda" else Host()


def _executor(plan: Plan, settings: Settings) -> Executor:
    return executor_of(settings.runtime.executor, _accelerator(plan, settings))


def _build(plan: Plan, **changes: Any) -> tuple[Stage, ...]:
    """The stages of a plan from other inputs, which decide no result."""
    return stages.build(plan.experiment, replace(plan.inputs, **changes))


def _estimate_once(
    plan: Plan, settings: Settings, store: Store, manifest: Manifest, stop: StopSignal
) -> Estimate | None:
    """The run's estimate: made before its first batch, kept in its manifest. None where the run is too small for one."""
    if (known := manifest.get("estimate")) is not None:
        return Estimate.recorded(known)
    if store.stage_rows() or not _is_long(plan):
        return None
    whole = _estimated(plan, settings, stop)
    manifest.update(estimate=whole.record())
    longest = sorted(whole.stages.items(), key=lambda item: -item[1].seconds)[:_TOLD]
    logger.info(
        "about {} in all: {}; tried on {} of {} prompts in {}",
        duration(whole.seconds),
        ", ".join(f"{name} {duration(s.seconds)}" for name, s in longest),
        whole.num_prompts,
        whole.of_prompts,
        duration(whole.cost_s),
    )
    return whole


def _estimated(plan: Plan, settings: Settings, stop: StopSignal) -> Estimate:
    """The experiment on a few of its prompts, without what is optional and without the certificate, which has a budget."""
    given = plan.inputs
    names = stages.wanted(
        plan.experiment, [n for n in given.stages if n not in (*stages.optional(plan.experiment), _CERTIFICATE)]
    )

    def build(number: int, _: Path) -> tuple[Stage, ...]:
        some = spread(given.prompts, number, lambda p: len(p.question))
        return _build(plan, prompts=tuple(some), stages=names)

    logger.info("trying every stage on a few prompts, to say how long the run takes…")
    logger.disable("harness.engine")  # an item that fails is told of when its turn comes
    try:
        with log.ConsoleProgress() as shown:
            executor = _executor(plan, settings)
            whole = measure(build, len(given.prompts), executor, _limits(settings), stop, shown)
    finally:
        logger.enable("harness.engine")
    if _CERTIFICATE in given.stages:
        seconds = min(_CERTIFICATE_MOST_S, _CERTIFICATE_SHARE * whole.seconds)
        whole = whole.with_stage(_CERTIFICATE, StageEstimate(seconds, 0, 0, 0.0))
    return whole


def _others_s(whole: Estimate) -> float:
    return sum(s.seconds for name, s in whole.stages.items() if name != _CERTIFICATE)


def _is_long(plan: Plan) -> bool:
    contexts = len(plan.inputs.prompts) * len(plan.inputs.conditions)
    weights = int(plan.inputs.identity.about.get("num_parameters") or 0)
    return len(plan.inputs.prompts) >= _LEAST_PROMPTS and contexts * weights >= _LEAST_WORK


def conditions_of(settings: Settings) -> dict[str, Template]:
    """The conditions of this run by name, checked. Own templates stand beside the built-in ones and may replace them."""
    own = {name: _template(t) for name, t in settings.experiment.templates.items()}
    wanted = settings.experiment.conditions
    if isinstance(wanted, dict):
        known = {**BUILT_IN, **own, **{name: _template(t) for name, t in wanted.items()}}
        names = list(known)
    else:
        known, names = {**BUILT_IN, **own}, list(dict.fromkeys(wanted))
    if not names:
        raise SettingsError("experiment.conditions: expected at least one condition, found none")
    for name in names:
        if name not in known:
            raise SettingsError(
                f"experiment.conditions: no condition {name!r}{nearest(name, list(known))}; there are {', '.join(known)}; "
                "write your own under [experiment.templates]"
            )
        known[name].check(name)
    return {name: known[name] for name in names}


def _template(given: TemplateSettings) -> Template:
    return Template(given.text, given.instruction, given.negation)


def prompts_path(settings: Settings) -> Path:
    """The prompt file of these settings; the bundled one where none is named."""
    if settings.data.prompts == BUNDLED_PROMPTS:
        return settings.paths.data_folder / "prompts" / "gravity.jsonl"
    return Path(settings.data.prompts)


def model_spec(settings: Settings, where: str) -> ModelSpec:
    """What to load, with a path in place of the bundled demo model's name, or of a fetched model's.

    Raises ModelError where a model that can be fetched has not been.
    """
    demo = settings.paths.data_folder / "models" / "demo"
    if settings.model.trust_remote_code:
        logger.warning("{}: its own Python may run here: trusted on this command line", settings.model.name)
    name, sha256 = settings.model.name, None
    if name == DEMO_MODEL:
        name = str(demo)
    elif model := FETCHABLE.get(name):
        name, sha256 = str(path_of(name, settings.paths.cache_folder)), model.file_sha256
        if not is_file(Path(name)):
            raise ModelError(
                f"model.name: {settings.model.name!r} is not on this machine yet ({name}); fetch it, once "
                f"({model.package_bytes / 1e6:.0f} MB): harness fetch {settings.model.name}"
            )
    return ModelSpec(
        name,
        settings.model.revision,
        settings.model.dtype,
        where,
        settings.model.trust_remote_code,
        random_tokenizer=demo,
        sha256=sha256,
    )


def _slug(name: str) -> str:
    """What a run of this model is called after: its name, of a path the last part."""
    return Path(name.removesuffix("/")).name.removesuffix(".gguf")


def _root(root: Path, resume: str) -> Path:
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
        if manifest["fingerprint"] != plan.fingerprint:
            changes = differences(manifest.get("fingerprint_parts") or {}, plan.parts)
            told = (
                "; ".join(f"{c.key}: was {shortened(c.old)}, now {shortened(c.new)}" for c in changes) or "its format"
            )
            raise RunError(
                f"run {paths.run_id} cannot be continued with other settings: {told}; it was started by "
                f"`{' '.join(manifest.get('argv') or [])}`; use its settings, or --resume new"
            )
        return paths
    if resume == "new":
        return None
    parent = origin.run_id if origin else None
    same = [
        e
        for e in list_runs(root)
        if e.manifest and e.manifest["fingerprint"] == plan.fingerprint and e.manifest.get("parent") == parent
    ]
    unfinished = [e for e in same if e.manifest and e.manifest.get("status") != "finished"]
    if unfinished or (same and origin is None):
        return (unfinished or same)[0].paths
    return None


def _finished(paths: RunPaths) -> bool:
    return read_manifest(paths).get("status") == "finished"


def _report_finished(paths: RunPaths) -> int:
    manifest = read_manifest(paths)
    failed = int(manifest.get("num_failed") or 0)
    with Reader(paths.live) as reader:
        log.print_out(*summary.render(summary.summarise(reader, manifest), manifest))
    log.print_out(f"Run {paths.run_id} is finished already: nothing to do. (--resume new measures it all again.)")
    if failed:
        log.print_out(f"{failed} items failed; --retry-failed tries just those.")
    return 1 if failed or not _agrees(manifest.get("sanity") or []) else 0


def surroundings(plan: Plan, resolved: Resolved) -> dict[str, Any]:
    """Code, versions, machine and torch's switches, for a manifest. Sets the threads and switches that it tells of."""
    threads = device.set_threads(resolved.settings.runtime.threads)
    numerics = device.be_exact()
    return {
        "code": environment.code(),
        "packages": environment.packages(),
        "lock_sha256": environment.lock_sha256(resolved.settings.paths.data_folder),
        "machine": environment.machine(),
        "device": plan.device,
        "threads": threads,
        "numerics": {**numerics, "attention": "harness (SDPA, explicit where a model soft-caps or has sinks)"},
    }


def _manifest(
    plan: Plan, resolved: Resolved, argv: list[str], here: Mapping[str, Any], origin: Origin | None
) -> dict[str, Any]:
    identity: ModelIdentity = plan.inputs.identity
    values = {name: value for name, value, _ in resolved.rows()}
    return {
        "experiment": plan.experiment,
        "parent": origin.run_id if origin else None,
        "accepted_differences": [d._asdict() for d in origin.accepted] if origin else [],
        "recorded_sizes": dict(origin.sizes) if origin else {},
        "fingerprint": plan.fingerprint,
        "fingerprint_parts": plan.parts,
        "argv": argv,
        "settings": {name: {"value": value, "source": source} for name, value, source in resolved.rows()},
        "given_here": given.mark(values, resolved.settings.paths.state_folder),
        **here,
        "random_numbers": noise.RULE,
        "model": {**{k: v for k, v in asdict(identity).items() if k != "about"}, **identity.about},
        "planted": resolved.settings.model.name == DEMO_MODEL,
        "prompts": {
            "path": str(plan.prompt_set.path), "sha256": plan.prompt_set.sha256, "read": len(plan.prompt_set.prompts),
            "used": len(plan.inputs.prompts), "rejected": dict(Counter(r.rule for r in plan.prompt_set.rejections)),
            "row_hashes": {p.prompt_id: p.row_hash for p in plan.inputs.prompts},
        },
        "stages": {},
    }  # fmt: skip


def _write_diff(paths: RunPaths) -> None:
    diff = environment.tree_diff()
    if diff:
        with replacing(paths.tree_diff) as temporary:
            temporary.write_bytes(diff)


def _describe(plan: Plan) -> str:
    given = plan.inputs
    return (
        f"{len(given.prompts)} prompts × {len(given.conditions)} conditions ({', '.join(given.conditions)}), "
        f"model {plan.slug} {given.identity.dtype} on {plan.device}, stages {', '.join(s.name for s in plan.stages)}"
    )


def _say_rejections(prompt_set: PromptSet) -> None:
    for r in prompt_set.rejections[:20]:
        logger.warning("{} row {}: {}: {}", prompt_set.path.name, r.row, r.rule, r.detail)
    if prompt_set.rejections:
        counts = Counter(r.rule for r in prompt_set.rejections)
        told = ", ".join(f"{n} {rule}" for rule, n in sorted(counts.items()))
        logger.warning("{}: {} rows rejected ({})", prompt_set.path, len(prompt_set.rejections), told)


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def _best_effort() -> Iterator[None]:
    """For what is written on the way down: a second error must not hide the first."""
    try:
        yield
    except (HarnessError, OSError) as e:
        logger.error("and then: {}", e)
