"""`harness sanity`: the certificate of an experiment (`experiments.certificate`), for any model and input, without a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loguru import logger
from rich.table import Table

from harness import log, store, tally
from harness.commands import launch
from harness.engine import BatchReport, Tables
from harness.errors import SettingsError
from harness.experiments.certificate import MOST_S, NAME, Certificate
from harness.experiments.experiment import Experiment
from harness.settings import ExperimentSettings, Resolved

COLUMNS = ("measurement", "items", "max abs", "max rel", "flips", "near ties", "tolerance", "verdict", "worst item")
_NUMBERS = COLUMNS[1:7]
_SHOWN = 12
"""Names of what was left out that are printed, of each measurement."""


def command(resolved: Resolved, experiment: Experiment, num_subjects: int, *, is_full: bool = False) -> int:
    """Print the certificate for this model and input; 1 where a measurement disagrees, or could not be made."""
    auto = resolved.own(ExperimentSettings).sanity.budget == "auto"
    plan = launch.prepare(_of(resolved, num_subjects), experiment)
    stage = next((s for s in plan.stages if isinstance(s, Certificate)), None)
    if stage is None:
        raise SettingsError(f"experiment {experiment.name} has no certificate: its stage {NAME!r} is none")
    if is_full or auto:
        stage = replace(stage, budget_s=None if is_full else MOST_S)
    tables = Tables.of({**experiment.certify(plan.prepared, num_subjects), "sanity_items": []})
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
        f"Batched against sequential: {plan.slug} {plan.models.identity.dtype} on {plan.device}, "
        f"{num_subjects} subjects, {work.spent_s:.0f} s"
    )
    log.print_out(render(found, title))
    if any(v["num_left_out"] for v in found):
        log.print_out(f"Left out for the budget of {stage.budget_s:g} s; `harness sanity --full` measures it all:")
        log.print_out(*(f"  {v['measurement']}: {shown(v['left_out'])}" for v in found if v["left_out"]))
    return 0 if not failed and all(v["ok"] for v in found) else 1


def _of(resolved: Resolved, num_subjects: int) -> Resolved:
    """The settings with a certificate of so many subjects and no other measurement, whatever stages a run would have."""
    own = resolved.own(ExperimentSettings)
    sanity = own.sanity.model_copy(update={"num_prompts": num_subjects})
    return resolved.with_own(own.model_copy(update={"sanity": sanity, "stages": (NAME,)}))


def render(verdicts: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The certificate as a table for a terminal; `verdicts` are rows of the view `sanity`."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for v in verdicts:
        sizes = ("–" if v[k] is None else f"{v[k]:.1e}" for k in ("max_abs", "max_rel"))
        table.add_row(
            v["measurement"],
            str(v["num_items"]),
            *sizes,
            str(v["flips"]),
            str(v["near_ties"]),
            f"{v['tolerance']:.0e}",
            _verdict(v),
            v["worst"] or "–",
        )
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
