"""The run that is disturbed: small, real, every stage; and what its end is held against.

Knows no fault. A run is judged by what any reader can see: rows, files, manifests, exit codes.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs
from harness.store import Batch, BatchResult, Reader, Store
from tests.faults.injector import Call
from tests.faults.lives import Life, Lives

FLAGS = {
    "limit": "4", "gravity.num_samples": "2", "gravity.stored.max_per_category": "1",
    "gravity.sanity.num_prompts": "1", "gravity.max_new_tokens_greedy": "3", "gravity.max_new_tokens_samples": "3",
    "batching.max_tokens": "96", "runtime.threads": "1", "runtime.device": "cpu",
    "runtime.reserve_disk_gb": "0",
}  # fmt: skip
"""Batches are small, so that there are several a stage."""


def run(root: Path, **more: str) -> list[str]:
    """The command that starts the run or goes on with it."""
    flags = {**FLAGS, "paths.runs": str(root), **more}
    return ["run", *(word for name, value in flags.items() for word in (f"--{name}", value))]


def report(root: Path) -> list[str]:
    return ["report", "latest", "--paths.runs", str(root)]


def looks(root: Path) -> list[list[str]]:
    """What a reader does to see how a run stands."""
    given = ["latest", "--paths.runs", str(root)]
    return [["runs", "--paths.runs", str(root)], ["show", *given], ["verify", *given, "--batches", "0"]]


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed."""

    root: Path
    rows: Mapping[str, str]
    """Of every measured table the hash of its rows."""
    files: Mapping[str, str]
    """Of every artifact and figure its hash; other files that belong there have none."""
    calls: Sequence[Call]

    @property
    def num_run_calls(self) -> int:
        """Calls of `harness run`; the others are the report's."""
        return sum(c.doing != "report" for c in self.calls)


def undisturbed(lives: Lives, root: Path, times: int = 2, **more: str) -> Whole:
    """The run and its report. Its calls are those of a second one: the first measures the certificate."""
    calls: Sequence[Call] = ()
    for place in [root.with_name(f"{root.name}-{n}") for n in range(1, times)] + [root]:
        place.mkdir(parents=True, exist_ok=True)
        lived = lives.live(Life([run(place, **more), report(place)] if times > 1 else [run(place, **more)], place))
        assert lived.exit == 0, lived.errors
        calls = lived.calls
    paths = only_run(root)
    assert paths is not None
    return Whole(root, rows_of(paths), files_of(paths.folder), calls)


def run_that_ended(whole: Whole, root: Path) -> None:
    """A copy of the undisturbed run under `root`, without its report."""
    shutil.copytree(whole.root, root, ignore=shutil.ignore_patterns("report"))


def only_run(root: Path) -> RunPaths | None:
    """The newest run that has a manifest."""
    return next((e.paths for e in list_runs(root) if e.manifest is not None), None)


def rows_of(paths: RunPaths) -> dict[str, str]:
    """Of every measured table a hash of its rows, in the order of their keys, each number with all its bits.

    Rows are read from the results; the snapshot must hold the same."""
    found = []
    for store in (paths.results, paths.live):
        with Reader(store, SCHEMA) as reader:
            tables = {name: repr(reader.table(name)) for name in SCHEMA.measured}
        found.append({name: hashlib.sha256(rows.encode()).hexdigest() for name, rows in tables.items()})
    return {name: digest if digest == found[1][name] else "the snapshot differs" for name, digest in found[0].items()}


_NEED_NOT = ("report/", "working_tree.diff")
"""What a whole run may lack: nobody asked for a report; nobody changed the code. Whether a diff should be there says verify."""
_COMPARED = ("artifacts/", "report/figures/")


def files_of(folder: Path) -> dict[str, str]:
    """Every file of a run by its path; artifacts and figures with their hashes."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if name.startswith(_COMPARED) else ""
        for name, path in sorted(files.items())
    }


def leftovers(root: Path, whole: Whole) -> list[str]:
    """What lies in a folder of one run and should not: unknown files, files that are not what they should be, and
    folders that are no run."""
    found = []
    for entry in list_runs(root):
        if entry.manifest is None:
            found.append(f"a broken run folder: {sorted(files_of(entry.paths.folder)) or 'empty'}")
            continue
        files = files_of(entry.paths.folder)
        found += [
            f"{nameless(name)} is left over" for name in files if name not in whole.files and name != _NEED_NOT[1]
        ]
        found += [f"{name} is missing" for name in whole.files if name not in files and not name.startswith(_NEED_NOT)]
        found += [f"{name} has other bytes" for name in files if files[name] != whole.files.get(name, files[name])]
    if len(list_runs(root)) > 1:
        found.append(f"{len(list_runs(root))} run folders in place of one")
    found += [f"{p.name} lies among the runs" for p in root.glob("*") if not p.is_dir()]
    return found


def nameless(path: str) -> str:
    """A path without what differs from run to run: ids, process numbers, names of hashes."""
    path = re.sub(r"^\d{8}-\d{6}-[^/]*", "RUN", path)
    path = re.sub(r"[0-9a-f]{24}\.safetensors", "HASH.safetensors", path)
    return re.sub(r"\.\d+\.tmp", ".PID.tmp", path)


def kind_of(call: Call) -> str:
    """What sort of file a call concerns."""
    path = nameless(call.path).removeprefix("RUN/")
    if path in (".", "RUN") or path.endswith(".making"):
        return "run folder"
    if "artifacts" in path:
        return "artifact"
    if path.startswith("report"):
        return "report" if call.doing == "report" or "report/" in path else path
    for sign, kind in (
        ("live.duckdb", "snapshot"),
        ("results.duckdb.wal", "log of writes"),
        ("results.duckdb", "results"),
        ("manifest", "manifest"),
        ("seal", "seal"),
        ("logs", "log"),
        ("run.lock", "lock"),
        ("working_tree", "diff"),
    ):
        if sign in path:
            return kind
    return "other: " + path


def put_in_split_store() -> None:
    """The control, in this process: the mark that a batch is done is committed first, then its rows."""
    from harness.commands import launch

    class TwoCommits(Store):
        def commit(self, batch: Batch, result: BatchResult) -> None:
            super().commit(batch, BatchResult(failures=result.failures, tokens=result.tokens))
            with self._transaction():
                for table, rows in result.rows.items():
                    self._insert(table, rows)
                for table, rows in result.updates.items():
                    self._update(table, rows)

    launch.Store = TwoCommits
