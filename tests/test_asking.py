"""Whatever is asked, the process that answers stays within its limits, and nothing of it is left."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from harness import asking
from harness.errors import StoreError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import ask_locked
from tests import synthetic
from tests.cases import some_of
from tests.synthetic import Shape

ENDLESS = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range < -1"
LONG_CALL = "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000))"
"""One call of a function, some minutes long, in which DuckDB does not look at the clock."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.write(tmp_path_factory.mktemp("runs"), Shape(6, 2, 2, 2, num_bootstraps=20))


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children(recursive=True) if "harness.asking" in " ".join(_argv(c))]


def _argv(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def descriptors() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")
    }


def complaint(live: Path, sql: str, limit_s: float = 1.0, memory_bytes: int = asking.MEMORY_BYTES) -> str:
    """What is said where no answer comes: one line."""
    with pytest.raises(StoreError) as caught:
        asking.answer(live, SCHEMA, sql, limit_s=limit_s, memory_bytes=memory_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def busy(asked: Future) -> psutil.Process:
    """The process that answers, once it is at work."""
    while True:
        assert not asked.done(), asked.exception()
        for child in children():
            with contextlib.suppress(psutil.Error):
                if child.cpu_times().user > 0.5:
                    return child
        time.sleep(0.02)


@pytest.fixture
def one_answering(paths: RunPaths) -> Iterator[tuple[psutil.Process, Future]]:
    """A process that is busy with an endless question, and what comes of it."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asking.answer, paths.live, SCHEMA, ENDLESS, 1_000, 300.0)
        try:
            yield busy(asked), asked
        finally:
            for child in children():
                child.kill()


# -- answers


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM contexts ORDER BY ALL",
        "SELECT * FROM prompts WHERE false",
        "SELECT 1 AS a, 2 AS a",
        "SELECT 170141183460469231731687303715884105727::HUGEINT AS h, 'a'::BLOB AS b, INTERVAL 1 DAY AS i, '101'::BIT AS bits, "
        "'{}'::JSON AS j, TIMETZ '10:00:00+02' AS t, DATE '2026-01-02' AS d, [NULL, 'é\n'] AS l, {'a': 1} AS s, MAP {1: 2} AS m, "
        "'a'::ENUM ('a', 'b') AS e, 1.50::DECIMAL(9, 2) AS c, NULL AS n, 'NaN'::DOUBLE AS nan",
    ],
)  # fmt: skip
def test_an_answer_comes_back_as_it_would_without_the_process(sql: str, paths: RunPaths) -> None:
    here, there = ask_locked(paths.live, SCHEMA, sql), asking.answer(paths.live, SCHEMA, sql)
    assert there.rows.schema == here.rows.schema
    assert str(there.rows.to_pylist()) == str(here.rows.to_pylist())  # as text: NaN is not equal to itself
    assert there.is_cut == here.is_cut


def test_an_answer_is_cut_at_so_many_rows_and_says_so(paths: RunPaths) -> None:
    cut = asking.answer(paths.live, SCHEMA, "FROM range(51)", 50)
    assert (len(cut.rows), cut.is_cut) == (50, True)


@pytest.mark.parametrize(
    "sql", ["SELECT * FROM nowhere", "DROP TABLE prompts", "SELECT 1; SELECT 2", "", "\x00", "SELECT '"]
)
def test_a_wrong_question_gets_the_line_it_would_get_without_the_process(sql: str, paths: RunPaths) -> None:
    with pytest.raises(StoreError) as here:
        ask_locked(paths.live, SCHEMA, sql)
    assert complaint(paths.live, sql, 30.0) == str(here.value)


def test_a_question_that_is_longer_than_a_pipe_holds_is_refused_and_nobody_waits_for_nobody(paths: RunPaths) -> None:
    assert "20,000 characters" in complaint(paths.live, "é" * 2_000_000, 30.0)


@pytest.mark.parametrize("kind", ["missing", "link", "folder", "pipe", "text"])
def test_what_is_no_snapshot_is_told_by_its_name(kind: str, paths: RunPaths, tmp_path: Path) -> None:
    live = tmp_path / "live.duckdb"
    if kind == "link":
        live.symlink_to(paths.live)
    elif kind == "folder":
        live.mkdir()
    elif kind == "pipe":
        os.mkfifo(live)
    elif kind == "text":
        live.write_text("no database")
    said = complaint(live, "SELECT 1", 30.0)
    assert said.startswith(f"{live}: ")
    assert ("no snapshot yet" in said) == (kind == "missing")
    assert "/proc/" not in said


# -- limits


RUNAWAY = {
    "a cell of 1 GB": "SELECT repeat('x', 1000000000) AS x",
    "a text of 2 GB": "SELECT length(repeat('x', 2000000000))",
    "an edit distance": LONG_CALL,
    "another edit distance": "SELECT damerau_levenshtein(repeat('a', 30000), repeat('b', 30000))",
    "padding": "SELECT lpad('x', 2000000000, 'y')",
    "printf": "SELECT printf('%2000000000d', 1)",
    "format": "SELECT format('{:2000000000}', 1)",
    "a list": "SELECT range(300000000)",
    "a list of texts": "SELECT length(list_transform(range(20000000), lambda x: repeat('x', 1000)))",
    "a reduction": "SELECT list_reduce(range(1000000000), lambda x, y: x + y)",
    "a regular expression": "SELECT regexp_extract_all(repeat('ab', 20000000), 'a')",
    "a product": "SELECT (repeat('9', 400000)::BIGNUM * repeat('9', 400000)::BIGNUM)::VARCHAR",
    "bits": "SELECT bit_count(repeat('1', 1000000000)::BIT)",
    "joined texts": "SELECT string_agg(repeat('x', 1000000), '') FROM range(5000)",
    "a recursion": "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "a recursion that doubles": "WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
    "a product of tables": ENDLESS,
}  # fmt: skip
ENDS = ("stopped after 1 s: ", "needed more than 1 GB of memory: ", "the process that answered died: ", "expected ")


@pytest.mark.parametrize("what", some_of(RUNAWAY, 4))
def test_a_question_that_runs_away_ends_in_a_line(what: str, paths: RunPaths) -> None:
    """The outer bound is for a busy machine: on a quiet one they end within 0.6 s of the limit."""
    start = time.perf_counter()
    assert complaint(paths.live, RUNAWAY[what]).startswith(ENDS)
    assert time.perf_counter() - start < 90
    assert children() == []


def test_a_cell_that_is_bigger_than_an_answer_may_be_is_refused(paths: RunPaths) -> None:
    assert "at most 64 MB" in complaint(paths.live, "SELECT repeat('x', 100000000) AS x", 60.0)
    assert (
        len(asking.answer(paths.live, SCHEMA, "SELECT repeat('x', 50000000) AS x", limit_s=60.0).rows) == 1
    )  # control


@pytest.mark.thorough
def test_the_limit_of_addresses_is_what_stops_a_text_that_the_machine_could_hold(paths: RunPaths) -> None:
    sql = "SELECT length(repeat('x', 700000000)) AS n"
    assert "memory" in complaint(paths.live, sql, 120.0, 3 * 2**29)
    assert asking.answer(paths.live, SCHEMA, sql, limit_s=120.0, memory_bytes=2**33).rows["n"].to_pylist() == [
        700_000_000
    ]


def test_the_clock_is_what_stops_a_long_call(paths: RunPaths) -> None:
    sql = "SELECT levenshtein(repeat('a', 20000), repeat('b', 20000)) AS n"
    assert complaint(paths.live, sql, 0.05).startswith("stopped after 0.05 s")
    assert asking.answer(paths.live, SCHEMA, sql, limit_s=120.0).rows["n"].to_pylist() == [20_000]


def test_more_than_an_answer_may_be_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other side sends: the bound is ours as well."""
    monkeypatch.setattr(asking, "MAX_SENT_BYTES", 1_000_000)
    ours, theirs = socket.socketpair()
    sent = 0

    def flood() -> None:
        nonlocal sent
        with theirs:
            try:
                while sent < 2**28:
                    sent += theirs.send(bytes(2**16))
            except OSError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    with ours, pytest.raises(StoreError, match="at most 1 MB"):
        asking._received(ours, time.monotonic() + 60)
    thread.join(60)
    assert sent < 2**24


@pytest.mark.parametrize("sent", [b"", b"\x00", (99).to_bytes(8, "little") + b"x", b"x" * 100])
def test_an_answer_that_is_cut_off_is_none(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(sent)
        assert asking._received(ours, time.monotonic() + 60) is None


def test_an_answer_that_is_no_answer_is_told() -> None:
    for parts in ([b"\x10" + bytes(15)], asking._packed({}), asking._packed({"is_cut": 0, "seconds": 1}, b"no Arrow")):
        with pytest.raises(StoreError, match="sent something else"):
            asking._read(bytearray(b"".join(parts)), "y")


# -- what the process has, and what it leaves


def test_the_process_has_its_limits_few_files_and_nearly_no_environment(
    one_answering: tuple[psutil.Process, Future], paths: RunPaths
) -> None:
    child, _ = one_answering
    told = Path(f"/proc/{child.pid}/limits").read_text()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in told.splitlines()[1:]}
    assert limits["Max address space"] == [str(asking.MEMORY_BYTES)] * 2
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == ["64", "64"]
    assert limits["Max cpu time"][0] == limits["Max cpu time"][1] != "unlimited"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != asking.MEMORY_BYTES, "the control: not those of this process"
    opened = {os.readlink(f"/proc/{child.pid}/fd/{n}") for n in os.listdir(f"/proc/{child.pid}/fd")}
    files = {name for name in opened if name.startswith("/") and name != "/dev/null"}
    assert files == {str(paths.live.resolve())}
    assert all(name.startswith(("/", "socket:")) for name in opened)
    assert set(child.environ()) <= {"PYTHONPATH", "LC_ALL", "OMP_NUM_THREADS", *asking._HANDED_ON}
    assert child.num_threads() < 32  # whatever the number of cores
    modules = Path(f"/proc/{child.pid}/maps").read_text()
    assert "libtorch" not in modules
    assert "pandas" not in modules
    assert "libarrow" in modules  # control


def test_a_process_that_is_killed_from_outside_is_a_line(one_answering: tuple[psutil.Process, Future]) -> None:
    child, asked = one_answering
    child.kill()
    with pytest.raises(StoreError, match="the process that answered died: SIGKILL"):
        asked.result(60)


def test_a_process_that_hangs_is_killed_all_the_same(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "START_S", 3.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asking.answer, paths.live, SCHEMA, ENDLESS, 1_000, 3.0)
        found: list[psutil.Process] = []
        while not asked.done() and not (found := children()):
            time.sleep(0.001)
        found[0].suspend()  # before it began, or while it answers
        with pytest.raises(StoreError, match=r"stopped after 3 s|did not begin within 3 s"):
            asked.result(90)
    assert children() == []


def test_a_process_that_cannot_begin_is_a_line(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "died: exit code" in complaint(paths.live, "SELECT 1", 5.0, 2**25)  # Python itself does not fit
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "could not be started: No such file" in complaint(paths.live, "SELECT 1")


def test_the_process_ends_with_the_one_that_asked(paths: RunPaths) -> None:
    question = f"asking.answer(pathlib.Path({str(paths.live)!r}), SCHEMA, {ENDLESS!r}, 9, 500.0)"
    begin = "import pathlib; from harness import asking; from harness.experiments.gravity.schema import SCHEMA"
    code = f"{begin}; {question}"
    asker = psutil.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        while not (found := asker.children()) or found[0].cpu_times().user < 0.5:
            assert asker.poll() is None
            time.sleep(0.02)
        asker.send_signal(signal.SIGKILL)
        asker.wait(60)
        psutil.wait_procs(found, 60)
        assert not found[0].is_running()
    finally:
        if asker.poll() is None:
            asker.kill()


def test_without_a_parent_the_process_does_not_even_begin(paths: RunPaths) -> None:
    """Its parent died before it could ask the system to end it with its parent."""
    ours, theirs = socket.socketpair()
    with ours, theirs, paths.live.open("rb") as snapshot:
        told = [str(v) for v in (theirs.fileno(), snapshot.fileno(), os.getppid(), 1.0, asking.MEMORY_BYTES)]
        done = subprocess.run(
            [sys.executable, "-m", "harness.asking", *told], cwd=Path(__file__).parents[1], timeout=120,
            pass_fds=(theirs.fileno(), snapshot.fileno()),
        )  # fmt: skip
    assert done.returncode == 1


def test_a_question_that_waits_for_its_turn_is_answered_in_the_end(paths: RunPaths) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(asking.answer, paths.live, SCHEMA, f"SELECT {n} AS n") for n in range(6)]
        assert [a.result(120).rows["n"].to_pylist() for a in asked] == [[n] for n in range(6)]
        assert all(isinstance(a.result().rows, pa.Table) for a in asked)


@pytest.mark.slow
@pytest.mark.thorough
def test_many_questions_that_run_away_leave_nothing(paths: RunPaths) -> None:
    """From four threads at once: no process, no descriptor, no thread, no file, no memory."""
    questions = [q for q in RUNAWAY.values() for _ in range(2)]

    def ask(sql: str) -> str:
        return complaint(paths.live, sql, 0.2)

    def state() -> tuple[set[str], set[str], int]:
        files = {str(p) for p in paths.folder.parent.rglob("*")} | set(os.listdir())
        files |= {name for name in os.listdir(tempfile.gettempdir()) if "duckdb" in name}  # others write there too
        return descriptors(), files, threading.active_count()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, questions[::4]))
    before, memory = state(), psutil.Process().memory_info().rss
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(ask, questions))) == 2 * len(RUNAWAY) > 30
    assert children() == []
    opened, files, threads = state()
    assert len(opened) <= len(before[0])
    assert (files, threads) == before[1:]
    assert psutil.Process().memory_info().rss - memory < 30e6
