"""`harness bench`: the fast path against the naive one and against other libraries, same model, same items, one process,
results compared. The cases are the experiment's."""

import json
import platform
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from harness import log
from harness.commands import launch
from harness.engine import AnyStage
from harness.errors import SettingsError, nearest
from harness.experiments.experiment import Experiment
from harness.experiments.timing import Course, Figure, Grounds, Timed, disagreements, told
from harness.models import device, processor
from harness.models.load import RANDOM, shared
from harness.settings import Resolved

_SHAPE = "llama-40m"


def command(
    resolved: Resolved,
    experiment: Experiment,
    shape: str | None,
    cases: Sequence[str],
    num_contexts: int,
    out: Path | None,
) -> int:
    """Print the figures of these cases (the usual ones where none is named), and write them to `out` as JSON; 1 where two ways
    do not agree."""
    chosen = _chosen(experiment, cases)
    resolved = _with_model(resolved, shape, takes_two=experiment.other_model == "required")
    device.set_threads(resolved.settings.runtime.threads)
    device.be_exact()
    plan = launch.prepare(resolved, experiment)
    lm = shared(plan.models.spec, plan.models.identity)
    course = Course(lm, processor.gflops(getattr(torch, lm.identity.dtype), where=lm.device))
    grounds = Grounds(
        course, plan.prepared, num_contexts, plan.stages, lambda stages: _run_aside(plan, resolved, stages)
    )
    with course.counting():
        timed: dict[str, Timed] = {name: experiment.benches[name].run(grounds) for name in chosen}
    figures = [f for t in timed.values() for f in t.figures]
    about = _about(course, plan, num_contexts)
    if figures:
        log.print_out(_table(figures, ", ".join(f"{k} {v}" for k, v in about.items())))
        log.print_out("ratio: its seconds to those of a case's first way; of max: of the machine's own matrix product")
    log.print_out(*(line for t in timed.values() for line in t.lines), *course.skipped)
    wrong = disagreements(figures, lm.identity.dtype)
    if out is not None:
        found: dict[str, Any] = {"about": about, "skipped": course.skipped, "disagreements": wrong}
        for t in timed.values():
            found |= t.found
        text = json.dumps(found | {"figures": [asdict(f) for f in figures]}, indent=2, ensure_ascii=False)
        out.write_text(text + "\n", "utf-8")
    log.print_out(*(f"DISAGREES {line}" for line in wrong))
    return 1 if wrong else 0


def _chosen(experiment: Experiment, cases: Sequence[str]) -> tuple[str, ...]:
    known = experiment.benches
    for name in cases:
        if name not in known:
            raise SettingsError(
                f"--stage {name}: {experiment.name} has no such case{nearest(name, list(known))}; "
                f"there are {', '.join(known) or 'none'}"
            )
    return tuple(dict.fromkeys(cases)) or tuple(name for name, case in known.items() if case.usual)


def _with_model(resolved: Resolved, shape: str | None, *, takes_two: bool = False) -> Resolved:
    """The settings with the model to time: a shape that was asked for, else the model that was named, else the usual shape."""
    source = resolved.sources.get("model.name", "")
    if shape is None and source:
        return resolved
    if shape is not None and source.startswith("flag"):
        raise SettingsError(
            f"--shape {shape}, --model {resolved.settings.model.name}: expected one of them; a shape is the model random:{shape}"
        )
    settings = resolved.settings
    named = {"name": f"{RANDOM}{shape or _SHAPE}"}
    change: dict[str, Any] = {"model": settings.model.model_copy(update=named)}
    if takes_two:
        change["other"] = settings.other.model_copy(update=named)
    return replace(resolved, settings=settings.model_copy(update=change))


def _run_aside(plan: launch.Plan, resolved: Resolved, stages: Sequence[AnyStage]) -> int:
    with tempfile.TemporaryDirectory(prefix="harness-") as folder, redirect_stdout(StringIO()):
        settings = resolved.settings
        paths = settings.paths.model_copy(update={"runs": Path(folder)})
        aside = replace(resolved, settings=settings.model_copy(update={"paths": paths}))
        return launch.start(replace(plan, stages=tuple(stages)), aside, resume="new").code


def _table(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    columns = ("stage", "way", "s", "CPU s", "tokens", "tokens/s", "new/s", "GFLOP/s", "of max", "ratio", "apart")
    for column in columns:
        is_text = column in ("stage", "way")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "way")
    for f in figures:
        work = (f"{f.tokens:,.0f}", f"{f.tokens / f.seconds:,.0f}", f"{f.gflops:,.0f}", f"{f.of_product:.0%}")
        tokens, rate, gflops, share = work if f.tokens else ("?", "", "", "")
        table.add_row(
            f.stage,
            f.way,
            f"{f.seconds:.2f}",
            f"{f.cpu_seconds:.2f}",
            tokens,
            rate,
            f"{f.new_tokens / f.seconds:,.0f}" if f.new_tokens else "",
            gflops,
            share,
            f"{f.speedup:.2f}" if f.speedup < 1.5 else f"{f.speedup:.1f}",
            told(f),
        )
    return table


def _about(course: Course, plan: launch.Plan, num_contexts: int) -> dict[str, Any]:
    lm = course.lm
    is_gpu = lm.device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else f"{platform.machine()} {torch.get_num_threads()} threads"
    return {
        "model": plan.slug,
        "parameters": f"{sum(p.numel() for p in lm.model.parameters()) / 1e6:.0f}M",
        "dtype": lm.identity.dtype,
        "device": name,
        "torch": torch.__version__,
        "contexts": num_contexts,
        "matrix product": f"{course.product_gflops:,.0f} GFLOP/s",
    }
