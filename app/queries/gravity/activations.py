"""What the activations page asks: norms of a prompt's residual stream, its largest neurons, and files that keep more."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from app import queries
from app.queries.gravity import token_texts
from app.queries.gravity.attention import slices
from harness.run import RunPaths


def norms(paths: RunPaths, prompt_id: str, condition: str) -> pd.DataFrame:
    """layer, position, norm, mean (of the layer over these tokens), relative = norm / mean: one row a layer and token."""
    return queries.ask(
        paths,
        """
        WITH rows AS (
            SELECT layer, list_avg(resid_norm) AS mean, generate_subscripts(resid_norm, 1) - 1 AS position,
                   unnest(resid_norm)::DOUBLE AS norm
            FROM activations WHERE prompt_id = ? AND condition = ?)
        SELECT layer, position, norm, mean, norm / nullif(mean, 0) AS relative FROM rows ORDER BY layer, position
        """,
        [prompt_id, condition],
    )


def tokens(paths: RunPaths, prompt_id: str, condition: str) -> list[str]:
    """The texts of a context's tokens, in order; none where the context is not stored."""
    rows = queries.ask(paths, "SELECT * FROM contexts WHERE prompt_id = ? AND condition = ?", [prompt_id, condition])
    if rows.empty:
        return []
    ids = [int(n) for n in rows["token_ids"][0]]
    texts = token_texts(paths, ids)
    pieces = [texts[n] or f"[{n}]" for n in ids]
    offsets = rows["offsets"][0] if "offsets" in rows.columns else None  # not in a run of an older schema
    return slices(rows["text"][0], offsets, pieces) if offsets is not None and len(offsets) == len(ids) else pieces


def neurons(paths: RunPaths, prompt_id: str, conditions: Sequence[str]) -> pd.DataFrame:
    """condition, layer, rank, neuron, value of one prompt: the largest neurons at the first step, with sign; no row where
    the model's family has no single list of them."""
    return queries.ask(
        paths,
        """
        SELECT condition, layer, generate_subscripts(top_neurons, 1) AS rank, unnest(top_neurons) AS neuron,
               unnest(top_values)::DOUBLE AS value
        FROM activations WHERE prompt_id = ? AND list_contains(?, condition) ORDER BY condition, layer, rank
        """,
        [prompt_id, list(conditions)],
    )


def has_neurons(paths: RunPaths) -> bool:
    """Whether any prompt of the run has largest neurons."""
    return not queries.ask(paths, "SELECT 1 FROM activations WHERE top_neurons IS NOT NULL LIMIT 1").empty


def recurring(
    paths: RunPaths, condition: str, layer: int, where: str, params: list[Any], limit: int = 50
) -> pd.DataFrame:
    """The neurons of a layer that are among the largest of most prompts of a filter: neuron, prompts, success, failure
    (numbers of prompts), mean_success, mean_failure (of its value where it is among them)."""
    return queries.ask(
        paths,
        f"""
        WITH a AS (
            SELECT prompt_id, unnest(top_neurons) AS neuron, unnest(top_values)::DOUBLE AS value
            FROM activations WHERE condition = ? AND layer = ? AND {where}),
        g AS (SELECT prompt_id, word_present FROM detections WHERE mode = 'greedy' AND condition = ?)
        SELECT neuron, count(*) AS prompts, count(*) FILTER (NOT word_present) AS success,
               count(*) FILTER (word_present) AS failure,
               avg(value) FILTER (NOT word_present) AS mean_success, avg(value) FILTER (word_present) AS mean_failure
        FROM a LEFT JOIN g USING (prompt_id) GROUP BY neuron ORDER BY prompts DESC, neuron LIMIT ?
        """,
        [condition, layer, *params, condition, limit],
    )


def measured(paths: RunPaths, condition: str, layer: int, where: str, params: list[Any]) -> dict[str, int]:
    """Number of the filter's prompts with neurons at a layer, `all` and by outcome."""
    row = queries.ask(
        paths,
        f"""
        SELECT count(*) AS "all", count(*) FILTER (NOT word_present) AS success, count(*) FILTER (word_present) AS failure
        FROM (SELECT prompt_id FROM activations
              WHERE condition = ? AND layer = ? AND top_neurons IS NOT NULL AND {where}) a
             LEFT JOIN (SELECT prompt_id, word_present FROM detections WHERE mode = 'greedy' AND condition = ?) g
             USING (prompt_id)
        """,
        [condition, layer, *params, condition],
    )
    return {k: int(row[k][0]) for k in ("all", "success", "failure")}


def files(paths: RunPaths, where: str, params: list[Any], limit: int = 200) -> pd.DataFrame:
    """prompt_id, condition, shape, dtype, bytes, sha256, path of the filter's files of the residual stream."""
    if "artifacts" not in queries.tables(paths):
        return pd.DataFrame(columns=["prompt_id", "condition", "shape", "dtype", "bytes", "sha256", "path"])
    return queries.ask(
        paths,
        f"SELECT prompt_id, condition, shape, dtype, bytes, sha256, path FROM artifacts WHERE kind = 'resid' AND {where} "
        "ORDER BY prompt_id, condition LIMIT ?",
        [*params, limit],
    )


def num_files(paths: RunPaths, where: str, params: list[Any]) -> int:
    """How many files of the residual stream the filter's prompts have."""
    if "artifacts" not in queries.tables(paths):
        return 0
    return int(
        queries.ask(paths, f"SELECT count(*) AS n FROM artifacts WHERE kind = 'resid' AND {where}", params)["n"][0]
    )


def offered(paths: RunPaths, condition: str, where: str, params: list[Any], limit: int = 12) -> pd.DataFrame:
    """A few prompts of a filter, those with stored files first: prompt_id, target, question, outcome, files."""
    files = (
        "SELECT prompt_id, count(*) AS files FROM artifacts WHERE kind = 'resid' GROUP BY prompt_id"
        if "artifacts" in queries.tables(paths)
        else "SELECT NULL::VARCHAR AS prompt_id, 0 AS files"
    )
    return queries.ask(
        paths,
        f"""
        SELECT p.prompt_id, p.target, p.question,
               CASE WHEN g.word_present THEN 'failure' WHEN NOT g.word_present THEN 'success' END AS outcome,
               coalesce(f.files, 0) AS files
        FROM (SELECT * FROM prompts WHERE {where}) p
             SEMI JOIN (SELECT DISTINCT prompt_id FROM activations) m USING (prompt_id)
             LEFT JOIN (SELECT prompt_id, word_present FROM detections WHERE mode = 'greedy' AND condition = ?) g
             USING (prompt_id) LEFT JOIN ({files}) f USING (prompt_id)
        ORDER BY files > 0 DESC, p.prompt_id LIMIT ?
        """,
        [*params, condition, limit],
    )


def num_layers(paths: RunPaths) -> int:
    """One more than the deepest layer with norms."""
    top = queries.ask(paths, "SELECT max(layer) AS top FROM activations")["top"][0]
    return 0 if pd.isna(top) else int(top) + 1
