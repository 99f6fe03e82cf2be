"""Four attributions of a logit to the neurons of every layer, all exact in what they claim (docs/method.md, Neurons).

dla: what a neuron's output adds to the logit along the residual stream alone, every norm's scale frozen (Elhage et al. 2021).
act_grad: activation × gradient, attention and later layers included.
ig: integrated gradients along a path (Sundararajan et al. 2017), all neurons of all layers together.
relp: the gradient with norms' scales and attention patterns frozen, half of a gated product to each factor, nonlinearities
by their secant (Arora et al. 2026, arXiv 2601.22594).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from harness.errors import NOT_FINITE, ModelError, NotFinite
from harness.models import attend, norms
from harness.models.anatomy import close, first_tensor
from harness.models.neurons import Circuit, watched
from harness.models.scene import Scene, chunked, rows_at_once

METRICS = ("dla", "act_grad", "ig", "relp")
_MOST_TOKENS = 2_048
"""Of a forward whose graph is kept."""


@dataclass(frozen=True)
class Totals:
    """What the neurons' values add up to beside what they explain. Those of other parts are dla's alone, `gap` is ig's:
    (Σ − difference)/|difference| of the two ends of the path."""

    total: float
    attention: float | None = None
    embedding: float | None = None
    bias: float | None = None
    residual: float | None = None
    gap: float | None = None


@dataclass
class Attributed:
    """Of one prompt: `activation` [L, M] at the target's position, by metric `values` [L, M] (over all positions where those
    are meant), `weights` [L, M] (how much a unit of activation counts) and totals. `value` is what was attributed."""

    value: float
    activation: Float[Tensor, "L M"]
    values: dict[str, Float[Tensor, "L M"]] = field(default_factory=dict)
    weights: dict[str, Float[Tensor, "L M"]] = field(default_factory=dict)
    totals: dict[str, Totals] = field(default_factory=dict)


def attribute(
    scene: Scene,
    metrics: Sequence[str],
    origin: Float[Tensor, "L M"] | None = None,
    steps: int = 32,
    acts: "Acts | None" = None,
) -> Attributed:
    """Every neuron's share in the target, by each metric. `origin` is where ig's path begins, None at zero.

    `acts` are needed for relp. Raises NotFinite where a value is none.
    """
    clean = _clean(scene)
    found = Attributed(clean.value, clean.activations[:, -1])
    if "dla" in metrics:
        found.values["dla"], found.weights["dla"], found.totals["dla"] = _direct(scene, clean)
    for metric, within in (("act_grad", None), ("relp", acts)):
        if metric in metrics:
            assert metric != "relp" or within is not None, "relp needs the nonlinearities"
            gradients = _gradients(scene, within)
            found.values[metric] = (clean.activations * gradients).sum(1)
            found.weights[metric] = gradients.sum(1)
            found.totals[metric] = Totals(_sum(found.values[metric]))
    if "ig" in metrics:
        found.values["ig"], found.weights["ig"], found.totals["ig"] = _integrated(scene, clean, origin, steps)
    if not all(bool(v.isfinite().all()) for v in (found.activation, *found.values.values())):
        raise NotFinite(NOT_FINITE)
    return found


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


@dataclass
class _Clean:
    """An untouched forward: `activations` [L, C, M] of the columns that are meant, and what dla needs at the last of them."""

    value: float
    activations: Float[Tensor, "L C M"]
    parts: dict[str, list[tuple[Tensor | None, Tensor]]]
    """By kind of part, a layer each: input and output [D] at the target's position."""


@torch.no_grad()
def _clean(scene: Scene) -> _Clean:
    circuit, count = scene.circuit, scene.num_edited
    anatomy = circuit.lm.anatomy
    seen: list[Tensor] = []
    parts: dict[str, list[tuple[Tensor | None, Tensor]]] = {}

    def keep(_layer: int, a: Tensor) -> None:
        seen.append(a[0, :count].clone())

    def part(kind: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, output: object) -> None:
            given, made = first_tensor(args), first_tensor(output)
            assert made is not None, "a block's part gives a tensor"
            parts.setdefault(kind, []).append((None if given is None else given[0, count - 1], made[0, count - 1]))

        return hook

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        parts["embedding"] = [(None, (args[0] if args else kwargs["hidden_states"])[0, count - 1])]

    with ExitStack() as stack:
        handles = [anatomy.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [m.register_forward_hook(part("attention")) for m in anatomy.attention_out]
        handles += [o.post[0].register_forward_hook(part("post")) for o in circuit.outlets if o.post is not None]
        handles.append(anatomy.final_norm.register_forward_hook(part("final")))
        handles.append(anatomy.blocks[-1].register_forward_hook(part("last")))
        for handle in handles:
            stack.callback(handle.remove)
        with watched(circuit.lm, keep):
            hidden = scene.hidden(1)
    value = float(scene.value(hidden)[0])
    return _Clean(value, torch.stack(seen), parts)


@torch.no_grad()
def _direct(scene: Scene, clean: _Clean) -> tuple[Tensor, Tensor, Totals]:
    """dla: the adjoint of the path from each neuron's output to the logit, norms frozen at this forward."""
    circuit, target = scene.circuit, scene.target
    wide = torch.promote_types(clean.activations.dtype, torch.float32)
    ids = torch.tensor([target.ids[0]], device=clean.activations.device)
    rows, biases = circuit.unembedding(ids)
    direction, head_bias = rows[0].to(wide), float(biases[0])
    if target.contrast is not None:
        rows, biases = circuit.unembedding(torch.tensor([target.contrast], device=ids.device))
        direction, head_bias = direction - rows[0].to(wide), head_bias - float(biases[0])
    final = circuit.final
    stream, normed = (t.to(wide) for t in (clean.parts["last"][0][1], _given(clean.parts, "final", "last")))
    # Back through the final norm: what a vector in the residual stream adds to the logit is its product with this.
    back = final.back(direction, final.scale(stream, normed))
    bias = head_bias + float(final.bias.to(wide) @ direction)
    multiplier = circuit.lm.anatomy.multiplier
    weights, posts = [], iter(clean.parts.get("post", ()))
    for outlet in circuit.outlets:
        into = back * outlet.multiplier
        if outlet.post is not None:
            norm = outlet.post[1]
            given, made = next(posts)
            assert given is not None, "a norm has an input"
            bias += float(norm.bias.to(wide) @ into)
            into = norm.back(into, norm.scale(given.to(wide), made.to(wide)))
        if outlet.bias is not None:
            bias += float(outlet.bias.to(wide) @ into)
        weights.append(outlet.weight.to(wide).T @ into)
    weight = torch.stack(weights)
    values = weight * clean.activations[:, -1].to(wide)
    attention = sum(float(made.to(wide) @ back) * multiplier for _, made in clean.parts["attention"])
    embedding = float(clean.parts["embedding"][0][1].to(wide) @ back)
    total = _sum(values)
    logit = clean.value
    if target.is_sequence:  # a log-probability is no sum; the direct path is that to its first token's logit
        logit = float(normed @ direction) + head_bias
    residual = logit - (total + attention + embedding + bias)
    return values, weight, Totals(total, attention, embedding, bias, residual)


def _given(parts: dict[str, list[tuple[Tensor | None, Tensor]]], kind: str, otherwise: str) -> Tensor:
    """A part's output; a model without a final norm has none."""
    return parts.get(kind, parts[otherwise])[0][1]


def _gradients(scene: Scene, acts: "Acts | None" = None) -> Float[Tensor, "L C M"]:
    """∂target/∂activation through all that follows; with `acts` by relp's rules."""
    leaves: list[Tensor] = []

    def see(_layer: int, a: Tensor) -> Tensor:
        # Nothing before the first layer's neurons has a gradient: there they are leaves.
        a = a if a.requires_grad else a.detach().requires_grad_(True)
        if acts is not None and acts.is_gated:
            a = _Halved.apply(a)  # type: ignore[assignment]
        leaves.append(a)
        return a

    with torch.enable_grad(), watched(scene.circuit.lm, see), ExitStack() as stack:
        if acts is not None:
            stack.enter_context(norms.frozen(scene.circuit.norms))
            stack.enter_context(attend.frozen_patterns())
            stack.enter_context(acts.by_secant())
        value = scene.value(scene.hidden(1)).sum()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return torch.stack([_or_zero(g, a)[0, : scene.num_edited] for g, a in zip(gradients, leaves, strict=True)])


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A neuron that nothing later reads has no gradient."""
    return torch.zeros_like(like) if gradient is None else gradient


def _integrated(
    scene: Scene, clean: _Clean, origin: Float[Tensor, "L M"] | None, steps: int
) -> tuple[Tensor, Tensor, Totals]:
    """ig: every layer's neurons are set, so a gradient does not pass through another layer's.

    The path is cut into panels, each integrated by Gauss and Legendre. What a panel should come to is known, the difference
    of the target at its ends: those that miss it are halved, until all misses together are less than 1 % of the whole.
    """
    a = clean.activations
    start = torch.zeros_like(a) if origin is None else origin.to(a)[:, None].expand_as(a)
    along = _Path(scene, start, a, origin is None and any(o.post is not None for o in scene.circuit.outlets))
    order = min(steps, _ORDER)
    edges = np.linspace(0, 1, max(1, steps // order) + 1)
    total, panels = torch.zeros_like(a, dtype=torch.float64), list(pairwise(edges.tolist()))
    difference, misses, used = along.difference(0.0, 1.0), [], 0
    while panels:
        parts = along.integrals(panels, order)
        used += order * len(panels)
        room = _MOST_GAP * abs(difference) - sum(misses)
        gaps = [
            abs(_sum(part * (a - start)) - along.difference(*ends)) for part, ends in zip(parts, panels, strict=True)
        ]
        # The smallest misses are let be, as many as there is room for.
        halved: list[tuple[float, float]] = []
        for n in np.argsort(gaps, kind="stable").tolist():
            if gaps[n] <= room or used + 2 * order * (len(halved) + 1) > _MOST_TIMES * steps:
                room -= gaps[n]
                misses.append(gaps[n])
                total += parts[n]
            else:
                low, high = panels[n]
                halved += [(low, (low + high) / 2), ((low + high) / 2, high)]
        panels = sorted(halved)
    gradients = total.to(a.dtype)
    values = (a - start) * gradients
    whole = _sum(values)
    gap = (whole - difference) / max(abs(difference), 1e-12)
    return values.sum(1), gradients.sum(1), Totals(whole, gap=gap)


_ORDER = 8
"""Places of a panel."""
_MOST_GAP = 0.01
_MOST_TIMES = 32
"""As many places as were asked for at first, so often, and no more."""
_STEEPNESS = 10.0


class _Path:
    """The straight way from `start` to `end`, both [L, C, M]: u in [0, 1] stands for the share g(u) of it.

    A norm behind the MLP makes its part of the stream whole as soon as a neuron is not 0: all of the change is at the very
    beginning. There (`is_steep`) g(u) = (e^κu − 1)/(e^κ − 1), so that places are dense where it is.
    """

    def __init__(self, scene: Scene, start: Tensor, end: Tensor, is_steep: bool):
        self._scene, self._start, self._end, self._is_steep = scene, start, end, is_steep
        self._values: dict[float, float] = {}

    def _share(self, u: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return np.expm1(_STEEPNESS * u) / np.expm1(_STEEPNESS) if self._is_steep else u

    def _slope(self, u: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return _STEEPNESS * np.exp(_STEEPNESS * u) / np.expm1(_STEEPNESS) if self._is_steep else np.ones_like(u)

    def difference(self, low: float, high: float) -> float:
        """Of the target at two places."""
        self._look([u for u in (low, high) if u not in self._values])
        return self._values[high] - self._values[low]

    @torch.no_grad()
    def _look(self, places: Sequence[float]) -> None:
        scene, size = self._scene, rows_at_once(self._scene, _MOST_TOKENS)
        for some in chunked(len(places), size):
            own = places[some.start : some.stop]
            along = self._along(self._share(np.array(own)))

            def put(layer: int, a: Tensor, along: Tensor = along) -> Tensor:
                return torch.cat([self._at(layer, along), a[:, scene.num_edited :]], 1)

            with watched(scene.circuit.lm, put):
                found = scene.value(scene.hidden(len(own)))
            self._values |= dict(zip(own, found.double().tolist(), strict=True))

    def integrals(self, panels: Sequence[tuple[float, float]], order: int) -> list[Float[Tensor, "L C M"]]:
        """The mean gradient over each panel, times its share of the way."""
        self._look([u for u in dict.fromkeys(u for ends in panels for u in ends) if u not in self._values])
        nodes, weights = np.polynomial.legendre.leggauss(order)
        u = np.concatenate([low + (high - low) * (nodes + 1) / 2 for low, high in panels])
        w = np.concatenate([(high - low) * weights / 2 for low, high in panels]) * self._slope(u)
        shares, found = self._share(u), [torch.zeros_like(self._end, dtype=torch.float64) for _ in panels]
        size = max(order, rows_at_once(self._scene, _MOST_TOKENS) // order * order)  # whole panels
        for some in chunked(len(u), size):
            for n, gradient in enumerate(
                self._gradients(shares[some.start : some.stop], w[some.start : some.stop], order)
            ):
                found[some.start // order + n] += gradient
        return found

    def _along(self, shares: Float[np.ndarray, " R"]) -> Float[Tensor, "R 1 1"]:
        return torch.tensor(shares, device=self._end.device, dtype=self._end.dtype)[:, None, None]

    def _at(self, layer: int, along: Float[Tensor, "R 1 1"]) -> Float[Tensor, "R C M"]:
        return self._start[layer] + along * (self._end[layer] - self._start[layer])

    def _gradients(
        self, shares: Float[np.ndarray, " R"], weights: Float[np.ndarray, " R"], order: int
    ) -> Iterator[Float[Tensor, "L C M"]]:
        """Weighted sums of gradients, of so many rows each."""
        scene, along = self._scene, self._along(shares)
        leaves: list[Tensor] = []

        def put(layer: int, a: Tensor) -> Tensor:
            x = self._at(layer, along).detach().requires_grad_(True)
            leaves.append(x)
            return torch.cat([x, a[:, scene.num_edited :]], 1)

        with torch.enable_grad(), watched(scene.circuit.lm, put):
            value = scene.value(scene.hidden(len(shares))).sum()
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        each = torch.tensor(weights, device=self._end.device).reshape(-1, order, 1, 1)
        by_layer = [
            (_or_zero(g, x).double().reshape(len(each), order, *x.shape[1:]) * each).sum(1)
            for g, x in zip(gradients, leaves, strict=True)
        ]
        yield from torch.stack(by_layer, 1)


# ---- relp's rules -------------------------------------------------------------------------------------------------


class _Halved(torch.autograd.Function):
    """The same number, and half of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


@dataclass(frozen=True)
class Acts:
    """The nonlinearities of a model's MLPs, and whether their output is multiplied by another projection's."""

    modules: tuple[nn.Module, ...]
    is_gated: bool

    @contextmanager
    def by_secant(self) -> Iterator[None]:
        """Gradients of forwards inside the block take f(z) for z times the constant f(z)/z."""
        handles = [m.register_forward_hook(_by_secant) for m in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


_NEAR = 1e-3
"""Nearer to 0 than this the secant is that between this number and its negative."""


def _by_secant(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    z = args[0].detach()
    near = torch.full_like(z, _NEAR)
    with torch.no_grad():
        # By its own forward, so that no hook is called again.
        middle = (module.forward(near) - module.forward(-near)) / (2 * _NEAR)
    slope = torch.where(z.abs() < _NEAR, middle, output.detach() / torch.where(z == 0, near, z))
    linear = args[0] * slope
    return output.detach() + (linear - linear.detach())


@torch.no_grad()
def acts_of(circuit: Circuit) -> Acts:
    """The nonlinearities, found in each block as the module without weights that works number by number and whose output
    goes into the projection, alone or multiplied by a projection's. Raises ModelError where there is none."""
    lm = circuit.lm
    tokens = torch.arange(8, device=lm.device)[None] * 31 % len(lm.codec)
    positions = torch.arange(8, device=lm.device)[None]
    found: list[nn.Module] = []
    gated: list[bool] = []
    for block, outlet in zip(lm.anatomy.blocks, circuit.outlets, strict=True):
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        into: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: object, seen: list = seen) -> None:
            given, made = first_tensor(args), first_tensor(output)
            if given is not None and made is not None:
                seen.append((module, given, made))

        leaves = [m for m in block.modules() if not list(m.children())]
        handles = [m.register_forward_hook(keep) for m in leaves]
        handles.append(outlet.module.register_forward_pre_hook(_keeping(into)))
        try:
            lm.hidden(tokens, attend.Layout(positions, positions))
        finally:
            for handle in handles:
                handle.remove()
        a = into[0]
        pick = _act_among(seen, a)
        if pick is None:
            raise ModelError(
                f"{lm.identity.name}: breaks 'neurons = nonlinearity, or nonlinearity × projection'; relp cannot be had "
                "(leave it out of neurons.metrics)"
            )
        found.append(pick[0])
        gated.append(pick[1])
    if len(set(gated)) != 1:
        raise ModelError(f"{lm.identity.name}: some of its MLPs are gated and some are not; relp cannot be had")
    return Acts(tuple(dict.fromkeys(found)), gated[0])


def _keeping(into: list[Tensor]) -> Callable[[nn.Module, tuple], None]:
    return lambda _module, args: into.append(args[0])


def _act_among(seen: Sequence[tuple[nn.Module, Tensor, Tensor]], a: Tensor) -> tuple[nn.Module, bool] | None:
    factors = []
    for module, _, made in seen:
        if any(p.ndim == 2 for p in module.parameters()):
            factors += [made] if made.shape == a.shape else list(made.chunk(2, -1))
    for module, given, made in seen:
        if list(module.parameters()) or made.shape != a.shape or given.shape != made.shape or torch.equal(given, made):
            continue
        if not _is_elementwise(module, given, made):
            continue
        if close(made, a):
            return module, False
        if any(f.shape == a.shape and close(made * f, a) for f in factors):
            return module, True
    return None


def _is_elementwise(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    half = given.shape[-1] // 2
    other = given.clone()
    other[..., half:] = other[..., half:] * 3 + 1
    return close(module.forward(other)[..., :half], made[..., :half])
