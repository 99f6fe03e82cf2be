"""What the machine lacks is told apart from what is wrong with the input, whoever says it."""

import errno
import io
import os

import duckdb
import pyarrow as pa
import pytest
from loguru import logger

from harness import cli, log
from harness.engine import Item
from harness.engine.executors import Host, Inline, Job
from harness.errors import EnvironmentFault, StoreError, machine_fault
from tests.commands import harness


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
     (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full"),
     (duckdb.IOException("IO Error: Could not write file \"x.wal\": Disk quota exceeded"), "the disk is full"),
     (duckdb.TransactionException("TransactionContext Error: Failed to commit: No space left on device"), "the disk is full"),
     (OSError(errno.EROFS, os.strerror(errno.EROFS)), "the file system can only be read"),
     (duckdb.IOException("IO Error: Cannot open file \"x\": Read-only file system"), "the file system can only be read"),
     (OSError(errno.EIO, os.strerror(errno.EIO)), "the disk fails"),
     (duckdb.FatalException("FATAL Error: database has been invalidated. Original error: \"fsync failed!\""), "the disk fails"),
     (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many files are open"),
     (MemoryError(), "memory ran out"),
     (pa.ArrowMemoryError("malloc of size 64 failed"), "memory ran out"),
     (duckdb.IOException("IO Error: bad allocation"), "memory ran out"),
     (duckdb.OutOfMemoryException("Out of Memory Error: failed to pin block of size 256.0 KiB"), "memory ran out")],
)  # fmt: skip
def test_what_the_machine_lacks_is_told_in_one_line_with_exit_4(
    error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = machine_fault(error)
    assert fault is not None
    assert str(fault).startswith(told)
    assert "type the same command again" in str(fault)

    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_act", fails)
    found = harness("runs")
    assert found.code == EnvironmentFault.exit_code
    assert found.err.startswith(f"harness: {told}")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "none"), ValueError("memory of 3"), StoreError("no table"), KeyError(3)]
)
def test_other_errors_are_not_the_machines(error: BaseException) -> None:
    assert machine_fault(error) is None


def test_a_batch_for_which_torch_finds_no_memory_is_out_of_memory_and_another_error_is_not() -> None:
    def run(error: BaseException):
        def batch(*_: object):
            raise error

        (outcome,) = Inline(Host()).map(lambda: None, batch, [Job("token", [Item("a", 1)])])
        return outcome

    said = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    assert run(RuntimeError(said)).out_of_memory
    assert run(MemoryError()).out_of_memory
    assert not run(RuntimeError("shapes differ")).out_of_memory


def test_a_log_that_cannot_be_written_any_more_is_said_once_and_stops_nothing(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.to_console()
    log.to_file(tmp_path / "logs" / "run.log")
    logger.info("written")
    sinks = [getattr(handler._sink, "_stream", None) for handler in logger._core.handlers.values()]  # type: ignore[attr-defined]
    (sink,) = (s for s in sinks if isinstance(s, log._LogFile))

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    sink._file.close()
    monkeypatch.setattr(sink, "_file", Full())
    logger.info("one")
    logger.info("two")
    logger.remove()
    said = capsys.readouterr().err
    assert said.count("the log cannot be written any more: No space left on device") == 1
    assert "Traceback" not in said
    assert "two" in said
    assert "written" in (tmp_path / "logs" / "run.log").read_text()


def test_a_log_is_not_written_through_a_link(tmp_path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run.log").symlink_to(tmp_path / "victim")
    with pytest.raises(EnvironmentFault, match="the log cannot be written"):
        log.to_file(tmp_path / "run.log")
    assert (tmp_path / "victim").read_text() == "mine"
