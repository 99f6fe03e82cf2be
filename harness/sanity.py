"""`harness sanity`: the certificate of `harness.stages.sanity`, for any model and prompts, without a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from harness import launch, log
from harness.models.load import load, load_codec
from harness.settings import Resolved
from harness.stages.prompts import context_row
from harness.stages.sanity import CHECKS, HALF, Sampler, Subject, repeat_wider, subjects_of

COLUMNS = ("measurement", "items", "max abs", "max rel", "flips", "near ties", "tolerance", "verdict", "worst item")


def command(resolved: Resolved, num_prompts: int) -> int:
    """Print the certificate for this model and these prompts; 1 where a measurement disagrees."""
    plan = launch.prepare(resolved)
    spec, identity = plan.inputs.model, plan.inputs.identity
    lm = load(spec, identity)
    subjects = make_subjects(plan, num_prompts)
    sampler = Sampler.of(resolved.settings.experiment)
    verdicts = []
    for group in CHECKS.values():
        found = group(lm, subjects, sampler)
        verdicts += repeat_wider(spec, found, group, subjects, sampler) if identity.dtype in HALF else found
    title = f"Batched against sequential: {plan.slug} {identity.dtype} on {plan.device}, {len(subjects)} contexts"
    log.print_out(render([vars(v) for v in verdicts], title))
    return 0 if all(v.ok for v in verdicts) else 1


def make_subjects(plan: launch.Plan, num_prompts: int) -> list[Subject]:
    """The first prompts of the plan in all its conditions."""
    given = plan.inputs
    codec = load_codec(given.model, given.identity)
    prompts = given.prompts[:num_prompts]
    rows = [
        context_row(codec, prompt, name, template, given.experiment.chat)
        for prompt in prompts
        for name, template in given.conditions.items()
    ]
    return subjects_of(rows, {p.prompt_id: p.target for p in prompts}, codec, given.seed)


def render(verdicts: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The certificate as a table for a terminal; `verdicts` are rows of the table `sanity`."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("measurement", "verdict", "worst item") else "right")
    for v in verdicts:
        verdict = ("ok" if v["ok"] else "DISAGREES") + (f" ({v['repeated']})" if v["repeated"] else "")
        table.add_row(
            v["measurement"], str(v["num_items"]), f"{v['max_abs']:.1e}", f"{v['max_rel']:.1e}", str(v["flips"]),
            str(v["near_ties"]), f"{v['tolerance']:.0e}", verdict, v["worst"],
        )  # fmt: skip
    return table
