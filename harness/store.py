"""Where results are kept: one DuckDB file a run. The only module that imports duckdb.

One process writes (`Store`); everybody else reads a snapshot (`Reader`), so that no reader can make a run fail or wait.
All rows of a batch and the mark that it is done commit in one transaction.
"""

import hashlib
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import pyarrow as pa

from harness.errors import StoreError, disk_full
from harness.run import replacing

Row = dict[str, Any]

_SPAN = "INTEGER[2]"
_ATTENTION_MEASURES = ("iar", "nf", "tmf", "pi", "iar_token", "nf_token", "tmf_token", "pi_token")

# Each migration is applied once, in one transaction with the record that it was. Never edit one: append another.
_MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE prompts (
        prompt_id VARCHAR PRIMARY KEY, category VARCHAR, question VARCHAR, target VARCHAR, source VARCHAR, style VARCHAR,
        row_hash VARCHAR, single_token BOOLEAN, tier VARCHAR, alternatives VARCHAR[]);
    CREATE TABLE contexts (
        prompt_id VARCHAR, condition VARCHAR, text VARCHAR, token_ids INTEGER[],
        spans STRUCT(instruction {_SPAN}, negation {_SPAN}, mention {_SPAN}, question {_SPAN}),
        PRIMARY KEY (prompt_id, condition));
    CREATE TABLE psem (
        prompt_id VARCHAR, condition VARCHAR, p_sem DOUBLE, p_word DOUBLE, paper_p_sem DOUBLE, num_sequences INTEGER,
        sequences INTEGER[][], logprobs DOUBLE[], word_end DOUBLE[], entropy DOUBLE, top_ids INTEGER[], top_probs DOUBLE[],
        PRIMARY KEY (prompt_id, condition));
    CREATE TABLE completions (
        prompt_id VARCHAR, condition VARCHAR, mode VARCHAR, sample_id INTEGER, token_ids INTEGER[], text VARCHAR,
        answer VARCHAR, finish_reason VARCHAR, logprobs FLOAT[], margins FLOAT[],
        PRIMARY KEY (prompt_id, condition, mode, sample_id));
    CREATE TABLE detections (
        prompt_id VARCHAR, condition VARCHAR, mode VARCHAR, sample_id INTEGER, word_present BOOLEAN,
        word_present_full BOOLEAN, format_ok BOOLEAN, num_occurrences INTEGER, first_step INTEGER,
        char_spans {_SPAN}[], token_spans {_SPAN}[],
        PRIMARY KEY (prompt_id, condition, mode, sample_id));
    CREATE TABLE attention (
        prompt_id VARCHAR, condition VARCHAR, step_kind VARCHAR, layer INTEGER, step INTEGER, iar FLOAT[], nf FLOAT[],
        tmf FLOAT[], pi FLOAT[], mean_row FLOAT[],
        PRIMARY KEY (prompt_id, condition, step_kind, layer));
    CREATE TABLE lens (
        prompt_id VARCHAR, condition VARCHAR, step_kind VARCHAR, layer INTEGER, step INTEGER, p_target DOUBLE,
        p_emitted DOUBLE, entropy DOUBLE, kl_final DOUBLE, top_ids INTEGER[], top_probs DOUBLE[],
        PRIMARY KEY (prompt_id, condition, step_kind, layer));
    CREATE TABLE decomposition (
        prompt_id VARCHAR, condition VARCHAR, step_kind VARCHAR, layer INTEGER, step INTEGER, p_in DOUBLE, p_attn DOUBLE,
        p_out DOUBLE, attn_contrib DOUBLE, ffn_contrib DOUBLE,
        PRIMARY KEY (prompt_id, condition, step_kind, layer));
    CREATE TABLE patching (
        prompt_id VARCHAR, layer INTEGER, patch VARCHAR, p_sem_original DOUBLE, p_sem_patched DOUBLE, delta_p DOUBLE,
        continuation VARCHAR, flipped BOOLEAN,
        PRIMARY KEY (prompt_id, layer, patch));
    CREATE TABLE activations (
        prompt_id VARCHAR, condition VARCHAR, layer INTEGER, resid_norm FLOAT[], top_neurons INTEGER[], top_values FLOAT[],
        PRIMARY KEY (prompt_id, condition, layer));
    CREATE TABLE artifacts (
        path VARCHAR PRIMARY KEY, kind VARCHAR, sha256 VARCHAR, bytes BIGINT, shape INTEGER[], dtype VARCHAR,
        prompt_id VARCHAR, condition VARCHAR);
    CREATE TABLE stages (
        stage VARCHAR PRIMARY KEY, version INTEGER, status VARCHAR, num_items INTEGER, num_done INTEGER,
        num_failed INTEGER, seconds DOUBLE, tokens BIGINT);
    CREATE TABLE batches (
        stage VARCHAR, batch_id INTEGER, parent INTEGER, status VARCHAR, keys VARCHAR[], num_items INTEGER,
        padded_tokens BIGINT, seconds DOUBLE, peak_bytes BIGINT, attempt INTEGER,
        PRIMARY KEY (stage, batch_id));
    CREATE SEQUENCE event_ids;
    CREATE TABLE events (
        event_id BIGINT PRIMARY KEY DEFAULT nextval('event_ids'), time TIMESTAMP, level VARCHAR,
        stage VARCHAR, batch_id INTEGER, item_key VARCHAR, kind VARCHAR, message VARCHAR);

    CREATE VIEW suppression AS
        SELECT prompt_id, c.condition, b.p_sem AS p0, c.p_sem AS p1, b.p_sem - c.p_sem AS delta,
               (b.p_sem - c.p_sem) / greatest(b.p_sem, 1e-9) AS relative,
               ln(greatest(b.p_sem, 1e-12)) - ln(greatest(c.p_sem, 1e-12)) AS log
        FROM psem c JOIN psem b USING (prompt_id)
        WHERE b.condition = 'baseline' AND c.condition <> 'baseline';
    CREATE VIEW violation AS
        SELECT prompt_id, condition, count(*) AS num_samples, count(*) FILTER (word_present) AS num_violations,
               count(*) FILTER (word_present) / count(*) AS rate
        FROM detections WHERE mode = 'sample' GROUP BY prompt_id, condition;
    CREATE VIEW outcomes AS
        SELECT prompt_id, condition, word_present, CASE WHEN word_present THEN 'failure' ELSE 'success' END AS outcome,
               NULL::VARCHAR AS taxonomy
        FROM detections WHERE mode = 'greedy' AND condition <> 'baseline';
    """,
    f"""
    ALTER TABLE attention ADD COLUMN iar_token FLOAT[];
    ALTER TABLE attention ADD COLUMN nf_token FLOAT[];
    ALTER TABLE attention ADD COLUMN tmf_token FLOAT[];
    ALTER TABLE attention ADD COLUMN pi_token FLOAT[];
    ALTER TABLE patching ADD COLUMN num_patched INTEGER;
    ALTER TABLE patching ADD COLUMN num_span INTEGER;
    CREATE TABLE statistics (
        analysis VARCHAR, condition VARCHAR, measured VARCHAR, step_kind VARCHAR, measure VARCHAR, grouping VARCHAR,
        patch VARCHAR, layer INTEGER, head INTEGER, value DOUBLE, se DOUBLE, low DOUBLE, high DOUBLE, p DOUBLE, q DOUBLE,
        n INTEGER, method VARCHAR,
        PRIMARY KEY (analysis, condition, measured, step_kind, measure, grouping, patch, layer, head));
    CREATE TABLE sanity (
        measurement VARCHAR PRIMARY KEY, num_items INTEGER, max_abs DOUBLE, max_rel DOUBLE, flips INTEGER,
        near_ties INTEGER, tolerance DOUBLE, worst VARCHAR, repeated VARCHAR, ok BOOLEAN);

    DROP VIEW outcomes;
    CREATE VIEW outcomes AS
        WITH priming AS (
            SELECT prompt_id, condition, avg(list_avg(pi)) AS pi FROM attention WHERE step_kind = 'first'
            GROUP BY prompt_id, condition)
        SELECT d.prompt_id, d.condition, d.word_present,
               CASE WHEN d.word_present THEN 'failure' ELSE 'success' END AS outcome,
               CASE WHEN NOT d.word_present THEN NULL
                    WHEN s.delta < 0 OR a.pi > 0 THEN 'priming'
                    WHEN s.delta IS NULL OR a.pi IS NULL THEN NULL
                    ELSE 'override' END AS taxonomy,
               s.delta, a.pi,
               'priming where delta < 0 or pi > 0 (mean over layers and heads at the first step), else override'
                   AS taxonomy_rule
        FROM detections d LEFT JOIN suppression s USING (prompt_id, condition)
             LEFT JOIN priming a USING (prompt_id, condition)
        WHERE d.mode = 'greedy' AND d.condition <> 'baseline';
    CREATE VIEW greedy_answers AS
        SELECT c.prompt_id, c.condition, c.token_ids, d.word_present, d.first_step
        FROM completions c JOIN detections d USING (prompt_id, condition, mode, sample_id) WHERE c.mode = 'greedy';
    CREATE VIEW compared AS
        SELECT prompt_id, condition, outcome, unnest([condition, 'baseline']) AS measured FROM outcomes;
    CREATE VIEW attention_heads AS
        {
        " UNION ALL ".join(
            f"SELECT prompt_id, condition, step_kind, layer, '{m}' AS measure, generate_subscripts({m}, 1) - 1 AS head, "
            f"unnest({m}) AS value FROM attention WHERE {m} IS NOT NULL"
            for m in _ATTENTION_MEASURES
        )
    };
    CREATE VIEW attention_moments AS
        SELECT c.condition, c.measured, c.outcome, a.step_kind, a.layer, a.head, a.measure,
               count(*) AS n, avg(a.value) AS mean, var_samp(a.value) AS var
        FROM compared c JOIN attention_heads a ON a.prompt_id = c.prompt_id AND a.condition = c.measured
        GROUP BY ALL
        UNION ALL
        {
        " UNION ALL ".join(
            f"SELECT c.condition, c.measured, c.outcome, a.step_kind, a.layer, -1 AS head, '{m}' AS measure, "
            f"count(*) AS n, avg(list_avg({m})) AS mean, var_samp(list_avg({m})) AS var "
            f"FROM compared c JOIN attention a ON a.prompt_id = c.prompt_id AND a.condition = c.measured "
            f"WHERE {m} IS NOT NULL GROUP BY ALL"
            for m in _ATTENTION_MEASURES
        )
    };
    CREATE VIEW lens_moments AS
        {
        " UNION ALL ".join(
            f"SELECT c.condition, c.measured, c.outcome, l.step_kind, l.layer, '{m}' AS measure, count(*) AS n, "
            f"avg({m}) AS mean, var_samp({m}) AS var "
            f"FROM compared c JOIN lens l ON l.prompt_id = c.prompt_id AND l.condition = c.measured GROUP BY ALL"
            for m in ("p_target", "p_emitted", "entropy", "kl_final")
        )
    };
    CREATE VIEW decomposition_moments AS
        {
        " UNION ALL ".join(
            f"SELECT c.condition, c.measured, c.outcome, l.step_kind, l.layer, '{m}' AS measure, count(*) AS n, "
            f"avg({m}) AS mean, var_samp({m}) AS var "
            f"FROM compared c JOIN decomposition l ON l.prompt_id = c.prompt_id AND l.condition = c.measured GROUP BY ALL"
            for m in ("attn_contrib", "ffn_contrib", "p_out")
        )
    };
    """,
    """
    ALTER TABLE contexts ADD COLUMN offsets INTEGER[2][];
    CREATE TABLE vocabulary (token_id INTEGER PRIMARY KEY, text VARCHAR, is_special BOOLEAN);
    """,
    """
    ALTER TABLE stages ADD COLUMN num_rows BIGINT DEFAULT 0;
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)

TABLES = (
    "vocabulary", "prompts", "contexts", "psem", "completions", "detections", "attention", "lens", "decomposition", "patching",
    "activations", "artifacts", "statistics", "sanity", "stages", "batches", "events",
)  # fmt: skip
VIEWS = (
    "suppression", "violation", "outcomes", "greedy_answers", "compared", "attention_heads", "attention_moments", "lens_moments",
    "decomposition_moments",
)  # fmt: skip
MACHINERY = ("stages", "batches", "events")
"""Tables that tell how a run went; the others tell what it measured."""
MEASURED = tuple(name for name in TABLES if name not in MACHINERY)

_DROPPED = "what it rested on was measured again, and it is not among the items any more"
_FAILED = (  # an item's last word counts: failed, or recovered or dropped since
    "SELECT item_key FROM events WHERE stage = ? AND kind IN ('failed_item', 'recovered_item', 'dropped_item') "
    "GROUP BY item_key HAVING arg_max(kind, event_id) = 'failed_item' ORDER BY item_key"
)
BatchStatus = Literal["planned", "done", "split"]


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
    tokens: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class TableSeal:
    """What a table held when it was sealed: `sha256` is of its rows' digests in the order of their keys."""

    columns: tuple[str, ...]
    rows: int
    sha256: str


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


class Store:
    """The writer of one run. Opening it brings the file to this schema; a file of a newer one is refused."""

    LIBRARY = f"duckdb {duckdb.__version__}"

    def __init__(self, path: Path):
        self.path = path
        self._publish_cost_s = 0.0
        self._published = 0.0
        is_new = not path.exists()
        with _disk_errors():
            try:
                self._con = duckdb.connect(str(path))
                self._con.execute("SET preserve_insertion_order = true")
                self._con.execute(
                    "SET threads = 1"
                )  # threads add floats up in any order, and a view's mean would change
                _migrate(self._con, path)
            except duckdb.Error as e:
                if is_new:  # a fragment would stand in the way of the next attempt
                    path.unlink(missing_ok=True)
                if disk_full(e) is not None:
                    raise
                raise StoreError(f"{path}: cannot be opened as a results store: {_one_line(e)}") from e
        self._schemas: dict[str, pa.Schema] = {}
        self._keys: dict[str, list[str]] = {}

    def close(self) -> None:
        self._con.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the machinery's own tables

    def start_stage(self, stage: str, version: int, num_items: int, num_done: int = 0) -> None:
        """Record that a stage begins or goes on, with the number of items it has and of those done already."""
        with self._transaction():
            self._con.execute(
                "INSERT INTO stages VALUES (?, ?, 'running', ?, ?, ?, 0, 0, 0) "
                "ON CONFLICT DO UPDATE SET status = 'running', version = excluded.version, "
                "num_items = excluded.num_items, num_done = excluded.num_done, num_failed = excluded.num_failed",
                [stage, version, num_items, num_done, len(self._failed(stage))],
            )

    def drop_items(self, stage: str, keys: Sequence[str]) -> None:
        """Record that failed items are no more: what they rested on was measured again."""
        with self._transaction():
            for key in keys:
                self._event("info", "dropped_item", _DROPPED, stage, None, key)

    def finish_stage(self, stage: str, status: str) -> None:
        with self._transaction():
            self._con.execute("UPDATE stages SET status = ? WHERE stage = ?", [status, stage])

    def stage_rows(self) -> list[Row]:
        return self.query("SELECT * FROM stages")

    def plan(self, stage: str) -> list[Batch]:
        """Every batch ever stored for a stage, in the order of their ids."""
        rows = self.query("SELECT * FROM batches WHERE stage = ? ORDER BY batch_id", [stage])
        return [
            Batch(r["stage"], r["batch_id"], tuple(r["keys"]), r["padded_tokens"], r["parent"], r["attempt"], r["status"],
                  r["peak_bytes"])
            for r in rows
        ]  # fmt: skip

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
                self._event("info", "dropped_item", _DROPPED, batch.stage, batch.batch_id, key)
            if batch.attempt > 1:
                for key in batch.keys:
                    if key not in failed:
                        self._event(
                            "info", "recovered_item", "measured on a later attempt", batch.stage, batch.batch_id, key
                        )
            self._con.execute(
                "UPDATE batches SET status = 'done', seconds = ?, peak_bytes = ? WHERE stage = ? AND batch_id = ?",
                [result.seconds, result.peak_bytes, batch.stage, batch.batch_id],
            )
            self._con.execute(
                "UPDATE stages SET num_done = num_done + ?, num_failed = ?, seconds = seconds + ?, tokens = tokens + ?, "
                "num_rows = num_rows + ? WHERE stage = ?",
                [
                    len(batch.keys) - len(failed) - len(result.dropped),
                    len(self._failed(batch.stage)),
                    result.seconds,
                    result.tokens,
                    num_rows,
                    batch.stage,
                ],
            )

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
        return _rows(self._con, sql, params)

    def table(self, name: str) -> list[Row]:
        """A whole table in the order of its key, or a whole view in the order of its columns."""
        return self.query(f"SELECT * FROM {name} ORDER BY {', '.join(self._key(name)) or 'ALL'}")

    def counts(self) -> dict[str, int]:
        """Rows of every table."""
        return {name: int(self.query(f"SELECT count(*) AS n FROM {name}")[0]["n"]) for name in TABLES}

    def publish(self, live: Path) -> None:
        """Replace the snapshot that readers open. A snapshot is written whole beside it and renamed into place."""
        start = time.perf_counter()
        with replacing(live) as temporary, _disk_errors():
            temporary.unlink(missing_ok=True)
            self._con.execute(f"ATTACH '{_quoted(temporary)}' AS snapshot")
            try:
                self._con.execute(f"COPY FROM DATABASE {_identifier(self._database())} TO snapshot")
            finally:
                self._con.execute("DETACH snapshot")
        self._publish_cost_s = time.perf_counter() - start
        self._published = time.perf_counter()

    def publish_if_due(self, live: Path, every_s: float = 2.0, share: float = 0.03) -> None:
        """Publish when the snapshot is older than `every_s` and publishing stays under `share` of the wall time."""
        age = time.perf_counter() - self._published
        if age >= max(every_s, self._publish_cost_s / share):
            self.publish(live)

    def seal(self, path: Path) -> dict[str, TableSeal]:
        """Write the key and a digest of every row to `path`, as Parquet, so that a later change of any row can be named.

        About a second for every 50 million numbers, on each core.
        """
        columns = {name: tuple(self._schema(name).names) for name in TABLES}
        with replacing(path) as temporary, _disk_errors(), self._all_cores():
            self._con.execute(
                "CHECKPOINT"
            )  # a process that dies from here on leaves no row in DuckDB's log of writes alone
            self._con.execute(
                f"COPY ({_digests(self._con, columns)}) TO '{_quoted(temporary)}' (FORMAT parquet, COMPRESSION zstd)"
            )
            found = self._con.execute(
                f"SELECT tbl, count(*), {_DIGEST_OF_ALL} FROM read_parquet('{_quoted(temporary)}') GROUP BY tbl"
            ).fetchall()
        told = {name: (rows, digest) for name, rows, digest in found}
        return {name: TableSeal(columns[name], *told.get(name, (0, _EMPTY))) for name in TABLES}

    # -- inside

    @contextmanager
    def _all_cores(self) -> Iterator[None]:
        """For what adds up no floats."""
        self._con.execute(f"SET threads = {os.cpu_count() or 1}")
        try:
            yield
        finally:
            self._con.execute("SET threads = 1")

    @contextmanager
    def _transaction(self):
        with _disk_errors():
            self._con.execute("BEGIN")
            try:
                yield
                self._con.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # a failed COMMIT has ended it already
                    self._con.execute("ROLLBACK")
                raise

    def _database(self) -> str:
        return str(self._con.execute("SELECT current_database()").fetchall()[0][0])

    def _schema(self, table: str) -> pa.Schema:
        if table not in self._schemas:
            self._schemas[table] = self._con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
        return self._schemas[table]

    def _key(self, table: str) -> list[str]:
        if table not in self._keys:
            self._keys[table] = _primary_key(self._con, table)
        return self._keys[table]

    def _insert(self, table: str, rows: Sequence[Row]) -> None:
        if rows:
            self._with_rows(table, rows, f"INSERT INTO {table} BY NAME SELECT * FROM incoming")

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
        schema = pa.schema([f for f in self._schema(table) if f.name in given])
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
            [_utc_now(), level, stage, batch_id, key, kind, message],
        )

    def _failed(self, stage: str) -> list[str]:
        return [r[0] for r in self._con.execute(_FAILED, [stage]).fetchall()]

    @staticmethod
    def _batch_row(batch: Batch) -> Row:
        return {
            "stage": batch.stage, "batch_id": batch.batch_id, "parent": batch.parent, "status": batch.status,
            "keys": list(batch.keys), "num_items": len(batch.keys), "padded_tokens": batch.padded_tokens,
            "attempt": batch.attempt,
        }  # fmt: skip


class Reader:
    """Reads one run's snapshot and holds nothing that could hinder its writer.

    The snapshot is attached to a database in memory of its own: `duckdb.connect` on the file itself would hand out the
    old snapshot for as long as any connection to it is open. It is attached through a file descriptor, because DuckDB
    opens a path twice while attaching it, and a snapshot published in between would be read with the old one's header.
    """

    def __init__(self, live: Path):
        self.path = live
        try:
            self._file = live.open("rb")
        except FileNotFoundError as e:
            raise StoreError(f"{live}: no snapshot yet; the run has not published one") from e
        except OSError as e:
            raise StoreError(f"{live}: cannot be opened as a snapshot: {e.strerror}") from e
        self.published = os.fstat(self._file.fileno()).st_mtime
        by_number = Path(f"/proc/self/fd/{self._file.fileno()}")
        self._held = by_number if by_number.exists() else live
        self._con = duckdb.connect(":memory:")
        try:
            self._con.execute(f"ATTACH '{_quoted(self._held)}' AS run (READ_ONLY)")
            self._con.execute("USE run")
        except duckdb.Error as e:
            self.close()
            raise StoreError(f"{live}: cannot be opened as a snapshot: {_one_line(e)}") from e

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was published."""
        return max(0.0, time.time() - self.published)

    @property
    def schema_version(self) -> int:
        return int(self.query("SELECT coalesce(max(version), 0) AS v FROM schema_version")[0]["v"])

    def tables(self) -> list[str]:
        """Tables and views of this run, as its own schema has them."""
        return [r["table_name"] for r in self.query(
            "SELECT table_name FROM information_schema.tables WHERE table_catalog = 'run' ORDER BY table_name")]  # fmt: skip

    def query(self, sql: str, params: Sequence[object] | None = None) -> list[Row]:
        try:
            return _rows(self._con, sql, params)
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {_one_line(e)}") from e

    def frame(self, sql: str, params: Sequence[object] | None = None) -> Any:
        """As `query`, as a pandas data frame, which keeps its columns where there is no row."""
        try:
            return self._con.execute(sql, params or []).fetchdf()
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {_one_line(e)}") from e

    def table(self, name: str) -> pa.Table:
        """A table or view, in the order of its key where it has one."""
        assert name in self.tables(), f"no table {name}"
        order = ", ".join(_primary_key(self._con, name)) or "ALL"
        return self._arrow(f"SELECT * FROM {name} ORDER BY {order}")

    def rows(self, name: str) -> list[Row]:
        """As `Store.table`, with the same bits in every mean of a view."""
        self._con.execute("SET threads = 1")
        try:
            return self.query(f"SELECT * FROM {name} ORDER BY {', '.join(_primary_key(self._con, name)) or 'ALL'}")
        finally:
            self._con.execute(f"SET threads = {os.cpu_count() or 1}")

    def failed(self, stage: str) -> list[str]:
        """As `Store.failed`."""
        return [r["item_key"] for r in self.query(_FAILED, [stage])]

    def broken_rows(self, seal: Path, sealed: Mapping[str, TableSeal], at_most: int = 20) -> list[Broken]:
        """The first rows that are not as `Store.seal` found them; a table or column that is gone is one with an empty key."""
        here = set(self.tables())
        lost = {
            name: set(s.columns) - {c for c, _ in self._columns(name)} for name, s in sealed.items() if name in here
        }
        broken = [Broken(name, "", "missing") for name in sorted(sealed.keys() - here)]
        broken += [Broken(f"{name}.{column}", "", "missing") for name, gone in lost.items() for column in sorted(gone)]
        columns = {name: s.columns for name, s in sealed.items() if name in here and not lost[name]}
        found = self.query(
            f"SELECT coalesce(now.tbl, was.tbl) AS table, coalesce(now.key, was.key) AS key, "
            "CASE WHEN was.tbl IS NULL THEN 'added' WHEN now.tbl IS NULL THEN 'missing' ELSE 'changed' END AS how "
            f"FROM ({_digests(self._con, columns)}) now FULL JOIN "
            f"(SELECT * FROM read_parquet('{_quoted(seal)}') WHERE list_contains(?, tbl)) was USING (tbl, key) "
            f"WHERE now.digest IS DISTINCT FROM was.digest ORDER BY 1, 2 LIMIT {at_most}",
            [list(columns)],
        ) if columns else []  # fmt: skip
        return broken + [Broken(**row) for row in found]

    def definitions(self) -> dict[str, str]:
        """How every table and view is defined, by name; equal for two stores of one schema version."""
        return {r["name"]: r["sql"] for r in self.query(
            "SELECT table_name AS name, sql FROM duckdb_tables() WHERE database_name = 'run' UNION ALL "
            "SELECT view_name, sql FROM duckdb_views() WHERE database_name = 'run' AND NOT internal")}  # fmt: skip

    def same_rows(self, table: str, rows: Sequence[Row]) -> Aligned:
        """These rows beside those of the table with the same keys, in the columns given; as the table would hold them."""
        key = _primary_key(self._con, table)
        schema = self._con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
        given = [f.name for f in schema if f.name in rows[0]]
        self._con.register("measured_again", pa.Table.from_pylist(list(rows), schema=schema))
        try:
            return self._align(f"run.{table}", "measured_again", key, given)
        finally:
            self._con.unregister("measured_again")

    def aligned(self, other: "Reader", table: str) -> Aligned:
        """The same table of two runs; `one` is this run's. Raises StoreError where one has no such table."""
        names = [name for name, _ in other._columns(table)]
        shared = [name for name, _ in self._columns(table) if name in names]
        self._con.execute(f"ATTACH '{_quoted(other._held)}' AS other_run (READ_ONLY)")
        try:
            return self._align(f"run.{table}", f"other_run.{table}", _primary_key(self._con, table), shared)
        finally:
            self._con.execute("DETACH other_run")

    def _align(self, one: str, other: str, key: Sequence[str], columns: Sequence[str]) -> Aligned:
        using, chosen = ", ".join(map(_identifier, key)), ", ".join(map(_identifier, columns))
        both = [self._arrow(f"SELECT {chosen} FROM {a} SEMI JOIN {b} USING ({using}) ORDER BY {using}")
                for a, b in ((one, other), (other, one))]  # fmt: skip
        only = [self.query(f"SELECT count(*) AS n FROM {a} ANTI JOIN {b} USING ({using})")[0]["n"]
                for a, b in ((one, other), (other, one))]  # fmt: skip
        return Aligned(tuple(key), both[0], both[1], only[0], only[1])

    def _arrow(self, sql: str) -> pa.Table:
        try:
            return self._con.sql(sql).to_arrow_table()
        except duckdb.Error as e:
            raise StoreError(f"{self.path}: {_one_line(e)}") from e

    def export(self, name: str, path: Path, form: Literal["parquet", "csv", "jsonl"]) -> int:
        """Write a table to `path`, whole or not at all; the number of its rows."""
        how = {"parquet": "FORMAT parquet", "csv": "FORMAT csv, HEADER", "jsonl": "FORMAT json"}[form]
        key = _primary_key(self._con, name)
        order = ", ".join(key) if key else "ALL"
        # As lists: DuckDB 2.0 writes a fixed-size array that is NULL in a way that other Parquet readers refuse.
        columns = ", ".join(
            f"{c}::{kind.replace('[2]', '[]')} AS {c}" if "[2]" in kind else c for c, kind in self._columns(name)
        )
        with replacing(path) as temporary, _disk_errors():
            self._con.execute(f"COPY (SELECT {columns} FROM {name} ORDER BY {order}) TO '{_quoted(temporary)}' ({how})")
        return int(self.query(f"SELECT count(*) AS n FROM {name}")[0]["n"])

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


@dataclass(frozen=True)
class Answer:
    """What a question of a reader's own gave: at most so many rows; whether there were more; how long it took."""

    rows: pa.Table
    is_cut: bool
    seconds: float


_MAX_QUESTION = 20_000  # characters
_MAX_ANSWER_BYTES = 64_000_000
_CHUNK = 1_024  # rows
# Once the snapshot is attached. A file that is attached already stays readable with external access off, and its path
# writable for a COPY inside a WITH: that is why the file system goes as well. Locked, none of it can be taken back.
_LOCKS = (
    "SET memory_limit = '1GB'", "SET threads = 2", "SET temp_directory = ''", "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false", "SET allow_community_extensions = false",
    "SET python_enable_replacements = false", "SET enable_external_access = false",
    "SET disabled_filesystems = 'LocalFileSystem'", "SET lock_configuration = true",
)  # fmt: skip


def ask_locked(live: Path, sql: str, max_rows: int = 1_000, limit_s: float = 10.0) -> Answer:
    """Answer whatever one SELECT asks of a snapshot. It sees this snapshot and nothing else of the machine, and changes nothing.

    Raises StoreError, in one line, for any other statement, for an error in it, and after `limit_s`. DuckDB looks at the
    clock and at its memory between vectors: a single call of a function can take more of both. `asking.answer` stops that.
    """
    with Reader(live) as reader:
        con = reader._con
        try:
            for setting in _LOCKS:
                con.execute(setting)
            _check_question(con, sql)
            start = time.perf_counter()
            with _interrupted_after(con, limit_s):
                rows, is_cut = _fetch(con, sql, max_rows)
        except (duckdb.OutOfMemoryException, MemoryError) as e:
            told = _one_line(e).partition(" Database is ")[0].partition(" Possible solutions")[0]  # which is none here
            raise StoreError(f"needed more than 1 GB of memory: {told or 'out of memory'}") from e
        except (duckdb.Error, pa.ArrowException, OSError, ValueError, RuntimeError) as e:
            if str(e).startswith("INTERRUPT"):
                raise StoreError(f"stopped after {limit_s:g} s: ask for less, or for an aggregate") from e
            raise StoreError(_one_line(e) or type(e).__name__) from e
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


def _migrate(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Apply what is missing, each migration in one transaction with its record: a crash leaves it pending, never half done."""
    con.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY, applied TIMESTAMP)")
    current = con.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchall()[0][0]
    if current > SCHEMA_VERSION:
        raise StoreError(
            f"{path}: has schema {current}, this harness knows up to {SCHEMA_VERSION}; use a newer harness"
        )
    for version in range(current + 1, SCHEMA_VERSION + 1):
        con.execute("BEGIN")
        try:
            con.execute(_MIGRATIONS[version - 1])
            con.execute("INSERT INTO schema_version VALUES (?, ?)", [version, _utc_now()])
            con.execute("COMMIT")
        except BaseException:
            con.execute("ROLLBACK")
            raise


@contextmanager
def _disk_errors():
    """A full disk is the machine's fault, and says so; the transaction in progress is gone, nothing else."""
    try:
        yield
    except (duckdb.Error, OSError) as e:
        if (fault := disk_full(e)) is not None:
            raise fault from e
        raise


def _rows(con: duckdb.DuckDBPyConnection, sql: str, params: Sequence[object] | None) -> list[Row]:
    cursor = con.execute(sql, params or [])
    names = [d[0] for d in cursor.description or []]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def _primary_key(con: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    found = con.execute(
        "SELECT constraint_column_names FROM duckdb_constraints() "
        "WHERE table_name = ? AND constraint_type = 'PRIMARY KEY' AND database_name = current_database()",
        [table],
    ).fetchall()
    return list(found[0][0]) if found else []


_DIGEST_OF_ALL = "sha256(coalesce(string_agg(digest, '' ORDER BY key), ''))"
_EMPTY = hashlib.sha256(b"").hexdigest()


def _digests(con: duckdb.DuckDBPyConnection, columns: Mapping[str, Sequence[str]]) -> str:
    """A query of tbl, key and digest of every row of these tables, over these columns. JSON tells NULL from 'NULL'."""

    def packed(names: Sequence[str]) -> str:
        return f"to_json(struct_pack({', '.join(f'{_identifier(n)} := {_identifier(n)}' for n in names)}))::VARCHAR"

    return " UNION ALL ".join(
        f"SELECT '{name}' AS tbl, {packed(_primary_key(con, name) or chosen)} AS key, "
        f"left(sha256({packed(chosen)}), 16) AS digest FROM {name}"
        for name, chosen in columns.items()
    )


def _quoted(path: os.PathLike[str] | str) -> str:
    return str(path).replace("'", "''")


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _utc_now() -> datetime:
    """UTC without a zone: DuckDB hands out zoned times only where pytz is installed."""
    return datetime.now(UTC).replace(tzinfo=None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
