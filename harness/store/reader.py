"""Reading a run without hindering it, and without trusting it.

A store is attached from a file that is already open, checked object by object before a single question is asked of it,
and locked into its own rows: no other file, no network, no extension.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from harness.errors import StoreError
from harness.files import open_regular, replacing
from harness.store import bench
from harness.store.rows import BATCH_ROWS, in_order, ranges, rows_with, stored_rows, streamed
from harness.store.schema import (
    DATABASE,
    EMPTY,
    FAILED,
    Row,
    Schema,
    check,
    expected,
    identifier,
    one_line,
    primary_keys,
    quoted,
)
from harness.store.writer import TableSeal, disk_errors

_CHUNK = 4_096  # rows
_ASIDE = "harness-reading-"
_ASIDE_KEPT_S = 3600.0
"""A private copy of a store has a name for the milliseconds in which it is opened; an older one was left by a kill."""


class Broken(NamedTuple):
    """A row that is not as it was sealed: `changed`, `missing` or `added`; `key` is JSON."""

    table: str
    key: str
    how: str


class Aligned(NamedTuple):
    """The rows of two runs' tables that have the same key, in its order, in the columns both have; and how many others."""

    key: tuple[str, ...]
    one: pa.Table
    other: pa.Table
    only_one: int
    only_other: int


class Exported(NamedTuple):
    """A table as a file: its rows, and how many of its cells were changed for spreadsheets."""

    num_rows: int
    num_defused: int


class Reader:
    """Reads one run's snapshot and holds nothing that could hinder its writer.

    The snapshot is attached to a database in memory of its own: `duckdb.connect` on the file itself would hand out the
    old snapshot for as long as any connection to it is open. It is attached through a file descriptor, because DuckDB
    opens a path twice while attaching it, and a snapshot published in between would be read with the old one's header.

    Raises StoreError for what is no results store, or one of another experiment, AlteredStore (one of them) for a store
    that holds anything but the tables and views of its version of the schema. `threads` 1 gives the bits that the
    writer's own views have.
    """

    def __init__(
        self,
        live: Path,
        schema: Schema,
        *,
        threads: int | None = None,
        memory_gb: int | None = None,
        file: BufferedReader | None = None,
    ):
        self.path, self.schema = live, schema
        self._con = duckdb.connect(":memory:")
        try:
            self._file = file or open_regular(live)
        except FileNotFoundError as e:
            raise StoreError(f"{live}: no snapshot yet; the run has not published one") from e
        except OSError as e:
            raise StoreError(f"{live}: cannot be opened as a snapshot: {e.strerror}") from e
        self.published = os.fstat(self._file.fileno()).st_mtime
        by_number = Path(f"/proc/self/fd/{self._file.fileno()}")
        self._held = by_number if by_number.exists() else live
        limits = [f"threads = {threads}"] if threads else []
        limits += [f"memory_limit = '{memory_gb}GB'"] if memory_gb else []
        try:
            for setting in (*_BEFORE, *limits):
                self._con.execute(f"SET {setting}")
            self._con.execute(f"ATTACH '{quoted(self._held)}' AS {DATABASE} (READ_ONLY, TYPE duckdb)")
            for setting in _AFTER:
                self._con.execute(f"SET {setting}")
            self.version = check(self._con, live, schema)
            if self.version == EMPTY:
                raise StoreError(f"{live}: an empty store; the run has no results yet")
            self._keys = primary_keys(schema, self.version)
            self._con.execute(f"USE {DATABASE}")
        except duckdb.Error as e:
            self.close()
            raise StoreError(f"{live}: cannot be opened as a snapshot: {one_line(e)}") from e
        except StoreError:
            self.close()
            raise

    @property
    def schema_version(self) -> int:
        """The number of the experiment's last migration that this store has."""
        return self.version.own

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was published."""
        return max(0.0, time.time() - self.published)

    def tables(self) -> list[str]:
        """Tables and views of this run, as its own schema has them."""
        mine = expected(self.schema, self.version) - expected(self.schema, EMPTY)
        return sorted(e.name for e in mine if e.kind in ("table", "view"))

    def query(self, sql: str, params: Sequence[object] | None = None) -> list[Row]:
        try:
            return stored_rows(self._con, sql, params)
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def frame(self, sql: str, params: Sequence[object] | None = None) -> Any:
        """As `query`, as a pandas data frame, which keeps its columns where there is no row."""
        try:
            return self._con.execute(sql, params or []).fetchdf()
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def table(self, name: str, columns: Sequence[str] | None = None) -> list[Row]:
        """As `Store.table`; with one thread, with the same bits in every mean of a view."""
        return self.query(in_order(name, self.key_of(name), columns))

    def batches(
        self, name: str, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """As `Store.batches`."""
        try:
            yield from streamed(self._con, name, self.key_of(name), columns, rows)
        except (duckdb.Error, pa.ArrowException) as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def rows_with(
        self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
    ) -> list[Row]:
        """As `Store.rows_with`."""
        try:
            return rows_with(self._con, name, self.key_of(name), keys, columns)
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def failed(self, stage: str) -> list[str]:
        """As `Store.failed`."""
        return [r["item_key"] for r in self.query(FAILED, [stage])]

    def key_of(self, table: str) -> tuple[str, ...]:
        """The columns of a table's key; none for a view."""
        return self._keys.get(table, ())

    def broken_rows(self, seal: BufferedReader, sealed: Mapping[str, TableSeal], at_most: int = 20) -> list[Broken]:
        """The first rows that are not as `Store.seal` found them; a table or column that is gone is one with an empty key.

        `seal` is the open file that it wrote. Digests are made outside of the store's database.
        """
        here = set(self.tables())
        lost = {
            name: set(s.columns) - {c for c, _ in self._columns(name)} for name, s in sealed.items() if name in here
        }
        broken = [Broken(name, "", "missing") for name in sorted(sealed.keys() - here)]
        broken += [Broken(f"{name}.{column}", "", "missing") for name, gone in lost.items() for column in sorted(gone)]
        columns = {name: s.columns for name, s in sealed.items() if name in here and not lost[name]}
        if not columns:
            return broken
        by_number = f"/proc/self/fd/{seal.fileno()}"
        try:
            with bench.digests(self._con, columns, self._keys, by_number) as (con, rows):
                found = con.execute(
                    "SELECT coalesce(now.tbl, was.tbl), coalesce(now.key, was.key), "
                    "CASE WHEN was.tbl IS NULL THEN 'added' WHEN now.tbl IS NULL THEN 'missing' ELSE 'changed' END "
                    f"FROM ({rows}) now FULL JOIN "
                    f"(SELECT * FROM read_parquet('{by_number}') WHERE list_contains(?, tbl)) was USING (tbl, key) "
                    f"WHERE now.digest IS DISTINCT FROM was.digest ORDER BY 1, 2 LIMIT {at_most}",
                    [list(columns)],
                ).fetchall()
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e
        return broken + [Broken(*row) for row in found]

    def same_rows(self, table: str, rows: Sequence[Row]) -> Aligned:
        """These rows beside those of the table with the same keys, in the columns given; as the table would hold them. Of
        the table's own no other is looked at: none is counted as missing."""
        schema = self._arrow(f"SELECT * FROM {table} LIMIT 0").schema
        given = [f.name for f in schema if f.name in rows[0]]
        again = pa.Table.from_pylist(list(rows), schema=schema).select(given)
        using = ", ".join(map(identifier, self.key_of(table)))
        try:
            self._con.register("again", again)
            mine = self._arrow(f"SELECT {_list(given)} FROM {table} SEMI JOIN again USING ({using})")
            self._con.unregister("again")
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e
        return self._aligned(table, mine, again)

    def aligned(self, other: "Reader", table: str) -> Iterator[Aligned]:
        """The same table of two runs, a range of its key at a time; `one` is this run's. Raises StoreError where one has no
        such table."""
        names = [name for name, _ in other._columns(table)]
        shared = [name for name, _ in self._columns(table) if name in names]
        for cut in ranges(self._con, table, self.key_of(table)):
            query = f"SELECT {_list(shared)} FROM {table} WHERE {cut}"
            yield self._aligned(table, self._arrow(query), other._arrow(query))

    def _aligned(self, table: str, mine: pa.Table, other: pa.Table) -> Aligned:
        key = self.key_of(table)
        try:
            return Aligned(key, *bench.align(mine, other, key, mine.column_names))
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def _arrow(self, sql: str) -> pa.Table:
        try:
            return self._con.sql(sql).to_arrow_table()
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {one_line(e)}") from e

    def export(self, name: str, path: Path, form: bench.Format, *, is_safe: bool = False) -> Exported:
        """Write a table to `path`, whole or not at all.

        With `is_safe`, text cells that a spreadsheet could take for a formula get an apostrophe in front.
        """
        order = ", ".join(self.key_of(name)) or "ALL"
        # As lists: DuckDB 2.0 writes a fixed-size array that is NULL in a way that other Parquet readers refuse.
        columns = ", ".join(
            f"{c}::{kind.replace('[2]', '[]')} AS {c}" if "[2]" in kind else c for c, kind in self._columns(name)
        )
        try:
            rows = self._con.sql(f"SELECT {columns} FROM {name} ORDER BY {order}").to_arrow_reader(_CHUNK)
            with replacing(path) as temporary, disk_errors():
                num_defused = bench.write(rows, temporary, form, is_safe=is_safe)
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {name}: {one_line(e)}") from e
        return Exported(int(self.query(f"SELECT count(*) AS n FROM {name}")[0]["n"]), num_defused)

    def _columns(self, table: str) -> list[tuple[str, str]]:
        return [(r["column_name"], r["column_type"]) for r in self.query(f"DESCRIBE {table}")]

    def close(self) -> None:
        """Let the snapshot go; a newer one is a new Reader."""
        self._con.close()
        self._file.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_copy(results: Path, schema: Schema, *, threads: int | None = None) -> Reader | None:
    """A reader of a private copy of a store that nobody writes, with the last rows of a killed writer in it.

    None where somebody began to write it meanwhile. Nothing of the run is written or locked, and the copy has lost its
    name when this returns. Takes as much room in the folder for temporary files as the store has.
    """
    _sweep_copies()
    aside = Path(tempfile.mkdtemp(prefix=_ASIDE))
    wal = results.with_name(f"{results.name}.wal")
    try:
        was = [_moment(path) for path in (results, wal)]
        for path in (results, wal):
            with suppress(FileNotFoundError), open_regular(path) as source, (aside / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        if was != [_moment(path) for path in (results, wal)]:
            return None
        copy = aside / results.name
        with duckdb.connect(":memory:") as con:  # takes the log in; what it holds is looked at by the reader below
            for setting in _BEFORE:
                con.execute(f"SET {setting}")
            con.execute(f"SET allowed_directories = ['{quoted(aside)}/']")
            con.execute("SET enable_external_access = false")
            con.execute(f"ATTACH '{quoted(copy)}' AS {DATABASE} (TYPE duckdb)")
            con.execute(f"DETACH {DATABASE}")
        return Reader(results, schema, threads=threads, file=copy.open("rb"))
    except duckdb.Error as e:
        raise StoreError(f"{results}: cannot be opened as a results store: {one_line(e)}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_BEFORE = (
    "temp_directory = ''",
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "allow_community_extensions = false",
    "python_enable_replacements = false",
)
# Once the snapshot is attached. A file that is attached already stays readable with external access off, and its path
# writable for a COPY inside a WITH: that is why the file system goes as well. Locked, none of it can be taken back.
_AFTER = ("enable_external_access = false", "disabled_filesystems = 'LocalFileSystem'", "lock_configuration = true")


def _list(columns: Sequence[str]) -> str:
    return ", ".join(map(identifier, columns))


def _moment(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sweep_copies() -> None:
    """Remove copies that readers who were killed left behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{_ASIDE}*"):
        with suppress(OSError):
            found = left.lstat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _ASIDE_KEPT_S:
                shutil.rmtree(left, ignore_errors=True)
