"""Rows of an open store, whole or a piece at a time, in the order of their key: the same for its writer and its readers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from harness.store.schema import DATABASE, Row, identifier, primary_key

BATCH_ROWS = 16_384


def stored_rows(con: duckdb.DuckDBPyConnection, sql: str, params: Sequence[object] | None) -> list[Row]:
    """Rows as mappings of column to value."""
    cursor = con.execute(sql, params or [])
    names = [d[0] for d in cursor.description or []]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def in_order(con: duckdb.DuckDBPyConnection, name: str, columns: Sequence[str] | None) -> str:
    """The query of a table in the order of its key, or of a view in the order of its columns."""
    return f"SELECT {_chosen(columns)} FROM {_full(name)} ORDER BY {_order(con, name)}"


def streamed(
    con: duckdb.DuckDBPyConnection, name: str, columns: Sequence[str] | None, rows: int
) -> Iterator[pa.RecordBatch]:
    """A table as Arrow batches of at most so many rows, in the order of its key; as it stands when this is called.

    DuckDB sorts it, in columns; what is handed out lives as long as its reader keeps it. The store can be asked other
    questions meanwhile, and written.
    """
    cursor = con.cursor()  # one stream at a time is all that a connection has
    try:
        reader = cursor.sql(in_order(con, name, columns)).to_arrow_reader(rows)
    except BaseException:
        cursor.close()
        raise
    return _handed_out(cursor, reader)


def _handed_out(cursor: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with cursor:
        yield from reader


def rows_with(
    con: duckdb.DuckDBPyConnection, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None
) -> list[Row]:
    """The rows whose values equal those of one of `keys`, which all name the same columns, in the order of the table's key."""
    if not keys:
        return []
    using = list(keys[0])
    assert all(key.keys() == keys[0].keys() for key in keys), "keys are to name the same columns"
    schema = con.sql(f"SELECT {_chosen(using)} FROM {_full(name)} LIMIT 0").to_arrow_table().schema
    with con.cursor() as cursor:  # its own, so that a name registered in it stands in nobody's way
        cursor.register("wanted_keys", pa.Table.from_pylist(list(keys), schema=schema))
        return stored_rows(
            cursor,
            f"SELECT {_chosen(columns)} FROM {_full(name)} SEMI JOIN wanted_keys USING ({_chosen(using)}) "
            f"ORDER BY {_order(con, name)}",
            None,
        )


def _full(name: str) -> str:
    """A table by its full name: a cursor has the store attached, and uses none."""
    return f"{DATABASE}.main.{identifier(name)}"


def _chosen(columns: Sequence[str] | None) -> str:
    return "*" if columns is None else ", ".join(map(identifier, columns))


def _order(con: duckdb.DuckDBPyConnection, name: str) -> str:
    return ", ".join(map(identifier, primary_key(con, name))) or "ALL"
