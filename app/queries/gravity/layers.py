"""What the page Layers asks: the lens and the contributions, of a prompt and by outcome. By-layer numbers that Attention
asks too stand here.

Means by outcome come from `statistics`. Where that has none yet, or the category filter keeps fewer prompts than it rests
on, they are made from moments, which are added up in SQL, by the same rule.
"""

from typing import Any

import numpy as np
import pandas as pd

from app import queries
from app.queries.gravity import View, token_texts
from harness.run import RunPaths

LENS = ("p_target", "p_emitted", "entropy", "kl_final")
CONTRIBUTIONS = ("attn_contrib", "ffn_contrib")
_COLUMNS = {"lens": LENS, "decomposition": CONTRIBUTIONS}
_WIDTH = 5


def known(view: View, analysis: str, step: str, measure: str) -> pd.DataFrame:
    """measured, grouping, layer, head, value, low, high, q, n of `statistics`, for the condition and for baseline.

    No row where the category filter keeps other prompts than those it rests on.
    """
    names = "measured, grouping, layer, head, value, low, high, q, n"
    if view.category is not None or "statistics" not in queries.tables(view.paths):
        return pd.DataFrame({name: [] for name in names.split(", ")})
    return queries.ask(
        view.paths,
        f"SELECT {names} FROM statistics WHERE analysis = ? AND condition = ? AND step_kind = ? AND measure = ? "
        "ORDER BY ALL",
        [analysis, view.condition, step, measure],
    )


def curves(view: View, table: str, step: str, measure: str) -> pd.DataFrame:
    """measured, outcome, layer, value, low, high, n: means of a column of `lens` or `decomposition` over prompts."""
    assert measure in _COLUMNS[table]
    return kept(view, known(view, table, step, measure), lambda: moments(view, table, step, f"a.{measure}"))


def kept(view: View, statistics: pd.DataFrame, moments: Any) -> pd.DataFrame:
    """measured, outcome, layer, value, low, high, n of the outcomes that the filter keeps: from the rows of `statistics`,
    or where these are none, from `moments()`, whose columns are measured, outcome, layer, n, mean, var."""
    rows = statistics[(statistics["head"] == -1) & statistics["grouping"].isin(["success", "failure"])]
    rows = rows.rename(columns={"grouping": "outcome"}) if len(rows) else with_intervals(moments())
    if view.outcome is not None:
        rows = rows[rows["outcome"] == view.outcome]
    return rows[["measured", "outcome", "layer", "value", "low", "high", "n"]].reset_index(drop=True)


def with_intervals(moments: pd.DataFrame) -> pd.DataFrame:
    """Moments (columns n, mean, var) with value, low and high: the mean and Student's 95 % interval."""
    from harness.stats import Moments, t_intervals  # a second to import, and seldom needed

    if moments.empty:
        return moments.assign(value=[], low=[], high=[])
    found = t_intervals(Moments(*moments[["n", "mean", "var"]].to_numpy(float).T))
    return moments.assign(value=found.value, low=found.low, high=found.high)


def moments(view: View, table: str, step: str, value: str) -> pd.DataFrame:
    """measured, outcome, layer, n, mean, var over the filter's prompts; `value` is SQL on a row `a` of `table`, and rows
    where it is NULL are left out."""
    where, params = view.where("a.prompt_id")
    return queries.ask(
        view.paths,
        f"SELECT a.condition AS measured, o.outcome, a.layer, count(*) AS n, avg({value}) AS mean, "
        f"var_samp({value}) AS var FROM {table} a JOIN outcomes o ON o.prompt_id = a.prompt_id AND o.condition = ? "
        f"WHERE a.condition IN (?, 'baseline') AND a.step_kind = ? AND {value} IS NOT NULL AND {where} "
        "GROUP BY ALL ORDER BY ALL",
        [view.condition, view.condition, step, *params],
    )


def lens(paths: RunPaths, prompt_id: str, step: str) -> pd.DataFrame:
    """condition, layer, step, p_target, p_emitted, entropy, kl_final, tokens (texts of the likeliest, best first) and
    top_probs of one prompt under every condition."""
    rows = queries.ask(
        paths,
        f"SELECT condition, layer, step, {', '.join(LENS)}, top_ids, top_probs FROM lens "
        "WHERE prompt_id = ? AND step_kind = ? ORDER BY condition <> 'baseline', condition, layer",
        [prompt_id, step],
    )
    ids = [() if i is None else i for i in rows["top_ids"]]
    texts = token_texts(paths, sorted({int(n) for some in ids for n in some}))
    tokens = pd.Series([[texts[int(n)] for n in some] for some in ids], rows.index, dtype=object)
    return rows.assign(tokens=tokens).drop(columns="top_ids")


def contributions(paths: RunPaths, prompt_id: str, step: str) -> pd.DataFrame:
    """condition, layer, attn_contrib, ffn_contrib of one prompt under every condition; no row in a run without them."""
    if "decomposition" not in queries.tables(paths):
        return pd.DataFrame({name: [] for name in ("condition", "layer", *CONTRIBUTIONS)})
    return queries.ask(
        paths,
        f"SELECT condition, layer, {', '.join(CONTRIBUTIONS)} FROM decomposition "
        "WHERE prompt_id = ? AND step_kind = ? ORDER BY condition <> 'baseline', condition, layer",
        [prompt_id, step],
    )


def offered(view: View, table: str, number: int = 4) -> pd.DataFrame:
    """prompt_id, question, target, outcome, p0, p1 of a few measured prompts to choose from: of each outcome that the
    filters keep, those with the greatest pressure."""
    assert table in ("lens", "attention")
    where, params = view.where("p.prompt_id")
    return queries.ask(
        view.paths,
        "SELECT p.prompt_id, p.question, p.target, o.outcome, s.p0, s.p1 FROM prompts p "
        "JOIN outcomes o ON o.prompt_id = p.prompt_id AND o.condition = ? "
        "LEFT JOIN suppression s ON s.prompt_id = p.prompt_id AND s.condition = o.condition "
        f"WHERE {where} AND p.prompt_id IN (SELECT prompt_id FROM {table} WHERE layer = 0) "
        "QUALIFY row_number() OVER (PARTITION BY o.outcome ORDER BY s.p0 DESC NULLS LAST, p.prompt_id) <= ? "
        "ORDER BY o.outcome, s.p0 DESC NULLS LAST, p.prompt_id",
        [view.condition, *params, number],
    )


def num_layers(paths: RunPaths, table: str) -> int:
    """Layers measured in a run."""
    assert table in ("lens", "attention")
    return int(np.nan_to_num(queries.ask(paths, f"SELECT max(layer) + 1 AS n FROM {table}")["n"].astype(float)[0]))
