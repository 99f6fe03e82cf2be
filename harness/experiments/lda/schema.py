"""Tables and views of logit-diff amplification, and what those who check, compare and export them should know."""

from harness.store.schema import Schema, TableFacts
from harness.tolerance import TOLERANCE

NATURAL = "alpha=0"
"""The condition of the model after, as it is."""

# Numbered from 1. Never edit one that was released: append another.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE pair (
        side VARCHAR PRIMARY KEY, model VARCHAR, revision VARCHAR, vocab_size INTEGER, head_rows INTEGER,
        num_common INTEGER, vocabs_match BOOLEAN, special_match BOOLEAN, stop_ids INTEGER[], template_sha256 VARCHAR,
        warning VARCHAR);
    CREATE TABLE arms (
        condition VARCHAR PRIMARY KEY, alpha DOUBLE, floor DOUBLE, temperature DOUBLE, top_p DOUBLE);
    CREATE TABLE vocabulary (token_id INTEGER PRIMARY KEY, text VARCHAR, is_special BOOLEAN);
    CREATE TABLE prompts (prompt_id VARCHAR PRIMARY KEY, category VARCHAR, question VARCHAR, row_hash VARCHAR);
    CREATE TABLE contexts (
        prompt_id VARCHAR, condition VARCHAR, text VARCHAR, token_ids INTEGER[], offsets INTEGER[2][],
        PRIMARY KEY (prompt_id, condition));
    CREATE TABLE exact_rates (
        prompt_id VARCHAR, detector VARCHAR, condition VARCHAR, logp DOUBLE, num_sequences INTEGER, logp_after DOUBLE,
        logp_before DOUBLE, logp_left_out DOUBLE,
        PRIMARY KEY (prompt_id, detector, condition));
    CREATE TABLE completions (
        prompt_id VARCHAR, condition VARCHAR, mode VARCHAR, sample_id INTEGER, token_ids INTEGER[], text VARCHAR,
        answer VARCHAR, finish_reason VARCHAR, logprobs FLOAT[], margins FLOAT[],
        PRIMARY KEY (prompt_id, condition, mode, sample_id));
    CREATE TABLE rollouts (
        prompt_id VARCHAR, condition VARCHAR, mode VARCHAR, sample_id INTEGER, logp_after FLOAT[], logp_before FLOAT[],
        logp_arm FLOAT[], arm_logps DOUBLE[], arm_steps FLOAT[], mass_removed FLOAT[],
        PRIMARY KEY (prompt_id, condition, mode, sample_id));
    CREATE TABLE hits (
        prompt_id VARCHAR, condition VARCHAR, mode VARCHAR, sample_id INTEGER, detector VARCHAR, is_hit BOOLEAN,
        first_step INTEGER, end_step INTEGER, char_span INTEGER[2], text VARCHAR,
        PRIMARY KEY (prompt_id, condition, mode, sample_id, detector));
    CREATE TABLE token_diffs (
        token_id INTEGER, place VARCHAR, n BIGINT, mean DOUBLE, sd DOUBLE, share_positive DOUBLE, num_top INTEGER,
        PRIMARY KEY (token_id, place));
    CREATE TABLE statistics (
        analysis VARCHAR, detector VARCHAR, condition VARCHAR, measure VARCHAR, value DOUBLE, se DOUBLE, low DOUBLE,
        high DOUBLE, p DOUBLE, q DOUBLE, n INTEGER, method VARCHAR,
        PRIMARY KEY (analysis, detector, condition, measure));

    -- `branch_step` follows from two rollouts, either of which may fail and be made later: so it is no column of one.
    CREATE VIEW amplified AS
        SELECT r.prompt_id, r.condition, r.mode, r.sample_id, r.logp_after, r.logp_before, r.logp_arm, r.arm_logps,
               r.arm_steps, r.mass_removed,
               CASE WHEN z.token_ids IS NOT NULL THEN nullif(coalesce(list_position(list_transform(
                   list_zip(c.token_ids, z.token_ids), lambda pair: pair[1] IS DISTINCT FROM pair[2]), true), 0), 0) - 1
               END AS branch_step
        FROM rollouts r JOIN completions c USING (prompt_id, condition, mode, sample_id)
             LEFT JOIN completions z ON z.prompt_id = r.prompt_id AND z.condition = '{NATURAL}' AND z.mode = r.mode
                  AND z.sample_id = r.sample_id;
    CREATE VIEW rollout_summaries AS
        SELECT a.prompt_id, a.condition, a.mode, a.sample_id, len(c.token_ids) AS num_tokens, c.finish_reason,
               list_avg(a.mass_removed) AS mass_removed, a.branch_step
        FROM amplified a JOIN completions c USING (prompt_id, condition, mode, sample_id);
    CREATE VIEW hit_rates AS
        SELECT prompt_id, condition, detector, count(*) AS num_rollouts, count(*) FILTER (is_hit) AS num_hits,
               count(*) FILTER (is_hit) / count(*) AS rate
        FROM hits GROUP BY prompt_id, condition, detector;
    """,
)

_ORDER = (
    "pair",
    "arms",
    "vocabulary",
    "prompts",
    "contexts",
    "exact_rates",
    "completions",
    "rollouts",
    "hits",
    "artifacts",
    "token_diffs",
    "statistics",
)
_KEY = "prompt_id, condition, mode, sample_id"
_MOST_LOGP = TOLERANCE["float32"].prob
FACTS = TableFacts(
    derived=("statistics",),
    grows=("statistics",),
    not_exported=("rollouts",),  # `amplified` is the same with a column more
    orphans={
        "contexts": "SELECT prompt_id FROM contexts ANTI JOIN prompts USING (prompt_id)",
        "exact_rates": "SELECT DISTINCT prompt_id FROM exact_rates ANTI JOIN prompts USING (prompt_id)",
        "completions": "SELECT DISTINCT prompt_id FROM completions ANTI JOIN prompts USING (prompt_id)",
        "completions (arm)": "SELECT DISTINCT condition FROM completions ANTI JOIN arms USING (condition)",
        "rollouts": f"SELECT {_KEY} FROM rollouts ANTI JOIN completions USING ({_KEY})",
        "completions (rollout)": f"SELECT {_KEY} FROM completions ANTI JOIN rollouts USING ({_KEY})",
        "hits": f"SELECT {_KEY} FROM hits ANTI JOIN completions USING ({_KEY})",
    },
    sense={
        "exact_rates: a log-probability above 0": "SELECT prompt_id, detector, condition FROM exact_rates "
        f"WHERE logp > {_MOST_LOGP}",
        "rollouts: not a number of each kind a token": f"SELECT {_KEY} FROM rollouts JOIN completions USING ({_KEY}) "
        "WHERE len(logp_arm) <> len(token_ids) OR len(mass_removed) <> len(token_ids) "
        "OR len(coalesce(logp_after, logp_arm)) <> len(token_ids) OR len(coalesce(logp_before, logp_arm)) <> len(token_ids)",
        "rollouts: not a log-probability an arm": f"SELECT {_KEY} FROM rollouts "
        "WHERE len(arm_logps) <> (SELECT count(*) FROM arms) OR len(arm_steps) <> len(arm_logps) * len(logp_arm)",
        "hits: a hit without its place": f"SELECT {_KEY}, detector FROM hits WHERE is_hit AND "
        "(first_step IS NULL OR end_step IS NULL OR end_step < first_step OR char_span IS NULL)",
    },
)

SCHEMA = Schema("lda", MIGRATIONS, order=_ORDER, facts=FACTS)
