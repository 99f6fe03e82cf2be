"""Stage `influence`: every neuron's share in each prompt's target, by each metric: the largest as rows, all as a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import save_file

from harness.engine import AnyTables, Artifact, Item, ItemResult, Tables
from harness.errors import ItemFailed
from harness.experiments.neurons.inputs import (
    Inputs,
    Means,
    Measuring,
    contexts_of,
    file_name,
    means_of,
    measuring,
    num_neurons,
)  # fmt: skip
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.neurons.stages.targets import target_of
from harness.models.attribution import Totals, attribute
from harness.models.load import ModelIdentity, ModelSpec
from harness.models.scene import Scene, Target

KIND = "influence"
_TARGET = ("prompt_id", "mode", "token_ids", "contrast_ids", "position")


@dataclass(frozen=True, slots=True)
class Aimed:
    """A prompt's target, and where ig's path begins."""

    target: Target
    means: Means | None


@dataclass(frozen=True)
class Influence:
    """Writes `influence` and `influence_totals`, and a file a prompt: `values` [metrics, L, M] and `activation` [L, M]."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    settings: NeuronsSettings
    name = "influence"
    version = 1

    @classmethod
    def build(cls, given: Inputs) -> "Influence":
        return cls(given.model, given.identity, given.layers, given.settings)

    @property
    def reads(self) -> MappingProxyType[str, tuple[str, ...]]:
        tables: dict[str, tuple[str, ...]] = {"targets": _TARGET, "contexts": ("prompt_id", "condition", "token_ids")}
        if self._has_means:
            tables["artifacts"] = ("path", "kind")
        return MappingProxyType(tables)

    @property
    def _has_means(self) -> bool:
        return "ig" in self.settings.metrics and self.settings.ig_baseline == "mean"

    @property
    def row_bytes(self) -> int:
        return 60 * len(self.settings.metrics) * max(self.settings.effects, 500)

    @property
    def file_bytes(self) -> int:
        return 4 * (len(self.settings.metrics) + 1) * self.identity.num_layers * num_neurons(self.identity)

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {
            "layers": list(self.layers), "metrics": list(own.metrics), "context": own.context, "ig_steps": own.ig_steps,
            "ig_baseline": own.ig_baseline, "cumulative": own.cumulative, "max_selected": own.max_selected,
            "effects": own.effects,
        }  # fmt: skip

    def items(self, tables: AnyTables) -> list[Item[Any]]:
        return [Item(row["prompt_id"], row["position"] + 1) for row in Tables.of(tables)["targets"]]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Aimed]]:
        targets = targets_of(tables, [i.key for i in items])
        means = means_of(tables, self.layers, self.identity.num_layers) if self._has_means else None
        return [replace(i, payload=Aimed(targets[i.key], means)) for i in items]

    def setup(self) -> Measuring:
        return measuring(self.model, self.identity, has_relp="relp" in self.settings.metrics)

    def run(self, context: Measuring, items: Sequence[Item[Aimed]]) -> list[ItemResult]:
        return [self._one(context, item) for item in items]

    def _one(self, context: Measuring, item: Item[Aimed]) -> ItemResult:
        own, aimed = self.settings, item.payload
        try:
            scene = Scene(context.circuit, aimed.target, is_upto=own.context == "upto")
            start = None if aimed.means is None else torch.from_numpy(np.nan_to_num(aimed.means.mean)).to(scene.device)
            found = attribute(scene, own.metrics, start, own.ig_steps, context.acts)
        except ItemFailed as e:
            return ItemResult.failed(item.key, e)
        rows, totals, values = [], [], []
        activation = found.activation.cpu().float().numpy()
        for metric in own.metrics:
            value = found.values[metric].cpu().float().numpy()
            values.append(value)
            ranked = rank(value, self.layers, own)
            weights = found.weights[metric].cpu().float().numpy()
            key = {"prompt_id": item.key, "metric": metric}
            rows += _rows(key, ranked, value, activation, weights, aimed.target.position)
            totals.append({**key, **_totals(found.totals[metric], ranked)})
        arrays = {"values": np.stack(values), "activation": activation}
        file = Artifact(
            f"{KIND}/{file_name(item.key)}.safetensors", {"prompt_id": item.key}, KIND, arrays["values"].shape, "float32",
            partial(save_file, arrays),
        )  # fmt: skip
        return ItemResult(item.key, {"influence": rows, "influence_totals": totals}, artifacts=(file,))


def targets_of(tables: Tables, prompt_ids: Sequence[str]) -> dict[str, Target]:
    """Targets by prompt, from their rows."""
    contexts = contexts_of(tables, prompt_ids, ("token_ids",))
    rows = tables.rows_with("targets", [{"prompt_id": i} for i in dict.fromkeys(prompt_ids)], _TARGET)
    return {r["prompt_id"]: target_of(r, contexts[r["prompt_id"]]["token_ids"]) for r in rows}


class Ranked(NamedTuple):
    """Neurons by |value|, ties by layer and neuron: `order` are flat places in [L, M], `shares` of Σ|value| in that order.

    The first `num_selected` are the smallest set that holds the share asked for (`is_cut`: more would, and were cut); the
    first `num_kept` become rows.
    """

    order: Int[np.ndarray, " N"]
    shares: Float[np.ndarray, " N"]
    total_abs: float
    num_selected: int
    is_cut: bool
    num_kept: int


def order_of(values: Float[np.ndarray, "L M"], layers: Sequence[int]) -> Int[np.ndarray, " N"]:
    """Flat places of the neurons of these layers, the largest |value| first; ties by layer and neuron."""
    size = values.shape[1]
    places = np.concatenate([np.arange(n * size, (n + 1) * size) for n in layers])
    return places[np.argsort(-np.abs(values.ravel()[places]), kind="stable")]


def rank(values: Float[np.ndarray, "L M"], layers: Sequence[int], own: NeuronsSettings) -> Ranked:
    """The ranking, and what of it is kept."""
    order = order_of(values, layers)
    sizes = np.abs(values.ravel()[order]).astype(np.float64)
    total = float(sizes.sum())
    shares = sizes / total if total else sizes
    selected = 0
    if own.cumulative and total:
        nonzero = int((sizes > 0).sum())
        reached = int(np.searchsorted(np.cumsum(sizes), own.cumulative * total * (1 - 1e-15))) + 1
        selected = nonzero if own.cumulative == 1 else min(reached, nonzero)
    kept = min(selected, own.max_selected)
    return Ranked(order, shares, total, kept, kept < selected, min(len(order), max(kept, own.effects)))


def _rows(
    key: dict[str, str],
    ranked: Ranked,
    value: Float[np.ndarray, "L M"],
    activation: Float[np.ndarray, "L M"],
    weight: Float[np.ndarray, "L M"],
    position: int,
) -> list[dict[str, Any]]:
    kept = ranked.order[: ranked.num_kept]
    columns = [
        x.tolist()
        for x in (*np.divmod(kept, value.shape[1]), activation.ravel()[kept], value.ravel()[kept], weight.ravel()[kept])
    ]
    return [
        {
            **key, "layer": layer, "neuron": neuron, "position": position, "activation": a, "value": v,
            "share": float(ranked.shares[n]), "place": n + 1, "selected": n < ranked.num_selected, "weight": w,
        }
        for n, (layer, neuron, a, v, w) in enumerate(zip(*columns, strict=True))
    ]  # fmt: skip


def _totals(told: Totals, ranked: Ranked) -> dict[str, Any]:
    shares = ranked.shares[ranked.shares > 0]
    return {
        "total_abs": ranked.total_abs,
        "total": told.total,
        "attention": told.attention,
        "embedding": told.embedding,
        "bias": told.bias,
        "residual": told.residual,
        "num_selected": ranked.num_selected,
        "is_cut": ranked.is_cut,
        "effective": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
        "completeness_gap": told.gap,
    }
