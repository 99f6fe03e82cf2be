"""`harness sanity`: the certificate of `harness.stages.sanity`, for any model and prompts, without a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loguru import logger
from rich.table import Table

from harness import log, store, tally
from harness.commands import launch
from harness.engine import BatchReport, Tables
from harness.experiments.gravity.certificate import MOST_S, Sanity, Subject, subjects_of
from harness.experiments.gravity.stages.prompts import context_row
from harness.models.load import load_codec
from harness.settings import Resolved

COLUMNS = ("measurement", "items", "max abs", "max rel", "flips", "near ties", "tolerance", "verdict", "worst item")
_NUMBERS = COLUMNS[1:7]
_SHOWN = 12
"""Names of what was left out that are printed, of each measurement."""


def command(resolved: Resolved, num_prompts: int, *, is_full: bool = False) -> int:
    """Print the certificate for this model and these prompts; 1 where a measurement disagrees, or could not be made."""
    plan = launch.prepare(resolved)
    auto = resolved.settings.experiment.sanity.budget == "auto"
    stage = replace(Sanity.build(plan.inputs), num_prompts=num_prompts)
    if is_full or auto:
        stage = replace(stage, budget_s=None if is_full else MOST_S)
    tables = make_tables(plan, num_prompts)
    items, rows, failed = stage.items(tables), [], 0
    with log.ConsoleProgress() as progress:
        progress.stage_started(stage.name, len(items), 0, float(sum(i.length for i in items)), 0.0)
        work = stage.setup()
        for item in items:
            start, before = stage.clock(), tally.now()
            (result,) = stage.run(work, [item])
            rows += result.rows.get("sanity_items", [])
            failed += result.error is not None
            if result.error is not None:
                logger.error("{} failed on {}: {}", stage.name, item.key, result.error)
            tokens = round((tally.now() - before).tokens)
            progress.batch_done(BatchReport(stage.name, 1, float(item.length), tokens, stage.clock() - start, 0))
        progress.stage_finished(stage.name)
    found = store.certificate(rows)
    title = (
        f"Batched against sequential: {plan.slug} {plan.inputs.identity.dtype} on {plan.device}, "
        f"{len(tables['contexts'])} contexts, {work.spent_s:.0f} s"
    )
    log.print_out(render(found, title))
    if any(v["num_left_out"] for v in found):
        log.print_out(f"Left out for the budget of {stage.budget_s:g} s; `harness sanity --full` measures it all:")
        log.print_out(*(f"  {v['measurement']}: {shown(v['left_out'])}" for v in found if v["left_out"]))
    return 0 if not failed and all(v["ok"] for v in found) else 1


def make_tables(plan: launch.Plan, num_prompts: int) -> Tables:
    """What the stage reads, for the first prompts of the plan in all its conditions."""
    given = plan.inputs
    codec = load_codec(given.model, given.identity)
    prompts = given.prompts[:num_prompts]
    contexts = [
        context_row(codec, prompt, name, template, given.experiment.chat)
        for prompt in prompts
        for name, template in given.conditions.items()
    ]
    told = [{"prompt_id": p.prompt_id, "target": p.target} for p in prompts]
    return Tables.of({"prompts": told, "contexts": contexts, "sanity_items": []})


def make_subjects(plan: launch.Plan, num_prompts: int) -> list[Subject]:
    """The first prompts of the plan in all its conditions."""
    tables = make_tables(plan, num_prompts)
    codec = load_codec(plan.inputs.model, plan.inputs.identity)
    targets = {p["prompt_id"]: p["target"] for p in tables["prompts"]}
    return subjects_of(tables["contexts"], targets, codec, plan.inputs.seed)


def render(verdicts: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The certificate as a table for a terminal; `verdicts` are rows of the view `sanity`."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for v in verdicts:
        sizes = ("–" if v[k] is None else f"{v[k]:.1e}" for k in ("max_abs", "max_rel"))
        table.add_row(
            v["measurement"], str(v["num_items"]), *sizes, str(v["flips"]), str(v["near_ties"]), f"{v['tolerance']:.0e}",
            _verdict(v), v["worst"] or "–",
        )  # fmt: skip
    return table


def _verdict(row: Mapping[str, Any]) -> str:
    if row["ok"] is None:
        return "left out"
    notes = [row["repeated"] or "", f"{row['num_left_out']} left out" if row["num_left_out"] else ""]
    told = "; ".join(filter(None, notes))
    return ("ok" if row["ok"] else "DISAGREES") + (f" ({told})" if told else "")


def shown(names: Sequence[str]) -> str:
    """The first of some names, and how many there are more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
