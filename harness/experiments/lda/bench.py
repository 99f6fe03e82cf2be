"""`harness bench lda`: sweeps of many arms against the naive ways, results compared; exact rates and reweighted ones against
counting.

The naive ways are transformers alone, with the same noise, so that their texts can be held against ours token by token: a
batch an arm as the reference has it, one request at a time, and `generate` with a logits processor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicCache

from harness import tally
from harness.experiments.experiment import Case
from harness.experiments.lda.inputs import CONDITION, Inputs
from harness.experiments.lda.stages.exact import phrases_of
from harness.experiments.timing import Apart, Grounds, Timed, Way, in_turn
from harness.models import peers
from harness.models.arms import ArmScores, score_arms
from harness.models.load import LM, load, shared
from harness.models.noise import gumbel, row_key
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from harness.rates import Drawn, weights

_NEW_TOKENS, _NUM_SAMPLES = 40, 16
_ARMS = (-1.0, 0.0, 0.5, 1.0, 2.0)
_PROMPTS_A_BATCH = 8
"""Of the reference's batch."""
_ALONE = 8
"""Requests that are really made one at a time; the others would take as long each."""
_MOVED = 0.02
"""By how much of their spread the weights of a random model are moved, to make the model before it."""
_FIXED = Rule(stop_at_end=False)
"""Both sides write as many tokens."""
_AMONG = 320
"""Rollouts in memory at once."""
_COUNTED = 10_000
"""Rollouts a prompt that exact rates are held against."""
_TO_WITHIN, _RARE = 0.2, 1e-3
"""A rate of one in a thousand, known to a fifth of itself at 95 %."""


@dataclass(frozen=True)
class Sweep:
    """What is to be made: every arm and sample of every context."""

    pair: Pair
    contexts: tuple[tuple[int, ...], ...]

    def asks(self, arms: Sequence[float] = _ARMS, num_samples: int = _NUM_SAMPLES) -> list[Ask]:
        return [
            Ask(context, row_key(0, str(n), CONDITION, sample), alpha, _NEW_TOKENS)
            for n, context in enumerate(self.contexts)
            for alpha in arms
            for sample in range(num_samples)
        ]


def sweep(grounds: Grounds) -> Timed:
    """5 arms × 16 samples × 40 tokens of every context, by four ways."""
    made = Sweep(_pair(grounds), _contexts(grounds))
    pair, asks = made.pair, made.asks()
    plains = [peers.twin(lm, "sdpa") for lm in pair.lms]
    by_arm = [made.asks((alpha,)) for alpha in _ARMS]
    ways = (
        Way(f"{len(asks)} rollouts, rows that part", lambda: _ours(pair, asks), num_new=_num_new, once=True),
        Way("an arm at a time, left-padded, full logits", lambda: [r for some in by_arm for r in _batches(plains, some, pair)],
            _apart(asks, [a for some in by_arm for a in some]), once=True),
        Way("generate with a logits processor", lambda: [r for some in by_arm for r in _generated(plains, some, pair)],
            _apart(asks, [a for some in by_arm for a in some]), once=True),
        Way("one request at a time", lambda: [r for a in asks[::_every(asks)] for r in _batches(plains, [a], pair)],
            _apart(asks, asks[::_every(asks)]), once=True, scale=len(asks) / len(asks[::_every(asks)])),
    )  # fmt: skip
    before = tally.now()
    figures = in_turn(grounds.course, "sweep", ways)
    ours = (tally.now() - before).prefill
    theirs = sum(len(a.context) for a in asks) * len(pair.lms)
    line = (
        f"tokens of prompts forwarded: {ours:,.0f} here, {theirs:,} a row at a time ({theirs / ours:.0f} times as many)"
    )
    return Timed(tuple(figures), (line,), {"prefill": {"here": ours, "naive": theirs}})


def exact(grounds: Grounds) -> Timed:
    """The exact rate of a phrase under every arm against counting it in rollouts."""
    pair, contexts = _pair(grounds), _contexts(grounds)
    given: Inputs = grounds.prepared.given
    phrases = given.phrases or {"phrase": ("Sleeper agent",)}
    asked = phrases_of(given.both.codec, phrases)
    some = contexts[:4]
    few = [
        Ask(c, row_key(0, str(n), CONDITION, s), a, given.settings.max_new_tokens)
        for n, c in enumerate(some)
        for a in _ARMS
        for s in range(4)
    ]
    scale = len(contexts) * len(_ARMS) * _COUNTED / len(few)

    def scored() -> list[Any]:
        return score_arms(pair, contexts, [asked.trie] * len(contexts), _ARMS)

    ways = (
        Way(f"exact, {len(asked.trie.sequences)} sequences", scored),
        Way(f"{_COUNTED:,} rollouts a prompt and arm", lambda: _ours(pair, few, given.rule), scale=scale, once=True),
    )
    figures = in_turn(grounds.course, "exact", ways)
    tokens = [f.tokens for f in figures]
    rates = [np.exp(s.logprobs).sum(1) for s in scored() if isinstance(s, ArmScores)]
    error = max(math.sqrt(float(p) * (1 - float(p)) / _COUNTED) for p in np.mean(rates, axis=0))
    line = f"{tokens[1] / tokens[0]:,.0f} times the tokens for rates that counting still has to within {error:.1e} (σ) a prompt"
    return Timed(tuple(figures), (line,), {"tokens": {"exact": tokens[0], "counted": tokens[1]}})


def natural(grounds: Grounds) -> Timed:
    """How many rollouts a natural rate of one in a thousand takes, counted and reweighted."""
    given: Inputs = grounds.prepared.given
    pair, codec = _pair(grounds), given.both.codec
    contexts = _rare(grounds, pair)
    if not given.detectors:
        return Timed(lines=("natural: no detector is named, so there is no rate",))
    name, detector = next(iter(given.detectors.items()))
    arms = given.settings.alphas
    asks = [
        Ask(c, row_key(1, str(n), CONDITION, s), a, given.settings.max_new_tokens)
        for n, c in enumerate(contexts)
        for a in arms
        for s in range(_NUM_SAMPLES)
    ]
    done = [d for d in _ours(pair, asks, given.rule, arms) if isinstance(d, Rollout)]
    num, places = len(done), [n for n, _ in enumerate(contexts) for _ in range(len(arms) * _NUM_SAMPLES)]
    hits = [detector.span(codec.decode(d.token_ids)) is not None for d in done]
    drawn = Drawn(
        np.array(places),
        np.array([arms.index(a.alpha) for a in asks]),
        np.array(hits),
        np.array([sum(d.logp_after) for d in done]),
        np.array([d.arm_logps for d in done]),
    )
    each = weights(drawn)
    rate = float(each.mean())
    if not rate:
        return Timed(lines=(f"natural: {name} fired in none of {num:,} rollouts: try the bundled pair",))
    within = np.concatenate([each[drawn.prompt == p] - each[drawn.prompt == p].mean() for p in np.unique(drawn.prompt)])
    # Both as often as it takes for 1.96 σ to be a fifth of the rate; reweighted, the spread that these rollouts show.
    needed = (1.96 / (_TO_WITHIN * rate)) ** 2 * float((within**2).mean())
    counted = (1.96 / _TO_WITHIN) ** 2 * (1 - rate) / rate
    line = (
        f"{name}: natural rate {rate:.2g} of {len(contexts)} prompts, from {num:,} rollouts; to ±{_TO_WITHIN:.0%} it takes "
        f"{counted:,.0f} rollouts counted and {needed:,.0f} reweighted, {counted / needed:.0f} times fewer"
    )
    return Timed(lines=(line,), found={"natural": {"rate": rate, "counted": counted, "reweighted": needed}})


def _pair(grounds: Grounds) -> Pair:
    """The run's two models; beside a random one its own weights, moved a little, since the other would be the same."""
    both = grounds.prepared.given.both
    after, num_common = grounds.course.lm, both.pairing.num_common
    if both.after.name.startswith("random:"):
        return Pair(after, _moved(load(both.after, both.of_after)), num_common)
    return Pair(after, shared(both.before, both.of_before), num_common)


def _moved(lm: LM) -> LM:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.add_(_MOVED * parameter.std() * torch.randn(parameter.shape).to(parameter))
    return lm


def _contexts(grounds: Grounds) -> tuple[tuple[int, ...], ...]:
    given: Inputs = grounds.prepared.given
    prompts = given.prompts[: grounds.num_contexts]
    return tuple(tuple(given.both.codec.context(p.text)[0]) for p in prompts)


def _rare(grounds: Grounds, pair: Pair) -> tuple[tuple[int, ...], ...]:
    """Those of the run's prompts whose exact rate is nearest to one in a thousand; the first ones where none is known."""
    given: Inputs = grounds.prepared.given
    if not given.phrases:
        return _contexts(grounds)
    codec = given.both.codec
    asked = phrases_of(codec, dict([next(iter(given.phrases.items()))]))
    ((whole, _),) = asked.places.values()
    contexts = [tuple(codec.context(p.text)[0]) for p in given.prompts]
    found = []
    for n in range(0, len(contexts), _PROMPTS_A_BATCH):
        some = contexts[n : n + _PROMPTS_A_BATCH]
        for context, scores in zip(some, score_arms(pair, some, [asked.trie] * len(some), (0.0,)), strict=True):
            if isinstance(scores, ArmScores):
                rate = float(np.exp(scores.logprobs[0, whole]).sum())
                found.append((abs(math.log(max(rate, 1e-30) / _RARE)), context))
    return tuple(context for _, context in sorted(found)[: grounds.num_contexts])


def _ours(pair: Pair, asks: Sequence[Ask], rule: Rule = _FIXED, arms: Sequence[float] = _ARMS) -> list[Any]:
    return [r for n in range(0, len(asks), _AMONG) for r in rollouts(pair, asks[n : n + _AMONG], rule, arms)]


def _num_new(made: Sequence[Any]) -> int:
    return sum(len(r.token_ids) for r in made)


def _every(asks: Sequence[Ask]) -> int:
    return max(1, len(asks) // _ALONE)


def _apart(asks: Sequence[Ask], own_asks: Sequence[Ask]) -> Callable[[Any, Any], Apart]:
    """The share of texts that are not ours: near ties may fall either way."""
    place = {(a.context, a.key, a.alpha): n for n, a in enumerate(asks)}

    def compare(ours: Sequence[Any], own: Sequence[Sequence[int]]) -> Apart:
        same = [
            list(ours[place[a.context, a.key, a.alpha]].token_ids) == list(tokens)
            for a, tokens in zip(own_asks, own, strict=True)
        ]
        return Apart(1 - sum(same) / len(same), "share of samples")

    return compare


def _combined(tables: Sequence[torch.Tensor], alpha: float, num_common: int) -> torch.Tensor:
    after, before = (t[:, :num_common].float().log_softmax(-1) for t in tables)
    return after + alpha * (after - before)


def _drawn(z: torch.Tensor, keys: torch.Tensor, step: int) -> torch.Tensor:
    ids = torch.arange(z.shape[1], device=z.device).expand(len(z), -1)
    return (z.double() + gumbel(keys, step, ids)).argmax(-1)


@torch.inference_mode()
def _batches(plains: Sequence[Any], asks: Sequence[Ask], pair: Pair) -> list[list[int]]:
    """The reference's batch: rows of one arm left-padded, a cache a model, logits of the whole prompts, to a fixed length."""
    size, found = _PROMPTS_A_BATCH * _NUM_SAMPLES, []
    for n in range(0, len(asks), size):
        some = asks[n : n + size]
        tokens, mask = _left_padded(some, pair.device)
        keys = torch.tensor([a.key for a in some], device=pair.device)
        caches = [DynamicCache() for _ in plains]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows: list[torch.Tensor] = []
        for step in range(_NEW_TOKENS):
            tables = [
                m(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=c, use_cache=True
                ).logits[:, -1]
                for m, c in zip(plains, caches, strict=True)
            ]
            tokens = _drawn(_combined(tables, some[0].alpha, pair.num_common), keys, step)[:, None]
            rows.append(tokens)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            positions = positions[:, -1:] + 1
        found += torch.cat(rows, 1).tolist()
    return found


class _Amplifier(LogitsProcessor):
    """What `generate` is given: the model before, with a cache of its own, and the noise, so that it is greedy over both."""

    def __init__(self, before: Any, asks: Sequence[Ask], mask: torch.Tensor, num_common: int):
        self._before, self._mask, self._num_common = before, mask, num_common
        self._alpha, self._cache = asks[0].alpha, DynamicCache()
        self._keys = torch.tensor([a.key for a in asks], device=mask.device)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        new = input_ids if not self._step else input_ids[:, -1:]
        if self._step:
            self._mask = torch.cat([self._mask, torch.ones_like(new)], 1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        made = self._before(
            input_ids=new,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        z = _combined([scores, made.logits[:, -1]], self._alpha, self._num_common)
        chosen = _drawn(z, self._keys, self._step)
        self._step += 1
        return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)


@torch.inference_mode()
def _generated(plains: Sequence[Any], asks: Sequence[Ask], pair: Pair) -> list[list[int]]:
    size, found = _PROMPTS_A_BATCH * _NUM_SAMPLES, []
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    for n in range(0, len(asks), size):
        some = asks[n : n + size]
        tokens, mask = _left_padded(some, pair.device)
        processor = _Amplifier(plains[1], some, mask, pair.num_common)
        made = plains[0].generate(
            input_ids=tokens, attention_mask=mask, generation_config=config, logits_processor=[processor]
        )
        found += made[:, tokens.shape[1] :].tolist()
    return found


def _left_padded(asks: Sequence[Ask], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(a.context) for a in asks)
    tokens = [[*[0] * (width - len(a.context)), *a.context] for a in asks]
    mask = [[*[0] * (width - len(a.context)), *[1] * len(a.context)] for a in asks]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


CASES: Mapping[str, Case] = {"sweep": Case(sweep), "exact": Case(exact), "natural": Case(natural)}
