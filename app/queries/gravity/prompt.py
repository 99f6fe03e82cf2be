"""What the page of one prompt asks, beside what the other pages' modules answer."""

import pandas as pd

from app import queries
from app.queries.gravity import token_texts
from harness.run import RunPaths

RATIOS = ("iar", "nf", "tmf", "pi")


def facts(paths: RunPaths, prompt_id: str) -> dict:
    """The row of `prompts` of one prompt, by column; empty where there is none."""
    rows = queries.ask(paths, "SELECT * FROM prompts WHERE prompt_id = ?", [prompt_id])
    return rows.iloc[0].to_dict() if len(rows) else {}


def pressure(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """condition, p_sem, p_word, paper_p_sem, delta, relative, log (the suppression against baseline), num_violations,
    num_samples, baseline first."""
    return queries.ask(
        paths,
        """
        WITH d AS (
            SELECT condition, count(*) AS num_samples, count(*) FILTER (word_present) AS num_violations
            FROM detections WHERE prompt_id = ? AND mode = 'sample' GROUP BY condition)
        SELECT p.condition, p.p_sem, p.p_word, p.paper_p_sem, s.delta, s.relative, s.log, d.num_violations, d.num_samples
        FROM (SELECT * FROM psem WHERE prompt_id = ?) p
             LEFT JOIN (SELECT * FROM suppression WHERE prompt_id = ?) s USING (condition) LEFT JOIN d USING (condition)
        ORDER BY p.condition <> 'baseline', p.condition
        """,
        [prompt_id] * 3,
    )


def verdicts(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """condition, outcome, taxonomy of one prompt, as the view `outcomes` has them."""
    return queries.ask(
        paths, "SELECT condition, outcome, taxonomy FROM outcomes WHERE prompt_id = ? ORDER BY condition", [prompt_id]
    )


def greedy(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """condition, text, char_spans (of X), word_present, finish_reason of the greedy answers, baseline first."""
    return queries.ask(
        paths,
        """
        SELECT c.condition, c.text, d.char_spans, d.word_present, c.finish_reason
        FROM (SELECT * FROM completions WHERE prompt_id = ? AND mode = 'greedy') c
             LEFT JOIN (SELECT * FROM detections WHERE prompt_id = ? AND mode = 'greedy') d USING (condition)
        ORDER BY c.condition <> 'baseline', c.condition
        """,
        [prompt_id] * 2,
    )


def samples(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """condition, text, number, word_present of the different samples, the most frequent of a condition first."""
    return queries.ask(
        paths,
        """
        SELECT c.condition, c.text, count(*) AS number, d.word_present
        FROM (SELECT * FROM completions WHERE prompt_id = ? AND mode = 'sample') c
             LEFT JOIN (SELECT * FROM detections WHERE prompt_id = ? AND mode = 'sample') d USING (condition, sample_id)
        GROUP BY c.condition, c.text, d.word_present
        ORDER BY c.condition <> 'baseline', c.condition, number DESC, c.text
        """,
        [prompt_id] * 2,
    )


def ratios(paths: RunPaths, prompt_id: str, step: str) -> pd.DataFrame:
    """condition, layer, iar, nf, tmf, pi: means over heads at a step; NULL where a span does not exist."""
    if "attention" not in queries.tables(paths):
        return pd.DataFrame(columns=["condition", "layer", *RATIOS])
    means = ", ".join(f"list_avg({m})::DOUBLE AS {m}" for m in RATIOS)
    return queries.ask(
        paths,
        f"SELECT condition, layer, {means} FROM attention WHERE prompt_id = ? AND step_kind = ? "
        "ORDER BY condition <> 'baseline', condition, layer",
        [prompt_id, step],
    )


def shares(paths: RunPaths, prompt_id: str, condition: str, step: str) -> pd.DataFrame:
    """layer, position, share: what the query token of a step attends to, mean over heads."""
    if "attention" not in queries.tables(paths):
        return pd.DataFrame(columns=["layer", "position", "share"])
    return queries.ask(
        paths,
        "SELECT layer, generate_subscripts(mean_row, 1) - 1 AS position, unnest(mean_row)::DOUBLE AS share FROM attention "
        "WHERE prompt_id = ? AND condition = ? AND step_kind = ? ORDER BY layer, position",
        [prompt_id, condition, step],
    )


def answer_tokens(paths: RunPaths, prompt_id: str, condition: str) -> list[str]:
    """The texts of the greedy answer's tokens."""
    rows = queries.ask(
        paths,
        "SELECT token_ids FROM completions WHERE prompt_id = ? AND condition = ? AND mode = 'greedy'",
        [prompt_id, condition],
    )
    ids = [int(n) for n in rows["token_ids"][0]] if len(rows) else []
    texts = token_texts(paths, ids)
    return [texts[n] or f"[{n}]" for n in ids]


def events(paths: RunPaths, prompt_id: str) -> pd.DataFrame:
    """time, level, stage, kind, item_key, message of what happened to the prompt's items."""
    if "events" not in queries.tables(paths):
        return pd.DataFrame(columns=["time", "level", "stage", "kind", "item_key", "message"])
    return queries.ask(
        paths,
        "SELECT time, level, stage, kind, item_key, message FROM events "
        "WHERE item_key = ? OR starts_with(item_key, ?) ORDER BY event_id",
        [prompt_id, f"{prompt_id}|"],
    )
