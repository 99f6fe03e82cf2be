"""How long a run will take: its own stages on a few of its subjects beforehand, scaled to all of them, and corrected as it
runs. A subject is what an experiment has many of: a prompt, a text.

Knows no stage by name, and of a subject nothing but how many there are.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar, runtime_checkable

from loguru import logger

from harness.engine import AnyStage, BatchReport, Engine, Limits, Observer, StageReport
from harness.engine.executors import Executor
from harness.engine.plan import Pace, unmeasured_cap
from harness.engine.stop import StopSignal
from harness.run import RunPaths
from harness.run.manifest import RecordedEstimate
from harness.store import Schema, Store

Clock = Callable[[], float]
_T = TypeVar("_T")

_SHARE = 24
"""At most one subject in so many is measured beforehand, so that it costs about a twenty-fourth of the run."""
_MOST_SUBJECTS = 7
_LONG_S = 60.0
"""What one subject says takes longer than this is measured on more of them."""
_PRIOR = 0.05
"""Share of a stage's length that what was measured beforehand weighs against what is measured now."""
_PRIOR_S = 10.0
"""The same for a whole run, in seconds."""


@runtime_checkable
class Bounded(Protocol):
    """A stage whose items do not grow with the subjects, or not as fast."""

    def most_items(self, num_subjects: int) -> int:
        """The most items it can have, whatever the results are that it rests on."""
        ...


@dataclass(frozen=True)
class StageEstimate:
    """What a whole stage will take. `length` is that of its items together."""

    seconds: float
    tokens: int
    items: int
    length: float


@dataclass(frozen=True)
class Estimate:
    """What a whole run will take, stage by stage, and what it was measured on."""

    stages: Mapping[str, StageEstimate]
    num_subjects: int
    of_subjects: int
    cost_s: float

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages.values())

    def with_stage(self, name: str, stage: StageEstimate) -> "Estimate":
        """With a stage that was not measured beforehand."""
        return Estimate({**self.stages, name: stage}, self.num_subjects, self.of_subjects, self.cost_s)

    def record(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        rounded = {
            name: asdict(s) | {"seconds": round(s.seconds, 1), "length": round(s.length)}
            for name, s in self.stages.items()
        }
        on = {"subjects": self.num_subjects, "of": self.of_subjects, "seconds": round(self.cost_s, 1)}
        return {"seconds": round(self.seconds, 1), "stages": rounded, "measured_on": on}

    @classmethod
    def recorded(cls, record: RecordedEstimate) -> "Estimate":
        """What a manifest keeps."""
        on = record.measured_on
        stages = {name: StageEstimate(s.seconds, s.tokens, s.items, s.length) for name, s in record.stages.items()}
        return cls(stages, on.subjects, on.of, on.seconds)


def measure(
    build: Callable[[int], Sequence[AnyStage]],
    schema: Schema,
    num_subjects: int,
    executor: Executor,
    limits: Limits,
    stop: StopSignal,
    shown: Observer,
    clock: Clock = time.perf_counter,
) -> Estimate:
    """Run the stages on a few subjects, in a folder that is thrown away, and say what all `num_subjects` will take.

    `build` gives the stages for that many of the subjects (see `spread`). First
    one subject; what that says will be long is measured again on more, whose batches are nearer to those of the run. Raises
    what the stages raise where nothing can be run at all; an item that fails is left out.
    """
    start, watch = clock(), _Watch(clock, shown)
    most_tokens = limits.max_tokens or unmeasured_cap(executor.accelerator.capacity_bytes())
    most = min(_MOST_SUBJECTS, num_subjects // _SHARE)
    with TemporaryDirectory(prefix="harness-estimate-") as name, Store(RunPaths(Path(name)).results, schema) as store:
        paths = RunPaths(Path(name))
        engine = Engine(store, paths, executor, limits, watch, stop)
        for num in (1, most):
            stages, reports = build(num), dict[str, StageReport]()
            engine.run(stages, lambda report, reports=reports: reports.__setitem__(report.name, report))
            for stage in stages:
                _say_failed(store, reports[stage.name])
            found = {s.name: watch.scaled(s, num, num_subjects, most_tokens) for s in stages}
            whole = Estimate(found, num, num_subjects, clock() - start)
            if most <= 1 or whole.seconds < _LONG_S:
                break
    return whole


def spread(things: Sequence[_T], number: int, size: Callable[[_T], float]) -> list[_T]:
    """So many of them, from the smallest to the largest at equal steps: their mean size is about that of all. The middle
    one is always among them."""
    ordered, middle = sorted(things, key=size), len(things) // 2
    steps = [int((i + 0.5) / number * len(ordered)) for i in range(number)]
    steps[number // 2] = middle
    return [ordered[i] for i in dict.fromkeys(steps)]


def _say_failed(store: Store, report: StageReport) -> None:
    if report.num_items and report.num_failed == report.num_items:
        told = store.query(
            "SELECT message FROM events WHERE stage = ? AND kind = 'failed_item' LIMIT 1", [report.name]
        )[0]["message"]
        logger.warning("tried beforehand: every item of stage {} failed: {}", report.name, told)


@dataclass
class _Measured:
    """What was seen of a stage."""

    num_items: int = 0
    length: float = 0.0
    listing_s: list[float] = field(default_factory=list)
    """Of each time it was tried."""
    batches: list[tuple[float, float]] = field(default_factory=list)
    """Length and seconds of each, storing it included."""
    tokens: int = 0


class _Watch:
    """An observer with a clock; what it is told before a stage's end it tells on."""

    def __init__(self, clock: Clock, shown: Observer):
        self._clock, self._shown = clock, shown
        self._since = clock()
        self._aside_s = 0.0
        self._stages: dict[str, _Measured] = {}

    def doing(self, stage: str, what: str) -> None:
        self._stages.setdefault(stage, _Measured())
        if not what:
            self._aside_s = self._clock() - self._since
        self._shown.doing(f"try {stage}", what)
        self._since = self._clock()

    def stage_started(self, stage: str, total: int, done: int, length: float, length_done: float) -> None:
        seen = self._stages[stage]
        seen.num_items, seen.length = total, length
        seen.listing_s.append(self._aside_s)
        self._shown.stage_started(f"try {stage}", total, done, length, length_done)
        self._since = self._clock()

    def batch_done(self, batch: BatchReport) -> None:
        seen = self._stages[batch.stage]
        seen.batches.append((batch.length, self._clock() - self._since))
        seen.tokens += batch.tokens
        self._shown.batch_done(batch._replace(stage=f"try {batch.stage}"))
        self._since = self._clock()

    def stage_finished(self, stage: str) -> None:
        pass

    def scaled(self, stage: AnyStage, num_subjects: int, of_subjects: int, most_tokens: int | None) -> StageEstimate:
        """A stage for all subjects, in batches as large as its pace says they will be."""
        seen = self._stages[stage.name]
        factor = of_subjects / num_subjects
        if isinstance(stage, Bounded) and seen.num_items:
            factor = min(factor, stage.most_items(of_subjects) / seen.num_items)
        length = seen.length * factor
        pace = Pace.typical(seen.batches)
        done = sum(tokens for tokens, _ in seen.batches)
        # Listing has a part that does not grow: what it reads of the model. The first time tells it.
        listing_s = min(seen.listing_s) + max(0.0, seen.listing_s[-1] - seen.listing_s[0]) * factor
        seconds = listing_s + (pace.whole(length, most_tokens) if pace else 0.0)
        return StageEstimate(
            seconds, round(seen.tokens / done * length) if done else 0, round(seen.num_items * factor), length
        )


@dataclass
class Forecast:
    """What is left of a run: from an estimate, where there is one, and from what was measured since."""

    estimate: Estimate | None = None
    finished: dict[str, float] = field(default_factory=dict)
    """Seconds by stage that has ended, in an earlier life of the run too."""
    _stage: str = ""
    _length: float = 0.0
    _left: float = 0.0
    _done: float = 0.0
    _seconds: float = 0.0

    def started(self, stage: str, length: float, length_done: float) -> None:
        """A stage begins, or goes on: what its items come to is known now."""
        self._stage, self._length, self._left = stage, length, length - length_done
        self._done = self._seconds = 0.0

    def advanced(self, length: float, seconds: float) -> None:
        """So much of the stage is done, `seconds` after it started."""
        self._done += length
        self._left -= length
        self._seconds = seconds

    def ended(self) -> None:
        """The stage is done."""
        self.finished[self._stage] = self.finished.get(self._stage, 0.0) + self._seconds
        self._stage = ""

    def stage_left_s(self) -> float | None:
        """Seconds that the stage still takes; None where nothing is known of it, and between stages."""
        if not self._stage:
            return None
        known = self.estimate.stages.get(self._stage) if self.estimate else None
        done, seconds = self._done, self._seconds
        if known is not None and known.length:
            weight = _PRIOR * self._length
            done, seconds = done + weight, seconds + weight * known.seconds / known.length * self._slowness()
        return self._left * seconds / done if done else None

    def run_left_s(self) -> float | None:
        """Seconds that the run still takes; None where no stage after this one was estimated."""
        if self.estimate is None:
            return None
        later = [s.seconds for n, s in self.estimate.stages.items() if n not in self.finished and n != self._stage]
        return (self.stage_left_s() or 0.0) + sum(later) * self._slowness()

    def _slowness(self) -> float:
        """How much longer than estimated the stages took that have ended."""
        assert self.estimate is not None
        both = [(s, self.estimate.stages[n].seconds) for n, s in self.finished.items() if n in self.estimate.stages]
        return (sum(s for s, _ in both) + _PRIOR_S) / (sum(e for _, e in both) + _PRIOR_S)


def duration(seconds: float) -> str:
    """A time as a person says it: `40 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
