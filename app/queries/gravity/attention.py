"""What the page Attention asks: ratios by layer and head, and where a token of one prompt looks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from app import queries
from app.queries.gravity import View, layers, token_texts
from harness.run import RunPaths
from harness.run.tensors import open_tensors

MEASURES = {
    "iar": "IAR: attention on the instruction / (on the instruction + on the question)",
    "nf": "NF: attention on the negation / on the instruction",
    "tmf": "TMF: attention on the mention of X / on the instruction",
    "pi": "PI: TMF − NF",
    "iar_token": "IAR, each attention per token of its span",
    "nf_token": "NF, each attention per token of its span",
    "tmf_token": "TMF, each attention per token of its span",
    "pi_token": "PI, each attention per token of its span",
}
SPANS = ("mention", "negation", "instruction", "question")
"""Parts of a context. The first that holds a token names it: the mention and the negation lie in the instruction."""


def measures(paths: RunPaths) -> list[str]:
    """Those of `MEASURES` that this run's schema has."""
    have = queries.columns(paths, "attention")
    return [m for m in MEASURES if m in have]


def num_heads(paths: RunPaths) -> int:
    """Heads a layer; 0 where no ratio could be measured."""
    lengths = ", ".join(f"len({m})" for m in measures(paths))
    rows = queries.ask(paths, f"SELECT max(greatest({lengths})) AS n FROM attention WHERE layer = 0")
    return int(np.nan_to_num(rows["n"].astype(float)[0]))


def curves(view: View, step: str, measure: str) -> pd.DataFrame:
    """measured, outcome, layer, value, low, high, n: the mean over heads, then over prompts."""
    assert measure in MEASURES
    statistics = layers.known(view, "attention", step, measure)
    return layers.kept(view, statistics, lambda: layers.moments(view, "attention", step, f"list_avg(a.{measure})"))


def heads(view: View, step: str, measure: str, measured: str) -> pd.DataFrame:
    """layer, head, success, failure (means over prompts), n_success, n_failure, difference (failure − success), low, high,
    p and q of it; NaN where an outcome has no prompt."""
    moments = _head_moments(view, step, measure, measured)
    wide = {o: moments[moments["outcome"] == o].set_index(["layer", "head"]) for o in ("success", "failure")}
    found = pd.DataFrame(
        {
            **{outcome: rows["mean"] for outcome, rows in wide.items()},
            **{f"n_{outcome}": rows["n"] for outcome, rows in wide.items()},
        }
    )
    statistics = layers.known(view, "attention", step, measure)
    chosen = (statistics["measured"] == measured) & (statistics["grouping"] == "difference") & (statistics["head"] >= 0)
    gaps = statistics[chosen].rename(columns={"value": "difference"})
    if gaps.empty:
        gaps = _gaps(wide["failure"], wide["success"])
    gaps = gaps.astype({"layer": "int64", "head": "int64"}).set_index(["layer", "head"])
    return found.join(gaps[["difference", "low", "high", "q"]]).reset_index()


def distribution(
    view: View, step: str, measure: str, measured: str, layer: int, head: int | None, bins: int = 24
) -> pd.DataFrame:
    """outcome, start, end, n, share (of the outcome's prompts): how a head's values, or without one the means over heads,
    lie. Every bin of every outcome there is has a row."""
    value, params = _values(view, step, measure, measured, layer, head)
    rows = queries.ask(
        view.paths,
        f"WITH v AS ({value}), r AS (SELECT min(value) AS low, max(value) AS high FROM v) "
        "SELECT outcome, coalesce(least(floor((value - low) / nullif(high - low, 0) * ?), ? - 1), 0)::INTEGER AS bin, "
        "any_value(low) AS low, any_value(high) AS high, count(*) AS n FROM v, r GROUP BY ALL ORDER BY ALL",
        [*params, bins, bins],
    )
    if rows.empty:
        return pd.DataFrame({name: [] for name in ("outcome", "start", "end", "n", "share")})
    edges = np.linspace(float(rows["low"][0]), float(rows["high"][0]), bins + 1)
    found = []
    for outcome, counts in rows.groupby("outcome"):
        n = counts.set_index("bin")["n"].reindex(range(bins), fill_value=0).to_numpy()
        found.append(
            pd.DataFrame({"outcome": outcome, "start": edges[:-1], "end": edges[1:], "n": n, "share": n / n.sum()})
        )
    return pd.concat(found, ignore_index=True)


def values(
    view: View, step: str, measure: str, measured: str, layer: int, head: int | None, limit: int = 200
) -> pd.DataFrame:
    """value, outcome, prompt_id: of a head, or of the mean over heads; the largest first."""
    value, params = _values(view, step, measure, measured, layer, head)
    return queries.ask(view.paths, f"SELECT * FROM ({value}) ORDER BY value DESC, prompt_id LIMIT ?", [*params, limit])


def stored(paths: RunPaths) -> pd.DataFrame:
    """prompt_id, category, target, conditions (a list) of prompts whose rows of every head were kept."""
    return queries.ask(
        paths,
        "SELECT prompt_id, category, target, list(DISTINCT condition ORDER BY condition) AS conditions "
        "FROM artifacts JOIN prompts USING (prompt_id) WHERE kind = 'attention' GROUP BY ALL ORDER BY ALL",
    )


def token_row(paths: RunPaths, prompt_id: str, condition: str, step: str, layer: int) -> pd.DataFrame:
    """position, token_id, text, span, share: what the token that decides a step attends to, mean over heads; tokens of the
    answer up to there included, with the span "answer". No row where it was not measured."""
    rows = queries.ask(
        paths,
        "SELECT step, mean_row FROM attention WHERE prompt_id = ? AND condition = ? AND step_kind = ? AND layer = ?",
        [prompt_id, condition, step, layer],
    )
    if rows.empty:
        return pd.DataFrame({name: [] for name in ("position", "token_id", "text", "span", "share")})
    return _tokens(paths, prompt_id, condition, int(rows["step"][0])).assign(
        share=np.asarray(rows["mean_row"][0], float)
    )


def head_rows(paths: RunPaths, prompt_id: str, condition: str, step: str, layer: int) -> np.ndarray | None:
    """The same for each head, [heads, tokens]; None where it was not kept. Reads this layer of the file and no more.

    Raises HarnessError where the file the run names is missing or broken.
    """
    found = queries.ask(
        paths,
        "SELECT path FROM artifacts WHERE kind = 'attention' AND prompt_id = ? AND condition = ?",
        [prompt_id, condition],
    )
    if found.empty:
        return None
    with open_tensors(paths.artifacts, found["path"][0]) as file:
        return file.get_slice(step)[layer] if step in file.keys() else None  # noqa: SIM118 - not a mapping


def spans(paths: RunPaths, prompt_id: str, condition: str) -> dict[str, tuple[int, int]]:
    """Token spans [start, end) of the parts this context has."""
    rows = queries.ask(
        paths, "SELECT spans FROM contexts WHERE prompt_id = ? AND condition = ?", [prompt_id, condition]
    )
    found = rows["spans"][0] if len(rows) else None
    if not isinstance(found, dict):
        return {}
    return {n: (int(found[n][0]), int(found[n][1])) for n in SPANS if found.get(n) is not None}


def _tokens(paths: RunPaths, prompt_id: str, condition: str, num_answered: int) -> pd.DataFrame:
    """position, token_id, text, span of a context and the first tokens of its greedy answer."""
    has_offsets = "offsets" in queries.columns(paths, "contexts")
    row = queries.ask(
        paths,
        f"SELECT text, token_ids, {'offsets' if has_offsets else 'NULL AS offsets'} FROM contexts "
        "WHERE prompt_id = ? AND condition = ?",
        [prompt_id, condition],
    ).iloc[0]
    ids = [int(n) for n in row["token_ids"]]
    answer = queries.ask(
        paths,
        "SELECT token_ids FROM completions WHERE prompt_id = ? AND condition = ? AND mode = 'greedy'",
        [prompt_id, condition],
    )["token_ids"]
    said = [int(n) for n in answer[0][:num_answered]] if len(answer) else []
    texts = token_texts(paths, [*ids, *said])
    pieces = [texts[n] or f"[{n}]" for n in [*ids, *said]]
    if row["offsets"] is not None and len(row["offsets"]) == len(ids):
        pieces[: len(ids)] = slices(row["text"], row["offsets"], pieces)
    names = [""] * len(ids) + ["answer"] * len(said)
    for name, (start, end) in reversed(spans(paths, prompt_id, condition).items()):
        names[start:end] = [name] * (end - start)
    return pd.DataFrame({"position": range(len(names)), "token_id": ids + said, "text": pieces, "span": names})


def slices(text: str, offsets: Sequence[Sequence[int]], instead: Sequence[str]) -> list[str]:
    """The text of each token, with the space before it; where a token has none of its own, such as one of several for one
    character, the text `instead`."""
    found, start = [], 0
    for (_, end), other in zip(offsets, instead, strict=False):
        found.append(text[start:end] or other)
        start = max(start, int(end))
    return found


_JOINED = "attention a JOIN outcomes o ON o.prompt_id = a.prompt_id AND o.condition = ?"


def _head_moments(view: View, step: str, measure: str, measured: str) -> pd.DataFrame:
    """outcome, layer, head, n, mean, var over the prompts that the filters keep."""
    assert measure in MEASURES
    where, params = view.where("a.prompt_id")
    return queries.ask(
        view.paths,
        "SELECT outcome, layer, head, count(value) AS n, avg(value) AS mean, var_samp(value) AS var FROM ("
        f"SELECT o.outcome, a.layer, generate_subscripts(a.{measure}, 1) - 1 AS head, unnest(a.{measure}) AS value "
        f"FROM {_JOINED} WHERE a.condition = ? AND a.step_kind = ? AND a.{measure} IS NOT NULL AND {where}) "
        "GROUP BY ALL HAVING count(value) > 0 ORDER BY ALL",
        [view.condition, measured, step, *params],
    )


def _gaps(failures: pd.DataFrame, successes: pd.DataFrame) -> pd.DataFrame:
    """layer, head, difference, low, high, q from moments by layer and head, as the stage `analysis` makes them."""
    from harness.stats import Moments, benjamini_hochberg, welch  # a second to import, and seldom needed

    both = failures.index.intersection(successes.index)
    names = ["layer", "head", "difference", "low", "high", "q"]
    if both.empty:
        return pd.DataFrame({name: [] for name in names})
    sides = (Moments(*rows.loc[both, ["n", "mean", "var"]].to_numpy(float).T) for rows in (failures, successes))
    found = welch(*sides)
    q = np.full(len(both), np.nan)
    is_tested = np.isfinite(found.p)
    q[is_tested] = benjamini_hochberg(found.p[is_tested])
    numbers = pd.DataFrame({"difference": found.value, "low": found.low, "high": found.high, "q": q}, index=both)
    return numbers.reset_index()[names]


def _values(view: View, step: str, measure: str, measured: str, layer: int, head: int | None) -> tuple[str, list]:
    """A question for value, outcome, prompt_id, and its parameters."""
    assert measure in MEASURES
    where, params = view.where("a.prompt_id")
    value = f"list_avg(a.{measure})" if head is None else f"a.{measure}[{int(head) + 1}]"
    sql = (
        f"SELECT {value} AS value, o.outcome, a.prompt_id FROM {_JOINED} "
        f"WHERE a.condition = ? AND a.step_kind = ? AND a.layer = ? AND {value} IS NOT NULL AND {where}"
    )
    return sql, [view.condition, measured, step, layer, *params]
