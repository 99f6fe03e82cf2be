"""Nobody who looks at a run makes it fail, wait or lose a row; what a killed run left half made is gone at the next start;
and a run ends as it ended, whoever reads what it prints."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.commands import launch, verify
from harness.commands.findings import Check
from harness.errors import RunError
from harness.experiments.gravity.schema import SCHEMA
from harness.files import sweep
from harness.run import ManifestFile, RunPaths, choosing, is_held, list_runs, locked, new_run, read_manifest
from harness.store import Reader, Store, open_copy, reader, seal, snapshot
from tests import gravity
from tests.cases import some_of
from tests.commands import ROWS, harness, only_run, prompt_file, refused
from tests.test_verify import copied, hashes

ROOT = Path(__file__).parents[1]
STAGES = ("--stages", "psem,greedy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    told = harness("run", "--prompts", prompt_file(folder, ROWS[:2]), "--paths.runs", folder / "runs", *STAGES)
    assert told.code == 0, told.err
    return folder


@pytest.fixture
def stopped(made: Path, tmp_path: Path) -> Path:
    """A run that another process began: all its rows, and no end."""
    run = copied(only_run(made / "runs"), tmp_path / "runs")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    return run


def go_on(made: Path, run: Path, *more: object) -> tuple[int, str]:
    told = harness("run", "--prompts", made / "prompts.jsonl", "--paths.runs", run.parent, *STAGES, *more)
    assert only_run(run.parent) == run
    return told.code, told.err


@contextmanager
def beside(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, from when it has printed a line until it is told to end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        if child.returncode is None:
            child.communicate("end\n")


HOLDS = "import sys, duckdb\ncon = duckdb.connect(sys.argv[1], read_only={})\nprint('ready', flush=True)\n" \
        "sys.stdin.readline()\nprint(con.execute('SELECT count(*) FROM psem').fetchall()[0][0])"  # fmt: skip


# -- readers


def test_a_run_goes_on_while_somebody_reads_its_store_and_both_see_all_their_rows(made: Path, stopped: Path) -> None:
    with beside(HOLDS.format(True), stopped / "results.duckdb") as reader:
        code, said = go_on(made, stopped)
        assert code == 0, said
        assert "is being read by somebody: the run goes on with a copy of it" in said
        out, _ = reader.communicate("end\n")
        assert out == "4\n"  # it still has the file that it opened
    with Reader(stopped / "results.duckdb", SCHEMA) as found:
        assert found.query("SELECT count(*) AS n FROM psem") == [{"n": 4}]
    assert harness("verify", stopped.name, "--paths.runs", stopped.parent).code == 0


def test_a_run_does_not_take_the_store_from_somebody_who_writes_it(made: Path, stopped: Path) -> None:
    """The control: a copy would lose what the other one writes."""
    with beside(HOLDS.format(False), stopped / "results.duckdb"):
        code, said = go_on(made, stopped)
    assert code == 2
    assert "cannot be opened as a results store" in said


def test_a_run_goes_on_while_verify_has_its_store_open(made: Path, stopped: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.store import Reader\n"
        "from harness.experiments.gravity.schema import SCHEMA\n"
        "reader = Reader(Path(sys.argv[1]), SCHEMA, threads=1)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "print(reader.query('SELECT count(*) AS n FROM psem')[0]['n'])"
    )
    with beside(code, stopped / "results.duckdb") as verifier:
        assert go_on(made, stopped)[0] == 0
        out, _ = verifier.communicate("end\n")
        assert out == "4\n"


def test_asking_whether_a_run_is_held_keeps_nobody_from_holding_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    assert not is_held(paths)
    with locked(paths):
        assert is_held(paths)
        with pytest.raises(RunError, match=f"pid {os.getpid()}"), locked(paths, patience_s=0.05):
            pass
    assert not is_held(paths)
    with paths.lock.open() as asking:  # a reader's question, that takes a moment
        fcntl.flock(asking, fcntl.LOCK_SH)
        hold = "import sys\nfrom pathlib import Path\nfrom harness.run import RunPaths, locked\nprint('ready', flush=True)\n" \
               "with locked(RunPaths(Path(sys.argv[1])), patience_s=600):\n    print('held')"  # fmt: skip
        with beside(hold, paths.folder) as run:
            fcntl.flock(asking, fcntl.LOCK_UN)
            assert run.communicate()[0] == "held\n"


def test_a_killed_runs_last_rows_are_read_from_a_copy_that_leaves_nothing(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "run", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom harness.store import Store\n"
        "from harness.experiments.gravity.schema import SCHEMA\n"
        "store = Store(Path(sys.argv[1]), SCHEMA)\nstore.publish(store.path.with_name('live.duckdb'))\n"
        "store.event('info', 'note', 'the last')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, folder / "results.duckdb"], cwd=ROOT).returncode == -signal.SIGKILL
    )
    before = hashes(folder)
    assert "results.duckdb.wal" in before
    with Reader(folder / "live.duckdb", SCHEMA) as snapshot:  # the control: the snapshot has not got it
        assert snapshot.query("SELECT message FROM events") == []
    os.environ["TMPDIR"], was = str(temporary), os.environ.get("TMPDIR")
    try:
        tempfile.tempdir = None
        reader = open_copy(folder / "results.duckdb", SCHEMA)
    finally:
        os.environ.pop("TMPDIR") if was is None else os.environ.update(TMPDIR=was)
        tempfile.tempdir = None
    assert reader is not None
    with reader:
        assert list(temporary.iterdir()) == []
        assert reader.query("SELECT message FROM events") == [{"message": "the last"}]
    assert hashes(folder) == before


def test_a_store_that_is_written_while_it_is_copied_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, SCHEMA).close()
    control = open_copy(path, SCHEMA)
    assert control is not None
    control.close()
    copy = reader.shutil.copyfileobj

    def while_written(*given: object) -> None:
        copy(*given)  # type: ignore[arg-type]
        with Store(path, SCHEMA) as store:
            store.event("info", "note", "meanwhile")

    monkeypatch.setattr(reader.shutil, "copyfileobj", while_written)
    assert open_copy(path, SCHEMA) is None


# -- leftovers


def test_what_a_killed_run_left_half_written_is_gone_at_the_next_start(made: Path, stopped: Path) -> None:
    artifacts = stopped / "artifacts" / "attention"
    artifacts.mkdir(parents=True, exist_ok=True)
    left = [artifacts / ".x.safetensors.4194000.tmp", stopped / ".manifest.json.1.tmp", stopped / ".live.duckdb.77.tmp",
            stopped / ".live.duckdb.77.tmp.wal", stopped / "results.duckdb.tmp" / "duckdb_temp_block-0.block"]  # fmt: skip
    kept = [artifacts / "mine.tmp", artifacts / ".hidden", stopped / "notes.txt"]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    aside = stopped.parent / f".{stopped.name}-2.making"
    (aside / "logs").mkdir(parents=True)
    assert go_on(made, stopped)[0] == 0
    assert [p for p in left if p.exists()] == []
    assert all(p.exists() for p in kept)
    assert not aside.exists()
    assert not (stopped / "results.duckdb.tmp").exists()


def test_a_page_that_is_being_written_is_not_swept_away(tmp_path: Path) -> None:
    mine, dead = tmp_path / f".report.html.{os.getpid()}.tmp", tmp_path / ".report.html.4194000.tmp"
    for path in (mine, dead):
        path.touch()
    assert sweep(tmp_path, only_dead=True) == 1
    assert mine.exists()
    assert sweep(tmp_path) == 1


def test_a_sweep_does_not_follow_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere" / ".x.1.tmp"
    outside.touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "artifacts").symlink_to(outside.parent)
    assert sweep(tmp_path / "run") + sweep(tmp_path / "run" / "artifacts") == 0
    assert outside.exists()


@pytest.mark.parametrize("death", [KeyboardInterrupt, OSError])
def test_a_run_whose_making_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: type[BaseException]
) -> None:
    def fails(*_: object) -> None:
        raise death

    monkeypatch.setattr(launch, "write_diff", fails)
    with pytest.raises(death):
        gravity.run(_resolved(tmp_path))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_killed_while_it_is_made_is_not_listed_and_the_next_start_removes_it(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom harness.run import new_run\n" \
           "root = Path(sys.argv[1])\nroot.mkdir()\n" \
           "with new_run(root, 'r', lambda paths, name: os.kill(os.getpid(), signal.SIGKILL)):\n    pass"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code, root], cwd=ROOT).returncode == -signal.SIGKILL
    assert [p.name for p in root.iterdir()] == [".r.making"]
    assert list_runs(root) == []
    with choosing(root):
        assert list(root.iterdir()) == []


def test_a_new_run_appears_with_manifest_store_and_snapshot_and_two_of_one_second_are_two(tmp_path: Path) -> None:
    seen = []

    def lay(paths: RunPaths, run_id: str) -> None:
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == seen
        ManifestFile.create(paths, {"fingerprint": "0"}, run_id)

    for name in ("r", "r-2", "r-3"):
        with new_run(tmp_path, "r", lay) as paths:
            assert paths.run_id == name
            assert read_manifest(paths).run_id == name
            assert is_held(paths)
        seen = sorted([*seen, name])
        assert not is_held(paths)
    assert [e.problem for e in list_runs(tmp_path)] == [None] * 3


def test_a_folder_of_runs_that_cannot_be_written_is_the_machines_fault_in_one_line(tmp_path: Path) -> None:
    """/proc is a folder in which nobody makes another."""
    line = refused(harness("run", "--prompts", prompt_file(tmp_path), "--paths.runs", "/proc", *STAGES), 4)
    assert "paths.runs: cannot write to /proc" in line


@pytest.mark.thorough
def test_two_starts_at_once_make_one_run(made: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "harness",
        "run",
        "--prompts",
        made / "prompts.jsonl",
        "--paths.runs",
        tmp_path,
        *STAGES,
    ]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ended = [(p.communicate(timeout=500), p.returncode) for p in started]
    assert len(list_runs(tmp_path)) == 1, ended
    assert read_manifest(RunPaths(only_run(tmp_path))).status == "finished"
    codes = sorted(code for _, code in ended)
    assert codes[0] == 0
    assert set(codes) <= {0, 2}, ended  # 0 too: one that came when it was finished
    for (_, err), code in ended:
        assert (code == 2) == ("is being computed by another process" in err)


# -- output


def shell(text: str, made: Path, runs: Path) -> subprocess.CompletedProcess[str]:
    """A command line with its redirections, as bash does them; the exit code of the harness."""
    line = text.format(harness=f"{sys.executable} -m harness", run=f"run --prompts {made / 'prompts.jsonl'} "
                       f"--paths.runs {runs} {' '.join(STAGES)}", runs=runs)  # fmt: skip
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=500)


CLOSED: Sequence[tuple[str, str]] = (
    ("{harness} {run} >&- 2>&- <&-", "nowhere"),
    ("{harness} {run} >/dev/full", "log"),
    ("{harness} {run} >&-", "stderr"),
    ("{harness} {run} 2>&-", "stdout"),
    ("{harness} {run} 2>/dev/full", "stdout"),
    ("set -o pipefail; {harness} {run} | true", "log"),
    ("set -o pipefail; {harness} {run} 2>&1 | head -n 1", "nowhere"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "where"),
    some_of(CLOSED, 1),
)
def test_a_run_whose_output_is_closed_ends_as_it_ended(made: Path, tmp_path: Path, line: str, where: str) -> None:
    told = shell(line, made, tmp_path)
    assert told.returncode == 0, told
    run = only_run(tmp_path)
    assert read_manifest(RunPaths(run)).status == "finished"
    assert "Traceback" not in told.stdout + told.stderr
    headline = "Results are in" if where != "log" else "results could not be printed"
    found = {"stderr": told.stderr, "stdout": told.stdout, "log": told.stderr}.get(where)
    assert found is None or headline in found, told
    if where == "log":
        assert "see `harness show" in told.stderr
    for name in ("results.duckdb", "live.duckdb"):  # no line for people was written into a store
        with Reader(run / name, SCHEMA) as reader:
            assert reader.query("SELECT count(*) AS n FROM psem") == [{"n": 4}]
    assert harness("verify", run.name, "--paths.runs", tmp_path, "--batches", 0).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("redirected", some_of([">/dev/full", ">&-", "| true"], 1))
def test_a_run_that_fails_says_so_by_its_exit_code_whoever_listens(made: Path, tmp_path: Path, redirected: str) -> None:
    """A broken pipe once made a failure a success."""
    told = shell(
        f"set -o pipefail; {{harness}} run --prompts nowhere.csv --paths.runs {{runs}} {redirected}", made, tmp_path
    )
    assert told.returncode == 2
    assert "nowhere.csv" in told.stderr


@pytest.mark.slow
def test_a_list_that_cannot_be_printed_is_the_machines_fault_and_one_that_nobody_reads_on_is_not(
    made: Path, tmp_path: Path
) -> None:
    told = shell("{harness} runs --paths.runs {runs} >/dev/full", made, made / "runs")
    assert told.returncode == 4
    assert "nothing more could be printed: No space left on device" in told.stderr
    assert shell("set -o pipefail; {harness} runs --paths.runs {runs} | true", made, made / "runs").returncode == 0


@pytest.mark.slow
@pytest.mark.thorough
def test_a_terminal_that_closes_stops_a_run_as_a_signal_does(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "run", "--prompts", made / "prompts.jsonl", "--paths.runs", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if " done: " in line:  # a stage: it is under way
                break
        run.send_signal(signal.SIGHUP)
        said = run.stderr.read()
    assert run.returncode == 3, said
    assert read_manifest(RunPaths(only_run(tmp_path))).status == "interrupted"


def _resolved(folder: Path):
    from tests.gravity import resolve

    return resolve(
        {"paths.runs": str(folder / "runs"), "data.prompts": str(prompt_file(folder)), "gravity.stages": "psem"}
    )


def test_a_command_that_reads_a_finished_run_opens_its_snapshot_and_copies_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        snapshot, "open_copy", lambda *_, **__: pytest.fail("a finished run has published its last row")
    )
    assert harness("show", "latest", "--paths.runs", made / "runs").code == 0
    assert "no run" in refused(harness("show", "latest", "--paths.runs", made / "nowhere"))


def test_findings_about_a_run_that_went_on_meanwhile_are_not_held_against_it(
    made: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes_on(paths: RunPaths, *_: object) -> Iterator[Check]:
        yield Check("FAIL", "rows", "another row")
        if with_run:
            paths.seal.unlink()  # as a run does that goes on

    monkeypatch.setattr(verify, "examine", goes_on)
    with_run = False
    assert harness("verify", stopped.name, "--paths.runs", stopped.parent).code == 1  # the control
    with_run = True
    told = harness("verify", stopped.name, "--paths.runs", stopped.parent)
    assert told.code == 3
    assert "went on while it was verified" in told.err


def test_a_run_killed_between_its_seal_and_its_last_manifest_is_unfinished_and_not_broken(
    made: Path, tmp_path: Path
) -> None:
    """`verify` once failed on it with hundreds of findings."""
    run = copied(only_run(made / "runs"), tmp_path / "runs")
    whole = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(whole | {"status": "running"}))
    assert (
        harness("verify", run.name, "--paths.runs", run.parent, "--batches", 0).code == 1
    )  # the control: a hand was in it
    before = {k: v for k, v in whole.items() if k not in seal.LAST_KEYS} | {"status": "running"}
    (run / "manifest.json").write_text(json.dumps(before))
    told = harness("verify", run.name, "--paths.runs", run.parent, "--batches", 0)
    assert told.code == 0, told.out
    assert "stopped between its seal and its last manifest: its command finishes it" in told.out
    assert go_on(made, run)[0] == 0
    told = harness("verify", run.name, "--paths.runs", run.parent, "--batches", 0)
    assert "skip seal" not in told.out
    assert told.code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_library_runs_its_own_python_ends_with_3_and_not_by_the_signal(number: signal.Signals) -> None:
    """An hour of soaking met it once: SIGTERM during an import ended a run with SIGINT, after it had said that it stopped."""
    code = (
        "import ctypes, sys\nfrom harness import cli\n"
        f"BODY = b'import os, time\\nos.kill(os.getpid(), {int(number)})\\ntime.sleep(60)'\n"
        "def act(given):\n    run = ctypes.pythonapi.PyRun_StringFlags\n    run.restype = ctypes.py_object\n"
        "    run.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object, ctypes.c_void_p]\n"
        "    return run(BODY, 257, {}, {}, None)\n"
        "cli._act = act\nsys.exit(cli.main(['runs']))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (told.returncode, told.stderr) == (3, "harness: stopped; nothing is lost, type the same command again\n")
