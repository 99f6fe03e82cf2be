"""The deliberately plain reference: one prompt at a time, no padding, no cache of ours, eager attention, full logits.

Written to be checked by eye and slow on purpose. The tests, `harness sanity` and `harness bench` hold the fast paths
against it. It draws its own tokens and ends its own completions: of the fast path's sampler and noise nothing is used here.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from harness.models import attend
from harness.models.anatomy import first_tensor, record_outputs
from harness.models.decode import Completion, Request, Sampling
from harness.models.inside import Probe
from harness.models.load import LM
from harness.models.patch import Pair
from harness.models.rollout import Ask, Rollout, Rule
from harness.models.rollout import Pair as Models


@contextmanager
def eager(lm: LM) -> Iterator[None]:
    """The family's own eager attention for the time of the block."""
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(attend.NAME)


@torch.inference_mode()
def next_logits(lm: LM, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
    """Logits after every token of one text, by a plain Hugging Face call; float32, or float64 of a float64 model."""
    with eager(lm):
        logits = lm.model(input_ids=torch.tensor([list(token_ids)], device=lm.device), use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sequence_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln P(sequence | context), one forward of context + sequence."""
    log_p = next_logits(lm, [*context, *sequence]).log_softmax(-1).double()
    at = range(len(context) - 1, len(context) + len(sequence) - 1)
    return float(sum(log_p[i, token] for i, token in zip(at, sequence, strict=True)))


def word_end_logprob(lm: LM, context: Sequence[int], sequence: Sequence[int]) -> float:
    """ln of the mass of next tokens that end a word, after context + sequence."""
    p = next_logits(lm, [*context, *sequence])[-1].softmax(-1).double()
    return float(p[torch.from_numpy(lm.vocabulary.ends_word).to(p.device)].sum().log())


def continuations(
    lm: LM, context: Sequence[int], sequences: Sequence[Sequence[int]]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """`sequence_logprob` and `word_end_logprob` of each sequence. One forward tells of a sequence and of all that it begins
    with, so only those that begin no other one are forwarded."""
    logprobs, ends = {}, {}
    for sequence in sorted(map(tuple, sequences), key=len, reverse=True):
        if sequence in logprobs:
            continue
        log_p = next_logits(lm, [*context, *sequence])[len(context) - 1 :].log_softmax(-1).double()
        is_end = torch.from_numpy(lm.vocabulary.ends_word).to(log_p.device)
        total = 0.0
        for n, token in enumerate(sequence):
            total += float(log_p[n, token])
            logprobs[sequence[: n + 1]] = total
            ends[sequence[: n + 1]] = float(log_p[n + 1].exp()[is_end].sum().log())
    return tuple(np.array([of[tuple(s)] for s in sequences]) for of in (logprobs, ends))  # type: ignore[return-value]


def complete(lm: LM, request: Request, sampling: Sampling) -> Completion:
    """One completion, the whole text forwarded again for every token."""
    done = Completion()
    for step in range(sampling.max_new_tokens):
        logits = next_logits(lm, [*request.context, *done.token_ids])[-1]
        greedy = sampling.temperature == 0
        token = int(logits.argmax()) if greedy else draw(logits.double().cpu().numpy(), request.key, step, sampling)
        best = logits.topk(2).values
        logprob, margin = float(logits.log_softmax(-1)[token]), float(best[0] - best[1])
        if _take(done, token, logprob, margin, lm, sampling):
            break
    return done


def _take(done: Completion, token: int, logprob: float, margin: float, lm: LM, sampling: Sampling) -> bool:
    """Write a token down; whether it ends the completion: the model's own end of text, or a newline where one may end it."""
    done.token_ids.append(token)
    done.logprobs.append(logprob)
    done.margins.append(margin)
    if token in lm.vocabulary.stop_ids:
        done.finish_reason = "stop"
    elif sampling.stop_at_newline and lm.vocabulary.has_newline[token]:
        done.finish_reason = "newline"
    return done.finish_reason != "length"


def roll_out(models: Models, ask: Ask, rule: Rule, arms: Sequence[float] = ()) -> Rollout:
    """One completion of two models under one arm, both forwarded whole for every token; the arithmetic in float64."""
    done = Rollout()
    for step in range(ask.max_new_tokens):
        text = [*ask.context, *done.token_ids]
        after, before = (_logprobs(lm, text, models.num_common)[-1] for lm in (models.after, models.before))
        choice = _choice(after, before, ask, rule, step)
        _write(done, choice, choice.token, ask, arms)
        if rule.stop_at_end and choice.token in models.stop_ids:
            done.finish_reason = "stop"
            break
    return done


@dataclass(frozen=True)
class Replayed:
    """A completion that was given, and for each of its tokens the one that would have been drawn in its place, and by how
    much that one leads, in what is compared there (log-probabilities over temperature, plus noise where it is not greedy)."""

    told: Rollout
    tokens: list[int]
    leads: list[float]


def replay(models: Models, ask: Ask, rule: Rule, token_ids: Sequence[int], arms: Sequence[float] = ()) -> Replayed:
    """What `roll_out` would do at every step of a completion, from two forwards of the whole text."""
    text = [*ask.context, *token_ids[:-1]]
    tables = [_logprobs(lm, text, models.num_common)[len(ask.context) - 1 :] for lm in (models.after, models.before)]
    done, tokens, leads = Rollout(), [], []
    for step, (token, after, before) in enumerate(zip(token_ids, *tables, strict=True)):
        choice = _choice(after, before, ask, rule, step)
        _write(done, choice, token, ask, arms)
        tokens.append(choice.token)
        leads.append(choice.lead)
    return Replayed(done, tokens, leads)


@dataclass(frozen=True)
class _Choice:
    """One token drawn: from which log-probabilities, how much probability was left out, and by how much it led."""

    after: Float[np.ndarray, " V"]
    before: Float[np.ndarray, " V"]
    token: int
    lead: float
    removed: float


def _choice(
    after: Float[np.ndarray, " V"], before: Float[np.ndarray, " V"], ask: Ask, rule: Rule, step: int
) -> _Choice:
    z = after + ask.alpha * (after - before)
    scaled = z / (rule.temperature or 1.0)
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    stays = after >= after.max() + math.log(rule.floor) if rule.floor else np.ones(len(z), dtype=bool)
    kept = np.argsort(-z, kind="stable")
    kept = kept[stays[kept]]
    if rule.temperature == 0:
        removed, scores = float(p[~stays].sum()), z
    else:
        if rule.top_p < 1:
            held_before = np.cumsum(p[kept]) - p[kept]
            kept = kept[held_before < rule.top_p * p[kept].sum()]
        removed, scores = 1 - float(p[kept].sum()), scaled + gumbels(ask.key, step, len(z))
    order = kept[np.argsort(-scores[kept], kind="stable")][:2]
    lead = float(scores[order[0]] - scores[order[1]]) if len(order) > 1 else math.inf
    return _Choice(after, before, int(order[0]), lead, removed)


def _write(done: Rollout, choice: _Choice, token: int, ask: Ask, arms: Sequence[float]) -> None:
    """Write a token down with what both models and the arms say of it."""
    after, before = choice.after, choice.before
    z, *others = (after + alpha * (after - before) for alpha in (ask.alpha, *arms))
    best = np.sort(z)[-2:]
    done.token_ids.append(token)
    done.logp_after.append(float(after[token]))
    done.logp_before.append(float(before[token]))
    done.logp_arm.append(float(z[token] - _log_sum(z)))
    done.margins.append(float(best[1] - best[0]))
    done.mass_removed.append(choice.removed)
    done.arm_steps.append([float(other[token] - _log_sum(other)) for other in others])


def arm_sequence(
    models: Models, context: Sequence[int], sequence: Sequence[int], arms: Sequence[float]
) -> Float[np.ndarray, " K"]:
    """ln P(sequence | context) under every arm, from two forwards of context + sequence."""
    ask = Ask(tuple(context), 0, 0.0, len(sequence))
    return replay(models, ask, Rule(temperature=0.0), sequence, arms).told.arm_logps


def differences(models: Models, text: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """ln p_after − ln p_before of every next token behind every token of a text."""
    after, before = (_logprobs(lm, text, models.num_common) for lm in (models.after, models.before))
    return after - before


def _logprobs(lm: LM | None, text: Sequence[int], num_common: int) -> Float[np.ndarray, "T V"]:
    assert lm is not None, "the plain reference reads with both models"
    logits = next_logits(lm, text)[:, :num_common].double().cpu().numpy()
    return np.stack([row - _log_sum(row) for row in logits])


def _log_sum(values: Float[np.ndarray, " V"]) -> float:
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def draw(logits: Float[np.ndarray, " V"], key: int, step: int, sampling: Sampling) -> int:
    """The token that `noise.RULE` draws from the smallest set of most probable tokens that holds `top_p`.

    In float64: softmax of logits / temperature, all tokens sorted; one is kept while those before it hold less than
    `top_p`, so the one that crosses it is kept too.
    """
    scaled = logits / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept, held = [], 0.0
    for token in np.argsort(-p, kind="stable").tolist():
        if held >= sampling.top_p and sampling.top_p < 1:
            break
        kept.append(token)
        held += p[token]
    return max(kept, key=lambda token: scaled[token] + gumbel(key, step, token))


def gumbel(key: int, step: int, token: int) -> float:
    """`noise.RULE` in Python's own integers: -ln(-ln u), where u is the middle of one of 2^52 equal parts of (0, 1)."""
    at_step = _splitmix64(key + step * _GAMMA)
    bits = _splitmix64(at_step + (token + 1) * _GAMMA) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def gumbels(key: int, step: int, number: int) -> Float[np.ndarray, " V"]:
    """`gumbel` of the first tokens, in numpy's unsigned integers, which wrap around as the rule has it."""
    with np.errstate(over="ignore"):
        at_step = np.uint64(_splitmix64(key + step * _GAMMA))
        z = at_step + np.arange(1, number + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return -np.log(-np.log(((z >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52))


_GAMMA = 0x9E3779B97F4A7C15


def _splitmix64(z: int) -> int:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014), modulo 2^64."""
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def attention_rows(lm: LM, token_ids: Sequence[int], at: int) -> Float[np.ndarray, "L H S"]:
    """Every head's attention row of one token, out of the full maps that Hugging Face returns."""
    with torch.inference_mode(), eager(lm):
        maps = lm.model(input_ids=_row(lm, token_ids), use_cache=False, output_attentions=True).attentions
    return np.stack([m[0, :, at, : at + 1].double().cpu().numpy() for m in maps])


@torch.inference_mode()
def layers(lm: LM, probe: Probe, at: int, emitted: int) -> dict[str, np.ndarray]:
    """Lens, decomposition, residual norms and neurons of one token, a layer at a time, from one eager forward with
    every output recorded."""
    a = lm.anatomy
    parts: dict[str, nn.Module] = {f"block {n}": block for n, block in enumerate(a.blocks)}
    parts |= {f"attention {n}": module for n, module in enumerate(a.attention_out)}
    entered: list[Tensor] = []
    neurons: dict[int, Tensor] = {}
    handles = [
        a.blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]

    def keep(n: int) -> Callable[[nn.Module, tuple], None]:
        return lambda _module, args: neurons.update({n: args[0]})

    handles += [module.register_forward_pre_hook(keep(n)) for n, module in enumerate(a.neurons or ())]
    try:
        with eager(lm), record_outputs(parts) as outputs:
            final = lm.model(input_ids=_row(lm, probe.tokens), use_cache=False).logits[0, at]
    finally:
        for handle in handles:
            handle.remove()
    final = final.to(torch.promote_types(final.dtype, torch.float32)).log_softmax(-1).double()
    targets = torch.tensor(probe.targets, device=lm.device, dtype=torch.long)

    def lens(resid: Tensor) -> Tensor:
        return lm.logits(a.final_norm(resid[None, None]))[0, 0].log_softmax(-1).double()

    found: dict[str, list[Any]] = {}
    before = entered[0]
    log_p = lens(before[0, at])
    for n in range(len(a.blocks)):
        after = outputs[f"block {n}"]
        middle = before[0, at] + a.multiplier * outputs[f"attention {n}"][0, at]
        log_p_before, log_p = log_p, lens(after[0, at])
        for name, value in {
            "p_in": log_p_before[targets].exp().sum(),
            "p_attn": lens(middle)[targets].exp().sum(),
            "p_out": log_p[targets].exp().sum(),
            "p_emitted": log_p[emitted].exp(),
            "entropy": -(log_p.exp() * log_p).sum(),
            "kl_final": (final.exp() * (final - log_p)).sum(),
        }.items():
            found.setdefault(name, []).append(float(value))
        found.setdefault("resid_norm", []).append(after[0].double().norm(dim=-1).cpu().numpy())
        if a.neurons is not None:
            values = neurons[n][0, at].double().cpu().numpy()
            found.setdefault("neurons", []).append(values)
        before = after
    return {name: np.array(values) for name, values in found.items()}


@dataclass
class Before:
    """What all patches of a pair go on from: computed once, copied by each of them, written to by none."""

    target: DynamicCache
    """The target's text up to its last token."""
    parts: Mapping[tuple[str, int], Float[Tensor, " D"]]
    """The source's activation at its last token, by (`resid`, `attn` or `mlp`; layer)."""
    moved: dict[int, DynamicCache] = field(default_factory=dict)
    """The source's whole text, by the number of places it was moved; filled as patches ask for it."""


@torch.inference_mode()
def before(lm: LM, pair: Pair) -> Before:
    """One forward of the target without its last token, one of the source with every part's output recorded."""
    a, target = lm.anatomy, DynamicCache()
    parts = {"resid": a.blocks, "attn": a.attention_out, "mlp": a.mlp_out}
    modules = {f"{name} {n}": module for name, part in parts.items() for n, module in enumerate(part)}
    with eager(lm), record_outputs(modules) as outputs:
        lm.model(input_ids=_row(lm, pair.source), use_cache=False)
        found = {
            (name, n): outputs[f"{name} {n}"][0, -1].clone() for name, part in parts.items() for n in range(len(part))
        }
    with eager(lm):
        lm.model(input_ids=_row(lm, pair.target[:-1]), past_key_values=target, use_cache=True)
    return Before(target, found)


@torch.inference_mode()
def patched(
    lm: LM,
    pair: Pair,
    patch: str,
    layer: int,
    sequences: Sequence[Sequence[int]],
    sampling: Sampling,
    start: Before | None = None,
) -> tuple[Float[np.ndarray, " N"], Completion]:
    """ln P of each sequence and the greedy completion with one patch at one layer ('' for none), by Hugging Face's own
    caches: each forward gets a copy of the cache it goes on from. `start`: `before` of the same pair, where it is there."""
    start = start or before(lm, pair)
    cache = copy.deepcopy(start.target)
    with eager(lm):
        if patch.startswith("kv_"):
            _copy_keys(lm, pair, patch, layer, start, cache)
        with _patched_forward(lm, pair, patch, layer, start):
            logits = lm.model(
                input_ids=_row(lm, pair.target[-1:]),
                past_key_values=cache,
                use_cache=True,
                attention_mask=torch.ones(1, len(pair.target), dtype=torch.long, device=lm.device),
            ).logits[0, -1]
        logprobs = []
        for sequence in sequences:
            own, after, log_p = copy.deepcopy(cache) if len(sequence) > 1 else cache, logits, 0.0
            for n, token in enumerate(sequence):
                log_p += float(after.to(torch.promote_types(after.dtype, torch.float32)).log_softmax(-1)[token])
                if n + 1 < len(sequence):
                    after = lm.model(input_ids=_row(lm, [token]), past_key_values=own, use_cache=True).logits[0, -1]
            logprobs.append(log_p)
        done = Completion()
        for step in range(sampling.max_new_tokens):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best, token = wide.topk(2).values, int(wide.argmax())
            logprob, margin = float(wide.log_softmax(-1)[token]), float(best[0] - best[1])
            if _take(done, token, logprob, margin, lm, sampling) or step + 1 == sampling.max_new_tokens:
                break
            logits = lm.model(input_ids=_row(lm, [token]), past_key_values=cache, use_cache=True).logits[0, -1]
    return np.array(logprobs), done


def _copy_keys(lm: LM, pair: Pair, patch: str, layer: int, start: Before, cache: DynamicCache) -> None:
    """Token by token, from the source text moved so that the token stands where it is going to be read."""
    move = pair.question if patch == "kv_question" else pair.instruction
    assert move is not None, f"{patch} needs its span"
    shift = move.shift if lm.anatomy.is_relative else 0
    if shift not in start.moved:
        start.moved[shift] = DynamicCache()
        positions = torch.arange(len(pair.source), device=lm.device)[None] + shift
        lm.model(
            input_ids=_row(lm, pair.source), position_ids=positions, past_key_values=start.moved[shift], use_cache=True
        )
    source = start.moved[shift]
    for n in range(move.length):
        for kind in ("keys", "values"):
            value = getattr(source.layers[layer], kind)[0, :, move.start + n]
            getattr(cache.layers[layer], kind)[0, :, move.to + n] = value


@contextmanager
def _patched_forward(lm: LM, pair: Pair, patch: str, layer: int, start: Before) -> Iterator[None]:
    """The one forward of the target's last token in which activations are replaced, or attention is blocked."""
    a = lm.anatomy
    handles = []
    if patch in ("resid", "attn", "mlp"):
        module = {"resid": a.blocks, "attn": a.attention_out, "mlp": a.mlp_out}[patch][layer]
        value = start.parts[patch, layer]

        def replace(_module: nn.Module, _args: object, output: object) -> object:
            tensor = first_tensor(output)
            assert tensor is not None, "a block's part must give a tensor"
            changed = tensor.clone()
            changed[0, -1] = value
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(module.register_forward_hook(replace))
    elif patch == "knockout_instruction":
        assert pair.prohibition is not None, "a knockout needs its span"
        first, end = pair.prohibition
        module = next(
            m for m in a.blocks[layer].modules() if getattr(m, "layer_idx", None) == layer and m is not a.blocks[layer]
        )

        def block(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone()
            mask[..., first:end] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        handles.append(module.register_forward_pre_hook(block, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(lm: LM, token_ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(token_ids)], device=lm.device)
