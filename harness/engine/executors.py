"""Who computes batches. The engine hands out work and takes back outcomes; it alone writes to the store.

`Inline` computes in this process. An executor of several GPUs or of a cluster has the same face: it may take several
batches before it gives back the first outcome, in any order.
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from harness import tally
from harness.errors import EnvironmentFault, HarnessError, machine_fault
from harness.tally import Tally


@dataclass(frozen=True)
class Item:
    """The smallest unit a stage computes.

    `key` names its content, never its place. `length` is what it adds to a padded batch, in tokens; a fraction where
    items that stand together share a context. `payload` is what the stage needs to compute it. Items of one `group` share
    work, have one length and keys that sort together, and are kept in one batch where it does not take too long.
    """

    key: str
    length: int | float
    payload: Any = None
    group: str = ""


@dataclass(frozen=True)
class Artifact:
    """A file too big for the store, whole in `content`; the engine writes it under the run's artifacts, at `path`.

    `shape` and `dtype` are those of the file's first tensor. The same item gives the same path again.
    """

    path: str
    kind: str
    content: bytes
    shape: tuple[int, ...]
    dtype: str
    prompt_id: str
    condition: str


@dataclass(frozen=True)
class ItemResult:
    """What one item gave: rows to insert and rows to change, per table; or an error and nothing else."""

    key: str
    rows: dict[str, list[dict[str, Any]]]
    updates: dict[str, list[dict[str, Any]]] | None = None
    error: str | None = None
    artifacts: tuple[Artifact, ...] = ()
    replaces: dict[str, dict[str, Any]] | None = None
    """Per table, the values that mark older rows which these take the place of."""

    @classmethod
    def failed(cls, key: str, error: object) -> "ItemResult":
        return cls(key, {}, error=str(error) or repr(error))


@dataclass(frozen=True)
class Outcome:
    """What became of one batch: results, or out of memory, or an error with its remote traceback.

    `work_s` is how long it would have taken on a machine with nothing else to do, as far as can be told; `forwarded` are
    the tokens that went through a model for it.
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
Run = Callable[[Any, Sequence[Item]], Sequence[ItemResult]]


@runtime_checkable
class Executor(Protocol):
    """Computes batches. `setup` runs once per worker, before its first batch."""

    def map(self, setup: Setup, run: Run, batches: Iterable[tuple[Any, Sequence[Item]]]) -> Iterator[Outcome]:
        """An outcome for every (token, items) of `batches`, which may grow while it is consumed."""
        ...

    @property
    def accelerator(self) -> Accelerator: ...


class Inline:
    """One batch after the other, here."""

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator: Accelerator = accelerator or Host()

    @property
    def accelerator(self) -> Accelerator:
        return self._accelerator

    def map(self, setup: Setup, run: Run, batches: Iterable[tuple[Any, Sequence[Item]]]) -> Iterator[Outcome]:
        context: Any = None
        ready = False
        for token, items in batches:
            if not ready:
                try:
                    context, ready = setup(), True
                except OSError as e:
                    raise EnvironmentFault(f"what the stage needs cannot be made ready: {_name(e)}") from e
            yield self._one(context, run, token, items)

    def _one(self, context: Any, run: Run, token: Any, items: Sequence[Item]) -> Outcome:
        self.accelerator.reset_peak()
        wall, cpu, before = time.perf_counter(), time.process_time(), tally.now()
        exhausted, results = False, []
        try:
            results = list(run(context, items)) if items else []
        except self.accelerator.out_of_memory:
            # Nothing more in here: while the exception lives, its frames keep the batch's tensors alive.
            exhausted = True
        except EnvironmentFault:
            raise
        except HarnessError as e:
            return Outcome(token, error=str(e) or _name(e), traceback=traceback.format_exc())
        except Exception as e:
            exhausted = "can't allocate memory" in str(e)  # torch says it so, and as a RuntimeError
            if not exhausted and isinstance(e, OSError) and (fault := machine_fault(e)) is not None:
                raise fault from e
            if not exhausted:
                return Outcome(token, error=_name(e), traceback=traceback.format_exc())
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        if exhausted:
            self.accelerator.release()
            return Outcome(token, out_of_memory=True, seconds=wall_s)
        peak, work_s = self.accelerator.peak_bytes(), self.accelerator.work_s(wall_s, cpu_s)
        return Outcome(token, results, wall_s, peak, work_s, tally.now() - before)


EXECUTORS: dict[str, Callable[[Accelerator], Executor]] = {"inline": Inline}
"""Who may compute batches, by the setting `runtime.executor`."""


def executor_of(name: str, accelerator: Accelerator) -> Executor:
    """The executor that the settings name, on this accelerator."""
    return EXECUTORS[name](accelerator)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
