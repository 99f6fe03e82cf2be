"""Stage `psem`: how strongly each context pulls toward its target, by one tree forward a context (docs/method.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Admitted, Inputs, contexts_of, item_key
from harness.models.load import LM, Codec, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.score import TreeScores, row_length, score_trees
from harness.text.words import WordForms, word_forms
from harness.tolerance import TOLERANCE

_ROUNDING = TOLERANCE["float32"].prob
"""How far rounding may push a sum of disjoint probabilities over 1."""


@dataclass(frozen=True, slots=True)
class Context:
    """One context to score; its ids and the spellings of its target come when its batch is about to run."""

    prompt_id: str
    condition: str
    target: str
    token_ids: tuple[int, ...] = ()
    forms: WordForms | None = None


@lru_cache(maxsize=4_096)
def _forms(codec: Codec, word: str) -> WordForms:
    """The spellings of a word. As many words are kept as runs usually have: each is asked for with every context."""
    return word_forms(word, codec)


@dataclass(frozen=True)
class Psem:
    """Writes `psem`: p_sem over the prefix-free spellings, p_word at a word boundary, the paper's sum beside them."""

    model: ModelSpec
    identity: ModelIdentity
    admitted: Admitted
    name = "psem"
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "target", "single_token", "tier"),
            "contexts": ("prompt_id", "condition", "token_ids"),
        }
    )
    loads_ahead = 8_192
    row_bytes = 1_500

    @classmethod
    def build(cls, given: Inputs) -> "Psem":
        return cls(given.model, given.identity, Admitted("single_token" in given.stages, selected=False))

    def params(self) -> dict[str, Any]:
        return {"only_single_token": self.admitted.single_token}

    def items(self, tables: AnyTables) -> list[Item[Context]]:
        codec, given = load_codec(self.model, self.identity), Tables.of(tables)
        targets = {p["prompt_id"]: p["target"] for p in given["prompts"] if self.admitted(p)}
        return [
            Item(
                item_key(row["prompt_id"], row["condition"]),
                row_length(row["token_ids"], _forms(codec, target).trie),
                Context(row["prompt_id"], row["condition"], target),
            )
            for row in given.streamed("contexts")
            if (target := targets.get(row["prompt_id"])) is not None
        ]

    def load(self, tables: Tables, items: Sequence[Item[Context]]) -> list[Item[Context]]:
        codec, token_ids = (
            load_codec(self.model, self.identity),
            contexts_of(tables, ((i.payload.prompt_id, i.payload.condition) for i in items)),
        )
        return [
            replace(
                i,
                payload=replace(
                    i.payload,
                    token_ids=token_ids[i.payload.prompt_id, i.payload.condition],
                    forms=_forms(codec, i.payload.target),
                ),
            )
            for i in items
        ]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Context]]) -> list[ItemResult]:
        forms = [i.payload.forms or _forms(context.codec, i.payload.target) for i in items]
        scores = score_trees(context, [i.payload.token_ids for i in items], [f.trie for f in forms])
        return [self._result(i, f, score) for i, f, score in zip(items, forms, scores, strict=True)]

    def _result(self, item: Item[Context], forms: WordForms, scores: TreeScores | ItemFailed) -> ItemResult:
        if isinstance(scores, ItemFailed):
            return ItemResult.failed(item.key, scores)
        if not forms.events:
            return ItemResult.failed(
                item.key, "no tokenisation of the target decodes back to it; the tokenizer cannot spell it"
            )
        row: dict[str, Any] = {"prompt_id": item.payload.prompt_id, "condition": item.payload.condition}
        row |= measures(forms, scores)
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
