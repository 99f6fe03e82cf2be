"""The P_sem page: its numbers by hand on three prompts, its intervals from the analysis and no other, its wiring."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from streamlit.testing.v1 import AppTest

from app.charts import GREY
from app.charts.gravity import pressure as charts
from app.queries import remarks
from app.queries.gravity import View
from app.queries.gravity import pressure as ask
from app.queries.gravity import prompts as prompts_of
from harness import stats
from harness.commands import report
from harness.experiments.gravity.bins import BIN_NAMES, bin_of
from harness.experiments.gravity.figures import FIGURES, gather
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.summary import render, summarise
from harness.experiments.remarks import lines
from harness.run import RunEntry, RunPaths, read_manifest, seed_of
from harness.stats import Estimate
from harness.store import Store, open_snapshot
from tests import gravity, synthetic
from tests.app.conftest import open_view, page_file, store_of
from tests.commands import saying
from tests.gravity import resolve
from tests.synthetic import HOSTILE, Shape

PAGE = page_file("pressure")
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A finished run with an analysis."""
    shape = Shape(120, 2, 2, 16, ("baseline", "negative", "reframed"), mechanism=False, num_bootstraps=300)
    return synthetic.write(tmp_path_factory.mktemp("runs"), shape)


@pytest.fixture
def small(tmp_path: Path) -> RunPaths:
    """Three prompts: `a` is suppressed and keeps the ban, `b` is not and says X, `c` has no answer yet. No analysis."""
    return store_of(tmp_path, _three_prompts)


def _three_prompts(store: Store) -> None:
    for name, category, p0, p1 in (("a", "facts", 0.8, 0.2), ("b", "idioms", 0.2, 0.6), ("c", "facts", 0.5, 0.5)):
        store._insert("prompts", [{"prompt_id": name, "category": category, "question": name, "target": f"x{name}"}])
        for condition, p in (("baseline", p0), ("negative", p1)):
            row = {"prompt_id": name, "condition": condition, "p_sem": p, "p_word": p / 2, "paper_p_sem": p,
                   "sequences": [[7], [1, 2]], "logprobs": [float(np.log(p / 4)), float(np.log(3 * p / 4))],
                   "word_end": [1.0, 0.5], "top_ids": [7, 9], "top_probs": [0.5, 0.25], "num_sequences": 2,
                   "entropy": 1.0}  # fmt: skip
            store._insert("psem", [row])
    for name, said in (("a", [False, True]), ("b", [True, True])):
        verdict = {"prompt_id": name, "condition": "negative", "word_present_full": True, "format_ok": True}
        store._insert("detections", [verdict | {"mode": "greedy", "sample_id": 0, "word_present": said[0]}])
        for n, present in enumerate(said):
            store._insert("detections", [verdict | {"mode": "sample", "sample_id": n, "word_present": present}])


def _view(paths: RunPaths, category: str | None = None, outcome: str | None = None) -> View:
    entry = RunEntry(paths, saying(), None)
    return View(entry, ("baseline", "negative"), "negative", category, outcome, None, None)


# -- queries


def test_pressure_and_suppression_of_three_prompts_are_those_of_the_hand(small: RunPaths) -> None:
    rows = ask.pairs(_view(small), "baseline", "negative", "negative", "p_sem").set_index("prompt_id")
    assert rows["delta"].to_dict() == pytest.approx({"a": 0.6, "b": -0.4, "c": 0.0})
    assert rows["relative"].to_dict() == pytest.approx({"a": 0.75, "b": -2.0, "c": 0.0})
    assert rows["log"].to_dict() == pytest.approx({"a": np.log(4), "b": -np.log(3), "c": 0.0})
    assert list(rows["outcome"].fillna("none")) == ["success", "failure", "none"]
    turned = ask.pairs(_view(small), "negative", "baseline", "negative", "p_word").set_index("prompt_id")
    assert list(turned.loc["a", ["px", "py"]]) == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, "abc"),
        ({"category": "facts"}, "ac"),
        ({"outcome": "failure"}, "b"),
        ({"category": "facts", "outcome": "failure"}, ""),
    ],
)
def test_the_filters_keep_the_prompts_that_they_name(small: RunPaths, filters: dict[str, str], kept: str) -> None:
    view = _view(small, **filters)
    assert "".join(ask.pairs(view, "baseline", "negative", "negative", "p_sem")["prompt_id"]) == kept
    assert "".join(ask.rates(view, "negative")["prompt_id"]) == kept.replace("c", "")
    assert ask.categories(view, "negative")["n"].sum() == len(kept)


def test_without_an_analysis_bins_and_categories_are_plain_means_without_intervals(small: RunPaths) -> None:
    bins = ask.binned(_view(small), "negative").set_index("grouping")
    assert bins["value"].to_dict() == {"[.2, .4)": 1.0, "[.8, 1]": 0.5}
    assert bins["low"].isna().all()
    rows = ask.categories(_view(small), "negative").set_index("category")
    assert list(rows.loc["facts", ["n", "p0", "p1", "greedy", "value"]]) == pytest.approx([2, 0.65, 0.35, 0, 0.5])
    assert rows["low"].isna().all()


def test_intervals_are_the_analysis_own_and_only_for_the_prompts_that_it_saw(whole: RunPaths) -> None:
    known = ask.statistics(whole, "rates", "negative").set_index("grouping")
    bins = ask.binned(_view(whole), "negative").set_index("grouping")
    assert bins["n"].sum() == 120
    for column in ("value", "low", "high"):
        assert bins[column].to_dict() == known.loc[bins.index, column].to_dict()
    rows = ask.categories(_view(whole, category="facts"), "negative")
    assert rows["high"].iloc[0] == known.loc["category:facts", "high"]
    filtered = ask.binned(_view(whole, outcome="success"), "negative")
    assert 0 < filtered["n"].sum() < 120
    assert filtered["low"].isna().all()
    assert ask.categories(_view(whole, outcome="success"), "negative")["low"].isna().all()


def test_a_plain_mean_of_a_bin_is_what_the_analysis_says(whole: RunPaths) -> None:
    rates = ask.rates(_view(whole), "negative")
    names = rates["p0"].map(lambda p: BIN_NAMES[bin_of(cast("float", p))])
    bins = ask.binned(_view(whole), "negative").set_index("grouping")
    assert rates.groupby(names)["rate"].mean().to_dict() == pytest.approx(bins["value"].to_dict())


def test_the_curve_is_the_one_that_the_report_draws_and_its_band_takes_the_samples_of_a_prompt_for_alike(
    whole: RunPaths,
) -> None:
    known = ask.statistics(whole, "fit", "negative")
    fit = known.query("grouping == 'all'").set_index("measure")
    line = fit.loc["intercept", "value"], fit.loc["slope", "value"]
    curve = ask.curve(whole, "negative", known, 0)
    assert curve is not None
    with open_snapshot(whole, SCHEMA) as reader:
        (ax,) = (a for a in FIGURES["violation"](gather(reader, 0)).axes if a.get_title("left") == "negative")
    drawn = next(a for a in ax.lines if str(a.get_label()).startswith("σ("))
    inside = curve[curve["is_supported"]]
    assert inside["p0"].tolist() == np.asarray(drawn.get_xdata()).tolist()
    assert inside["value"].tolist() == np.asarray(drawn.get_ydata()).tolist()
    bands = [c.get_datalim(ax.transData) for c in ax.collections if isinstance(c, PolyCollection)]
    assert (inside["low"].min(), inside["high"].max()) == pytest.approx((bands[2].y0, bands[2].y1))
    rates = ask.rates(_view(whole), "negative")
    p0, samples = (rates[c].to_numpy(float) for c in ("p0", "num_samples"))
    mean = 1 / (1 + np.exp(-(line[0] + line[1] * p0)))
    design = np.column_stack([np.ones_like(p0), p0])
    naive = np.linalg.inv(design.T @ (design * (samples * mean * (1 - mean))[:, None]))
    slope = fit.loc["slope"]
    assert (slope["high"] - slope["low"]) / 3.92 > 1.2 * naive[1, 1] ** 0.5, (
        "samples as if independent: a narrower band"
    )
    at_one = curve.iloc[-1]
    logit = np.log(at_one[["low", "high"]].astype(float) / (1 - at_one[["low", "high"]].astype(float)))
    assert logit["high"] - logit["low"] > 3.92 * np.sqrt(naive.sum()), "and the band is not that one"


def test_terminal_report_and_app_give_the_same_numbers(whole: RunPaths) -> None:
    """The terminal fitted again with seed 0 what the analysis had stored with the run's seed."""
    stored = ask.statistics(whole, "fit", "negative").query("grouping == 'all'").set_index("measure")
    manifest = read_manifest(whole)
    with open_snapshot(whole, SCHEMA) as reader:
        result = summarise(reader, manifest)
        told = gravity.EXPERIMENT.report(reader, manifest)
        content = report._content(gravity.EXPERIMENT, reader, manifest, told)
    (negative,) = (c for c in result.conditions if c.condition == "negative")
    assert negative.fit is not None
    slope = stored.loc["slope"]
    assert (negative.fit.slope, *negative.fit.slope_interval) == (slope["value"], slope["low"], slope["high"])
    bins = ask.binned(_view(whole), "negative")
    assert [(e.mean, e.low, e.high) for e in negative.by_bin if e] == list(
        bins[["value", "low", "high"]].itertuples(index=False)
    )
    told = f"{slope['value']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
    (section,) = (s for s in content["sections"] if s.name == "violation")
    assert [row[2] for t in section.tables if t.title.startswith("Fit") for row in t.rows if row[0] == "negative"] == [
        told
    ]
    assert content["remarks"] == lines(remarks(RunEntry(whole, manifest, None)))
    rates = ask.rates(_view(whole), "negative")
    data = (rates[c].to_numpy(float) for c in ("p0", "num_violations", "num_samples"))
    other = stats.fit_violations(*data, seed=1, num_bootstraps=300)
    assert other is not None
    assert other.slope_interval != negative.fit.slope_interval  # the control: another seed is another interval


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run of sixty prompts with a seed of its own: terminal and store once gave two values of its numbers."""
    root = tmp_path_factory.mktemp("real") / "runs"
    flags = {"data.limit": "60", "runtime.seed": "42", "paths.runs": str(root), "runtime.device": "cpu",
             "gravity.stages": "psem,samples,detect,analysis"}  # fmt: skip
    assert gravity.run(resolve(flags, environ={})) == 0
    (folder,) = root.iterdir()
    return RunPaths(folder)


def test_terminal_store_report_and_app_say_one_number_to_the_last_digit_and_none_fits_a_finished_run_again(
    real: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "_lines_of_draws", _refuse)
    manifest = read_manifest(real)
    with open_snapshot(real, SCHEMA) as reader:
        summary = summarise(reader, manifest)
        data = gather(reader, seed_of(manifest))
        told = gravity.EXPERIMENT.report(reader, manifest)
        content = report._content(gravity.EXPERIMENT, reader, manifest, told)
        drawn = FIGURES["violation"](data)
        stored = {
            (r["analysis"], r["measure"], r["grouping"]): (r["value"], r["low"], r["high"])
            for r in reader.query("SELECT * FROM statistics WHERE condition = 'negative'")
        }
    (negative,) = (c for c in summary.conditions if c.condition == "negative")
    fit = negative.fit
    bins: dict[str, Estimate | None] = dict(zip(BIN_NAMES, negative.by_bin, strict=True))
    assert fit is not None
    # the terminal's, in full and as it is shown
    slope = stored["fit", "slope", "all"]
    assert (fit.slope, *fit.slope_interval) == slope
    shown = f"[{slope[1]:.2f}, {slope[2]:.2f}]"
    assert any(f"slope 95 % {shown}" in str(line) for line in render(summary, manifest))
    # the report's: its table and its figure
    (section,) = (s for s in content["sections"] if s.name == "violation")
    (row,) = (row for t in section.tables if t.title.startswith("Fit") for row in t.rows)
    assert shown in row[2]
    (ax,) = (a for a in drawn.axes if a.get_title("left") == "negative")
    (line,) = (a for a in ax.lines if str(a.get_label()).startswith("σ("))
    assert shown in str(line.get_label())
    curve = {stored["fit", "curve_p0", g][0]: v for (_, m, g), v in stored.items() if m == "curve"}
    assert np.asarray(line.get_xdata()).tolist() == sorted(curve)
    assert np.asarray(line.get_ydata()).tolist() == [curve[x][0] for x in sorted(curve)]
    # the app's
    known = ask.statistics(real, "fit", "negative")
    band = ask.curve(real, "negative", known, seed_of(manifest))
    assert band is not None
    inside = band[band["is_supported"]].set_index("p0")
    assert {x: (v.value, v.low, v.high) for x, v in zip(inside.index, inside.itertuples(), strict=True)} == curve
    for row in ask.binned(_view(real), "negative").itertuples():
        told = bins[str(row.grouping)]
        assert told is not None
        assert (row.value, row.low, row.high) == (told.mean, told.low, told.high)
        assert (row.value, row.low, row.high) == stored["rates", "violation_rate", str(row.grouping)]
    monkeypatch.undo()
    rates = ask.rates(_view(real), "negative")
    p0, violations, trials = (rates[c].to_numpy(float) for c in ("p0", "num_violations", "num_samples"))
    own, usual = (stats.fit_violations(p0, violations, trials, seed) for seed in (42, 0))
    assert own == fit
    assert usual is not None
    assert f"{usual.slope_interval[0]:.2f}" != f"{slope[1]:.2f}", "the control: with the usual seed it is another one"


def _refuse(*_: object) -> None:
    raise AssertionError("a finished run was fitted again")


def test_an_older_run_has_no_curve_and_gets_that_of_its_own_draws(
    real: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ask.statistics(real, "fit", "negative")
    lines = known[~known["measure"].str.startswith("curve")]
    stored, computed = (ask.curve(real, "negative", rows, 42) for rows in (known, lines))
    assert stored is not None
    assert computed is not None
    pd.testing.assert_frame_equal(stored, computed, check_exact=True)
    monkeypatch.setattr(stats, "_lines_of_draws", _refuse)
    with pytest.raises(AssertionError, match="fitted again"):  # the control: what is not stored is computed
        ask.curve(real, "negative", lines, 43)


def test_spellings_come_likeliest_first_and_add_up_to_the_pressure(small: RunPaths) -> None:
    rows = ask.spellings(small, ["a", "b"])
    own = rows[(rows["prompt_id"] == "a") & (rows["condition"] == "baseline")]
    assert [list(ids) for ids in own["token_ids"]] == [[1, 2], [7]]
    assert own["p"].tolist() == pytest.approx([0.6, 0.2])
    assert own["word_end"].tolist() == [0.5, 1.0]
    assert own["p"].sum() == pytest.approx(ask.totals(small, ["a"])["p_sem"].iloc[0])
    assert ask.first_tokens(small, ["a"])["token_id"].tolist() == [7, 9, 7, 9]


# -- charts


def _points() -> pd.DataFrame:
    return pd.DataFrame({
        "prompt_id": ["a", "b", "c"], "category": ["facts", "idioms", "facts"], "target": "x", "px": [0.8, 0.2, 0.5],
        "py": [0.2, 0.6, 0.5], "outcome": ["success", "failure", None], "delta": [0.6, -0.4, 0.0],
        "relative": [0.75, -2.0, 0.0], "log": [1.4, -1.1, 0.0],
    })  # fmt: skip


def test_a_filter_changes_no_colour() -> None:
    names = ["facts", "idioms"]
    both = {g.name: g.colour for g in charts.groups(_points(), "category", names)}
    (one,) = charts.groups(_points().query("category == 'idioms'"), "category", names)
    assert (one.name, one.colour) == ("idioms", both["idioms"])
    assert len(set(both.values())) == 2


def test_an_outcome_that_is_not_known_is_grey_and_no_outcome() -> None:
    found = charts.groups(_points(), "outcome", [])
    assert [(g.name, len(g.rows)) for g in found] == [("success", 1), ("failure", 1), (charts.UNKNOWN, 1)]
    assert found[2].colour == GREY


def test_a_click_finds_the_point_s_prompt_and_nothing_on_the_diagonal() -> None:
    found = charts.groups(_points(), "category", ["facts", "idioms"])
    assert [charts.clicked_prompt(found, *at) for at in ((0, 0), (0, 1), (1, 0))] == ["a", "c", "b"]
    assert charts.clicked_prompt(found, 0, 2) is None
    option = charts.scatter(found, "x", "y", {"chosen prompt": "b", "pinned prompt": None})
    assert [s["type"] for s in option["series"]] == ["scatter", "scatter", "scatter", "line"]
    assert option["series"][2]["data"] == [[0.2, 0.6]]
    assert charts.clicked_prompt(found, 2, 0) is None
    assert [option[a][k] for a in ("xAxis", "yAxis") for k in ("min", "max")] == [0, 1, 0, 1]


@pytest.mark.parametrize(("column", "outside"), [("delta", 0), ("relative", 1), ("log", 0)])
def test_every_prompt_is_in_the_histogram_also_one_off_its_axis(column: str, outside: int) -> None:
    found = charts.groups(_points(), "outcome", [])
    counts = charts.histogram(found, column)
    assert counts["n"].sum() == 3
    assert charts.num_outside(found, column) == outside
    failures = counts[(counts["group"] == "failure") & (counts["n"] > 0)]
    assert failures["low"].iloc[0] <= max(_points().loc[1, column], counts["low"].min()) < failures["high"].iloc[0]
    assert (counts["low"].min(), counts["high"].max()) == {"delta": (-1, 1), "relative": (-1.5, 1), "log": (-1.5, 1.5)}[
        column
    ]


def _said(bins: pd.DataFrame, curve: pd.DataFrame | None, *, is_whole: bool) -> dict[str, dict]:
    points = pd.DataFrame({"prompt_id": ["a", "b"], "target": "x", "p0": [0.1, 0.9], "rate": [0.5, 0.5],
                           "num_violations": [8, 8], "num_samples": [16, 16]})  # fmt: skip
    option = charts.said(points, bins, curve, is_whole=is_whole, chosen={})
    shown = option["dataset"][0]["source"]["shown"]
    assert ((shown - 0.5).abs() < 0.5 / 16).all(), "moved by less than half a sample"
    assert charts.clicked_rate(points, 0, 1) == "b"
    assert charts.clicked_rate(points, 1, 0) is None
    return {s["name"]: s for s in option["series"]}


def test_a_bin_without_an_interval_has_no_bar_and_a_fit_of_more_prompts_is_thin() -> None:
    bins = pd.DataFrame({"grouping": ["[0, .2)"], "n": [2], "p0": [0.1], "value": [0.3], "low": [0.2], "high": [0.4]})
    x = np.array([0.0, 0.5, 1.0])
    curve = pd.DataFrame({"p0": x, "value": x / 2, "low": x / 4, "high": x, "is_supported": True})
    series = _said(bins, curve, is_whole=True)
    assert series["mean of a bin, 95 %"]["markLine"]["data"] == [[{"coord": [0.1, 0.2]}, {"coord": [0.1, 0.4]}]]
    assert series["fit, 95 %"]["lineStyle"] | {"color": ""} == {"type": "solid", "width": 2, "color": ""}
    series = _said(bins.assign(low=np.nan, high=np.nan), curve, is_whole=False)
    assert "markLine" not in series["mean of a bin"]
    assert series["fit of the whole run"]["lineStyle"]["width"] == 1
    assert set(_said(bins, None, is_whole=True)) == {"prompt", "mean of a bin, 95 %"}


def test_the_fitted_curve_is_dashed_and_its_band_paler_where_no_prompt_is() -> None:
    x = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    curve = pd.DataFrame(
        {"p0": x, "value": x / 2, "low": x / 4, "high": x, "is_supported": [False, True, True, False, False]}
    )
    fit = [s for s in charts._curve(curve, is_whole=True) if "stack" not in s]
    assert [(s["data"][0][0], s["data"][-1][0], s["lineStyle"]["type"]) for s in fit] == [
        (0.0, 0.25, "dashed"), (0.5, 1.0, "dashed"), (0.25, 0.5, "solid")
    ]  # fmt: skip
    bands = [s for s in charts._curve(curve, is_whole=True) if "areaStyle" in s]
    below, above, inside = (s["areaStyle"]["opacity"] for s in bands)
    assert below == above < inside
    assert len({s["stack"] for s in bands}) == 3, "one stacked on another would be drawn too high"
    assert bands[1]["data"] == [[0.5, 0.375], [0.75, 0.5625], [1.0, 0.75]]  # high − low
    lines = charts._curve(curve.assign(is_supported=True, low=np.nan), is_whole=True)
    assert [s["lineStyle"]["type"] for s in lines] == ["solid"], "no band that is not known, and nothing dashed"


def test_spellings_stand_side_by_side_by_condition_and_one_that_was_not_scored_is_missing() -> None:
    spellings = pd.DataFrame({
        "condition": ["baseline", "baseline", "negative"], "token_ids": [[1, 2], [7], [7]], "p": [0.6, 0.2, 0.3],
        "word_end": [0.5, 1.0, 1.0],
    })  # fmt: skip
    totals = pd.DataFrame({"condition": ["baseline", "negative"], "p_sem": [0.8, 0.6]})
    rows = charts.spelling_rows(spellings, {1: " mi", 2: "lk\n", 7: "{b}"}, totals)
    assert rows["tokens"].tolist() == ["␣mi | lk⏎", "{b}"]
    assert rows["baseline: share"].tolist() == pytest.approx([0.75, 0.25])
    assert rows["negative: p"].isna().tolist() == [True, False]
    bars = charts.spelling_bars(rows, ["baseline", "negative", "other"], 1.0)
    assert [s["data"] for s in bars["series"]] == [[0.6, 0.2], [None, 0.3]]


def test_spellings_beyond_the_likeliest_twelve_are_one_bar_of_their_sum() -> None:
    rows = pd.DataFrame({"tokens": [str(n) for n in range(15)], "baseline: p": [0.05] * 15})
    bars = charts.spelling_bars(rows, ["baseline"], 0.2)
    assert bars["yAxis"]["data"][-1] == "3 further"
    assert bars["series"][0]["data"][-1] == pytest.approx(0.15)


# -- the page


def _page(root: Path, monkeypatch: pytest.MonkeyPatch, **params: str) -> AppTest:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    test = open_view(PAGE.stem, **params)
    assert not test.exception, [e.value for e in test.exception]
    return test


def _told(test: AppTest) -> str:
    return "\n".join(str(e.value) for e in [*test.caption, *test.info])


def test_the_page_tells_what_is_of_the_whole_run_and_what_is_filtered(
    whole: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = whole.folder.parent
    test = _page(root, monkeypatch)
    assert {m.label: m.value for m in test.metric}["prompts"] == "120"
    assert "Fit of the whole run, 120 prompts" in _told(test)
    assert "filters are on" not in _told(test)
    assert "Mean delta" in _told(test)
    assert "95 % [" in _told(test)
    test = _page(root, monkeypatch, category="facts", gap="log")
    assert int({m.label: m.value for m in test.metric}["prompts"]) < 120
    assert "filters are on" in _told(test)
    assert "Mean log" in _told(test)
    assert "No interval" in _told(test)


def test_conditions_and_probability_come_from_the_address(whole: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    root = whole.folder.parent
    test = _page(root, monkeypatch, condition="negative", under="reframed", against="negative", probability="p_word")
    view = replace(_view(whole), conditions=("baseline", "negative", "reframed"))
    rows = ask.pairs(view, "negative", "reframed", "reframed", "p_word")
    metrics = {m.label: m.value for m in test.metric}
    assert metrics["mean of x"] == f"{rows['px'].mean():.3f}"
    assert metrics["mean of y"] == f"{rows['py'].mean():.3f}"
    assert "something else" in _told(test), "the analysis knows only p_sem against baseline"


def test_a_chosen_prompt_shows_its_spellings_and_hostile_text_is_text(
    whole: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(whole)
    hostile = prompts[prompts["question"].str.startswith(HOSTILE)]["prompt_id"].tolist()
    test = _page(whole.folder.parent, monkeypatch, prompt=hostile[0], pin=hostile[1])
    assert any(HOSTILE[0] in t.value or HOSTILE[1] in t.value for t in test.text)
    assert not any("<script" in m.value or "onerror" in m.value for m in [*test.markdown, *test.caption, *test.info])
    assert sum("tokens" in d.value.columns and "spelling" in d.value.columns for d in test.dataframe) == 2
    assert "Choose a prompt" not in _told(test)
    assert "Choose a prompt" in _told(_page(whole.folder.parent, monkeypatch))


def test_a_run_without_analysis_says_that_intervals_come_at_the_end(
    small: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(small.results, SCHEMA) as store:
        for name in "abc":
            for condition in ("baseline", "negative"):
                store._insert("contexts", [{"prompt_id": name, "condition": condition, "text": "", "token_ids": [1]}])
        store.publish(small.live)
    small.manifest.write_text('{"run_id": "x", "fingerprint": "0", "status": "failed"}')
    told = _told(_page(small.folder.parent, monkeypatch, prompt="a"))
    assert "the analysis comes at the end" in told
    assert "Fit of the whole run" not in told
    with Store(small.results, SCHEMA) as store:
        store._con.execute("ALTER TABLE psem DROP COLUMN word_end")
        store.publish(small.live)
    assert "table psem is defined otherwise" in _page(small.folder.parent, monkeypatch, prompt="a").code[0].value
