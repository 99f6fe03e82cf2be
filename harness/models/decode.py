"""Decoding: each distinct text is forwarded once, however many completions share it.

The completions of a batch form a tree per prompt: the prompt, then a node for every distinct beginning of a completion.
Sixteen samples that open with the same word cost one forward of that word, and the prompt's cache is never copied.
Each node sees the prompt and its ancestors (the layout of `score`, grown a level a step); finished completions grow no
nodes, and a prompt whose completions are all finished leaves the batch.

Nothing comes from a checkpoint's generation_config. Sampled tokens are Gumbel-max draws with noise keyed by the
completion (see `noise`), so a completion does not depend on its batch. Several models may decode one text together:
each keeps its own cache and `combine` makes one set of logits of theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.attend import Layout, right_padded
from harness.models.cells import filled_cells
from harness.models.load import LM
from harness.models.noise import gumbel
from harness.text.words import Vocabulary

Combine = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(logits [R, V] of each model, index [R] of each row's request) -> the logits [R, V] to decode from."""

_NUCLEUS_SIZES = (128, 1_024, 8_192)
"""Tokens looked at, step by step, before a full sort, which takes as long as the model does: a nucleus has some hundred
tokens where an answer begins and one or two further on, a vocabulary a hundred thousand."""


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

    def append(self, token: int, logprob: float, margin: float, vocabulary: Vocabulary, stop_at_newline: bool) -> bool:
        """Take a token; whether the completion goes on."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.margins.append(margin)
        if token in vocabulary.stop_ids:
            self.finish_reason = "stop"
        elif stop_at_newline and vocabulary.has_newline[token]:
            self.finish_reason = "newline"
        return self.finish_reason == "length"


class _Tree:
    """The prompts still decoding, as rows of each model's cache, and the nodes that completions have grown on them."""

    def __init__(self, lms: Sequence[LM], contexts: Sequence[tuple[int, ...]], is_apart: bool = False):
        self.lms = lms
        self.lengths = np.array([len(c) for c in contexts])
        self.width = int(self.lengths.max())
        self.rows = np.arange(len(contexts))
        """Which context each row of the caches is."""
        # Causality alone keeps real tokens from the padding behind them; nodes, which stand behind it, are masked from it.
        tokens, layout = right_padded(contexts, lms[0].device, is_apart=is_apart)
        self.caches: list[DynamicCache] = []
        last = []
        with tally.prefilling():
            for lm in lms:
                cache = lm.new_cache()
                hidden = lm.hidden(tokens, layout, cache)
                last.append(lm.logits(hidden[torch.arange(len(contexts)), torch.from_numpy(self.lengths - 1)]))
                self.caches.append(cache)
        self.logits: tuple[Float[Tensor, "N V"], ...] = tuple(last)
        """Of the newest nodes (at first: of the prompts' last tokens)."""
        # A slot is a place in the cache behind the prompt, as wide in every row as the widest level needs; where a node
        # stands in its text is told by position, so slots that stay empty cost memory and shift nothing.
        self._slot_sees = np.zeros((len(contexts), 0, 0), dtype=bool)  # [row, node slot, node slot]: ancestors and self
        self._slot_positions = np.zeros((len(contexts), 0), dtype=np.int64)
        self._slot_of: dict[int, tuple[int, int]] = {}

    def grow(self, parents: Sequence[tuple[int, int]], tokens: Sequence[int], step: int) -> list[int]:
        """Append a node for every distinct (context, parent node, token); the index of each in the new `logits`.

        `parents` are (context, node index in the previous level, or -1 for the prompt). All new nodes stand at
        position context length + step.
        """
        # Two completions share a node only under one parent: then all their tokens so far are the same.
        index: dict[tuple[int, int, int], int] = {}
        node_of = [index.setdefault((c, p, t), len(index)) for (c, p), t in zip(parents, tokens, strict=True)]
        # Rows leave before nodes are given places, which count within the rows that stay.
        self._keep_rows(sorted({c for c, _, _ in index}))
        row_of = {int(c): r for r, c in enumerate(self.rows)}
        taken = [0] * len(self.rows)
        places = []
        for context, _, _ in index:
            row = row_of[context]
            places.append((row, taken[row]))
            taken[row] += 1
        rows, new, old = len(self.rows), max(taken), self._slot_positions.shape[1]
        block = np.zeros((rows, new), dtype=np.int64)
        sees = np.zeros((rows, old + new, old + new), dtype=bool)
        # Itself, and what its parent sees: its ancestors and no cousin. An empty slot is seen by nobody else.
        sees[:, :old, :old] = self._slot_sees
        sees[:, range(old, old + new), range(old, old + new)] = True
        slot_of = {}
        for (node, (_, parent, token)), (row, place) in zip(enumerate(index), places, strict=True):
            block[row, place] = token
            slot_of[node] = (row, old + place)
            if parent >= 0:
                sees[row, old + place, :old] |= self._slot_sees[row, self._slot_of[parent][1]]
        position = self.lengths[self.rows] + step
        # The slots of this level replace those of the last: a parent is always one level up.
        self._slot_sees, self._slot_of = sees, slot_of
        self._slot_positions = np.concatenate([self._slot_positions, np.repeat(position[:, None], new, axis=1)], axis=1)
        self.logits = self._forward(block, taken, [slot_of[n] for n in range(len(index))], old)
        return node_of

    def _keep_rows(self, contexts: list[int]) -> None:
        """Drop the rows of contexts that grow no more."""
        kept = np.flatnonzero(np.isin(self.rows, contexts))
        if len(kept) == len(self.rows):
            return
        self.rows = self.rows[kept]
        self._slot_sees, self._slot_positions = self._slot_sees[kept], self._slot_positions[kept]
        for lm, cache in zip(self.lms, self.caches, strict=True):
            cache.batch_select_indices(torch.from_numpy(kept).to(lm.device))
        moved = {int(old): new for new, old in enumerate(kept)}
        self._slot_of = {n: (moved[row], slot) for n, (row, slot) in self._slot_of.items() if row in moved}

    def _forward(
        self, block: np.ndarray, num_new: Sequence[int], slots: list[tuple[int, int]], old: int
    ) -> tuple[Float[Tensor, "N V"], ...]:
        device = self.lms[0].device
        rows, new = block.shape
        lengths = self.lengths[self.rows]
        # Nodes stand behind the padding of shorter prompts, so causality does not hide it from them any more.
        prompt = np.arange(self.width)[None, :] < lengths[:, None]
        allowed = np.concatenate([np.repeat(prompt[:, None, :], new, axis=1), self._slot_sees[:, old:, :]], axis=2)
        k_positions = np.concatenate([np.tile(np.arange(self.width), (rows, 1)), self._slot_positions], axis=1)
        layout = Layout(
            torch.from_numpy(k_positions[:, self.width + old :]).to(device),
            torch.from_numpy(k_positions).to(device),
            torch.from_numpy(allowed).to(device),
            cells=filled_cells(num_new, device),
        )
        tokens = torch.from_numpy(block).to(device)
        row, column = torch.tensor([(r, s - old) for r, s in slots], device=device).T
        return tuple(
            lm.logits(lm.hidden(tokens, layout, cache)[row, column])
            for lm, cache in zip(self.lms, self.caches, strict=True)
        )


@torch.inference_mode()
def decode(
    lms: Sequence[LM], requests: Sequence[Request], sampling: Sampling, combine: Combine | None = None
) -> list[Completion | ItemFailed]:
    """A completion for every request, in order. A row with logits that are not finite comes back as ItemFailed.

    With several models, `combine` is needed and all must share one vocabulary and device.
    """
    assert lms, "at least one model"
    assert len(lms) == 1 or combine is not None, "several models need a function that combines their logits"
    results = _decode(lms, requests, sampling, combine)
    # A masked NaN is still a NaN (0 × NaN), so a completion may have caught it from a neighbour on its prompt's tree.
    bad = [i for i, r in enumerate(results) if isinstance(r, NotFinite)]
    if len(bad) > 1 or (bad and len(requests) > 1):
        of_bad = torch.tensor(bad, device=lms[0].device)
        again = None if combine is None else lambda logits, index: combine(logits, of_bad[index])
        redone = _decode(lms, [requests[i] for i in bad], sampling, again, is_apart=True)
        for i, result in zip(bad, redone, strict=True):
            results[i] = result
    return results


def _decode(
    lms: Sequence[LM], requests: Sequence[Request], sampling: Sampling, combine: Combine | None, is_apart: bool = False
) -> list[Completion | ItemFailed]:
    """As `decode`; with `is_apart`, every request has a tree of its own."""
    limit = min(lm.max_positions for lm in lms)
    results: list[Completion | ItemFailed] = [
        Completion()
        if request.context and len(request.context) + sampling.max_new_tokens <= limit
        else ItemFailed(f"needs 1 to {limit - sampling.max_new_tokens} tokens of context, has {len(request.context)}")
        for request in requests
    ]
    live = [i for i, r in enumerate(results) if isinstance(r, Completion)]
    if not live:
        return results
    # A prompt is a row, once, however many completions it has; apart, the request's number gives each a row of its own.
    names = [(i if is_apart else 0, requests[i].context) for i in live]
    rows = {name: n for n, name in enumerate(dict.fromkeys(names))}
    of_context = [rows[name] for name in names]
    tree = _Tree(lms, [context for _, context in rows], is_apart)
    nodes, parents = of_context, [(c, -1) for c in of_context]
    keys = torch.tensor([requests[i].key for i in live], dtype=torch.long, device=lms[0].device)
    for step in range(sampling.max_new_tokens):
        chosen = _choose(tree.logits, nodes, live, keys, step, sampling, combine)
        going = [n for n, i in enumerate(live) if _record(results, i, *chosen[n], lms[0], sampling)]
        if step + 1 == sampling.max_new_tokens or not going:
            break  # the last tokens are not forwarded: nothing is read behind them
        # In the first step `nodes` are the prompts themselves, which are nobody's nodes.
        parents = [(parents[n][0], nodes[n] if step else -1) for n in going]
        nodes = tree.grow(parents, [chosen[n][0] for n in going], step)
        live, keys = [live[n] for n in going], keys[torch.tensor(going, device=keys.device)]
    return results


def _choose(
    logits: tuple[Float[Tensor, "N V"], ...],
    nodes: Sequence[int],
    live: Sequence[int],
    keys: Int[Tensor, " R"],
    step: int,
    sampling: Sampling,
    combine: Combine | None,
) -> list[tuple[int, float, float, bool]]:
    """For each completion its next token, that token's log-probability, the margin of first over second, finiteness.

    Everything that depends on the node alone is computed once a node. One transfer to the host.
    """
    device = keys.device
    node = torch.tensor(nodes, device=device)
    table = logits[0]
    if combine is not None:  # may weigh the models differently for each completion, so nothing is shared
        table = combine(tuple(x[node] for x in logits), torch.tensor(live, device=device))
        node = torch.arange(len(live), device=device)
    table = table.log_softmax(-1)  # everything else is read off this one pass over the vocabulary
    finite = table.sum(-1).isfinite()  # one NaN or infinity anywhere makes the sum so
    best, best_ids = table.topk(2, dim=-1)
    is_greedy = sampling.temperature == 0
    token = best_ids[node, 0] if is_greedy else sample(table, keys, step, sampling, node)
    logprob = table[node, token]
    margin = (best[:, 0] - best[:, 1])[node]
    # Float64 holds every token id exactly, so ids and numbers make one transfer.
    whole = torch.stack([token.double(), logprob.double(), margin.double(), finite[node].double()]).cpu().tolist()
    return [(int(t), lp, lead, ok > 0) for t, lp, lead, ok in zip(*whole, strict=True)]


def sample(
    logits: Float[Tensor, "N V"],
    keys: Int[Tensor, " R"],
    step: int | Int[Tensor, " R"],
    sampling: Sampling,
    node: Int[Tensor, " R"] | None = None,
    held: Float[Tensor, " N"] | None = None,
) -> Int[Tensor, " R"]:
    """One draw a key from softmax(logits[node] / temperature), cut to the smallest set of tokens that holds `top_p`.

    The token that crosses the threshold is kept (Holtzman et al. 2020). `node` None: one row of logits a key; `step` may be
    each key's own. `held`, float64, is filled with the probability of what was kept of each row of logits that is drawn from.
    """
    node = torch.arange(len(keys), device=keys.device) if node is None else node
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_p >= 1:
        ids = torch.arange(scaled.shape[1], device=scaled.device).expand(len(keys), -1)
        if held is not None:
            held.fill_(1)
        return (scaled[node].double() + gumbel(keys, step, ids)).argmax(-1)
    num_tokens = scaled.shape[1]
    normaliser = _log_sums(scaled)
    drawn = torch.zeros_like(node)
    rows = torch.arange(len(scaled), device=scaled.device)  # whose nucleus is not within what was looked at yet
    for size in (*(n for n in _NUCLEUS_SIZES if n < num_tokens), num_tokens):
        values, ids = scaled[rows].topk(size, dim=-1) if size < num_tokens else scaled[rows].sort(-1, descending=True)
        # Added up in float64: where the nucleus ends hangs on a sum over the vocabulary.
        probs = (values - normaliser[rows]).double().exp()
        before = probs.cumsum(-1) - probs
        is_whole = before[:, -1] + probs[:, -1] >= sampling.top_p
        if size == num_tokens:
            is_whole = torch.ones_like(is_whole)  # rounding may leave the whole short of 1, and NaN is short of all
        place = torch.full_like(normaliser[:, 0], -1, dtype=torch.long)
        place[rows[is_whole]] = torch.arange(len(rows), device=rows.device)[is_whole]
        mine = (place[node] >= 0).nonzero()[:, 0]
        if len(mine):
            at = place[node[mine]]
            kept = before[at] < sampling.top_p
            widest = max(1, int(kept.sum(-1).max()))  # none is kept where logits are NaN, which is told of elsewhere
            some, kept = ids[at, :widest], kept[:, :widest]
            # Noise goes by token id, not by rank, so a draw does not depend on how many tokens were looked at.
            steps = step[mine] if isinstance(step, Tensor) else step
            noisy = (values[at, :widest].double() + gumbel(keys[mine], steps, some)).masked_fill(~kept, float("-inf"))
            drawn[mine] = some.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]
        if held is not None:
            held[rows[is_whole]] = probs.masked_fill(before >= sampling.top_p, 0).sum(-1)[is_whole]
        rows = rows[~is_whole]
        if not len(rows):
            break
    return drawn


def _log_sums(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N 1"]:
    """ln Σ exp of each row, as `logsumexp`, which on a CPU makes five passes where this makes two."""
    greatest = logits.max(-1, keepdim=True)
    return greatest.values - logits.log_softmax(-1).gather(1, greatest.indices)


def _record(
    results: list[Completion | ItemFailed],
    i: int,
    token: int,
    logprob: float,
    margin: float,
    finite: bool,
    lm: LM,
    sampling: Sampling,
) -> bool:
    """Append a token to completion `i`; whether it goes on."""
    if not finite:
        results[i] = NotFinite(NOT_FINITE)
        return False
    done = results[i]
    assert isinstance(done, Completion)
    return done.append(token, logprob, margin, lm.vocabulary, sampling.stop_at_newline)
