"""One forward, many measurements: attention rows, logit lens, decomposition, norms and neurons (docs/method.md).

A probe is a context with the answer tokens that came before the step of interest; it is forwarded once, right-padded
in a causal batch, and everything is reduced on the device. The lens is the model's own final norm and head applied to
the *raw* residual stream (nostalgebraist 2020): the last layer's lens is the model's output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models import measure
from harness.models.attend import right_padded
from harness.models.load import LM
from harness.models.measure import SPANS
from harness.models.taps import Captured, capture

NUM_NEURONS = 10
"""Neurons kept per layer."""
_HEAD_ROWS = 128
"""Rows whose distribution over the vocabulary stands in memory at once, twice: a layer's and the final one."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """What to look at. `tokens` are the context and the answer's tokens before the last step; `at` the query tokens of
    the steps, `emitted` the token that came out at each; `targets` the first tokens of S(X)."""

    tokens: tuple[int, ...]
    at: tuple[int, ...]
    emitted: tuple[int, ...]
    targets: tuple[int, ...]
    spans: Mapping[str, Span | None]
    keep_whole: bool = False
    """Keep every head's attention row and the residual stream too."""


@dataclass
class StepView:
    """One step of one probe. Arrays have one entry a layer; spans are those of `measure.SPANS`."""

    masses: Float[np.ndarray, "L H 4"]
    mean_row: Float[np.ndarray, "L S"]
    lens: dict[str, np.ndarray]
    """p_target, p_emitted, entropy, kl_final [L]; top_ids, top_probs [L, C]."""
    p_in: Float[np.ndarray, " L"]
    p_attn: Float[np.ndarray, " L"]
    p_out: Float[np.ndarray, " L"]
    rows: Float[np.ndarray, "L H S"] | None = None
    resid: Float[np.ndarray, "M D"] | None = None
    """What enters the first block, then every block's output: M = L + 1."""


@dataclass
class View:
    """Everything one probe gave: a `StepView` per step, and what belongs to the whole text."""

    steps: list[StepView] = field(default_factory=list)
    resid_norm: Float[np.ndarray, "L T"] = field(default_factory=lambda: np.empty((0, 0)))
    top_neurons: Int[np.ndarray, "L N"] | None = None
    """At the first step; None where the family's MLP has no single list of neurons."""
    top_values: Float[np.ndarray, "L N"] | None = None


@torch.inference_mode()
def look_inside(lm: LM, probes: Sequence[Probe]) -> list[View | ItemFailed]:
    """A `View` for every probe, from one forward of all of them. Values that are not finite come back as ItemFailed."""
    results: list[View | ItemFailed] = [_too_long(lm, p) or View() for p in probes]
    kept = [i for i, r in enumerate(results) if isinstance(r, View)]
    if kept:
        for i, view in zip(kept, _look(lm, [probes[i] for i in kept]), strict=True):
            results[i] = view
        # A masked NaN is still a NaN (0 × NaN), so a probe may have caught it from the padding behind it.
        for i in [i for i in kept if isinstance(results[i], NotFinite)] if len(kept) > 1 else []:
            results[i] = _look(lm, [probes[i]])[0]
    return results


def _too_long(lm: LM, probe: Probe) -> ItemFailed | None:
    if not probe.tokens:
        return ItemFailed("expected a context of at least one token, found none")
    if len(probe.tokens) > lm.max_positions:
        return ItemFailed(f"needs {len(probe.tokens)} positions, the model has {lm.max_positions}; shorten the prompt")
    return None


def _look(lm: LM, probes: Sequence[Probe]) -> list[View | ItemFailed]:
    tokens, layout = right_padded([p.tokens for p in probes], lm.device)
    num_steps = max(len(p.at) for p in probes)
    at = torch.tensor([[*p.at, *[p.at[-1]] * (num_steps - len(p.at))] for p in probes], device=lm.device)
    spans = torch.from_numpy(_span_masks(probes, tokens.shape[1])).to(lm.device)
    whole = torch.tensor([i for i, p in enumerate(probes) if p.keep_whole], dtype=torch.long, device=lm.device)
    masses: list[Tensor] = []
    mean_rows: list[Tensor] = []
    whole_rows: list[Tensor] = []

    def receive(layer: int, weights: Tensor) -> None:
        assert layer == len(masses), "layers must come in their order, once"
        masses.append(measure.span_masses(weights, spans))
        mean_rows.append(weights.mean(1))
        if len(whole):
            whole_rows.append(weights[whole])

    with capture(lm.anatomy, at, NUM_NEURONS, receive) as found, tally.prefilling():
        lm.hidden(tokens, layout)
    assert len(masses) == len(found.attention) == len(lm.anatomy.blocks), "every layer is seen once"
    # A step asked for twice (the decision at the first token) is unembedded once.
    unique: dict[tuple[int, int], int] = {}
    place = [[unique.setdefault((r, q), len(unique)) for q in p.at] for r, p in enumerate(probes)]
    first = {n: (r, probes[r].at.index(q)) for (r, q), n in unique.items()}
    lens, p_mid, p_start = _unembed(lm, found, probes, [first[n] for n in range(len(unique))])
    host = _Host(
        *(_stack(x) for x in (masses, mean_rows, whole_rows, found.resid_norm, found.top_neurons, found.top_values)),
        resid=np.stack([_numpy(r[whole]) for r in found.resid], 1) if len(whole) else np.empty(0),
    )
    kept_whole = {int(r): n for n, r in enumerate(whole.tolist())}
    return [
        _view(probe, r, [first[n][1] for n in place[r]], place[r], host, lens, p_mid, p_start, kept_whole.get(r))
        for r, probe in enumerate(probes)
    ]


@dataclass(frozen=True)
class _Host:
    """What came to the host: [R, L, ...] each, whole rows and residuals for the kept probes alone."""

    masses: np.ndarray
    mean_rows: np.ndarray
    whole_rows: np.ndarray
    resid_norm: np.ndarray
    top_neurons: np.ndarray
    top_values: np.ndarray
    resid: np.ndarray


def _view(
    probe: Probe,
    row: int,
    columns: Sequence[int],
    places: Sequence[int],
    host: _Host,
    lens: dict[str, np.ndarray],
    p_mid: np.ndarray,
    p_start: np.ndarray,
    whole: int | None,
) -> View | ItemFailed:
    """Of everything the batch gave, what belongs to one probe; its padding cut off."""
    view = View(resid_norm=host.resid_norm[row, :, : len(probe.tokens)])
    if host.top_neurons.size:
        view.top_neurons, view.top_values = host.top_neurons[row, :, columns[0]], host.top_values[row, :, columns[0]]
    for q, column, n in zip(probe.at, columns, places, strict=True):
        p_out = lens["p_target"][n]
        step = StepView(
            host.masses[row, :, :, column],
            host.mean_rows[row, :, column, : q + 1],
            {k: v[n] for k, v in lens.items()},
            np.concatenate([p_start[n : n + 1], p_out[:-1]]),
            p_mid[n],
            p_out,
        )
        if whole is not None:
            step.rows = host.whole_rows[whole, :, :, column, : q + 1]
            step.resid = host.resid[whole, :, column]
        view.steps.append(step)
    parts = [view.resid_norm, *(x for s in view.steps for x in (s.masses, s.p_in, s.p_attn, *s.lens.values()))]
    return view if all(np.isfinite(x).all() for x in parts) else NotFinite(NOT_FINITE)


def _span_masks(probes: Sequence[Probe], width: int) -> Bool[np.ndarray, "R 4 S"]:
    masks = np.zeros((len(probes), len(SPANS), width), dtype=bool)
    for r, probe in enumerate(probes):
        for c, name in enumerate(SPANS):
            span = probe.spans.get(name)
            if span is not None:
                masks[r, c, span[0] : span[1]] = True
    return masks


def _unembed(
    lm: LM, found: Captured, probes: Sequence[Probe], where: Sequence[tuple[int, int]]
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "N L"], Float[np.ndarray, " N"]]:
    """The lens of every layer for the (row, column) pairs of `where`: statistics [N, L, ...], the target's mass after
    each layer's attention [N, L], and before the first layer [N]. The head is applied to these vectors alone."""
    device = lm.device
    row, column = torch.tensor(where, device=device).T
    width = max(1, *(len(probes[r].targets) for r, _ in where))
    targets = torch.zeros(len(where), width, dtype=torch.long)
    is_target = torch.zeros(len(where), width, dtype=torch.bool)
    for n, (r, _) in enumerate(where):
        targets[n, : len(probes[r].targets)] = torch.tensor(probes[r].targets, dtype=torch.long)
        is_target[n, : len(probes[r].targets)] = True
    targets, is_target = targets.to(device), is_target.to(device)
    emitted = torch.tensor([probes[r].emitted[c] for r, c in where], device=device)
    num_layers = len(found.attention)
    lens: dict[str, list[Tensor]] = {}
    p_mid, p_start = [], []
    for begin in range(0, len(where), _HEAD_ROWS):
        some = slice(begin, begin + _HEAD_ROWS)
        r, c, wanted = row[some], column[some], (targets[some], is_target[some])
        final = lens_log_p(lm, found.resid[num_layers][r, c])
        p_start.append(measure.target_mass(lens_log_p(lm, found.resid[0][r, c]), *wanted))
        mids, layers = [], []
        # The head is a matrix too long for any cache: it is applied to several layers' vectors at once.
        for several in torch.arange(num_layers).split(max(1, _HEAD_ROWS // len(r))):
            again, last = len(several), int(several[-1]) == num_layers - 1
            mid = [found.resid[n][r, c] + found.attention[n][r, c] for n in several.tolist()]
            targets_again, is_target_again = (x.repeat(again, 1) for x in wanted)
            log_p = lens_log_p(lm, torch.cat(mid))
            mids += measure.target_mass(log_p, targets_again, is_target_again).split(len(r))
            out = [found.resid[n + 1][r, c] for n in several.tolist() if n + 1 < num_layers]
            log_ps = [lens_log_p(lm, torch.cat(out))] if out else []
            if last:
                log_ps.append(final)
            layers.append(
                measure.lens_rows(
                    torch.cat(log_ps),
                    final.repeat(again, 1),
                    targets_again,
                    is_target_again,
                    emitted[some].repeat(again),
                )
            )
        p_mid.append(torch.stack(mids, 1))
        for name in layers[0].__dataclass_fields__:
            parts = torch.cat([getattr(x, name) for x in layers])
            lens.setdefault(name, []).append(parts.reshape(num_layers, len(r), *parts.shape[1:]).transpose(0, 1))
    return {k: _numpy(torch.cat(v)) for k, v in lens.items()}, _numpy(torch.cat(p_mid)), _numpy(torch.cat(p_start))


def lens_log_p(lm: LM, resid: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Log-probabilities of the next token, were the raw residual stream `resid` the last block's output."""
    return lm.logits(lm.anatomy.final_norm(resid)).log_softmax(-1)


def _stack(layers: list[Tensor]) -> np.ndarray:
    """[R, L, ...] on the host, in one transfer."""
    return _numpy(torch.stack(layers, 1)) if layers else np.empty(0)


def _numpy(x: Tensor) -> np.ndarray:
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).cpu().numpy()
