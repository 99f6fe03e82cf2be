"""The executor that is this process: one batch after the other."""

import time
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from harness import tally
from harness.engine.executors.base import Accelerator, Computed, Host, Job, Outcome, Setup, Work
from harness.errors import EnvironmentFault, HarnessError, machine_fault


class Inline:
    """One batch after the other, here."""

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator: Accelerator = accelerator or Host()

    @property
    def accelerator(self) -> Accelerator:
        return self._accelerator

    def map(self, setup: Setup, work: Work, jobs: Iterable[Job | None]) -> Iterator[Outcome]:
        context: Any = None
        ready = False
        for job in jobs:
            assert job is not None, "nothing is out: each outcome was taken before the next job was asked for"
            if not ready:
                try:
                    context, ready = setup(), True
                except OSError as e:
                    raise EnvironmentFault(f"what the stage needs cannot be made ready: {_name(e)}") from e
            yield self._one(context, work, job)

    def _one(self, context: Any, work: Work, job: Job) -> Outcome:
        self.accelerator.reset_peak()
        wall, cpu, before = time.perf_counter(), time.process_time(), tally.now()
        exhausted, done = False, Computed(())
        try:
            done = work(context, job) if job.items else done
        except self.accelerator.out_of_memory:
            # Nothing more in here: while the exception lives, its frames keep the batch's tensors alive.
            exhausted = True
        except EnvironmentFault:
            raise
        except HarnessError as e:
            return Outcome(job.token, error=str(e) or _name(e), traceback=traceback.format_exc())
        except Exception as e:
            exhausted = "can't allocate memory" in str(e)  # torch says it so, and as a RuntimeError
            if not exhausted and isinstance(e, OSError) and (fault := machine_fault(e)) is not None:
                raise fault from e
            if not exhausted:
                return Outcome(job.token, error=_name(e), traceback=traceback.format_exc())
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        if exhausted:
            self.accelerator.release()
            return Outcome(job.token, out_of_memory=True, seconds=wall_s)
        peak, work_s = self.accelerator.peak_bytes(), self.accelerator.work_s(wall_s, cpu_s)
        forwarded = tally.now() - before
        return Outcome(
            job.token, done.results, wall_s, peak, work_s, forwarded, files=done.files, unwritten=done.unwritten
        )


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
