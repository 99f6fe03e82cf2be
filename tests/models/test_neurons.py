"""Laws of the neurons' activations, attributions and interventions, each with its control, on every family."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.errors import ModelError, NotFinite
from harness.models import norms, shapes
from harness.models import plain_neurons as plain
from harness.models.ablate import Change, Set, effects, sets
from harness.models.attribution import acts_of, attribute
from harness.models.load import LM
from harness.models.neurons import Circuit, check_neurons, circuit_of, read, watched
from harness.models.scene import Scene, Target
from tests.tiny import FAMILIES, build_model, tiny_lm

TEXT = (5, 7, 100, 32, 90, 91, 33)
TARGETS = {
    "logit": Target(TEXT, (40,)),
    "contrast": Target(TEXT, (40,), 77),
    "sequence": Target(TEXT, (40, 41, 42), None, True),
}
SANDWICH = ("tiny-gemma2", "tiny-gemma3", "tiny-olmo2")


@pytest.fixture(scope="module", params=FAMILIES)
def circuit(request: pytest.FixtureRequest) -> Circuit:
    return circuit_of(tiny_lm(request.param))


def texts(seed: int, num: int = 5) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    some = [tuple(rng.integers(0, 256, rng.integers(1, 20)).tolist()) for _ in range(num)]
    return [*some, (*some[0], 3), some[1]]  # a beginning in common, and a text twice


def dumped(lm: LM, some: Sequence[tuple[int, ...]], layers: Sequence[int]) -> dict[int, np.ndarray]:
    rows: dict[int, np.ndarray] = {}
    read(lm, some, [range(len(t)) for t in some], layers, lambda n, r: rows.__setitem__(n, r.double().numpy()))
    return rows


# ---- law 1: rows are the reference's -----------------------------------------------------------------------------


def test_rows_are_those_of_one_text_at_a_time_whatever_the_batch(circuit: Circuit) -> None:
    lm, some = circuit.lm, texts(1)
    want = [plain.activations(lm, t) for t in some]
    layers = range(circuit.num_layers)
    whole = dumped(lm, some, layers)
    halves = [dumped(lm, part, layers) for part in (some[:3], some[3:])]
    for layer in layers:
        expected = np.concatenate([w[layer] for w in want])
        scale = np.abs(expected).max()
        assert np.abs(whole[layer] - expected).max() <= 2e-5 * scale
        assert np.abs(np.concatenate([h[layer] for h in halves]) - expected).max() <= 2e-5 * scale


def test_the_control_a_neighbouring_hook_gives_something_else(circuit: Circuit) -> None:
    """What goes into the MLP, and what comes out of its first projection, are not the neurons."""
    lm = circuit.lm
    seen: list[Tensor] = []
    block, outlet = lm.anatomy.blocks[1], circuit.outlets[1].module
    inner = [m for m in block.modules() if isinstance(getattr(m, "weight", None), Tensor) and m is not outlet]

    def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen.append(output)

    handles = [m.register_forward_hook(keep) for m in inner]
    try:
        rows = dumped(lm, [TEXT], [1])[1]
    finally:
        for handle in handles:
            handle.remove()
    alike = [
        part
        for out in seen
        if isinstance(out, Tensor)
        for part in (out, *out.chunk(2, -1))
        if part.shape[-1] == rows.shape[-1]
    ]
    assert alike, "some module's output is as wide"
    assert all(np.abs(part[0].double().numpy() - rows).max() > 1e-3 for part in alike)


def test_the_forward_ends_behind_the_last_layer_that_is_wanted(circuit: Circuit) -> None:
    entered: list[int] = []

    def enter(n: int) -> Any:
        return lambda _module, _args: entered.append(n)

    handles = [b.register_forward_pre_hook(enter(n)) for n, b in enumerate(circuit.lm.anatomy.blocks)]
    try:
        rows = dumped(circuit.lm, [TEXT], [1])
    finally:
        for handle in handles:
            handle.remove()
    assert list(rows) == [1]
    assert entered == [0, 1]


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    from dataclasses import replace

    lm = tiny_lm()
    assert check_neurons(lm) is lm.anatomy.neurons
    broken = replace(lm, anatomy=replace(lm.anatomy, neurons=None))
    with pytest.raises(ModelError, match=r"tiny-llama: llama: .*mixture of experts.*take a dense model"):
        circuit_of(broken)


# ---- norms -------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A linear map number by number: no norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_norms_are_found_by_what_they_do() -> None:
    like, width = torch.zeros(1), 7
    layer = nn.LayerNorm(width)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-2, 3, width))
        layer.bias.copy_(torch.linspace(5, 6, width))
    for module, is_centred in ((layer, True), (nn.LayerNorm(width, elementwise_affine=False), True),
                               (nn.RMSNorm(width), False)):  # fmt: skip
        norm = norms.norm_of(module, width, like)
        assert norm is not None
        assert norm.is_centred is is_centred
        x = torch.randn(3, width)
        y = module(x)
        scale = norm.scale(x, y)
        assert torch.allclose(norm.apply(x, scale) + norm.bias, y, atol=1e-5)
        other = torch.randn(3, width)
        assert torch.allclose((other * norm.apply(x, scale)).sum(-1), (norm.back(other, scale) * x).sum(-1), atol=1e-4)
    for module in (nn.SiLU(), nn.Identity(), nn.Dropout(), Shifted(width), nn.Linear(width, width), nn.Tanh()):
        assert norms.norm_of(module.eval(), width, like) is None, module


# ---- law 3: the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logit", "contrast"])
def test_the_parts_of_dla_add_up_to_the_logit_before_its_cap(circuit: Circuit, name: str) -> None:
    target = TARGETS[name]
    told = attribute(Scene(circuit, target), ("dla",)).totals["dla"]
    parts = [told.total, told.attention, told.embedding, told.bias]
    whole = sum(p for p in parts if p is not None)
    size = max(1.0, *(abs(p) for p in parts if p is not None))
    assert abs(whole - plain.value(circuit.lm, target)) <= 1e-4 * size
    assert told.residual is not None
    assert abs(told.residual) <= 1e-4 * size


@pytest.mark.parametrize("family", SANDWICH)
def test_the_control_without_the_scales_of_norms_behind_the_mlp_they_do_not(family: str) -> None:
    from dataclasses import replace

    circuit = circuit_of(tiny_lm(family))
    bare = replace(circuit, outlets=tuple(replace(o, post=None) for o in circuit.outlets))
    good, bad = (attribute(Scene(c, TARGETS["logit"]), ("dla",)).totals["dla"].residual for c in (circuit, bare))
    assert good is not None
    assert bad is not None
    assert abs(bad) > 100 * abs(good) + 1e-2


def test_each_neurons_dla_is_what_is_carried_forward_by_hand(circuit: Circuit) -> None:
    found = attribute(Scene(circuit, TARGETS["contrast"]), ("dla",)).values["dla"]
    scale = float(found.abs().max())
    for layer in range(circuit.num_layers):
        for neuron in (0, 17, int(found[layer].abs().argmax())):
            want = plain.direct(circuit.lm, TARGETS["contrast"], layer, neuron)
            assert abs(want - float(found[layer, neuron])) <= 1e-4 * scale


# ---- law 4: gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_upto", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_act_grad_is_the_gradient_of_a_plain_forward(circuit: Circuit, name: str, is_upto: bool) -> None:
    target = TARGETS[name]
    found = attribute(Scene(circuit, target, is_upto=is_upto), ("act_grad",))
    products = plain.activations(circuit.lm, target.tokens) * plain.gradients(circuit.lm, target)
    want = products.sum(1) if is_upto else products[:, -1]
    got = found.values["act_grad"].double().numpy()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_act_grad_is_what_central_differences_give(family: str) -> None:
    circuit = circuit_of(tiny_lm(family, dtype="float64"))
    target = TARGETS["logit"]
    found = attribute(Scene(circuit, target), ("act_grad",)).weights["act_grad"].numpy()
    step = 2e-2  # norms run in float32 whatever the model's dtype is: smaller steps drown in rounding
    for layer, neuron in ((0, 3), (1, 50), (3, 17)):

        def moved(steps: int, layer: int = layer, neuron: int = neuron) -> float:
            def edit(at: int, a: Tensor) -> Tensor | None:
                if at != layer:
                    return None
                changed = a.clone()
                changed[:, -1, neuron] += steps * step
                return changed

            return plain.value(circuit.lm, target, edit)

        # Five points: the error is of the fourth power of the step.
        slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
        assert slope == pytest.approx(found[layer, neuron], abs=2e-4 * max(1.0, float(np.abs(found).max())))


@pytest.mark.parametrize("is_upto", [False, True])
@pytest.mark.parametrize("start", ["zero", "mean"])
def test_integrated_gradients_add_up_to_the_difference_of_their_ends(
    circuit: Circuit, is_upto: bool, start: str
) -> None:
    scene = Scene(circuit, TARGETS["logit"], is_upto=is_upto)
    base = None if start == "zero" else torch.full((circuit.num_layers, circuit.num_neurons), 0.05)
    found = attribute(scene, ("ig",), base)
    told = found.totals["ig"]
    assert told.gap is not None
    assert abs(told.gap) <= 0.01
    shift = torch.zeros(circuit.num_layers, circuit.num_neurons) if base is None else base
    places = torch.arange(shift.numel()).reshape(1, *shift.shape)
    none, whole = sets(scene, places, [Set(0, 0, True), Set(0, shift.numel(), True)], Change(0.0, shift))
    assert told.total == pytest.approx(whole - none, rel=0.011, abs=1e-4)


def test_the_control_too_few_places_leave_a_gap() -> None:
    """A path that bends is given more places; without them its gap stays."""
    from harness.models import attribution

    circuit = circuit_of(tiny_lm("tiny-gemma2"))
    scene = Scene(circuit, TARGETS["logit"])
    clean = attribution._clean(scene)
    straight = attribution._Path(scene, torch.zeros_like(clean.activations), clean.activations, False)
    (part,) = straight.integrals([(0.0, 1.0)], 8)
    gap = float((part * clean.activations).sum()) - straight.difference(0.0, 1.0)
    assert abs(gap) > 0.05 * abs(straight.difference(0.0, 1.0))


class Linear(nn.Module):
    """In place of a nonlinearity."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def linear_lm(family: str) -> Circuit:
    """A model whose MLPs have no nonlinearity."""
    from harness.models.load import Codec, assemble
    from tests.tiny import byte_tokenizer, identity

    model = build_model(family)
    for module in model.modules():
        for name, _child in list(module.named_children()):
            if name in ("act", "act_fn", "activation_fn"):
                setattr(module, name, Linear())
    return circuit_of(assemble(model, Codec(byte_tokenizer()), identity(family)))


@pytest.mark.parametrize("family", ["tiny-gpt2", "tiny-neox"])
def test_relp_is_the_gradient_where_the_mlp_is_linear_and_the_rest_is_frozen(family: str) -> None:
    from harness.models import attend

    circuit = linear_lm(family)
    acts = acts_of(circuit)
    assert not acts.is_gated
    scene = Scene(circuit, TARGETS["logit"], is_upto=True)
    relp = attribute(scene, ("relp",), acts=acts).weights["relp"]
    with norms.frozen(circuit.norms), attend.frozen_patterns():
        frozen = attribute(scene, ("act_grad",)).weights["act_grad"]
    free = attribute(scene, ("act_grad",)).weights["act_grad"]
    assert torch.allclose(relp, frozen, atol=1e-5 * float(frozen.abs().max()))
    assert not torch.allclose(relp, free, atol=1e-2 * float(free.abs().max())), "the control: norms and patterns matter"


def test_relp_halves_a_gated_product_and_takes_the_secant() -> None:
    """By hand on one layer's own input: with everything later frozen, the weight on a neuron of the last layer is dla's."""
    for family in ("tiny-llama", "tiny-phi3", "tiny-gpt2", "tiny-gemma2"):
        circuit = circuit_of(tiny_lm(family))
        acts = acts_of(circuit)
        assert acts.is_gated is (family != "tiny-gpt2")
        found = attribute(Scene(circuit, TARGETS["logit"]), ("dla", "relp"), acts=acts)
        scale = float(found.values["dla"].abs().max())
        assert torch.allclose(found.values["relp"][-1], found.values["dla"][-1], atol=1e-4 * scale)
        assert not torch.allclose(found.values["relp"][0], found.values["dla"][0], atol=1e-2 * scale)


def test_a_family_without_a_nonlinearity_of_its_own_has_no_relp() -> None:
    circuit = circuit_of(tiny_lm("tiny-llama"))
    kept = {m: m.forward for m in circuit.lm.model.modules() if type(m).__name__ in ("SiLUActivation", "SiLU")}
    assert kept, "it has one"
    try:
        for module in kept:
            module.forward = lambda x: x.flip(-1)  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="relp cannot be had"):
            acts_of(circuit)
    finally:
        for module, forward in kept.items():
            module.forward = forward  # type: ignore[method-assign]


# ---- law 5: edits that change nothing; interventions -------------------------------------------------------------


def which(circuit: Circuit) -> np.ndarray:
    return np.array([[n, m] for n in range(circuit.num_layers) for m in (3, 17, 50)])


@pytest.mark.parametrize("is_upto", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_an_intervention_is_that_of_a_plain_forward(circuit: Circuit, name: str, is_upto: bool) -> None:
    target = TARGETS[name]
    shift = torch.linspace(-0.1, 0.1, circuit.num_layers * circuit.num_neurons).reshape(circuit.num_layers, -1)
    found = effects(Scene(circuit, target, is_upto=is_upto), which(circuit), Change(-0.5, shift))
    for k, (layer, neuron) in enumerate(which(circuit).tolist()):

        def edit(at: int, a: Tensor, layer: int = layer, neuron: int = neuron) -> Tensor | None:
            if at != layer:
                return None
            changed = a.clone()
            here = slice(0 if is_upto else target.position, target.position + 1)
            changed[:, here, neuron] = -0.5 * a[:, here, neuron] + shift[layer, neuron]
            return changed

        assert found.changed["value"][k] == pytest.approx(plain.value(circuit.lm, target, edit), abs=5e-5, rel=1e-5)
    assert np.ptp(found.changed["value"]) > 1e-4, "the control: they do something"


def test_a_neurons_own_value_and_a_zero_set_to_zero_change_nothing(circuit: Circuit) -> None:
    scene = Scene(circuit, TARGETS["logit"])
    nothing = torch.zeros(circuit.num_layers, circuit.num_neurons)
    same = effects(scene, which(circuit), Change(1.0, nothing))
    assert np.abs(same.changed["value"] - same.clean["value"]).max() <= 2e-5
    with torch.no_grad():
        own = attribute(scene, ("dla",)).activation
    back = effects(scene, which(circuit), Change(0.0, own))
    assert np.abs(back.changed["value"] - back.clean["value"]).max() <= 2e-5

    def silence(layer: int, a: Tensor) -> Tensor:
        changed = a.clone()
        changed[..., 50] = 0
        return changed

    with watched(circuit.lm, silence):
        clean, off = (effects(scene, np.array([[2, 50]]), c) for c in (Change(1.0, nothing), Change(0.0, nothing)))
    assert off.changed["value"][0] == pytest.approx(clean.clean["value"], abs=2e-5)


def test_sets_are_kept_and_dropped_as_a_plain_forward_has_it(circuit: Circuit) -> None:
    target, shape = TARGETS["logit"], (circuit.num_layers, circuit.num_neurons)
    order = np.random.default_rng(0).permutation(shape[0] * shape[1])
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    places = places.reshape(shape)
    shift = torch.full(shape, 0.02)
    wanted = [Set(0, k, kept) for k in (0, 5, 100, len(order)) for kept in (True, False)]
    found = sets(Scene(circuit, target), torch.from_numpy(places)[None], wanted, Change(0.0, shift))
    for one, value in zip(wanted, found, strict=True):

        def edit(layer: int, a: Tensor, one: Set = one) -> Tensor:
            inside = torch.from_numpy(places[layer] < one.size)
            changed = a.clone()
            changed[:, -1] = torch.where(inside == one.is_kept, a[:, -1], shift[layer])
            return changed

        assert value == pytest.approx(plain.value(circuit.lm, target, edit), abs=5e-5, rel=1e-5)
    assert found[0] == pytest.approx(found[-1], abs=1e-5), "nothing kept is everything dropped"
    assert found[1] == pytest.approx(found[-2], abs=1e-5)


# ---- law 8: nothing is left behind -------------------------------------------------------------------------------


def test_no_gradient_no_hook_and_the_same_outputs_are_left(circuit: Circuit) -> None:
    lm = circuit.lm
    ids = torch.tensor([TEXT])
    before = lm.model(input_ids=ids).logits
    hooks = {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()}
    scene = Scene(circuit, TARGETS["logit"])
    attribute(scene, ("dla", "act_grad", "ig", "relp"), acts=acts_of(circuit))
    effects(scene, which(circuit), Change(0.0, torch.zeros(circuit.num_layers, circuit.num_neurons)))
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()} == hooks
    assert torch.equal(lm.model(input_ids=ids).logits, before)
    with pytest.raises(ZeroDivisionError), watched(lm, lambda _n, _a: 1 / 0):  # type: ignore[arg-type,return-value]
        lm.model(input_ids=ids)
    assert {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()} == hooks


def test_what_is_no_number_is_refused() -> None:
    circuit = circuit_of(tiny_lm())

    def poison(layer: int, a: Tensor) -> Tensor | None:
        return a * torch.nan if layer == 2 else None

    with watched(circuit.lm, poison), pytest.raises(NotFinite):
        attribute(Scene(circuit, TARGETS["logit"]), ("dla",))


def test_other_widths_and_scales_of_logits_too() -> None:
    """Granite multiplies its sublayers and divides its logits, Cohere has parallel blocks and multiplies them."""
    from transformers import AutoConfig

    from harness.models.load import Codec, assemble
    from tests.tiny import byte_tokenizer, identity

    base: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128, "eos_token_id": 256,
        "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    from transformers import AutoModelForCausalLM

    from harness.models import attend

    for kind, more in (
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
        ("cohere", {"logit_scale": 0.25}), ("stablelm", {}), ("starcoder2", {"use_bias": True}),
    ):  # fmt: skip
        config = AutoConfig.for_model(kind, **base, **more)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attend.registered()).eval()
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif ".layers." in name:
                    parameter.mul_(5)
        circuit = circuit_of(assemble(model.requires_grad_(False), Codec(byte_tokenizer()), identity(kind)))
        told = attribute(Scene(circuit, TARGETS["logit"]), ("dla",)).totals["dla"]
        assert told.residual == pytest.approx(0, abs=1e-4), kind
        assert abs(told.total) > 1e-4, kind
        acts_of(circuit)


def test_shapes_are_those_of_the_families() -> None:
    assert set(FAMILIES) <= set(shapes.NAMES)
