"""The Detections page's drawings: an answer as chips, X marked in a text, and how violation rates are spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from app.charts import BLUE, Option
from app.charts.chips import Chip, shade

SCALE = (
    "background: the token's probability under the model's own distribution, 0 (no colour) to 1 (deepest); outlined: X; "
    "hatched: not recorded"
)
_NUM_BINS = 20
_DEEPEST = 0.55
"""Opacity of probability 1: text stays readable on it, light and dark."""


def answer_chips(answer: Mapping[str, Any], texts: Mapping[int, str]) -> list[Chip]:
    """One chip a token: coloured by its probability on a scale of 0 to 1, outlined where X is; hovering tells the step,
    id, log-probability and margin."""
    logprobs, margins = answer.get("logprobs") or [], answer.get("margins") or []
    marked = {n for start, end in answer.get("token_spans") or [] for n in range(int(start), int(end))}
    found: list[Chip] = []
    for step, token in enumerate(answer["token_ids"]):
        logprob = _at(logprobs, step)
        found.append(
            Chip(
                text=texts.get(int(token), f"[{token}]"),
                colour="" if logprob is None else shade(_DEEPEST * float(np.exp(logprob)), 1.0),
                note=_note(step, int(token), logprob, _at(margins, step), step in marked),
                is_marked=step in marked,
                is_missing=logprob is None,
            )
        )
    return found


def rate_counts(rates: pd.DataFrame) -> pd.DataFrame:
    """low, high, n: prompts by violation rate. A bar a possible rate where all prompts have the same number of samples
    (low = high = that rate), else bins of equal width, the last with both ends."""
    if rates.empty:
        return pd.DataFrame({"low": [], "high": [], "n": []})
    sizes = set(rates["num_samples"])
    if len(sizes) == 1 and max(sizes) <= 64:
        size = int(max(sizes))
        n = np.bincount(rates["num_violations"].to_numpy(int), minlength=size + 1)
        edges = np.arange(size + 1) / size
        return pd.DataFrame({"low": edges, "high": edges, "n": n})
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n": np.histogram(rates["rate"], edges)[0]})


def rate_histogram(counts: pd.DataFrame, num_samples: int | None) -> Option:
    """`rate_counts` as bars; `num_samples` where it is the same for all prompts, which then labels the bars."""
    if num_samples is not None and (counts["low"] == counts["high"]).all():
        names = [str(k) for k in range(len(counts))]
        title = f"samples of {num_samples} that say X"
    else:
        names = [f"{a:.2f} to {b:.2f}" for a, b in zip(counts["low"], counts["high"], strict=True)]
        title = "share of samples that say X"
    return {
        "grid": {"left": 12, "right": 24, "top": 24, "bottom": 12},
        "tooltip": {"trigger": "axis", "axisPointer": {"type": "shadow"}},
        "xAxis": {"type": "category", "data": names, "name": title, "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "value", "name": "prompts", "nameLocation": "middle", "nameGap": 44, "minInterval": 1},
        "series": [
            {
                "type": "bar",
                "name": "prompts",
                "data": counts["n"].astype(int).tolist(),
                "barCategoryGap": "8%",
                "itemStyle": {"color": BLUE},
            }
        ],
    }


def _at(values: Sequence[Any], n: int) -> float | None:
    if n >= len(values) or values[n] is None or values[n] != values[n]:
        return None
    return float(values[n])


def _note(step: int, token: int, logprob: float | None, margin: float | None, is_marked: bool) -> str:
    parts = [f"step {step}", f"token {token}"]
    if logprob is None:
        parts.append("log-probability not recorded")
    else:
        parts.append(f"log-probability {logprob:.4f} (p {np.exp(logprob):.4f})")
    parts.append("margin not recorded" if margin is None else f"margin {margin:.4f} nats")
    return " · ".join([*parts, "part of X"] if is_marked else parts)
