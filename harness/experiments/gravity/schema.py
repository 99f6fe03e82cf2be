"""Tables and views of gravity, and what those who check, compare and export them should know."""

from harness.store.schema import Schema, TableFacts
from harness.tolerance import TOLERANCE

_SPAN = "INTEGER[2]"
_ATTENTION_MEASURES = ("iar", "nf", "tmf", "pi", "iar_token", "nf_token", "tmf_token", "pi_token")


def _in_order(table: str, column: str) -> str:
    """A column's values beside the outcomes they are compared by, in the order of their prompts: one a prompt and group."""
    return (
        f"(SELECT c.condition, c.measured, c.outcome, t.step_kind, t.layer, t.{column} AS measured_value FROM {table} t "
        f"JOIN compared c ON t.prompt_id = c.prompt_id AND t.condition = c.measured "
        f"{f'WHERE t.{column} IS NOT NULL ' if table == 'attention' else ''}ORDER BY t.prompt_id)"
    )


# Numbered from 1. Never edit one: append another.
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
    # The machinery's tables are apart from here on, each with a number of its own, and files speak for any experiment.
    """
    CREATE TABLE migrations (experiment VARCHAR, number INTEGER, applied TIMESTAMP, PRIMARY KEY (experiment, number));
    INSERT INTO migrations SELECT 'gravity', version, applied FROM schema_version;
    INSERT INTO migrations SELECT 'core', 1, max(applied) FROM schema_version;
    DROP TABLE schema_version;
    ALTER TABLE artifacts ADD COLUMN stage VARCHAR;
    ALTER TABLE artifacts ADD COLUMN batch_id INTEGER;
    ALTER TABLE artifacts ADD COLUMN item_key VARCHAR;
    ALTER TABLE artifacts ADD COLUMN keys MAP(VARCHAR, VARCHAR);
    UPDATE artifacts SET keys = map_from_entries(list_filter(
        [{'k': 'prompt_id', 'v': prompt_id}, {'k': 'condition', 'v': condition}], lambda entry: entry.v IS NOT NULL));
    """,
)

_ORDER = (
    "vocabulary",
    "prompts",
    "contexts",
    "psem",
    "completions",
    "detections",
    "attention",
    "lens",
    "decomposition",
    "patching",
    "activations",
    "artifacts",
    "statistics",
)
_IN_A_CONTEXT = ("psem", "completions", "detections", "attention", "lens", "decomposition", "activations")
_MOST = 1 + TOLERANCE["float32"].prob
"""What a sum of disjoint probabilities may come to."""
FACTS = TableFacts(
    derived=("statistics",),
    grows=("statistics",),
    ranks=("top_ids", "top_neurons"),
    # `attention` again with a row a head: a hundred times as many rows, and nothing that is not in `attention`.
    not_exported=("attention_heads",),
    orphans={
        "contexts": "SELECT prompt_id FROM contexts ANTI JOIN prompts USING (prompt_id)",
        "patching": "SELECT DISTINCT prompt_id FROM patching ANTI JOIN prompts USING (prompt_id)",
        "detections": "SELECT prompt_id, condition, mode, sample_id FROM detections "
        "ANTI JOIN completions USING (prompt_id, condition, mode, sample_id)",
        **{
            f"{name} (context)": f"SELECT DISTINCT prompt_id, condition FROM {name} "
            "ANTI JOIN contexts USING (prompt_id, condition)"
            for name in _IN_A_CONTEXT
        },
    },
    sense={
        "psem: lists not as long as num_sequences": "SELECT prompt_id, condition FROM psem "
        "WHERE num_sequences <> len(sequences) OR num_sequences <> len(logprobs)",
        "psem: a probability outside [0, 1]": "SELECT prompt_id, condition FROM psem WHERE NOT "
        f"(p_sem BETWEEN 0 AND {_MOST} AND p_word BETWEEN 0 AND {_MOST} AND paper_p_sem BETWEEN 0 AND 1)",
        "completions: not a log-probability a token": "SELECT prompt_id, condition, mode, sample_id FROM completions "
        "WHERE len(token_ids) <> len(logprobs)",
    },
)

SCHEMA = Schema("gravity", MIGRATIONS, made_core=7, order=_ORDER, facts=FACTS)
