"""What the batches of a `fold` or `loop` hand on: one artifact after another, found again after any kill.

Knows where states lie and which one a batch goes on from; what is in them is the stage's.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from harness.engine.plan import Plan
from harness.engine.stage import Keeps
from harness.engine.staging import drop_if_empty, files_below
from harness.engine.tables import FileHandle
from harness.store import Batch, Row

_NUMBERED = re.compile(r"state-(\d{6,})")


class States:
    """The states of one stage. A batch rests on the one that stands nearest before it in the plan's order."""

    def __init__(self, stage: str, plan: Plan, artifacts: Path, rows: Iterable[Row], keeps: Keeps):
        """`rows`: those of the table `artifacts`, of any stage."""
        self._stage, self._plan, self._artifacts, self._keeps = stage, plan, artifacts, keeps
        self._paths: dict[int, str] = {}
        self._handles: dict[int, FileHandle] = {}
        for row in rows:
            if (number := self._number(row["path"])) is not None:
                self._keep(number, row)

    def sweep(self) -> int:
        """Remove states that no row tells of: their batch was killed before it was committed, or they were let go."""
        known = set(self._paths.values())
        num = 0
        for path in list(files_below(self._artifacts / self._stage)):
            name = path.relative_to(self._artifacts).as_posix()
            if self._number(name) is not None and name not in known:
                path.unlink(missing_ok=True)
                drop_if_empty([path.parent])
                num += 1
        return num

    def before(self, batch: Batch) -> FileHandle | None:
        """What a batch goes on from; None for the first."""
        number = self._before(batch)
        return None if number is None else self._handles[number]

    def path(self, batch: Batch, name: str) -> str:
        """Where the state of a batch lies: a place of its own, so that the one it rests on is there until it is sure."""
        assert "/" not in name, f"{name}: expected a state's path to be a name alone"
        return f"{self._stage}/state-{batch.batch_id:06d}/{name}"

    def gone_after(self, batch: Batch) -> str | None:
        """The path of the state that nobody needs once this batch's own is committed; None where all are kept."""
        number = self._before(batch)
        return None if number is None or self._keeps == "all" else self._paths[number]

    def committed(self, batch: Batch, row: Row) -> None:
        """A batch's state is in the store, and the one that it made needless is not: its file goes."""
        gone = self._before(batch) if self._keeps == "last" else None
        self._keep(batch.batch_id, row)
        if gone is not None:
            path = self._handles.pop(gone).path
            del self._paths[gone]
            path.unlink(missing_ok=True)
            drop_if_empty([path.parent])

    def has(self, path: str) -> bool:
        """Whether a state lies there."""
        return path in self._paths.values()

    def is_before_known(self, batch: Batch) -> bool:
        """Whether what a batch went on from is still there, or there was nothing."""
        return self._keeps == "all" or all(
            b.status != "done" or self._plan.place(b) >= self._plan.place(batch) for b in self._plan
        )

    def is_own(self, path: str) -> bool:
        """Whether a path is one of those that states have."""
        return self._number(path) is not None

    def _keep(self, number: int, row: Row) -> None:
        self._paths[number] = row["path"]
        self._handles[number] = FileHandle((self._artifacts / row["path"]).absolute(), row["sha256"], row["bytes"])

    def _before(self, batch: Batch) -> int | None:
        place = self._plan.place(batch)
        earlier = [(self._plan.place(self._plan[n]), n) for n in self._paths]
        return max((found for found in earlier if found[0] < place), default=((), None))[1]

    def _number(self, path: str) -> int | None:
        stage, _, rest = path.partition("/")
        found = _NUMBERED.fullmatch(rest.split("/")[0]) if stage == self._stage else None
        return int(found[1]) if found else None
