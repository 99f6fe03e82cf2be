"""What the P_sem page asks: pressure per prompt and condition, how often X is said, and what the analysis made of both.

Rows of `statistics` are of the whole run. What is restricted by the filters is averaged here, without intervals.
"""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from app import queries
from app.queries.gravity import View
from harness.experiments.gravity.bins import BIN_NAMES
from harness.run import RunPaths

MEASURES = ("p_sem", "p_word", "paper_p_sem")
GAPS = ("delta", "relative", "log")
_BIN = "CASE WHEN p0 < .2 THEN 0 WHEN p0 < .4 THEN 1 WHEN p0 < .6 THEN 2 WHEN p0 < .8 THEN 3 ELSE 4 END"
_GREEDY = (
    "SELECT prompt_id, CASE WHEN word_present THEN 'failure' WHEN NOT word_present THEN 'success' END AS outcome "
    "FROM detections WHERE mode = 'greedy' AND condition = ?"
)
_RATES = (
    "SELECT v.prompt_id, p.category, p.target, v.num_samples, v.num_violations, v.rate, b.p_sem AS p0 FROM violation v "
    "JOIN prompts p USING (prompt_id) JOIN psem b ON b.prompt_id = v.prompt_id AND b.condition = 'baseline' "
    "WHERE v.condition = ?"
)


def pairs(view: View, x: str, y: str, outcome_of: str, measure: str) -> pd.DataFrame:
    """prompt_id, category, target, outcome (of the greedy answer under `outcome_of`; NULL where there is none yet), `px`
    and `py` (the measure under two conditions), and the differences delta, relative and log; within the filters."""
    assert measure in MEASURES
    where, params = view.where("p.prompt_id")
    return queries.ask(
        view.paths,
        f"""
        SELECT p.prompt_id, p.category, p.target, o.outcome, b.{measure} AS px, c.{measure} AS py,
               px - py AS delta, (px - py) / greatest(px, 1e-9) AS relative,
               ln(greatest(px, 1e-12)) - ln(greatest(py, 1e-12)) AS log
        FROM prompts p JOIN psem b ON b.prompt_id = p.prompt_id AND b.condition = ?
             JOIN psem c ON c.prompt_id = p.prompt_id AND c.condition = ?
             LEFT JOIN ({_GREEDY}) o ON o.prompt_id = p.prompt_id
        WHERE b.{measure} IS NOT NULL AND c.{measure} IS NOT NULL AND {where} ORDER BY p.prompt_id
        """,
        [x, y, outcome_of, *params],
    )


def rates(view: View, condition: str) -> pd.DataFrame:
    """prompt_id, category, target, num_samples, num_violations, rate and p0 (p_sem under baseline); within the filters."""
    where, params = view.where("v.prompt_id")
    return queries.ask(view.paths, f"{_RATES} AND {where} ORDER BY v.prompt_id", [condition, *params])


def binned(view: View, condition: str) -> pd.DataFrame:
    """grouping (a name of `BIN_NAMES`), n, p0 and value (means of P0 and of the rate over the prompts of a pressure bin), low,
    high. The interval is that of the analysis where it saw these very prompts, else NaN."""
    where, params = view.where("v.prompt_id")
    found = queries.ask(
        view.paths,
        f"SELECT {_BIN} AS bin, count(*) AS n, avg(p0) AS p0, avg(rate) AS value FROM ({_RATES} AND {where}) "
        "GROUP BY bin ORDER BY bin",
        [condition, *params],
    )
    found.insert(0, "grouping", [BIN_NAMES[b] for b in found.pop("bin")])
    is_whole = view.category is None and view.outcome is None
    return _with_intervals(found, statistics(view.paths, "rates", condition) if is_whole else None)


def categories(view: View, condition: str) -> pd.DataFrame:
    """category, n, p0, p1 and delta (means of p_sem), greedy (share of greedy answers that say X), value (mean share of
    samples that do), low, high; within the filters. The interval is that of the analysis where it saw these prompts."""
    where, params = view.where("p.prompt_id")
    found = queries.ask(
        view.paths,
        f"""
        SELECT p.category, count(*) AS n, avg(b.p_sem) AS p0, avg(c.p_sem) AS p1, avg(b.p_sem - c.p_sem) AS delta,
               avg((o.outcome = 'failure')::INTEGER) AS greedy, avg(v.rate) AS value
        FROM prompts p JOIN psem b ON b.prompt_id = p.prompt_id AND b.condition = 'baseline'
             JOIN psem c ON c.prompt_id = p.prompt_id AND c.condition = ?
             LEFT JOIN ({_GREEDY}) o ON o.prompt_id = p.prompt_id
             LEFT JOIN violation v ON v.prompt_id = p.prompt_id AND v.condition = ?
        WHERE {where} GROUP BY p.category ORDER BY p.category
        """,
        [condition, condition, condition, *params],
    )
    known = statistics(view.paths, "rates", condition) if view.outcome is None else None
    found["grouping"] = "category:" + found["category"].astype(str)
    return _with_intervals(found, known).drop(columns="grouping")


def statistics(paths: RunPaths, analysis: str, condition: str) -> pd.DataFrame:
    """measure, grouping, value, se, low, high, n, method of one analysis; no row in a run that has none (yet)."""
    if "statistics" not in queries.tables(paths):
        return pd.DataFrame(columns=["measure", "grouping", "value", "se", "low", "high", "n", "method"])
    return queries.ask(
        paths,
        "SELECT measure, grouping, value, se, low, high, n, method FROM statistics "
        "WHERE analysis = ? AND condition = ? AND layer = -1 ORDER BY measure, grouping",
        [analysis, condition],
    )


def curve(paths: RunPaths, condition: str, fit: pd.DataFrame, seed: int) -> pd.DataFrame | None:
    """p0, value, low, high, is_supported over P0 in 0 to 1, as the report draws it; None without a line. `fit` are the
    condition's `statistics` of that analysis."""
    return _curve(fit, queries.ask(paths, f"{_RATES} ORDER BY v.prompt_id", [condition]), seed)


@st.cache_data(max_entries=32, show_spinner=False)
def _curve(fit: pd.DataFrame, rates: pd.DataFrame, seed: int) -> pd.DataFrame | None:
    from harness.experiments.gravity.fit import Pressed, curve_of  # here, because it takes a second to load

    def pressed() -> Pressed:
        return Pressed(*(rates[c].to_numpy(float) for c in ("p0", "num_violations", "num_samples")))

    found = curve_of([{str(k): v for k, v in row.items()} for row in fit.to_dict("records")], pressed, seed)
    return None if found is None else pd.DataFrame(found._asdict())


def totals(paths: RunPaths, prompt_ids: Sequence[str]) -> pd.DataFrame:
    """prompt_id, condition, p_sem, p_word, paper_p_sem, num_sequences, entropy of some prompts; baseline first."""
    return queries.ask(
        paths,
        "SELECT prompt_id, condition, p_sem, p_word, paper_p_sem, num_sequences, entropy FROM psem "
        "WHERE list_contains(?, prompt_id) ORDER BY prompt_id, condition <> 'baseline', condition",
        [list(prompt_ids)],
    )


def spellings(paths: RunPaths, prompt_ids: Sequence[str]) -> pd.DataFrame:
    """prompt_id, condition, token_ids, p (probability of the spelling), word_end (that the word ends there) of every
    member of the prefix-free set, likeliest first within prompt and condition."""
    return queries.ask(
        paths,
        "SELECT prompt_id, condition, unnest(sequences) AS token_ids, exp(unnest(logprobs)) AS p, "
        "unnest(word_end) AS word_end FROM psem WHERE list_contains(?, prompt_id) "
        "ORDER BY prompt_id, condition <> 'baseline', condition, p DESC, token_ids",
        [list(prompt_ids)],
    )


def first_tokens(paths: RunPaths, prompt_ids: Sequence[str]) -> pd.DataFrame:
    """prompt_id, condition, token_id, p: the likeliest first tokens, likeliest first."""
    return queries.ask(
        paths,
        "SELECT prompt_id, condition, unnest(top_ids) AS token_id, unnest(top_probs) AS p FROM psem "
        "WHERE list_contains(?, prompt_id) ORDER BY prompt_id, condition <> 'baseline', condition, p DESC, token_id",
        [list(prompt_ids)],
    )


def _with_intervals(found: pd.DataFrame, known: pd.DataFrame | None) -> pd.DataFrame:
    """`found` with low and high by grouping, and the analysis' value, if the analysis counted the same prompts in all."""
    empty = found.assign(low=float("nan"), high=float("nan"))
    if known is None or known.empty or found.empty:
        return empty
    by_name = known.set_index("grouping")[["value", "low", "high", "n"]]
    if not set(found["grouping"]) <= set(by_name.index):
        return empty
    rows = by_name.loc[list(found["grouping"])].reset_index(drop=True)
    if list(rows["n"]) != list(found["n"]):
        return empty
    return found.assign(value=rows["value"], low=rows["low"], high=rows["high"])
