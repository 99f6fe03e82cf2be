"""What a stage reads: rows and files of its run, of each table the columns it asked for, whole or as little as it needs.

Writes nothing, and knows no table by name but `artifacts`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from safetensors import SafetensorError, safe_open

from harness.errors import RunError
from harness.files import open_regular, sha256

Row = dict[str, Any]
_CHUNK = 8_192
"""Rows of a record batch, where a source has none of its own."""


@runtime_checkable
class Source(Protocol):
    """Where rows come from: a run's store, or a snapshot of it. Rows come in the order of the table's key.

    `columns`: those wanted; None: all.
    """

    def table(self, name: str, columns: Sequence[str] | None = None) -> list[Row]: ...

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]: ...

    def rows_with(
        self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
    ) -> list[Row]:
        """Rows that have the values of one of `keys`, all of which name the same columns."""
        ...


@dataclass(frozen=True, slots=True)
class FileHandle:
    """A file of a run, by what its row says of it. It can be sent to a worker; nothing is read before it is asked for."""

    path: Path
    """Absolute."""
    sha256: str
    bytes: int

    def check(self) -> Path:
        """The path, once the file is known to be the one that the row tells of.

        Hashed once a process, and again where it was touched since. Raises RunError, naming the file, where it is gone,
        no regular file, or another one.
        """
        try:
            with open_regular(self.path) as file:
                moment = _moment(file.fileno())
                found = _sha256(self.path, *moment)
        except OSError as e:
            raise RunError(f"{self.path}: cannot be read: {e.strerror or e}") from e
        if (found, moment[1]) != (self.sha256, self.bytes):
            raise RunError(
                f"{self.path}: not the file that was measured: expected {self.bytes:,} bytes with sha256 "
                f"{self.sha256[:12]}, found {moment[1]:,} with {found[:12]}; take the run from where it was made, or "
                "measure again (--resume new)"
            )
        return self.path

    @contextmanager
    def open(self, framework: str = "numpy") -> Iterator[Any]:
        """The file's tensors as `safetensors.safe_open` gives them: mapped into memory, read where they are touched.

        Raises RunError as `check`, and for what is no safetensors file.
        """
        path = self.check()
        try:
            with safe_open(path, framework) as tensors:
                yield tensors
        except SafetensorError as e:
            raise RunError(f"{path}: cannot be read as safetensors: {e}") from e


@lru_cache(maxsize=4_096)
def _sha256(path: Path, inode: int, size: int, changed_ns: int) -> str:
    """Hash of a file as it was at one moment; the rest of the arguments is that moment."""
    with open_regular(path) as file:
        return sha256(file)


def _moment(number: int) -> tuple[int, int, int]:
    found = os.fstat(number)
    return found.st_ino, found.st_size, found.st_mtime_ns


AnyTables = Mapping[str, Sequence[Row]]
"""`Tables`, or rows at hand by the name of their table."""


class Tables(Mapping[str, list[Row]]):
    """The tables that a stage asked for, by name: `tables["prompts"]` is all rows of one.

    For those that are long there are `batches` and `rows_with`, which hold a part at a time; for files `file`.
    """

    def __init__(self, source: Source, reads: Mapping[str, tuple[str, ...]], artifacts: Path | None = None):
        """`artifacts`: the folder of the run's files; None where there are none."""
        self._source, self._reads, self._artifacts = source, dict(reads), artifacts

    @classmethod
    def of(cls, given: AnyTables) -> "Tables":
        """Tables from rows at hand: for a stage that is used without a run."""
        return given if isinstance(given, Tables) else cls(_Given(given), dict.fromkeys(given, ()))

    def __getitem__(self, name: str) -> list[Row]:
        return self._source.table(name, self._reads[name] or None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)

    def batches(self, name: str, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """All rows, some thousand at a time. `columns`: some of those that the stage asked for; none: all it asked for."""
        return self._source.batches(name, self._some(name, columns))

    def streamed(self, name: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        """As `batches`, row by row."""
        for batch in self.batches(name, columns):
            yield from batch.to_pylist()

    def rows_with(self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> list[Row]:
        """The rows that have the values of one of `keys`, all of which name the same columns; in the table's order."""
        return self._source.rows_with(name, keys, self._some(name, columns)) if keys else []

    def file(self, path: str) -> FileHandle:
        """The file that the table `artifacts` tells of under this path. Raises RunError where it tells of none."""
        rows = self._source.rows_with("artifacts", [{"path": path}], ("path", "sha256", "bytes"))
        if not rows or self._artifacts is None:
            raise RunError(f"{path}: no such file among the run's artifacts")
        return FileHandle((self._artifacts / path).absolute(), rows[0]["sha256"], rows[0]["bytes"])

    def _some(self, name: str, columns: Sequence[str]) -> tuple[str, ...] | None:
        asked = self._reads[name]
        assert not asked or set(columns) <= set(asked), f"{name}: the stage did not ask for {set(columns) - set(asked)}"
        return tuple(columns) or asked or None


class _Given:
    """A source of rows that somebody has in memory, in the order they are in."""

    def __init__(self, tables: Mapping[str, Sequence[Row]]):
        self._tables = tables

    def table(self, name: str, columns: Sequence[str] | None = None) -> list[Row]:
        rows = self._tables[name]
        return [{c: row[c] for c in columns} for row in rows] if columns else list(rows)

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        yield from pa.Table.from_pylist(self.table(name, columns)).to_batches(_CHUNK)

    def rows_with(
        self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
    ) -> list[Row]:
        names = tuple(keys[0])
        wanted = {tuple(key[n] for n in names) for key in keys}
        rows = [row for row in self._tables[name] if tuple(row[n] for n in names) in wanted]
        return [{c: row[c] for c in columns} for row in rows] if columns else rows


@runtime_checkable
class Questions(Protocol):
    """A store that answers SQL."""

    def query(self, sql: str, params: Sequence[object] | None = None) -> list[Row]: ...


class Asked:
    """A source over any store that answers questions, in plain SQL."""

    def __init__(self, store: Questions):
        self._store = store
        self._orders: dict[str, str] = {}

    def table(self, name: str, columns: Sequence[str] | None = None) -> list[Row]:
        return self._store.query(f"SELECT {', '.join(columns or ['*'])} FROM {name} ORDER BY {self._order(name)}")

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        rows = self.table(name, columns)
        for start in range(0, len(rows), _CHUNK):
            yield pa.RecordBatch.from_pylist(rows[start : start + _CHUNK])

    def rows_with(
        self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
    ) -> list[Row]:
        names = tuple(keys[0])
        wanted = ", ".join(f"unnest(?) AS {n}" for n in names)
        chosen = ", ".join(f"{name}.{c}" for c in columns or ["*"])
        return self._store.query(
            f"SELECT {chosen} FROM {name} SEMI JOIN (SELECT {wanted}) wanted USING ({', '.join(names)}) "
            f"ORDER BY {self._order(name)}",
            [[key[n] for key in keys] for n in names],
        )

    def _order(self, name: str) -> str:
        if name not in self._orders:
            found = self._store.query(
                "SELECT constraint_column_names AS names FROM duckdb_constraints() "
                "WHERE table_name = ? AND constraint_type = 'PRIMARY KEY' AND database_name = current_database()",
                [name],
            )
            self._orders[name] = ", ".join(f"{name}.{c}" for c in found[0]["names"]) if found else "ALL"
        return self._orders[name]


def source_of(store: Any) -> Source:
    """The store itself where it reads by columns; else through its questions."""
    return store if hasattr(store, "rows_with") else Asked(store)
