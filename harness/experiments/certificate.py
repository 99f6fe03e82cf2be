"""The certificate that every run makes of itself: the fast path against a deliberately plain reference, on a few subjects.

An experiment says what is measured (`Checks`); here is what all certificates share. An item is a measurement of a subject,
small enough to be shown, killed and left out. They are ordered so that a short certificate holds each measurement once
before any twice; those are made whatever the budget of seconds is, and what is left out is a row of its own. A disagreement
in half precision is measured again in float64: a gap that closes was rounding, one that stays is a bug.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from loguru import logger

from harness.engine import AnyTables, Item, ItemResult
from harness.errors import HarnessError, ItemFailed
from harness.settings import SanitySettings
from harness.tolerance import HALF

NAME = "sanity"
"""The stage is called so in every experiment."""
MOST_S = 60.0
"""Seconds that nobody asked for."""
SMALL_RUN_S = 20.0
"""Seconds for a run that is too small to be estimated: several times what a demo model needs for everything."""
_LENGTH = 8_192
"""An item is said to be as long as a batch may be on a CPU: so each is a batch of its own, shown and kept when it is done."""


@dataclass(frozen=True)
class Verdict:
    """How one measurement of one subject came out; None where it was left out.

    `max_rel` is relative to the reference. For tokens, `flips` counts completions that differ and `near_ties` those of
    them whose first different token was a tie within the tolerance: noise, not a bug. `repeated` tells how a
    disagreement in half precision came out in float64.
    """

    measurement: str
    subject: str
    tolerance: float
    num_items: int = 0
    max_abs: float | None = None
    max_rel: float | None = None
    flips: int = 0
    near_ties: int = 0
    worst: str | None = None
    repeated: str | None = None
    ok: bool | None = None
    left_out: bool = False


@dataclass
class Gap:
    """The worst difference so far of one measurement."""

    measurement: str
    subject: str
    tolerance: float
    num_items: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: str = ""
    flips: int = 0
    near_ties: int = 0
    excused: bool = True
    """Whether a near tie is excused: not for sampled tokens, which noise decides."""

    def update(self, want: Any, got: Any) -> None:
        """Take in one item; a shape that differs, or a value that is not finite, is an infinite difference."""
        self.num_items += 1
        a, b = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (want, got))
        gap = np.abs(a - b) if a.shape == b.shape else np.full(1, np.inf)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if gap.size and gap.max() >= self.max_abs:
            self.worst, self.max_abs = self.subject, float(gap.max())
        if gap.size and a.shape == b.shape:
            self.max_rel = max(self.max_rel, float((gap / np.maximum(np.abs(a), 1e-30)).max()))

    def verdict(self) -> Verdict:
        """What it came to; a measurement without an item does not agree."""
        excused = self.near_ties if self.excused else 0
        is_ok = self.num_items > 0 and self.flips == excused and self.max_abs <= self.tolerance
        return Verdict(
            self.measurement,
            self.subject,
            self.tolerance,
            self.num_items,
            self.max_abs,
            self.max_rel,
            self.flips,
            self.near_ties,
            self.worst,
            ok=is_ok,
        )


@runtime_checkable
class Task(Protocol):
    """What an item measures."""

    @property
    def kind(self) -> str:
        """Items of a kind take about the same time."""
        ...

    @property
    def name(self) -> str:
        """The subject, as the certificate names it."""
        ...

    @property
    def measurements(self) -> tuple[str, ...]:
        """The names of all that it may give verdicts of."""
        ...

    @property
    def is_least(self) -> bool:
        """Whether it is the first of its kind: measured whatever the budget is."""
        ...


T = TypeVar("T", bound=Task)
B = TypeVar("B")


@runtime_checkable
class Checks(Protocol[T, B]):
    """An experiment's measurements, each by the fast path and by a plain one. `B` is a model made ready for both."""

    @property
    def version(self) -> int:
        """Of the stage."""
        ...

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Tables that `tasks` needs, and of each the columns."""
        ...

    @property
    def num_subjects(self) -> int: ...

    @property
    def dtype(self) -> str:
        """In which the run computes."""
        ...

    @property
    def device(self) -> str: ...

    def params(self) -> dict[str, Any]:
        """Everything of its settings that decides what is compared, for the fingerprint."""
        ...

    def tasks(self, tables: AnyTables) -> list[T]:
        """All there is to measure, in the order in which it is to be measured."""
        ...

    def bench(self, is_full: bool) -> B:
        """The run's model; `is_full`: in all depth."""
        ...

    def wider(self, dtype: str, device: str, is_full: bool) -> B:
        """The same model in another dtype. Raises where it does not fit."""
        ...

    def measure(self, bench: B, task: T) -> list[Verdict]:
        """Verdicts of one item. Raises ItemFailed where the fast path has no result for it."""
        ...

    def left_out(self, bench: B, task: T) -> list[Verdict]:
        """What stands in place of verdicts where there was no time for them."""
        ...


class Widened(Generic[T, B]):
    """Settles disagreements of half precision: measured once more in float64 they are noise, or a bug.

    Needs the model in memory once more, eight bytes a parameter, from the first of them on. Where that does not fit,
    float32 is taken, on the same device or on the CPU; where nothing fits the verdict stands.
    """

    def __init__(self, checks: Checks[T, B], is_full: bool = False):
        wider = (("float64", checks.device), ("float32", checks.device), ("float32", "cpu"))
        self._checks, self._is_full = checks, is_full
        self._ways = list(dict.fromkeys(wider))
        self._bench: B | None = None
        self._why = ""

    def settle(self, verdicts: Sequence[Verdict], task: T) -> list[Verdict]:
        """The same verdicts; each disagreement with what became of it."""
        if all(v.ok for v in verdicts):
            return list(verdicts)
        while self._ways:
            try:
                again = {v.measurement: v for v in self._checks.measure(self._load(task), task)}
            except (HarnessError, MemoryError, torch.OutOfMemoryError) as e:
                self._why = self._why or str(e)
                self._bench = None
                self._ways.pop(0)
                continue
            return [v if v.ok else _settled(v, again[v.measurement], self._ways[0][0]) for v in verdicts]
        return [v if v.ok else replace(v, repeated=f"not possible: {self._why}") for v in verdicts]

    def _load(self, task: T) -> B:
        if self._bench is None:
            dtype, device = self._ways[0]
            told_so = "{} disagrees on {}: measured again in {}, for which the model is loaded once more"
            logger.info(told_so, task.kind, task.name, dtype)
            self._bench = self._checks.wider(dtype, device, self._is_full)
        return self._bench


def _settled(verdict: Verdict, wide: Verdict, dtype: str) -> Verdict:
    told_so = f"{dtype}: {wide.max_abs:.1e}, " + ("noise" if wide.ok else "still apart")
    return replace(verdict, ok=wide.ok, repeated=told_so)


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """A task, and what the run knows of it already."""

    task: T
    was: Literal["measured", "left out"] | None
    """What the run has already: a decision of the clock is made once."""
    before_s: Mapping[str, float]
    """Seconds that an earlier process spent on each item of this certificate, by its key."""


@dataclass
class Work(Generic[T, B]):
    """What a process needs for the items, and what it knows of their cost."""

    bench: B
    widened: Widened[T, B] | None
    spent_s: float = 0.0
    last_s: dict[str, float] = field(default_factory=dict)
    """What the last item of each kind took."""


@dataclass(frozen=True)
class Certificate(Generic[T, B]):
    """The stage: writes `sanity_items`, of which the view `sanity` is the certificate, a row a measurement. A disagreement
    ends the run with exit 1."""

    checks: Checks[T, B]
    budget_s: float | None = None
    """None: no limit, and in full depth. Decides how much is measured, and no number."""
    is_auto: bool = False
    """Whether the budget follows from what the run takes."""
    clock: Callable[[], float] = time.perf_counter
    name = NAME
    row_bytes = 1_000

    @classmethod
    def of(cls, checks: Checks[T, B], given: SanitySettings) -> "Certificate[T, B]":
        """As the settings have it, for a run of unknown length."""
        if given.budget == "auto":
            return cls(checks, SMALL_RUN_S, is_auto=True)
        return cls(checks, None if given.budget == "unlimited" else given.budget)

    def within(self, seconds: float) -> "Certificate[T, B]":
        """For a run whose certificate may take so long; a budget that was asked for stays."""
        return replace(self, budget_s=min(MOST_S, seconds)) if self.is_auto else self

    @property
    def version(self) -> int:
        return self.checks.version

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return {**self.checks.reads, "sanity_items": ("measurement", "subject", "left_out", "seconds")}

    def params(self) -> dict[str, Any]:
        return self.checks.params()

    def items(self, tables: AnyTables) -> list[Item[Asked[T]]]:
        tasks = self.checks.tasks(tables)
        key_of = {(m, task.name): _key(task) for task in tasks for m in task.measurements}
        was: dict[str, Literal["measured", "left out"]] = {}
        before_s: dict[str, float] = {}
        for r in tables["sanity_items"]:
            key = key_of.get((r["measurement"], r["subject"]))
            if key is None:
                continue
            was[key] = "left out" if r["left_out"] else "measured"
            if not r["left_out"]:
                before_s[key] = before_s.get(key, 0.0) + (r["seconds"] or 0.0)
        return [
            # the longest comes first
            Item(_key(task), _LENGTH + len(tasks) - n, Asked(task, was.get(_key(task)), before_s))
            for n, task in enumerate(tasks)
        ]

    def setup(self) -> Work[T, B]:
        is_full = self.budget_s is None
        widened = Widened(self.checks, is_full) if self.checks.dtype in HALF else None
        return Work(self.checks.bench(is_full), widened)

    def run(self, context: Work[T, B], items: Sequence[Item[Asked[T]]]) -> list[ItemResult]:
        return [self._one(context, item.key, item.payload) for item in items]

    def _one(self, work: Work[T, B], key: str, asked: Asked[T]) -> ItemResult:
        task = asked.task
        if not self._has_time(work, asked):
            return ItemResult(key, {"sanity_items": [_row(v, 0.0) for v in self.checks.left_out(work.bench, task)]})
        start = self.clock()
        try:
            verdicts = self.checks.measure(work.bench, task)
            if work.widened is not None:
                verdicts = work.widened.settle(verdicts, task)
        except ItemFailed as e:
            return ItemResult.failed(key, e)
        seconds = self.clock() - start
        work.spent_s += seconds
        work.last_s[task.kind] = seconds
        for v in verdicts:
            if not v.ok:
                logger.error(
                    "the fast path and the plain reference disagree: {} of {}, {}", v.measurement, task.name, told(v)
                )
        return ItemResult(key, {"sanity_items": [_row(v, seconds / len(verdicts)) for v in verdicts]})

    def _has_time(self, work: Work[T, B], asked: Asked[T]) -> bool:
        """Decided once: what a run has measured, or left out, stays so where it is looked at again."""
        task = asked.task
        if self.budget_s is None or task.is_least or asked.was is not None:
            return asked.was != "left out"
        alike = [s for key, s in asked.before_s.items() if key.startswith(f"{task.kind}|")]
        next_s = work.last_s.get(task.kind, alike[-1] if alike else 0.0)
        return sum(asked.before_s.values()) + work.spent_s + next_s < self.budget_s


def told(verdict: Verdict) -> str:
    """How far apart, in words."""
    flips = f", {verdict.flips} completions differ" if verdict.flips else ""
    repeated = f" ({verdict.repeated})" if verdict.repeated else ""
    return f"{verdict.max_abs:.1e} apart where {verdict.tolerance:.0e} is rounding{flips}{repeated}"


def _key(task: Task) -> str:
    return f"{task.kind}|{task.name}"


def _row(verdict: Verdict, seconds: float) -> dict[str, Any]:
    """A row of `sanity_items`; an infinite difference is stored as 1e38, since the engine refuses what no 32-bit float holds."""
    most = {
        k: None if v is None else min(v, 1e38) for k, v in (("max_abs", verdict.max_abs), ("max_rel", verdict.max_rel))
    }
    return asdict(verdict) | most | {"seconds": seconds}
