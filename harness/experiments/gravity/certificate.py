"""The certificate of semantic gravity: every measurement of the fast path against a deliberately plain reference.

The reference (harness/models/plain.py) takes one prompt at a time, without padding, cache sharing or our attention. The
fast path measures each prompt alone and in batches, behind padding.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np

from harness.engine import AnyTables, Tables
from harness.errors import ItemFailed
from harness.experiments.certificate import Certificate, Gap, Verdict
from harness.experiments.gravity.inputs import Inputs
from harness.experiments.gravity.settings import GravitySettings
from harness.experiments.gravity.stages.mechanism import probe_of
from harness.experiments.gravity.stages.patching import align, cannot
from harness.experiments.gravity.stages.prompts import context_row
from harness.experiments.gravity.stages.psem import measures
from harness.models import plain
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.inside import Probe, Span, View, look_inside
from harness.models.load import LM, Codec, ModelIdentity, ModelSpec, identify, load, load_codec, shared
from harness.models.measure import SPANS
from harness.models.noise import row_key
from harness.models.patch import PATCHES, Pair, Patched, sweep
from harness.models.score import TreeScores, score_trees
from harness.text.words import Tokens, WordForms, build_trie, word_forms
from harness.tolerance import TOLERANCE

MEASURED: dict[str, dict[str, Literal["nats", "prob"]]] = {
    "scores": {"p_sem": "prob", "p_word": "prob", "paper_p_sem": "prob", "logprobs": "nats", "entropy": "nats"},
    "greedy": {"greedy": "nats"},
    "samples": {"samples": "nats"},
    "inside": {
        "attention": "prob",
        "lens": "prob",
        "lens_nats": "nats",
        "decomposition": "prob",
        "resid_norm": "nats",
        "neurons": "nats",
    },
    **{patch: {f"patch {patch}": "nats"} for patch in PATCHES},
}
"""The measurements of each kind of item, and which tolerance holds them."""
BATCH_SIZES = (1, 4, 16)
"""Contexts a batch; each size divides the next, so that a smaller batch lies within a larger one."""
_LAYERS_PATCHED = 3
"""Layers that are patched both ways: first, middle, last."""
_SPELLINGS = 3
"""Of a patched word's spellings the likeliest, and of the others those of most tokens: as many of either, unless all are
asked for."""
_ECHO = 8
"""Tokens by which a batch's longest row is longer than any that is compared: all of those stand beside padding."""
_KEPT = 12
"""Results that items share, the last ones used. Those of one chunk of contexts, and of one prompt's patches, are fewer."""
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
class Sampler:
    """How completions are made, by their name in the certificate."""

    greedy: Sampling
    samples: Sampling

    @classmethod
    def of(cls, e: GravitySettings) -> "Sampler":
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

    @property
    def name(self) -> str:
        """The subject, as the certificate names it."""
        return self.subject.key if self.layer is None else f"{self.subject.key}|layer {self.layer}"

    @property
    def measurements(self) -> tuple[str, ...]:
        """Those of its kind."""
        return tuple(MEASURED[self.kind])


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

    def gaps(self, task: Task) -> dict[str, Gap]:
        return {m: Gap(m, task.name, tolerance) for m, tolerance in self.tolerances(task.kind).items()}


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
            f"{r['prompt_id']}|{r['condition']}",
            r,
            baselines.get(r["prompt_id"]) if r["condition"] != "baseline" else None,
            word_forms(targets[r["prompt_id"]], codec),
            row_key(seed, r["prompt_id"], r["condition"], 0),
        )
        for r in rows
    ]


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


def _update_tokens(gap: Gap, a: Completion, b: Completion) -> None:
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
    return probe_of(subject.token_ids, answer, last, subject.forms.first_tokens, subject.row["spans"], keep_whole=True)


def _compare_view(
    gaps: Mapping[str, Gap],
    reference: Sequence[tuple[Any, dict[str, Any]]],
    view: View,
    spans: Mapping[str, Span | None],
) -> None:
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


@dataclass(frozen=True)
class GravityChecks:
    """Every measurement of the first prompts in all their conditions; an item is a kind of measurement of one subject, or one
    patch of one layer of one subject."""

    model: ModelSpec
    identity: ModelIdentity
    sampler: Sampler
    num_subjects: int
    seed: int
    version = 2
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "target"),
            "contexts": ("prompt_id", "condition", "token_ids", "spans"),
        }
    )

    @property
    def dtype(self) -> str:
        return self.identity.dtype

    @property
    def device(self) -> str:
        return self.model.device

    def params(self) -> dict[str, Any]:
        return {"num_prompts": self.num_subjects, "sampling": asdict(self.sampler)}

    def tasks(self, tables: AnyTables) -> list[Task]:
        codec, given = load_codec(self.model, self.identity), Tables.of(tables)
        targets = {p["prompt_id"]: p["target"] for p in given["prompts"][: self.num_subjects]}
        rows = given.rows_with("contexts", [{"prompt_id": prompt_id} for prompt_id in targets])
        return tasks_of(subjects_of(rows, targets, codec, self.seed), self.identity.num_layers)

    def bench(self, is_full: bool) -> Bench:
        return Bench(shared(self.model, self.identity), self.sampler, is_full)

    def wider(self, dtype: str, device: str, is_full: bool) -> Bench:
        spec = replace(self.model, dtype=dtype, device=device)
        return Bench(load(spec, identify(spec)), self.sampler, is_full)

    def measure(self, bench: Bench, task: Task) -> list[Verdict]:
        return measure(bench, task)

    def left_out(self, bench: Bench, task: Task) -> list[Verdict]:
        return left_out(bench, task)


def certificate_of(given: Inputs) -> Certificate[Task, Bench]:
    """The stage, of as many prompts as the settings say."""
    own = given.settings
    checks = GravityChecks(given.model, given.identity, Sampler.of(own), own.sanity.num_prompts, given.seed)
    return Certificate.of(checks, own.sanity)


def tables_of(given: Inputs, num_prompts: int) -> dict[str, list[dict[str, Any]]]:
    """What the certificate reads, for the first prompts in all their conditions, without a run."""
    codec = load_codec(given.model, given.identity)
    prompts = given.prompts[:num_prompts]
    contexts = [
        context_row(codec, prompt, name, template, given.settings.chat)
        for prompt in prompts
        for name, template in given.conditions.items()
    ]
    told = [{"prompt_id": p.prompt_id, "target": p.target} for p in prompts]
    return {"prompts": told, "contexts": contexts, "sanity_items": []}


def _good(result: _T | ItemFailed) -> _T:
    if isinstance(result, ItemFailed):
        raise result
    return result
