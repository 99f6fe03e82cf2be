"""Stage `effects`: what the target does when the neurons that a ranking names are changed, one by one and in sets."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.engine import AnyTables, FileHandle, Item, ItemResult, Tables
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.experiments.neurons.inputs import Inputs, Means, Measuring, file_name, means_of, measuring
from harness.experiments.neurons.settings import CONTROLS, NeuronsSettings
from harness.experiments.neurons.stages.influence import order_of, targets_of
from harness.models.ablate import Change, Effects, Set, effects, sets
from harness.models.load import ModelIdentity, ModelSpec
from harness.models.scene import Scene, Target

_RANKED = ("prompt_id", "metric", "layer", "neuron", "place", "activation", "value", "weight")
_DECILES = 10


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt's target, what its metrics named, its influence file, that of the prompt whose values are taken, and means."""

    target: Target
    ranked: tuple[dict[str, Any], ...]
    file: FileHandle
    source: FileHandle | None
    means: Means | None


@dataclass(frozen=True)
class Measured:
    """Writes `effects` and `curves`."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    settings: NeuronsSettings
    seed: int
    name = "effects"
    version = 1
    reads = MappingProxyType(
        {
            "targets": ("prompt_id", "mode", "token_ids", "contrast_ids", "position"),
            "contexts": ("prompt_id", "condition", "token_ids"),
            "influence": _RANKED,
            "artifacts": ("path", "kind"),
        }
    )

    @classmethod
    def build(cls, given: Inputs) -> "Measured":
        return cls(given.model, given.identity, given.layers, given.settings, given.seed)

    @property
    def row_bytes(self) -> int:
        own = self.settings
        return 80 * len(own.metrics) * own.effects + 40 * 2 * (len(own.curve) + 2) * (len(own.metrics) + len(CONTROLS))

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {
            "layers": list(self.layers), "metrics": list(own.metrics), "effects": own.effects, "curve": list(own.curve),
            "ablate": own.ablate, "effect": own.effect, "strength": own.strength, "context": own.context,
            "ig_baseline": own.ig_baseline,
        }  # fmt: skip

    def items(self, tables: AnyTables) -> list[Item[Any]]:
        if not (self.settings.effects or self.settings.curve):
            return []
        done = {r["path"] for r in tables["artifacts"] if r["kind"] == "influence"}
        return [
            Item(row["prompt_id"], row["position"] + 1)
            for row in Tables.of(tables)["targets"]
            if _file_of(row["prompt_id"]) in done  # others failed there, and are rows of `events`
        ]

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Job]]:
        own = self.settings
        everyone = [i.key for i in self.items(tables)]
        targets = targets_of(tables, [i.key for i in items])
        ranked: dict[str, list[dict[str, Any]]] = {}
        for row in tables.rows_with("influence", [{"prompt_id": i.key} for i in items], _RANKED):
            if row["place"] <= own.effects:
                ranked.setdefault(row["prompt_id"], []).append(row)
        needs_means = "mean" in (own.kind, own.ablate, own.ig_baseline) or own.effect == "add"
        means = means_of(tables, self.layers, self.identity.num_layers) if needs_means else None
        found = []
        for item in items:
            source = source_of(item.key, everyone)
            found.append(
                replace(
                    item,
                    payload=Job(
                        targets[item.key],
                        tuple(ranked.get(item.key, ())),
                        tables.file(_file_of(item.key)),
                        None if source is None else tables.file(_file_of(source)),
                        means,
                    ),
                )
            )
        return found

    def setup(self) -> Measuring:
        return measuring(self.model, self.identity, has_relp=False)

    def run(self, context: Measuring, items: Sequence[Item[Job]]) -> list[ItemResult]:
        results = []
        for item in items:
            try:
                results.append(ItemResult(item.key, self._one(context, item.key, item.payload)))
            except ItemFailed as e:
                results.append(ItemResult.failed(item.key, e))
        return results

    def _one(self, context: Measuring, prompt_id: str, job: Job) -> dict[str, list[dict[str, Any]]]:
        own = self.settings
        scene = Scene(context.circuit, job.target, is_upto=own.context == "upto")
        with job.file.open() as tensors:
            values, activation = tensors.get_tensor("values"), tensors.get_tensor("activation")
        rows: dict[str, list[dict[str, Any]]] = {"effects": [], "curves": []}
        if own.effects and job.ranked:
            change = self._change(own.kind, job, activation, scene)
            rows["effects"] = self._effects(scene, prompt_id, job, change)
        if own.curve:
            change = self._change(own.ablate, job, activation, scene)
            orders = self._orders(prompt_id, values, activation)
            rows["curves"] = self._curves(scene, prompt_id, orders, change, activation.shape)
        return rows

    def _change(self, kind: str, job: Job, activation: Float[np.ndarray, "L M"], scene: Scene) -> Change:
        """The intervention as a' = λ·a + μ."""
        strength, zero = self.settings.strength, np.zeros_like(activation)

        def source() -> np.ndarray:
            if job.source is None:
                raise ItemFailed(f"{kind} takes another prompt's values, and there is no other")
            with job.source.open() as tensors:
                return tensors.get_tensor("activation")

        def means() -> Means:
            assert job.means is not None, "loaded where it is needed"
            return job.means

        makers: Mapping[str, Any] = {
            "zero": lambda: (0.0, zero),
            "mean": lambda: (0.0, means().mean),
            "resample": lambda: (0.0, source()),
            "add": lambda: (1.0, strength * means().sd),
            "flip": lambda: (-1.0, zero),
            "swap": lambda: (1 - strength, strength * source()),
        }
        factor, shift = makers[kind]()
        return Change(factor, torch.from_numpy(np.nan_to_num(shift).astype(np.float32)).to(scene.device))

    def _effects(self, scene: Scene, prompt_id: str, job: Job, change: Change) -> list[dict[str, Any]]:
        own = self.settings
        # Rankings agree on many: each neuron is changed once.
        neurons = sorted({(r["layer"], r["neuron"]) for r in job.ranked})
        found = effects(scene, np.array(neurons), change)
        _check(found)
        at = {neuron: n for n, neuron in enumerate(neurons)}
        shift = change.shift.cpu().numpy()
        rows = []
        for r in job.ranked:
            n, place = at[r["layer"], r["neuron"]], (r["layer"], r["neuron"])
            start = 0.0
            if r["metric"] == "ig" and own.ig_baseline == "mean":
                assert job.means is not None, "loaded where it is needed"
                start = float(job.means.mean[place])
            mu, weight, value = float(shift[place]), r["weight"], r["value"]
            # Σ over positions of weight × change, from Σ weight × (a − start) = value.
            predicted = (change.factor - 1) * (value + start * weight) + mu * weight
            deltas = {name: found.changed[name][n] - found.clean[name] for name in ("logit", "logp", "value")}
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "ranking": r["metric"],
                    "layer": r["layer"],
                    "neuron": r["neuron"],
                    "place": r["place"],
                    "activation": r["activation"],
                    "edited": change.factor * r["activation"] + mu,
                    "delta_logit": float(deltas["logit"]),
                    "delta_logp": float(deltas["logp"]),
                    "delta_contrast": None if scene.target.contrast is None else float(deltas["value"]),
                    "predicted": float(predicted),
                    "kind": own.kind,
                }
            )
        return rows

    def _orders(
        self, prompt_id: str, values: Float[np.ndarray, "K L M"], activation: Float[np.ndarray, "L M"]
    ) -> dict[str, Int[np.ndarray, " N"]]:
        """Every ranking of the neurons, as flat places: those of the metrics, and the controls."""
        own = self.settings
        found = {metric: order_of(values[n], self.layers) for n, metric in enumerate(own.metrics)}
        first = found[own.metrics[0]]
        rng = np.random.default_rng(random.Random(f"{self.seed}|controls|{prompt_id}").getrandbits(64))
        found["random"] = rng.permutation(first)
        found["matched"] = matched(first, activation, rng)
        found["loudest"] = order_of(activation, self.layers)
        return found

    def _curves(
        self,
        scene: Scene,
        prompt_id: str,
        orders: Mapping[str, Int[np.ndarray, " N"]],
        change: Change,
        shape: tuple[int, ...],
    ) -> list[dict[str, Any]]:
        total = len(next(iter(orders.values())))
        sizes = [k for k in self.settings.curve if k < total]
        places = torch.stack([_places(order, shape) for order in orders.values()]).to(scene.device)
        ends = [Set(0, 0, True), Set(0, total, True)]
        wanted = [*ends, *(Set(o, k, is_kept) for o in range(len(orders)) for k in sizes for is_kept in (True, False))]
        found = sets(scene, places, wanted, change, self.layers)
        if not np.isfinite(found).all():
            raise NotFinite(NOT_FINITE)
        none, whole = found[:2]
        rows = []
        named = list(orders)
        for one, value in [
            *((Set(o, k, is_kept), none if (k == 0) == is_kept else whole)
              for o in range(len(orders)) for k in (0, total) for is_kept in (True, False)),
            *zip(wanted[2:], found[2:], strict=True),
        ]:  # fmt: skip
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "ranking": named[one.order],
                    "k": one.size,
                    "mode": "keep" if one.is_kept else "drop",
                    "m": float((value - none) / (whole - none)) if whole != none else None,
                    "logit": float(value),
                }
            )
        return rows


def _file_of(prompt_id: str) -> str:
    return f"influence/{file_name(prompt_id)}.safetensors"


def source_of(prompt_id: str, everyone: Sequence[str]) -> str | None:
    """The prompt whose values stand in for another's: the next one, the first behind the last."""
    place = everyone.index(prompt_id)
    other = everyone[(place + 1) % len(everyone)]
    return None if other == prompt_id else other


def matched(
    order: Int[np.ndarray, " N"], activation: Float[np.ndarray, "L M"], rng: np.random.Generator
) -> Int[np.ndarray, " N"]:
    """A ranking's neurons, each in the place of another of its layer and of its decile of |activation| there."""
    size = activation.shape[1]
    decile = np.abs(activation).argsort(1).argsort(1) * _DECILES // size
    group = (order // size) * _DECILES + decile.ravel()[order]
    found = order.copy()
    for one in np.unique(group):
        where = np.flatnonzero(group == one)
        found[where] = rng.permutation(order[where])
    return found


def _places(order: Int[np.ndarray, " N"], shape: tuple[int, ...]) -> Tensor:
    places = np.full(shape[0] * shape[1], len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return torch.from_numpy(places.reshape(shape))


def _check(found: Effects) -> None:
    for name in ("value", "logit", "logp"):
        if not (np.isfinite(found.clean[name]) and np.isfinite(found.changed[name]).all()):
            raise NotFinite(NOT_FINITE)
