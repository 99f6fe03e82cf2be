"""Two runs of amplification side by side: the analyses of both, joined."""

import pandas as pd

from app import queries
from app.queries.lda import Arm
from harness.run import RunPaths

EXTRAPOLATED = "extrapolated"
_ANALYSES = ("natural", "rates", "contrasts", "exact")
_LEFT_OUT = ("hits", "judged", "failed", "effective_hits")
"""Counts, which are no results."""
_KEY = ["analysis", "detector", "condition", "measure"]


def results(paths: RunPaths) -> pd.DataFrame:
    """analysis, detector, condition, measure, value, low, high, n of what a run found."""
    if "statistics" not in queries.tables(paths):
        return pd.DataFrame(columns=[*_KEY, "value", "low", "high", "n"])
    return queries.ask(
        paths,
        "SELECT analysis, detector, condition, measure, value, low, high, n FROM statistics "
        "WHERE list_contains(?, analysis) AND NOT list_contains(?, measure)",
        [list(_ANALYSES), list(_LEFT_OUT)],
    )


def compare(this: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two frames of `results`, joined by key: analysis, detector, condition, measure, value, low, high and the same ending in
    _other, difference (other − this), intervals (`overlap`, `apart`, or `` where one is missing), found_in (`both`, `this`,
    `other`), n, n_other. Natural rates first, the arms by α."""
    both = this.merge(other, on=_KEY, how="outer", suffixes=("", "_other"), indicator="found_in")
    both["found_in"] = both["found_in"].map({"both": "both", "left_only": "this", "right_only": "other"}).astype(str)
    both["difference"] = both["value_other"] - both["value"]
    known = both[["low", "high", "low_other", "high_other"]].notna().all(axis=1)
    overlap = (both["low"] <= both["high_other"]) & (both["low_other"] <= both["high"])
    both["intervals"] = overlap.map({True: "overlap", False: "apart"}).where(known, "")
    both["_analysis"] = both["analysis"].map({name: n for n, name in enumerate(_ANALYSES)})
    both["_alpha"] = [alpha_of(c) for c in both["condition"]]
    both = both.sort_values(["_analysis", "detector", "_alpha", "measure"], ignore_index=True)
    own = ["value", "low", "high"]
    return both[[*_KEY, *own, *(f"{c}_other" for c in own), "difference", "intervals", "found_in", "n", "n_other"]]


def alpha_of(condition: str) -> float:
    """α by the name of an arm; NaN for what is no arm's name."""
    try:
        return float(Arm(condition, 0.0).label)
    except ValueError:
        return float("nan")
