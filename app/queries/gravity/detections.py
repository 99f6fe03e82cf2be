"""What the Detections page asks: how many answers say X, the answers themselves a page at a time, and rates by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from app import queries
from app.queries.gravity import View
from harness.run import RunPaths

ANY = "any"
MODES = ("greedy", "sample")
SAYS = (ANY, "present", "absent")
FORMATS = (ANY, "ok", "not ok")
PAGE_SIZE = 50
_LAST_WORD = (
    "SELECT item_key, max(time) AS time, arg_max(message, event_id) AS message FROM events WHERE stage = 'detect' "
    "AND kind IN ('failed_item', 'recovered_item', 'dropped_item') AND item_key IS NOT NULL GROUP BY item_key "
    "HAVING arg_max(kind, event_id) = 'failed_item'"
)


@dataclass(frozen=True)
class Asked:
    """Which answers: under a condition, in a mode, and of these those with this verdict, format and end (`ANY`: all)."""

    condition: str
    mode: str
    says: str = ANY
    form: str = ANY
    finish: str = ANY


def counts(view: View, condition: str, mode: str) -> pd.Series:
    """answers, judged (those with a verdict), present (X in the answer), elsewhere (X in the text, but not in the
    answer), format_ok, prompts; within the filters."""
    where, params = view.where("c.prompt_id")
    found = queries.ask(
        view.paths,
        f"""
        SELECT count(*) AS answers, count(d.word_present) AS judged, count(*) FILTER (d.word_present) AS present,
               count(*) FILTER (d.word_present_full AND NOT d.word_present) AS elsewhere,
               count(*) FILTER (d.format_ok) AS format_ok, count(DISTINCT c.prompt_id) AS prompts
        FROM completions c LEFT JOIN detections d USING (prompt_id, condition, mode, sample_id)
        WHERE c.condition = ? AND c.mode = ? AND {where}
        """,
        [condition, mode, *params],
    )
    return found.iloc[0]


def finish_reasons(paths: RunPaths) -> list[str]:
    """Every way in which an answer of this run ended."""
    rows = queries.ask(
        paths,
        "SELECT DISTINCT finish_reason FROM completions WHERE finish_reason IS NOT NULL ORDER BY finish_reason",
    )
    return list(rows["finish_reason"])


def num_answers(view: View, asked: Asked) -> int:
    """How many answers the filters keep."""
    source, params = _kept(view, asked)
    return int(queries.ask(view.paths, f"SELECT count(*) AS n {source}", params)["n"].iloc[0])


def answers(view: View, asked: Asked, page: int) -> pd.DataFrame:
    """prompt_id, category, target, sample_id, answer, text, word_present, format_ok, num_occurrences, first_step,
    finish_reason, char_spans of one page of answers, the first being page 1; by prompt and sample."""
    source, params = _kept(view, asked)
    return queries.ask(
        view.paths,
        f"""
        SELECT c.prompt_id, p.category, p.target, c.sample_id, c.answer, c.text, d.word_present, d.format_ok,
               d.num_occurrences, d.first_step, c.finish_reason, d.char_spans::INTEGER[][] AS char_spans {source}
        ORDER BY c.prompt_id, c.sample_id LIMIT {PAGE_SIZE} OFFSET {PAGE_SIZE * (max(page, 1) - 1)}
        """,
        params,
    )


def samples(paths: RunPaths, condition: str, mode: str) -> list[int]:
    """The numbers that answers under a condition and in a mode have."""
    rows = queries.ask(
        paths,
        "SELECT DISTINCT sample_id FROM completions WHERE condition = ? AND mode = ? ORDER BY sample_id",
        [condition, mode],
    )
    return [int(n) for n in rows["sample_id"]]


def answer(paths: RunPaths, prompt_id: str, condition: str, mode: str, sample_id: int) -> dict[str, Any] | None:
    """token_ids, text, answer, finish_reason, logprobs, margins and, where it was judged (else None or no spans),
    word_present, word_present_full, format_ok, char_spans, token_spans of one answer; None where there is none."""
    rows = queries.ask(
        paths,
        """
        SELECT c.token_ids, c.text, c.answer, c.finish_reason, c.logprobs, c.margins, d.word_present, d.word_present_full,
               d.format_ok, d.char_spans::INTEGER[][] AS char_spans, d.token_spans::INTEGER[][] AS token_spans
        FROM completions c LEFT JOIN detections d USING (prompt_id, condition, mode, sample_id)
        WHERE c.prompt_id = ? AND c.condition = ? AND c.mode = ? AND c.sample_id = ?
        """,
        [prompt_id, condition, mode, sample_id],
    )
    return None if rows.empty else _plain(rows.iloc[0].to_dict())


def violations(view: View, condition: str) -> pd.DataFrame:
    """prompt_id, category, target, p0 (p_sem under baseline), num_samples, num_violations, rate; within the filters, the
    highest rate first."""
    where, params = view.where("v.prompt_id")
    return queries.ask(
        view.paths,
        f"""
        SELECT v.prompt_id, p.category, p.target, b.p_sem AS p0, v.num_samples, v.num_violations, v.rate
        FROM violation v JOIN prompts p USING (prompt_id)
             LEFT JOIN psem b ON b.prompt_id = v.prompt_id AND b.condition = 'baseline'
        WHERE v.condition = ? AND {where} ORDER BY v.rate DESC, v.prompt_id
        """,
        [condition, *params],
    )


def mapping_errors(paths: RunPaths) -> pd.DataFrame:
    """item_key, time, message of every answer in which X could not be placed among the tokens; of the whole run."""
    return queries.ask(paths, f"{_LAST_WORD} ORDER BY item_key")


def _kept(view: View, asked: Asked) -> tuple[str, list[Any]]:
    """FROM and WHERE of the answers asked for, and their parameters."""
    where, params = view.where("c.prompt_id")
    parts, values = ["c.condition = ?", "c.mode = ?"], [asked.condition, asked.mode]
    if asked.says != ANY:
        parts.append("d.word_present" if asked.says == "present" else "NOT d.word_present")
    if asked.form != ANY:
        parts.append("d.format_ok" if asked.form == "ok" else "NOT d.format_ok")
    if asked.finish != ANY:
        parts.append("c.finish_reason = ?")
        values.append(asked.finish)
    source = (
        "FROM completions c JOIN prompts p USING (prompt_id) "
        "LEFT JOIN detections d USING (prompt_id, condition, mode, sample_id) "
        f"WHERE {' AND '.join(parts)} AND {where}"
    )
    return source, [*values, *params]


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Lists as lists, and None for what is not known."""
    told: dict[str, Any] = {}
    for name, value in row.items():
        if hasattr(value, "__len__") and not isinstance(value, str):
            told[name] = [list(v) if hasattr(v, "__len__") else v for v in value]
        else:
            told[name] = None if value is None or value is pd.NA or value != value else value
    return told
