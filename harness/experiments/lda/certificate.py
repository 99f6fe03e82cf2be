"""The certificate of amplification: the fast path against two plain forwards of the whole text.

The reference (harness/models/plain.py) takes one text at a time, without padding, cache or our attention, and combines the
two models in float64. The fast path makes each rollout alone and among all others, where its row parts from theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np

from harness.engine import AnyTables, Tables
from harness.errors import ItemFailed
from harness.experiments.certificate import Certificate, Gap, Verdict
from harness.experiments.lda.inputs import CONDITION, Both, Inputs
from harness.experiments.lda.stages.exact import Phrases, phrases_of
from harness.experiments.lda.stages.prompts import context_row
from harness.models import plain
from harness.models.arms import score_arms
from harness.models.load import identify, load
from harness.models.noise import row_key
from harness.models.raised import raised
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from harness.tolerance import TOLERANCE

Kind = Literal["rollouts", "exact", "differences"]
MEASURED: dict[Kind, tuple[str, ...]] = {
    "rollouts": ("tokens", "logp of both models", "logp of the arms"),
    "exact": ("exact rates",),
    "differences": ("token differences",),
}
"""The measurements of each kind of item, all in nats."""
_STEPS = 32
"""Tokens of a rollout that are compared: what goes wrong goes wrong where rows part, and padding begins."""
_SEQUENCES = 3
"""Of a phrase's sequences the likeliest, the longest and the last, unless all are asked for."""
_NUM_SAMPLES = 2
"""Rollouts of each prompt and arm in the company."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sampler:
    """How rollouts are made, as the stage makes them."""

    arms: Mapping[str, float]
    rule: Rule
    max_new_tokens: int
    common_noise: bool
    seed: int

    def ask(self, subject: "Subject", condition: str, sample: int) -> Ask:
        """The rollout of one sample under one arm, shorter than in the run."""
        noise = CONDITION if self.common_noise else condition
        key = row_key(self.seed, subject.prompt_id, noise, sample)
        return Ask(subject.token_ids, key, self.arms[condition], min(self.max_new_tokens, _STEPS))


@dataclass(frozen=True)
class Subject:
    """One prompt, and the context that both models continue."""

    prompt_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """What an item measures: a kind for one subject, rollouts under one arm. `company`: all subjects, itself among them."""

    kind: Kind
    subject: Subject
    company: tuple[Subject, ...]
    condition: str = ""
    is_least: bool = False

    @property
    def name(self) -> str:
        """The subject, as the certificate names it."""
        return f"{self.subject.prompt_id}|{self.condition}" if self.condition else self.subject.prompt_id

    @property
    def measurements(self) -> tuple[str, ...]:
        """Those of its kind."""
        return MEASURED[self.kind]


class Bench:
    """Two models to measure both ways, and the company's rollouts once they were made."""

    def __init__(self, pair: Pair, sampler: Sampler, phrases: Phrases, is_full: bool = False):
        self.pair, self.sampler, self.phrases, self.is_full = pair, sampler, phrases, is_full
        self._rollouts: dict[tuple[Subject, ...], dict[tuple[str, str], Rollout | ItemFailed]] = {}

    @property
    def tolerance(self) -> float:
        """In nats: that of the model that is computed with less."""
        return max(TOLERANCE[lm.identity.dtype].nats for lm in self.pair.lms)

    def among(self, company: tuple[Subject, ...]) -> dict[tuple[str, str], Rollout | ItemFailed]:
        """The first rollout of every subject and arm, all made at once."""
        if company not in self._rollouts:
            keys = [(s, c, n) for s in company for c in self.sampler.arms for n in range(_NUM_SAMPLES)]
            asks = [self.sampler.ask(s, c, n) for s, c, n in keys]
            done = rollouts(self.pair, asks, self.sampler.rule, tuple(self.sampler.arms.values()))
            firsts = {(s.prompt_id, c): d for (s, c, n), d in zip(keys, done, strict=True) if not n}
            self._rollouts = {company: firsts}
        return self._rollouts[company]


def tasks_of(subjects: Sequence[Subject], conditions: Sequence[str], *, has_phrases: bool) -> list[Task]:
    """All there is to measure, in the order in which it is to be measured: each kind on the first subject, then on the next;
    rollouts under the last arm first, which is the furthest from either model."""
    company, tasks = tuple(subjects), []
    for n, condition in enumerate(reversed(conditions)):
        for subject in subjects:
            tasks.append(Task("rollouts", subject, company, condition))
            if not n:
                tasks += [Task("exact", subject, company)] if has_phrases else []
                tasks.append(Task("differences", subject, company))
    first = {task.kind: n for n, task in reversed(list(enumerate(tasks)))}
    return [replace(task, is_least=first[task.kind] == n) for n, task in enumerate(tasks)]


def measure(bench: Bench, task: Task) -> list[Verdict]:
    """Verdicts of one item. Raises ItemFailed where the fast path has no result for it."""
    checks: dict[str, Callable[[Bench, Task], list[Verdict]]] = {
        "rollouts": _check_rollouts,
        "exact": _check_exact,
        "differences": _check_differences,
    }
    return checks[task.kind](bench, task)


def _check_rollouts(bench: Bench, task: Task) -> list[Verdict]:
    """A rollout made alone and among all others: each token must be the one that is drawn behind the tokens before it."""
    ask = bench.sampler.ask(task.subject, task.condition, 0)
    alphas, rule = tuple(bench.sampler.arms.values()), bench.sampler.rule
    tokens, of_models, of_arms = gaps = [Gap(m, task.name, bench.tolerance) for m in task.measurements]
    (alone,) = rollouts(bench.pair, [ask], rule, alphas)
    for done in (alone, bench.among(task.company)[task.subject.prompt_id, task.condition]):
        _update_rollout(bench, ask, _good(done), tokens, of_models, of_arms)
    return [gap.verdict() for gap in gaps]


def _update_rollout(bench: Bench, ask: Ask, done: Rollout, tokens: Gap, of_models: Gap, of_arms: Gap) -> None:
    rule, alphas = bench.sampler.rule, tuple(bench.sampler.arms.values())
    want = plain.replay(bench.pair, ask, rule, done.token_ids, alphas)
    tokens.num_items += 1
    apart = [n for n, (a, b) in enumerate(zip(done.token_ids, want.tokens, strict=True)) if a != b]
    # Both sides of what is compared may be a tolerance off, and are divided by the temperature.
    room = 2 * (1 + 2 * abs(ask.alpha)) * bench.tolerance / (rule.temperature or 1.0)
    if apart:
        tokens.flips += 1
        tokens.near_ties += all(want.leads[n] <= room for n in apart)
        tokens.worst = tokens.subject
    of_models.update([want.told.logp_after, want.told.logp_before], [done.logp_after, done.logp_before])
    # z is α times a difference of numbers that are each a tolerance off.
    scale = 1 + 2 * max(map(abs, alphas))
    of_arms.update(np.array(want.told.arm_steps) / scale, np.array(done.arm_steps) / scale)


def _check_exact(bench: Bench, task: Task) -> list[Verdict]:
    """Tree scores of phrases against one forward a sequence and model; nats a token, since rounding adds up."""
    alphas, trie = tuple(bench.sampler.arms.values()), bench.phrases.trie
    (gap,) = (Gap(m, task.name, bench.tolerance) for m in task.measurements)
    contexts = [s.token_ids for s in task.company]
    at = task.company.index(task.subject)
    found = [
        _good(score_arms(bench.pair, some, [trie] * len(some), alphas)[place])
        for some, place in (([contexts[at]], 0), (contexts, at))
    ]
    chosen = range(len(trie.sequences)) if bench.is_full else _some(found[0].logprobs[-1], trie.sequences)
    scale = 1 + 2 * max(map(abs, alphas))
    for n in chosen:
        want = plain.arm_sequence(bench.pair, task.subject.token_ids, trie.sequences[n], alphas)
        size = scale * len(trie.sequences[n])
        for scores in found:
            gap.update(want / size, scores.logprobs[:, n] / size)
    return [gap.verdict()]


def _some(logprobs: np.ndarray, sequences: Sequence[tuple[int, ...]]) -> list[int]:
    longest = max(range(len(sequences)), key=lambda n: len(sequences[n]))
    return list(dict.fromkeys((int(np.argmax(logprobs)), longest, len(sequences) - 1)))[:_SEQUENCES]


def _check_differences(bench: Bench, task: Task) -> list[Verdict]:
    """Means over a context's places, computed in a batch, against plain ones."""
    (gap,) = (Gap(m, task.name, bench.tolerance) for m in task.measurements)
    table = plain.differences(bench.pair, task.subject.token_ids)
    parts = [table[:-1], table[-1:]]
    want = [part.mean(0) if len(part) else None for part in parts]
    contexts = [s.token_ids for s in task.company]
    for some in ([task.subject.token_ids], contexts):
        sums = _good(raised(bench.pair, some)[some.index(task.subject.token_ids)])
        for k, of_place in enumerate(want):
            if of_place is not None:  # both of what is subtracted may be a tolerance off
                gap.update(of_place / 2, sums.mean[k] / 2)
    return [gap.verdict()]


@dataclass(frozen=True)
class LdaChecks:
    """All measurements, of the first prompts."""

    both: Both
    sampler: Sampler
    phrases: Mapping[str, tuple[str, ...]]
    num_subjects: int
    version = 1
    reads = MappingProxyType({"contexts": ("prompt_id", "condition", "token_ids")})

    @property
    def dtype(self) -> str:
        return self.both.of_after.dtype

    @property
    def device(self) -> str:
        return self.both.after.device

    def params(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_subjects,
            "alphas": list(self.sampler.arms.values()),
            "max_new_tokens": self.sampler.max_new_tokens,
            "phrases": {name: list(p) for name, p in self.phrases.items()},
        }

    def tasks(self, tables: AnyTables) -> list[Task]:
        rows = Tables.of(tables)["contexts"][: self.num_subjects]
        subjects = [Subject(row["prompt_id"], tuple(row["token_ids"])) for row in rows if row["token_ids"]]
        return tasks_of(subjects, list(self.sampler.arms), has_phrases=bool(self.phrases))

    def bench(self, is_full: bool) -> Bench:
        return self._bench(self.both.loaded(), is_full)

    def wider(self, dtype: str, device: str, is_full: bool) -> Bench:
        specs = (replace(spec, dtype=dtype, device=device) for spec in (self.both.after, self.both.before))
        after, before = (load(spec, identify(spec)) for spec in specs)
        return self._bench(Pair(after, before, self.both.pairing.num_common), is_full)

    def measure(self, bench: Bench, task: Task) -> list[Verdict]:
        return measure(bench, task)

    def left_out(self, bench: Bench, task: Task) -> list[Verdict]:
        return [Verdict(m, task.name, bench.tolerance, left_out=True) for m in task.measurements]

    def _bench(self, pair: Pair, is_full: bool) -> Bench:
        return Bench(pair, self.sampler, phrases_of(self.both.codec, self.phrases), is_full)


def certificate_of(given: Inputs) -> Certificate[Task, Bench]:
    """The stage, of as many prompts as the settings say."""
    own = given.settings
    sampler = Sampler(given.arms, given.rule, own.max_new_tokens, own.common_noise, given.seed)
    return Certificate.of(LdaChecks(given.both, sampler, given.phrases, own.sanity.num_prompts), own.sanity)


def tables_of(given: Inputs, num_prompts: int) -> dict[str, list[dict[str, Any]]]:
    """What the certificate reads, for the first prompts, without a run."""
    own, codec = given.settings, given.both.codec
    rows = [context_row(codec, p, own.format, own.system_prompt) for p in given.prompts[:num_prompts]]
    return {"contexts": rows, "sanity_items": []}


def _good(result: _T | ItemFailed) -> _T:
    if isinstance(result, ItemFailed):
        raise result
    return result
