"""The page Layers: its numbers against the store and by hand, its charts, and its wiring."""

import math
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import charts
from app.charts.gravity import OUTCOME_COLOURS
from app.charts.gravity import layers as drawn
from app.queries.gravity import View
from app.queries.gravity import layers as asked
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs
from harness.store import Reader
from tests import synthetic
from tests.app.conftest import open_view, page_file
from tests.synthetic import Shape

# Streamlit itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = page_file("layers")
LAYERS = 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    shape = Shape(60, LAYERS, 2, 4, ("baseline", "negative", "reframed"), num_bootstraps=50)
    return synthetic.write(tmp_path_factory.mktemp("layers"), shape)


def _view(paths: RunPaths, category: str | None = None, outcome: str | None = None) -> View:
    (entry,) = list_runs(paths.folder.parent)
    return View(entry, ("baseline", "negative", "reframed"), "negative", category, outcome, None, None)


def _ask(paths: RunPaths, sql: str, *params: object) -> list[dict]:
    with Reader(paths.live, SCHEMA) as reader:
        return reader.query(sql, list(params))


# ---- what is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "measure"), [("lens", "p_target"), ("lens", "entropy"), ("decomposition", "ffn_contrib")]
)
def test_means_made_from_moments_are_those_of_the_analysis(paths: RunPaths, table: str, measure: str) -> None:
    told = asked.curves(_view(paths), table, "first", measure)
    made = asked.with_intervals(asked.moments(_view(paths), table, "first", f"a.{measure}"))
    assert len(told) == 2 * 2 * LAYERS
    pd.testing.assert_frame_equal(made[told.columns].astype(told.dtypes.to_dict()), told, rtol=1e-6)


def test_a_mean_is_that_of_the_prompts_that_the_filters_keep(paths: RunPaths) -> None:
    rows = asked.curves(_view(paths, "facts", "success"), "lens", "decision", "p_target")
    assert set(rows["outcome"]) == {"success"}
    by_hand = _ask(
        paths,
        "SELECT avg(p_target) AS mean, count(*) AS n FROM lens JOIN outcomes USING (prompt_id, condition) "
        "JOIN prompts USING (prompt_id) WHERE condition = 'negative' AND step_kind = 'decision' AND layer = 2 "
        "AND outcome = 'success' AND category = 'facts'",
    )[0]  # fmt: skip
    row = rows[(rows["measured"] == "negative") & (rows["layer"] == 2)].iloc[0]
    assert (row["value"], row["n"]) == (pytest.approx(by_hand["mean"]), by_hand["n"])
    assert by_hand["n"] < asked.curves(_view(paths), "lens", "decision", "p_target")["n"].max()


def test_the_lens_of_a_prompt_has_every_condition_and_its_tokens_as_text(paths: RunPaths) -> None:
    name = _ask(paths, "SELECT min(prompt_id) AS n FROM prompts")[0]["n"]
    rows = asked.lens(paths, name, "first")
    assert list(rows["condition"].unique()) == ["baseline", "negative", "reframed"]
    assert len(rows) == 3 * LAYERS
    stored = _ask(
        paths, "SELECT top_ids FROM lens WHERE prompt_id = ? AND condition = 'negative' AND layer = 1 "
        "AND step_kind = 'first'", name,
    )[0]["top_ids"]  # fmt: skip
    texts = {r["token_id"]: r["text"] for r in _ask(paths, "SELECT * FROM vocabulary")}
    shown = rows[(rows["condition"] == "negative") & (rows["layer"] == 1)]["tokens"].iloc[0]
    assert shown == [texts[n] for n in stored]
    assert asked.lens(paths, "no such prompt", "first").empty


def test_offered_prompts_are_those_under_most_pressure_of_each_outcome(paths: RunPaths) -> None:
    rows = asked.offered(_view(paths), "lens", 2)
    assert list(rows["outcome"]) == ["failure", "failure", "success", "success"]
    top = _ask(paths, "SELECT max(p0) AS p FROM suppression JOIN outcomes USING (prompt_id, condition) "
                      "WHERE condition = 'negative' AND outcome = 'success'")[0]["p"]  # fmt: skip
    assert rows["p0"][2] == pytest.approx(top)
    assert set(asked.offered(_view(paths, None, "success"), "lens")["outcome"]) == {"success"}


# ---- what is drawn --------------------------------------------------------------------------------------------


def _lens() -> pd.DataFrame:
    return pd.DataFrame({
        "condition": "negative", "layer": [0, 1], "step": 0, "p_target": [0.1, 0.6], "p_emitted": [0.2, math.nan],
        "entropy": [4.0, 2.0], "kl_final": [3.0, 0.0], "tokens": [[" {b}", "x"], []], "top_probs": [[0.3, 0.1], []],
    })  # fmt: skip


def test_a_cell_shows_its_top_token_and_tells_the_others() -> None:
    cells = drawn.lens_cells([("negative", _lens())], "p_top")
    option = drawn.lens_grid(cells, ["negative"], 2, "p_top", 0)
    known, missing = option["series"][0]["data"]
    assert known["label"]["formatter"] == "␣(b)", "a token is never a template"
    assert known["value"] == [0, 0, 0.3]
    assert known["name"].splitlines()[:3] == ["negative, layer 0", "0.300  ␣(b)", "0.100  x"]
    assert known["itemStyle"]["borderColor"] == charts.GREEN
    assert "decal" in missing["itemStyle"]
    assert option["tooltip"]["renderMode"] == "richText"


def test_probabilities_have_a_whole_scale_and_nats_that_of_what_is_shown() -> None:
    for shade, high in (("p_top", 1.0), ("p_target", 1.0), ("entropy", 4.0), ("kl_final", 3.0)):
        cells = drawn.lens_cells([("a", _lens()), ("b", _lens().assign(entropy=1.0))], shade)
        assert drawn.lens_range(cells, shade) == (0.0, high)


def test_a_layers_table_has_a_row_a_column_of_the_grid() -> None:
    table = drawn.top_tokens([("negative", _lens()), ("baseline", _lens())], 0)
    assert list(table["where"]) == ["negative", "baseline"]
    assert list(table["#1"]) == ["␣{b} 0.300"] * 2
    assert list(table["p_target"]) == [0.1, 0.1]


@pytest.mark.parametrize(("top", "limit"), [(0.43, 0.5), (0.031, 0.04), (1.2, 2.0), (0.0, 1.0), (math.nan, 1.0)])
def test_the_axis_ends_at_a_round_number_above_all_values(top: float, limit: float) -> None:
    assert drawn.axis_limit(pd.Series([-top, top / 2]), pd.Series([0.0])) == pytest.approx(limit)


def test_contributions_are_bars_of_a_prompt_and_curves_of_an_outcome() -> None:
    rows = pd.DataFrame({"layer": [0, 1], "attn_contrib": [0.1, -0.2], "ffn_contrib": [0.0, 0.3]})
    bars = drawn.contribution_bars(rows, 0.5)
    assert [s["data"] for s in bars["series"]] == [[0.1, -0.2], [0.0, 0.3]]
    assert (bars["yAxis"]["min"], bars["yAxis"]["max"]) == (-0.5, 0.5)
    means = pd.DataFrame({"measured": "negative", "outcome": ["failure", "success"], "layer": 0, "value": [0.2, 0.1],
                          "low": [0.1, 0.0], "high": [0.3, 0.2]})  # fmt: skip
    curves = drawn.contribution_curves({"attn_contrib": means, "ffn_contrib": means}, "negative", 0.5)
    lines = {s["name"]: s for s in reversed(curves["series"]) if "stack" not in s}
    assert set(lines) == {"attention, failure", "attention, success", "MLP, failure", "MLP, success"}
    assert lines["attention, failure"]["lineStyle"]["type"] == "dashed"
    assert lines["MLP, failure"]["itemStyle"]["color"] == OUTCOME_COLOURS["failure"]
    empty = drawn.contribution_curves({"attn_contrib": means, "ffn_contrib": means}, "baseline", 0.5)
    assert empty["series"] == []


# ---- the page -------------------------------------------------------------------------------------------------


def _page(**params: str) -> AppTest:
    return open_view(PAGE.stem, **params)


@pytest.fixture
def shown(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("OUTPUT_ROOT", str(paths.folder.parent))
    return paths


@pytest.mark.usefixtures("shown")
def test_without_a_prompt_the_page_offers_some_and_shows_the_means() -> None:
    test = _page()
    assert not test.exception
    assert any("Choose a prompt" in i.value for i in test.info)
    assert set(test.dataframe[0].value["outcome"]) == {"failure", "success"}
    assert [h.value for h in test.header] == ["Logit lens", "By layer", "What each layer adds"]


def test_the_prompt_and_the_pinned_one_stand_side_by_side(shown: RunPaths) -> None:
    one, other = (r["prompt_id"] for r in _ask(shown, "SELECT prompt_id FROM prompts ORDER BY 1 LIMIT 2"))
    test = _page(prompt=one, pin=other, layer="2", shade="entropy", condition="reframed", step="decision")
    assert not test.exception
    table = test.dataframe[0].value
    assert list(table["where"]) == [
        "baseline", "baseline, pinned", "negative", "negative, pinned", "reframed", "reframed, pinned",
    ]  # fmt: skip
    stored = _ask(
        shown, "SELECT p_target FROM lens WHERE prompt_id = ? AND condition = 'negative' AND layer = 2 "
        "AND step_kind = 'decision'",
        other,
    )[0]["p_target"]  # fmt: skip
    assert table["p_target"][3] == pytest.approx(stored)


@pytest.mark.parametrize(("held", "layer"), [(27, LAYERS - 1), (0, 0), (None, LAYERS // 2)])
def test_a_layer_that_another_run_or_page_left_is_brought_into_range(
    shown: RunPaths, held: int | None, layer: int
) -> None:
    name = _ask(shown, "SELECT min(prompt_id) AS n FROM prompts")[0]["n"]
    test = AppTest.from_file(str(PAGE), default_timeout=60)
    test.query_params["prompt"] = name
    test.session_state["layer"] = held
    test.run()
    assert not test.exception
    assert test.slider[0].value == layer


@pytest.mark.thorough
def test_it_opens_on_runs_of_every_kind(opened: Path) -> None:
    for run in opened.iterdir():
        test = _page(run=run.name)
        assert not test.exception, run.name
        assert [*test.info, *test.warning, *test.caption], run.name
