"""What the page Neurons asks: rankings a page at a time, where in the model they lie, one neuron, effects against claims,
curves.

Sorted, counted and cut in SQL: a model has some 240,000 neurons. Influence and effects are the prompt's where one is chosen,
else means over all prompts in which they were determined: a neuron that a metric did not keep for a prompt counts as 0
there, which it is not quite, but smaller than all that were kept.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from app import queries
from app.queries.neurons import Neuron, View, token_texts
from app.queries.neurons import plain_rows as plain_rows
from harness.run import RunPaths

PAGE_SIZE = 50
MOST_POINTS = 1_500
"""Neurons of the scatter, and pairs of a claim and an effect."""
MOST_PROMPTS = 500
LOUDEST = 100
"""Neurons of which it is told how many are among those of the largest influence."""
RANKINGS = {
    "influence": "by |influence| on the target, of the metric in the sidebar",
    "effect": "by |measured effect|, of the neurons that the metric named",
    "peak": "by mean peak: loudness, which is no influence",
    "background": "by |z| of peaks against the background",
}
SIGNS = ("any", "positive", "negative")
EDGES = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
"""Last places of the bins of the density."""
_BY = {"influence": "influence", "effect": "effect", "peak": "max_signed", "background": "z_background"}
_SIZE = {"influence": "size", "effect": "abs(effect)", "peak": "mean_peak", "background": "abs(z_background)"}
_MEASURED = "CASE WHEN t.mode = 'sequence' THEN e.delta_logp ELSE coalesce(e.delta_contrast, e.delta_logit) END"
"""In the unit that was ranked for, as the analysis takes it."""


@dataclass(frozen=True)
class Filters:
    """What of a ranking is shown. `max_q` 1 and `min_share` 0 are off."""

    by: str
    layers: tuple[int, int]
    max_q: float = 1.0
    sign: str = "any"
    min_share: float = 0.0

    def where(self) -> tuple[str, list[Any]]:
        """A condition on the columns of `_joined`, and its parameters."""
        value = _BY[self.by]
        parts = ["layer BETWEEN ? AND ?", f"{_SIZE[self.by]} IS NOT NULL", f"NOT isnan({_SIZE[self.by]})"]
        params: list[Any] = list(self.layers)
        if self.max_q < 1:
            parts.append("q <= ?")
            params.append(self.max_q)
        if self.sign != "any":
            parts.append(f"{value} {'>' if self.sign == 'positive' else '<'} 0")
        if self.min_share > 0:
            parts.append("share >= ?")
            params.append(self.min_share)
        return " AND ".join(parts), params


def rankings(view: View) -> list[str]:
    """Those of `RANKINGS` that this run has something of."""
    found = queries.ask(
        view.paths,
        """
        SELECT EXISTS (FROM influence WHERE metric = ?) AS influence, EXISTS (FROM effects WHERE ranking = ?) AS effect,
               EXISTS (FROM neurons) AS peak, EXISTS (FROM neurons WHERE z_background IS NOT NULL) AS background
        """,
        [view.metric, view.metric],
    ).iloc[0]
    return [name for name in RANKINGS if found[name]]


def _joined(view: View) -> tuple[str, list[Any]]:
    """Every neuron with its statistics, influence and effect, as a common table `joined`, and its parameters."""
    one = "" if view.prompt_id is None else " AND {0}prompt_id = ?"
    of_one = [] if view.prompt_id is None else [view.prompt_id]
    num = "1" if of_one else "(SELECT count(DISTINCT prompt_id) FROM influence_totals WHERE metric = ?)"
    sql = f"""
        WITH num AS (SELECT greatest({num}, 1) AS n),
        i AS (
            SELECT layer, neuron, sum(value) / any_value(n) AS influence, sum(abs(value)) / any_value(n) AS size,
                   sum(share) / any_value(n) AS share, count(*) AS num_ranked, min(place) AS place
            FROM influence, num WHERE metric = ?{one.format("")} GROUP BY layer, neuron),
        e AS (
            SELECT e.layer, e.neuron, avg({_MEASURED}) AS effect, avg(e.predicted) AS predicted,
                   count(*) AS num_measured
            FROM effects e LEFT JOIN targets t USING (prompt_id)
            WHERE e.ranking = ?{one.format("e.")} GROUP BY e.layer, e.neuron),
        joined AS (
            SELECT layer, neuron, n.mean_peak, n.max_peak, n.max_signed, n.z_background, n.q, n.share_active,
                   n.peak_token_mode, n.peak_token_share, i.influence, i.size, i.share, i.num_ranked, i.place, e.effect,
                   e.predicted, e.num_measured
            FROM neurons n FULL JOIN i USING (layer, neuron) LEFT JOIN e USING (layer, neuron))
    """
    return sql, [*([] if of_one else [view.metric]), view.metric, *of_one, view.metric, *of_one]


def num_ranked(view: View, filters: Filters) -> int:
    """How many neurons the filters keep."""
    joined, params = _joined(view)
    where, more = filters.where()
    return int(
        queries.ask(view.paths, f"{joined} SELECT count(*) AS n FROM joined WHERE {where}", [*params, *more])["n"][0]
    )


def ranked(view: View, filters: Filters, page: int) -> pd.DataFrame:
    """One page of a ranking, the first being page 1: layer, neuron, influence (signed), size (mean |influence|), share,
    num_ranked (prompts that rank it), place (its best), effect, predicted, num_measured, mean_peak, max_signed,
    z_background, q, share_active, peak_token (text), peak_token_share; NaN for what is not known."""
    joined, params = _joined(view)
    where, more = filters.where()
    return queries.ask(
        view.paths,
        f"""{joined}, shown AS (
            SELECT * FROM joined WHERE {where} ORDER BY {_SIZE[filters.by]} DESC, layer, neuron
            LIMIT {PAGE_SIZE} OFFSET {PAGE_SIZE * (max(page, 1) - 1)})
        SELECT s.layer, s.neuron, s.influence, s.size, s.share, s.num_ranked, s.place, s.effect, s.predicted, s.num_measured,
               s.mean_peak, s.max_signed, s.z_background, s.q, s.share_active, v.text AS peak_token, s.peak_token_share
        FROM shown s LEFT JOIN vocabulary v ON v.token_id = s.peak_token_mode
        ORDER BY {_SIZE[filters.by]} DESC, s.layer, s.neuron
        """,
        [*params, *more],
    )


def points(view: View, filters: Filters) -> pd.DataFrame:
    """layer, neuron, mean_peak, influence, q of the first `MOST_POINTS` of a ranking that have both a peak and an influence."""
    joined, params = _joined(view)
    where, more = filters.where()
    return queries.ask(
        view.paths,
        f"""{joined} SELECT layer, neuron, mean_peak, influence, q FROM joined
        WHERE {where} AND mean_peak IS NOT NULL AND influence IS NOT NULL
        ORDER BY {_SIZE[filters.by]} DESC, layer, neuron LIMIT {MOST_POINTS}
        """,
        [*params, *more],
    )


def loud_and_strong(view: View) -> pd.Series:
    """Of the `LOUDEST` neurons by mean peak: num (how many there are), both (how many are among as many of the largest
    influence)."""
    joined, params = _joined(view)
    return queries.ask(
        view.paths,
        f"""{joined},
        loud AS (SELECT layer, neuron FROM joined WHERE mean_peak IS NOT NULL
                 ORDER BY mean_peak DESC, layer, neuron LIMIT {LOUDEST}),
        strong AS (SELECT layer, neuron FROM joined WHERE size IS NOT NULL
                   ORDER BY size DESC, layer, neuron LIMIT {LOUDEST})
        SELECT (SELECT count(*) FROM loud) AS num,
               (SELECT count(*) FROM loud SEMI JOIN strong USING (layer, neuron)) AS both
        """,
        params,
    ).iloc[0]


def density(view: View, by: str) -> pd.DataFrame:
    """layer, bin (index into `EDGES`), n, share: of the neurons at these places of a ranking, the share that lies in a layer.

    Influence and effects rank within each prompt; peaks once over all.
    """
    of_one = [] if view.prompt_id is None else [view.prompt_id]
    one = " AND {0}prompt_id = ?" if of_one else ""
    if by == "influence":
        sql = f"SELECT layer, place FROM influence WHERE metric = ?{one.format('')}"
        params = [view.metric, *of_one]
    elif by == "effect":
        sql = f"""SELECT e.layer, row_number() OVER (
                     PARTITION BY e.prompt_id ORDER BY abs({_MEASURED}) DESC NULLS LAST, e.layer, e.neuron) AS place
                  FROM effects e LEFT JOIN targets t USING (prompt_id) WHERE e.ranking = ?{one.format("e.")}"""
        params = [view.metric, *of_one]
    else:
        sql = f"""SELECT layer, row_number() OVER (ORDER BY {_SIZE[by]} DESC, layer, neuron) AS place
                  FROM neurons WHERE {_SIZE[by]} IS NOT NULL"""
        params = []
    cases = " ".join(f"WHEN place <= {edge} THEN {n}" for n, edge in enumerate(EDGES))
    return queries.ask(
        view.paths,
        f"""
        SELECT layer, bin, count(*) AS n, count(*) / sum(count(*)) OVER (PARTITION BY bin) AS share
        FROM (SELECT layer, CASE {cases} ELSE {len(EDGES)} END AS bin FROM ({sql})) GROUP BY layer, bin ORDER BY ALL
        """,
        params,
    )


# -- one neuron


def neuron(view: View, chosen: Neuron) -> dict[str, Any] | None:
    """Everything that `neurons` has of one, with the texts peak_token and next_token; None where there is no such row."""
    rows = queries.ask(
        view.paths,
        """
        SELECT n.* EXCLUDE (examples), p.text AS peak_token, x.text AS next_token
        FROM neurons n LEFT JOIN vocabulary p ON p.token_id = n.peak_token_mode
             LEFT JOIN vocabulary x ON x.token_id = n.next_token_mode
        WHERE n.layer = ? AND n.neuron = ?
        """,
        [chosen.layer, chosen.number],
    )
    return plain_rows(rows)[0] if len(rows) else None


def is_known(view: View, chosen: Neuron) -> bool:
    """Whether any table has a row of this neuron."""
    sql = " OR ".join(
        f"EXISTS (FROM {table} WHERE layer = ? AND neuron = ?)" for table in ("neurons", "influence", "neuron_writes")
    )
    return bool(queries.ask(view.paths, f"SELECT {sql} AS found", [chosen.layer, chosen.number] * 3)["found"][0])


def examples(view: View, chosen: Neuron) -> list[dict[str, Any]]:
    """prompt_id, position, value, text (of the prompt), offset ([start, end) in it, None where not known), piece (the token)
    of the prompts in which a neuron peaks highest, the highest first."""
    rows = queries.ask(
        view.paths,
        """
        WITH e AS (
            SELECT unnest(examples, recursive := true), generate_subscripts(examples, 1) AS place FROM neurons
            WHERE layer = ? AND neuron = ?)
        SELECT e.prompt_id, e.position, e.value, c.text, c.offsets[e.position + 1]::INTEGER[] AS "offset",
               c.pieces[e.position + 1] AS piece
        FROM e LEFT JOIN contexts c USING (prompt_id) ORDER BY e.place
        """,
        [chosen.layer, chosen.number],
    )
    return plain_rows(rows)


def writes(view: View, chosen: Neuron) -> dict[str, pd.DataFrame] | None:
    """token_id, text, logit of the tokens that a neuron's output raises, lowers, and of those asked for (`explicit`), each by
    kind; None where they were not computed for it."""
    rows = plain_rows(
        queries.ask(
            view.paths,
            "SELECT top_ids, top_logits, low_ids, low_logits, explicit FROM neuron_writes WHERE layer = ? AND neuron = ?",
            [chosen.layer, chosen.number],
        )
    )
    if not rows:
        return None
    (row,) = rows
    pairs = {
        "raised": list(zip(row["top_ids"] or [], row["top_logits"] or [], strict=True)),
        "lowered": list(zip(row["low_ids"] or [], row["low_logits"] or [], strict=True)),
        "explicit": [(e["token_id"], e["logit"]) for e in row["explicit"] or []],
    }
    texts = token_texts(view.paths, {int(token) for some in pairs.values() for token, _ in some})
    return {
        kind: pd.DataFrame(
            {
                "token_id": [t for t, _ in some],
                "text": [texts[int(t)][0] for t, _ in some],
                "logit": [v for _, v in some],
            }
        )
        for kind, some in pairs.items()
    }


def effects_of(view: View, chosen: Neuron) -> pd.DataFrame:
    """prompt_id, ranking, place, activation, edited, predicted, measured, kind of every prompt in which a neuron was changed,
    the largest effects first."""
    return queries.ask(
        view.paths,
        f"""
        SELECT e.prompt_id, e.ranking, e.place, e.activation, e.edited, e.predicted, {_MEASURED} AS measured, e.kind
        FROM effects e LEFT JOIN targets t USING (prompt_id) WHERE e.layer = ? AND e.neuron = ?
        ORDER BY abs(measured) DESC NULLS LAST, e.prompt_id, e.ranking LIMIT {4 * MOST_PROMPTS}
        """,
        [chosen.layer, chosen.number],
    )


# -- all of them


def effects(view: View) -> pd.DataFrame:
    """prompt_id, layer, neuron, predicted, measured of the metric's ranking: all of them, or `MOST_POINTS` that a hash draws."""
    one, params = _of_one(view, "e.")
    return queries.ask(
        view.paths,
        f"""
        SELECT e.prompt_id, e.layer, e.neuron, e.predicted, {_MEASURED} AS measured
        FROM effects e LEFT JOIN targets t USING (prompt_id)
        WHERE e.ranking = ? AND e.predicted IS NOT NULL AND {one} AND measured IS NOT NULL
        ORDER BY hash(e.prompt_id, e.layer, e.neuron), e.prompt_id, e.layer, e.neuron LIMIT {MOST_POINTS}
        """,
        [view.metric, *params],
    )


def num_effects(view: View) -> pd.DataFrame:
    """ranking, n (effects measured), prompts, kind; of the prompt where one is chosen."""
    one, params = _of_one(view)
    return queries.ask(
        view.paths,
        "SELECT ranking, count(*) AS n, count(DISTINCT prompt_id) AS prompts, any_value(kind) AS kind FROM effects "
        f"WHERE {one} GROUP BY ranking ORDER BY ranking",
        params,
    )


def agreement(view: View) -> pd.DataFrame:
    """ranking, measure (spearman, pearson, sign, slope), value, low, high, n (prompts).

    As the analysis has it where it is of the whole run and was made; else counted here, without intervals.
    """
    if view.prompt_id is None:
        rows = queries.ask(
            view.paths,
            "SELECT ranking, measure, value, low, high, n FROM statistics WHERE analysis = 'agreement' ORDER BY ALL",
        )
        if len(rows):
            return rows
    one, params = _of_one(view, "e.")
    return queries.ask(
        view.paths,
        f"""
        WITH pairs AS (
            SELECT e.prompt_id, e.ranking, e.predicted, {_MEASURED} AS measured
            FROM effects e LEFT JOIN targets t USING (prompt_id) WHERE {one}),
        placed AS (
            SELECT *, {_average_rank("predicted")} AS p, {_average_rank("measured")} AS m FROM pairs
            WHERE predicted IS NOT NULL AND measured IS NOT NULL),
        of_prompt AS (
            SELECT prompt_id, ranking, CASE WHEN count(*) > 2 THEN corr(p, m) END AS spearman,
                   CASE WHEN count(*) > 2 THEN corr(predicted, measured) END AS pearson,
                   avg((predicted * measured > 0)::INT) FILTER (predicted <> 0 AND measured <> 0) AS sign,
                   sum(predicted * measured) / nullif(sum(predicted * predicted), 0) AS slope
            FROM placed GROUP BY ALL),
        long AS (UNPIVOT of_prompt ON spearman, pearson, sign, slope INTO NAME measure VALUE value)
        SELECT ranking, measure, avg(value) AS value, NULL::DOUBLE AS low, NULL::DOUBLE AS high, count(*) AS n
        FROM long WHERE NOT isnan(value) GROUP BY ALL ORDER BY ALL
        """,
        params,
    )


def _average_rank(column: str) -> str:
    """The rank of a column within prompt and ranking, ties sharing theirs."""
    return (
        f"rank() OVER (PARTITION BY prompt_id, ranking ORDER BY {column}) "
        f"+ (count(*) OVER (PARTITION BY prompt_id, ranking, {column}) - 1) / 2"
    )


def curves(view: View) -> pd.DataFrame:
    """ranking, mode, k, m (mean over prompts), n (prompts), by k; of the prompt where one is chosen."""
    one, params = _of_one(view)
    return queries.ask(
        view.paths,
        "SELECT ranking, mode, k, avg(m) AS m, count(m) AS n FROM curves WHERE m IS NOT NULL AND NOT isnan(m) "
        f"AND {one} GROUP BY ALL ORDER BY mode, ranking, k",
        params,
    )


def areas(paths: RunPaths) -> pd.DataFrame:
    """ranking, measure (such as area_keep), value, low, high, n of the whole run."""
    return queries.ask(
        paths,
        "SELECT ranking, measure, value, low, high, n FROM statistics WHERE analysis = 'curves' ORDER BY ALL",
    )


def _of_one(view: View, table: str = "") -> tuple[str, list[Any]]:
    return ("TRUE", []) if view.prompt_id is None else (f"{table}prompt_id = ?", [view.prompt_id])
