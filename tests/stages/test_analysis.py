"""The stage `analysis`: hand-worked numbers, planted truths with a control, and rows that are replaced, never doubled."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind, ttest_rel

from harness.engine import Item, ItemResult, StageReport, Tables
from harness.experiments.gravity.bins import BIN_NAMES
from harness.experiments.gravity.fit import BEYOND, CURVE
from harness.experiments.gravity.inputs import Inputs
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.settings import GravitySettings
from harness.experiments.gravity.stages.analysis import Analysis
from harness.models.load import ModelIdentity, ModelSpec
from harness.run import RunPaths
from harness.stats import mean_interval
from harness.store import Batch, BatchResult, Row, Store
from tests.fakes import events_of, rows_of, run_stages

ANALYSES = ("rates", "fit", "suppression", "attention", "lens", "decomposition", "patching", "phrasing", "taxonomy")
KEY = ("analysis", "condition", "measured", "step_kind", "measure", "grouping", "patch", "layer", "head")
CONDITIONS = ("baseline", "negative", "gentle")
STAGE = Analysis(CONDITIONS, "negative", seed=0, num_bootstraps=60)
NUM_LAYERS, NUM_HEADS = 3, 4


def put(folder: Path, rows: Mapping[str, list[Row]]) -> None:
    """Rows into a run's store, as if a stage had measured them."""
    folder.mkdir(parents=True, exist_ok=True)
    with Store(RunPaths(folder).results, SCHEMA) as store:
        batch = Batch("made", len(store.plan("made")), ("all",), 1)
        store.start_stage("made", 1, 1)
        store.add_batches([batch])
        store.commit(batch, BatchResult(rows=dict(rows)))


def analyse(folder: Path, stage: Any = STAGE) -> StageReport:
    folder.mkdir(parents=True, exist_ok=True)
    (report,) = run_stages(folder, stage, max_tokens=None)
    return report


def found(folder: Path, **cell: object) -> dict[tuple[Any, ...], Row]:
    """Rows of `statistics` that agree with `cell`, by what else of their key is not the usual."""
    rows = [row for row in rows_of(folder, "statistics") if all(row[c] == v for c, v in cell.items())]
    return {tuple(row[c] for c in KEY if c not in cell and row[c] not in ("", -1)): row for row in rows}


def values(folder: Path, **cell: object) -> dict[tuple[Any, ...], float]:
    return {key: row["value"] for key, row in found(folder, **cell).items()}


def statistics(tables: Mapping[str, list[Row]], stage: Analysis = STAGE) -> dict[str, list[Row]]:
    """Rows by item key, without a store."""
    whole = Tables.of({name: [] for name in stage.reads} | dict(tables))
    return {i.key: stage.run(None, [i])[0].rows["statistics"] for i in stage.items(whole)}


def detection(prompt: str, condition: str, mode: str, sample: int, present: bool) -> Row:
    return {"prompt_id": prompt, "condition": condition, "mode": mode, "sample_id": sample, "word_present": present}


def answers(prompt: str, condition: str, greedy: bool, num_violations: int, num_samples: int = 4) -> list[Row]:
    drawn = [detection(prompt, condition, "sample", s, s < num_violations) for s in range(num_samples)]
    return [detection(prompt, condition, "greedy", 0, greedy), *drawn]


# ---- hand-worked ----------------------------------------------------------------------------------------------

#          P0, P1 negative, P1 gentle, category, greedy says it (negative, gentle), violations of 4 (negative, gentle)
BY_HAND = {
    "a": (0.1, 0.05, 0.2, "facts", (False, True), (0, 1)),
    "b": (0.3, 0.30, 0.1, "facts", (False, True), (1, 3)),
    "c": (0.9, 0.50, 0.6, "idioms", (True, True), (2, 4)),
    "d": (0.8, 0.90, 0.7, "idioms", (True, False), (4, 2)),
}


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    rows: dict[str, list[Row]] = {"prompts": [], "psem": [], "detections": [], "patching": []}
    for prompt, (p0, negative, gentle, category, greedy, drawn) in BY_HAND.items():
        rows["prompts"].append({"prompt_id": prompt, "category": category})
        for condition, p in zip(CONDITIONS, (p0, negative, gentle), strict=True):
            rows["psem"].append({"prompt_id": prompt, "condition": condition, "p_sem": p})
        for condition, said, violations in zip(CONDITIONS[1:], greedy, drawn, strict=True):
            rows["detections"] += answers(prompt, condition, said, violations)
    for prompt, delta_p, flipped in (("c", 0.25, True), ("d", 0.75, False), ("a", -0.5, False)):
        for layer in range(2):
            rows["patching"].append({"prompt_id": prompt, "layer": layer, "patch": "resid", "delta_p": delta_p + layer,
                                     "flipped": flipped})  # fmt: skip
    put(tmp_path, rows)
    analyse(tmp_path)
    return tmp_path


def test_rates_by_hand(by_hand: Path) -> None:
    assert values(by_hand, analysis="rates", condition="negative", measure="violation_rate") == {
        ("all",): 7 / 16, ("category:facts",): 1 / 8, ("category:idioms",): 6 / 8,
        (BIN_NAMES[0],): 0.0, (BIN_NAMES[1],): 0.25, (BIN_NAMES[4],): 0.75,
    }  # fmt: skip
    rows = found(by_hand, analysis="rates", condition="negative", measure="violation_rate")
    expected = mean_interval([0.0, 0.25, 0.5, 1.0], seed=0, num_bootstraps=60)
    whole = rows["all",]
    assert (whole["low"], whole["high"], whole["se"]) == (expected.low, expected.high, expected.se)
    assert {key: row["n"] for key, row in rows.items()} == {
        ("all",): 4, ("category:facts",): 2, ("category:idioms",): 2, (BIN_NAMES[0],): 1, (BIN_NAMES[1],): 1,
        (BIN_NAMES[4],): 2,
    }  # fmt: skip
    alone = rows[BIN_NAMES[0],]
    assert (alone["se"], alone["low"], alone["high"], alone["p"], alone["q"]) == (None,) * 5  # one prompt
    assert "B=60" in whole["method"]
    assert found(by_hand, analysis="rates", condition="baseline") == {}  # not sampled here


def test_suppression_by_hand(by_hand: Path) -> None:
    rows = found(by_hand, analysis="suppression", condition="negative", measure="delta")
    # P0 − P1: a .05, b 0 (successes); c .4, d −.1 (failures).
    expected = {"all": 0.0875, "success": 0.025, "failure": 0.15, "difference": 0.125,
                BIN_NAMES[0]: 0.05, BIN_NAMES[1]: 0.0, BIN_NAMES[4]: 0.15}  # fmt: skip
    assert {key[0]: row["value"] for key, row in rows.items()} == pytest.approx(expected)
    gap = rows["difference",]
    reference: Any = ttest_ind([0.4, -0.1], [0.05, 0.0], equal_var=False)
    assert gap["p"] == pytest.approx(reference.pvalue)
    assert gap["q"] == gap["p"]  # one test in its family
    assert gap["n"] == 4
    assert gap["low"] <= 0.125 <= gap["high"]
    relative = values(by_hand, analysis="suppression", condition="gentle", measure="relative")
    assert relative["all",] == pytest.approx(np.mean([-1, 2 / 3, 1 / 3, 1 / 8]))
    logs = values(by_hand, analysis="suppression", condition="gentle", measure="log")
    assert logs["success",] == pytest.approx(np.log(0.8 / 0.7))  # d alone
    assert logs["difference",] == pytest.approx(np.mean(np.log([1 / 2, 3, 3 / 2])) - np.log(8 / 7))
    lone = found(by_hand, analysis="suppression", condition="gentle", measure="log")["difference",]
    assert (lone["se"], lone["low"], lone["high"], lone["p"], lone["q"]) == (None,) * 5


def test_patching_by_hand(by_hand: Path) -> None:
    delta = values(by_hand, analysis="patching", condition="negative", measure="delta_p")
    for layer in range(2):
        assert [delta[g, "resid", layer] for g in ("all", "success", "failure", "difference")] == pytest.approx(
            [0.5 / 3 + layer, -0.5 + layer, 0.5 + layer, 1.0]
        )
        assert delta[BIN_NAMES[4], "resid", layer] == 0.5 + layer
    flips = values(by_hand, analysis="patching", condition="negative", measure="flip", layer=1)
    assert flips == {
        ("all", "resid"): pytest.approx(1 / 3), ("success", "resid"): 0.0, ("failure", "resid"): 0.5,
        ("difference", "resid"): 0.5, (BIN_NAMES[0], "resid"): 0.0, (BIN_NAMES[4], "resid"): 0.5,
    }  # fmt: skip
    assert values(by_hand, analysis="patching", measure="num_prompts") == {
        ("negative", "success"): 1.0,
        ("negative", "failure"): 2.0,
    }
    assert {row["condition"] for row in found(by_hand, analysis="patching").values()} == {"negative"}


def test_phrasings_are_compared_prompt_by_prompt_with_the_built_in_prohibition(by_hand: Path) -> None:
    rows = found(by_hand, analysis="phrasing", condition="gentle", measured="negative", grouping="difference")
    assert {key: row["value"] for key, row in rows.items()} == pytest.approx(
        {("violation_rate",): 3 / 16, ("greedy_rate",): 0.25, ("p_sem",): -0.0375}
    )
    p = {
        "violation_rate": ttest_rel([0.25, 0.75, 1, 0.5], [0, 0.25, 0.5, 1]).pvalue,
        "greedy_rate": ttest_rel([1, 1, 1, 0], [0, 0, 1, 1]).pvalue,
        "p_sem": ttest_rel([0.2, 0.1, 0.6, 0.7], [0.05, 0.3, 0.5, 0.9]).pvalue,
    }
    assert {key[0]: row["p"] for key, row in rows.items()} == pytest.approx(p)
    # One family: each q is over all three.
    assert {key[0]: row["q"] for key, row in rows.items()} == pytest.approx(
        dict(zip(p, false_discovery_control(list(p.values())), strict=True))
    )
    assert len(found(by_hand, analysis="phrasing")) == 3
    # Without the built-in prohibition the first of the others is what is compared with.
    rows = statistics(
        {
            "psem": [
                {"prompt_id": "a", "condition": c, "p_sem": p} for c, p in (("z", 0.5), ("y", 0.2), ("baseline", 1))
            ]
        },
        replace(STAGE, conditions=("baseline", "z", "y")),
    )
    (row,) = next(rows[k] for k in rows if k.startswith("phrasing"))
    assert (row["condition"], row["measured"], row["value"], row["p"]) == ("y", "z", pytest.approx(-0.3), None)


def test_failures_are_counted_by_kind_and_those_that_cannot_be_told_as_unknown(by_hand: Path) -> None:
    # Of the failures under `negative`, d has Δ < 0, and without attention c cannot be told.
    assert values(by_hand, analysis="taxonomy", condition="negative", measure="count") == {
        ("priming",): 1.0, ("override",): 0.0, ("unknown",): 1.0,
    }  # fmt: skip
    row = found(by_hand, analysis="taxonomy", condition="gentle", measure="count")["priming",]
    assert (row["value"], row["n"]) == (1.0, 3)
    assert "pi > 0" in row["method"]


def test_four_prompts_do_not_determine_a_line(by_hand: Path) -> None:
    assert found(by_hand, analysis="fit") == {}


# ---- a larger run with planted truths -------------------------------------------------------------------------

INTERCEPT, SLOPE = -2.4, 2.27
PLANTED_LAYER, PLANTED_HEAD = 1, 2


def simulated(seed: int, num_prompts: int, first: int = 0) -> dict[str, list[Row]]:
    """A run whose violations follow σ(INTERCEPT + SLOPE·P0), where one head looks at the mention more in failures."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Row]] = {name: [] for name in ("prompts", "psem", "detections", "attention", "lens",
                                                         "decomposition", "patching")}  # fmt: skip
    for i in range(first, first + num_prompts):
        prompt, p0 = f"p{i:04d}", float(rng.random())
        rows["prompts"].append({"prompt_id": prompt, "category": f"kind {i % 3}"})
        rate = float(1 / (1 + np.exp(-(INTERCEPT + SLOPE * p0))))
        failed = bool(rng.random() < 0.5)
        for condition in CONDITIONS:
            p = p0 if condition == "baseline" else rate
            rows["psem"].append({"prompt_id": prompt, "condition": condition, "p_sem": p})
            rows["detections"] += answers(prompt, condition, failed, int(rng.binomial(16, p)), 16)
        for condition in ("baseline", "negative"):
            rows["attention"] += attended(rng, prompt, condition, failed)
            rows["lens"] += [
                {"prompt_id": prompt, "condition": condition, "step_kind": kind, "layer": layer, "step": 0,
                 "kl_final": 0.0} | {m: float(rng.random()) for m in ("p_target", "p_emitted", "entropy")}
                for kind in ("first", "decision") for layer in range(NUM_LAYERS)
            ]  # fmt: skip
            rows["decomposition"] += [
                {"prompt_id": prompt, "condition": condition, "step_kind": "first", "layer": layer, "step": 0}
                | {m: float(rng.normal()) for m in ("attn_contrib", "ffn_contrib", "p_out")}
                for layer in range(NUM_LAYERS)
            ]
        rows["patching"] += [
            {"prompt_id": prompt, "layer": layer, "patch": patch, "delta_p": float(rng.random()), "flipped": layer == 1}
            for layer in range(NUM_LAYERS) for patch in ("resid", "mlp")
        ]  # fmt: skip
    return rows


def attended(rng: np.random.Generator, prompt: str, condition: str, failed: bool) -> list[Row]:
    """The baseline has no prohibition, so only its share on the instruction is known."""
    rows = []
    for layer in range(NUM_LAYERS):
        row: Row = {"prompt_id": prompt, "condition": condition, "step_kind": "first", "layer": layer, "step": 0}
        for measure in ("iar", "nf", "tmf", "pi") if condition == "negative" else ("iar",):
            heads = rng.normal(size=NUM_HEADS)
            if (condition, layer, measure) == ("negative", PLANTED_LAYER, "tmf"):
                heads[PLANTED_HEAD] += 2.0 * failed
            row |= {measure: heads.astype(np.float32).tolist()}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    put(folder, simulated(0, 150))
    assert analyse(folder).status == "done"
    return folder


def test_every_analysis_has_rows_and_every_key_is_there_once(large: Path) -> None:
    rows = rows_of(large, "statistics")
    assert {row["analysis"] for row in rows} == set(ANALYSES)
    assert len({tuple(row[c] for c in KEY) for row in rows}) == len(rows)
    for row in rows:
        assert None not in [row[c] for c in (*KEY, "value", "n", "method")]
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
        assert (row["low"] is None) == (row["high"] is None)
        assert (row["low"] is None) == (row["se"] is None) or row["measure"] in (CURVE, BEYOND)  # a band, and no more
        assert row["q"] is None or row["q"] >= row["p"]
        assert (row["q"] is None) == (row["p"] is None)


def test_the_rows_are_those_of_the_plan(large: Path) -> None:
    def cells(analysis: str, *columns: str) -> set[tuple[Any, ...]]:
        return {tuple(row[c] for c in columns) for row in rows_of(large, "statistics") if row["analysis"] == analysis}

    sides, whole = {"success", "failure", "difference"}, set(BIN_NAMES)
    assert cells("rates", "condition") == {(c,) for c in CONDITIONS}
    assert cells("rates", "grouping") == {(g,) for g in whole | {"all"} | {f"category:kind {i}" for i in range(3)}}
    groups = {f"group:{i}" for i in range(10)}
    calibrations = {f"calibration_{m}" for m in ("p0", "observed", "predicted")}
    assert cells("fit", "condition") == {("negative",), ("gentle",)}
    pressures = [row["p_sem"] for row in rows_of(large, "psem") if row["condition"] == "baseline"]
    low, high = min(pressures), max(pressures)
    places = sorted([*np.linspace(0, 1, 101).tolist(), low, high])
    assert cells("fit", "measure", "grouping") == (
        {(m, "all") for m in ("intercept", "slope", "mcfadden_r2")}
        | {(m, g) for m in calibrations for g in groups}
        | {("curve" if low <= x <= high else "curve_beyond", f"place:{i}") for i, x in enumerate(places)}
        | {("curve_p0", f"place:{i}") for i in range(103)}
    )
    assert cells("suppression", "measure", "grouping") == {
        (m, g) for m in ("delta", "relative", "log") for g in whole | sides | {"all"}
    }
    layers, heads = range(NUM_LAYERS), range(NUM_HEADS)
    of_negative = {("negative", m) for m in ("iar", "nf", "tmf", "pi")}
    assert cells("attention", "condition", "measured", "measure", "grouping", "layer", "head") == {
        (c, measured, m, g, layer, head)
        for measured, m in of_negative | {("baseline", "iar")}
        for c in (("negative", "gentle") if measured == "baseline" else ("negative",))  # `gentle` has no attention here
        for layer in layers
        for g, head in {(g, -1) for g in sides} | {("difference", h) for h in heads}
    }
    assert cells("lens", "measured", "step_kind", "measure", "grouping", "layer", "head") == {
        (c, kind, m, g, layer, -1)
        for c in ("negative", "baseline") for kind in ("first", "decision")
        for m in ("p_target", "p_emitted", "entropy", "kl_final") for g in sides for layer in layers
    }  # fmt: skip
    assert cells("decomposition", "measured", "step_kind", "measure", "grouping", "layer") == {
        (c, "first", m, g, layer)
        for c in ("negative", "baseline") for m in ("attn_contrib", "ffn_contrib", "p_out") for g in sides for layer in layers
    }  # fmt: skip
    assert cells("patching", "measure", "grouping", "patch", "layer") == {
        (m, g, patch, layer)
        for m in ("delta_p", "flip") for g in whole | sides | {"all"} for patch in ("resid", "mlp") for layer in layers
    } | {("num_prompts", "success", "", -1), ("num_prompts", "failure", "", -1)}  # fmt: skip
    assert cells("phrasing", "condition", "measured", "measure", "grouping") == {
        ("gentle", "negative", m, "difference") for m in ("violation_rate", "greedy_rate", "p_sem")
    }
    assert cells("taxonomy", "condition", "grouping") == {
        (c, g) for c in ("negative", "gentle") for g in ("priming", "override", "unknown")
    }


def test_what_does_not_vary_has_a_value_and_no_test(large: Path) -> None:
    """The last layer's divergence from itself is 0 in every prompt, and layer 1 flips every verdict."""
    rows = found(large, analysis="lens", measure="kl_final", grouping="difference")
    assert rows
    for row in rows.values():
        assert (row["value"], row["se"], row["p"], row["q"]) == (0.0, None, None, None)
    flips = found(large, analysis="patching", measure="flip", grouping="difference")
    assert {row["p"] for row in flips.values()} == {None}
    assert {
        row["value"] for row in found(large, analysis="patching", measure="flip", grouping="all", layer=1).values()
    } == {1.0}


def test_attention_is_welchs_t_over_prompts_with_heads_and_their_means_in_families_of_their_own(large: Path) -> None:
    outcome = greedy(large)
    raw = {True: [], False: []}
    for row in rows_of(large, "attention"):
        if row["condition"] == "negative":
            raw[outcome[row["prompt_id"]]].append((row["layer"], row["tmf"]))
    sides = {
        said: np.array([[heads for layer, heads in rows if layer == one] for one in range(NUM_LAYERS)])
        for said, rows in raw.items()
    }  # layer × prompt × head
    of = {"analysis": "attention", "condition": "negative", "measured": "negative", "step_kind": "first",
          "measure": "tmf", "grouping": "difference"}  # fmt: skip
    rows = found(large, **of)
    heads: Any = ttest_ind(sides[True], sides[False], axis=1, equal_var=False)
    means: Any = ttest_ind(sides[True].mean(axis=2), sides[False].mean(axis=2), axis=1, equal_var=False)
    q_heads = false_discovery_control(heads.pvalue.ravel()).reshape(heads.pvalue.shape)
    q_means = false_discovery_control(means.pvalue)
    bounds = heads.confidence_interval()
    for layer in range(NUM_LAYERS):
        mean = rows[layer,]
        assert (mean["p"], mean["q"]) == pytest.approx((means.pvalue[layer], q_means[layer]), rel=1e-5)
        for head in range(NUM_HEADS):
            row = rows[layer, head]
            expected = (heads.pvalue, q_heads, bounds.low, bounds.high)
            assert [row[c] for c in ("p", "q", "low", "high")] == pytest.approx(
                [one[layer, head] for one in expected], rel=1e-5, abs=1e-7
            )  # lists are stored as float32
            assert row["n"] == 150
    by_side = found(large, **of | {"grouping": "failure"})
    assert set(by_side) == {(layer,) for layer in range(NUM_LAYERS)}
    for (layer,), row in by_side.items():
        assert row["value"] == pytest.approx(sides[True][layer].mean(), abs=1e-6)
        assert row["n"] == sides[True].shape[1]


def greedy(folder: Path) -> dict[str, bool]:
    return {
        r["prompt_id"]: r["word_present"]
        for r in rows_of(folder, "detections")
        if (r["mode"], r["condition"]) == ("greedy", "negative")
    }


def test_the_planted_head_is_discovered_and_no_other(large: Path) -> None:
    rows = [row for row in rows_of(large, "statistics") if row["analysis"] == "attention" and row["head"] >= 0]
    discovered = {
        (r["measured"], r["measure"], r["layer"], r["head"]) for r in rows if r["q"] is not None and r["q"] < 0.01
    }
    assert discovered == {("negative", "tmf", PLANTED_LAYER, PLANTED_HEAD)}
    planted = found(large, analysis="attention", condition="negative", measured="negative", measure="tmf",
                    grouping="difference", layer=PLANTED_LAYER, head=PLANTED_HEAD)  # fmt: skip
    (row,) = planted.values()
    assert row["low"] <= 2.0 <= row["high"]


def test_the_fit_recovers_the_planted_line_and_finds_none_in_shuffled_answers(large: Path) -> None:
    rows = found(large, analysis="fit", condition="negative", grouping="all")
    for measure, truth in (("slope", SLOPE), ("intercept", INTERCEPT)):
        row = rows[measure,]
        assert row["low"] < truth < row["high"], measure
        assert row["high"] - row["low"] < 1.2
        assert row["n"] == 150
    assert rows["slope",]["low"] > 0
    tables = views(large)
    prompts = [row["prompt_id"] for row in tables["violation"] if row["condition"] == "negative"]
    other = dict(zip(prompts, np.random.default_rng(3).permutation(prompts).tolist(), strict=True))
    for row in tables["violation"]:
        row["prompt_id"] = other[row["prompt_id"]]
    shuffled = next(v for k, v in statistics(tables).items() if k.startswith("fit"))
    (slope,) = (r for r in shuffled if r["measure"] == "slope" and r["condition"] == "negative")
    assert slope["low"] < 0 < slope["high"]


def test_the_calibration_curve_agrees_with_the_fit_that_made_it(large: Path) -> None:
    rows = found(large, analysis="fit", condition="negative")
    line = {m: rows[m, "all"]["value"] for m in ("intercept", "slope")}
    last = 0.0
    inside = []
    for i in range(10):
        p0, observed, predicted = (rows[f"calibration_{m}", f"group:{i}"] for m in ("p0", "observed", "predicted"))
        assert (p0["n"], observed["n"], predicted["n"]) == (15, 15, 15)
        assert p0["value"] > last
        last = p0["value"]
        curve = 1 / (1 + np.exp(-(line["intercept"] + line["slope"] * p0["value"])))
        assert predicted["value"] == pytest.approx(curve, abs=0.01)  # nearly straight within a tenth of the prompts
        inside.append(observed["low"] <= predicted["value"] <= observed["high"])
    assert np.mean(inside) >= 0.7


# ---- resumed, retried, and not measured -----------------------------------------------------------------------


def views(folder: Path) -> dict[str, list[Row]]:
    """What the engine hands to the stage."""
    with Store(RunPaths(folder).results, SCHEMA) as store:
        return {name: store.table(name) for name in STAGE.reads}


def batches(folder: Path) -> list[list[str]]:
    return [
        sorted(k.split("|")[0] for k in row["keys"]) for row in rows_of(folder, "batches") if row["stage"] == "analysis"
    ]


def test_where_nothing_is_measured_there_are_no_rows_and_no_failure(tmp_path: Path) -> None:
    report = analyse(tmp_path)
    assert (report.status, report.num_items, report.num_failed) == ("done", len(ANALYSES), 0)
    assert rows_of(tmp_path, "statistics") == []


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("attention", {"attention"}), ("lens", {"lens"}), ("decomposition", {"decomposition"}), ("patching", {"patching"}),
        ("prompts", set()), ("psem", {"fit", "suppression"}),
        ("detections", {"rates", "fit", "attention", "lens", "decomposition", "taxonomy"}),
    ],
)  # fmt: skip
def test_what_is_not_measured_is_left_out_and_the_rest_is_there(tmp_path: Path, missing: str, gone: set[str]) -> None:
    rows = simulated(1, 40)
    del rows[missing]
    put(tmp_path, rows)
    report = analyse(tmp_path)
    assert (report.status, report.num_failed) == ("done", 0)
    assert {row["analysis"] for row in rows_of(tmp_path, "statistics")} == set(ANALYSES) - gone


def test_where_all_fail_there_is_a_failure_side_no_difference_and_a_count_of_none(tmp_path: Path) -> None:
    rows = simulated(2, 20)
    for row in rows["detections"]:
        row["word_present"] = True
    put(tmp_path, rows)
    assert analyse(tmp_path).status == "done"
    seen = rows_of(tmp_path, "statistics")
    mechanism = [r for r in seen if r["analysis"] in ("attention", "lens", "decomposition", "suppression")]
    assert {r["grouping"] for r in mechanism} == {"failure", "all", *BIN_NAMES}
    assert values(tmp_path, measure="num_prompts", condition="negative", analysis="patching") == {
        ("success",): 0.0, ("failure",): 20.0,
    }  # fmt: skip


def test_more_measured_gives_new_rows_in_place_of_the_old_ones(tmp_path: Path) -> None:
    put(tmp_path / "twice", simulated(3, 40))
    analyse(tmp_path / "twice")
    before = rows_of(tmp_path / "twice", "statistics")
    more = simulated(4, 20, first=40)
    put(tmp_path / "twice", more)
    report = analyse(tmp_path / "twice")
    assert (report.status, report.num_failed, report.num_items) == ("done", 0, len(ANALYSES))
    assert batches(tmp_path / "twice") == [sorted(ANALYSES)] * 2
    after = rows_of(tmp_path / "twice", "statistics")
    assert {r["n"] for r in after if r["analysis"] == "lens" and r["grouping"] == "difference"} == {60}
    assert before != after
    # The same as if all had been there at once.
    put(tmp_path / "once", {t: rows + more[t] for t, rows in simulated(3, 40).items()})
    analyse(tmp_path / "once")
    once = rows_of(tmp_path / "once", "statistics")
    assert [{c: row[c] for c in (*KEY, "n", "method")} for row in once] == [
        {c: row[c] for c in (*KEY, "n", "method")} for row in after
    ]
    for name in ("value", "se", "low", "high", "p", "q"):  # a database adds up in any order
        pairs = [(one[name], other[name]) for one, other in zip(once, after, strict=True)]
        assert all((one is None) == (other is None) for one, other in pairs)
        known = np.array([pair for pair in pairs if pair[0] is not None])
        assert known[:, 0] == pytest.approx(known[:, 1], rel=1e-9, abs=1e-12)


@dataclass(frozen=True)
class Keeping:
    """The stage, were it to leave its older rows where they are."""

    inner: Analysis
    name: str = "analysis"
    version: int = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = Analysis.reads
    row_bytes: int = 1

    def params(self) -> dict[str, Any]:
        return self.inner.params()

    def items(self, tables: Tables) -> list[Item[Any]]:
        return self.inner.items(tables)

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Any]]) -> list[ItemResult]:
        return [replace(result, replaces=None) for result in self.inner.run(context, items)]


def test_without_taking_their_place_the_new_rows_would_collide(tmp_path: Path) -> None:
    """The control of the law above."""
    put(tmp_path, simulated(3, 20))
    analyse(tmp_path)
    put(tmp_path, simulated(4, 10, first=20))
    with pytest.raises(Exception, match=r"(?i)duplicate key"):
        analyse(tmp_path, Keeping(STAGE))


def test_only_what_rests_on_the_new_rows_is_analysed_again(tmp_path: Path) -> None:
    rows = simulated(5, 30)
    lens = rows.pop("lens")
    put(tmp_path, rows)
    analyse(tmp_path)
    analyse(tmp_path)
    assert batches(tmp_path) == [sorted(ANALYSES)]  # nothing new, nothing done
    assert "lens" not in {row["analysis"] for row in rows_of(tmp_path, "statistics")}
    kept = [row for row in rows_of(tmp_path, "statistics") if row["analysis"] != "lens"]
    put(tmp_path, {"lens": lens})
    analyse(tmp_path)
    assert batches(tmp_path) == [sorted(ANALYSES), ["lens"]]
    assert [row for row in rows_of(tmp_path, "statistics") if row["analysis"] != "lens"] == kept
    assert found(tmp_path, analysis="lens")
    assert events_of(tmp_path, "failed_item") == {}


def test_keys_and_rows_do_not_depend_on_the_order_of_the_rows_read(large: Path) -> None:
    tables = views(large)
    first = statistics(tables)
    rng = np.random.default_rng(0)
    shuffled = {name: [rows[i] for i in rng.permutation(len(rows))] for name, rows in tables.items()}
    again = statistics(shuffled)
    assert again.keys() == first.keys()
    assert {len(k.split("|")[1]) for k in first} == {16}
    for key, rows in first.items():
        assert sorted(rows, key=str) == sorted(again[key], key=str), key


def change(tables: dict[str, list[Row]], table: str, column: str, to: Callable[[Any], Any]) -> set[str]:
    """The analyses whose item is a new one when one value has changed."""
    changed = copy.deepcopy(tables)
    changed[table][0][column] = to(changed[table][0][column])
    keys = [{i.key for i in STAGE.items(Tables.of(t))} for t in (changed, tables)]
    return {key.split("|")[0] for key in keys[0] - keys[1]}


def test_a_key_follows_from_what_the_analysis_uses_and_from_nothing_else(large: Path) -> None:
    tables = views(large)
    assert change(tables, "psem", "p_sem", lambda v: v + 1e-9) == {"rates", "fit", "patching", "phrasing"}
    assert change(tables, "psem", "p_word", lambda v: 0.5) == set()
    assert change(tables, "prompts", "category", lambda v: "other") == {"rates"}
    assert change(tables, "violation", "rate", lambda v: v + 0.1) == {"rates", "phrasing"}
    assert change(tables, "outcomes", "outcome", lambda v: "other") == {"suppression", "patching", "taxonomy"}
    assert change(tables, "attention_moments", "n", lambda v: v + 1) == {"attention"}
    assert change(tables, "attention_moments", "mean", lambda v: v + 1e-3) == {"attention"}
    # A database adds up in any order: the last digits of its sums are no change.
    assert change(tables, "attention_moments", "mean", lambda v: float(np.nextafter(v, 2))) == set()
    assert change(tables, "lens_moments", "var", lambda v: float(np.nextafter(v, 2))) == set()


def test_a_seed_gives_the_same_rows_and_another_seed_other_intervals(large: Path) -> None:
    tables = views(large)
    one, same, other = (statistics(tables, replace(STAGE, seed=seed)) for seed in (0, 0, 1))
    assert one == same
    for key, rows in one.items():
        assert [r["value"] for r in rows] == [r["value"] for r in other[key]]
    key = next(k for k in one if k.startswith("rates"))
    assert [r["low"] for r in one[key]] != [r["low"] for r in other[key]]


def test_the_stage_is_built_from_the_settings() -> None:
    given = Inputs(
        (), {}, ModelSpec("demo"), ModelIdentity("demo", "", "", "", "", "float32", None, {}), GravitySettings(), (), 7
    )
    built = Analysis.build(given)
    assert built == Analysis((), "negative", 7)
    other = GravitySettings.model_validate({"patching": {"condition": "gentle"}})
    assert Analysis.build(replace(given, settings=other)).patched == "gentle"
    assert built.params() != Analysis.build(replace(given, settings=other)).params()
    assert set(built.reads) == {
        "prompts", "psem", "suppression", "violation", "outcomes", "attention_moments", "lens_moments",
        "decomposition_moments", "patching",
    }  # fmt: skip
