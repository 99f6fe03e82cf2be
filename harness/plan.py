"""How items are cut into batches: by a budget of padded tokens, given, measured, or learned by running out of memory.

Pure arithmetic on lengths; stores nothing and computes nothing.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from harness.executor import Item
from harness.store import Batch

CPU_BUDGET = 8_192
"""Padded tokens a batch where memory is not measured."""
_PROBES = (2_048, 8_192)
"""Padded tokens of the two small batches that a GPU's memory is measured with."""
_SAFETY = 0.85
"""Share of the measured room that is used: allocators fragment."""


class Budget:
    """How many padded tokens a batch may have: given, or measured on the first two batches; lower after running out."""

    def __init__(
        self,
        given: int | None,
        capacity_bytes: int | None,
        plan: Sequence[Batch],
        ran_out: Collection[int],
        sizes: Sequence[int] = (),
    ):
        """`capacity_bytes`: all the memory there is for this process, None where it is not measured. `ran_out`: ids of
        the batches of `plan` that did not fit, in an earlier life of this run. `sizes`: items a batch where the items are
        to be cut as another run cut them; ignored where they are not as many."""
        self._sizes = tuple(sizes)
        self._capacity = capacity_bytes if given is None else None
        self.tokens: int | None = given or (None if self._capacity is not None else CPU_BUDGET)
        self._ceiling: int | None = None
        for batch in plan:
            if batch.batch_id in ran_out:
                self.learn(batch)
        self.remember(plan)

    def allows(self, batch: Batch) -> bool:
        return self._ceiling is None or batch.padded_tokens <= self._ceiling or len(batch.keys) == 1

    def learn(self, batch: Batch) -> None:
        """A batch did not fit: none larger than its larger half is tried again in this stage."""
        num = len(batch.keys)
        half = math.ceil(batch.padded_tokens * ((num + 1) // 2) / num)
        self._ceiling = min(half, self._ceiling or half)

    def cut(self, items: Sequence[Item], next_id: int, stage: str) -> Iterator[Batch]:
        """Batches of the items, longest first, so that trouble shows early; equal lengths in the order of their keys."""
        ordered = sorted(items, key=lambda i: (-i.length, i.key))
        if ordered and len(ordered) == sum(self._sizes):
            for n, (end, size) in enumerate(zip(accumulate(self._sizes), self._sizes, strict=True)):
                yield batch_of(stage, next_id + n, ordered[end - size : end])
            return
        if self.tokens is None and self._any_done:
            self.tokens = self._from_measurement() if self._measured else CPU_BUDGET
        if self.tokens is None:
            for probe in _PROBES:
                batch = _take(ordered, probe)
                if batch:
                    ordered = ordered[len(batch) :]
                    yield batch_of(stage, next_id, batch)
                    next_id += 1
            return
        while ordered:
            batch = _take(ordered, self.tokens)
            ordered = ordered[len(batch) :]
            yield batch_of(stage, next_id, batch)
            next_id += 1

    def remember(self, plan: Sequence[Batch]) -> None:
        """Take the peaks of the batches that are done as measurements; a stage that uses no GPU memory has none."""
        self._any_done = any(b.status == "done" for b in plan)
        self._measured = [b for b in plan if b.status == "done" and b.peak_bytes]

    def _from_measurement(self) -> int:
        """Room over what is always there, divided by bytes per padded token: a line through the two probes.

        Never less than the largest batch that did fit.
        """
        small = min(self._measured, key=lambda b: b.padded_tokens)
        large = max(self._measured, key=lambda b: b.padded_tokens)
        rise = (large.peak_bytes or 0) - (small.peak_bytes or 0)
        if large.padded_tokens == small.padded_tokens or rise <= 0:
            return 4 * large.padded_tokens
        per_token = rise / (large.padded_tokens - small.padded_tokens)
        room = (self._capacity or 0) - ((small.peak_bytes or 0) - per_token * small.padded_tokens)
        return max(int(_SAFETY * room / per_token), large.padded_tokens)


def _take(ordered: Sequence[Item], budget: int) -> list[Item]:
    """The most items from the front whose rows × longest row stay within the budget; at least one."""
    if not ordered:
        return []
    longest = max(1.0, ordered[0].length)
    return list(ordered[: max(1, int(budget / longest))])


def batch_of(stage: str, batch_id: int, items: Sequence[Item]) -> Batch:
    """A planned batch of these items; its padded tokens are rows × longest row."""
    return Batch(
        stage, batch_id, tuple(i.key for i in items), math.ceil(len(items) * max(1.0, *(i.length for i in items)))
    )


def place(batch: Batch, plan: Sequence[Batch]) -> tuple[int, ...]:
    """Where a batch stands in the order of running: halves stand where their parent stood, in a resumed run too."""
    if batch.parent is None or plan[batch.parent].status != "split":
        return (batch.batch_id,)
    return (*place(plan[batch.parent], plan), batch.batch_id)


def halves(batch: Batch, items: Mapping[str, Item], next_id: int) -> list[Batch]:
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
