"""Two neuron runs side by side: what the analyses of both say, joined."""

import pandas as pd

from app import queries
from harness.run import RunPaths

_KEY = ["analysis", "ranking", "measure"]


def results(paths: RunPaths) -> pd.DataFrame:
    """analysis, ranking, measure, value, low, high, n of what a run found."""
    if "statistics" not in queries.tables(paths):
        return pd.DataFrame(columns=[*_KEY, "value", "low", "high", "n"])
    return queries.ask(paths, "SELECT analysis, ranking, measure, value, low, high, n FROM statistics ORDER BY ALL")


def compare(this: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two frames of `results`, joined by key: analysis, ranking, measure, value, low, high and the same ending in _other,
    difference (other − this), intervals (`overlap`, `apart`, or `` where one is missing), found_in (`both`, `this`,
    `other`), n, n_other."""
    both = this.merge(other, on=_KEY, how="outer", suffixes=("", "_other"), indicator="found_in")
    both["found_in"] = both["found_in"].map({"both": "both", "left_only": "this", "right_only": "other"}).astype(str)
    both["difference"] = both["value_other"] - both["value"]
    known = both[["low", "high", "low_other", "high_other"]].notna().all(axis=1)
    overlap = (both["low"] <= both["high_other"]) & (both["low_other"] <= both["high"])
    both["intervals"] = overlap.map({True: "overlap", False: "apart"}).where(known, "")
    both = both.sort_values(_KEY, ignore_index=True)
    own = ["value", "low", "high"]
    return both[[*_KEY, *own, *(f"{c}_other" for c in own), "difference", "intervals", "found_in", "n", "n_other"]]
