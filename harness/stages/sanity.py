"""Stage `sanity`, and what `harness sanity` prints: every measurement of the fast path against a deliberately plain
reference, on a few prompts (harness.md §8).

The reference (harness/models/plain.py) takes one prompt at a time, without padding, cache sharing or our attention.
Each measurement is made at several batch sizes and compared item by item. A disagreement in half precision is
measured again in float64: a gap that closes was rounding, one that stays is a bug.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from harness.engine import Tables
from harness.errors import HarnessError, ItemFailed
from harness.executor import Item, ItemResult
from harness.models import plain
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.inside import Probe, Span, View, look_inside
from harness.models.load import LM, Codec, ModelIdentity, ModelSpec, identify, load, load_codec, shared
from harness.models.measure import SPANS
from harness.models.noise import row_key
from harness.models.patch import PATCHES, Pair, Patched, sweep
from harness.models.score import TreeScores, score_trees
from harness.settings import ExperimentSettings
from harness.stages.inputs import Inputs
from harness.stages.mechanism import probe_of
from harness.stages.patching import align, cannot
from harness.stages.psem import measures
from harness.text.words import WordForms, build_trie, word_forms

TOLERANCE = {"float64": (1e-6, 1e-6), "float32": (5e-5, 1e-5), "bfloat16": (1e-2, 1e-2), "float16": (1e-2, 1e-2)}
"""Per dtype: absolute, on log-probabilities; absolute, on probabilities (harness.md §8).

Float64 is no tighter than 1e-6: the families' own eager softmax and norms, which are the reference, run in float32."""
HALF = ("bfloat16", "float16")
BATCH_SIZES = (1, 3, 16)
_LAYERS_PATCHED = 3
"""Layers that are patched both ways: first, middle, last."""
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


@dataclass(frozen=True)
class Verdict:
    """How one measurement came out.

    `max_rel` is relative to the reference. For tokens, `flips` counts completions that differ and `near_ties` those of
    them whose first different token was a tie within the tolerance: noise, not a bug. `repeated` tells how a
    disagreement in half precision came out in float64.
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
    repeated: str | None = None


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


@dataclass
class _Gap:
    """The worst difference so far of one measurement."""

    measurement: str
    tolerance: float
    num_items: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: str = ""
    flips: int = 0
    near_ties: int = 0
    excused: bool = True
    """Whether a near tie is excused: not for sampled tokens, which noise decides."""

    def update(self, key: str, want: Any, got: Any) -> None:
        """Take in one item; a shape that differs, or a value that is not finite, is an infinite difference."""
        self.num_items += 1
        a, b = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (want, got))
        gap = np.abs(a - b) if a.shape == b.shape else np.full(1, np.inf)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if gap.size and gap.max() >= self.max_abs:
            self.worst, self.max_abs = key, float(gap.max())
        if gap.size and a.shape == b.shape:
            self.max_rel = max(self.max_rel, float((gap / np.maximum(np.abs(a), 1e-30)).max()))

    def verdict(self) -> Verdict:
        excused = self.near_ties if self.excused else 0
        is_ok = self.num_items > 0 and self.flips == excused and self.max_abs <= self.tolerance
        return Verdict(
            self.measurement, self.num_items, self.max_abs, self.max_rel, self.flips, self.near_ties, self.tolerance,
            self.worst, is_ok,
        )  # fmt: skip


Check = Callable[[LM, Sequence[Subject], Sampler], list[Verdict]]


def check(lm: LM, subjects: Sequence[Subject], sampler: Sampler) -> list[Verdict]:
    """Verdicts of every measurement; a disagreement is a verdict, never an exception, so that all are seen."""
    return [verdict for group in CHECKS.values() for verdict in group(lm, subjects, sampler)]


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


def check_scores(lm: LM, subjects: Sequence[Subject], sampler: Sampler) -> list[Verdict]:
    """Tree scoring against one forward a sequence."""
    of_logs, of_probs = TOLERANCE[lm.identity.dtype]
    gaps = {
        column: _Gap(column, tolerance)
        for column, tolerance in (("p_sem", of_probs), ("p_word", of_probs), ("paper_p_sem", of_probs),
                                  ("logprobs", of_logs), ("entropy", of_logs))
    }  # fmt: skip
    reference = {s.key: _plain_scores(lm, s) for s in subjects}
    for size in BATCH_SIZES:
        for batch in _cut(subjects, size):
            scores = score_trees(lm, [s.token_ids for s in batch], [s.forms.trie for s in batch])
            for subject, score in zip(batch, scores, strict=True):
                row = measures(subject.forms, _good(score))
                for column, gap in gaps.items():
                    gap.update(subject.key, _column(reference[subject.key], column), _column(row, column))
    return [gap.verdict() for gap in gaps.values()]


def _column(row: Mapping[str, Any], column: str) -> np.ndarray:
    """A column of `psem`; log-probabilities in nats a token, since rounding adds up along a sequence."""
    values = np.asarray(row[column])
    return values / [len(q) for q in row["sequences"][: len(values)]] if column == "logprobs" else values


def check_tokens(lm: LM, subjects: Sequence[Subject], sampler: Sampler) -> list[Verdict]:
    """Greedy and sampled completions against whole texts forwarded again for every token."""
    return [
        _compare_tokens(lm, subjects, name, sampling)
        for name, sampling in (("greedy", sampler.greedy), ("samples", sampler.samples))
    ]


def check_inside(lm: LM, subjects: Sequence[Subject], sampler: Sampler) -> list[Verdict]:
    """Attention rows, lens, decomposition, norms and neurons against eager attention's maps and one layer at a time.

    Looked at three tokens into the plain greedy answer, or at its end, so that answer tokens are in the text too.
    """
    of_logs, of_probs = TOLERANCE[lm.identity.dtype]
    names = {"attention": of_probs, "lens": of_probs, "lens_nats": of_logs, "decomposition": of_probs}
    gaps = {name: _Gap(name, tolerance) for name, tolerance in names.items()}
    # Norms and activations have the scale of the model, so they are held relative to their largest value.
    gaps |= {name: _Gap(name, of_logs) for name in ("resid_norm", "neurons")}
    probes = {s.key: _probe(lm, s, sampler.greedy) for s in subjects}
    reference = {
        key: [(plain.attention_rows(lm, p.tokens, at), plain.layers(lm, p, at, e)) for at, e in zip(p.at, p.emitted, strict=True)]
        for key, p in probes.items()
    }  # fmt: skip
    for size in BATCH_SIZES:
        for batch in _cut(subjects, size):
            views = look_inside(lm, [probes[s.key] for s in batch])
            for subject, view in zip(batch, views, strict=True):
                _compare_view(gaps, subject.key, reference[subject.key], _good(view), probes[subject.key].spans)
    return [gap.verdict() for gap in gaps.values() if gap.num_items]


def check_patches(lm: LM, subjects: Sequence[Subject], sampler: Sampler) -> list[Verdict]:
    """Each patch, at the first, middle and last layer, all in one sweep and one patch at a time, against Hugging Face's
    own caches, one layer at a time. Of each prompt the conditions that have a baseline to be patched from.

    In nats a token, of every spelling and of the continuation: as a sum, one likely spelling would hide all others.
    """
    of_logs, _ = TOLERANCE[lm.identity.dtype]
    gaps = {patch: _Gap(f"patch {patch}", of_logs) for patch in PATCHES}
    num = len(lm.anatomy.blocks)
    layers = sorted({round(i * (num - 1) / (_LAYERS_PATCHED - 1)) for i in range(_LAYERS_PATCHED)})
    for subject in subjects:
        if subject.baseline is None:
            continue
        pair = align(subject.baseline, subject.row)
        lengths = np.array([len(sequence) for sequence in subject.forms.events])
        able = [patch for patch in PATCHES if cannot(pair, patch) is None]
        want = {
            (patch, layer): plain.patched(lm, pair, patch, layer, subject.forms.events, sampler.greedy)
            for patch in able
            for layer in layers
        }
        for patches in (able, *([p] for p in able)):
            for row in _sweep(lm, pair, patches, subject, sampler.greedy, layers):
                logprobs, done = want[row.patch, row.layer]
                gap, key = gaps[row.patch], f"{subject.key}|layer {row.layer}"
                gap.update(key, logprobs / lengths, row.scores.logprobs / lengths)
                _update_tokens(gap, key, done, row.continuation, of_logs)
    return [gap.verdict() for gap in gaps.values() if gap.num_items]


CHECKS: dict[str, Check] = {
    "scores": check_scores, "tokens": check_tokens, "inside": check_inside, "patches": check_patches,
}  # fmt: skip


def repeat_wider(model: ModelSpec, verdicts: Sequence[Verdict], group: Check, *given: Any) -> list[Verdict]:
    """Verdicts with every disagreement in half precision measured again by `group` in float64: noise, or a bug.

    Needs the model in memory once more, eight bytes a parameter. Where that does not fit, float32 is taken, on the same
    device or on the CPU; where nothing fits the verdict stands.
    """
    if all(v.ok for v in verdicts):
        return list(verdicts)
    why = ""
    for dtype, device in dict.fromkeys((("float64", model.device), ("float32", model.device), ("float32", "cpu"))):
        wide = replace(model, dtype=dtype, device=device)
        try:
            again = {v.measurement: v for v in group(load(wide, identify(wide)), *given)}
        except (HarnessError, MemoryError, torch.OutOfMemoryError) as e:
            why = why or str(e)
            continue
        return [v if v.ok else _settled(v, again[v.measurement], dtype) for v in verdicts]
    return [v if v.ok else replace(v, repeated=f"not possible: {why}") for v in verdicts]


def _settled(verdict: Verdict, wide: Verdict, dtype: str) -> Verdict:
    told = f"{dtype}: {wide.max_abs:.1e}, " + ("noise" if wide.ok else "still apart")
    return replace(verdict, ok=wide.ok, repeated=told)


@dataclass(frozen=True)
class Sanity:
    """Writes `sanity`: the certificate of this run, one row a measurement. A disagreement ends the run with exit 1."""

    model: ModelSpec
    identity: ModelIdentity
    sampler: Sampler
    num_prompts: int
    seed: int
    name: ClassVar[str] = "sanity"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("prompts", "contexts")
    row_bytes: ClassVar[int] = 10_000

    @classmethod
    def build(cls, given: Inputs) -> "Sanity":
        e = given.experiment
        return cls(given.model, given.identity, Sampler.of(e), e.sanity.num_prompts, given.seed)

    def params(self) -> dict[str, Any]:
        return {"num_prompts": self.num_prompts, "sampling": asdict(self.sampler)}

    def items(self, tables: Tables) -> list[Item]:
        codec = load_codec(self.model, self.identity)
        targets = {p["prompt_id"]: p["target"] for p in tables["prompts"][: self.num_prompts]}
        rows = [row for row in tables["contexts"] if row["prompt_id"] in targets]
        subjects = subjects_of(rows, targets, codec, self.seed)
        tokens = sum(len(s.token_ids) for s in subjects)
        return [Item(name, tokens, subjects) for name in CHECKS] if subjects else []

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item]) -> list[ItemResult]:
        return [self._one(context, item) for item in items]

    def _one(self, lm: LM, item: Item) -> ItemResult:
        group = CHECKS[item.key]
        verdicts = group(lm, item.payload, self.sampler)
        if self.identity.dtype in HALF:
            verdicts = repeat_wider(self.model, verdicts, group, item.payload, self.sampler)
        return ItemResult(item.key, {"sanity": [_row(v) for v in verdicts]})


def _row(verdict: Verdict) -> dict[str, Any]:
    """A row of `sanity`; an infinite difference is stored as 1e38, since the engine refuses what no 32-bit float holds."""
    largest = 1e38
    return asdict(verdict) | {
        "max_abs": min(verdict.max_abs, largest), "max_rel": min(verdict.max_rel, largest),
    }  # fmt: skip


def _good(result: _T | ItemFailed) -> _T:
    if isinstance(result, ItemFailed):
        raise result
    return result


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


def _compare_tokens(lm: LM, subjects: Sequence[Subject], name: str, sampling: Sampling) -> Verdict:
    tolerance = TOLERANCE[lm.identity.dtype][0]
    gap = _Gap(name, tolerance, excused=sampling.temperature == 0)
    requests = [Request(s.token_ids, s.noise_key) for s in subjects]
    want = [plain.complete(lm, r, sampling) for r in requests]
    for size in BATCH_SIZES:
        done = [c for batch in _cut(requests, size) for c in decode([lm], batch, sampling)]
        for subject, a, b in zip(subjects, want, done, strict=True):
            gap.num_items += 1
            _update_tokens(gap, subject.key, a, _good(b), tolerance)
    return gap.verdict()


def _update_tokens(gap: _Gap, key: str, a: Completion, b: Completion, tolerance: float) -> None:
    """Count a completion that differs, and take in the log-probabilities of the tokens both have in common."""
    step = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
    differs = a.token_ids != b.token_ids
    common = min(len(a.token_ids), len(b.token_ids)) if step is None else step
    apart = max((abs(p - q) for p, q in zip(a.logprobs[:common], b.logprobs[:common], strict=True)), default=0.0)
    if apart > gap.max_abs:
        gap.max_abs, gap.worst = apart, key
    if differs:
        gap.flips += 1
        gap.near_ties += step is not None and a.margins[step] <= 2 * tolerance
        gap.worst = key


def _probe(lm: LM, subject: Subject, greedy: Sampling) -> Probe:
    answer = plain.complete(lm, Request(subject.token_ids), greedy).token_ids
    return probe_of(
        subject.token_ids,
        answer,
        min(3, len(answer) - 1),
        subject.forms.first_tokens,
        subject.row["spans"],
        keep_whole=True,
    )


def _compare_view(
    gaps: Mapping[str, _Gap], key: str, reference: Sequence[tuple[Any, dict[str, Any]]], view: View,
    spans: Mapping[str, Span | None],
) -> None:  # fmt: skip
    for step, (rows, want) in zip(view.steps, reference, strict=True):
        assert step.rows is not None, "asked for"
        gaps["attention"].update(key, rows, step.rows)
        gaps["attention"].update(key, rows.mean(1), step.mean_row)
        masses = [rows[..., slice(*(spans[name] or (0, 0)))].sum(-1) for name in SPANS]
        gaps["attention"].update(key, np.stack(masses, -1), step.masses)
        for column in ("p_emitted", "p_target"):
            gaps["lens"].update(key, want["p_out" if column == "p_target" else column], step.lens[column])
        for column in ("entropy", "kl_final"):
            gaps["lens_nats"].update(key, want[column], step.lens[column])
        for column in ("p_in", "p_attn", "p_out"):
            gaps["decomposition"].update(key, want[column], getattr(step, column))
    first = reference[0][1]
    scale = np.abs(first["resid_norm"]).max()
    gaps["resid_norm"].update(key, first["resid_norm"] / scale, view.resid_norm / scale)
    if view.top_neurons is not None and view.top_values is not None:
        largest = np.abs(first["neurons"]).max()
        taken = np.take_along_axis(first["neurons"], view.top_neurons, axis=1)
        gaps["neurons"].update(key, taken / largest, view.top_values / largest)
        # The ones chosen must be the largest: the least of them against what a full sort would have kept.
        best = np.sort(np.abs(first["neurons"]), axis=1)[:, ::-1][:, : view.top_neurons.shape[1]]
        gaps["neurons"].update(key, best / largest, np.abs(view.top_values) / largest)


def _sweep(
    lm: LM, pair: Pair, patches: Sequence[str], subject: Subject, greedy: Sampling, layers: Sequence[int]
) -> Iterator[Patched]:
    trie = build_trie(subject.forms.events)
    rows = sweep(lm, pair, patches, trie, greedy.max_new_tokens, greedy.stop_at_newline, layers)
    yield from (_good(row) for row in rows[1:])


def _cut(things: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for i in range(0, len(things), size):
        yield things[i : i + size]
