"""Rows of an open store, whole or a piece at a time, in the order of their key: the same for its writer and its readers."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from harness.store.schema import DATABASE, Row, identifier, quoted

BATCH_ROWS = 16_384
RANGE_ROWS = 200_000
"""Of a table at a time where it is sorted or compared: some 100 MB of answers."""


def stored_rows(con: duckdb.DuckDBPyConnection, sql: str, params: Sequence[object] | None) -> list[Row]:
    """Rows as mappings of column to value."""
    cursor = con.execute(sql, params or [])
    names = [d[0] for d in cursor.description or []]
    with _uncollected():
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles: rows have none, and as they come in their thousands it looks through all that a
    process with torch in it holds, again and again. 8,500 answers: 26 ms in place of 53."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def in_order(name: str, key: Sequence[str], columns: Sequence[str] | None) -> str:
    """The query of a table in the order of its key, or of a view, which has none, in the order of its columns."""
    return f"SELECT {_chosen(columns)} FROM {_full(name)} ORDER BY {_order(key)}"


def streamed(
    con: duckdb.DuckDBPyConnection, name: str, key: Sequence[str], columns: Sequence[str] | None, rows: int
) -> Iterator[pa.RecordBatch]:
    """A table as Arrow batches of at most so many rows, in the order of its key; as it stands when this is called.

    A large one is sorted a range of its key at a time, so that memory does not grow with it; a view has no key and is
    sorted whole. The store can be asked other questions meanwhile, and written.
    """
    cursor = con.cursor()  # one stream at a time is all that a connection has
    try:
        cursor.execute("BEGIN")  # all ranges are of one moment
        cuts = ranges(cursor, name, key)
        query = f"SELECT {_chosen(columns)} FROM {_full(name)} WHERE {{}} ORDER BY {_order(key)}"
        first = cursor.sql(query.format(cuts[0])).to_arrow_reader(rows)
    except BaseException:
        cursor.close()
        raise
    return _handed_out(cursor, first, [query.format(cut) for cut in cuts[1:]], rows)


def _handed_out(
    cursor: duckdb.DuckDBPyConnection, first: pa.RecordBatchReader, queries: Sequence[str], rows: int
) -> Iterator[pa.RecordBatch]:
    with cursor:
        yield from first
        for query in queries:
            yield from cursor.sql(query).to_arrow_reader(rows)


def ranges(con: duckdb.DuckDBPyConnection, name: str, key: Sequence[str]) -> list[str]:
    """Conditions that cut a table into pieces of about RANGE_ROWS, by the first column of its key and in its order.

    One that always holds for a small table, for a view, and where a key begins with neither text nor a whole number.
    Each costs a look at that column of every row.
    """
    (num_rows,) = con.execute(f"SELECT count(*) FROM {_full(name)}").fetchall()[0] if key else (0,)
    if num_rows <= RANGE_ROWS:
        return ["true"]
    column, num = identifier(key[0]), -(-num_rows // RANGE_ROWS)
    shares = ", ".join(str(n / num) for n in range(1, num))
    (found,) = con.execute(f"SELECT quantile_disc({column}, [{shares}]) FROM {_full(name)}").fetchall()[0]
    if not all(isinstance(value, str | int) for value in found):
        return ["true"]
    cuts = [f"'{quoted(value)}'" if isinstance(value, str) else str(value) for value in dict.fromkeys(found)]
    return [
        " AND ".join([*([f"{column} > {low}"] if low else []), *([f"{column} <= {high}"] if high else [])])
        for low, high in zip([None, *cuts], [*cuts, None], strict=True)
    ]


def rows_with(
    con: duckdb.DuckDBPyConnection,
    name: str,
    key: Sequence[str],
    wanted: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None,
) -> list[Row]:
    """The rows whose values equal those of one of `wanted`, which all name the same columns, in the order of the table's key."""
    if not wanted:
        return []
    using = list(wanted[0])
    assert all(one.keys() == wanted[0].keys() for one in wanted), "keys are to name the same columns"
    schema = con.sql(f"SELECT {_chosen(using)} FROM {_full(name)} LIMIT 0").to_arrow_table().schema
    with con.cursor() as cursor:  # its own, so that a name registered in it stands in nobody's way
        cursor.register("wanted_keys", pa.Table.from_pylist(list(wanted), schema=schema))
        return stored_rows(
            cursor,
            f"SELECT {_chosen(columns)} FROM {_full(name)} SEMI JOIN wanted_keys USING ({_chosen(using)}) "
            f"ORDER BY {_order(key)}",
            None,
        )


def _full(name: str) -> str:
    """A table by its full name: a cursor has the store attached, and uses none."""
    return f"{DATABASE}.main.{identifier(name)}"


def _chosen(columns: Sequence[str] | None) -> str:
    return "*" if columns is None else ", ".join(map(identifier, columns))


def _order(key: Sequence[str]) -> str:
    return ", ".join(map(identifier, key)) or "ALL"
