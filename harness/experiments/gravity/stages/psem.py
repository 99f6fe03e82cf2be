"""Stage `psem`: how strongly each context pulls toward its target, by one tree forward a context (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from harness.engine import Tables
from harness.engine.executors import Item, ItemResult
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Admitted, Inputs, item_key
from harness.models.load import LM, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.score import TreeScores, row_length, score_trees
from harness.text.words import WordForms, word_forms
from harness.tolerance import TOLERANCE

_ROUNDING = TOLERANCE["float32"].prob
"""How far rounding may push a sum of disjoint probabilities over 1."""


@dataclass(frozen=True)
class Psem:
    """Writes `psem`: p_sem over the prefix-free spellings, p_word at a word boundary, the paper's sum beside them."""

    model: ModelSpec
    identity: ModelIdentity
    admitted: Admitted
    name: ClassVar[str] = "psem"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    optional: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("prompts", "contexts")
    row_bytes: ClassVar[int] = 1_500

    @classmethod
    def build(cls, given: Inputs) -> "Psem":
        return cls(given.model, given.identity, Admitted("single_token" in given.stages, selected=False))

    def params(self) -> dict[str, Any]:
        return {"only_single_token": self.admitted.single_token}

    def items(self, tables: Tables) -> list[Item]:
        codec = load_codec(self.model, self.identity)
        targets = {p["prompt_id"]: p["target"] for p in tables["prompts"] if self.admitted(p)}
        forms = lru_cache(maxsize=None)(lambda word: word_forms(word, codec))
        return [
            Item(
                item_key(row["prompt_id"], row["condition"]),
                row_length(row["token_ids"], forms(targets[row["prompt_id"]]).trie),
                (row["prompt_id"], row["condition"], tuple(row["token_ids"]), forms(targets[row["prompt_id"]])),
            )
            for row in tables["contexts"]
            if row["prompt_id"] in targets
        ]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item]) -> list[ItemResult]:
        scores = score_trees(context, [i.payload[2] for i in items], [i.payload[3].trie for i in items])
        return [self._result(item, score) for item, score in zip(items, scores, strict=True)]

    def _result(self, item: Item, scores: TreeScores | ItemFailed) -> ItemResult:
        prompt_id, condition, _, forms = item.payload
        if isinstance(scores, ItemFailed):
            return ItemResult.failed(item.key, scores)
        if not forms.events:
            return ItemResult.failed(
                item.key, "no tokenisation of the target decodes back to it; the tokenizer cannot spell it"
            )
        row = {"prompt_id": prompt_id, "condition": condition} | measures(forms, scores)
        if row["p_sem"] > 1 + _ROUNDING:
            return ItemResult.failed(item.key, f"p_sem is {row['p_sem']:.6f}: disjoint events cannot exceed 1")
        return ItemResult(item.key, {"psem": [row]})


def measures(forms: WordForms, scores: TreeScores) -> dict[str, Any]:
    """The columns of one row of `psem` from the scores of its trie."""
    at = {sequence: i for i, sequence in enumerate(forms.trie.sequences)}
    events = [at[s] for s in forms.events]
    logprobs = scores.logprobs[events]
    # A spelling that carries its own punctuation is complete; the others are where the next token ends the word.
    word_end = np.where(forms.ends_at_boundary, 0.0, np.nan_to_num(scores.word_end[events], nan=0.0))
    return {
        "p_sem": float(np.exp(logprobs).sum()),
        "p_word": float(np.exp(logprobs + word_end).sum()),
        "paper_p_sem": min(1.0, float(np.exp(scores.logprobs[[at[s] for s in forms.paper]]).sum())),
        "num_sequences": len(events),
        "sequences": [list(s) for s in forms.events],
        "logprobs": logprobs.tolist(),
        "word_end": np.exp(word_end).tolist(),
        "entropy": scores.entropy,
        "top_ids": scores.top_ids.tolist(),
        "top_probs": scores.top_probs.tolist(),
    }
