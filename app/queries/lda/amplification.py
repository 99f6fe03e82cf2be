"""What the page Amplification asks: the pair, rates by arm, natural rates, hits a page at a time, rollouts side by side,
tokens that the training raised, and a reader's own pattern.

Rates are counted in the snapshot, so that they are there while a run goes on; intervals are the analysis' own, and are
shown only of the very counts that they were made of.
"""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from app import queries
from app.queries.lda import NATURAL, View
from harness.errors import HarnessError
from harness.run import RunPaths

PAGE_SIZE = 50
MODE = "sample"
PLACES = ("answer", "prompt")
MOST_TOKENS = 100
"""Tokens of a kind that the table shows."""
MOST_PATTERN = 1_000
NUM_EXAMPLES = 25
WAYS = ("exact", "counted", "reweighted")
"""To the natural rate that are measured; the extrapolated one is none of them."""
_KEY = "prompt_id, condition, mode, sample_id"
_EMPTY_MATCH = "it matches the empty text, and so every completion"


@dataclass(frozen=True)
class Natural:
    """A natural rate by one way: `value` is None where it is not known; `note` says how it was made, or why it was not."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


def pair(paths: RunPaths) -> pd.DataFrame:
    """side, model, revision, vocab_size, num_common, vocabs_match, special_match, warning; after first."""
    return queries.ask(
        paths,
        "SELECT side, model, revision, vocab_size, num_common, vocabs_match, special_match, warning FROM pair "
        "ORDER BY side",
    )


def made(view: View) -> pd.Series:
    """completions (made so far), judged (of them, by any detector), has_natural (whether α = 0 is among them)."""
    found = queries.ask(
        view.paths,
        f"""
        SELECT (SELECT count(*) FROM completions) AS completions,
               (SELECT count(*) FROM (SELECT DISTINCT {_KEY} FROM hits)) AS judged,
               (SELECT count(*) > 0 FROM completions WHERE condition = ?) AS has_natural
        """,
        [NATURAL],
    )
    return found.iloc[0]


def rates(view: View) -> pd.DataFrame:
    """detector, condition, alpha, num_prompts, judged, hits, rate (mean over prompts), low, high, exact (of beginning with
    the phrase), left_out (probability of tokenisations that were not followed), contrast (less that at α = 0),
    contrast_low, contrast_high, q; within the filters, by detector and α. What is not known is NaN.

    Intervals and contrasts are given where the analysis is of these very rollouts: of all prompts, and of as many.
    """
    where, params = view.where()
    return queries.ask(
        view.paths,
        f"""
        WITH counted AS (
            SELECT detector, condition, count(*) AS num_prompts, sum(num_rollouts)::BIGINT AS judged,
                   sum(num_hits)::BIGINT AS hits, avg(rate) AS rate
            FROM hit_rates WHERE {where} GROUP BY ALL),
        exact AS (
            SELECT detector, condition, avg(coalesce(exp(logp), 0)) AS exact,
                   avg(coalesce(exp(logp_left_out), 0)) AS left_out
            FROM exact_rates WHERE {where} GROUP BY ALL),
        told AS (
            SELECT r.detector, r.condition, r.low, r.high, j.value AS judged
            FROM statistics r JOIN statistics j USING (analysis, detector, condition)
            WHERE analysis = 'rates' AND r.measure = 'rate' AND j.measure = 'judged' AND ?::VARCHAR IS NULL),
        contrasts AS (SELECT detector, condition, value, low, high, q FROM statistics WHERE analysis = 'contrasts')
        SELECT detector, condition, a.alpha, c.num_prompts, c.judged, c.hits, c.rate, t.low, t.high, e.exact, e.left_out,
               CASE WHEN t.judged IS NOT NULL THEN d.value END AS contrast,
               CASE WHEN t.judged IS NOT NULL THEN d.low END AS contrast_low,
               CASE WHEN t.judged IS NOT NULL THEN d.high END AS contrast_high,
               CASE WHEN t.judged IS NOT NULL THEN d.q END AS q
        FROM counted c FULL JOIN exact e USING (detector, condition) JOIN arms a USING (condition)
             LEFT JOIN told t ON t.detector = c.detector AND t.condition = c.condition AND t.judged = c.judged
             LEFT JOIN contrasts d ON d.detector = t.detector AND d.condition = t.condition
        ORDER BY detector, alpha
        """,
        [*params, *params, view.category],
    )


def natural(view: View) -> dict[str, Natural]:
    """The chosen detector's natural rate by way, those of `WAYS` and `extrapolated`; of the whole run, whatever the filters
    are. Before the analysis there are only those that can be counted, without intervals."""
    rows = queries.ask(
        view.paths,
        "SELECT measure, value, low, high, n, method FROM statistics WHERE analysis = 'natural' AND detector = ?",
        [view.detector],
    )
    stored = {str(r["measure"]): r for r in _plain_rows(rows)}
    found = {way: Natural(r["value"], r["low"], r["high"], r["method"] or "") for way, r in stored.items()}
    so_far = _counted_so_far(view)
    if not stored:
        found = so_far
    elif "exact" in found and "exact" in so_far:
        found["exact"] = replace(found["exact"], note=so_far["exact"].note)
    worth = stored.get("effective_hits")
    if worth and not worth["n"] and "reweighted" in found:
        # Nothing was seen, so nothing can be resampled: an interval of no width would be a lie.
        found["reweighted"] = Natural(note="no hit in any arm: there is nothing to reweight")
    elif worth and worth["value"] is not None and "reweighted" in found:
        told = f"{worth['n']:,} hits, worth {worth['value']:.1f} equally weighted ones; {found['reweighted'].note}"
        found["reweighted"] = replace(found["reweighted"], note=told)
    return {way: found[way] for way in (*WAYS, "extrapolated") if way in found}


def _counted_so_far(view: View) -> dict[str, Natural]:
    every = rates(replace(view, category=None))
    mine = every[(every["detector"] == view.detector) & (every["condition"] == NATURAL)]
    found: dict[str, Natural] = {}
    for row in _plain_rows(mine):
        if row["exact"] is not None:
            told = "of beginning with the phrase; exact, for these prompts"
            if row["left_out"]:
                told += f"; tokenisations not followed: at most {row['left_out']:.2g} more"
            found["exact"] = Natural(row["exact"], note=told)
        if row["rate"] is not None:
            found["counted"] = Natural(row["rate"], note=f"{row['hits']:,} of {row['judged']:,} judged rollouts")
    return found


def num_hits(view: View, condition: str) -> int:
    """How many rollouts of an arm the chosen detector fired in; within the filters."""
    where, params = view.where()
    found = queries.ask(
        view.paths,
        f"SELECT count(*) AS n FROM hits WHERE is_hit AND detector = ? AND condition = ? AND {where}",
        [view.detector, condition, *params],
    )
    return int(found["n"].iloc[0])


def hits(view: View, condition: str, page: int) -> pd.DataFrame:
    """prompt_id, category, question, sample_id, answer, char_span, first_step, end_step, branch_step, num_tokens,
    finish_reason of one page of an arm's hits, the first being page 1; by prompt and sample."""
    where, params = view.where()
    return queries.ask(
        view.paths,
        f"""
        WITH shown AS (
            SELECT {_KEY}, char_span::INTEGER[] AS char_span, first_step, end_step FROM hits
            WHERE is_hit AND detector = ? AND condition = ? AND {where}
            ORDER BY prompt_id, sample_id LIMIT {PAGE_SIZE} OFFSET {PAGE_SIZE * (max(page, 1) - 1)})
        SELECT s.prompt_id, p.category, p.question, s.sample_id, c.answer, s.char_span, s.first_step, s.end_step,
               a.branch_step, len(c.token_ids) AS num_tokens, c.finish_reason
        FROM shown s JOIN completions c USING ({_KEY}) LEFT JOIN amplified a USING ({_KEY})
             LEFT JOIN prompts p ON p.prompt_id = s.prompt_id
        ORDER BY s.prompt_id, s.sample_id
        """,
        [view.detector, condition, *params],
    )


def samples(paths: RunPaths) -> list[int]:
    """The numbers that samples have."""
    rows = queries.ask(paths, "SELECT DISTINCT sample_id FROM completions ORDER BY sample_id")
    return [int(n) for n in rows["sample_id"]]


def context(paths: RunPaths, prompt_id: str) -> str | None:
    """The text that a prompt's rollouts go on from; None where it is not stored."""
    rows = queries.ask(paths, "SELECT text FROM contexts WHERE prompt_id = ?", [prompt_id])
    return None if rows.empty or rows["text"].isna().all() else str(rows["text"].iloc[0])


def rollouts(view: View, prompt_id: str, sample_id: int) -> list[dict[str, Any]]:
    """condition, alpha, token_ids, text, finish_reason, logp_after, logp_before, logp_arm, mass_removed, branch_step and
    the chosen detector's is_hit, first_step, end_step, char_span of one prompt's sample under each arm, the smallest α
    first; None for what is not known."""
    rows = queries.ask(
        view.paths,
        f"""
        SELECT c.condition, r.alpha, c.token_ids, c.text, c.finish_reason, a.logp_after, a.logp_before, a.logp_arm,
               list_avg(a.mass_removed) AS mass_removed, a.branch_step, h.is_hit, h.first_step, h.end_step,
               h.char_span::INTEGER[] AS char_span
        FROM (SELECT * FROM completions WHERE prompt_id = ? AND sample_id = ? AND mode = '{MODE}') c
             JOIN arms r USING (condition)
             LEFT JOIN (SELECT * FROM amplified WHERE prompt_id = ? AND sample_id = ?) a USING ({_KEY})
             LEFT JOIN (SELECT * FROM hits WHERE prompt_id = ? AND sample_id = ? AND detector = ?) h USING ({_KEY})
        ORDER BY r.alpha
        """,
        [*[prompt_id, sample_id] * 3, view.detector],
    )
    return _plain_rows(rows)


def token_texts(paths: RunPaths, token_ids: set[int]) -> dict[int, tuple[str, bool]]:
    """The text of each of these ids and whether it is a special token; ids the run does not know are shown by number."""
    wanted = sorted(token_ids)
    unknown = {n: (f"[{n}]", False) for n in wanted}
    if "vocabulary" not in queries.tables(paths):
        return unknown
    rows = queries.ask(
        paths, "SELECT token_id, text, is_special FROM vocabulary WHERE list_contains(?, token_id)", [wanted]
    )
    known = zip(rows["token_id"], rows["text"], rows["is_special"], strict=True)
    return unknown | {int(n): (str(text), bool(special)) for n, text, special in known}


def raised(paths: RunPaths, place: str, search: str, *, most: bool) -> pd.DataFrame:
    """token_id, text, mean, sd, share_positive, num_top, n of the tokens that the training raised most (else lowered most)
    at a place, at most `MOST_TOKENS`; `search` keeps those whose text has it, whatever the case, or whose id it is."""
    return queries.ask(
        paths,
        f"""
        SELECT d.token_id, v.text, d.mean, d.sd, d.share_positive, d.num_top, d.n
        FROM token_diffs d LEFT JOIN vocabulary v USING (token_id)
        WHERE d.place = ? AND d.mean {">" if most else "<"} 0
              AND (? = '' OR contains(lower(v.text), lower(?)) OR d.token_id::VARCHAR = ?)
        ORDER BY d.mean {"DESC" if most else "ASC"}, d.token_id LIMIT {MOST_TOKENS}
        """,
        [place, search, search, search.strip()],
    )


def num_contexts(paths: RunPaths, place: str) -> int:
    """Over how many contexts the differences at a place were taken."""
    found = queries.ask(paths, "SELECT max(n) AS n FROM token_diffs WHERE place = ?", [place])
    return 0 if found["n"].isna().all() else int(found["n"].iloc[0])


def problem_of(paths: RunPaths, pattern: str) -> str | None:
    """Why a pattern cannot be tried, in one line; None where it can."""
    try:
        found = queries.ask(paths, "SELECT regexp_matches('', ?) AS fires", [pattern])
    except HarnessError as e:
        told = " ".join(str(e).removeprefix(f"{paths.live}: ").removeprefix("Invalid Input Error: ").split())
        return f"This is no pattern of RE2: {told[:300]}"
    return f"This is no detector: {_EMPTY_MATCH}." if bool(found["fires"].iloc[0]) else None


def tried(view: View, pattern: str, *, any_case: bool) -> pd.DataFrame:
    """alpha, condition, rollouts, hits, rate (mean over prompts) of a reader's own pattern; within the filters, by α."""
    where, params = view.where("c.prompt_id")
    return queries.ask(
        view.paths,
        f"""
        WITH one AS (
            SELECT c.prompt_id, c.condition, count(*) AS rollouts,
                   count(*) FILTER (regexp_matches(c.answer, ?, ?)) AS hits
            FROM completions c WHERE c.answer IS NOT NULL AND {where} GROUP BY ALL)
        SELECT a.alpha, o.condition, sum(o.rollouts)::BIGINT AS rollouts, sum(o.hits)::BIGINT AS hits,
               avg(o.hits / o.rollouts) AS rate
        FROM one o JOIN arms a USING (condition) GROUP BY ALL ORDER BY a.alpha
        """,
        [pattern, _case(any_case), *params],
    )


def examples(view: View, pattern: str, *, any_case: bool) -> pd.DataFrame:
    """alpha, prompt_id, sample_id, found (the completion, with what was found between ⟦ and ⟧) of some completions that a
    pattern fires in, as many of each arm; within the filters."""
    where, params = view.where("c.prompt_id")
    return queries.ask(
        view.paths,
        f"""
        WITH shown AS (
            SELECT c.* FROM completions c
            WHERE regexp_matches(c.answer, ?, ?) AND {where}
            QUALIFY row_number() OVER (PARTITION BY c.condition ORDER BY c.prompt_id, c.sample_id) <= ?)
        SELECT a.alpha, s.prompt_id, s.sample_id, regexp_replace(s.answer, ?, '⟦\\0⟧', ?) AS found
        FROM shown s JOIN arms a USING (condition) ORDER BY a.alpha, s.prompt_id, s.sample_id
        """,
        [pattern, _case(any_case), *params, max(1, NUM_EXAMPLES // max(len(view.arms), 1)), pattern,
         f"g{_case(any_case)}"],
    )  # fmt: skip


def _case(any_case: bool) -> str:
    return "i" if any_case else "c"


def looks(view: View) -> pd.DataFrame:
    """alpha, rollouts, num_tokens, ended (share), mass_removed, branched (share whose tokens are not those at α = 0; NaN where
    there is nothing to hold them against) by arm; within the filters."""
    where, params = view.where("s.prompt_id")
    return queries.ask(
        view.paths,
        f"""
        SELECT a.alpha, count(*) AS rollouts, avg(s.num_tokens) AS num_tokens,
               avg((s.finish_reason = 'stop')::INT) AS ended, avg(s.mass_removed) AS mass_removed,
               CASE WHEN a.condition <> ? AND ? THEN avg((s.branch_step IS NOT NULL)::INT) END AS branched
        FROM rollout_summaries s JOIN arms a USING (condition) WHERE s.mode = '{MODE}' AND {where}
        GROUP BY a.alpha, a.condition ORDER BY a.alpha
        """,
        [NATURAL, view.is_noise_common and any(arm.condition == NATURAL for arm in view.arms), *params],
    )


def _plain_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:
    """Lists as lists, numbers as Python's own, and None for what is not known."""
    if hasattr(value, "tolist"):  # numpy's, which JSON does not know
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if value is None or value is pd.NA or value != value else value
