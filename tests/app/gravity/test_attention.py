"""The page Attention: its numbers against the store and by hand, its charts, and its wiring."""

import math
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from streamlit.testing.v1 import AppTest

from app import charts
from app.charts.gravity import OUTCOME_COLOURS
from app.charts.gravity import attention as drawn
from app.queries.gravity import View
from app.queries.gravity import attention as asked
from app.queries.gravity import layers as by_layer
from harness.errors import HarnessError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs
from harness.store import Reader, Store
from tests import synthetic
from tests.app.conftest import open_view, page_file
from tests.fakes import older_store
from tests.synthetic import Shape

# Streamlit itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = page_file("attention")
LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A synthetic run in which two prompts' head rows are stored: under `negative`, and the file of one is gone."""
    shape = Shape(60, LAYERS, HEADS, 4, ("baseline", "negative"), num_bootstraps=50)
    found = synthetic.write(tmp_path_factory.mktemp("attention"), shape)
    (found.artifacts / "attention").mkdir(parents=True)
    with Store(found.results, SCHEMA) as store:
        first, second = (r["prompt_id"] for r in store.query("SELECT prompt_id FROM prompts ORDER BY 1 LIMIT 2"))
        size = _size(store, first)
        save_file({"first": _rows(size), "decision": _rows(size)}, found.artifacts / "attention" / "a.safetensors")
        for name, path in ((first, "attention/a.safetensors"), (second, "attention/gone.safetensors")):
            row = {"path": path, "kind": "attention", "prompt_id": name, "condition": "negative"}
            store._insert("artifacts", [row])
        store.publish(found.live)
    return found


def _size(store: Store, prompt_id: str) -> int:
    sql = "SELECT len(token_ids) AS n FROM contexts WHERE prompt_id = ? AND condition = 'negative'"
    return store.query(sql, [prompt_id])[0]["n"]


def _rows(size: int) -> np.ndarray:
    """[layers, heads, tokens]: a head h of layer l looks at token h + l only."""
    rows = np.zeros((LAYERS, HEADS, size), np.float32)
    for layer, head in np.ndindex(LAYERS, HEADS):
        rows[layer, head, layer + head] = 1
    return rows


@pytest.fixture
def view(paths: RunPaths) -> Callable[..., View]:
    """A view of the run, by the filters that are given."""
    (entry,) = list_runs(paths.folder.parent)

    def make(category: str | None = None, outcome: str | None = None) -> View:
        return View(entry, ("baseline", "negative"), "negative", category, outcome, None, None)

    return make


def _rows_of(paths: RunPaths, sql: str, *params: object) -> list[dict]:
    with Reader(paths.live, SCHEMA) as reader:
        return reader.query(sql, list(params))


# ---- what is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["iar", "pi", "tmf_token"])
def test_means_made_from_moments_are_those_of_the_analysis(view: Callable[..., View], measure: str) -> None:
    from_statistics = asked.curves(view(), "first", measure)
    made = by_layer.with_intervals(by_layer.moments(view(), "attention", "first", f"list_avg(a.{measure})"))
    assert len(from_statistics) == 2 * LAYERS * (2 if measure == "iar" else 1)
    pd.testing.assert_frame_equal(
        made[from_statistics.columns].astype(from_statistics.dtypes.to_dict()), from_statistics, rtol=1e-6
    )


def test_differences_made_from_moments_are_those_of_the_analysis(
    view: Callable[..., View], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asked.heads(view(), "decision", "nf", "negative")
    none = by_layer.known(view(), "attention", "decision", "nf").head(0)
    monkeypatch.setattr(by_layer, "known", lambda *_: none)
    made = asked.heads(view(), "decision", "nf", "negative")
    pd.testing.assert_frame_equal(made, told, rtol=1e-5, atol=1e-9)
    assert len(told) == LAYERS * HEADS
    assert told["q"].notna().all()


def test_a_heads_means_and_their_difference_are_those_of_its_values(paths: RunPaths, view: Callable[..., View]) -> None:
    values = pd.DataFrame(
        _rows_of(paths, "SELECT outcome, a.pi[3] AS v FROM attention a JOIN outcomes USING (prompt_id, condition) "
                        "WHERE condition = 'negative' AND step_kind = 'first' AND layer = 1")
    )  # fmt: skip
    means = values.groupby("outcome")["v"].mean()
    cell = asked.heads(view(), "first", "pi", "negative").set_index(["layer", "head"]).to_dict("index")[1, 2]
    assert cell["failure"] == pytest.approx(means["failure"], abs=1e-6)
    assert cell["difference"] == pytest.approx(means["failure"] - means["success"], abs=1e-6)
    assert cell["n_failure"] + cell["n_success"] == 60


def test_filters_keep_prompts_and_outcomes(paths: RunPaths, view: Callable[..., View]) -> None:
    everyone, some = (asked.curves(view(c), "first", "iar") for c in (None, "facts"))
    num_facts = _rows_of(paths, "SELECT count(*) AS n FROM prompts WHERE category = 'facts'")[0]["n"]
    count = lambda rows: rows[(rows["layer"] == 0) & (rows["measured"] == "negative")]["n"].sum()  # noqa: E731
    assert (count(everyone), count(some)) == (60, num_facts)
    assert num_facts < 60
    assert set(asked.curves(view(None, "success"), "first", "iar")["outcome"]) == {"success"}
    only = asked.heads(view("facts", "success"), "first", "iar", "negative")
    assert only["failure"].isna().all()
    assert only["success"].notna().all()


def test_a_measure_without_its_span_has_no_rows(view: Callable[..., View]) -> None:
    assert asked.heads(view(), "first", "pi", "baseline").empty
    assert asked.distribution(view(), "first", "pi", "baseline", 0, 1).empty
    assert not asked.heads(view(), "first", "iar", "baseline").empty


def test_every_prompt_is_in_one_bin(paths: RunPaths, view: Callable[..., View]) -> None:
    bins = asked.distribution(view(), "first", "iar", "negative", 1, 2, bins=5)
    assert list(bins.groupby("outcome").size()) == [5, 5]
    assert bins["n"].sum() == 60
    assert bins.groupby("outcome")["share"].sum().to_list() == pytest.approx([1, 1])
    first = bins[bins["outcome"] == "success"].iloc[0]
    below = _rows_of(paths, "SELECT count(*) AS n FROM attention a JOIN outcomes o USING (prompt_id, condition) "
                            "WHERE step_kind = 'first' AND layer = 1 AND outcome = 'success' "
                            "AND iar[3] < ?", float(first["end"]))[0]["n"]  # fmt: skip
    assert first["n"] == below
    largest = asked.values(view(), "first", "iar", "negative", 1, 2, limit=3)
    assert largest["value"].is_monotonic_decreasing
    assert largest["value"][0] == pytest.approx(bins["end"].max(), abs=1e-6)


def test_a_row_has_a_share_for_every_token_and_names_its_spans(paths: RunPaths) -> None:
    name = _rows_of(paths, "SELECT min(prompt_id) AS n FROM prompts")[0]["n"]
    context = _rows_of(paths, "SELECT text, spans FROM contexts WHERE prompt_id = ? AND condition = 'negative'", name)[
        0
    ]
    row = asked.token_row(paths, name, "negative", "first", 2)
    assert "".join(row["text"]) == context["text"]
    assert row["share"].sum() == pytest.approx(1, abs=1e-5)
    start, end = context["spans"]["mention"]
    assert list(row.index[row["span"] == "mention"]) == list(range(start, end))
    assert row["span"][context["spans"]["instruction"][0]] == "instruction"
    assert asked.token_row(paths, "no such prompt", "negative", "first", 2).empty


def test_the_answer_up_to_the_decision_is_among_its_tokens(paths: RunPaths) -> None:
    found = _rows_of(paths, "SELECT prompt_id, first_step FROM detections WHERE mode = 'greedy' AND condition = 'negative' "
                            "AND first_step > 0 LIMIT 1")[0]  # fmt: skip
    first, decision = (
        asked.token_row(paths, found["prompt_id"], "negative", kind, 0) for kind in ("first", "decision")
    )
    assert len(decision) == len(first) + found["first_step"]
    assert (decision["span"] == "answer").sum() == found["first_step"]


def test_head_rows_are_read_where_they_are_stored(paths: RunPaths) -> None:
    table = asked.stored(paths)
    first, second = table["prompt_id"]
    rows = asked.head_rows(paths, first, "negative", "first", 1)
    assert rows is not None
    assert list(rows.argmax(axis=1)) == [1, 2, 3, 4]
    assert asked.head_rows(paths, first, "baseline", "first", 1) is None
    with pytest.raises(HarnessError, match="gone"):
        asked.head_rows(paths, second, "negative", "first", 1)


def test_tokens_without_a_text_of_their_own_have_the_vocabularys() -> None:
    # a first special token, one character in two tokens, and a space that the offsets leave out
    assert asked.slices("aé b", [(0, 0), (0, 1), (1, 2), (1, 2), (3, 4)], ["<s>", "", "", "\ufffd", ""]) == [
        "<s>", "a", "é", "\ufffd", " b",
    ]  # fmt: skip


# ---- what is drawn --------------------------------------------------------------------------------------------


def _heads() -> pd.DataFrame:
    return pd.DataFrame({
        "layer": [0, 0], "head": [0, 1], "failure": [0.5, 0.2], "success": [0.1, math.nan], "n_failure": [3, 3],
        "n_success": [4, 0], "difference": [0.4, math.nan], "low": [0.1, math.nan], "high": [0.7, math.nan],
        "q": [0.01, math.nan],
    })  # fmt: skip


def test_the_grid_marks_what_is_significant_and_hatches_what_is_not_known() -> None:
    cells = drawn.head_cells(_heads(), "difference")
    option = drawn.head_grid(cells, 2, 1, "difference", (0, 0))
    known, missing = option["series"][0]["data"]
    assert known["value"] == [0, 0, 0.4]
    assert known["label"]["show"]
    assert known["itemStyle"]["borderColor"] == charts.GREEN
    assert "failure − success +0.4000" in known["name"]
    assert "not measured" in missing["name"]
    assert "decal" in missing["itemStyle"]
    assert not drawn.head_cells(_heads(), "failure")["mark"].any()


def test_both_outcomes_share_one_range() -> None:
    assert drawn.head_range(_heads(), "failure") == drawn.head_range(_heads(), "success") == (0.0, 0.5)
    assert drawn.head_range(_heads(), "difference") == (-0.4, 0.4)
    assert drawn.head_range(_heads().assign(success=-0.6), "failure") == (-0.6, 0.6)


def test_curves_are_coloured_by_outcome_and_dashed_for_baseline() -> None:
    rows = pd.DataFrame({"measured": ["baseline", "negative"], "outcome": "failure", "layer": 0, "value": 0.5, "low": 0.4,
                         "high": 0.6})  # fmt: skip
    series = drawn.by_layer(rows, "iar")["series"]
    assert [s["name"] for s in series[:2]] == ["failure, baseline", "failure, negative"], "bands come after the lines"
    assert [s["lineStyle"]["type"] for s in series[:2]] == ["dashed", "solid"]
    assert {s["itemStyle"]["color"] for s in series[:2]} == {OUTCOME_COLOURS["failure"]}
    assert len(series) == 2 + 2 * 2


def _row(shares: list[float]) -> pd.DataFrame:
    return pd.DataFrame({
        "position": range(4), "token_id": range(4), "text": ["<s>", " not", " {x}", "?"],
        "span": ["", "negation", "mention", "question"], "share": shares,
    })  # fmt: skip


def test_colours_leave_the_first_token_out_of_their_scale() -> None:
    row, other = _row([0.7, 0.1, 0.2, 0.0]), _row([0.9, 0.05, 0.05, 0.0])
    assert drawn.largest_share([row, other]) == 0.2
    assert drawn.largest_share([_row([math.nan] * 4)]) == 0
    chips = drawn.chips_of(row, 0.2)
    assert chips[0].colour == chips[2].colour != chips[1].colour
    assert chips[2].underline == drawn.SPAN_COLOURS["mention"]
    assert not chips[0].underline
    assert drawn.chips_of(_row([math.nan] * 4), 0.2)[1].is_missing


def test_masses_add_up_by_part() -> None:
    spans = {"negative": {"instruction": (1, 3), "negation": (1, 2), "question": (3, 4)}}
    table = drawn.masses({"negative": _row([0.6, 0.1, 0.2, 0.1])}, spans).set_index("part")
    assert table.loc["instruction", "mass"] == pytest.approx(0.3)
    assert table.loc["instruction", "per token"] == pytest.approx(0.15)
    assert table.loc["negation", "tokens"] == 1
    assert table.loc["first token", "mass"] == 0.6
    assert "else" not in table.index, "every token is in a part"


def test_token_labels_cannot_be_templates() -> None:
    cells = drawn.head_row_cells(np.array([[0.5, 0.5]]))
    option = drawn.head_row_grid(cells, ["{b}", "a long one with spaces"], 1, 0.5)
    names = [item["name"] for item in option["series"][0]["data"]]
    assert names[0] == "head 0 on 0 (b): 0.5000"
    assert "␣" in names[1]
    assert "…" in names[1]
    assert option["tooltip"]["renderMode"] == "richText"


# ---- the page -------------------------------------------------------------------------------------------------


def _page(**params: str) -> AppTest:
    return open_view(PAGE.stem, **params)


@pytest.fixture
def shown(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("OUTPUT_ROOT", str(paths.folder.parent))
    return paths


@pytest.mark.usefixtures("shown")
def test_without_a_prompt_the_page_offers_some() -> None:
    test = _page()
    assert not test.exception
    assert any("Choose a prompt" in i.value for i in test.info)
    assert set(test.dataframe[-1].value["outcome"]) == {"failure", "success"}


def test_a_locked_head_and_a_prompt_come_from_the_address(shown: RunPaths) -> None:
    first = asked.stored(shown)["prompt_id"][0]
    test = _page(prompt=first, layer="1", head="2", measure="pi", outcome="failure")
    assert not test.exception
    assert test.slider[0].value == 1
    assert any("layer 1, head 2" in t.value for t in test.text)
    masses = next(d.value for d in test.dataframe if "mass" in d.value.columns)
    assert masses[masses["part"] != "first token"]["mass"].max() == pytest.approx(1), "the stored row, not the mean"
    assert any("not for this one under: baseline" in i.value for i in test.info)


def test_a_broken_file_is_told_and_the_page_goes_on(shown: RunPaths) -> None:
    test = _page(prompt=asked.stored(shown)["prompt_id"][1], pin=asked.stored(shown)["prompt_id"][0])
    assert not test.exception
    assert any("gone.safetensors" in w.value for w in test.warning)
    assert any("mass" in d.value.columns for d in test.dataframe)


@pytest.mark.usefixtures("shown")
def test_a_measure_that_a_condition_lacks_is_told() -> None:
    test = _page(measure="pi", measured="baseline", layer="99")
    assert not test.exception
    assert any("under baseline" in i.value for i in test.info)


@pytest.mark.thorough
def test_it_opens_on_runs_of_every_kind(opened: Path) -> None:
    for run in opened.iterdir():
        test = _page(run=run.name)
        assert not test.exception, run.name
        told = [*test.info, *test.warning, *test.caption]
        assert told, run.name


def test_an_older_schema_with_rows_is_shown_by_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "20200101-000000-older-0"
    run.mkdir()
    (run / "manifest.json").write_text(f'{{"run_id": "{run.name}", "fingerprint": "0", "status": "finished"}}')
    older_store(run / "live.duckdb", 1)
    with duckdb.connect(str(run / "live.duckdb")) as con:
        con.execute("INSERT INTO prompts (prompt_id, category, question, target) VALUES ('a', 'f', 'Q?', 'w')")
        con.execute(
            "INSERT INTO contexts (prompt_id, condition, text, token_ids) VALUES ('a', 'negative', 'Q', [1, 2])"
        )
        con.execute("INSERT INTO detections (prompt_id, condition, mode, sample_id, word_present) VALUES "
                    "('a', 'negative', 'greedy', 0, TRUE)")  # fmt: skip
        con.execute(
            "INSERT INTO attention VALUES ('a', 'negative', 'first', 0, 0, [.5, .25], NULL, NULL, NULL, [.9, .1])"
        )
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = _page(prompt="a", head="1")
    assert not test.exception
    assert any("failure 0.2500 (n 1)" in t.value for t in test.text)
