"""What a store may hold: tables and views by schema version, and whether a file holds exactly those.

A store may come from a stranger. Its views run when they are read and its macros stand before DuckDB's own functions, so
nothing of it is asked before every object in it has been compared with what this version's migrations make.
"""

import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from harness.errors import StoreError

Row = dict[str, Any]
DATABASE = "run"
"""What every connection calls the store it has attached."""

_SPAN = "INTEGER[2]"
_ATTENTION_MEASURES = ("iar", "nf", "tmf", "pi", "iar_token", "nf_token", "tmf_token", "pi_token")


def _in_order(table: str, column: str) -> str:
    """A column's values beside the outcomes they are compared by, in the order of their prompts: one a prompt and group."""
    return (
        f"(SELECT c.condition, c.measured, c.outcome, t.step_kind, t.layer, t.{column} AS measured_value FROM {table} t "
        f"JOIN compared c ON t.prompt_id = c.prompt_id AND t.condition = c.measured "
        f"{f'WHERE t.{column} IS NOT NULL ' if table == 'attention' else ''}ORDER BY t.prompt_id)"
    )


# Each migration is applied once, in one transaction with the record that it was. Never edit one: append another.
MIGRATIONS: tuple[str, ...] = (
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
    # Floats are added up in the order of their prompts. DuckDB reads the parts of a table in any order where an aggregate
    # follows, and a store that was opened again has other parts: without this, a killed run's means had other last bits.
    f"""
    CREATE OR REPLACE VIEW outcomes AS
        WITH priming AS (
            SELECT prompt_id, condition, avg(mean_pi) AS pi
            FROM (SELECT prompt_id, condition, list_avg(pi) AS mean_pi FROM attention WHERE step_kind = 'first' ORDER BY layer)
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
    CREATE OR REPLACE VIEW attention_moments AS
        {
        " UNION ALL ".join(
            f"SELECT condition, measured, outcome, step_kind, layer, head, '{m}' AS measure, "
            f"count(*) AS n, avg(value) AS mean, var_samp(value) AS var "
            f"FROM (SELECT condition, measured, outcome, step_kind, layer, generate_subscripts(measured_value, 1) - 1 AS head, "
            f"unnest(measured_value) AS value FROM {_in_order('attention', m)}) GROUP BY ALL"
            for m in _ATTENTION_MEASURES
        )
    }
        UNION ALL
        {
        " UNION ALL ".join(
            f"SELECT condition, measured, outcome, step_kind, layer, -1 AS head, '{m}' AS measure, "
            f"count(*) AS n, avg(list_avg(measured_value)) AS mean, var_samp(list_avg(measured_value)) AS var "
            f"FROM {_in_order('attention', m)} GROUP BY ALL"
            for m in _ATTENTION_MEASURES
        )
    };
    CREATE OR REPLACE VIEW lens_moments AS
        {
        " UNION ALL ".join(
            f"SELECT condition, measured, outcome, step_kind, layer, '{m}' AS measure, count(*) AS n, "
            f"avg(measured_value) AS mean, var_samp(measured_value) AS var FROM {_in_order('lens', m)} GROUP BY ALL"
            for m in ("p_target", "p_emitted", "entropy", "kl_final")
        )
    };
    CREATE OR REPLACE VIEW decomposition_moments AS
        {
        " UNION ALL ".join(
            f"SELECT condition, measured, outcome, step_kind, layer, '{m}' AS measure, count(*) AS n, "
            f"avg(measured_value) AS mean, var_samp(measured_value) AS var "
            f"FROM {_in_order('decomposition', m)} GROUP BY ALL"
            for m in ("attn_contrib", "ffn_contrib", "p_out")
        )
    };
    """,
    # `tokens` of stages are those forwarded from here on; an older run's stages counted each in its own way.
    """
    ALTER TABLE batches ADD COLUMN tokens BIGINT;
    ALTER TABLE batches ADD COLUMN prefill_tokens BIGINT;
    ALTER TABLE batches ADD COLUMN padding_tokens BIGINT;
    ALTER TABLE batches ADD COLUMN work_s DOUBLE;
    ALTER TABLE stages ADD COLUMN prefill_tokens BIGINT DEFAULT 0;
    ALTER TABLE stages ADD COLUMN padding_tokens BIGINT DEFAULT 0;
    """,
    # The certificate's items. Its one row a measurement is computed from them: a killed run's is that of what it has.
    """
    CREATE TABLE sanity_items (
        measurement VARCHAR, subject VARCHAR, num_items INTEGER, max_abs DOUBLE, max_rel DOUBLE, flips INTEGER,
        near_ties INTEGER, tolerance DOUBLE, worst VARCHAR, repeated VARCHAR, ok BOOLEAN, left_out BOOLEAN, seconds DOUBLE,
        PRIMARY KEY (measurement, subject));
    INSERT INTO sanity_items BY NAME SELECT *, 'all' AS subject, false AS left_out FROM sanity;
    DROP TABLE sanity;
    CREATE VIEW sanity AS
        SELECT measurement, sum(num_items)::INTEGER AS num_items, max(max_abs) AS max_abs, max(max_rel) AS max_rel,
               sum(flips)::INTEGER AS flips, sum(near_ties)::INTEGER AS near_ties, max(tolerance) AS tolerance,
               first(worst ORDER BY ok, max_abs DESC, subject) FILTER (NOT left_out) AS worst,
               first(repeated ORDER BY ok, max_abs DESC, subject) FILTER (repeated IS NOT NULL) AS repeated,
               bool_and(ok) AS ok, (count(*) FILTER (left_out))::INTEGER AS num_left_out,
               coalesce(list(subject ORDER BY subject) FILTER (left_out), []) AS left_out
        FROM sanity_items GROUP BY measurement;
    """,
)
SCHEMA_VERSION = len(MIGRATIONS)

TABLES = (
    "vocabulary", "prompts", "contexts", "psem", "completions", "detections", "attention", "lens", "decomposition", "patching",
    "activations", "artifacts", "statistics", "sanity_items", "stages", "batches", "events",
)  # fmt: skip
VIEWS = (
    "suppression", "violation", "outcomes", "greedy_answers", "compared", "attention_heads", "attention_moments", "lens_moments",
    "decomposition_moments", "sanity",
)  # fmt: skip
MACHINERY = ("sanity_items", "stages", "batches", "events")
"""Tables that tell how a run went, which a clock has a part in; the others tell what it measured."""
MEASURED = tuple(name for name in TABLES if name not in MACHINERY)

DROPPED = "what it rested on was measured again, and it is not among the items any more"
FAILED = (  # an item's last word counts: failed, or recovered or dropped since
    "SELECT item_key FROM events WHERE stage = ? AND kind IN ('failed_item', 'recovered_item', 'dropped_item') "
    "GROUP BY item_key HAVING arg_max(kind, event_id) = 'failed_item' ORDER BY item_key"
)


class Entry(NamedTuple):
    """One object of a store: its kind, schema, name, and how it is defined."""

    kind: str
    schema: str
    name: str
    sql: str | None


class AlteredStore(StoreError):
    """A store that holds something else than a schema's own objects; `problems` names each."""

    def __init__(self, path: Path, problems: list[str]):
        self.problems = problems
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        super().__init__(
            f"{path}: not a results store as harness writes them, so nothing of it is read: {shown}; "
            "take the run from where it was made"
        )


# Every function by its full name: an unqualified one could be the store's own macro.
_CATALOG = " UNION ALL ".join(
    f"SELECT '{kind}', schema_name, {name}, {sql} FROM system.main.duckdb_{kind}s() WHERE database_name = '{DATABASE}'"
    for kind, name, sql in (
        ("table", "table_name", "sql"),
        ("view", "view_name", "sql"),
        ("function", "function_name", "macro_definition"),
        ("schema", "schema_name", "sql"),
        ("type", "type_name", "logical_type"),
        ("sequence", "sequence_name", "sql"),
        ("indexe", "index_name", "sql"),
        ("trigger", "trigger_name", "sql"),
    )
)


def catalog(con: duckdb.DuckDBPyConnection) -> frozenset[Entry]:
    """Every object of the attached store, DuckDB's own in it included; reads no row of it and runs nothing of it."""
    found = (Entry(*row) for row in con.execute(_CATALOG).fetchall())
    # A sequence tells where it stands as its start.
    return frozenset(
        e._replace(sql=re.sub(r"START \d+", "", e.sql or "")) if e.kind == "sequence" else e for e in found
    )


@lru_cache(maxsize=len(MIGRATIONS) + 1)
def expected(version: int) -> frozenset[Entry]:
    """What a store of this schema version holds; 0: what an empty file does."""
    with duckdb.connect(":memory:") as con:
        con.execute(f"ATTACH ':memory:' AS {DATABASE}")
        con.execute(f"USE {DATABASE}")
        if version:
            con.execute(_VERSIONS)
        for migration in MIGRATIONS[:version]:
            con.execute(migration)
        return catalog(con)


def check(con: duckdb.DuckDBPyConnection, path: Path) -> int:
    """The schema version of the attached store, 0 for an empty file. Asks nothing of it that it could answer by its own code.

    Raises AlteredStore where an object is missing, is not as this version's migrations make it, or is not of them.
    """
    found = catalog(con)
    version = next((v for v in range(SCHEMA_VERSION, -1, -1) if expected(v) == found), None)
    recorded = _recorded(con) if {e for e in expected(1) if e.name == "schema_version"} <= found else 0
    if version is None and recorded > SCHEMA_VERSION:
        raise StoreError(
            f"{path}: has schema {recorded}, this harness knows up to {SCHEMA_VERSION}; use a newer harness"
        )
    if version is None:
        nearest = min(range(1, SCHEMA_VERSION + 1), key=lambda v: len(expected(v) ^ found))
        raise AlteredStore(path, _told(found, expected(nearest)))
    if recorded != version:
        raise AlteredStore(path, [f"schema_version records {recorded}, its tables are those of {version}"])
    return version


def migrate(con: duckdb.DuckDBPyConnection, current: int) -> None:
    """Apply what is missing, each migration in one transaction with its record: a crash leaves it pending, never half done."""
    for version in range(current + 1, SCHEMA_VERSION + 1):
        con.execute("BEGIN")
        try:
            if version == 1:
                con.execute(_VERSIONS)
            con.execute(MIGRATIONS[version - 1])
            con.execute("INSERT INTO schema_version VALUES (?, ?)", [version, utc_now()])
            con.execute("COMMIT")
        except BaseException:
            with suppress(duckdb.Error):  # a failed COMMIT has ended it already
                con.execute("ROLLBACK")
            raise


def primary_key(con: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """The columns of a table's key; none for a view."""
    found = con.execute(
        "SELECT constraint_column_names FROM system.main.duckdb_constraints() "
        f"WHERE table_name = ? AND constraint_type = 'PRIMARY KEY' AND database_name = '{DATABASE}'",
        [table],
    ).fetchall()
    return list(found[0][0]) if found else []


def quoted(path: os.PathLike[str] | str) -> str:
    """A path as it stands between quotes in SQL."""
    return str(path).replace("'", "''")


def identifier(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def utc_now() -> datetime:
    """UTC without a zone: DuckDB hands out zoned times only where pytz is installed."""
    return datetime.now(UTC).replace(tzinfo=None)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


_VERSIONS = "CREATE TABLE schema_version (version INTEGER PRIMARY KEY, applied TIMESTAMP)"


def _recorded(con: duckdb.DuckDBPyConnection) -> int:
    """The version that a store's table of versions records; the table is known to be one."""
    rows = con.execute(f"SELECT version FROM {DATABASE}.main.schema_version").fetchall()
    return max((row[0] for row in rows), default=0)


def _told(found: frozenset[Entry], wanted: frozenset[Entry]) -> list[str]:
    """One line for each object that differs."""
    kinds = {"function": "macro", "indexe": "index"}
    names = sorted({(e.kind, e.schema, e.name) for e in found ^ wanted})
    there, due = ({(e.kind, e.schema, e.name) for e in entries} for entries in (found, wanted))
    hows = (
        "is missing" if n not in there else "is not of this schema" if n not in due else "is defined otherwise"
        for n in names
    )
    return [
        f"{kinds.get(kind, kind)} {name if schema == 'main' else f'{schema}.{name}'} {how}"
        for (kind, schema, name), how in zip(names, hows, strict=True)
    ]
