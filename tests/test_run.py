"""What a run is: fingerprint, id, folder, manifest and lock."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import RunError
from harness.files import replacing
from harness.run import (
    ManifestFile,
    RunPaths,
    find_run,
    fingerprint,
    list_runs,
    locked,
    manifest_file,
    new_run_id,
    read_manifest,
    state,
)
from harness.run.differences import ABSENT, Difference, differences
from tests.commands import saying

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)

NAMES = st.text("abcdef_", min_size=1, max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.dictionaries(NAMES, st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
), max_size=4)  # fmt: skip


def reversed_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: reversed_keys(value) for key, value in reversed(tree.items())}
    return [reversed_keys(v) for v in tree] if isinstance(tree, list) else tree


def with_other_leaf(tree: Any, at: int) -> tuple[Any, int]:
    """The tree with its `at`-th leaf replaced by something it cannot be; and how many leaves were passed."""
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        changed, passed = [], 0
        for key, value in pairs:
            new, n = with_other_leaf(value, at - passed)
            changed.append((key, new))
            passed += n
        return (dict(changed) if isinstance(tree, dict) else [v for _, v in changed]), passed
    return ("another value" if at == 0 else tree), 1


# -- identity


@settings(deadline=None, derandomize=True)
@given(TREES)
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(tree: dict[str, Any]) -> None:
    assert fingerprint(tree) == fingerprint(reversed_keys(tree))
    assert fingerprint(tree) == fingerprint(json.loads(json.dumps(tree)))  # nor on a round trip through a manifest


@settings(deadline=None, derandomize=True)
@given(TREES, st.data())
def test_the_fingerprint_changes_with_any_value_and_the_difference_has_a_name(
    tree: dict[str, Any], data: st.DataObject
) -> None:
    _, num_leaves = with_other_leaf(tree, -1)
    other, _ = with_other_leaf(tree, data.draw(st.integers(0, num_leaves - 1)))
    if tree:
        assert fingerprint(tree) != fingerprint(other)
        assert differences(tree, other)
    assert differences(tree, tree) == []


def test_the_order_of_a_list_and_an_added_key_are_part_of_the_fingerprint() -> None:
    assert fingerprint({"stages": ["a", "b"]}) != fingerprint({"stages": ["b", "a"]})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1, "b": None})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len(fingerprint({})) == 64


@given(
    st.lists(st.datetimes(datetime(2000, 1, 1), datetime(2099, 12, 31)), min_size=2, max_size=5), st.text(max_size=40)
)
@settings(deadline=None, derandomize=True)
def test_run_ids_sort_by_time_and_are_plain_folder_names(times: list[datetime], slug: str) -> None:
    times = sorted({t.replace(microsecond=0) for t in times})
    ids = [new_run_id(slug, fingerprint({"n": i}), t) for i, t in enumerate(times)]
    assert ids == sorted(ids)
    for run_id in ids:
        assert "/" not in run_id
        assert not run_id.startswith(".")
        assert len(run_id.encode()) < 200
        assert run_id.split() == [run_id]


def test_a_run_id_tells_its_time_its_subject_and_its_fingerprint() -> None:
    assert new_run_id("Qwen2.5-7B Instruct!", "0123456789abcdef", NOW) == "20260301-120000-qwen2-5-7b-instruct-01234567"
    assert new_run_id("///", "0123456789abcdef", NOW) == "20260301-120000-run-01234567"


# -- differences


def test_differences_name_each_leaf_with_its_old_and_new_value() -> None:
    old = {"model": {"name": "a", "dtype": "float32"}, "seed": 0, "stages": [{"name": "psem", "version": 1}]}
    new = {"model": {"name": "b", "dtype": "float32"}, "seed": 0, "stages": [{"name": "psem", "version": 2}]}
    assert differences(old, new) == [Difference("model.name", "a", "b"), Difference("stages.psem.version", 1, 2)]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": [1, 2]}}) == [Difference("a.c", ABSENT, [1, 2])]
    added = differences({"stages": []}, {"stages": [{"name": "lens", "version": 1}]})
    assert {"stages.lens.name", "stages.lens.version"} <= {d.key for d in added}


def test_a_key_that_is_new_and_empty_is_a_difference_too() -> None:
    """`None` there and nothing there give two fingerprints: the message must be able to say why."""
    assert fingerprint({"a": 1}) != fingerprint({"a": 1, "limit": None})
    assert [d.key for d in differences({"a": 1}, {"a": 1, "limit": None})] == ["limit"]


def test_what_comes_back_from_a_manifest_does_not_differ_from_what_went_in() -> None:
    """A tuple comes back as a list; only true changes may be named when a resume is refused."""
    parts = {"psem": {"cases": ("lower", "Title"), "grid": [(1, 2)]}, "path": Path("a/b")}
    stored = json.loads(json.dumps(parts, default=str))
    assert fingerprint(stored) == fingerprint(parts)
    assert differences(stored, parts) == []


# -- finding runs


def make_run(root: Path, name: str, **content: Any) -> RunPaths:
    paths = RunPaths(root / name)
    ManifestFile.create(paths, {"fingerprint": "f" * 64, **content})
    return paths


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("20260101-000000-demo-aaaaaaaa", "20260102-000000-demo-bbbbbbbb", "20260102-000000-qwen-cccccccc"):
        make_run(tmp_path, name)
    (tmp_path / "20260103-000000-broken-dddddddd").mkdir()
    (tmp_path / "20260103-000000-broken-dddddddd" / "manifest.json").write_text("{half a manif")
    (tmp_path / "LOG.md").write_text("not a run")
    return tmp_path


def test_a_run_is_found_by_its_id_a_unique_prefix_or_as_the_latest(runs: Path) -> None:
    full = "20260102-000000-qwen-cccccccc"
    for wanted in (full, "20260102-000000-q", "latest"):
        assert find_run(runs, wanted) == RunPaths(runs / full)
    assert find_run(runs, "20260101").run_id == "20260101-000000-demo-aaaaaaaa"
    make_run(runs, full + "-2")  # an id that is a prefix of another still means itself
    assert find_run(runs, full).run_id == full


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("20260102", "2 runs begin so: 20260102-000000-"),
        ("2027", "found none among 3"),
        ("", "found none"),
        ("20260103-000000-broken-dddddddd", "not readable as JSON"),
        ("../elsewhere", "found none"),
    ],
)
def test_a_run_that_cannot_be_found_is_refused_in_one_line(runs: Path, wanted: str, said: str) -> None:
    with pytest.raises(RunError, match=said) as caught:
        find_run(runs, wanted)
    assert "\n" not in str(caught.value)


def test_without_any_run_the_message_says_how_to_start_one(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "not there"):
        assert list_runs(root) == []
        with pytest.raises(RunError, match="harness run"):
            find_run(root, "latest")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "found none"), (b"", "not readable"), (b"{half", "not readable"), (b"\xff\xfe\x00", "not readable"),
        (b"[1, 2]", "something else"), (b'{"run_id": "x"}', "something else"), (b"null", "something else"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_an_entry_with_its_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    make_run(tmp_path, "20260101-000000-good-aaaaaaaa")
    broken = tmp_path / "20260102-000000-broken-bbbbbbbb"
    broken.mkdir()
    if content is not None:
        (broken / "manifest.json").write_bytes(content)
    first, second = list_runs(tmp_path)  # newest first
    assert (first.paths.folder, first.manifest) == (broken, None)
    assert reason in str(first.problem)
    assert second.problem is None
    assert second.manifest is not None
    assert find_run(tmp_path, "latest").run_id.startswith("20260101")


def test_a_manifest_that_is_a_folder_is_a_broken_run(tmp_path: Path) -> None:
    (tmp_path / "x" / "manifest.json").mkdir(parents=True)
    assert "not readable" in str(list_runs(tmp_path)[0].problem)


# -- files written whole


def test_replacing_puts_the_whole_file_in_place_or_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "it's a file.json"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of tw")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]  # nothing is left beside it
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing written: an error, and the old file stays
    assert path.read_text() == "one"


def test_two_threads_replacing_one_file_do_not_mix(tmp_path: Path) -> None:
    """The heartbeat and the stages write one manifest: whichever is last, the file is one of the two, whole."""
    manifest = ManifestFile.create(RunPaths(tmp_path / "r"), {"fingerprint": "f"})

    def write(name: str) -> None:
        for i in range(40):
            manifest.update(**{name: i + 1, "reason": name * 2_000})

    threads = [threading.Thread(target=write, args=(name,)) for name in ("threads", "num_failed")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = read_manifest(manifest.paths)
    assert (stored.threads, stored.num_failed) == (40, 40)


def test_a_manifest_is_read_whole_while_it_is_being_written(tmp_path: Path) -> None:
    manifest = ManifestFile.create(RunPaths(tmp_path / "r"), {"fingerprint": "f", "num_failed": 0, "seconds": 0})
    stop, seen, torn = threading.Event(), set(), []

    def read(path: Path) -> None:
        while not stop.is_set():
            try:
                content = json.loads(path.read_text("utf-8"))
                seen.add(content["num_failed"])
                torn.extend([content] if content["num_failed"] != content["seconds"] else [])
            except ValueError as e:
                torn.append(e)

    reader = threading.Thread(target=read, args=(manifest.paths.manifest,))
    reader.start()
    for n in range(150):
        manifest.update(num_failed=n, reason="x" * 20_000, seconds=n)
    stop.set()
    reader.join()
    assert torn == []
    assert len(seen) > 3

    # Control: written in place, the same reader meets half a manifest.
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"num_failed": 0, "seconds": 0}))
    stop.clear()
    reader = threading.Thread(target=read, args=(plain,))
    reader.start()
    deadline = time.perf_counter() + 100
    while not torn and time.perf_counter() < deadline:
        with plain.open("w") as file:
            file.write('{"num_failed": 1, "reason": "')
            file.flush()
            file.write("x" * 20_000 + '", "seconds": 1}')
    stop.set()
    reader.join()
    assert torn


# -- the manifest


def test_a_manifest_keeps_what_it_was_given_and_says_what_changed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "20260101-000000-demo-aaaaaaaa")
    facts = {"text": "é \U0001f600", "path": Path("a")}
    created = ManifestFile.create(paths, {"fingerprint": "f", "argv": ["run"]}, facts=facts)
    assert created.now.status == "running"
    created.update(status="finished", seconds=1.5)
    again = ManifestFile.reopen(paths).now
    assert again == created.now
    assert (again.run_id, again.argv, again.status, again.seconds) == (paths.run_id, ["run"], "finished", 1.5)
    assert (again.tree["text"], again.tree["path"]) == ("é \U0001f600", "a")
    assert state(read_manifest(paths)) == "finished"


def test_a_heartbeat_moves_while_the_run_lives_and_stops_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_file, "HEARTBEAT_S", 0.02)
    ticks = iter(range(10**6))
    monkeypatch.setattr(manifest_file, "now_text", lambda: (NOW + timedelta(seconds=next(ticks))).isoformat())
    manifest = ManifestFile.create(RunPaths(tmp_path / "r"), {"fingerprint": "f"})
    seen = set()
    with manifest.beating():
        deadline = time.perf_counter() + 100
        while len(seen) < 4 and time.perf_counter() < deadline:
            seen.add(read_manifest(manifest.paths).heartbeat)
            time.sleep(0.01)
    assert len(seen) == 4
    last = read_manifest(manifest.paths).heartbeat
    time.sleep(0.1)
    assert read_manifest(manifest.paths).heartbeat == last
    assert [t.name for t in threading.enumerate() if t.name == "heartbeat"] == []


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_file, "HEARTBEAT_S", 0.01)
    paths = RunPaths(tmp_path / "r")
    manifest = ManifestFile.create(paths, {"fingerprint": "f"})
    with manifest.beating():
        paths.folder.rename(tmp_path / "away")  # as a network disk does
        time.sleep(0.1)
        (tmp_path / "away").rename(paths.folder)
        before = read_manifest(paths).heartbeat
        deadline = time.perf_counter() + 100
        while read_manifest(paths).heartbeat == before and time.perf_counter() < deadline:
            time.sleep(0.05)
    assert str(read_manifest(paths).heartbeat) > str(before)


@pytest.mark.parametrize(
    ("manifest", "shown"),
    [
        ({"status": "running", "heartbeat": (NOW - timedelta(seconds=5)).isoformat()}, "running"),
        ({"status": "running", "heartbeat": (NOW - timedelta(seconds=31)).isoformat()}, "stopped"),
        ({"status": "running", "heartbeat": (NOW + timedelta(seconds=5)).isoformat()}, "running"),
        ({"status": "running"}, "stopped"),
        ({"status": "running", "heartbeat": "yesterday"}, "stopped"),
        ({"status": "running", "heartbeat": "2026-03-01T12:00:00"}, "stopped"),  # no time zone: not ours
        ({"status": "finished", "heartbeat": "2001-01-01T00:00:00+00:00"}, "finished"),
        ({"status": "interrupted"}, "interrupted"),
        ({}, "unknown"),
    ],
)
def test_a_run_whose_heartbeat_is_stale_reads_as_stopped(manifest: dict[str, str], shown: str) -> None:
    assert state(saying(manifest), NOW) == shown


# -- the lock


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run's lock."""
    code = (
        "import sys, pathlib, time\nfrom harness.run import RunPaths, locked\n"
        "with locked(RunPaths(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as held:
        try:
            assert held.stdout is not None
            assert held.stdout.readline() == "held\n"
            yield held
        finally:
            held.kill()


def test_a_lock_held_by_another_process_is_refused_with_its_pid_and_freed_by_its_death(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "r")
    with holder(paths.folder) as held:
        for _ in range(2):  # a refused attempt changes nothing
            with pytest.raises(RunError, match=rf"pid {held.pid} on ") as caught, locked(paths):
                pass
            assert "\n" not in str(caught.value)
        held.send_signal(signal.SIGKILL)
        held.wait()
    with locked(paths):
        assert f"pid {os.getpid()} " in paths.lock.read_text()


def test_a_lock_is_free_again_after_its_block_however_it_ended(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "r")
    with pytest.raises(ZeroDivisionError), locked(paths):
        raise ZeroDivisionError
    with locked(paths), locked(RunPaths(tmp_path / "another")):
        with pytest.raises(RunError, match="being computed"), locked(paths):
            pass
        assert "pid" in paths.lock.read_text()
