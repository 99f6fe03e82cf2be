"""How items are cut into batches: by a budget of padded tokens, given, or measured on the first small batches of a stage,
in time and where it can be in memory; lower after running out of memory.

Pure arithmetic on lengths; stores nothing and computes nothing.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any, TypeGuard

from harness.engine.stage import Item
from harness.store import Batch

CPU_BUDGET = 8_192
"""Most padded tokens a batch where memory is not measured."""
TARGET_S = 4.0
"""Most that a batch may take, as far as the first ones tell. A budget is the largest power of two that keeps to it, so
batches take two to four seconds, and a measurement that wavers by a little cuts the same plan."""
_MOST_S = 10.0
"""Most that a batch may take which measures, or keeps items together that share work, as far as is known before it."""
CPU_PROBES = (256, 1_024)
"""Padded tokens of the two small batches that a stage's speed is measured with."""
GPU_PROBES = (2_048, 8_192)
"""The same where memory is measured with them too."""
_SAFETY = 0.85
"""Share of the measured room that is used: allocators fragment."""
_STEEP = 0.5
"""Least share of its time that a batch is taken to owe to its tokens: two batches alone tell it badly."""
_STEADY = 0.75
"""The same where it is told from, and not tried: how long a run takes."""


Timed = tuple[int | float, int | float]
"""Tokens of a batch, and the seconds it took."""


def unmeasured_cap(capacity_bytes: int | None) -> int | None:
    """Most padded tokens a batch that are known without measuring memory; None where there is memory to measure."""
    return CPU_BUDGET if capacity_bytes is None else None


@dataclass(frozen=True)
class Pace:
    """How long a batch takes: so many seconds whatever is in it, and so many a token."""

    fixed_s: float
    per_token_s: float

    @classmethod
    def fit(cls, measured: Collection[Timed]) -> "Pace | None":
        """From (tokens, seconds) of batches: a line through the smallest one and the fastest a token, since what is slow
        for once says nothing. None of none."""
        timed = _that_tell(measured)
        if not timed:
            return None
        return cls._line(min(timed), min(timed, key=lambda b: (b[1] / b[0], b[0])), _STEEP)

    @classmethod
    def typical(cls, measured: Collection[Timed]) -> "Pace | None":
        """The same through the smallest batch and the mean of the large ones: what a machine does that wavers."""
        timed = _that_tell(measured)
        large = [b for b in timed if 2 * b[0] >= max(timed)[0]]
        if not large:
            return None
        mean = (math.fsum(t for t, _ in large) / len(large), math.fsum(s for _, s in large) / len(large))
        return cls._line(min(timed), mean, _STEADY)

    @classmethod
    def _line(cls, small: Timed, large: Timed, steep: float) -> "Pace":
        rate = large[1] / large[0]
        rise = (large[1] - small[1]) / (large[0] - small[0]) if large[0] >= 1.5 * small[0] else rate
        per_token_s = min(rate, max(steep * rate, rise))
        return cls(max(0.0, large[1] - per_token_s * large[0]), per_token_s)

    def seconds(self, tokens: int | float) -> float:
        """What a batch of so many tokens takes."""
        return self.fixed_s + self.per_token_s * tokens

    def most(self, seconds: int | float) -> float:
        """Tokens that fit into so many seconds; 0 where none do."""
        return max(0.0, seconds - self.fixed_s) / self.per_token_s

    def whole(self, tokens: int | float, most_tokens: int | None = None) -> float:
        """Seconds of so many tokens, cut into batches of about the target, none of more than `most_tokens`."""
        size = _power(min(self.most(TARGET_S), most_tokens or math.inf))
        return math.ceil(tokens / size) * self.fixed_s + self.per_token_s * tokens


def _that_tell(measured: Collection[Timed]) -> list[Timed]:
    """Without batches that have no length or took no time, of which no rate can be told."""
    return [(tokens, seconds) for tokens, seconds in measured if tokens > 0 and seconds > 0]


Place = tuple[int, ...]
"""Where a batch stands in the order of a plan."""


class Plan:
    """All batches of a stage, by id, and which items they hold: read from the store once, and kept in step with it.

    With `is_loop`, an item that is tried again stands where it stood: what comes after rests on it.
    """

    def __init__(self, batches: Sequence[Batch] = (), *, is_loop: bool = False):
        self._batches: list[Batch] = []
        self._held: set[str] = set()
        self._is_loop = is_loop
        self.add(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __getitem__(self, batch_id: int) -> Batch:
        return self._batches[batch_id]

    def __contains__(self, key: object) -> bool:
        """Whether an item is in a batch already."""
        return key in self._held

    def add(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            assert batch.batch_id == len(self._batches), "ids count from 0, without a gap"
            self._batches.append(batch)
            self._held.update(batch.keys)

    def change(self, batch: Batch) -> None:
        """What became of a batch."""
        self._batches[batch.batch_id] = batch

    def place(self, batch: Batch) -> Place:
        """Where a batch stands in the order of running: halves stand where their parent stood, in a resumed run too."""
        parent = None if batch.parent is None else self._batches[batch.parent]
        if parent is None or (parent.status != "split" and not self._is_loop):
            return (batch.batch_id,)
        return (*self.place(parent), batch.batch_id)

    def in_order(self) -> list[Batch]:
        return sorted(self._batches, key=self.place)


class Budget:
    """How many padded tokens a batch may have: given, or measured on the first batches; lower after running out."""

    def __init__(
        self,
        given: int | None,
        capacity_bytes: int | None,
        plan: Plan,
        ran_out: Collection[int],
        sizes: Sequence[int] = (),
        expected_rate: float | None = None,
    ):
        """`capacity_bytes`: all the memory there is for this process, None where it is not measured. `ran_out`: ids of
        the batches of `plan` that did not fit, in an earlier life of this run. `sizes`: items a batch where the items are
        to be cut as another run cut them; ignored where they are not as many. `expected_rate`: seconds a padded token, as
        far as known before the first batch, which alone it makes smaller."""
        self._sizes = tuple(sizes)
        self._capacity = capacity_bytes
        self._probes = CPU_PROBES if capacity_bytes is None else GPU_PROBES
        self._expected_rate = expected_rate
        self.tokens = self._given = given
        self._ceilings: dict[Place, int] = {}
        for batch in plan:
            if batch.batch_id in ran_out:
                self.learn(batch, plan.place(batch))
        self.remember(plan)

    def allows(self, batch: Batch, place: Place) -> bool:
        """Whether it may be tried, by what those before it in the plan have shown.

        What a later batch has shown does not count, whichever came back first: so any number of workers splits the same
        batches as one does, but for those that are out at that moment.
        """
        if len(batch.keys) == 1:
            return True
        return all(batch.padded_tokens <= most for learned, most in self._ceilings.items() if learned <= place)

    def learn(self, batch: Batch, place: Place) -> None:
        """A batch did not fit: of those after it in the plan none larger than its larger half is tried."""
        num = len(batch.keys)
        half = math.ceil(batch.padded_tokens * ((num + 1) // 2) / num)
        if half < min((most for learned, most in self._ceilings.items() if learned <= place), default=half + 1):
            self._ceilings[place] = half

    def hear(self, capacity_bytes: int | None) -> None:
        """A worker has so much memory: where they differ, what is planned from here on fits the weakest."""
        if capacity_bytes is not None and self._capacity is not None:
            self._capacity = min(self._capacity, capacity_bytes)

    @property
    def _ceiling(self) -> int | None:
        return min(self._ceilings.values(), default=None)

    def cut(self, ordered: Sequence[Item[Any]], next_id: int, stage: str) -> Iterator[Batch]:
        """Batches of the items, which come as `ordered` gives them.

        Of items that the budget is still to be measured on, one batch: it is to be remembered before the next.
        """
        if ordered and len(ordered) == sum(self._sizes):
            for n, (end, size) in enumerate(zip(accumulate(self._sizes), self._sizes, strict=True)):
                yield batch_of(stage, next_id + n, ordered[end - size : end])
            return
        if self.tokens is None:
            left = math.fsum(i.length for i in ordered)
            probe = self._probe(left)
            if probe is not None:
                # How much memory a whole group takes is not known before the probes.
                batch = _take(ordered, 0, probe, self._most() if self._capacity is None else None)
                if batch:
                    yield batch_of(stage, next_id, batch)
                return
            self.tokens = self._measured_budget(left)
        start, most = 0, self._most()
        while start < len(ordered):
            batch = _take(ordered, start, self.tokens, most)
            start += len(batch)
            yield batch_of(stage, next_id, batch)
            next_id += 1

    def remember(self, plan: Plan) -> None:
        """Take seconds and peaks of the batches that are done as measurements; a stage that uses no GPU memory has no peaks."""
        self._num_cut = sum(b.parent is None for b in plan)
        self._measured = [b for b in plan if b.status == "done" and b.padded_tokens]

    @property
    def _pace(self) -> Pace | None:
        return Pace.fit([(b.padded_tokens, b.work_s) for b in self._measured if b.work_s])

    def _probe(self, length: float) -> int | None:
        """Padded tokens of the next batch that measures; None where enough was measured. `length`: of what is left."""
        pace, largest = self._pace, max((b.padded_tokens for b in self._measured), default=0)
        if self._num_cut < len(self._probes):
            size = self._probes[self._num_cut]
            if not self._num_cut:
                rate = self._expected_rate
                return size if rate is None else min(size, _power(_MOST_S / rate))
            if pace is None:
                return size
            # Twice as much where it can be: what every batch costs, whatever is in it, makes a small one look slow for ever.
            double = min(2 * largest, _power(pace.most(_MOST_S)))
            return min(size, max(self._by_time(pace, largest), double))
        if not self._takes_long(pace, length):
            return None
        size = self._by_time(pace, largest)
        return size if 1.5 * largest <= size < self._ceiling_of_memory() else None

    @staticmethod
    def _takes_long(pace: Pace | None, length: float) -> TypeGuard[Pace]:
        """Whether time limits what is left, `length` together: where that takes no longer than the target whole, or where
        nothing tells how long, any number of items does."""
        return pace is not None and pace.seconds(length) > TARGET_S

    @staticmethod
    def _by_time(pace: Pace, largest: int) -> int:
        """The largest power of two that takes no longer than the target: for certain, were a batch to cost nothing beside
        its tokens, or by the line as far as twice the largest that was measured."""
        certain = _power(TARGET_S / (pace.per_token_s + pace.fixed_s / max(1, largest)))
        return max(certain, min(_power(pace.most(TARGET_S)), 2 * _power(2 * largest - 1)))

    def _most(self) -> float | None:
        """Padded tokens up to which items are kept together that share work; None: not known, or a budget is given."""
        rate = self._expected_rate
        pace = self._pace or (Pace(0.0, rate) if rate else None)
        if pace is None or self._given is not None:
            return None
        return float(min(pace.most(_MOST_S), self._ceiling_of_memory(), self._ceiling or math.inf))

    def _ceiling_of_memory(self) -> int:
        return unmeasured_cap(self._capacity) or self._by_memory()

    def _measured_budget(self, length: float) -> int:
        """Padded tokens a batch for what is left of a stage, `length` together: what time allows, and memory."""
        pace, by_memory = self._pace, self._ceiling_of_memory()
        if not self._takes_long(pace, length):
            return by_memory
        return min(by_memory, self._by_time(pace, max(b.padded_tokens for b in self._measured)))

    def _by_memory(self) -> int:
        """Room over what is always there, divided by bytes per padded token: a line through the two probes.

        Never less than the largest batch that did fit.
        """
        peaks = {b.padded_tokens: b.peak_bytes for b in self._measured if b.peak_bytes}
        if not peaks:
            return CPU_BUDGET
        small, large = min(peaks), max(peaks)
        rise = peaks[large] - peaks[small]
        if large == small or rise <= 0:
            return 4 * large
        per_token = rise / (large - small)
        room = (self._capacity or 0) - (peaks[small] - per_token * small)
        return max(int(_SAFETY * room / per_token), large)


def _power(tokens: int | float) -> int:
    """The largest power of two that is no more; at least one."""
    return 2 ** math.floor(math.log2(max(1.0, tokens)))


def in_order(items: Collection[Item[Any]]) -> list[Item[Any]]:
    """Longest first, so that trouble shows early; equal lengths in the order of their keys."""
    return sorted(items, key=lambda i: (-i.length, i.key))


def _take(ordered: Sequence[Item[Any]], first: int, budget: int, most: float | None) -> Sequence[Item[Any]]:
    """The most items from place `first` on whose rows × longest row stay within the budget; at least one, if there are any.

    Items of one group come whole where that many padded tokens are at `most`, or else begin a batch of their own. Costs
    what the batch is long, not what is left: a stage of a million items is cut in thousands of batches.
    """
    if first >= len(ordered):
        return []
    longest = max(1.0, ordered[first].length)
    end = min(len(ordered), first + max(1, int(budget / longest)))
    group = ordered[end - 1].group
    if group and end < len(ordered) and ordered[end].group == group:
        start = next(n for n in range(first, end) if ordered[n].group == group)
        whole = sum(1 for _ in takewhile(lambda n: ordered[n].group == group, range(start, len(ordered))))
        if start > first:
            end = start
        elif whole * longest <= (most or 0.0):
            end = first + whole
    return ordered[first:end]


def batch_of(stage: str, batch_id: int, items: Sequence[Item[Any]]) -> Batch:
    """A planned batch of these items; its padded tokens are rows × longest row."""
    return Batch(
        stage, batch_id, tuple(i.key for i in items), math.ceil(len(items) * max(1.0, *(i.length for i in items)))
    )


def halves(batch: Batch, items: Mapping[str, Item[Any]], next_id: int) -> list[Batch]:
    """The two planned batches that take the place of one that did not fit, or failed whole.

    A key that is not among `items` any more counts for one token.
    """
    middle = len(batch.keys) // 2
    return [
        replace(
            batch_of(batch.stage, next_id + n, [items.get(k) or Item(k, 1) for k in keys]),
            parent=batch.batch_id,
            attempt=batch.attempt,
        )
        for n, keys in enumerate((batch.keys[:middle], batch.keys[middle:]))
    ]
