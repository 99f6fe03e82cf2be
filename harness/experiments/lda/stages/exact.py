"""Stage `exact`: how probable it is that a completion begins with a phrase, under every arm, without sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.special import logsumexp

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.lda.inputs import Both, Inputs, beginnings_of, contexts_of
from harness.models.arms import ArmScores, score_arms
from harness.models.load import Codec
from harness.models.rollout import Pair
from harness.text.words import Tokens, Trie, build_trie, prefix_free
from harness.tolerance import TOLERANCE

_MODELS = (0.0, -1.0)
"""The arms that are the model after and the one before."""
_ROUNDING = TOLERANCE["float32"].prob
"""How far rounding may push a sum of disjoint probabilities over 1."""


@dataclass(frozen=True)
class Ways:
    """Token sequences whose texts begin with one of a detector's phrases, none of which begins another; `open`: the first
    steps towards further ones, which are not followed."""

    whole: tuple[Tokens, ...]
    open: tuple[Tokens, ...]


@dataclass(frozen=True)
class Phrases:
    """What is asked of every context, by detector, and one trie for all of it."""

    ways: Mapping[str, Ways]

    @cached_property
    def trie(self) -> Trie:
        return build_trie(dict.fromkeys(s for w in self.ways.values() for s in (*w.whole, *w.open)))

    @cached_property
    def places(self) -> dict[str, tuple[list[int], list[int]]]:
        """By detector where its sequences stand in the trie: those followed to the end, and the others."""
        at = {sequence: n for n, sequence in enumerate(self.trie.sequences)}
        return {name: ([at[s] for s in w.whole], [at[s] for s in w.open]) for name, w in self.ways.items()}


def phrases_of(codec: Codec, phrases: Mapping[str, Sequence[str]]) -> Phrases:
    """The ways to begin with one of each detector's phrases."""
    found = {}
    for name, some in phrases.items():
        ways = [beginnings_of(codec, phrase) for phrase in some]
        whole = tuple(prefix_free(s for w in ways for s in w.whole))
        known = set(whole)
        # What begins with a sequence that is counted is counted already.
        left = dict.fromkeys(s for w in ways for s in w.open if not any(s[:n] in known for n in range(1, len(s) + 1)))
        found[name] = Ways(whole, tuple(prefix_free(left)))
    return Phrases(found)


@dataclass(frozen=True)
class Exact:
    """Writes `exact_rates`: for each detector with phrases at the start and each arm one row a prompt."""

    both: Both
    arms: Mapping[str, float]
    phrases: Mapping[str, tuple[str, ...]]
    name = "exact"
    version = 1
    reads = MappingProxyType({"contexts": ("prompt_id", "condition", "token_ids")})
    loads_ahead = 8_192
    row_bytes = 2_000

    @classmethod
    def build(cls, given: Inputs) -> "Exact":
        return cls(given.both, given.arms, given.phrases)

    def params(self) -> dict[str, Any]:
        return {"alphas": list(self.arms.values()), "phrases": {name: list(p) for name, p in self.phrases.items()}}

    def items(self, tables: AnyTables) -> list[Item[tuple[int, ...]]]:
        if not self.phrases:
            return []
        size = len(self._asked.trie)
        return [
            Item(row["prompt_id"], len(row["token_ids"]) + size, ())
            for row in Tables.of(tables).streamed("contexts", ("prompt_id", "token_ids"))
        ]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[tuple[int, ...]]]:
        token_ids = contexts_of(tables, [i.key for i in items])
        return [replace(i, payload=token_ids[i.key]) for i in items]

    def setup(self) -> Pair:
        return self.both.loaded()

    def run(self, context: Pair, items: Sequence[Item[tuple[int, ...]]]) -> list[ItemResult]:
        asked = self._asked
        alphas = (*self.arms.values(), *_MODELS)
        scores = score_arms(context, [i.payload for i in items], [asked.trie] * len(items), alphas)
        return [self._result(i.key, asked, s) for i, s in zip(items, scores, strict=True)]

    @cached_property
    def _asked(self) -> Phrases:
        return phrases_of(self.both.codec, self.phrases)

    def _result(self, prompt_id: str, asked: Phrases, scores: ArmScores | ItemFailed) -> ItemResult:
        if isinstance(scores, ItemFailed):
            return ItemResult.failed(prompt_id, scores)
        rows = rates(asked, scores, list(self.arms))
        over = max(row["logp"] or 0.0 for row in rows)
        if over > _ROUNDING:
            return ItemResult.failed(prompt_id, f"a probability of {np.exp(over):.6f}: disjoint events cannot exceed 1")
        return ItemResult(prompt_id, {"exact_rates": [{"prompt_id": prompt_id, **row} for row in rows]})


def rates(asked: Phrases, scores: ArmScores, conditions: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one prompt but for its id, from scores of `conditions` and, behind them, the model after and before.

    A phrase that an arm rules out has NULL for its log-probability.
    """
    rows = []
    for name, (whole, left) in asked.places.items():
        sums, open_ = (_summed(scores.logprobs[:, places]) for places in (whole, left))
        for k, condition in enumerate(conditions):
            rows.append(
                {
                    "detector": name,
                    "condition": condition,
                    "logp": _known(sums[k]),
                    "num_sequences": len(whole),
                    "logp_after": _known(sums[-2]),
                    "logp_before": _known(sums[-1]),
                    "logp_left_out": _known(open_[k]),
                }
            )
    return rows


def _summed(logprobs: np.ndarray) -> np.ndarray:
    if not logprobs.shape[1]:
        return np.full(len(logprobs), -np.inf)
    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(logprobs, axis=1))


def _known(logp: float) -> float | None:
    """Rounding may push a certain event a little over 1."""
    if not np.isfinite(logp):
        return None
    return 0.0 if 0 < logp <= _ROUNDING else float(logp)
