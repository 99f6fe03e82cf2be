"""The one process that writes a run's results.

All rows of a batch and the mark that it is done commit in one transaction. Readers open a snapshot that is published
beside the store, so that no reader can make a run fail or wait; where one reads the store itself when the run goes on,
the run steps aside.
"""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
from loguru import logger

from harness.errors import StoreError, machine_fault
from harness.files import NotRegular, refuse_special, replacing
from harness.store import bench
from harness.store.rows import BATCH_ROWS, in_order, rows_with, stored_rows, streamed
from harness.store.schema import (
    CORE,
    DATABASE,
    DROPPED,
    FAILED,
    Row,
    Schema,
    check,
    migrate,
    one_line,
    primary_keys,
    quoted,
    utc_now,
)

BatchStatus = Literal["planned", "done", "split"]
_DIGEST_OF_ALL = "sha256(coalesce(string_agg(digest, '' ORDER BY key), ''))"
_EMPTY = hashlib.sha256(b"").hexdigest()
_STEPS_ASIDE = 5
"""Times that a store which somebody reads is replaced by a copy of itself before its run gives up."""


@dataclass(frozen=True)
class Batch:
    """A fixed set of items, computed and committed together."""

    stage: str
    batch_id: int
    keys: tuple[str, ...]
    padded_tokens: int
    parent: int | None = None
    attempt: int = 1
    status: BatchStatus = "planned"
    peak_bytes: int | None = None
    work_s: float | None = None


@dataclass(frozen=True)
class Failure:
    """An item that could not be measured, and why."""

    key: str
    message: str


@dataclass
class BatchResult:
    """Everything one batch leaves behind: new rows and changed rows per table, failures, cost."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    updates: dict[str, list[Row]] = field(default_factory=dict)
    replaced: list[tuple[str, Row]] = field(default_factory=list)
    """(table, values): rows with these values go before the new ones come."""
    failures: list[Failure] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Items that are no more: what they rested on was measured again after the batch was planned."""
    seconds: float = 0.0
    work_s: float = 0.0
    tokens: int = 0
    prefill_tokens: int = 0
    padding_tokens: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class TableSeal:
    """What a table held when it was sealed: `sha256` is of its rows' digests in the order of their keys."""

    columns: tuple[str, ...]
    rows: int
    sha256: str


class Store:
    """The writer of one run. Opening it brings the file to the schema; a file of a newer one, or of another experiment, is
    refused."""

    LIBRARY = f"duckdb {duckdb.__version__}"

    def __init__(self, path: Path, schema: Schema):
        self.path, self.schema = path, schema
        self._publish_cost_s = 0.0
        self._published = 0.0
        is_new = not path.exists()
        with disk_errors():
            try:
                for name in (path, path.with_name(f"{path.name}.wal")):
                    refuse_special(name)  # through a link, rows would be written elsewhere
                self._con = duckdb.connect(":memory:")
                self._con.execute("SET preserve_insertion_order = true")
                # Threads add floats up in any order, and a view's mean would change.
                self._con.execute("SET threads = 1")
                self._con.execute(f"SET temp_directory = '{quoted(path.absolute())}.tmp'")
                self._con.execute("SET autoload_known_extensions = false")
                self._attach()
                current = check(self._con, path, schema)
                self._con.execute(f"USE {DATABASE}")
                migrate(self._con, schema, current)
            except (duckdb.Error, NotRegular) as e:
                if is_new:  # a fragment would stand in the way of the next attempt
                    path.unlink(missing_ok=True)
                if machine_fault(e) is not None:
                    raise
                raise StoreError(f"{path}: cannot be opened as a results store: {one_line(e)}") from e
        self._arrow_schemas: dict[str, pa.Schema] = {}
        self._keys = primary_keys(schema, schema.newest)

    def close(self) -> None:
        self._con.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach(self) -> None:
        for _ in range(_STEPS_ASIDE):
            try:
                self._con.execute(f"ATTACH '{quoted(self.path.absolute())}' AS {DATABASE} (TYPE duckdb)")
                return
            except duckdb.IOException as e:
                if "lock on file" not in str(e) or not _step_aside(self.path):
                    raise
        raise duckdb.IOException("it is opened for reading again and again")

    # -- the machinery's own tables

    def start_stage(self, stage: str, version: int, num_items: int, num_done: int = 0) -> None:
        """Record that a stage begins or goes on, with the number of items it has and of those done already."""
        with self._transaction():
            self._con.execute(
                "INSERT INTO stages (stage, version, status, num_items, num_done, num_failed, seconds, tokens) "
                "VALUES (?, ?, 'running', ?, ?, ?, 0, 0) "
                "ON CONFLICT DO UPDATE SET status = 'running', version = excluded.version, "
                "num_items = excluded.num_items, num_done = excluded.num_done, num_failed = excluded.num_failed",
                [stage, version, num_items, num_done, len(self._failed(stage))],
            )

    def drop_items(self, stage: str, keys: Sequence[str]) -> None:
        """Record that failed items are no more: what they rested on was measured again."""
        with self._transaction():
            for key in keys:
                self._event("info", "dropped_item", DROPPED, stage, None, key)

    def finish_stage(self, stage: str, status: str) -> None:
        with self._transaction():
            self._con.execute("UPDATE stages SET status = ? WHERE stage = ?", [status, stage])

    def stage_rows(self) -> list[Row]:
        return self.query("SELECT * FROM stages")

    def waiting(self, stage: str) -> bool:
        """Whether a stored batch of the stage is still to be computed. Reads no keys."""
        return bool(self.query("SELECT 1 FROM batches WHERE stage = ? AND status = 'planned' LIMIT 1", [stage]))

    def plan(self, stage: str, status: BatchStatus | None = None) -> list[Batch]:
        """Every batch ever stored for a stage, or those of a status, in the order of their ids.

        Lists every key of every one of them: for each batch anew, a run's cost would grow with the square of its items.
        """
        rows = self.query(
            "SELECT * FROM batches WHERE stage = ? AND status = coalesce(?, status) ORDER BY batch_id", [stage, status]
        )
        return [
            Batch(
                r["stage"],
                r["batch_id"],
                tuple(r["keys"]),
                r["padded_tokens"],
                r["parent"],
                r["attempt"],
                r["status"],
                r["peak_bytes"],
                r["work_s"],
            )
            for r in rows
        ]

    def add_batches(
        self, batches: Sequence[Batch], split: Batch | None = None, message: str = "", kind: str = ""
    ) -> None:
        """Store planned batches; with `split`, the batch whose halves they are, marked in the same transaction."""
        with self._transaction():
            self._insert("batches", [self._batch_row(b) for b in batches])
            if split is not None:
                self._con.execute(
                    "UPDATE batches SET status = 'split' WHERE stage = ? AND batch_id = ?",
                    [split.stage, split.batch_id],
                )
                self._event("warning", kind, message, split.stage, split.batch_id)

    def commit(self, batch: Batch, result: BatchResult) -> None:
        """The rows of a batch, its failures, and the mark that it is done: all of it or nothing."""
        failed = {f.key for f in result.failures}
        num_rows = sum(len(rows) for written in (result.rows, result.updates) for rows in written.values())
        with self._transaction():
            for table, values in result.replaced:
                matching = " AND ".join(f"{column} = ?" for column in values)
                gone = self._con.execute(f"DELETE FROM {table} WHERE {matching}", list(values.values())).fetchall()
                num_rows -= gone[0][0]
            for table, rows in result.rows.items():
                self._insert(table, rows)
            for table, rows in result.updates.items():
                self._update(table, rows)
            for failure in result.failures:
                self._event("error", "failed_item", failure.message, batch.stage, batch.batch_id, failure.key)
            for key in result.dropped:
                self._event("info", "dropped_item", DROPPED, batch.stage, batch.batch_id, key)
            if batch.attempt > 1:
                for key in batch.keys:
                    if key not in failed:
                        self._event(
                            "info", "recovered_item", "measured on a later attempt", batch.stage, batch.batch_id, key
                        )
            self._con.execute(
                "UPDATE batches SET status = 'done', seconds = ?, peak_bytes = ?, work_s = ?, tokens = ?, "
                "prefill_tokens = ?, padding_tokens = ? WHERE stage = ? AND batch_id = ?",
                [
                    result.seconds,
                    result.peak_bytes,
                    result.work_s,
                    result.tokens,
                    result.prefill_tokens,
                    result.padding_tokens,
                    batch.stage,
                    batch.batch_id,
                ],
            )
            done = len(batch.keys) - len(failed) - len(result.dropped)
            # To count them is to read every event; most batches change nothing in it.
            has_news = bool(failed or result.dropped or batch.attempt > 1)
            self._con.execute(
                "UPDATE stages SET num_done = num_done + ?, num_failed = coalesce(?, num_failed), seconds = seconds + ?, "
                "tokens = tokens + ?, "
                "prefill_tokens = prefill_tokens + ?, padding_tokens = padding_tokens + ?, num_rows = num_rows + ? "
                "WHERE stage = ?",
                [
                    done,
                    len(self._failed(batch.stage)) if has_news else None,
                    result.seconds,
                    result.tokens,
                    result.prefill_tokens,
                    result.padding_tokens,
                    num_rows,
                    batch.stage,
                ],
            )

    def append(self, table: str, rows: Sequence[Row]) -> None:
        """Rows that are no batch's, all of them or none; one whose key is there already is passed over."""
        with self._transaction():
            self._with_rows(table, rows, f"INSERT OR IGNORE INTO {table} BY NAME SELECT * FROM incoming")

    def event(self, level: str, kind: str, message: str, stage: str | None = None, item_key: str | None = None) -> None:
        with self._transaction():
            self._event(level, kind, message, stage, None, item_key)

    def ran_out(self, stage: str) -> set[int]:
        """Ids of the batches that were split because they did not fit in memory."""
        rows = self.query("SELECT batch_id FROM events WHERE stage = ? AND kind = 'oom_split'", [stage])
        return {r["batch_id"] for r in rows}

    def failed(self, stage: str) -> list[str]:
        """Keys of items that failed and were not measured since."""
        return self._failed(stage)

    # -- reading and publishing

    def query(self, sql: str, params: Sequence[object] | None = None) -> list[Row]:
        return stored_rows(self._con, sql, params)

    def table(self, name: str, columns: Sequence[str] | None = None) -> list[Row]:
        """A whole table in the order of its key, or a whole view in the order of its columns."""
        return self.query(in_order(name, self._key(name), columns))

    def batches(
        self, name: str, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """As `table`, a piece at a time, in Arrow's form: what was there when it was asked for, whatever is written since."""
        return streamed(self._con, name, self._key(name), columns, rows)

    def rows_with(
        self, name: str, keys: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
    ) -> list[Row]:
        """The rows of a table whose values equal those of one of `keys`, in the order of the table's key."""
        return rows_with(self._con, name, self._key(name), keys, columns)

    def counts(self) -> dict[str, int]:
        """Rows of every table."""
        return {name: int(self.query(f"SELECT count(*) AS n FROM {name}")[0]["n"]) for name in self.schema.tables}

    def publish(self, live: Path) -> None:
        """Replace the snapshot that readers open. A snapshot is written whole beside it and renamed into place."""
        start = time.perf_counter()
        with replacing(live) as temporary, disk_errors():
            self._con.execute(f"ATTACH '{quoted(temporary.absolute())}' AS snapshot (TYPE duckdb)")
            try:
                self._con.execute(f"COPY FROM DATABASE {DATABASE} TO snapshot")
            except BaseException:
                with suppress(duckdb.Error):  # it may be unable to, and the first error says why
                    self._con.execute("DETACH snapshot")
                raise
            self._con.execute("DETACH snapshot")
        self._publish_cost_s = time.perf_counter() - start
        self._published = time.perf_counter()

    def publish_if_due(self, live: Path, every_s: float = 2.0, share: float = 0.015) -> bool:
        """Publish when the snapshot is older than `every_s` and publishing stays under `share` of the wall time. Whether it was
        time for it."""
        age = time.perf_counter() - self._published
        if is_due := age >= max(every_s, self._publish_cost_s / share):
            self.publish(live)
        return is_due

    def seal(self, path: Path) -> dict[str, TableSeal]:
        """Write the key and a digest of every row to `path`, as Parquet, so that a later change of any row can be named.

        About a second for every 50 million numbers, on each core.
        """
        columns = {name: tuple(self._arrow_schema(name).names) for name in self.schema.tables}
        with disk_errors():
            self._con.execute(
                f"CHECKPOINT {DATABASE}"
            )  # who dies from here on leaves no row in DuckDB's log of writes alone
        with replacing(path) as temporary, disk_errors(), bench.digests(self._con, columns, self._keys) as (con, rows):
            bench.all_cores(con)
            con.execute(f"COPY ({rows}) TO '{quoted(temporary)}' (FORMAT parquet, COMPRESSION zstd)")
            found = con.execute(
                f"SELECT tbl, count(*), {_DIGEST_OF_ALL} FROM read_parquet('{quoted(temporary)}') GROUP BY tbl"
            ).fetchall()
        told = {name: (rows, digest) for name, rows, digest in found}
        return {name: TableSeal(columns[name], *told.get(name, (0, _EMPTY))) for name in self.schema.tables}

    # -- inside

    @contextmanager
    def _transaction(self):
        with disk_errors():
            self._con.execute("BEGIN")
            try:
                yield
                self._con.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # a failed COMMIT has ended it already
                    self._con.execute("ROLLBACK")
                raise

    def _arrow_schema(self, table: str) -> pa.Schema:
        if table not in self._arrow_schemas:
            self._arrow_schemas[table] = self._con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
        return self._arrow_schemas[table]

    def _key(self, table: str) -> tuple[str, ...]:
        return self._keys.get(table, ())

    def _insert(self, table: str, rows: Sequence[Row]) -> None:
        if rows:
            given = [self._spread(row) for row in rows] if table == "artifacts" else rows
            self._with_rows(table, given, f"INSERT INTO {table} BY NAME SELECT * FROM incoming")

    def _spread(self, row: Row) -> Row:
        """A row of `artifacts` with those of its keys as columns that the table has columns for."""
        names = self._arrow_schema("artifacts").names
        return {name: value for name, value in dict(row.get("keys") or ()).items() if name in names} | row

    def _update(self, table: str, rows: Sequence[Row]) -> None:
        """Set the given columns of the rows with the given keys."""
        if not rows:
            return
        if any(row.keys() != rows[0].keys() for row in rows):  # a column that one row leaves alone must stay as it is
            for row in rows:
                self._update(table, [row])
            return
        keys = self._key(table)
        changed = [c for c in rows[0] if c not in keys]
        setting = ", ".join(f"{c} = incoming.{c}" for c in changed)
        matching = " AND ".join(f"{table}.{k} = incoming.{k}" for k in keys)
        self._with_rows(table, rows, f"UPDATE {table} SET {setting} FROM incoming WHERE {matching}")

    def _with_rows(self, table: str, rows: Sequence[Row], sql: str) -> None:
        given = {name for row in rows for name in row}
        schema = pa.schema([f for f in self._arrow_schema(table) if f.name in given])
        unknown = given - set(schema.names)
        assert not unknown, f"table {table} has no column {sorted(unknown)}"
        self._con.register("incoming", pa.Table.from_pylist(list(rows), schema=schema))
        try:
            self._con.execute(sql)
        finally:
            with suppress(duckdb.Error):  # refused in an aborted transaction, whose own error is the one to show
                self._con.unregister("incoming")

    def _event(
        self,
        level: str,
        kind: str,
        message: str,
        stage: str | None,
        batch_id: int | None = None,
        key: str | None = None,
    ) -> None:
        self._con.execute(
            "INSERT INTO events (time, level, stage, batch_id, item_key, kind, message) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [utc_now(), level, stage, batch_id, key, kind, message],
        )

    def _failed(self, stage: str) -> list[str]:
        return [r[0] for r in self._con.execute(FAILED, [stage]).fetchall()]

    @staticmethod
    def _batch_row(batch: Batch) -> Row:
        return {
            "stage": batch.stage,
            "batch_id": batch.batch_id,
            "parent": batch.parent,
            "status": batch.status,
            "keys": list(batch.keys),
            "num_items": len(batch.keys),
            "padded_tokens": batch.padded_tokens,
            "attempt": batch.attempt,
        }


def certificate(items: Sequence[Row]) -> list[Row]:
    """The view `sanity` over these rows of `sanity_items`, without a store."""
    with duckdb.connect(":memory:") as con:
        for migration in CORE:
            con.execute(migration)
        schema = con.sql("SELECT * FROM sanity_items LIMIT 0").to_arrow_table().schema
        con.register("incoming", pa.Table.from_pylist(list(items), schema=schema))
        con.execute("INSERT INTO sanity_items BY NAME SELECT * FROM incoming")
        return stored_rows(con, "SELECT * FROM sanity ORDER BY ALL", None)


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk is the machine's fault, and says so; the transaction in progress is gone, nothing else."""
    try:
        yield
    except (duckdb.Error, OSError) as e:
        if (fault := machine_fault(e)) is not None:
            raise fault from e
        raise


def _step_aside(path: Path) -> bool:
    """Leave the file of a store to those who read it, and go on with a copy under its name; False where somebody writes it.

    The caller holds the run: no other process of this project writes there.
    """
    with path.open("rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as DuckDB locks it: readers share
        except OSError:
            return False
        logger.info("{} is being read by somebody: the run goes on with a copy of it", path)
        with replacing(path) as temporary:
            shutil.copyfile(path, temporary)
    return True
