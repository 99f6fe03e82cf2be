"""What the patching page asks: means by layer and kind of patch, the prompts behind a cell, one prompt's own grid."""

from typing import Any

import pandas as pd

from app import queries
from harness.run import Manifest, RunPaths

GROUPS = ("all", "success", "failure", "difference")
EFFECTS = {"ΔP": "delta_p", "flipped": "flip"}
"""What a cell can show, and its measure in `statistics`."""
_COLUMNS = {"delta_p": "delta_p", "flip": "flipped"}
_GREEDY = "SELECT prompt_id, word_present FROM detections WHERE mode = 'greedy' AND condition = ?"
_OUTCOME = "CASE WHEN g.word_present THEN 'failure' WHEN NOT g.word_present THEN 'success' END"
_NORMAL = 1.959964


def patched_condition(paths: RunPaths, manifest: Manifest) -> str:
    """The condition that was patched from baseline: by its own statistics, or else by the run's settings."""
    if "statistics" in queries.tables(paths):
        found = queries.ask(paths, "SELECT condition FROM statistics WHERE analysis = 'patching' LIMIT 1")
        if len(found):
            return str(found["condition"][0])
    named = [s.params.get("condition") for s in manifest.fingerprint_parts.stages if s.name == "patching"]
    return str(next((c for c in named if c), "negative"))


def counts(paths: RunPaths, condition: str, where: str, params: list[Any]) -> dict[str, int]:
    """Number of patched prompts that a filter keeps, by outcome under the patched condition, and of `all` of them."""
    rows = queries.ask(
        paths,
        f"""
        WITH p AS (SELECT DISTINCT prompt_id FROM patching WHERE {where})
        SELECT {_OUTCOME} AS outcome, count(*) AS n FROM p LEFT JOIN ({_GREEDY}) g USING (prompt_id) GROUP BY ALL
        """,
        [*params, condition],
    )
    found = {str(r["outcome"]): int(r["n"]) for r in rows.dropna(subset=["outcome"]).to_dict("records")}
    return {"all": int(rows["n"].sum()), "success": found.get("success", 0), "failure": found.get("failure", 0)}


def stored_means(paths: RunPaths, condition: str, effect: str) -> pd.DataFrame:
    """grouping, layer, patch, value, low, high, n, p, q, method of every cell, as the stage `analysis` left them."""
    if "statistics" not in queries.tables(paths):
        return _no_means()
    return queries.ask(
        paths,
        "SELECT grouping, layer, patch, value, low, high, n, p, q, method FROM statistics WHERE analysis = 'patching' "
        "AND condition = ? AND measure = ? AND list_contains(?, grouping) ORDER BY grouping, patch, layer",
        [condition, effect, list(GROUPS)],
    )


def counted_means(paths: RunPaths, condition: str, effect: str, where: str, params: list[Any]) -> pd.DataFrame:
    """As `stored_means`, counted over the prompts of a filter: normal intervals, Welch's for the difference."""
    moments = queries.ask(
        paths,
        f"""
        WITH v AS (
            SELECT layer, patch, {_COLUMNS[effect]}::DOUBLE AS v, unnest(['all', {_OUTCOME}]) AS grouping
            FROM (SELECT * FROM patching WHERE {where}) LEFT JOIN ({_GREEDY}) g USING (prompt_id))
        SELECT grouping, layer, patch, avg(v) AS value, var_samp(v) / count(v) AS var, count(v) AS n
        FROM v WHERE grouping IS NOT NULL GROUP BY ALL ORDER BY ALL
        """,
        [*params, condition],
    )
    if moments.empty:
        return _no_means()
    moments["method"] = "mean; normal interval over prompts"
    sides = {name: moments[moments["grouping"] == name] for name in ("failure", "success")}
    both = sides["failure"].merge(sides["success"], on=["layer", "patch"], suffixes=("", "_s"))
    difference = pd.DataFrame(
        {
            "grouping": "difference",
            "layer": both["layer"],
            "patch": both["patch"],
            "value": both["value"] - both["value_s"],
            "var": both["var"] + both["var_s"],
            "n": both["n"] + both["n_s"],
            "method": "difference of means, failure − success; normal interval over prompts",
        }
    )
    found = pd.concat([moments, difference], ignore_index=True)
    half = _NORMAL * found["var"] ** 0.5
    return found.assign(low=found["value"] - half, high=found["value"] + half, p=float("nan"), q=float("nan"))[
        list(_no_means().columns)
    ]


def behind(
    paths: RunPaths, condition: str, layer: int, patch: str, group: str, where: str, params: list[Any]
) -> pd.DataFrame:
    """The prompts of one cell, the largest |ΔP| first: prompt_id, target, outcome, before and after (P_sem), delta_p,
    flipped, said (the answer without the patch), says (with it)."""
    rows = queries.ask(
        paths,
        f"""
        SELECT p.prompt_id, t.target, {_OUTCOME} AS outcome, p.p_sem_original AS before, p.p_sem_patched AS after,
               p.delta_p, p.flipped, c.text AS said, p.continuation AS says
        FROM (SELECT * FROM patching WHERE layer = ? AND patch = ? AND {where}) p
             LEFT JOIN prompts t USING (prompt_id) LEFT JOIN ({_GREEDY}) g USING (prompt_id)
             LEFT JOIN (SELECT prompt_id, text FROM completions WHERE mode = 'greedy' AND condition = ?) c USING (prompt_id)
        ORDER BY abs(p.delta_p) DESC, p.prompt_id
        """,
        [layer, patch, *params, condition, condition],
    )
    return rows[rows["outcome"] == group].reset_index(drop=True) if group in ("success", "failure") else rows


def of_prompt(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """layer, patch, before, after, value (ΔP), flipped, says, num_patched, num_span of one prompt; no row where it was not
    patched, NULL numbers of tokens in a run of an older schema."""
    tokens = (
        "num_patched, num_span"
        if {"num_patched", "num_span"} <= set(queries.columns(paths, "patching"))
        else "NULL::INTEGER AS num_patched, NULL::INTEGER AS num_span"
    )
    return queries.ask(
        paths,
        f"SELECT layer, patch, p_sem_original AS before, p_sem_patched AS after, delta_p AS value, flipped, "
        f"continuation AS says, {tokens} FROM patching WHERE prompt_id = ? ORDER BY patch, layer",
        [prompt_id],
    )


def greedy_text(paths: RunPaths, prompt_id: str, condition: str) -> str | None:
    """The greedy answer's text; None where there is none."""
    rows = queries.ask(
        paths,
        "SELECT text FROM completions WHERE mode = 'greedy' AND prompt_id = ? AND condition = ?",
        [prompt_id, condition],
    )
    return str(rows["text"][0]) if len(rows) else None


def num_layers(paths: RunPaths) -> int:
    """One more than the deepest patched layer."""
    top = queries.ask(paths, "SELECT max(layer) AS top FROM patching")["top"][0]
    return 0 if pd.isna(top) else int(top) + 1


def kinds(paths: RunPaths) -> list[str]:
    """The kinds of patch that the run has, by name."""
    return list(queries.ask(paths, "SELECT DISTINCT patch FROM patching ORDER BY patch")["patch"])


def _no_means() -> pd.DataFrame:
    return pd.DataFrame(columns=["grouping", "layer", "patch", "value", "low", "high", "n", "p", "q", "method"])
