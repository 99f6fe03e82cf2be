"""Decoding: each distinct prompt is prefilled once, its cache forked for its completions, finished rows leave the batch.

Nothing comes from a checkpoint's generation_config. Sampled tokens are Gumbel-max draws with noise keyed by the
completion (see `noise`), so a completion does not depend on its batch. Several models may decode one text together:
each keeps its own cache and `combine` makes one set of logits of theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from harness.errors import ItemFailed
from harness.models.attend import Layout
from harness.models.load import LM
from harness.models.noise import gumbel

Combine = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(logits [R, V] of each model, index [R] of each row's request) -> the logits [R, V] to decode from."""

_NUCLEUS_GUESS = 128
"""Tokens looked at before a full sort: most nuclei are smaller, and a vocabulary is a thousand times larger."""


@dataclass(frozen=True)
class Request:
    """One completion to make. `key` (see `noise.row_key`) decides its draws; greedy decoding does not use it."""

    context: tuple[int, ...]
    key: int = 0


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; `top_p` 1 keeps the whole vocabulary."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop_at_newline: bool = True


@dataclass
class Completion:
    """The tokens of one completion, the one that ended it included.

    Per token: its log-probability under the model's own distribution (temperature 1, no top-p), and the lead of the
    most over the second most probable token, in nats. `finish_reason` is `stop`, `newline` or `length`.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class _Rows:
    """The rows still decoding: which request each is, and each model's cache, forked for them."""

    request: Int[Tensor, " R"]
    lengths: Int[Tensor, " R"]
    keys: Int[Tensor, " R"]
    caches: list[DynamicCache]
    logits: tuple[Float[Tensor, "R V"], ...]

    def keep(self, index: Int[Tensor, " K"]) -> None:
        self.request, self.lengths, self.keys = self.request[index], self.lengths[index], self.keys[index]
        for cache in self.caches:
            cache.batch_select_indices(index)


@torch.inference_mode()
def decode(
    lms: Sequence[LM], requests: Sequence[Request], sampling: Sampling, combine: Combine | None = None
) -> list[Completion | ItemFailed]:
    """A completion for every request, in order. A row with logits that are not finite comes back as ItemFailed.

    With several models, `combine` is needed and all must share one vocabulary and device.
    """
    assert lms, "at least one model"
    assert len(lms) == 1 or combine is not None, "several models need a function that combines their logits"
    lm, total = lms[0], len(requests)
    results: list[Completion | ItemFailed] = [Completion() for _ in requests]
    for i, request in enumerate(requests):
        reach = len(request.context) + sampling.max_new_tokens
        limit = min(m.max_positions for m in lms)
        if not request.context or reach > limit:
            results[i] = ItemFailed(f"needs {reach} positions of 1..{limit}, with at least one token of context")
    live = [i for i in range(total) if isinstance(results[i], Completion)]
    if not live:
        return results
    rows, width = _prefill(lms, requests, live)
    newline = torch.from_numpy(lm.vocabulary.has_newline).to(lm.device)
    for step in range(sampling.max_new_tokens):
        logits = rows.logits[0] if combine is None else combine(rows.logits, rows.request)
        finite = logits.isfinite().all(-1)
        token, logprob, margin = _choose(logits, rows.keys, step, sampling)
        ended = _record(results, rows.request, token, logprob, margin, finite, newline, lm, sampling)
        keep = (~ended).nonzero()[:, 0]
        if step + 1 == sampling.max_new_tokens or not len(keep):
            break
        if len(keep) < len(ended):
            rows.keep(keep)
        rows.logits = _forward(lms, rows, token[keep], step, width)
    return results


def _prefill(lms: Sequence[LM], requests: Sequence[Request], live: list[int]) -> tuple[_Rows, int]:
    """Every distinct context forwarded once, right-padded; its cache and last logits copied to each of its rows.

    Causality keeps real tokens from looking at the padding behind them; later tokens are masked from it.
    """
    device = lms[0].device
    unique = {c: u for u, c in enumerate(dict.fromkeys(requests[i].context for i in live))}
    lengths = torch.tensor([len(c) for c in unique], device=device)
    width = int(lengths.max())
    tokens = torch.tensor([[*c, *[0] * (width - len(c))] for c in unique], device=device)
    positions = torch.arange(width, device=device).expand(len(unique), width)
    of_row = torch.tensor([unique[requests[i].context] for i in live], device=device)
    caches, logits = [], []
    for lm in lms:
        cache = lm.new_cache()
        hidden = lm.hidden(tokens, Layout(positions, positions), cache)
        last = lm.logits(hidden[torch.arange(len(unique), device=device), lengths - 1])
        if len(unique) < len(live):
            cache.batch_select_indices(of_row)
            last = last[of_row]
        caches.append(cache)
        logits.append(last)
    keys = torch.tensor([requests[i].key for i in live], dtype=torch.long, device=device)
    return _Rows(torch.tensor(live, device=device), lengths[of_row], keys, caches, tuple(logits)), width


def _forward(
    lms: Sequence[LM], rows: _Rows, token: Int[Tensor, " R"], step: int, width: int
) -> tuple[Float[Tensor, "R V"], ...]:
    """Each model's next logits after appending `token` as completion token number `step`."""
    device = token.device
    slots = torch.arange(width + step + 1, device=device)
    prompt = slots[None, :] < rows.lengths[:, None]
    generated = (slots >= width)[None, :]
    k_positions = torch.where(generated, rows.lengths[:, None] + slots[None, :] - width, slots[None, :])
    layout = Layout((rows.lengths + step)[:, None], k_positions, (prompt | generated)[:, None, :])
    return tuple(
        lm.logits(lm.hidden(token[:, None], layout, cache)[:, 0]) for lm, cache in zip(lms, rows.caches, strict=True)
    )


def _choose(
    logits: Float[Tensor, "R V"], keys: Int[Tensor, " R"], step: int, sampling: Sampling
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """The next token of each row, its log-probability and the margin of the first over the second."""
    normaliser = logits.logsumexp(-1)
    best, best_ids = logits.topk(2, dim=-1)
    token = best_ids[:, 0] if sampling.temperature == 0 else sample(logits, keys, step, sampling)
    logprob = logits.gather(1, token[:, None])[:, 0] - normaliser
    return token, logprob, best[:, 0] - best[:, 1]


def sample(logits: Float[Tensor, "R V"], keys: Int[Tensor, " R"], step: int, sampling: Sampling) -> Int[Tensor, " R"]:
    """One draw a row from softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p`.

    The token that crosses the threshold is kept (Holtzman et al. 2020).
    """
    scaled = logits / sampling.temperature
    if sampling.top_p >= 1:
        ids = torch.arange(scaled.shape[1], device=scaled.device).expand_as(scaled)
        return (scaled.double() + gumbel(keys, step, ids)).argmax(-1)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(min(_NUCLEUS_GUESS, scaled.shape[1]), dim=-1)
    if bool(((values - normaliser).exp().sum(-1) < sampling.top_p).any()):
        values, ids = scaled.sort(dim=-1, descending=True)
    probs = (values - normaliser).double().exp()
    kept = probs.cumsum(-1) - probs < sampling.top_p
    noisy = (values.double() + gumbel(keys, step, ids)).masked_fill(~kept, float("-inf"))
    return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]


def _record(
    results: list[Completion | ItemFailed], request: Int[Tensor, " R"], token: Int[Tensor, " R"],
    logprob: Float[Tensor, " R"], margin: Float[Tensor, " R"], finite: Bool[Tensor, " R"],
    newline: Bool[Tensor, " V"], lm: LM, sampling: Sampling,
) -> Bool[Tensor, " R"]:  # fmt: skip
    """Append this step's tokens to their completions; true for the rows that are over. One transfer to the host."""
    lines = newline[token]
    columns = torch.stack([request, token, lines.long(), finite.long()]).cpu().tolist()
    numbers = torch.stack([logprob, margin]).double().cpu().tolist()
    ended = []
    for i, token_id, is_line, is_finite, lp, lead in zip(*columns, *numbers, strict=True):
        if not is_finite:
            results[i] = ItemFailed("the model's logits are not finite (NaN or infinity); try a wider model.dtype")
            ended.append(True)
            continue
        done = results[i]
        assert isinstance(done, Completion)
        done.token_ids.append(token_id)
        done.logprobs.append(lp)
        done.margins.append(lead)
        if token_id in lm.vocabulary.stop_ids:
            done.finish_reason = "stop"
        elif is_line and sampling.stop_at_newline:
            done.finish_reason = "newline"
        ended.append(done.finish_reason != "length")
    return torch.tensor(ended, device=token.device)
