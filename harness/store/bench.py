"""A clean database in memory, for work on rows that came out of a store: it holds nothing of the store but those rows.

A store's own macros cannot stand before the functions used here, since it is not attached.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import duckdb
import pyarrow as pa

from harness.spreadsheet import defused
from harness.store.schema import DATABASE, identifier, quoted

_CHUNK = 16_384  # rows
Format = Literal["parquet", "csv", "jsonl"]
_FORMATS: dict[Format, str] = {"parquet": "FORMAT parquet", "csv": "FORMAT csv, HEADER", "jsonl": "FORMAT json"}


class Sides(NamedTuple):
    """Two tables' rows of the same keys, in the order of the key; and how many rows each has that the other has not."""

    one: pa.Table
    other: pa.Table
    only_one: int
    only_other: int


@contextmanager
def workbench(readable: str | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """The database. It may read the file `readable` and, where none is named, write where its caller says."""
    with duckdb.connect(":memory:") as con:
        con.execute("SET temp_directory = ''")
        if readable is not None:
            con.execute(f"SET allowed_paths = ['{quoted(readable)}']")
            con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
        yield con


@contextmanager
def digests(
    source: duckdb.DuckDBPyConnection,
    columns: Mapping[str, Sequence[str]],
    keys: Mapping[str, Sequence[str]],
    readable: str | None = None,
) -> Iterator[tuple[duckdb.DuckDBPyConnection, str]]:
    """A workbench, and a query in it of tbl, key and digest of every row of these tables of a store, over these columns;
    `keys`: those of its tables.

    The query can be asked once: the rows stream in as it runs. JSON tells NULL from 'NULL'.
    """

    def packed(names: Sequence[str]) -> str:
        return f"to_json(struct_pack({', '.join(f'{identifier(n)} := {identifier(n)}' for n in names)}))::VARCHAR"

    with workbench(readable) as con:
        cursors, parts = [], []
        for n, (name, chosen) in enumerate(columns.items()):
            cursors.append(source.cursor())  # one stream at a time is all that a connection has
            rows = cursors[-1].sql(
                f"SELECT {', '.join(map(identifier, chosen))} FROM {DATABASE}.main.{identifier(name)}"
            )
            con.register(f"rows_{n}", rows.to_arrow_reader(_CHUNK))
            parts.append(
                f"SELECT '{name}' AS tbl, {packed(keys.get(name) or chosen)} AS key, "
                f"left(sha256({packed(chosen)}), 16) AS digest FROM rows_{n}"
            )
        yield con, " UNION ALL ".join(parts)


def align(one: pa.Table, other: pa.Table, key: Sequence[str], columns: Sequence[str]) -> Sides:
    """The rows that two tables have in common by their key, in these columns."""
    using, chosen = ", ".join(map(identifier, key)), ", ".join(map(identifier, columns))
    with _clean().cursor() as con:  # what is registered in a cursor is its own
        con.register("one", one)
        con.register("other", other)
        both, only = [], []
        for a, b in (("one", "other"), ("other", "one")):
            both.append(
                con.sql(f"SELECT {chosen} FROM {a} SEMI JOIN {b} USING ({using}) ORDER BY {using}").to_arrow_table()
            )
            found = con.execute(f"SELECT count(*) FROM {a} ANTI JOIN {b} USING ({using})").fetchall()
            only.append(int(found[0][0]))
    return Sides(both[0], both[1], only[0], only[1])


@lru_cache(maxsize=1)
def _clean() -> duckdb.DuckDBPyConnection:
    """A workbench for good: to make one takes 14 ms, and a verification compares hundreds of small tables."""
    con = duckdb.connect(":memory:")
    for setting in ("temp_directory = ''", "enable_external_access = false", "lock_configuration = true"):
        con.execute(f"SET {setting}")
    return con


def write(rows: pa.RecordBatchReader, path: Path, form: Format, *, is_safe: bool = False) -> int:
    """Rows as a file, in their order. With `is_safe`, text that a spreadsheet could take for a formula is defused, and
    every text is quoted, so that no cell can begin another; the number of cells that were changed."""
    changed: list[int] = []
    texts = [f.name for f in rows.schema if f.type in (pa.string(), pa.large_string())] if is_safe else []
    if texts:
        safe = (_defused(batch, texts, changed) for batch in rows)
        rows = pa.RecordBatchReader.from_batches(rows.schema, safe)
    quotes = f", FORCE_QUOTE ({', '.join(map(identifier, texts))})" if texts else ""
    with workbench() as con:
        con.register("incoming", rows)
        con.execute(f"COPY (FROM incoming) TO '{quoted(path)}' ({_FORMATS[form]}{quotes})")
    return sum(changed)


def _defused(batch: pa.RecordBatch, texts: Sequence[str], changed: list[int]) -> pa.RecordBatch:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in texts:
            was = column.to_pylist()
            now = [None if text is None else defused(text) for text in was]
            changed.append(sum(a != b for a, b in zip(was, now, strict=True)))
            column = pa.array(now, column.type)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def all_cores(con: duckdb.DuckDBPyConnection) -> None:
    """Let a connection compute on every core: for what adds up no floats."""
    con.execute(f"SET threads = {os.cpu_count() or 1}")
