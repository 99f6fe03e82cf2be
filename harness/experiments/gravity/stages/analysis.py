"""Stage `analysis`: every number of the report, with its interval, its p and its share of false discoveries (docs/method.md).

One item an analysis, named by what it rests on: what is measured again or more of is analysed again, and its rows take
the place of the older ones. What was not measured gives no rows.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from harness.engine import AnyTables, Item, ItemResult
from harness.experiments.gravity.bins import BIN_NAMES, bin_of
from harness.experiments.gravity.fit import curve_rows
from harness.experiments.gravity.inputs import Inputs, item_key
from harness.stats import (
    NUM_BOOTSTRAPS,
    Intervals,
    Moments,
    benjamini_hochberg,
    calibration,
    fit_with_curve,
    mean_differences,
    mean_intervals,
    paired_differences,
    t_intervals,
    welch,
)

Row = dict[str, Any]
Values = Mapping[str, float]
"""One number a prompt."""
Cell = tuple[Any, ...]
"""The columns `_CELL` of a mechanism's row, and the head."""
MomentsByCell = Mapping[Cell, tuple[float, float, float]]
"""n, mean and variance."""

_LENGTH = 1  # per item: no tokens, so all analyses fit in one batch
_BASELINE = "baseline"
_CELL = ("condition", "measured", "step_kind", "measure", "layer")
_MOMENTS = ("n", "mean", "var")
_USES: dict[str, dict[str, tuple[str, ...]]] = {
    "rates": {
        "prompts": ("prompt_id", "category"),
        "psem": ("prompt_id", "condition", "p_sem"),
        "violation": ("prompt_id", "condition", "rate"),
    },
    "fit": {
        "psem": ("prompt_id", "condition", "p_sem"),
        "violation": ("prompt_id", "condition", "num_samples", "num_violations"),
    },
    "suppression": {
        "suppression": ("prompt_id", "condition", "p0", "delta", "relative", "log"),
        "outcomes": ("prompt_id", "condition", "outcome"),
    },
    "attention": {"attention_moments": (*_CELL, "outcome", "head", *_MOMENTS)},
    "lens": {"lens_moments": (*_CELL, "outcome", *_MOMENTS)},
    "decomposition": {"decomposition_moments": (*_CELL, "outcome", *_MOMENTS)},
    "patching": {
        "patching": ("prompt_id", "layer", "patch", "delta_p", "flipped"),
        "psem": ("prompt_id", "condition", "p_sem"),
        "outcomes": ("prompt_id", "condition", "outcome"),
    },
    "phrasing": {
        "psem": ("prompt_id", "condition", "p_sem"),
        "violation": ("prompt_id", "condition", "rate"),
        "outcomes": ("prompt_id", "condition", "word_present"),
    },
    "taxonomy": {"outcomes": ("prompt_id", "condition", "outcome", "taxonomy", "taxonomy_rule")},
}
"""What each analysis rests on: tables, and of these the columns, first those that tell its rows apart."""


@dataclass(frozen=True, slots=True)
class Used:
    """One analysis by name, and all that it rests on."""

    analysis: str
    tables: Mapping[str, list[Row]]


@dataclass(frozen=True)
class Analysis:
    """Writes `statistics`. Uses what the other stages wrote, and no model.

    `conditions` in the order of the settings; `patched` is the condition that activation patching ran in.
    """

    conditions: tuple[str, ...]
    patched: str
    seed: int
    num_bootstraps: int = NUM_BOOTSTRAPS
    name = "analysis"
    version = 1
    reads = MappingProxyType(
        {
            table: tuple(dict.fromkeys(c for uses in _USES.values() for c in uses.get(table, ())))
            for table in sorted({table for uses in _USES.values() for table in uses})
        }
    )
    row_bytes = 2_000_000

    @classmethod
    def build(cls, given: Inputs) -> "Analysis":
        return cls(tuple(given.conditions), given.settings.patching.condition, given.seed)

    def params(self) -> dict[str, Any]:
        return {"patched": self.patched, "num_bootstraps": self.num_bootstraps}

    def items(self, tables: AnyTables) -> list[Item[Used]]:
        return [_item(name, uses, tables) for name, uses in _USES.items()]

    def most_items(self, num_subjects: int) -> int:
        return len(_USES)

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Used]]) -> list[ItemResult]:
        return [self._one(item) for item in items]

    def _one(self, item: Item[Used]) -> ItemResult:
        name = item.payload.analysis
        rows = [_complete(name, row) for row in _COMPUTE[name](self, item.payload.tables)]
        return ItemResult(item.key, {"statistics": rows}, replaces={"statistics": {"analysis": name}})

    def _means(self, values: Float[np.ndarray, "N M"]) -> Intervals:
        return mean_intervals(values, self.seed, self.num_bootstraps)

    def _gaps(self, one: Float[np.ndarray, "N M"], other: Float[np.ndarray, "O M"]) -> Intervals:
        return mean_differences(one, other, self.seed, self.num_bootstraps)

    @property
    def _of_means(self) -> str:
        return f"mean; percentile bootstrap over prompts, B={self.num_bootstraps}"

    @property
    def _of_gaps(self) -> str:
        return (
            f"difference of means, failure − success; bootstrap over the prompts of each, B={self.num_bootstraps}; "
            "p by Welch's t, q by Benjamini-Hochberg within the measure"
        )


def _item(name: str, uses: Mapping[str, Sequence[str]], tables: AnyTables) -> Item[Used]:
    """An analysis with all it uses, in an order of its own, and a key that follows from that and nothing else."""
    used, digest = {}, blake2b(digest_size=8)
    for table, columns in uses.items():
        rows = sorted(([row[c] for c in columns] for row in tables[table]), key=lambda row: [*map(str, row)])
        for row in rows:
            digest.update(repr([_told(table, c, value) for c, value in zip(columns, row, strict=True)]).encode())
        digest.update(table.encode())
        used[table] = [dict(zip(columns, row, strict=True)) for row in rows]
    return Item(item_key(name, digest.hexdigest()), _LENGTH, Used(name, used))


def _told(table: str, column: str, value: Any) -> Any:
    """A value as the digest has it. Moments are sums over many prompts, which a database adds up in any order.

    Their last digits are no change then, but their number of prompts is.
    """
    if not table.endswith("_moments") or column not in ("mean", "var"):
        return value
    return None if column == "var" or value is None else round(value, 6) + 0.0  # and -0.0 is 0.0


# ---- rows -----------------------------------------------------------------------------------------------------


def _complete(analysis: str, row: Row) -> Row:
    """A row of `statistics` with all its columns. What is not determined is NULL, where the arithmetic says NaN."""
    row = _EMPTY | row | {"analysis": analysis}
    for column in ("value", "se", "low", "high", "p", "q"):
        number = row[column]
        row[column] = None if number is None or not math.isfinite(number) else float(number)
    return row


_EMPTY: Row = {
    "condition": "",
    "measured": "",
    "step_kind": "",
    "measure": "",
    "grouping": "all",
    "patch": "",
    "layer": -1,
    "head": -1,
    "value": None,
    "se": None,
    "low": None,
    "high": None,
    "p": None,
    "q": None,
    "n": 0,
    "method": "",
}


def _rows(found: Intervals, cells: Iterable[Row]) -> Iterator[Row]:
    """One row for each column of `found`, with what the cells say of it."""
    columns = zip(*(numbers.tolist() for numbers in found), strict=True)
    for numbers, cell in zip(columns, cells, strict=True):
        yield cell | dict(zip(Intervals._fields, numbers, strict=True))


def _corrected(rows: Iterable[Row], family: Callable[[Row], Hashable]) -> list[Row]:
    """The rows, those with a p also with a q within their family."""
    kept, families = [], defaultdict(list)
    for row in rows:
        kept.append(row)
        if math.isfinite(row["p"]):
            families[family(row)].append(row)
    for members in families.values():
        for row, q in zip(members, benjamini_hochberg(np.array([r["p"] for r in members])).tolist(), strict=True):
            row["q"] = q
    return kept


def _by_measure(row: Row) -> Hashable:
    """One family a measure, over layers, and over heads apart from their means."""
    return row["condition"], row.get("measured"), row.get("step_kind"), row["measure"], row.get("head", -1) >= 0


# ---- means over groups of prompts -----------------------------------------------------------------------------


def _over_groups(given: Analysis, cells: Sequence[tuple[Row, Values]], groups: Mapping[str, set[str]]) -> Iterator[Row]:
    """The mean of each cell's values in each group that has any."""
    for grouping, members in groups.items():
        for chosen, (values,) in _matrices(cells, members):
            names = {"grouping": grouping, "n": len(values), "method": given._of_means}
            yield from _rows(given._means(values), (cell | names for cell in chosen))


def _over_outcomes(
    given: Analysis, cells: Sequence[tuple[Row, Values]], outcomes: Mapping[str, set[str]]
) -> Iterator[Row]:
    """The mean of each cell's values in failures less that in successes, where there are both."""
    for chosen, (failures, successes) in _matrices(cells, outcomes["failure"], outcomes["success"]):
        names = {"grouping": "difference", "n": len(failures) + len(successes), "method": given._of_gaps}
        yield from _rows(given._gaps(failures, successes), (cell | names for cell in chosen))


def _matrices(
    cells: Sequence[tuple[Row, Values]], *groups: set[str]
) -> Iterator[tuple[list[Row], list[Float[np.ndarray, "_ _"]]]]:
    """Cells with values for the same prompts, and for each group these values, one row a prompt and one column a cell.

    Cells without a prompt in one of the groups are left out. Together they are resampled once instead of one by one.
    """
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = defaultdict(list)
    for i, (_, values) in enumerate(cells):
        alike[tuple(tuple(sorted(values.keys() & group)) for group in groups)].append(i)
    for members, chosen in alike.items():
        if all(members):
            matrices = [np.array([[cells[i][1][prompt] for i in chosen] for prompt in ids], float) for ids in members]
            yield [cells[i][0] for i in chosen], matrices


def _values(rows: Iterable[Row], column: str) -> dict[str, float]:
    """A column by prompt, where it is known."""
    return {row["prompt_id"]: float(row[column]) for row in rows if row[column] is not None}


def _by_condition(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["condition"]].append(row)
    return dict(sorted(found.items()))


def _p0(rows: Iterable[Row]) -> dict[str, float]:
    return _values((r for r in rows if r["condition"] == _BASELINE), "p_sem")


def _bins(p0: Values) -> dict[str, set[str]]:
    """The prompts of each pressure bin."""
    found: dict[str, set[str]] = {name: set() for name in BIN_NAMES}
    for prompt, pressure in p0.items():
        found[BIN_NAMES[bin_of(pressure)]].add(prompt)
    return found


def _outcomes(rows: Iterable[Row]) -> dict[str, set[str]]:
    """The prompts of each outcome of the greedy answer."""
    found: dict[str, set[str]] = {"success": set(), "failure": set()}
    for row in rows:
        found[row["outcome"]].add(row["prompt_id"])
    return found


def _rates(given: Analysis, tables: AnyTables) -> Iterator[Row]:
    categories: dict[str, set[str]] = defaultdict(set)
    for prompt in tables["prompts"]:
        categories[f"category:{prompt['category']}"].add(prompt["prompt_id"])
    bins = _bins(_p0(tables["psem"]))
    for condition, rows in _by_condition(tables["violation"]).items():
        rates = _values(rows, "rate")
        cell = {"condition": condition, "measure": "violation_rate"}
        yield from _over_groups(given, [(cell, rates)], {"all": set(rates), **bins, **dict(sorted(categories.items()))})


def _suppression(given: Analysis, tables: AnyTables) -> Iterator[Row]:
    outcomes = _by_condition(tables["outcomes"])
    for condition, rows in _by_condition(tables["suppression"]).items():
        cells = [({"condition": condition, "measure": m}, _values(rows, m)) for m in ("delta", "relative", "log")]
        by_outcome = _outcomes(outcomes.get(condition, ()))
        everyone = {row["prompt_id"] for row in rows}
        yield from _over_groups(given, cells, {"all": everyone, **by_outcome, **_bins(_values(rows, "p0"))})
        yield from _corrected(_over_outcomes(given, cells, by_outcome), _by_measure)


def _patching(given: Analysis, tables: AnyTables) -> Iterator[Row]:
    if not tables["patching"]:
        return
    by_cell: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in tables["patching"]:
        by_cell[row["patch"], row["layer"]].append(row)
    cells = [
        ({"condition": given.patched, "measure": measure, "patch": patch, "layer": layer}, _values(rows, column))
        for measure, column in (("delta_p", "delta_p"), ("flip", "flipped"))
        for (patch, layer), rows in sorted(by_cell.items())
    ]
    everyone = {row["prompt_id"] for row in tables["patching"]}
    outcomes = _outcomes(row for row in tables["outcomes"] if row["condition"] == given.patched)
    yield from _over_groups(given, cells, {"all": everyone, **outcomes, **_bins(_p0(tables["psem"]))})
    yield from _corrected(_over_outcomes(given, cells, outcomes), _by_measure)
    for outcome, prompts in outcomes.items():
        num = len(prompts & everyone)
        yield {
            "condition": given.patched,
            "measure": "num_prompts",
            "grouping": outcome,
            "value": num,
            "n": num,
            "method": "prompts patched, by the outcome of the greedy answer",
        }


# ---- the fit --------------------------------------------------------------------------------------------------


def _fit(given: Analysis, tables: AnyTables) -> Iterator[Row]:
    p0 = _p0(tables["psem"])
    for condition, rows in _by_condition(tables["violation"]).items():
        pressed = [(p0[r["prompt_id"]], r["num_violations"], r["num_samples"]) for r in rows if r["prompt_id"] in p0]
        if condition != _BASELINE and pressed:
            pressure, violations, trials = np.array(pressed, dtype=np.float64).T
            for row in _fitted(given, pressure, violations, trials):
                yield row | {"condition": condition}


def _fitted(
    given: Analysis,
    p0: Float[np.ndarray, " N"],
    violations: Float[np.ndarray, " N"],
    trials: Float[np.ndarray, " N"],
) -> Iterator[Row]:
    resampling = given.seed, given.num_bootstraps
    found = fit_with_curve(p0, violations, trials, *resampling)
    if found is None:
        return
    fit = found.fit
    method = f"binomial regression on P0; percentile bootstrap over prompts, B={given.num_bootstraps}"
    for measure, value, se, (low, high) in (
        ("intercept", fit.intercept, fit.intercept_se, fit.intercept_interval),
        ("slope", fit.slope, fit.slope_se, fit.slope_interval),
    ):
        yield {"measure": measure, "value": value, "se": se, "low": low, "high": high, "n": len(p0), "method": method}
    yield {
        "measure": "mcfadden_r2",
        "value": fit.mcfadden_r2,
        "n": len(p0),
        "method": "1 − log-likelihood of the fit / of the intercept alone, of single samples",
    }
    for i, group in enumerate(calibration(fit, p0, violations, trials, *resampling)):
        names = {"grouping": f"group:{i}", "n": group.observed.num_prompts}
        yield names | {"measure": "calibration_p0", "value": group.p0, "method": "mean P0 of the group"}
        yield names | {"measure": "calibration_predicted", "value": group.predicted, "method": "mean of the fit"}
        seen = group.observed
        yield names | {
            "measure": "calibration_observed",
            "value": seen.mean,
            "se": seen.se,
            "low": seen.low,
            "high": seen.high,
            "method": given._of_means,
        }
    drawn = {
        "n": len(p0),
        "method": f"the fit at a P0; pointwise band from the draws of its intervals, B={given.num_bootstraps}",
    }
    yield from (row | drawn for row in curve_rows(found.curve))


# ---- what the views have added up -----------------------------------------------------------------------------


def _mechanism(table: str) -> Callable[[Analysis, AnyTables], list[Row]]:
    """Success against failure by layer, and by head where there are heads, from a view of moments."""

    def compute(given: Analysis, tables: AnyTables) -> list[Row]:
        sides: dict[str, dict[Cell, tuple[float, float, float]]] = {"success": {}, "failure": {}}
        for row in tables[table]:
            if row["mean"] is not None:
                cell = (*(row[c] for c in _CELL), row.get("head", -1))
                var = math.nan if row["var"] is None else row["var"]  # of one prompt
                sides[row["outcome"]][cell] = float(row["n"]), row["mean"], var
        rows = [row for outcome, cells in sides.items() for row in _side(outcome, cells)]
        return rows + _corrected(_opposed(sides["failure"], sides["success"]), _by_measure)

    return compute


def _side(outcome: str, cells: MomentsByCell) -> Iterator[Row]:
    layers = [cell for cell in cells if cell[-1] < 0]
    names = {"grouping": outcome, "method": "mean over prompts; Student's t interval"}
    yield from _from_moments(layers, names, t_intervals, cells)


def _opposed(failures: MomentsByCell, successes: MomentsByCell) -> Iterator[Row]:
    both = [cell for cell in failures if cell in successes]
    method = "difference of means, failure − success; Welch's t; q by Benjamini-Hochberg within the measure"
    yield from _from_moments(both, {"grouping": "difference", "method": method}, welch, failures, successes)


def _from_moments(
    cells: Sequence[Cell],
    names: Row,
    compare: Callable[..., Intervals],
    *sides: MomentsByCell,
) -> Iterator[Row]:
    if not cells:
        return
    moments = [Moments(*np.array([side[cell] for cell in cells], dtype=np.float64).T) for side in sides]
    counts = np.sum([m.n for m in moments], axis=0)
    columns = (
        dict(zip((*_CELL, "head"), cell, strict=True)) | names | {"n": int(n)}
        for cell, n in zip(cells, counts, strict=True)
    )
    yield from _rows(compare(*moments), columns)


# ---- phrasings, and kinds of failure --------------------------------------------------------------------------


def _phrasing(given: Analysis, tables: AnyTables) -> list[Row]:
    others = [c for c in given.conditions if c != _BASELINE]
    if not others:
        return []
    reference = "negative" if "negative" in others else others[0]
    method = (
        f"paired difference from {reference}; percentile bootstrap over prompts, B={given.num_bootstraps}; "
        "p by the paired t, q by Benjamini-Hochberg over all phrasings"
    )
    rows = []
    for table, column, measure in (
        ("violation", "rate", "violation_rate"),
        ("outcomes", "word_present", "greedy_rate"),
        ("psem", "p_sem", "p_sem"),
    ):
        values = {condition: _values(found, column) for condition, found in _by_condition(tables[table]).items()}
        for condition in others:
            shared = sorted(values.get(condition, {}).keys() & values.get(reference, {}).keys())
            if condition != reference and shared:
                one, other = (np.array([[values[c][p]] for p in shared]) for c in (condition, reference))
                cell = {
                    "condition": condition,
                    "measured": reference,
                    "measure": measure,
                    "grouping": "difference",
                    "n": len(shared),
                    "method": method,
                }
                rows += _rows(paired_differences(one, other, given.seed, given.num_bootstraps), [cell])
    return _corrected(rows, lambda row: "phrasing")


def _taxonomy(given: Analysis, tables: AnyTables) -> Iterator[Row]:
    for condition, rows in _by_condition(tables["outcomes"]).items():
        failures = [row for row in rows if row["outcome"] == "failure"]
        counts = Counter(row["taxonomy"] or "unknown" for row in failures)
        for kind in ("priming", "override", "unknown"):
            yield {
                "condition": condition,
                "measure": "count",
                "grouping": kind,
                "value": counts[kind],
                "n": len(failures),
                "method": rows[0]["taxonomy_rule"],
            }


_COMPUTE: dict[str, Callable[[Analysis, AnyTables], Iterable[Row]]] = {
    "rates": _rates,
    "fit": _fit,
    "suppression": _suppression,
    "attention": _mechanism("attention_moments"),
    "lens": _mechanism("lens_moments"),
    "decomposition": _mechanism("decomposition_moments"),
    "patching": _patching,
    "phrasing": _phrasing,
    "taxonomy": _taxonomy,
}
