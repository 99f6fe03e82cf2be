"""Two runs' answers side by side: the analyses of both, joined."""

import re

import pandas as pd

from app import queries
from harness.run import RunPaths

COMPARED = ("rates", "fit", "suppression", "phrasing", "taxonomy")
"""Analyses of `statistics` that are put side by side: those of the answers; the mechanism's have pages of their own."""
_KEY = ["analysis", "condition", "measure", "grouping"]


def results(paths: RunPaths) -> pd.DataFrame:
    """analysis, condition, measure, grouping, value, low, high, n of the analyses in `COMPARED`, calibration left out."""
    if "statistics" not in queries.tables(paths):
        return pd.DataFrame(columns=[*_KEY, "value", "low", "high", "n"])
    return queries.ask(
        paths,
        "SELECT analysis, condition, measure, grouping, value, low, high, n FROM statistics "
        "WHERE list_contains(?, analysis) AND layer = -1 AND head = -1 AND measure NOT LIKE 'calibration%'",
        [list(COMPARED)],
    )


def compare(this: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Two frames of `results`, joined by key: analysis, condition, measure, grouping, value, low, high and the same ending
    in _other, difference (other − this), intervals (`overlap`, `apart`, or `` where one is missing), found_in (`both`,
    `this`, `other`). Rates by condition and bin first.
    """
    both = this.merge(other, on=_KEY, how="outer", suffixes=("", "_other"), indicator="found_in")
    both["found_in"] = both["found_in"].map({"both": "both", "left_only": "this", "right_only": "other"}).astype(str)
    both["difference"] = both["value_other"] - both["value"]
    known = both[["low", "high", "low_other", "high_other"]].notna().all(axis=1)
    overlap = (both["low"] <= both["high_other"]) & (both["low_other"] <= both["high"])
    both["intervals"] = overlap.map({True: "overlap", False: "apart"}).where(known, "")
    both["_analysis"] = both["analysis"].map({name: n for n, name in enumerate(COMPARED)})
    both["_grouping"] = [-1.0 if g == "all" else bin_start(g) for g in both["grouping"]]  # what is no bin goes last
    both = both.sort_values(["_analysis", "condition", "measure", "_grouping", "grouping"], ignore_index=True)
    return both[
        [
            *_KEY,
            "value",
            "low",
            "high",
            "value_other",
            "low_other",
            "high_other",
            "difference",
            "intervals",
            "found_in",
            "n",
            "n_other",
        ]
    ]


def bin_start(grouping: str) -> float | None:
    """Where a bin of P0, such as `[.2, .4)`, begins; None for another grouping."""
    found = re.match(r"\[([\d.]+), [\d.]+[)\]]$", grouping)
    return float(found[1]) if found else None


def conditions_of_one(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Conditions that only one run has, by `this` and `other`, of a frame of `compare`."""
    runs = {name: set(rows.loc[rows["found_in"].isin([name, "both"]), "condition"]) for name in ("this", "other")}
    return {"this": sorted(runs["this"] - runs["other"]), "other": sorted(runs["other"] - runs["this"])}
