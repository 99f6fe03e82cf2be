"""Stage `analysis`: how well each ranking foretells what ablation does, and what curves and background come to.

One item an analysis, named by what it rests on: what is measured again is analysed again, and takes the place of older rows.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from harness.engine import AnyTables, Item, ItemResult, Tables
from harness.experiments.neurons.inputs import Inputs, item_key
from harness.experiments.neurons.settings import CONTROLS, LEVEL
from harness.stats import NUM_BOOTSTRAPS, mean_interval, paired_differences

Row = dict[str, Any]
_FEWEST = 3
"""Neurons of a prompt that a correlation is made of."""
ANALYSES = ("agreement", "curves", "background", "influence")
_EMPTY: Row = dict.fromkeys(("value", "low", "high", "p"))


@dataclass(frozen=True)
class Used:
    """One analysis, and the rows that it rests on."""

    analysis: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Analysis:
    """Writes `statistics`. Uses what the other stages wrote, and no model."""

    seed: int
    first: str
    num_bootstraps: int = NUM_BOOTSTRAPS
    name = "analysis"
    version = 1
    reads = MappingProxyType(
        {
            "effects": (
                "prompt_id", "ranking", "layer", "neuron", "delta_logit", "delta_logp", "delta_contrast", "predicted",
            ),
            "curves": ("prompt_id", "ranking", "k", "mode", "logit"),
            "neurons": ("layer", "neuron", "q"),
            "influence_totals": (
                "prompt_id", "metric", "residual", "num_selected", "effective", "completeness_gap", "total_abs",
            ),
            "targets": ("prompt_id", "mode"),
        }
    )  # fmt: skip
    row_bytes = 100_000

    @classmethod
    def build(cls, given: Inputs) -> "Analysis":
        return cls(given.seed, given.settings.metrics[0])

    def params(self) -> dict[str, Any]:
        return {"num_bootstraps": self.num_bootstraps}

    def items(self, tables: AnyTables) -> list[Item[Used]]:
        given = Tables.of(tables)
        of = {
            "agreement": _agreement_rows(given),
            "curves": tuple(given.streamed("curves")),
            "background": _background_rows(given),
            "influence": tuple(given.streamed("influence_totals")),
        }
        return [Item(item_key(a, _digest(rows)), 1, Used(a, rows)) for a, rows in of.items()]

    def most_items(self, num_subjects: int) -> int:
        return len(ANALYSES)

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Used]]) -> list[ItemResult]:
        compute = {
            "agreement": self._agreement,
            "curves": self._curves,
            "background": self._background,
            "influence": self._influence,
        }
        return [
            ItemResult(
                i.key,
                {"statistics": [_complete(i.payload.analysis, r) for r in compute[i.payload.analysis](i.payload.rows)]},
                replaces={"statistics": {"analysis": i.payload.analysis}},
            )
            for i in items
        ]

    def _mean(self, ranking: str, measure: str, values: Sequence[float], method: str) -> Row:
        found = mean_interval(values, self.seed, self.num_bootstraps)
        return {
            "ranking": ranking, "measure": measure, "value": found.mean, "low": found.low, "high": found.high,
            "n": len(values), "method": f"{method}; mean over prompts, bootstrap",
        }  # fmt: skip

    def _agreement(self, rows: Sequence[Row]) -> Iterator[Row]:
        for ranking in dict.fromkeys(r["ranking"] for r in rows):
            own = [r for r in rows if r["ranking"] == ranking]
            for measure, method in (
                ("spearman", "rank correlation of predicted and measured effects over a prompt's neurons"),
                ("pearson", "correlation of predicted and measured effects over a prompt's neurons"),
                ("sign", "share of neurons whose measured effect has the predicted sign"),
                ("slope", "least squares of measured on predicted effects, through 0"),
            ):
                values = [r[measure] for r in own if r[measure] is not None]
                if values:
                    yield self._mean(ranking, measure, values, method)

    def _curves(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Areas of curves whose prompts are pooled: where a prompt's two ends lie close together its own m divides by little."""
        points: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
        ends: dict[str, dict[str, float]] = defaultdict(dict)
        for r in rows:
            if r["k"]:
                points[r["mode"], r["ranking"], r["prompt_id"]].append((r["k"], r["logit"]))
            elif r["mode"] in ("keep", "drop"):
                ends[r["prompt_id"]]["none" if r["mode"] == "keep" else "whole"] = r["logit"]
        areas: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        spans = {p: e["whole"] - e["none"] for p, e in ends.items()}
        for (mode, ranking, prompt_id), some in points.items():
            if len(some) > 1:
                areas[mode, ranking][prompt_id] = area([(k, value - ends[prompt_id]["none"]) for k, value in some])
        for (mode, ranking), found in sorted(areas.items()):
            own = self._ratio({p: (a, spans[p]) for p, a in found.items()})
            told = "area under the pooled m(k) over ln k, from the smallest set to all; bootstrap over prompts"
            yield {"ranking": ranking, "measure": f"area_{mode}", "method": told, "n": len(found), **own}
            control = areas.get((mode, "matched"), {})
            both = [p for p in found if p in control]
            if ranking in CONTROLS or not both:
                continue
            gap = self._ratio({p: (found[p] - control[p], spans[p]) for p in both})
            one, other = (np.array([[x[p]] for p in both]) for x in (found, control))
            p = paired_differences(one, other, self.seed, self.num_bootstraps).p[0]
            yield {
                "ranking": ranking, "measure": f"area_{mode}_over_matched", "n": len(both), **gap, "p": float(p),
                "method": f"area less that of neurons matched to {self.first} by layer and decile of |a|; p by the paired t",
            }  # fmt: skip

    def _ratio(self, pairs: Mapping[str, tuple[float, float]]) -> Row:
        """Σ above over Σ below, with a percentile interval from a bootstrap over prompts."""
        above, below = np.array(list(pairs.values())).T
        drawn = np.random.default_rng(self.seed).integers(len(above), size=(self.num_bootstraps, len(above)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = above[drawn].sum(1) / below[drawn].sum(1)
        low, high = np.nanpercentile(ratios, [2.5, 97.5]) if len(above) > 1 else (np.nan, np.nan)
        return {
            "value": float(above.sum() / below.sum()) if below.sum() else None,
            "low": float(low),
            "high": float(high),
        }

    def _background(self, rows: Sequence[Row]) -> Iterator[Row]:
        for r in rows:
            if not r["num"]:
                continue
            yield {
                "ranking": "all" if r["layer"] is None else f"layer {r['layer']}", "measure": "share_beyond",
                "value": r["beyond"] / r["num"], "n": r["num"],
                "method": f"share of neurons whose peaks differ from the background's at q < {LEVEL:g}",
            }  # fmt: skip

    def _influence(self, rows: Sequence[Row]) -> Iterator[Row]:
        for metric in dict.fromkeys(r["metric"] for r in rows):
            own = [r for r in rows if r["metric"] == metric]
            yield self._mean(metric, "effective", [r["effective"] for r in own], "e^H of the shares of |influence|")
            yield self._mean(
                metric, "num_selected", [float(r["num_selected"]) for r in own], "neurons of the cumulative set"
            )
            for measure, column in (("largest_residual", "residual"), ("largest_gap", "completeness_gap")):
                values = [abs(r[column]) for r in own if r[column] is not None]
                if values:
                    yield {
                        "ranking": metric, "measure": measure, "value": max(values), "n": len(values),
                        "method": "largest over prompts",
                    }  # fmt: skip


def area(points: Sequence[tuple[int, float]]) -> float:
    """Area under a value over ln k by trapezoids, over that of the value 1."""
    k, value = (np.array(x, dtype=np.float64) for x in zip(*sorted(points), strict=True))
    x = np.log(k)
    return float(np.trapezoid(value, x) / (x[-1] - x[0]))


def _agreement_rows(tables: Tables) -> tuple[Row, ...]:
    """A row a prompt and ranking. The target's own unit is measured: log-probability of a sequence, else logits."""
    modes = {r["prompt_id"]: r["mode"] for r in tables["targets"]}
    found, some = [], []
    for row in tables.streamed("effects"):
        if some and (some[0]["prompt_id"], some[0]["ranking"]) != (row["prompt_id"], row["ranking"]):
            found.append(_agreement_of(some, modes))
            some = []
        some.append(row)
    if some:
        found.append(_agreement_of(some, modes))
    return tuple(found)


def _agreement_of(rows: Sequence[Row], modes: Mapping[str, str]) -> Row:
    first = rows[0]
    column = (
        "delta_logp" if modes[first["prompt_id"]] == "sequence"
        else "delta_logit" if first["delta_contrast"] is None else "delta_contrast"
    )  # fmt: skip
    predicted, measured = (np.array([r[c] for r in rows]) for c in ("predicted", column))
    is_apart = (predicted != 0) & (measured != 0)
    size = float(predicted @ predicted)
    return {
        "prompt_id": first["prompt_id"],
        "ranking": first["ranking"],
        "spearman": _correlation(rankdata(predicted), rankdata(measured)),
        "pearson": _correlation(predicted, measured),
        "sign": float((predicted * measured > 0)[is_apart].mean()) if is_apart.any() else None,
        "slope": float(predicted @ measured) / size if size else None,
    }


def _correlation(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float | None:
    if len(a) < _FEWEST or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _background_rows(tables: Tables) -> tuple[Row, ...]:
    """How many neurons lie beyond the background, by layer and of all (layer None)."""
    num: dict[int | None, int] = defaultdict(int)
    beyond: dict[int | None, int] = defaultdict(int)
    for batch in tables.batches("neurons", ("layer", "q")):
        layers, q = (
            batch.column("layer").to_numpy(),
            batch.column("q").to_numpy(zero_copy_only=False).astype(np.float64),
        )
        known = ~np.isnan(q)
        for layer in (None, *np.unique(layers).tolist()):
            here = known if layer is None else known & (layers == layer)
            num[layer] += int(here.sum())
            beyond[layer] += int((q[here] < LEVEL).sum())
    return tuple({"layer": layer, "num": num[layer], "beyond": beyond[layer]} for layer in num)


def _complete(analysis: str, row: Row) -> Row:
    clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
    return {"analysis": analysis, **_EMPTY, **clean}


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
