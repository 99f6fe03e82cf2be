"""Stage `patching`: which layer's activations, taken from the baseline, change what is said under a ban (docs/method.md)."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np

from harness.engine import AnyTables, Item, ItemResult
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.experiments.gravity.settings import PatchingSettings
from harness.models.load import LM, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.patch import PATCHES, Move, Pair, Patched, sweep
from harness.text.detect import detect
from harness.text.words import Trie, build_trie, word_forms

_LOW, _HIGH = 0.7, 0.95
"""Bounds of the computed threshold on P0."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One prompt to patch: its two contexts, the trie of its target's spellings, and the tokens in each patch's span."""

    prompt_id: str
    target: str
    pair: Pair
    trie: Trie
    num_span: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch of one prompt, at every layer."""

    subject: Subject
    patch: str


@dataclass(frozen=True)
class Patching:
    """Writes `patching`. An item is one prompt and patch, at every layer; those of one prompt share its prefix."""

    model: ModelSpec
    identity: ModelIdentity
    rules: PatchingSettings
    max_new_tokens: int
    stop_at_newline: bool
    seed: int
    name = "patching"
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "target"),
            "contexts": ("prompt_id", "condition", "token_ids", "spans"),
            "suppression": ("prompt_id", "condition", "p0"),
            "outcomes": ("prompt_id", "condition", "outcome"),
        }
    )

    @classmethod
    def build(cls, given: Inputs) -> "Patching":
        """Between the conditions that the settings name; completions as the stage `greedy` makes them."""
        e = given.settings
        return cls(given.model, given.identity, e.patching, e.max_new_tokens_greedy, e.stop_at_newline, given.seed)

    @property
    def row_bytes(self) -> int:
        return 200 * self.identity.num_layers

    def params(self) -> dict[str, Any]:
        return self.rules.model_dump() | {
            "max_new_tokens": self.max_new_tokens,
            "stop_at_newline": self.stop_at_newline,
        }

    def items(self, tables: AnyTables) -> list[Item[Patch]]:
        codec = load_codec(self.model, self.identity)
        targets = {p["prompt_id"]: p["target"] for p in tables["prompts"]}
        contexts = {(c["prompt_id"], c["condition"]): c for c in tables["contexts"]}

        @cache
        def trie(word: str) -> Trie:
            return build_trie(word_forms(word, codec).events)

        items = []
        for prompt_id in choose(tables["suppression"], tables["outcomes"], self.rules, self.seed):
            target = targets[prompt_id]
            source, changed = contexts[prompt_id, "baseline"], contexts[prompt_id, self.rules.condition]
            pair = align(source, changed)
            subject = Subject(prompt_id, target, pair, trie(target), _num_span(pair, changed["spans"]["question"]))
            # A row goes through the layers from the one it is patched at, which is half of them in the mean.
            tokens = math.ceil(self.identity.num_layers / 2) * (1 + len(subject.trie))
            items += [Item(item_key(prompt_id, patch), tokens, Patch(subject, patch), prompt_id) for patch in PATCHES]
        return items

    def most_items(self, num_subjects: int) -> int:
        """All that `choose` can take: half of the prompts where no P0 is high, fewer or as many of each outcome."""
        most = num_subjects if self.rules.min_p0 is not None else num_subjects - num_subjects // 2
        return len(PATCHES) * min(most, 2 * (self.rules.max_prompts or most))

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Patch]]) -> list[ItemResult]:
        results: dict[str, ItemResult] = {}
        by_prompt = sorted(items, key=lambda i: (i.payload.subject.prompt_id, PATCHES.index(i.payload.patch)))
        for _, group in groupby(by_prompt, key=lambda i: i.payload.subject.prompt_id):
            results.update((r.key, r) for r in self._one_prompt(context, list(group)))
        return [results[i.key] for i in items]

    def _one_prompt(self, lm: LM, items: Sequence[Item[Patch]]) -> list[ItemResult]:
        """All patches of one prompt that can be made, in one sweep; the others say why not."""
        subject = items[0].payload.subject
        results = [ItemResult.failed(i.key, why) for i in items if (why := cannot(subject.pair, i.payload.patch))]
        able = [i for i in items if cannot(subject.pair, i.payload.patch) is None]
        if not able:
            return results
        patches = [i.payload.patch for i in able]
        try:
            original, *patched = sweep(
                lm, subject.pair, patches, subject.trie, self.max_new_tokens, self.stop_at_newline
            )
        except ItemFailed as e:
            return results + [ItemResult.failed(i.key, e) for i in able]
        num_layers = len(patched) // len(able)
        for n, item in enumerate(able):
            results.append(_result(lm, item, original, patched[n * num_layers : (n + 1) * num_layers]))
        return results


def choose(
    suppression: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any]], rules: PatchingSettings, seed: int
) -> list[str]:
    """Ids of the prompts to patch: P0 ≥ `threshold`, all whose greedy answer kept the ban, and as many that broke it.

    Where no prompt of one outcome is there, the other's are taken all the same. Seeded, independent of row order.
    """
    p0 = {s["prompt_id"]: s["p0"] for s in suppression if s["condition"] == rules.condition}
    outcome = {o["prompt_id"]: o["outcome"] for o in outcomes if o["condition"] == rules.condition}
    known = {prompt_id: p for prompt_id, p in p0.items() if prompt_id in outcome}
    if not known:
        return []
    least = threshold(list(known.values()), rules.min_p0)
    sides = {}
    for side in ("success", "failure"):
        ids = sorted(i for i, p in known.items() if p >= least and outcome[i] == side)
        random.Random(f"{seed}|patching|{side}").shuffle(ids)
        sides[side] = ids
    successes = sides["success"][: rules.max_prompts]
    failures = sides["failure"][: min(len(successes) or len(known), rules.max_prompts or len(known))]
    return [*successes, *failures]


def threshold(p0: Sequence[float], given: float | None) -> float:
    """The least P0 of the subset: `given`, or the third quartile kept within [.7, .95]; the median where that is empty."""
    if given is not None:
        return given
    computed = max(_LOW, min(_HIGH, float(np.quantile(p0, 0.75))))
    return computed if max(p0) >= computed else float(np.quantile(p0, 0.5))


def align(source: Mapping[str, Any], target: Mapping[str, Any]) -> Pair:
    """Which of the source's tokens stand for which of the target's, by token identity. `source` and `target` are rows
    of `contexts`; a span that one of them lacks, or that they do not share, gives None."""
    ids, to_ids = tuple(source["token_ids"]), tuple(target["token_ids"])
    prohibition = added(ids, source["spans"]["instruction"], to_ids, target["spans"]["instruction"])
    question = shared_span(ids, source["spans"]["question"], to_ids, target["spans"]["question"])
    instruction = None
    if prohibition is not None and source["spans"]["instruction"] is not None:
        start, end = source["spans"]["instruction"]
        instruction = Move(start, prohibition[0], min(end - start, prohibition[1] - prohibition[0]))
    return Pair(ids, to_ids, question, instruction, prohibition)


def added(
    source: Sequence[int], source_span: Sequence[int] | None, target: Sequence[int], target_span: Sequence[int] | None
) -> tuple[int, int] | None:
    """The tokens of the target's instruction that the source's does not have: what is left between their common
    beginning and their common end. None where nothing is."""
    if target_span is None:
        return None
    old = list(source[source_span[0] : source_span[1]]) if source_span is not None else []
    new = list(target[target_span[0] : target_span[1]])
    limit = min(len(old), len(new))
    head = next((i for i in range(limit) if old[i] != new[i]), limit)
    tail = next((i for i in range(limit - head) if old[-1 - i] != new[-1 - i]), limit - head)
    start, end = target_span[0] + head, target_span[1] - tail
    return (start, end) if start < end else None


def shared_span(
    source: Sequence[int], source_span: Sequence[int] | None, target: Sequence[int], target_span: Sequence[int] | None
) -> Move | None:
    """The longest run of equal tokens in both spans: all of them, unless a tokenizer joined an edge with what is outside."""
    if source_span is None or target_span is None:
        return None
    old, new = list(source[source_span[0] : source_span[1]]), list(target[target_span[0] : target_span[1]])
    found = SequenceMatcher(None, old, new, autojunk=False).find_longest_match()
    return Move(source_span[0] + found.a, target_span[0] + found.b, found.size) if found.size else None


def cannot(pair: Pair, patch: str) -> str | None:
    """Why a patch cannot be made between two contexts; None where it can."""
    if patch == "kv_question" and pair.question is None:
        return "kv_question: the two contexts share no token of the question"
    if patch == "kv_instruction" and pair.instruction is None:
        return "kv_instruction: the two contexts do not both have an instruction, or it is the same"
    if patch == "knockout_instruction" and pair.prohibition is None:
        return "knockout_instruction: the condition adds nothing to the baseline's instruction"
    return None


def _result(
    lm: LM, item: Item[Patch], original: Patched | ItemFailed, patched: Sequence[Patched | ItemFailed]
) -> ItemResult:
    subject, patch = item.payload.subject, item.payload.patch
    bad = next((p for p in (original, *patched) if isinstance(p, ItemFailed)), None)
    if bad is not None:
        return ItemResult.failed(item.key, bad)
    assert isinstance(original, Patched), "else it has failed"
    before = _p_sem(original)
    move = {"kv_question": subject.pair.question, "kv_instruction": subject.pair.instruction}.get(patch)
    whole = subject.num_span.get(patch, 1)
    try:
        was_present = _says(lm, original, subject.target)
        rows = [
            {
                "prompt_id": subject.prompt_id,
                "layer": p.layer,
                "patch": patch,
                "p_sem_original": before,
                "p_sem_patched": _p_sem(p),
                "delta_p": _p_sem(p) - before,
                "continuation": lm.codec.decode(p.continuation.token_ids),
                "flipped": _says(lm, p, subject.target) != was_present,
                "num_patched": move.length if move else whole,
                "num_span": whole,
            }
            for p in patched
            if isinstance(p, Patched)
        ]
    except ItemFailed as e:
        return ItemResult.failed(item.key, e)
    return ItemResult(item.key, {"patching": rows})


def _p_sem(row: Patched) -> float:
    return float(np.exp(row.scores.logprobs).sum())


def _says(lm: LM, row: Patched, target: str) -> bool:
    return detect(row.continuation.token_ids, target, lm.codec.decode).word_present


def _num_span(pair: Pair, question: Sequence[int] | None) -> dict[str, int]:
    """Tokens of the span that each patch of a span is about."""
    prohibition = pair.prohibition or (0, 0)
    width = prohibition[1] - prohibition[0]
    return {
        "kv_question": question[1] - question[0] if question else 0,
        "kv_instruction": width,
        "knockout_instruction": width,
    }
