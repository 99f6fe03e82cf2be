"""`harness sanity`: every measurement of the fast path against a deliberately plain reference, on a few prompts.

The reference (harness/models/plain.py) takes one prompt at a time, without padding, cache sharing or our attention.
Each measurement is made at several batch sizes and compared item by item.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from harness import launch, log
from harness.errors import ItemFailed
from harness.models import plain
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.load import LM, load
from harness.models.noise import row_key
from harness.models.score import TreeScores, score_trees
from harness.settings import Resolved
from harness.stages.psem import measures
from harness.text.words import WordForms, word_forms

TOLERANCE = {"float64": (1e-6, 1e-6), "float32": (5e-5, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-2, 1e-2)}
"""Per dtype: absolute, on log-probabilities; absolute, on probabilities (harness.md §8).

Float64 is no tighter than 1e-6: the families' own eager softmax and norms, which are the reference, run in float32."""
BATCH_SIZES = (1, 3, 16)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """One context to measure: its key, ids and the spellings of its target."""

    key: str
    token_ids: tuple[int, ...]
    forms: WordForms
    noise_key: int


@dataclass(frozen=True)
class Verdict:
    """How one measurement came out.

    `max_rel` is relative to the reference. For tokens, `flips` counts completions that differ and `near_ties` those of
    them whose first different token was a tie within the tolerance: noise, not a bug.
    """

    measurement: str
    num_items: int
    max_abs: float
    max_rel: float
    flips: int
    near_ties: int
    tolerance: float
    worst: str
    ok: bool


def check(
    lm: LM, subjects: Sequence[Subject], sampling: Sequence[tuple[str, Sampling]], seed: int = 0
) -> list[Verdict]:
    """Verdicts of every measurement; nothing is raised, so that all are seen."""
    of_logs, of_probs = TOLERANCE[lm.identity.dtype]
    reference = {s.key: _plain_scores(lm, s) for s in subjects}
    fast: dict[str, list[dict[str, Any]]] = {s.key: [] for s in subjects}
    for size in BATCH_SIZES:
        for batch in _cut(subjects, size):
            for subject, score in zip(
                batch, score_trees(lm, [s.token_ids for s in batch], [s.forms.trie for s in batch]), strict=True
            ):
                fast[subject.key].append(_row(subject.forms, score))
    verdicts = [
        _compare(column, subjects, reference, fast, tolerance)
        for column, tolerance in (
            ("p_sem", of_probs), ("p_word", of_probs), ("paper_p_sem", of_probs), ("logprobs", of_logs), ("entropy", of_logs),
        )
    ]  # fmt: skip
    return [*verdicts, *(_compare_tokens(lm, subjects, name, how, of_logs) for name, how in sampling)]


def command(resolved: Resolved, num_prompts: int) -> int:
    """Print the certificate for this model and these prompts; 1 where a measurement disagrees."""
    plan = launch.prepare(resolved)
    lm = load(plan.inputs.model, plan.inputs.identity)
    subjects = list(subjects_of(lm, plan, num_prompts))
    e = resolved.settings.experiment
    sampling = [
        ("greedy", Sampling(e.max_new_tokens_greedy, 0.0, 1.0, e.stop_at_newline)),
        ("samples", Sampling(e.max_new_tokens_samples, e.temperature, e.top_p, e.stop_at_newline)),
    ]
    verdicts = check(lm, subjects, sampling)
    log.print_out(
        render(verdicts, f"{plan.slug} {plan.inputs.identity.dtype} on {plan.device}, {len(subjects)} contexts")
    )
    return 0 if all(v.ok for v in verdicts) else 1


def subjects_of(lm: LM, plan: "launch.Plan", num_prompts: int) -> Iterator[Subject]:
    """The first prompts of the plan in all its conditions."""
    for prompt in plan.inputs.prompts[:num_prompts]:
        forms = word_forms(prompt.target, lm.codec)
        for name, template in plan.inputs.conditions.items():
            token_ids = tuple(lm.codec.context(template.render(prompt))[0])
            yield Subject(
                f"{prompt.prompt_id}|{name}", token_ids, forms, row_key(plan.inputs.seed, prompt.prompt_id, name, 0)
            )


def render(verdicts: Sequence[Verdict], title: str) -> Table:
    """The certificate as a table for a terminal."""
    table = Table(title=f"Batched against sequential: {title}", title_justify="left")
    for column in (
        "measurement",
        "items",
        "max abs",
        "max rel",
        "flips",
        "near ties",
        "tolerance",
        "verdict",
        "worst item",
    ):
        table.add_column(column, justify="left" if column in ("measurement", "worst item") else "right")
    for v in verdicts:
        table.add_row(
            v.measurement, str(v.num_items), f"{v.max_abs:.1e}", f"{v.max_rel:.1e}", str(v.flips), str(v.near_ties),
            f"{v.tolerance:.0e}", "ok" if v.ok else "DISAGREES", v.worst,
        )  # fmt: skip
    return table


def _plain_scores(lm: LM, subject: Subject) -> dict[str, Any]:
    """The columns of `psem`, each sequence forwarded on its own."""
    trie = subject.forms.trie
    log_p = plain.next_logits(lm, subject.token_ids)[-1].log_softmax(-1).double()
    scores = TreeScores(
        np.array([plain.sequence_logprob(lm, subject.token_ids, s) for s in trie.sequences]),
        np.array([plain.word_end_logprob(lm, subject.token_ids, s) for s in trie.sequences]),
        float(-(log_p.exp() * log_p).sum()),
        np.empty(0), np.empty(0),
    )  # fmt: skip
    return measures(subject.forms, scores)


def _row(forms: WordForms, score: TreeScores | ItemFailed) -> dict[str, Any]:
    if isinstance(score, ItemFailed):
        raise score
    return measures(forms, score)


def _compare(
    column: str, subjects: Sequence[Subject], reference: dict[str, dict[str, Any]], fast: dict[str, list[dict[str, Any]]],
    tolerance: float,
) -> Verdict:  # fmt: skip
    worst, max_abs, max_rel = "", 0.0, 0.0
    for subject in subjects:
        want = np.atleast_1d(np.asarray(reference[subject.key][column], dtype=np.float64))
        for row in fast[subject.key]:
            gap = np.abs(np.atleast_1d(np.asarray(row[column], dtype=np.float64)) - want)
            gap = np.where(np.isfinite(gap), gap, np.inf)
            if gap.max() >= max_abs:
                worst, max_abs = subject.key, float(gap.max())
            max_rel = max(max_rel, float((gap / np.maximum(np.abs(want), 1e-30)).max()))
    return Verdict(
        column, len(subjects) * len(BATCH_SIZES), max_abs, max_rel, 0, 0, tolerance, worst, max_abs <= tolerance
    )


def _compare_tokens(lm: LM, subjects: Sequence[Subject], name: str, sampling: Sampling, tolerance: float) -> Verdict:
    requests = [Request(s.token_ids, s.noise_key) for s in subjects]
    want = [plain.complete(lm, r, sampling) for r in requests]
    flips, near_ties, max_abs, worst, total = 0, 0, 0.0, "", 0
    for size in BATCH_SIZES:
        done = [c for batch in _cut(requests, size) for c in decode([lm], batch, sampling)]
        for subject, a, b in zip(subjects, want, done, strict=True):
            total += 1
            if isinstance(b, ItemFailed):
                raise b
            gap = _logprob_gap(a, b)
            if gap >= max_abs:
                max_abs, worst = gap, subject.key
            if a.token_ids != b.token_ids:
                flips += 1
                near_ties += _is_near_tie(a, b, tolerance)
                worst = subject.key
    # A sampled token is decided by noise, so a flip of one cannot be excused by the margin of the model's own logits.
    excused = near_ties if sampling.temperature == 0 else 0
    return Verdict(
        name, total, max_abs, 0.0, flips, near_ties, tolerance, worst, flips == excused and max_abs <= tolerance
    )


def _logprob_gap(a: Completion, b: Completion) -> float:
    """Greatest difference of log-probability over the tokens both have in common."""
    gap = 0.0
    for x, y, p, q in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False):
        if x != y:
            break
        gap = max(gap, abs(p - q))
    return gap


def _is_near_tie(a: Completion, b: Completion, tolerance: float) -> bool:
    step = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
    return step is not None and a.margins[step] <= 2 * tolerance


def _cut(things: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for i in range(0, len(things), size):
        yield things[i : i + size]
