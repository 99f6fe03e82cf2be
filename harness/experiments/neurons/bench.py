"""`harness bench neurons`: dumps, attributions and effects against one plain forward each, results compared; peers where they
are installed: nnsight for dumps, captum for integrated gradients."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.experiments.experiment import Case
from harness.experiments.neurons.inputs import Inputs
from harness.experiments.neurons.stages.influence import order_of
from harness.experiments.neurons.stages.prompts import context_row
from harness.experiments.timing import Apart, Course, Grounds, Timed, Way, in_turn
from harness.models import peers
from harness.models.ablate import Change, effects
from harness.models.attribution import acts_of, attribute
from harness.models.load import LM
from harness.models.neurons import Circuit, circuit_of, read
from harness.models.scene import Scene, Target

_NUM_EFFECTS = 100
_FEWEST_TOKENS = 2
_MOST_TOKENS = 8_192

Rows = list[np.ndarray]
"""Of each text, all layers' activations [L, T, M]."""


def dump(grounds: Grounds) -> Timed:
    """Activations of every token of the contexts: batches without a head, against one prompt a forward with its logits."""
    lm, texts = grounds.course.lm, _texts(grounds)
    ways = [
        Way(f"{len(texts)} texts in batches, ended at the last layer", lambda: _batched(lm, texts)),
        Way("one text a forward, with logits", lambda: _one_by_one(lm, texts), _same_rows),
    ]
    if (nnsight := _NNsight.of(grounds.course)) is not None:
        ways.append(Way(f"{nnsight.name}, a text a trace", lambda: nnsight.rows(texts), _same_rows))
    figures = in_turn(grounds.course, "dump", ways)
    return Timed(tuple(figures))


def influence(grounds: Grounds) -> Timed:
    """All metrics but ig of one prompt, in forwards of that prompt; ig against captum's over the same path."""
    lm, texts = grounds.course.lm, _texts(grounds)
    circuit = circuit_of(lm)
    acts, targets = acts_of(circuit), [_target(lm, t) for t in texts[:8]]

    def forwards() -> list[Tensor]:
        with torch.inference_mode():
            return [
                lm.model(input_ids=torch.tensor([t.tokens], device=lm.device), use_cache=False).logits for t in targets
            ]

    def attributed(*metrics: str) -> list[Tensor]:
        return [attribute(Scene(circuit, t), metrics, acts=acts).values[metrics[-1]] for t in targets]

    cheap = in_turn(
        grounds.course, "influence",
        (
            Way(f"a forward of {len(targets)} texts, one by one", forwards),
            *(Way(m, lambda m=m: attributed(m)) for m in ("dla", "act_grad", "relp")),
            Way("dla, act_grad and relp together", lambda: attributed("dla", "act_grad", "relp")),
            Way("ig", lambda: attributed("ig")),
        ),
    )  # fmt: skip
    lines = tuple(
        f"{f.way}: {f.seconds / cheap[0].seconds:.1f} forwards of the same text" for f in cheap[1:] if f.seconds
    )
    if (captum := _Captum.of(grounds.course, circuit)) is None:
        return Timed(tuple(cheap), lines)
    one = targets[0]
    path = in_turn(
        grounds.course, "ig",
        (
            Way("ig of one text's positions, 32 places, more where it bends", lambda: _integrated(circuit, one), once=True),
            Way(f"{captum.name}, 32 places", lambda: captum.integrated(one), _same_values, once=True),
        ),
    )  # fmt: skip
    return Timed((*cheap, *path), lines)


def ablations(grounds: Grounds) -> Timed:
    """100 neurons of one prompt set to zero: rows that enter at their layer behind one prefix, against a forward each."""
    lm, texts = grounds.course.lm, _texts(grounds)
    circuit = circuit_of(lm)
    text = max(texts, key=len)
    target = _target(lm, text)
    values = attribute(Scene(circuit, target), ("dla",)).values["dla"].cpu().numpy()
    chosen = np.stack(np.divmod(order_of(values, range(len(values)))[:_NUM_EFFECTS], values.shape[1]), 1)
    nothing = Change(0.0, torch.zeros(values.shape, device=lm.device))

    def rows() -> np.ndarray:
        return effects(Scene(circuit, target), chosen, nothing).changed["logit"]

    ways = (
        Way(f"{len(chosen)} neurons of a text of {len(text)} tokens, rows behind a prefix", rows),
        Way("a forward each", lambda: _ablated(circuit, target, chosen), _same_logits),
    )
    return Timed(tuple(in_turn(grounds.course, "effects", ways)))


def _texts(grounds: Grounds) -> list[tuple[int, ...]]:
    given: Inputs = grounds.prepared.given
    found = []
    for prompt in given.prompts:
        row = context_row(given.codec, prompt, given.settings, given.seed)
        if len(row["token_ids"]) >= _FEWEST_TOKENS:
            found.append(tuple(row["token_ids"]))
    return found[: grounds.num_contexts]


def _target(lm: LM, tokens: tuple[int, ...]) -> Target:
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([tokens], device=lm.device), use_cache=False).logits[0, -1]
    return Target(tokens, (int(logits.argmax()),))


def _batched(lm: LM, texts: Sequence[tuple[int, ...]]) -> Rows:
    layers = range(len(lm.anatomy.blocks))
    found: Rows = []
    some: list[tuple[int, ...]] = []

    def flush() -> None:
        rows: dict[int, Tensor] = {}
        read(lm, some, [range(len(t)) for t in some], layers, lambda n, r: rows.__setitem__(n, r.cpu()))
        whole = torch.stack([rows[n] for n in layers])
        found.extend(part.float().numpy() for part in whole.split([len(t) for t in some], 1))

    for text in texts:
        if some and sum(map(len, some)) + len(text) > _MOST_TOKENS:
            flush()
            some = []
        some.append(text)
    flush()
    return found


def _one_by_one(lm: LM, texts: Sequence[tuple[int, ...]]) -> Rows:
    """As the tools do that this replaces: every text by itself, all logits, hooks that keep everything."""
    assert lm.anatomy.neurons is not None, "a dense model"
    found: Rows = []
    for text in texts:
        seen: list[Tensor] = []
        handles = [m.register_forward_pre_hook(_keeping(seen)) for m in lm.anatomy.neurons]
        try:
            with torch.inference_mode():
                lm.model(input_ids=torch.tensor([text], device=lm.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found.append(torch.stack(seen).float().numpy())
    return found


def _keeping(seen: list[Tensor]) -> Callable[[Any, tuple], None]:
    return lambda _module, args: seen.append(args[0][0].cpu())


def _ablated(circuit: Circuit, target: Target, chosen: np.ndarray) -> np.ndarray:
    lm, found = circuit.lm, []
    for layer, neuron in chosen.tolist():

        def zero(_module: Any, args: tuple, neuron: int = neuron) -> tuple:
            changed = args[0].clone()
            changed[:, target.position, neuron] = 0
            return (changed,)

        handle = circuit.outlets[layer].module.register_forward_pre_hook(zero)
        try:
            with torch.inference_mode():
                logits = lm.model(input_ids=torch.tensor([target.tokens], device=lm.device), use_cache=False).logits
        finally:
            handle.remove()
        found.append(float(logits[0, -1, target.ids[0]]))
    return np.array(found)


def _same_rows(ours: Rows, theirs: Rows) -> Apart:
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
    return Apart(worst, "relative")


def _same_logits(ours: np.ndarray, theirs: np.ndarray) -> Apart:
    return Apart(float(np.abs(ours - theirs).max() / np.abs(theirs).max()), "relative")


def _integrated(circuit: Circuit, target: Target) -> Tensor:
    return attribute(Scene(circuit, target, is_upto=True), ("ig",)).values["ig"]


def _same_values(ours: Tensor, theirs: Tensor) -> Apart:
    return Apart(float((ours - theirs).abs().max() / theirs.abs().max()), "relative")


class _NNsight:
    """A trace a text."""

    def __init__(self, course: Course):
        import nnsight

        lm = course.lm
        assert lm.anatomy.neurons is not None, "a dense model"
        self.name = f"nnsight {nnsight.__version__}"
        with peers.willing(self.name):
            self._save = nnsight.save
            self._model = nnsight.NNsight(peers.twin(lm, "sdpa", course.at_head))
            paths = {id(module): path for path, module in lm.model.named_modules()}
            self._modules = [_at(self._model, paths[id(m)]) for m in lm.anatomy.neurons]
            self._device = lm.device

    @classmethod
    def of(cls, course: Course) -> "_NNsight | None":
        try:
            return cls(course)
        except (ImportError, peers.Absent) as e:
            course.skipped.append(f"nnsight is left out: {e}")
            return None

    def rows(self, texts: Sequence[tuple[int, ...]]) -> Rows:
        save, modules, found = self._save, self._modules, []
        for text in texts:
            tokens, kept = torch.tensor([text], device=self._device), []
            with torch.inference_mode(), self._model.trace(input_ids=tokens, use_cache=False):
                kept = save([m.input[0] for m in modules])
            found.append(torch.stack([k.cpu() for k in kept]).float().numpy())
        return found


def _at(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


class _Captum:
    """Integrated gradients of all layers' neurons together, over all positions of a text."""

    def __init__(self, circuit: Circuit):
        import captum
        from captum.attr import LayerIntegratedGradients

        embedding: Any = circuit.lm.model.get_input_embeddings()
        if bool(embedding.weight[0].any()):
            raise ImportError("its paths begin at a text of id 0, whose embedding is not zero here")
        self.name = f"captum {captum.__version__}"
        self._circuit, self._make = circuit, LayerIntegratedGradients

    @classmethod
    def of(cls, course: Course, circuit: Circuit) -> "_Captum | None":
        try:
            return cls(circuit)
        except ImportError as e:
            course.skipped.append(f"captum is left out: {e}")
            return None

    def integrated(self, target: Target) -> Tensor:
        """ig [L, M]."""
        return captum_integrated(self._circuit, target, self._make, 32).sum(1)


def captum_integrated(circuit: Circuit, target: Target, make: Callable[..., Any], num: int) -> Tensor:
    """captum's integrated gradients [L, T, M] from a text of id 0, by Gauss and Legendre."""
    lm = circuit.lm

    def value(ids: Tensor) -> Tensor:
        logits = lm.model(input_ids=ids, use_cache=False).logits
        return logits[:, -1, target.ids[0]]

    modules = [o.module for o in circuit.outlets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers rest on one another: so they do here, on purpose
        explain = make(value, modules)
    ids = torch.tensor([target.tokens], device=lm.device)
    with torch.enable_grad():
        found = explain.attribute(
            ids, n_steps=num, method="gausslegendre", attribute_to_layer_input=True, internal_batch_size=64,
            baselines=None,
        )  # fmt: skip
    return torch.stack([f[0].detach() if isinstance(f, Tensor) else f[0][0].detach() for f in found])


CASES: Mapping[str, Case] = {
    "dump": Case(dump),
    "influence": Case(influence, usual=False),
    "effects": Case(ablations),
}
