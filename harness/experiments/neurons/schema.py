"""Tables and views of the neuron experiment, and what those who check, compare and export them should know."""

from harness.store.schema import Schema, TableFacts

# Numbered from 1. Never edit one that was released: append another.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE vocabulary (token_id INTEGER PRIMARY KEY, text VARCHAR, is_special BOOLEAN);
    CREATE TABLE prompts (
        prompt_id VARCHAR PRIMARY KEY, category VARCHAR, text VARCHAR, target VARCHAR, contrast VARCHAR, row_hash VARCHAR);
    CREATE TABLE contexts (
        prompt_id VARCHAR, condition VARCHAR, text VARCHAR, token_ids INTEGER[], pieces VARCHAR[], offsets INTEGER[2][],
        positions INTEGER[], is_counted BOOLEAN[],
        PRIMARY KEY (prompt_id, condition));
    CREATE TABLE neuron_rows (
        prompt_id VARCHAR PRIMARY KEY, path VARCHAR, row_start INTEGER, row_end INTEGER, dtype VARCHAR);
    -- Texts whose activations are no numbers: statistics are of the others.
    CREATE TABLE left_out (stage VARCHAR, prompt_id VARCHAR, layer INTEGER, position INTEGER, PRIMARY KEY (stage, prompt_id));
    CREATE TABLE neurons (
        layer INTEGER, neuron INTEGER, num_prompts BIGINT, num_tokens BIGINT, mean_peak DOUBLE, sd_peak DOUBLE,
        max_peak DOUBLE, min_peak DOUBLE, max_signed DOUBLE, mean DOUBLE, sd DOUBLE, share_active DOUBLE, kurtosis DOUBLE,
        peak_token_mode INTEGER, peak_token_share DOUBLE, num_peak_tokens INTEGER, next_token_mode INTEGER,
        num_next_tokens INTEGER, tokens_error INTEGER, share_functional DOUBLE, mean_background DOUBLE,
        peak_background DOUBLE, sd_background DOUBLE, z_background DOUBLE, p_background DOUBLE, q DOUBLE, out_norm DOUBLE,
        examples STRUCT(prompt_id VARCHAR, position INTEGER, value DOUBLE)[],
        PRIMARY KEY (layer, neuron));
    CREATE TABLE targets (
        prompt_id VARCHAR PRIMARY KEY, mode VARCHAR, token_ids INTEGER[], contrast_ids INTEGER[], position INTEGER,
        logit DOUBLE, logit_contrast DOUBLE, p DOUBLE, rank INTEGER, margin DOUBLE, top_ids INTEGER[], top_probs DOUBLE[]);
    CREATE TABLE influence (
        prompt_id VARCHAR, metric VARCHAR, layer INTEGER, neuron INTEGER, position INTEGER, activation DOUBLE, value DOUBLE,
        share DOUBLE, place INTEGER, selected BOOLEAN, weight DOUBLE,
        PRIMARY KEY (prompt_id, metric, layer, neuron, position));
    CREATE TABLE influence_totals (
        prompt_id VARCHAR, metric VARCHAR, total_abs DOUBLE, total DOUBLE, attention DOUBLE, embedding DOUBLE, bias DOUBLE,
        residual DOUBLE, num_selected INTEGER, is_cut BOOLEAN, effective DOUBLE, completeness_gap DOUBLE,
        PRIMARY KEY (prompt_id, metric));
    CREATE TABLE effects (
        prompt_id VARCHAR, ranking VARCHAR, layer INTEGER, neuron INTEGER, place INTEGER, activation DOUBLE, edited DOUBLE,
        delta_logit DOUBLE, delta_logp DOUBLE, delta_contrast DOUBLE, predicted DOUBLE, kind VARCHAR,
        PRIMARY KEY (prompt_id, ranking, layer, neuron));
    CREATE TABLE curves (
        prompt_id VARCHAR, ranking VARCHAR, k INTEGER, mode VARCHAR, m DOUBLE, logit DOUBLE,
        PRIMARY KEY (prompt_id, ranking, k, mode));
    CREATE TABLE neuron_writes (
        layer INTEGER, neuron INTEGER, top_ids INTEGER[], top_logits FLOAT[], low_ids INTEGER[], low_logits FLOAT[],
        explicit STRUCT(token_id INTEGER, logit FLOAT)[],
        PRIMARY KEY (layer, neuron));
    CREATE TABLE statistics (
        analysis VARCHAR, ranking VARCHAR, measure VARCHAR, value DOUBLE, low DOUBLE, high DOUBLE, p DOUBLE, n INTEGER,
        method VARCHAR,
        PRIMARY KEY (analysis, ranking, measure));

    -- As people know them from other tools: a line a neuron, its tokens as text.
    CREATE VIEW neurons_aggregated AS
        SELECT n.layer, n.neuron, n.mean_peak AS mean_peak_abs, n.sd_peak AS std_peak_abs, n.max_peak AS max_peak_abs,
               n.min_peak AS min_peak_abs, n.share_functional AS frac_peak_functional, n.peak_token_mode AS mode_token_id,
               p.text AS mode_token, round(n.peak_token_share * n.num_prompts)::BIGINT AS mode_token_count,
               n.num_peak_tokens AS n_unique_tokens, n.next_token_mode AS mode_next_id, x.text AS mode_next,
               n.num_next_tokens AS n_unique_next, n.z_background, n.q
        FROM neurons n LEFT JOIN vocabulary p ON p.token_id = n.peak_token_mode
             LEFT JOIN vocabulary x ON x.token_id = n.next_token_mode;
    -- The neurons that peak furthest beyond the background; without one, those that peak highest.
    CREATE VIEW top_neurons AS
        SELECT row_number() OVER (ORDER BY abs(z_background) DESC NULLS LAST, mean_peak DESC, layer, neuron) AS place,
               layer, neuron, mean_peak, z_background, q
        FROM neurons QUALIFY place <= 200;
    """,
)

_ORDER = (
    "vocabulary",
    "prompts",
    "contexts",
    "neuron_rows",
    "artifacts",
    "left_out",
    "neurons",
    "targets",
    "influence",
    "influence_totals",
    "effects",
    "curves",
    "neuron_writes",
    "statistics",
)
FACTS = TableFacts(
    derived=("statistics",),
    grows=("statistics",),
    ranks=("place", "rank", "selected", "num_selected"),
    orphans={
        table: f"SELECT DISTINCT prompt_id FROM {table} ANTI JOIN prompts USING (prompt_id)"
        for table in ("contexts", "neuron_rows", "targets", "influence", "influence_totals", "effects", "curves")
    }
    | {
        "neuron_rows (file)": "SELECT prompt_id, path FROM neuron_rows ANTI JOIN artifacts USING (path)",
        "effects (influence)": "SELECT prompt_id, ranking, layer, neuron FROM effects e ANTI JOIN influence i "
        "ON (i.prompt_id, i.metric, i.layer, i.neuron) = (e.prompt_id, e.ranking, e.layer, e.neuron)",
    },
    sense={
        "neuron_rows: rows that are none": "SELECT prompt_id FROM neuron_rows WHERE row_start < 0 OR row_end < row_start",
        "neurons: a share outside 0 and 1": "SELECT layer, neuron FROM neurons WHERE NOT share_active BETWEEN 0 AND 1 "
        "OR NOT coalesce(peak_token_share, 0) BETWEEN 0 AND 1 OR NOT coalesce(q, 0) BETWEEN 0 AND 1",
        "neurons: a mean peak beyond its extremes": "SELECT layer, neuron FROM neurons "
        "WHERE mean_peak > max_peak * (1 + 1e-9) OR mean_peak < min_peak * (1 - 1e-9)",
        "curves: not whole at its ends": "SELECT prompt_id, ranking, k, mode FROM curves "
        "WHERE k = 0 AND abs(m - CASE mode WHEN 'keep' THEN 0 ELSE 1 END) > 1e-6",
    },
)

SCHEMA = Schema("neurons", MIGRATIONS, order=_ORDER, facts=FACTS)
