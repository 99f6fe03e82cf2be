"""Who computes batches. The engine hands out jobs and takes back outcomes; it alone writes to the store.

base.py     what an executor is, takes and gives; the memory of where it computes
inline.py   one batch after the other, in this process
"""

from collections.abc import Callable

from harness.engine.executors.base import Accelerator as Accelerator
from harness.engine.executors.base import Computed as Computed
from harness.engine.executors.base import Executor as Executor
from harness.engine.executors.base import Host as Host
from harness.engine.executors.base import Job as Job
from harness.engine.executors.base import Outcome as Outcome
from harness.engine.executors.base import StagedFile as StagedFile
from harness.engine.executors.inline import Inline as Inline
from harness.engine.stage import Artifact as Artifact
from harness.engine.stage import BatchOutput as BatchOutput
from harness.engine.stage import Item as Item
from harness.engine.stage import ItemResult as ItemResult

EXECUTORS: dict[str, Callable[[Accelerator], Executor]] = {"inline": Inline}
"""Who may compute batches, by the setting `runtime.executor`."""


def executor_of(name: str, accelerator: Accelerator) -> Executor:
    """The executor that the settings name, on this accelerator."""
    return EXECUTORS[name](accelerator)
