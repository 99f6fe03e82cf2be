"""Stage `mechanism`: what happens inside at the first answer token and at the token where X starts (docs/method.md)."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.engine import AnyTables, Artifact, Item, ItemResult
from harness.errors import ItemFailed
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.experiments.gravity.settings import StoredSettings
from harness.models.inside import Probe, StepView, View, look_inside
from harness.models.load import LM, ModelIdentity, ModelSpec, load_codec, shared
from harness.models.measure import SPANS, attention_ratios
from harness.text.words import Tokens, word_forms

STEP_KINDS = ("first", "decision")
_BYTES_PER_LAYER = 3_000
"""Of one item's rows: two steps of attention, lens and decomposition, and the norms of some sixty tokens."""


@dataclass(frozen=True, slots=True)
class Looked:
    """One context to look into, and at which of its tokens."""

    prompt_id: str
    condition: str
    probe: Probe


@dataclass(frozen=True)
class Mechanism:
    """Writes `attention`, `lens`, `decomposition` and `activations`, and files for a stored subset."""

    model: ModelSpec
    identity: ModelIdentity
    stored: StoredSettings
    seed: int
    name = "mechanism"
    version = 1
    reads = MappingProxyType(
        {
            "prompts": ("prompt_id", "category", "target"),
            "contexts": ("prompt_id", "condition", "token_ids", "spans"),
            "greedy_answers": ("prompt_id", "condition", "token_ids", "word_present", "first_step"),
        }
    )

    @classmethod
    def build(cls, given: Inputs) -> "Mechanism":
        return cls(given.model, given.identity, given.settings.stored, given.seed)

    @property
    def row_bytes(self) -> int:
        return _BYTES_PER_LAYER * self.identity.num_layers

    def params(self) -> dict[str, Any]:
        return {"stored": self.stored.model_dump(mode="json")}

    def items(self, tables: AnyTables) -> list[Item[Looked]]:
        codec = load_codec(self.model, self.identity)
        targets = {p["prompt_id"]: p["target"] for p in tables["prompts"]}
        answers = {(a["prompt_id"], a["condition"]): a for a in tables["greedy_answers"]}
        kept = stored_prompts(tables["prompts"], tables["greedy_answers"], self.stored, self.seed)

        @cache
        def first_tokens(word: str) -> Tokens:
            return word_forms(word, codec).first_tokens

        items = []
        for row in tables["contexts"]:
            prompt_id, condition = row["prompt_id"], row["condition"]
            answer = answers.get((prompt_id, condition))
            if answer is None:  # it failed in an earlier stage, and is a row of `events` there
                continue
            probe = probe_of(
                row["token_ids"],
                answer["token_ids"],
                answer["first_step"],
                first_tokens(targets[prompt_id]),
                row["spans"],
                prompt_id in kept,
            )
            items.append(Item(item_key(prompt_id, condition), len(probe.tokens), Looked(prompt_id, condition, probe)))
        return items

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Looked]]) -> list[ItemResult]:
        views = look_inside(context, [i.payload.probe for i in items])
        return [_result(item, view) for item, view in zip(items, views, strict=True)]


def probe_of(
    context: Sequence[int],
    answer: Sequence[int],
    first_step: int | None,
    targets: Tokens,
    spans: Mapping[str, Sequence[int] | None],
    keep_whole: bool = False,
) -> Probe:
    """The probe of an answer: its first token, and the one where the target starts (the first, where it does not)."""
    decision = first_step or 0
    last = len(context) - 1
    return Probe(
        (*context, *answer[:decision]),
        (last, last + decision),
        (answer[0], answer[decision]),
        targets,
        {name: None if span is None else (span[0], span[1]) for name, span in spans.items()},
        keep_whole,
    )


def stored_prompts(
    prompts: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], rules: StoredSettings, seed: int
) -> set[str]:
    """Ids of the prompts whose files are kept: those named, or per category failures and as many successes, at least one.

    A prompt fails where its greedy answer has the target under any condition but `baseline`.
    """
    if rules.prompts or not rules.max_per_category:
        return set(rules.prompts)
    failed = {a["prompt_id"] for a in answers if a["condition"] != "baseline" and a["word_present"]}
    kept: set[str] = set()
    for category in sorted({p["category"] for p in prompts}):
        ids = sorted(p["prompt_id"] for p in prompts if p["category"] == category)
        random.Random(f"{seed}|stored|{category}").shuffle(ids)
        failures = [i for i in ids if i in failed][: rules.max_per_category]
        kept |= {*failures, *[i for i in ids if i not in failed][: max(1, len(failures))]}
    return kept


def _result(item: Item[Looked], view: View | ItemFailed) -> ItemResult:
    if isinstance(view, ItemFailed):
        return ItemResult.failed(item.key, view)
    probe = item.payload.probe
    key = {"prompt_id": item.payload.prompt_id, "condition": item.payload.condition}
    rows: dict[str, list[dict[str, Any]]] = {"attention": [], "lens": [], "decomposition": [], "activations": []}
    lengths = [span[1] - span[0] if (span := probe.spans.get(name)) else None for name in SPANS]
    for kind, step, at in zip(STEP_KINDS, view.steps, probe.at, strict=True):
        at_step = key | {"step_kind": kind, "step": at - probe.at[0]}
        rows["attention"] += [at_step | row for row in _attention(step, lengths)]
        rows["lens"] += [at_step | row for row in _lens(step)]
        rows["decomposition"] += [at_step | row for row in _decomposition(step)]
    for layer, norms in enumerate(view.resid_norm[:, : probe.at[0] + 1].tolist()):
        rows["activations"].append(
            key
            | {
                "layer": layer,
                "resid_norm": norms,
                "top_neurons": None if view.top_neurons is None else view.top_neurons[layer].tolist(),
                "top_values": None if view.top_values is None else view.top_values[layer].tolist(),
            }
        )
    return ItemResult(item.key, rows, artifacts=tuple(_artifacts(item.key, key, view)))


def _attention(step: StepView, lengths: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    ratios = {name: None if v is None else v.tolist() for name, v in attention_ratios(step.masses, lengths).items()}
    for layer, mean_row in enumerate(step.mean_row.tolist()):
        yield {"layer": layer, "mean_row": mean_row} | {n: v and v[layer] for n, v in ratios.items()}


def _lens(step: StepView) -> Iterator[dict[str, Any]]:
    columns = {name: values.tolist() for name, values in step.lens.items()}
    for layer in range(len(step.p_out)):
        yield {"layer": layer} | {name: values[layer] for name, values in columns.items()}


def _decomposition(step: StepView) -> Iterator[dict[str, Any]]:
    for layer, (p_in, p_attn, p_out) in enumerate(
        zip(step.p_in.tolist(), step.p_attn.tolist(), step.p_out.tolist(), strict=True)
    ):
        yield {
            "layer": layer,
            "p_in": p_in,
            "p_attn": p_attn,
            "p_out": p_out,
            "attn_contrib": p_attn - p_in,
            "ffn_contrib": p_out - p_attn,
        }


def _artifacts(item: str, key: Mapping[str, str], view: View) -> Iterator[Artifact]:
    """Two files a kept item, with a tensor a step: `attention` [L, H, S] and `resid` [L + 1, D]."""
    name = hashlib.blake2b(item.encode(), digest_size=12).hexdigest()
    for kind, tensors in (("attention", [s.rows for s in view.steps]), ("resid", [s.resid for s in view.steps])):
        whole = {k: np.ascontiguousarray(t) for k, t in zip(STEP_KINDS, tensors, strict=True) if t is not None}
        if whole:
            first = whole[STEP_KINDS[0]]
            yield Artifact(
                f"{kind}/{name}.safetensors",
                key,
                kind,
                first.shape,
                str(first.dtype),
                partial(save_file, whole, metadata={"item": item}),
            )
