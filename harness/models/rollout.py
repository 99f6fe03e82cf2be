"""Long completions of many arms: rows that part when their texts part.

Every distinct live text is a row of the cache, however many completions are at it: the samples of a prompt begin as one row,
and the arms of a sample, which share its noise, stay one row until amplification changes a choice. Where texts part the row
is copied. So a prompt is prefilled once a model, no row is a key for another (in `decode`'s trees every node of a prompt is,
which short completions do not feel and long ones do), and completions may join between steps and leave when they end.

Two models read every text together, each with a cache of its own; what is drawn follows from both (see `amplify`). The noise
belongs to the completion, so a text does not depend on its company.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness import tally
from harness.errors import NOT_FINITE, ItemFailed, NotFinite
from harness.models.amplify import amplified, arm_log_probs, floored, log_probs, normalised
from harness.models.attend import GridCache, Layout, right_padded
from harness.models.decode import Sampling, sample
from harness.models.load import LM
from harness.models.noise import gumbel

_TABLE = 2**25
"""Numbers of the arms' tables that stand in memory at once: 128 MB of float32."""
_SLACK = 64
"""Empty slots of a row that are not worth moving a cache for."""


@dataclass(frozen=True)
class Pair:
    """Two models whose ids mean the same up to `num_common`; one of them may be left out where no arm needs it."""

    after: LM | None
    before: LM | None
    num_common: int

    def __post_init__(self) -> None:
        assert self.lms, "at least one model"

    @property
    def lms(self) -> tuple[LM, ...]:
        return tuple(lm for lm in (self.after, self.before) if lm is not None)

    @property
    def max_positions(self) -> int:
        return min(lm.max_positions for lm in self.lms)

    @property
    def device(self) -> torch.device:
        return self.lms[0].device

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: the same in both."""
        return self.lms[0].vocabulary.stop_ids


@dataclass(frozen=True)
class Ask:
    """One completion to make: of which text, with which noise (see `noise.row_key`), under which arm, how long."""

    context: tuple[int, ...]
    key: int
    alpha: float
    max_new_tokens: int


@dataclass(frozen=True)
class Rule:
    """How tokens are drawn from an arm, in this order: what the model after finds implausible is cut (`floor` β, 0 is off),
    temperature (0 is greedy), `top_p` (1 is off). `stop_at_end`: whether the models' own end of text ends a completion."""

    temperature: float = 1.0
    top_p: float = 1.0
    floor: float = 0.0
    stop_at_end: bool = True


@dataclass
class Rollout:
    """The tokens of one completion, the one that ended it included, and of each token, in nats: its log-probability under
    the model after, the model before, and its arm, each under its own full distribution; the lead of the arm's most probable
    token over the second; and the share of the arm's probability that floor and top-p left out (temperature applied).

    A log-probability is NaN under a model that was not run. `finish_reason` is `stop` or `length`. `arm_steps` [T, K]: the
    token's log-probability under each of the decoder's arms.
    """

    token_ids: list[int] = field(default_factory=list)
    logp_after: list[float] = field(default_factory=list)
    logp_before: list[float] = field(default_factory=list)
    logp_arm: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    mass_removed: list[float] = field(default_factory=list)
    arm_steps: list[list[float]] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def arm_logps(self) -> Float[np.ndarray, " K"]:
        """Log-probability of the whole text under each of the decoder's arms."""
        return np.array(self.arm_steps, dtype=np.float64).sum(axis=0) if self.arm_steps else np.zeros(0)


@dataclass
class _Live:
    ask: Ask
    done: Rollout
    row: int


class Decoder:
    """Completions that are being written. They join by `add`, grow a token by each `step`, and leave when they end or by
    `drop`. Numbers of completions are handed out by `add` and never used twice."""

    def __init__(self, pair: Pair, rule: Rule, arms: Sequence[float] = ()):
        """`arms`: those under which every text is to be scored; both models are needed for that."""
        assert not arms or len(pair.lms) == 2, "texts are scored under arms by two models"
        assert not rule.floor or pair.after is not None, "the floor is what the model after finds plausible"
        self.pair, self.rule, self.arms = pair, rule, tuple(map(float, arms))
        self._live: dict[int, _Live] = {}
        self._failed: dict[int, ItemFailed] = {}
        self._num_asked = 0
        self._rows: _Rows | None = None

    def __len__(self) -> int:
        """Completions that are not told of yet."""
        return len(self._live) + len(self._failed)

    @torch.inference_mode()
    def add(self, asks: Sequence[Ask]) -> list[int]:
        """Begin completions; the number of each. Every distinct context is forwarded once, whatever asks for it.

        One that does not fit, or whose context the models give no finite numbers for, is told of by the next `step`.
        """
        numbers = list(range(self._num_asked, self._num_asked + len(asks)))
        self._num_asked += len(asks)
        fitting = []
        for number, ask in zip(numbers, asks, strict=True):
            if why := self._refusal(ask):
                self._failed[number] = ItemFailed(why)
            else:
                fitting.append((number, ask))
        if fitting:
            contexts = list(dict.fromkeys(ask.context for _, ask in fitting))
            new = _Rows.prefilled(self.pair, contexts)
            first = 0 if self._rows is None else len(self._rows)
            self._rows = new if self._rows is None else self._rows.joined(new)
            row_of = {context: first + n for n, context in enumerate(contexts)}
            for number, ask in fitting:
                self._live[number] = _Live(ask, Rollout(), row_of[ask.context])
        return numbers

    def _refusal(self, ask: Ask) -> str:
        most = self.pair.max_positions - ask.max_new_tokens
        if not 1 <= len(ask.context) <= most:
            return f"needs 1 to {most} tokens of context, has {len(ask.context)}"
        needs = [("after", ask.alpha != -1, self.pair.after), ("before", ask.alpha != 0, self.pair.before)]
        missing = [name for name, is_needed, lm in needs if is_needed and lm is None]
        assert not missing, f"α = {ask.alpha} without the model {missing[0]}"
        assert ask.max_new_tokens > 0, "a completion of no tokens"
        return ""

    @torch.inference_mode()
    def step(self) -> dict[int, Rollout | ItemFailed]:
        """A token for every completion; those that ended, by number."""
        ended: dict[int, Rollout | ItemFailed] = dict(self._failed)
        self._failed = {}
        if self._rows is None or not self._live:
            return ended
        going: list[tuple[_Live, int]] = []
        drawn = self._draw(self._rows, list(self._live.values()))
        for (number, live), (token, is_finite, *numbers) in zip(list(self._live.items()), drawn, strict=True):
            if not is_finite:
                ended[number] = NotFinite(NOT_FINITE)
            elif self._take(live, int(token), numbers):
                going.append((live, int(token)))
                continue
            else:
                ended[number] = live.done
            del self._live[number]
        self._grow(going)
        return ended

    def written(self, number: int) -> Rollout:
        """What there is of a completion that goes on; it grows with each `step`, and is not to be changed."""
        return self._live[number].done

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget completions; their rows leave with the next step."""
        for number in numbers:
            self._live.pop(number, None)
            self._failed.pop(number, None)
        if not self._live:
            self._rows = None

    def _take(self, live: _Live, token: int, numbers: Sequence[float]) -> bool:
        """Write a token down; whether the completion goes on."""
        done = live.done
        after, before, arm, margin, removed, *of_arms = numbers
        done.token_ids.append(token)
        done.logp_after.append(after)
        done.logp_before.append(before)
        done.logp_arm.append(arm)
        done.margins.append(margin)
        done.mass_removed.append(removed)
        done.arm_steps.append(of_arms)
        if self.rule.stop_at_end and token in self.pair.stop_ids:
            done.finish_reason = "stop"
            return False
        return len(done.token_ids) < live.ask.max_new_tokens

    def _grow(self, going: list[tuple[_Live, int]]) -> None:
        """Forward the tokens of those that go on: a row for every distinct text."""
        if not going:
            self._rows = None
            return
        assert self._rows is not None
        row_of: dict[tuple[int, int], int] = {}
        for live, token in going:
            live.row = row_of.setdefault((live.row, token), len(row_of))
        parents, tokens = zip(*row_of, strict=True)
        self._rows.grow(parents, tokens)

    def _draw(self, rows: "_Rows", live: Sequence[_Live]) -> list[list[float]]:
        """For each completion its token, whether all was finite, and what `_take` writes down. One transfer to the host."""
        device = self.pair.device
        # What depends on text and arm alone is computed once for all that share them.
        node_of: dict[tuple[int, float], int] = {}
        nodes = [node_of.setdefault((one.row, one.ask.alpha), len(node_of)) for one in live]
        at = torch.tensor([row for row, _ in node_of], device=device)
        alpha = torch.tensor([a for _, a in node_of], dtype=torch.float64, device=device)
        size = max(1, _TABLE // rows.width_of_tables)
        parts = []
        order = sorted(range(len(live)), key=nodes.__getitem__)
        for begin in range(0, len(node_of), size):
            mine = [n for n in order if begin <= nodes[n] < begin + size]
            within = torch.tensor([nodes[n] - begin for n in mine], device=device)
            some = slice(begin, begin + size)
            parts.append(self._draw_some(rows, at[some], alpha[some], within, [live[n] for n in mine]))
        found = torch.cat(parts)[torch.tensor(np.argsort(order), device=device)]
        return found.cpu().tolist()

    def _draw_some(
        self,
        rows: "_Rows",
        at: Int[Tensor, " N"],
        alpha: Float[Tensor, " N"],
        node: Int[Tensor, " L"],
        live: Sequence[_Live],
    ) -> Float[Tensor, "L C"]:
        """As `_draw`, for the completions `live`, which are at `node` of these texts `at` and arms."""
        after, before = (None if table is None else table[at] for table in (rows.after, rows.before))
        z = amplified(after, before, alpha)
        own = normalised(z, alpha)
        cut, removed = self._cut(z, after)
        keys, steps = (
            torch.tensor(values, dtype=torch.long, device=z.device)
            for values in ([one.ask.key for one in live], [len(one.done.token_ids) for one in live])
        )
        held = torch.ones(len(z), dtype=torch.float64, device=z.device)
        token = self._chosen(cut, keys, steps, node, held)
        best = own.topk(2, dim=-1).values
        picked = [
            torch.full((len(live),), torch.nan, dtype=torch.float64, device=z.device)
            if table is None
            else table[node, token].double()
            for table in (after, before)
        ]
        is_finite = torch.stack([~x.isnan().any(-1) for x in (after, before) if x is not None]).all(0)
        columns = [
            token.double(),
            is_finite[node].double(),
            *picked,
            own[node, token].double(),
            (best[:, 0] - best[:, 1]).double()[node],
            (1 - (1 - removed) * held).clamp(min=0)[node],
        ]
        found = torch.stack(columns, -1)
        if not self.arms:
            return found
        assert rows.after is not None
        assert rows.before is not None
        return torch.cat([found, self._under_arms(rows, at[node], token)], -1)

    def _under_arms(self, rows: "_Rows", at: Int[Tensor, " L"], token: Int[Tensor, " L"]) -> Float[Tensor, "L K"]:
        """The tokens' log-probabilities under every arm. The sums over the vocabulary are made once a text."""
        texts, place = at.unique(return_inverse=True)
        # Completions of a text side by side, as many columns as the text with the most has.
        order = place.argsort(stable=True)
        counts = place.bincount(minlength=len(texts))
        column = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[place[order]]
        tokens = torch.zeros(len(texts), int(counts.max()), dtype=torch.long, device=at.device)
        tokens[place[order], column] = token[order]
        found = arm_log_probs(rows.after[texts], rows.before[texts], tokens, self.arms)  # type: ignore[index]
        back = torch.empty_like(column)
        back[order] = column
        return found[place, back]

    def _cut(
        self, z: Float[Tensor, "N V"], after: Float[Tensor, "N V"] | None
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
        """`z` without what the floor rules out, and how much of its probability that is (temperature applied)."""
        if not self.rule.floor or after is None:
            return z, torch.zeros(len(z), dtype=torch.float64, device=z.device)
        cut, stays = floored(z, after, self.rule.floor)
        p = (z / (self.rule.temperature or 1.0)).double().softmax(-1)
        return cut, p.masked_fill(stays, 0).sum(-1)

    def _chosen(
        self,
        cut: Float[Tensor, "N V"],
        keys: Int[Tensor, " L"],
        steps: Int[Tensor, " L"],
        node: Int[Tensor, " L"],
        held: Float[Tensor, " N"],
    ) -> Int[Tensor, " L"]:
        rule = self.rule
        if rule.temperature == 0:
            return cut.argmax(-1)[node]
        if rule.top_p < 1:
            return sample(cut, keys, steps, Sampling(0, rule.temperature, rule.top_p), node, held)
        # The arms of a sample share its noise, which costs more than the rest of the draw.
        noise_of: dict[tuple[int, int], int] = {}
        asked = zip(keys.tolist(), steps.tolist(), strict=True)
        which = torch.tensor([noise_of.setdefault(one, len(noise_of)) for one in asked], device=cut.device)
        distinct = torch.tensor(list(noise_of), dtype=torch.long, device=cut.device)
        ids = torch.arange(cut.shape[1], device=cut.device).expand(len(distinct), -1)
        noise = gumbel(distinct[:, 0], distinct[:, 1], ids)
        scaled = cut if rule.temperature == 1 else cut / rule.temperature
        size = max(1, _TABLE // 2 // cut.shape[1])
        parts = zip(node.split(size), which.split(size), strict=True)
        return torch.cat([(scaled[n].double() + noise[w]).argmax(-1) for n, w in parts])


class _Rows:
    """Distinct texts: a row of each model's cache, and what the models say next.

    The slots of a row that hold no token of its text are empty: they are never looked at, and hold zeros.
    """

    def __init__(
        self,
        pair: Pair,
        caches: Sequence[GridCache],
        is_filled: Bool[np.ndarray, "R S"],
        positions: Int[np.ndarray, "R S"],
        lengths: Int[np.ndarray, " R"],
        tables: Sequence[Float[Tensor, "R V"]],
    ):
        self.pair, self.caches = pair, list(caches)
        self._is_filled, self._positions, self._lengths = is_filled, positions, lengths
        self._tables = list(tables)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def after(self) -> Float[Tensor, "R V"] | None:
        """ln p of the next token by the model after."""
        return self._tables[0] if self.pair.after is not None else None

    @property
    def before(self) -> Float[Tensor, "R V"] | None:
        return self._tables[-1] if self.pair.before is not None else None

    @property
    def width_of_tables(self) -> int:
        return self._tables[0].shape[1]

    @classmethod
    def prefilled(cls, pair: Pair, contexts: Sequence[tuple[int, ...]]) -> "_Rows":
        """Rows of these texts. A beginning that they have in common is computed once."""
        lengths = np.array([len(c) for c in contexts])
        tokens, layout = right_padded(contexts, pair.device)
        is_filled = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
        last = torch.from_numpy(lengths - 1).to(pair.device)
        caches, tables = [], []
        with tally.prefilling():
            for lm in pair.lms:
                cache = lm.new_cache()
                hidden = lm.hidden(tokens, layout, cache)
                tables.append(log_probs(lm.logits(hidden[torch.arange(len(contexts)), last]), pair.num_common))
                caches.append(cache)
        positions = np.broadcast_to(np.arange(tokens.shape[1]), is_filled.shape).copy()
        rows = cls(pair, caches, is_filled, positions, lengths, tables)
        rows._clear_empty_slots()
        bad = sorted({int(r) for table in tables for r in table.isnan().any(-1).nonzero()[:, 0]})
        if bad and len(contexts) > 1:
            # What stands behind a short text is masked, and a masked NaN is still one (0 × NaN): each has another try alone.
            good = [n for n in range(len(contexts)) if n not in bad]
            alone = [cls.prefilled(pair, [contexts[n]]) for n in bad]
            rows._select(good)
            for one in alone:
                rows = rows.joined(one)
            rows._select(np.argsort([*good, *bad]).tolist())
        return rows

    def joined(self, other: "_Rows") -> "_Rows":
        """These rows, then those of `other`; the narrower ones get empty slots."""
        width = max(self._is_filled.shape[1], other._is_filled.shape[1])
        for rows in (self, other):
            rows._widen(width)
        for cache, new in zip(self.caches, other.caches, strict=True):
            cache.join(new)
        return _Rows(
            self.pair,
            self.caches,
            np.concatenate([self._is_filled, other._is_filled]),
            np.concatenate([self._positions, other._positions]),
            np.concatenate([self._lengths, other._lengths]),
            [torch.cat(both) for both in zip(self._tables, other._tables, strict=True)],
        )

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Row n becomes the text of row `parents[n]` with `tokens[n]` behind it; rows that nobody goes on from leave."""
        self._select(parents)
        self._compact()
        num, device = len(self), self.pair.device
        is_new = np.ones((num, 1), dtype=bool)
        self._is_filled = np.concatenate([self._is_filled, is_new], axis=1)
        self._positions = np.concatenate([self._positions, self._lengths[:, None]], axis=1)
        at = torch.from_numpy(self._positions).to(device)
        layout = Layout(at[:, -1:], at, torch.from_numpy(self._is_filled[:, None]).to(device))
        ids = torch.tensor(tokens, dtype=torch.long, device=device)[:, None]
        self._lengths = self._lengths + 1
        self._tables = [
            log_probs(lm.logits(lm.hidden(ids, layout, cache)[:, 0]), self.pair.num_common)
            for lm, cache in zip(self.pair.lms, self.caches, strict=True)
        ]

    def _select(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self))):
            return
        kept = np.asarray(rows, dtype=np.int64)
        self._is_filled, self._positions, self._lengths = (
            x[kept] for x in (self._is_filled, self._positions, self._lengths)
        )
        index = torch.from_numpy(kept).to(self.pair.device)
        for cache in self.caches:
            cache.batch_select_indices(index)
        self._tables = [table[index] for table in self._tables]

    def _compact(self) -> None:
        """Close the gaps that texts of other lengths left, once they are worth it."""
        width, most = self._is_filled.shape[1], int(self._is_filled.sum(1).max())
        if width - most < max(_SLACK, most // 4):
            return
        order = np.argsort(~self._is_filled, axis=1, kind="stable")[:, :most]
        self._is_filled = np.take_along_axis(self._is_filled, order, axis=1)
        self._positions = np.take_along_axis(self._positions, order, axis=1)
        index = torch.from_numpy(order).to(self.pair.device)[:, None, :, None]
        for cache in self.caches:
            cache.change(lambda x: x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])))

    def _widen(self, width: int) -> None:
        empty = width - self._is_filled.shape[1]
        if not empty:
            return
        self._is_filled = np.pad(self._is_filled, ((0, 0), (0, empty)))
        self._positions = np.pad(self._positions, ((0, 0), (0, empty)))
        for cache in self.caches:
            cache.change(lambda x: torch.nn.functional.pad(x, (0, 0, 0, empty)))

    def _clear_empty_slots(self) -> None:
        if self._is_filled.all():
            return
        filled = torch.from_numpy(self._is_filled).to(self.pair.device)[:, None, :, None]
        for cache in self.caches:
            cache.change(lambda x: x.masked_fill(~filled, 0))


def in_parts(asks: Sequence[Ask], num_contexts: int) -> Iterator[list[int]]:
    """Places of the asks of so many contexts at a time, in the order of each context's first ask. Who makes rollouts in the same
    parts gets the same numbers to the last bit, wherever they are made."""
    of_context: dict[tuple[int, ...], list[int]] = {}
    for n, ask in enumerate(asks):
        of_context.setdefault(ask.context, []).append(n)
    contexts = list(of_context)
    for begin in range(0, len(contexts), num_contexts):
        yield sorted(n for context in contexts[begin : begin + num_contexts] for n in of_context[context])


def rollouts(pair: Pair, asks: Sequence[Ask], rule: Rule, arms: Sequence[float] = ()) -> list[Rollout | ItemFailed]:
    """A completion for every ask, in order."""
    decoder = Decoder(pair, rule, arms)
    place = {number: n for n, number in enumerate(decoder.add(asks))}
    results: list[Rollout | ItemFailed | None] = [None] * len(asks)
    while len(decoder):
        for number, done in decoder.step().items():
            results[place[number]] = done
    return [done for done in results if done is not None]
