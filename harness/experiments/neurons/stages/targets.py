"""Stage `targets`: which logit each prompt's neurons are held against, and what the model says of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from harness import tally
from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.errors import NOT_FINITE, HarnessError, ItemFailed
from harness.experiments.neurons.inputs import Inputs, Measuring, contexts_of, measuring, token_ids_of
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.neurons.tokens import one_id
from harness.models.attend import right_padded
from harness.models.load import Codec, ModelIdentity, ModelSpec, load_codec
from harness.models.neurons import check_length
from harness.models.scene import Target

_TOP = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt's tokens, and the target that it names itself."""

    tokens: tuple[int, ...]
    target: str
    contrast: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to read behind `tokens`: ids of the target (none: the argmax), and of what is subtracted."""

    tokens: tuple[int, ...]
    ids: tuple[int, ...]
    contrast: int | None
    mode: str


@dataclass(frozen=True)
class Targets:
    """Writes `targets`."""

    model: ModelSpec
    identity: ModelIdentity
    settings: NeuronsSettings
    name = "targets"
    version = 1
    reads = MappingProxyType(
        {
            "contexts": ("prompt_id", "condition", "token_ids"),
            "prompts": ("prompt_id", "target", "contrast"),
        }
    )
    row_bytes = 400

    @classmethod
    def build(cls, given: Inputs) -> "Targets":
        return cls(given.model, given.identity, given.settings)

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {"target": own.target, "token": own.token, "contrast": own.contrast, "target_pos": own.target_pos}

    def items(self, tables: AnyTables) -> list[Item[Any]]:
        rows = Tables.of(tables).streamed("contexts", ("prompt_id", "token_ids"))
        return [Item(row["prompt_id"], len(row["token_ids"])) for row in rows]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Wanted]]:
        found = contexts_of(tables, [i.key for i in items], ("token_ids",))
        named = {r["prompt_id"]: r for r in tables.rows_with("prompts", [{"prompt_id": i.key} for i in items])}
        return [
            replace(
                i,
                payload=Wanted(
                    tuple(found[i.key]["token_ids"]), named[i.key]["target"] or "", named[i.key]["contrast"] or ""
                ),
            )
            for i in items
        ]

    def setup(self) -> Measuring:
        return measuring(self.model, self.identity, has_relp=False)

    def run(self, context: Measuring, items: Sequence[Item[Wanted]]) -> list[ItemResult]:
        codec = load_codec(self.model, self.identity)
        chosen: list[Chosen | HarnessError] = []
        for item in items:
            try:
                one = choose(codec, item.payload, self.settings)
                chosen.append(check_length(context.circuit.lm, (*one.tokens, *one.ids)) or one)
            except HarnessError as e:
                chosen.append(e)
        good = [c for c in chosen if isinstance(c, Chosen)]
        rows = iter(_read(context, good) if good else [])
        results = []
        for item, one in zip(items, chosen, strict=True):
            row = next(rows) if isinstance(one, Chosen) else one
            if isinstance(row, HarnessError):
                results.append(ItemResult.failed(item.key, row))
            else:
                results.append(ItemResult(item.key, {"targets": [{"prompt_id": item.key, **row}]}))
        return results


def choose(codec: Codec, wanted: Wanted, own: NeuronsSettings) -> Chosen:
    """Where and what to read. Raises HarnessError where the prompt has no such place, or names no such token."""
    tokens, mode = wanted.tokens, own.target
    contrast_text = wanted.contrast or own.contrast
    contrast = one_id(codec, contrast_text, "contrast", has_sequence=False) if contrast_text else None
    if mode == "last_token":
        if len(tokens) < 2:
            raise ItemFailed("its last token is its only one: nothing stands before it that could foretell it")
        return Chosen(tokens[:-1], tokens[-1:], contrast, mode)
    place = own.target_pos if own.target_pos >= 0 else len(tokens) + own.target_pos
    if not 0 <= place < len(tokens):
        raise ItemFailed(f"position {own.target_pos} (neurons.target_pos) is outside of its {len(tokens)} tokens")
    kept = tokens[: place + 1]
    if mode == "top1_logit":
        return Chosen(kept, (), contrast, mode)
    ids = token_ids_of(codec, wanted.target or own.token, mode, "target")
    return Chosen(kept, tuple(ids), contrast, mode)


@torch.inference_mode()
def _read(context: Measuring, chosen: Sequence[Chosen]) -> list[dict[str, Any] | ItemFailed]:
    rows = _rows(context, chosen)
    if len(chosen) > 1:  # one text may have another's NaN (0 × NaN): each says its own alone
        rows = [_rows(context, [c])[0] if isinstance(r, ItemFailed) else r for c, r in zip(chosen, rows, strict=True)]
    return rows


def _rows(context: Measuring, chosen: Sequence[Chosen]) -> list[dict[str, Any] | ItemFailed]:
    lm = context.circuit.lm
    texts = [(*c.tokens, *c.ids[:-1]) for c in chosen]
    tokens, layout = right_padded(texts, lm.device)
    with tally.prefilling():
        hidden = lm.hidden(tokens, layout)
    return [_row(context, c, hidden[n, len(c.tokens) - 1 : len(texts[n])]) for n, c in enumerate(chosen)]


def _row(context: Measuring, chosen: Chosen, hidden: torch.Tensor) -> dict[str, Any] | ItemFailed:
    circuit = context.circuit
    logits = circuit.lm.logits(hidden).double()
    if not bool(logits.isfinite().all()):
        return ItemFailed(NOT_FINITE)
    first = logits[0]
    ids = chosen.ids or (int(first.argmax()),)
    log_p = logits.log_softmax(-1)
    p = float(sum(log_p[n, token] for n, token in enumerate(ids)).exp())  # type: ignore[union-attr]
    own = first[ids[0]]
    others = first.clone()
    others[ids[0]] = -torch.inf
    top = log_p[0].exp().topk(min(_TOP, len(first)))
    raw = circuit.raw_logits(hidden[:1], torch.tensor([ids[0], chosen.contrast or 0], device=hidden.device))[0]
    return {
        "mode": chosen.mode,
        "token_ids": list(ids),
        "contrast_ids": [] if chosen.contrast is None else [chosen.contrast],
        "position": len(chosen.tokens) - 1,
        "logit": float(raw[0]),
        "logit_contrast": None if chosen.contrast is None else float(raw[1]),
        "p": p,
        "rank": int((first > own).sum()) + 1,
        "margin": float(own - others.max()),
        "top_ids": top.indices.tolist(),
        "top_probs": top.values.tolist(),
    }


def target_of(row: dict[str, Any], tokens: Sequence[int]) -> Target:
    """What attribution needs, from a row of `targets` and the context's tokens."""
    contrast = row["contrast_ids"]
    return Target(
        tuple(tokens[: row["position"] + 1]),
        tuple(row["token_ids"]),
        contrast[0] if contrast else None,
        row["mode"] == "sequence",
    )
