"""Whatever one SELECT asks of a snapshot, within limits of time and memory."""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import duckdb
import pyarrow as pa

from harness.errors import StoreError
from harness.store.reader import Reader
from harness.store.schema import Schema, one_line


@dataclass(frozen=True)
class Answer:
    """What a question of a reader's own gave: at most so many rows; whether there were more; how long it took."""

    rows: pa.Table
    is_cut: bool
    seconds: float


_MAX_QUESTION = 20_000  # characters
_MAX_ANSWER_BYTES = 64_000_000
_CHUNK = 1_024  # rows


def ask_locked(
    live: Path,
    schema: Schema,
    sql: str,
    max_rows: int = 1_000,
    limit_s: float = 10.0,
    *,
    file: BufferedReader | None = None,
) -> Answer:
    """Answer whatever one SELECT asks of a snapshot, `live` or what is open as `file`. It sees this snapshot and nothing else
    of the machine, and changes nothing.

    Raises StoreError, in one line, for any other statement, for an error in it, and after `limit_s`. DuckDB looks at the
    clock and at its memory between vectors: a single call of a function can take more of both. `asking.answer` stops that.
    """
    with Reader(live, schema, threads=2, memory_gb=1, file=file) as reader:
        con = reader._con
        try:
            _check_question(con, sql)
            start = time.perf_counter()
            with _interrupted_after(con, limit_s):
                rows, is_cut = _fetch(con, sql, max_rows)
        except (duckdb.OutOfMemoryException, MemoryError) as e:
            told = one_line(e).partition(" Database is ")[0].partition(" Possible solutions")[0]  # which is none here
            raise StoreError(f"needed more than 1 GB of memory: {told or 'out of memory'}") from e
        except (duckdb.Error, pa.ArrowException, OSError, ValueError, RuntimeError) as e:
            if str(e).startswith("INTERRUPT"):
                raise StoreError(f"stopped after {limit_s:g} s: ask for less, or for an aggregate") from e
            raise StoreError(one_line(e) or type(e).__name__) from e
        return Answer(rows, is_cut, time.perf_counter() - start)


def _check_question(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    if len(sql) > _MAX_QUESTION:
        raise StoreError(f"expected a query of at most {_MAX_QUESTION:,} characters, found {len(sql):,}")
    found = con.extract_statements(sql)
    if len(found) != 1:
        raise StoreError(f"expected one statement, found {len(found)}")
    if found[0].type != duckdb.StatementType.SELECT:
        raise StoreError(
            f"expected a query that reads (SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE), found {found[0].type.name}"
        )


def _fetch(con: duckdb.DuckDBPyConnection, sql: str, max_rows: int) -> tuple[pa.Table, bool]:
    """The first rows, and whether there are more; fewer where they are big, and an error where not even one fits."""
    reader = con.sql(sql).limit(max_rows + 1).to_arrow_reader(_CHUNK)
    batches, room, is_cut = [], _MAX_ANSWER_BYTES, False
    for batch in reader:
        fitting = max(bisect_right(range(len(batch) + 1), room, key=partial(_bytes_of_first, batch)) - 1, 0)
        batches.append(batch.slice(0, fitting))
        room -= batches[-1].nbytes
        if is_cut := fitting < len(batch):
            break
    rows = pa.Table.from_batches(batches, schema=reader.schema)
    if is_cut and not len(rows):
        raise StoreError(
            f"expected rows of at most {_MAX_ANSWER_BYTES // 10**6} MB, found a bigger one: ask for less of it"
        )
    return rows.slice(0, max_rows), is_cut or len(rows) > max_rows


def _bytes_of_first(batch: pa.RecordBatch, number: int) -> int:
    return batch.slice(0, number).nbytes


@contextmanager
def _interrupted_after(con: duckdb.DuckDBPyConnection, limit_s: float) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        done.wait(limit_s)
        while not done.is_set():  # an interrupt that comes between two steps of a query is lost
            con.interrupt()
            done.wait(0.1)

    thread = threading.Thread(target=watch, name="query limit", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
