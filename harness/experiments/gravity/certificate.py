"""Stage `sanity`, and what `harness sanity` prints: every measurement of the fast path against a deliberately plain
reference, on a few prompts (harness.md §8).

The reference (harness/models/plain.py) takes one prompt at a time, without padding, cache sharing or our attention. The
fast path measures each prompt alone and in batches, behind padding. A disagreement in half precision is measured again in
float64: a gap that closes was rounding, one that stays is a bug.

The certificate has a budget of seconds. Its items are ordered so that a short one holds each measurement once before any
twice; those are made whatever the budget is, and what is left out is a row of its own.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from loguru import logger

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import HarnessError, ItemFailed
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.experiments.gravity.stages.mechanism import probe_of
from harness.experiments.gravity.stages.patching import align, cannot
from harness.experiments.gravity.stages.psem import measures
from harness.models import plain
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.inside import Probe, Span, View, look_inside
from harness.models.load import LM, Codec, ModelIdentity, ModelSpec, identify, load, load_codec, shared
from harness.models.measure import SPANS
from harness.models.noise import row_key
from harness.models.patch import PATCHES, Pair, Patched, sweep
from harness.models.score import TreeScores, score_trees
from harness.settings import ExperimentSettings
from harness.text.words import Tokens, WordForms, build_trie, word_forms
from harness.tolerance import HALF, TOLERANCE

MEASURED: dict[str, dict[str, Literal["nats", "prob"]]] = {
    "scores": {"p_sem": "prob", "p_word": "prob", "paper_p_sem": "prob", "logprobs": "nats", "entropy": "nats"},
    "greedy": {"greedy": "nats"},
    "samples": {"samples": "nats"},
    "inside": {"attention": "prob", "lens": "prob", "lens_nats": "nats", "decomposition": "prob", "resid_norm": "nats",
               "neurons": "nats"},
    **{patch: {f"patch {patch}": "nats"} for patch in PATCHES},
}  # fmt: skip
"""The measurements of each kind of item, and which tolerance holds them."""
_KIND = {measurement: kind for kind, measurements in MEASURED.items() for measurement in measurements}
BATCH_SIZES = (1, 4, 16)
"""Contexts a batch; each size divides the next, so that a smaller batch lies within a larger one."""
MOST_S = 60.0
"""Seconds that nobody asked for."""
SMALL_RUN_S = 20.0
"""Seconds for a run that is too small to be estimated: several times what the demo model needs for everything."""
_LAYERS_PATCHED = 3
"""Layers that are patched both ways: first, middle, last."""
_SPELLINGS = 3
"""Of a patched word's spellings the likeliest, and of the others those of most tokens: as many of either, unless all are
asked for."""
_ECHO = 8
"""Tokens by which a batch's longest row is longer than any that is compared: all of those stand beside padding."""
_KEPT = 12
"""Results that items share, the last ones used. Those of one chunk of contexts, and of one prompt's patches, are fewer."""
_LENGTH = 8_192
"""An item is said to be as long as a batch may be on a CPU: so each is a batch of its own, shown and kept when it is done."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """One context to measure: its key, ids, the spellings of its target; `row` and `baseline` are rows of `contexts`."""

    key: str
    row: Mapping[str, Any]
    baseline: Mapping[str, Any] | None
    forms: WordForms
    noise_key: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.row["token_ids"])

    @cached_property
    def pair(self) -> Pair | None:
        """What is patched: the baseline's text into this one's; None for the baseline itself."""
        return None if self.baseline is None else align(self.baseline, self.row)

    @property
    def patches(self) -> list[str]:
        """Those that can be made."""
        pair = self.pair
        return [] if pair is None else [patch for patch in PATCHES if cannot(pair, patch) is None]


@dataclass(frozen=True)
class Verdict:
    """How one measurement of one subject came out; None where it was left out.

    `max_rel` is relative to the reference. For tokens, `flips` counts completions that differ and `near_ties` those of
    them whose first different token was a tie within the tolerance: noise, not a bug. `repeated` tells how a
    disagreement in half precision came out in float64.
    """

    measurement: str
    subject: str
    tolerance: float
    num_items: int = 0
    max_abs: float | None = None
    max_rel: float | None = None
    flips: int = 0
    near_ties: int = 0
    worst: str | None = None
    repeated: str | None = None
    ok: bool | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Sampler:
    """How completions are made, by their name in the certificate."""

    greedy: Sampling
    samples: Sampling

    @classmethod
    def of(cls, e: ExperimentSettings) -> "Sampler":
        """As the stages `greedy` and `samples` make them."""
        return cls(
            Sampling(e.max_new_tokens_greedy, 0.0, 1.0, e.stop_at_newline),
            Sampling(e.max_new_tokens_samples, e.temperature, e.top_p, e.stop_at_newline),
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What an item measures: a kind of `MEASURED` for one subject, a patch at one layer."""

    kind: str
    subject: Subject
    company: tuple[Subject, ...]
    """All subjects, this one among them: it is measured in batches with those it stands beside here."""
    layer: int | None = None
    is_alone: bool = False
    """A patch that is made in a sweep of its own too, not only in one with all others."""
    is_least: bool = False
    """The first of its kind: measured whatever the budget is."""
    was: Literal["measured", "left out"] | None = None
    """What the run has already: a decision of the clock is made once."""
    before_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that an earlier process spent on each item of this certificate, by its key."""

    @property
    def name(self) -> str:
        """The subject, as the certificate names it."""
        return self.subject.key if self.layer is None else f"{self.subject.key}|layer {self.layer}"


@dataclass
class _Gap:
    """The worst difference so far of one measurement."""

    measurement: str
    subject: str
    tolerance: float
    num_items: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: str = ""
    flips: int = 0
    near_ties: int = 0
    excused: bool = True
    """Whether a near tie is excused: not for sampled tokens, which noise decides."""

    def update(self, want: Any, got: Any) -> None:
        """Take in one item; a shape that differs, or a value that is not finite, is an infinite difference."""
        self.num_items += 1
        a, b = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (want, got))
        gap = np.abs(a - b) if a.shape == b.shape else np.full(1, np.inf)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if gap.size and gap.max() >= self.max_abs:
            self.worst, self.max_abs = self.subject, float(gap.max())
        if gap.size and a.shape == b.shape:
            self.max_rel = max(self.max_rel, float((gap / np.maximum(np.abs(a), 1e-30)).max()))

    def verdict(self) -> Verdict:
        excused = self.near_ties if self.excused else 0
        is_ok = self.num_items > 0 and self.flips == excused and self.max_abs <= self.tolerance
        return Verdict(
            self.measurement, self.subject, self.tolerance, self.num_items, self.max_abs, self.max_rel, self.flips,
            self.near_ties, self.worst, ok=is_ok,
        )  # fmt: skip


class Bench:
    """A model to measure both ways, and what several items go on from. What is lost of that is computed again."""

    def __init__(self, lm: LM, sampler: Sampler, is_full: bool = False):
        self.lm, self.sampler, self.is_full = lm, sampler, is_full
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What `make` gives; from an earlier call with this key where that is still kept."""
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def tolerances(self, kind: str) -> dict[str, float]:
        """The measurements that this model has of a kind, each with its tolerance."""
        tolerance = TOLERANCE[self.lm.identity.dtype]
        has_neurons = self.lm.anatomy.neurons is not None
        return {m: getattr(tolerance, unit) for m, unit in MEASURED[kind].items() if m != "neurons" or has_neurons}

    def gaps(self, task: Task) -> dict[str, _Gap]:
        return {m: _Gap(m, task.name, tolerance) for m, tolerance in self.tolerances(task.kind).items()}


def tasks_of(subjects: Sequence[Subject], num_layers: int) -> list[Task]:
    """All there is to measure, in the order in which it is to be measured.

    Each kind on the first subject that has it (one that can be patched), then on the next; patches at the first of three
    layers for all subjects, then at the second. Which of the three is the first goes round by patch and subject.
    """
    company = tuple(sorted(subjects, key=lambda s: s.baseline is None))
    layers = _layers(num_layers)
    kinds = [kind for kind in MEASURED if kind not in PATCHES]
    tasks = []
    for turn in range(len(layers)):
        for n, subject in enumerate(company):
            tasks += [Task(kind, subject, company) for kind in kinds if not turn]
            for patch in subject.patches:
                layer = layers[(turn + n + PATCHES.index(patch)) % len(layers)]
                tasks.append(Task(patch, subject, company, layer, is_alone=turn == 1))
    first = {task.kind: n for n, task in reversed(list(enumerate(tasks)))}
    return [replace(task, is_least=first[task.kind] == n) for n, task in enumerate(tasks)]


def _layers(num: int) -> list[int]:
    return sorted({round(i * (num - 1) / (_LAYERS_PATCHED - 1)) for i in range(_LAYERS_PATCHED)})


Fast = Callable[[Sequence[Subject], Sequence[Tokens]], Sequence[Any]]
"""One batch of the fast path: subjects, and the contexts to take in place of their own -> a result each."""


def check(
    lm: LM,
    subjects: Sequence[Subject],
    sampler: Sampler,
    kinds: Sequence[str] = tuple(MEASURED),
    is_least: bool = False,
) -> list[Verdict]:
    """Verdicts of every measurement of every subject, or of some kinds; with `is_least` of what no budget leaves out.

    A disagreement is a verdict, never an exception, so that all are seen.
    """
    bench = Bench(lm, sampler)
    tasks = tasks_of(subjects, len(lm.anatomy.blocks))
    return [v for t in tasks if t.kind in kinds and (t.is_least or not is_least) for v in measure(bench, t)]


def measure(bench: Bench, task: Task) -> list[Verdict]:
    """Verdicts of one item. Raises ItemFailed where the fast path has no result for it."""
    if task.kind in PATCHES:
        return _check_patch(bench, task)
    return {"scores": _check_scores, "greedy": _check_tokens, "samples": _check_tokens, "inside": _check_inside}[
        task.kind
    ](bench, task)


def left_out(bench: Bench, task: Task) -> list[Verdict]:
    """What stands in place of verdicts where there was no time for them."""
    return [Verdict(m, task.name, tolerance, left_out=True) for m, tolerance in bench.tolerances(task.kind).items()]


def subjects_of(
    rows: Sequence[Mapping[str, Any]], targets: Mapping[str, str], codec: Codec, seed: int
) -> list[Subject]:
    """A subject for every row of `contexts`; `targets` maps prompt_id to its word."""
    baselines = {r["prompt_id"]: r for r in rows if r["condition"] == "baseline"}
    return [
        Subject(
            f"{r['prompt_id']}|{r['condition']}", r, baselines.get(r["prompt_id"]) if r["condition"] != "baseline" else None,
            word_forms(targets[r["prompt_id"]], codec), row_key(seed, r["prompt_id"], r["condition"], 0),
        )
        for r in rows
    ]  # fmt: skip


def _check_scores(bench: Bench, task: Task) -> list[Verdict]:
    """Tree scoring against one forward a sequence."""
    lm, subject, gaps = bench.lm, task.subject, bench.gaps(task)
    want = _plain_scores(lm, subject)

    def fast(batch: Sequence[Subject], contexts: Sequence[Tokens]) -> Sequence[Any]:
        return score_trees(lm, contexts, [s.forms.trie for s in batch])

    for scores in _in_batches(bench, task, fast):
        row = measures(subject.forms, scores)
        for column, gap in gaps.items():
            gap.update(_column(want, column), _column(row, column))
    return [gap.verdict() for gap in gaps.values()]


def _column(row: Mapping[str, Any], column: str) -> np.ndarray:
    """A column of `psem`; log-probabilities in nats a token, since rounding adds up along a sequence."""
    values = np.asarray(row[column])
    return values / [len(q) for q in row["sequences"][: len(values)]] if column == "logprobs" else values


def _plain_scores(lm: LM, subject: Subject) -> dict[str, Any]:
    """The columns of `psem`, each sequence forwarded on its own."""
    log_p = plain.next_logits(lm, subject.token_ids)[-1].log_softmax(-1).double()
    logprobs, ends = plain.continuations(lm, subject.token_ids, subject.forms.trie.sequences)
    entropy = float(-(log_p.exp() * log_p).sum())
    return measures(subject.forms, TreeScores(logprobs, ends, entropy, np.empty(0), np.empty(0)))


def _check_tokens(bench: Bench, task: Task) -> list[Verdict]:
    """Greedy or sampled completions against whole texts forwarded again for every token, drawn by a sampler of its own."""
    sampling: Sampling = getattr(bench.sampler, task.kind)
    (gap,) = bench.gaps(task).values()
    gap.excused = sampling.temperature == 0
    want = plain.complete(bench.lm, Request(task.subject.token_ids, task.subject.noise_key), sampling)
    for done in _in_batches(bench, task, _decoder(bench, sampling)):
        gap.num_items += 1
        _update_tokens(gap, want, done)
    return [gap.verdict()]


def _decoder(bench: Bench, sampling: Sampling) -> Fast:
    def fast(batch: Sequence[Subject], contexts: Sequence[Tokens]) -> Sequence[Any]:
        return decode([bench.lm], [Request(c, s.noise_key) for s, c in zip(batch, contexts, strict=True)], sampling)

    return fast


def _update_tokens(gap: _Gap, a: Completion, b: Completion) -> None:
    """Count a completion that differs, and take in the log-probabilities of the tokens both have in common."""
    step = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
    differs = a.token_ids != b.token_ids
    common = min(len(a.token_ids), len(b.token_ids)) if step is None else step
    apart = max((abs(p - q) for p, q in zip(a.logprobs[:common], b.logprobs[:common], strict=True)), default=0.0)
    if apart > gap.max_abs:
        gap.max_abs, gap.worst = apart, gap.subject
    if differs:
        gap.flips += 1
        gap.near_ties += step is not None and a.margins[step] <= 2 * gap.tolerance
        gap.worst = gap.subject


def _check_inside(bench: Bench, task: Task) -> list[Verdict]:
    """Attention rows, lens, decomposition, norms and neurons against eager attention's maps and one layer at a time.

    Looked at three tokens into the greedy answer, or at its end, so that answer tokens are in the text too.
    """
    lm, gaps = bench.lm, bench.gaps(task)
    probe = _probe(bench, task)
    looked = {
        (at, e): (plain.attention_rows(lm, probe.tokens, at), plain.layers(lm, probe, at, e))
        for at, e in dict.fromkeys(zip(probe.at, probe.emitted, strict=True))
    }

    def fast(batch: Sequence[Subject], contexts: Sequence[Tokens]) -> Sequence[Any]:
        probes = [_probe(bench, replace(task, subject=s)) for s in batch]
        more = [c[len(s.token_ids) :] for s, c in zip(batch, contexts, strict=True)]
        return look_inside(lm, [replace(p, tokens=(*p.tokens, *m)) for p, m in zip(probes, more, strict=True)])

    for view in _in_batches(bench, task, fast):
        reference = [looked[step] for step in zip(probe.at, probe.emitted, strict=True)]
        _compare_view(gaps, reference, view, probe.spans)
    return [gap.verdict() for gap in gaps.values()]


def _probe(bench: Bench, task: Task) -> Probe:
    """The answer is the fast path's own, of its largest batch: what is compared is what either sees in one text."""
    greedy = replace(task, kind="greedy")
    done = _in_chunk(bench, greedy, _decoder(bench, bench.sampler.greedy), _chunk(task, BATCH_SIZES[-1]))
    subject, answer = task.subject, done.token_ids
    last = min(3, len(answer) - 1)
    return probe_of(
        subject.token_ids, answer, last, subject.forms.first_tokens, subject.row["spans"], keep_whole=True
    )  # fmt: skip


def _compare_view(
    gaps: Mapping[str, _Gap], reference: Sequence[tuple[Any, dict[str, Any]]], view: View,
    spans: Mapping[str, Span | None],
) -> None:  # fmt: skip
    for step, (rows, want) in zip(view.steps, reference, strict=True):
        assert step.rows is not None, "asked for"
        gaps["attention"].update(rows, step.rows)
        gaps["attention"].update(rows.mean(1), step.mean_row)
        masses = [rows[..., slice(*(spans[name] or (0, 0)))].sum(-1) for name in SPANS]
        gaps["attention"].update(np.stack(masses, -1), step.masses)
        for column in ("p_emitted", "p_target"):
            gaps["lens"].update(want["p_out" if column == "p_target" else column], step.lens[column])
        for column in ("entropy", "kl_final"):
            # As a share of what is more than one nat: a KL of forty is a sum over the vocabulary, and rounds as one.
            scale = np.maximum(1.0, np.abs(want[column]))
            gaps["lens_nats"].update(want[column] / scale, step.lens[column] / scale)
        for column in ("p_in", "p_attn", "p_out"):
            gaps["decomposition"].update(want[column], getattr(step, column))
    first = reference[0][1]
    scale = np.abs(first["resid_norm"]).max()
    gaps["resid_norm"].update(first["resid_norm"] / scale, view.resid_norm / scale)
    if view.top_neurons is not None and view.top_values is not None:
        largest = np.abs(first["neurons"]).max()
        taken = np.take_along_axis(first["neurons"], view.top_neurons, axis=1)
        gaps["neurons"].update(taken / largest, view.top_values / largest)
        # The ones chosen must be the largest: the least of them against what a full sort would have kept.
        best = np.sort(np.abs(first["neurons"]), axis=1)[:, ::-1][:, : view.top_neurons.shape[1]]
        gaps["neurons"].update(best / largest, np.abs(view.top_values) / largest)


def _check_patch(bench: Bench, task: Task) -> list[Verdict]:
    """One patch at one layer, out of a sweep of all patches and layers, and on its own, against Hugging Face's own caches.

    In nats a token, of spellings and of the continuation: as a sum, one likely spelling would hide all others.
    """
    lm, subject, greedy = bench.lm, task.subject, bench.sampler.greedy
    pair, layer, (gap,) = subject.pair, task.layer, bench.gaps(task).values()
    assert pair is not None, "only what can be patched is a task"
    assert layer is not None, "of a patch"

    def swept(patches: Sequence[str], layers: Sequence[int]) -> dict[tuple[str, int], Patched]:
        trie = build_trie(subject.forms.events)
        rows = sweep(lm, pair, patches, trie, greedy.max_new_tokens, greedy.stop_at_newline, layers)
        return {(row.patch, row.layer): row for row in map(_good, rows)}

    together = bench.once(("sweep", subject.key), lambda: swept(subject.patches, _layers(len(lm.anatomy.blocks))))
    found = [together[task.kind, layer]]
    if task.is_alone or bench.is_full:
        found.append(swept([task.kind], [layer])[task.kind, layer])
    events = subject.forms.events
    chosen = list(range(len(events))) if bench.is_full else _spellings(events, together["", -1].scores.logprobs)
    start = bench.once(("before", subject.key), lambda: plain.before(lm, pair))
    some, lengths = [events[i] for i in chosen], np.array([len(events[i]) for i in chosen])
    logprobs, done = plain.patched(lm, pair, task.kind, layer, some, greedy, start)
    for row in found:
        gap.update(logprobs / lengths, row.scores.logprobs[chosen] / lengths)
        _update_tokens(gap, done, row.continuation)
    return [gap.verdict()]


def _spellings(events: Sequence[Tokens], logprobs: np.ndarray) -> list[int]:
    """Which spellings are compared: those that carry the mass where nothing is patched, and those of most tokens."""
    likely = np.argsort(-logprobs, kind="stable").tolist()
    long = sorted(likely[_SPELLINGS:], key=lambda i: (-len(events[i]), i))
    return sorted(likely[:_SPELLINGS] + long[:_SPELLINGS])


def _in_batches(bench: Bench, task: Task, fast: Fast) -> Iterator[Any]:
    """The subject's result by `fast`: alone, then in every larger batch."""
    yield _good(fast([task.subject], [task.subject.token_ids])[0])
    for chunk in dict.fromkeys(_chunk(task, size) for size in BATCH_SIZES[1:]):
        yield _in_chunk(bench, task, fast, chunk)


def _in_chunk(bench: Bench, task: Task, fast: Fast, chunk: tuple[int, int]) -> Any:
    """The subject's result in a batch of its neighbours and of one text that is longer than all of theirs.

    Last first: a beginning in common is computed in the first row that has it, and it is the later rows, the certificate's
    first subject among them, that show what was shared wrongly.
    """
    batch = task.company[slice(*chunk)][::-1]
    longest = max(batch, key=lambda s: len(s.token_ids))
    contexts = [*(s.token_ids for s in batch), (*longest.token_ids, *longest.token_ids[:_ECHO])]
    results = bench.once((task.kind, chunk), lambda: fast([*batch, longest], contexts)[:-1])
    return _good(results[[s.key for s in batch].index(task.subject.key)])


def _chunk(task: Task, size: int) -> tuple[int, int]:
    """The part of the company, of `size` subjects or what is left, in which the task's subject is."""
    place = [s.key for s in task.company].index(task.subject.key)
    start = place - place % size
    return start, min(start + size, len(task.company))


class Widened:
    """Settles disagreements of half precision: measured once more in float64 they are noise, or a bug.

    Needs the model in memory once more, eight bytes a parameter, from the first of them on. Where that does not fit,
    float32 is taken, on the same device or on the CPU; where nothing fits the verdict stands.
    """

    def __init__(self, model: ModelSpec, sampler: Sampler, is_full: bool = False):
        wider = (("float64", model.device), ("float32", model.device), ("float32", "cpu"))
        self._specs = [replace(model, dtype=dtype, device=device) for dtype, device in dict.fromkeys(wider)]
        self._sampler, self._is_full = sampler, is_full
        self._bench: Bench | None = None
        self._why = ""

    def settle(self, verdicts: Sequence[Verdict], task: Task) -> list[Verdict]:
        """The same verdicts; each disagreement with what became of it."""
        if all(v.ok for v in verdicts):
            return list(verdicts)
        while self._specs:
            try:
                again = {v.measurement: v for v in measure(self._load(task), task)}
            except (HarnessError, MemoryError, torch.OutOfMemoryError) as e:
                self._why = self._why or str(e)
                self._bench = None
                self._specs.pop(0)
                continue
            return [v if v.ok else _settled(v, again[v.measurement], self._specs[0].dtype) for v in verdicts]
        return [v if v.ok else replace(v, repeated=f"not possible: {self._why}") for v in verdicts]

    def _load(self, task: Task) -> Bench:
        if self._bench is None:
            spec = self._specs[0]
            told = "{} disagrees on {}: measured again in {}, for which the model is loaded once more"
            logger.info(told, task.kind, task.name, spec.dtype)
            self._bench = Bench(load(spec, identify(spec)), self._sampler, self._is_full)
        return self._bench


def _settled(verdict: Verdict, wide: Verdict, dtype: str) -> Verdict:
    told = f"{dtype}: {wide.max_abs:.1e}, " + ("noise" if wide.ok else "still apart")
    return replace(verdict, ok=wide.ok, repeated=told)


@dataclass
class Work:
    """What a process needs for the items, and what it knows of their cost."""

    bench: Bench
    widened: Widened | None
    spent_s: float = 0.0
    last_s: dict[str, float] = field(default_factory=dict)
    """What the last item of each kind took."""


@dataclass(frozen=True)
class Sanity:
    """Writes `sanity_items`, of which the view `sanity` is the certificate: a row a measurement. A disagreement ends the
    run with exit 1. An item is a kind of measurement of one subject, or one patch of one layer of one subject."""

    model: ModelSpec
    identity: ModelIdentity
    sampler: Sampler
    num_prompts: int
    seed: int
    budget_s: float | None = None
    """None: no limit, and in full depth. Decides how much is measured, and no number."""
    clock: Callable[[], float] = time.perf_counter
    name: ClassVar[str] = "sanity"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = False
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompts": ("prompt_id", "target"),
        "contexts": ("prompt_id", "condition", "token_ids", "spans"),
        "sanity_items": ("measurement", "subject", "left_out", "seconds"),
    }
    row_bytes: ClassVar[int] = 1_000

    @classmethod
    def build(cls, given: Inputs) -> "Sanity":
        e = given.experiment
        known = SMALL_RUN_S if given.budget_s is None else min(MOST_S, given.budget_s)
        budget_s = {"auto": known, "unlimited": None}.get(e.sanity.budget, e.sanity.budget)  # type: ignore[arg-type]
        return cls(given.model, given.identity, Sampler.of(e), e.sanity.num_prompts, given.seed, budget_s)

    def params(self) -> dict[str, Any]:
        return {"num_prompts": self.num_prompts, "sampling": asdict(self.sampler)}

    def items(self, tables: AnyTables) -> list[Item[Task]]:
        codec, given = load_codec(self.model, self.identity), Tables.of(tables)
        targets = {p["prompt_id"]: p["target"] for p in given["prompts"][: self.num_prompts]}
        rows = given.rows_with("contexts", [{"prompt_id": prompt_id} for prompt_id in targets])
        tasks = tasks_of(subjects_of(rows, targets, codec, self.seed), self.identity.num_layers)
        done = given["sanity_items"]
        known = {(r["measurement"], r["subject"]): r["left_out"] for r in done}
        before_s: dict[str, float] = {}
        for r in done:
            if not r["left_out"]:
                key = item_key(_KIND[r["measurement"]], r["subject"])
                before_s[key] = before_s.get(key, 0.0) + (r["seconds"] or 0.0)
        was = {False: "measured", True: "left out", None: None}
        return [
            Item(
                item_key(task.kind, task.name),
                _LENGTH + len(tasks) - n,  # the longest comes first
                replace(task, was=was[known.get((next(iter(MEASURED[task.kind])), task.name))], before_s=before_s),
            )
            for n, task in enumerate(tasks)
        ]

    def setup(self) -> Work:
        is_full = self.budget_s is None
        widened = Widened(self.model, self.sampler, is_full) if self.identity.dtype in HALF else None
        return Work(Bench(shared(self.model, self.identity), self.sampler, is_full), widened)

    def run(self, context: Work, items: Sequence[Item[Task]]) -> list[ItemResult]:
        return [self._one(context, item.key, item.payload) for item in items]

    def _one(self, work: Work, key: str, task: Task) -> ItemResult:
        if not self._has_time(work, task):
            return ItemResult(key, {"sanity_items": [_row(v, 0.0) for v in left_out(work.bench, task)]})
        start = self.clock()
        try:
            verdicts = measure(work.bench, task)
            if work.widened is not None:
                verdicts = work.widened.settle(verdicts, task)
        except ItemFailed as e:
            return ItemResult.failed(key, e)
        seconds = self.clock() - start
        work.spent_s += seconds
        work.last_s[task.kind] = seconds
        for v in verdicts:
            if not v.ok:
                logger.error(
                    "the fast path and the plain reference disagree: {} of {}, {}", v.measurement, task.name, told(v)
                )
        return ItemResult(key, {"sanity_items": [_row(v, seconds / len(verdicts)) for v in verdicts]})

    def _has_time(self, work: Work, task: Task) -> bool:
        """Decided once: what a run has measured, or left out, stays so where it is looked at again."""
        if self.budget_s is None or task.is_least or task.was is not None:
            return task.was != "left out"
        alike = [s for key, s in task.before_s.items() if key.startswith(f"{task.kind}|")]
        next_s = work.last_s.get(task.kind, alike[-1] if alike else 0.0)
        return sum(task.before_s.values()) + work.spent_s + next_s < self.budget_s


def told(verdict: Verdict) -> str:
    """How far apart, in words."""
    flips = f", {verdict.flips} completions differ" if verdict.flips else ""
    repeated = f" ({verdict.repeated})" if verdict.repeated else ""
    return f"{verdict.max_abs:.1e} apart where {verdict.tolerance:.0e} is rounding{flips}{repeated}"


def _row(verdict: Verdict, seconds: float) -> dict[str, Any]:
    """A row of `sanity_items`; an infinite difference is stored as 1e38, since the engine refuses what no 32-bit float holds."""
    most = {
        k: None if v is None else min(v, 1e38) for k, v in (("max_abs", verdict.max_abs), ("max_rel", verdict.max_rel))
    }
    return asdict(verdict) | most | {"seconds": seconds}


def _good(result: _T | ItemFailed) -> _T:
    if isinstance(result, ItemFailed):
        raise result
    return result
