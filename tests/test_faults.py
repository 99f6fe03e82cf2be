"""Killed or refused at exactly one system call, a run ends with the rows of one that was not; `python -m tests.faults` does more.

The laws of the injector are tested on a process that writes three small files, the laws of a run on real ones.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults import injector, kills, memory, processes, storage
from tests.faults.experiment import Whole, kind_of, leftovers, rows_of, undisturbed
from tests.faults.injector import Call, Fault, journal_of
from tests.faults.lives import ROOT, Life, Lives

pytestmark = pytest.mark.skipif(injector.why_not() is not None, reason=str(injector.why_not()))


# -- the injector


WRITES = """
import json, os, sys
from pathlib import Path
from tests.faults.injector import Fault, arm, mark
folder, journal, fault = Path(sys.argv[1]), Path(sys.argv[2]), Fault.of_json(json.loads(sys.argv[3]))
arm(folder, journal, fault)
for name in "abc":
    mark(name)
    try:
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        written = os.write(file, 10 * name.encode())
        if written < 10:
            os.write(file, (10 - written) * name.encode())
        os.fsync(file)
        os.close(file)
    except OSError as e:
        print(name, e.errno, flush=True)
(folder.parent / "elsewhere").write_text("not counted")
"""
"""Three calls a file: open, write, fsync."""


class Wrote(NamedTuple):
    """What the small process left."""

    exit: int
    files: dict[str, str]
    calls: list[Call]
    output: str


def writes(folder: Path, fault: Fault) -> Wrote:
    """The small process, with this fault."""
    to = folder / "files"
    to.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(to), str(folder / "journal"), json.dumps(fault.to_json())],
        cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(injector.compiled())}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    files = {p.name: p.read_text() for p in sorted(to.iterdir())}
    return Wrote(done.returncode, files, journal_of(folder / "journal"), done.stdout)


WRITTEN = {name: 10 * name for name in "abc"}


def test_calls_on_files_of_the_folder_are_counted_and_named_and_nothing_else_is(tmp_path: Path) -> None:
    wrote = writes(tmp_path, Fault())
    assert (wrote.exit, wrote.files) == (0, WRITTEN)
    assert [(c.number, c.doing, c.name, c.path, c.size) for c in wrote.calls] == [
        (3 * n + i, name, call, name, 10 if call == "write" else 0)
        for n, name in enumerate("abc")
        for i, call in enumerate(("open", "write", "fsync"), 1)
    ]
    assert not any(c.is_hit for c in wrote.calls)
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("at", range(1, 10))
def test_a_kill_comes_before_exactly_that_call(tmp_path: Path, at: int) -> None:
    wrote = writes(tmp_path, Fault(at, "kill"))
    assert wrote.exit == -signal.SIGKILL
    assert [c.number for c in wrote.calls] == list(range(1, at + 1)), "the journal ends with the call it died at"
    assert [c.number for c in wrote.calls if c.is_hit] == [at]
    whole, opened = (at - 1 + 1) // 3, (at - 1 + 2) // 3  # the second call of three writes
    assert wrote.files == {name: 10 * name if n < whole else "" for n, name in enumerate("abc") if n < opened}


def test_a_torn_write_leaves_half_of_its_bytes(tmp_path: Path) -> None:
    wrote = writes(tmp_path, Fault(5, "torn"))
    assert (wrote.exit, wrote.files) == (-signal.SIGKILL, {"a": 10 * "a", "b": 5 * "b"})


def test_a_call_fails_once_or_from_then_on_with_the_error_that_was_asked_for(tmp_path: Path) -> None:
    once = writes(tmp_path / "once", Fault(4, "fail", "EROFS"))
    assert (once.exit, once.output, once.files) == (0, "b 30\n", {"a": 10 * "a", "c": 10 * "c"})
    lasting = writes(tmp_path / "lasting", Fault(4, "fail", "ENOSPC", is_lasting=True))
    assert (lasting.exit, lasting.output, lasting.files) == (0, "b 28\nc 28\n", {"a": 10 * "a"})


def test_a_short_write_is_followed_by_failures(tmp_path: Path) -> None:
    wrote = writes(tmp_path, Fault(2, "short", "ENOSPC", is_lasting=True, calls=("open", "write")))
    assert (wrote.output, wrote.files) == ("a 28\nb 28\nc 28\n", {"a": 5 * "a"})


def test_only_calls_and_files_that_were_asked_for_are_counted(tmp_path: Path) -> None:
    wrote = writes(tmp_path, Fault(2, "fail", calls=("sync",), files="[bc]"))
    assert wrote.output == "c 5\n"
    assert [(c.name, c.path) for c in wrote.calls] == [("fsync", "b"), ("fsync", "c")]


# -- the run


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives() as lives:
        yield lives


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that nobody disturbed."""
    return undisturbed(lives, tmp_path_factory.mktemp("whole") / "run")


KINDS = {"run folder", "lock", "log", "results", "log of writes", "manifest", "snapshot", "artifact", "seal", "report"}
STAGES = {"sanity", "psem", "greedy", "samples", "detect", "mechanism", "patching", "analysis", "report"}


@pytest.mark.thorough
def test_the_injector_sees_every_kind_of_file_in_every_stage_of_a_run(whole: Whole) -> None:
    assert {kind_of(c) for c in whole.calls} - {"diff"} == KINDS
    assert {c.doing for c in whole.calls} >= STAGES


@pytest.mark.thorough
def test_an_undisturbed_run_has_the_same_rows_each_time_and_with_another_seed_other_ones(
    lives: Lives, whole: Whole, tmp_path: Path
) -> None:
    again = undisturbed(lives, tmp_path / "again")
    assert again.rows == whole.rows
    assert leftovers(again.root, whole) == []
    assert undisturbed(lives, tmp_path / "other", 2, **{"runtime.seed": "1"}).rows != whole.rows


@pytest.fixture(scope="module")
def killed(lives: Lives, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> list[kills.Killed]:
    """Twelve kills, every fourth killed again as it goes on."""
    return kills.kill_often(lives, tmp_path_factory.mktemp("kills"), whole, kills.places(whole.calls, 12, 0), 0)


@pytest.mark.thorough
def test_killed_at_any_call_a_run_ends_with_the_same_rows(killed: list[kills.Killed]) -> None:
    assert all(k.is_killed for k in killed)
    assert len({k.doing for k in killed}) >= 4
    assert all(k.is_identical for k in killed), [k for k in killed if not k.is_identical]
    assert [f for k in killed for f in k.findings if "does not go on" in f] == []


@pytest.mark.thorough
def test_killed_at_any_call_a_run_leaves_nothing_behind_and_readers_nothing_to_complain_of(
    killed: list[kills.Killed],
) -> None:
    assert [f for k in killed for f in k.findings] == []


@pytest.mark.thorough
def test_a_store_that_commits_in_two_steps_is_caught(lives: Lives, whole: Whole, tmp_path: Path) -> None:
    """The control: between the mark and the rows lies a call, and a kill there costs rows."""
    split = Life([kills.run(tmp_path / "split")], tmp_path / "split", store="split")
    split.folder.mkdir()
    lived = lives.live(split)
    assert lived.exit == 0, lived.errors
    commits = [c for c in lived.calls if c.doing == "psem" and kind_of(c) == "log of writes"]
    found = [
        kills.kill_at(lives, tmp_path / str(c.number), Fault(c.number, "kill"), whole, store="split")
        for c in commits[:8]
    ]
    assert all(k.is_killed for k in found)
    assert any(not k.is_identical for k in found)


@pytest.fixture(scope="module")
def refused(lives: Lives, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> list[storage.Refused]:
    """Twelve failing calls."""
    drawn = list(enumerate(storage.faults(whole.calls, 12, 0)))
    return storage.refuse_often(lives, tmp_path_factory.mktemp("storage"), whole, drawn)


@pytest.mark.thorough
def test_after_any_failing_call_the_same_command_ends_with_the_same_rows(refused: list[storage.Refused]) -> None:
    assert sum(r.is_refused for r in refused) >= 11
    assert len({r.error for r in refused}) >= 4
    assert all(r.is_identical for r in refused), [r for r in refused if not r.is_identical]
    assert [f for r in refused for f in r.findings if "exit 0, and" in f] == [], "no success with rows missing"


@pytest.mark.thorough
def test_any_failing_call_is_told_in_one_line_with_the_code_of_a_machine_at_fault(
    refused: list[storage.Refused],
) -> None:
    assert [(r.exit, f) for r in refused for f in r.findings] == []


@pytest.mark.thorough
@pytest.mark.parametrize("state", ["new", "stopped"])
def test_of_three_processes_that_start_a_run_at_once_one_computes_it_while_readers_read(
    lives: Lives, whole: Whole, tmp_path: Path, state: str
) -> None:
    crowd = processes.start_together(lives, tmp_path / "runs", whole, 3, state, num_readers=6)
    assert crowd.num_reads > 0
    assert (crowd.is_identical, crowd.findings) == (True, [])


@pytest.mark.thorough
def test_with_too_little_memory_a_run_says_so_and_goes_on_when_it_has_enough(
    lives: Lives, whole: Whole, tmp_path: Path
) -> None:
    little = memory.cramp(lives, tmp_path / "little", whole, 16)
    enough = memory.cramp(lives, tmp_path / "enough", whole, 8_192)
    assert little.exit != 0
    assert (enough.exit, enough.findings) == (0, []), "the control"
    assert little.is_identical
    assert little.findings == []


@pytest.mark.thorough
def test_readers_read_the_same_rows_from_the_results_and_from_the_snapshot(whole: Whole) -> None:
    paths = kills.only_run(whole.root)
    assert paths is not None
    assert "the snapshot differs" not in rows_of(paths).values()
