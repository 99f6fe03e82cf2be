"""How ways of doing one thing are timed against each other: same model, same items, one process, results compared.

Ratios are what counts; seconds belong to the machine they were taken on, and to what else it was doing: so every way is
told in seconds of its processors too, and in the share it reaches of the machine's own matrix product.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from harness import tally
from harness.engine import AnyStage
from harness.experiments.experiment import Prepared
from harness.models.load import LM
from harness.models.processor import settle

_REPEATS = 3
_WIDE = ("float32", "float64")

Unit = Literal["relative", "probability", "share of samples", "standard errors"]
MOST_APART: dict[Unit, float] = {"relative": 1e-3, "probability": 1e-4, "standard errors": 5.0}
"""How far two ways may be from each other: far over what float32 rounding gives, far under any mistake. Half precision is
told and not judged, but for a law; samples whose tokens differ are not judged, since near ties may fall either way."""


class Apart(NamedTuple):
    """How far a way's results are from the fast path's, and in what that is told."""

    value: float
    unit: Unit


@dataclass(frozen=True)
class Figure:
    """One way of doing one thing: median seconds, what was forwarded, and how far its results are from the fast path's."""

    stage: str
    way: str
    seconds: float
    cpu_seconds: float
    """Of all processors together, so that what else a machine does hardly changes it; on a GPU it is the host's alone."""
    tokens: float
    """Through all layers, padding counted; one that goes through some of them counts as that share. 0: not counted."""
    head_rows: int
    """Vectors that the vocabulary's head was applied to."""
    gflops: float
    """10⁹ operations a second (see `operations`)."""
    of_product: float
    """The share that this is of the machine's own matrix product."""
    speedup: float
    """Of the fast path over this way."""
    apart: float | None
    """None: a way that nothing is compared with."""
    unit: Unit | None
    new_tokens: int = 0
    """Made by sampling."""


@dataclass(frozen=True)
class Way:
    """One way of doing a thing. `scale`: how many times the work that is timed the whole would be."""

    name: str
    work: Callable[[], Any]
    compare: Callable[[Any, Any], Apart] | None = None
    """(the fast path's result, its own) -> how far apart they are."""
    once: bool = False
    """A slow way is timed once, without a round to warm up."""
    scale: float = 1.0
    num_new: Callable[[Any], int] = lambda _result: 0


@dataclass
class Course:
    """Where ways are timed: the model, what its parts cost, the machine's own speed, and the clocks."""

    lm: LM
    product_gflops: float
    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time
    heads: int = 0
    """Rows that any head was applied to, ours or a peer's."""
    skipped: list[str] = field(default_factory=list)
    """A line for each peer that was left out."""

    def at_head(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.heads += args[0].numel() // args[0].shape[-1]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Our own head is counted inside the block."""
        handle = self.lm.anatomy.head.register_forward_pre_hook(self.at_head)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Grounds:
    """What a case is given: where to time, what the run would be made of, and how many contexts to take of it."""

    course: Course
    prepared: Prepared
    num_contexts: int
    stages: tuple[AnyStage, ...]
    run_aside: Callable[[Sequence[AnyStage]], int]
    """Runs such stages from nothing, in a folder that is removed; the exit code."""


@dataclass(frozen=True)
class Timed:
    """What a case found: figures, lines and tables for a terminal, and more for a file."""

    figures: tuple[Figure, ...] = ()
    lines: tuple[object, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)


def told(f: Figure) -> str:
    """How far a way's results are from the fast path's, in words."""
    if f.apart is None or f.unit is None:
        return ""
    return {
        "relative": f"{f.apart:.1e}",
        "probability": f"{f.apart:.1e} of p",
        "standard errors": f"{f.apart:.1f} σ",
        "share of samples": f"{f.apart:.1%} of samples",
    }[f.unit]


def disagreements(figures: Sequence[Figure], dtype: str) -> list[str]:
    """A line for every way whose results are not the fast path's, as far as the dtype lets that be judged."""
    return [
        f"{f.stage}, {f.way}: {told(f)} from the fast path, at most {MOST_APART[f.unit]:g} expected"
        for f in figures
        if f.unit in MOST_APART
        and f.apart is not None
        and (dtype in _WIDE or f.unit == "standard errors")
        and not f.apart <= MOST_APART[f.unit]
    ]


def operations(lm: LM, tokens: float, head_rows: int) -> float:
    """2 × (tokens × parameters in the layers + head rows × width × vocabulary): a multiplication and an addition each.

    Attention's own products are left out (of texts this short they are a hundredth); of a mixture all experts are counted.
    """
    per_token = sum(p.numel() for block in lm.anatomy.blocks for p in block.parameters())
    head = lm.model.get_output_embeddings()
    assert head is not None, "the model was assembled with one"
    return 2 * (tokens * per_token + head_rows * head.weight.numel())


def in_turn(course: Course, stage: str, ways: Sequence[Way]) -> list[Figure]:
    """Figures of the ways, the first of them the fast path: each is warmed up, then all of them take turns, so that what
    slows the machine down for a while slows them all. Medians."""
    took: list[list[tuple[float, float]]] = [[] for _ in ways]
    work: list[tuple[float, int, Any]] = []
    for way in ways:
        if not way.once:
            way.work()
    for turn in range(_REPEATS):
        for way, times in zip(ways, took, strict=True):
            if turn and way.once:
                continue
            before, heads = tally.now(), course.heads
            settle(course.lm.device)
            start, cpu = course.clock(), course.cpu_clock()
            result = way.work()
            settle(course.lm.device)
            times.append((course.clock() - start, course.cpu_clock() - cpu))
            if not turn:
                spent = tally.now() - before
                work.append((spent.tokens + spent.padding, course.heads - heads, result))
    figures: list[Figure] = []
    for way, times, (tokens, heads, result) in zip(ways, took, work, strict=True):
        seconds, cpu_seconds = (way.scale * statistics.median(t) for t in zip(*times, strict=True))
        tokens, heads = way.scale * tokens, round(way.scale * heads)
        gflops = operations(course.lm, tokens, heads) / seconds / 1e9
        apart, unit = way.compare(work[0][2], result) if way.compare else (None, None)
        figures.append(
            Figure(
                stage,
                way.name,
                seconds,
                cpu_seconds,
                tokens,
                heads,
                gflops,
                gflops / course.product_gflops,
                seconds / figures[0].seconds if figures else 1.0,
                apart,
                unit,
                way.num_new(result),
            )
        )
    return figures
