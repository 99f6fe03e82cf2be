"""What an executor is: jobs in, outcomes out. Knows neither what is computed nor where results are kept."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from harness.engine.stage import Artifact, Item, ItemResult
from harness.engine.tables import FileHandle
from harness.tally import Tally


@dataclass(frozen=True, slots=True)
class Job:
    """One batch as a worker gets it: its items, what the batch before it left, and the folder for its files, which is
    its own and may not be there yet."""

    token: Any
    items: Sequence[Item[Any]]
    staging: Path | None = None
    before: FileHandle | None = None


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that a worker wrote: what it is, where it lies, and what is in it. `item` None: of the batch as a whole."""

    artifact: Artifact
    """Without its content."""
    at: Path
    sha256: str
    bytes: int
    item: str | None = None
    is_state: bool = False


@dataclass(frozen=True)
class Computed:
    """What a worker made of a job: results without their files, the files on disk, and those not written: of which item,
    and which path."""

    results: Sequence[ItemResult]
    files: tuple[StagedFile, ...] = ()
    unwritten: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one batch: results, or out of memory, or an error with its remote traceback.

    `work_s` is how long it would have taken on a machine with nothing else to do, as far as can be told; `forwarded` are
    the tokens that went through a model for it. `capacity_bytes` is the memory of the worker that computed it, where
    workers differ: a batch is planned for the weakest.
    """

    token: Any
    results: Sequence[ItemResult] = ()
    seconds: float = 0.0
    peak_bytes: int = 0
    work_s: float = 0.0
    forwarded: Tally = field(default_factory=Tally)
    out_of_memory: bool = False
    error: str | None = None
    traceback: str | None = None
    files: tuple[StagedFile, ...] = ()
    unwritten: tuple[tuple[str, str], ...] = ()
    capacity_bytes: int | None = None


@runtime_checkable
class Accelerator(Protocol):
    """Where a batch is computed: its memory, and how long work takes there."""

    out_of_memory: tuple[type[BaseException], ...]

    def release(self) -> None:
        """Give back what a failed batch left behind."""
        ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int:
        """Most memory in use since `reset_peak`, weights included; 0 where it is not measured."""
        ...

    def capacity_bytes(self) -> int | None:
        """Memory this process may use in all, the reserve left out; None where it is not known."""
        ...

    def work_s(self, wall_s: float, cpu_s: float) -> float:
        """Seconds of work in a batch that took `wall_s` and `cpu_s` of this process's threads together."""
        ...


class Host:
    """A CPU: memory is not measured, and running out of it is Python's MemoryError."""

    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,)

    def release(self) -> None:
        gc.collect()

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def capacity_bytes(self) -> int | None:
        return None

    def work_s(self, wall_s: float, cpu_s: float) -> float:
        """The lesser: a machine that is busy with something else lengthens the one, further threads the other."""
        return min(wall_s, cpu_s)


Setup = Callable[[], Any]
Work = Callable[[Any, Job], Computed]


@runtime_checkable
class Executor(Protocol):
    """Computes batches. `setup` runs once per worker, before its first batch; `work` runs where the batch is computed.

    An executor of several GPUs or of a cluster may take several jobs before it gives back the first outcome, in any order.
    """

    def map(self, setup: Setup, work: Work, jobs: Iterable[Job | None]) -> Iterator[Outcome]:
        """An outcome for every job of `jobs`, which may grow while it is consumed.

        None among them: there is no job until an outcome of one that is out was taken. It never comes where none is out.
        """
        ...

    @property
    def accelerator(self) -> Accelerator: ...
