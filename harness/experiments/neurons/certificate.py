"""The certificate of the neuron experiment: every measurement against one text at a time, without padding, cache or our
attention.

The reference (harness/models/plain_neurons.py) runs in float64 where a copy of the model in it is small.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from harness.engine import AnyTables, Tables
from harness.experiments.certificate import Certificate, Gap, Verdict
from harness.experiments.neurons.inputs import Inputs, Measuring, measuring
from harness.experiments.neurons.packs import Text, pack_of
from harness.experiments.neurons.settings import NeuronsSettings
from harness.experiments.neurons.stages.influence import order_of
from harness.experiments.neurons.stages.prompts import context_row, counted
from harness.experiments.neurons.stages.targets import Wanted, choose
from harness.models import plain_neurons as plain
from harness.models.ablate import Change, effects
from harness.models.attribution import attribute
from harness.models.load import LM, ModelIdentity, ModelSpec, identify, load, shared
from harness.models.neurons import read
from harness.models.scene import Scene, Target
from harness.tolerance import TOLERANCE

Kind = Literal["activations", "statistics", "dla", "gradients", "effects"]
MEASURED: dict[Kind, tuple[str, ...]] = {
    "activations": ("activations",),
    "dla": ("dla", "Σ dla"),
    "gradients": ("act_grad",),
    "effects": ("effects",),
    "statistics": ("statistics",),
}
"""Differences are told as a share of the largest value of their kind; those of effects in logits or nats."""
_MOST_PARAMETERS = 300_000_000
"""Of a model that is held against float64."""
_FEW = 3
"""Neurons of each layer whose direct effect, and in all whose ablation, is made again."""
_TOKENS = 512


@dataclass(frozen=True)
class Subject:
    """One prompt: its context's tokens, those that are counted, and its target."""

    prompt_id: str
    tokens: tuple[int, ...]
    counted: tuple[int, ...]
    target: str
    contrast: str


@dataclass(frozen=True, slots=True)
class Task:
    """What an item measures: a kind for one subject, among `company`."""

    kind: Kind
    subject: Subject
    company: tuple[Subject, ...]
    is_least: bool = False

    @property
    def name(self) -> str:
        """The subject, as the certificate names it."""
        return self.subject.prompt_id

    @property
    def measurements(self) -> tuple[str, ...]:
        """Those of its kind."""
        return MEASURED[self.kind]


@dataclass(frozen=True)
class Bench:
    """The model in its own dtype, as attribution uses it, and as the reference does."""

    lm: LM
    measuring: Measuring
    reference: LM
    settings: NeuronsSettings
    layers: tuple[int, ...]

    @property
    def tolerance(self) -> float:
        """Of what is computed in the model's own dtype."""
        return TOLERANCE[self.lm.identity.dtype].nats

    @property
    def exact(self) -> float:
        """Of what is computed in float32 or wider whatever the model's dtype is."""
        return TOLERANCE[self.measuring.circuit.lm.identity.dtype].nats

    def target(self, subject: Subject) -> Target:
        """What the prompt's neurons are held against; the argmax by the reference, where it is that."""
        chosen = choose(self.lm.codec, Wanted(subject.tokens, subject.target, subject.contrast), self.settings)
        ids = chosen.ids
        if not ids:
            from harness.models.plain import next_logits

            ids = (int(next_logits(self.measuring.circuit.lm, chosen.tokens)[-1].argmax()),)
        return Target(chosen.tokens, ids, chosen.contrast, chosen.mode == "sequence")


def measure(bench: Bench, task: Task) -> list[Verdict]:
    """Verdicts of one item. Raises ItemFailed where the fast path has no result for it."""
    checks: dict[str, Callable[[Bench, Task], list[Verdict]]] = {
        "activations": _check_activations,
        "statistics": _check_statistics,
        "dla": _check_dla,
        "gradients": _check_gradients,
        "effects": _check_effects,
    }
    return checks[task.kind](bench, task)


def _shares(gap: Gap, want: np.ndarray, got: np.ndarray) -> None:
    scale = max(float(np.abs(want).max(initial=0)), 1e-12)
    gap.update(want / scale, got / scale)


def _check_activations(bench: Bench, task: Task) -> list[Verdict]:
    """Every token's, alone and among all others."""
    (gap,) = (Gap(m, task.name, bench.tolerance) for m in task.measurements)
    want = plain.activations(bench.reference, task.subject.tokens)
    texts = [s.tokens for s in task.company]
    at = task.company.index(task.subject)
    for some, place in (([texts[at]], 0), (texts, at)):
        got: dict[int, np.ndarray] = {}
        ends = np.cumsum([len(t) for t in some])

        def keep(layer: int, rows: torch.Tensor, got: dict = got, ends: np.ndarray = ends, place: int = place) -> None:
            got[layer] = rows[ends[place] - len(task.subject.tokens) : ends[place]].double().cpu().numpy()

        read(bench.lm, some, [range(len(t)) for t in some], bench.layers, keep)
        for layer in bench.layers:
            _shares(gap, want[layer], got[layer])
    return [gap.verdict()]


def _check_statistics(bench: Bench, task: Task) -> list[Verdict]:
    """Means, spreads and peaks over all subjects, against those of the reference's activations."""
    (gap,) = (Gap(m, task.name, bench.tolerance) for m in task.measurements)
    texts = [Text(s.prompt_id, s.tokens, s.counted) for s in task.company]
    whole = [plain.activations(bench.reference, t.tokens)[:, list(t.counted)] for t in texts]
    pack = pack_of(bench.lm, texts, bench.layers, _TOKENS)
    for layer in bench.layers:
        rows = np.concatenate([a[layer] for a in whole])
        peaks = np.stack([np.abs(a[layer]).max(0) for a in whole])
        own = pack.layers[layer]
        for want, got in (
            (rows.mean(0), own.moments.mean), (rows.std(0), own.moments.sd), (peaks.mean(0), own.peaks.mean),
            (peaks.std(0), own.peaks.sd), (peaks.max(0), own.max_peak),
        ):  # fmt: skip
            _shares(gap, want, got)
    return [gap.verdict()]


def _check_dla(bench: Bench, task: Task) -> list[Verdict]:
    """The largest and some others of every layer by hand; and that all parts add up to the logit."""
    each, total = (Gap(m, task.name, bench.exact) for m in task.measurements)
    target = bench.target(task.subject)
    found = attribute(Scene(bench.measuring.circuit, target), ("dla",))
    values = found.values["dla"].double().cpu().numpy()
    scale = float(np.abs(values).max())
    for layer in bench.layers:
        for neuron in np.argsort(-np.abs(values[layer]), kind="stable")[:_FEW].tolist():
            want = plain.direct(bench.reference, target, layer, neuron)
            each.update(want / scale, values[layer, neuron] / scale)
    told = found.totals["dla"]
    logit = plain.value(bench.reference, replace(target, ids=target.ids[:1], is_sequence=False))
    parts = [told.total, told.attention, told.embedding, told.bias]
    size = max(1.0, *(abs(p) for p in parts if p is not None))
    total.update(logit / size, sum(p for p in parts if p is not None) / size)
    return [each.verdict(), total.verdict()]


def _check_gradients(bench: Bench, task: Task) -> list[Verdict]:
    (gap,) = (Gap(m, task.name, bench.exact) for m in task.measurements)
    target, is_upto = bench.target(task.subject), bench.settings.context == "upto"
    found = attribute(Scene(bench.measuring.circuit, target, is_upto=is_upto), ("act_grad",))
    a = plain.activations(bench.reference, target.tokens)
    products = a * plain.gradients(bench.reference, target)
    want = products.sum(1) if is_upto else products[:, -1]
    _shares(gap, want, found.values["act_grad"].double().cpu().numpy())
    return [gap.verdict()]


def _check_effects(bench: Bench, task: Task) -> list[Verdict]:
    """The neurons that dla ranks highest, set to zero, against a whole forward each."""
    (gap,) = (Gap(m, task.name, bench.exact) for m in task.measurements)
    target, is_upto = bench.target(task.subject), bench.settings.context == "upto"
    scene = Scene(bench.measuring.circuit, target, is_upto=is_upto)
    values = attribute(scene, ("dla",)).values["dla"].cpu().numpy()
    neurons = np.stack(np.divmod(order_of(values, bench.layers)[: _FEW * 2], values.shape[1]), 1)
    shift = torch.zeros(values.shape, device=scene.device)
    found = effects(scene, neurons, Change(0.0, shift))
    size = max(1.0, abs(found.clean["value"]))
    for n, (layer, neuron) in enumerate(neurons.tolist()):

        def zero(at: int, a: torch.Tensor, layer: int = layer, neuron: int = neuron) -> torch.Tensor | None:
            if at != layer:
                return None
            changed = a.clone()
            changed[:, 0 if is_upto else target.position : target.position + 1, neuron] = 0
            return changed

        gap.update(plain.value(bench.reference, target, zero) / size, found.changed["value"][n] / size)
    return [gap.verdict()]


@dataclass(frozen=True)
class NeuronChecks:
    """All measurements, of the first prompts."""

    model: ModelSpec
    identity: ModelIdentity
    settings: NeuronsSettings
    layers: tuple[int, ...]
    version = 1
    reads = MappingProxyType(
        {
            "contexts": ("prompt_id", "condition", "token_ids", "positions", "is_counted"),
            "prompts": ("prompt_id", "target", "contrast"),
        }
    )

    @property
    def num_subjects(self) -> int:
        return self.settings.sanity.num_prompts

    @property
    def dtype(self) -> str:
        return self.identity.dtype

    @property
    def device(self) -> str:
        return self.model.device

    def params(self) -> dict[str, Any]:
        own = self.settings
        return {
            "num_prompts": self.num_subjects, "layers": list(self.layers), "target": own.target, "token": own.token,
            "contrast": own.contrast, "target_pos": own.target_pos, "context": own.context,
        }  # fmt: skip

    def tasks(self, tables: AnyTables) -> list[Task]:
        given = Tables.of(tables)
        subjects = []
        for row in given["contexts"][: self.num_subjects]:
            (named,) = given.rows_with("prompts", [{"prompt_id": row["prompt_id"]}])
            subjects.append(
                Subject(
                    row["prompt_id"], tuple(row["token_ids"]), counted(row), named["target"] or "", named["contrast"] or ""
                )
            )  # fmt: skip
        company = tuple(subjects)
        tasks = [
            Task(kind, s, company, is_least=not n)
            for n, s in enumerate(subjects)
            for kind in MEASURED
            if kind != "statistics" or not n
        ]
        # Statistics are of all subjects: one item.
        return sorted(tasks, key=lambda t: t.kind == "statistics")

    def bench(self, is_full: bool) -> Bench:
        return self._bench(self.model, self.identity, shared(self.model, self.identity))

    def wider(self, dtype: str, device: str, is_full: bool) -> Bench:
        spec = replace(self.model, dtype=dtype, device=device)
        identity = identify(spec)
        return self._bench(spec, identity, load(spec, identity))

    def measure(self, bench: Bench, task: Task) -> list[Verdict]:
        return measure(bench, task)

    def left_out(self, bench: Bench, task: Task) -> list[Verdict]:
        return [Verdict(m, task.name, bench.tolerance, left_out=True) for m in task.measurements]

    def _bench(self, spec: ModelSpec, identity: ModelIdentity, lm: LM) -> Bench:
        own = measuring(spec, identity, has_relp=False)
        reference = _reference(spec, identity) if _is_small(lm) else own.circuit.lm
        return Bench(lm, own, reference, self.settings, self.layers)


def _is_small(lm: LM) -> bool:
    return sum(p.numel() for p in lm.model.parameters()) <= _MOST_PARAMETERS


def _reference(spec: ModelSpec, identity: ModelIdentity) -> LM:
    return load(replace(spec, dtype="float64"), replace(identity, dtype="float64"))


def certificate_of(given: Inputs) -> Certificate[Task, Bench]:
    """The stage, of as many prompts as the settings say."""
    own = given.settings
    return Certificate.of(NeuronChecks(given.model, given.identity, own, given.layers), own.sanity)


def tables_of(given: Inputs, num_prompts: int) -> dict[str, list[dict[str, Any]]]:
    """What the certificate reads, for the first prompts, without a run."""
    prompts = given.prompts[:num_prompts]
    rows = [context_row(given.codec, p, given.settings, given.seed) for p in prompts]
    named = [{"prompt_id": p.prompt_id, "target": p.target, "contrast": p.contrast} for p in prompts]
    return {"contexts": rows, "prompts": named, "sanity_items": []}
