"""The patching page: its means are those of the rows behind them, its scale is one, and a click leads to a prompt."""

from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.gravity import patching as drawing
from app.queries.gravity import EVERY
from app.queries.gravity import patching as asking
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Reader, Store
from tests import synthetic
from tests.app.conftest import open_view, page_file, store_of
from tests.commands import saying
from tests.synthetic import Shape

PAGE = page_file("patching")
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")
KEPT, HOSTILE = "<b>kept</b>", "<img src=x onerror=alert(1)> {b}"
ROWS = (  # prompt, outcome, layer, kind, before, after, flipped
    ("a", "success", 0, "resid", 0.1, 0.4, True),
    ("b", "success", 0, "resid", 0.2, 0.3, False),
    ("c", "failure", 0, "resid", 0.8, 0.7, True),
    ("d", "failure", 0, "resid", 0.6, 0.9, False),
    ("a", "success", 1, "mlp", 0.1, 0.1, False),
)  # fmt: skip


def few(store: Store) -> None:
    """`ROWS`, and what was said without a patch."""
    key = {"condition": "negative", "mode": "greedy", "sample_id": 0}
    outcomes = {p: o for p, o, *_ in ROWS}
    store._insert(
        "prompts", [{"prompt_id": p, "category": "facts" if p < "c" else "idioms", "target": "X"} for p in outcomes]
    )
    store._insert("detections", [key | {"prompt_id": p, "word_present": o == "failure"} for p, o in outcomes.items()])
    store._insert("completions", [key | {"prompt_id": p, "text": KEPT} for p in outcomes])
    store._insert("patching", [
        {"prompt_id": p, "layer": layer, "patch": kind, "p_sem_original": before, "p_sem_patched": after,
         "delta_p": after - before, "flipped": flipped, "continuation": HOSTILE, "num_patched": 3, "num_span": 4}
        for p, _, layer, kind, before, after, flipped in ROWS
    ])  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return store_of(tmp_path_factory.mktemp("few"), few)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A synthetic run with patched prompts and their statistics."""
    return synthetic.write(tmp_path_factory.mktemp("runs"), Shape(60, 4, 2, 4, num_bootstraps=50))


@pytest.fixture
def opened(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("OUTPUT_ROOT", str(run.folder.parent))
    return run


def page(**params: str) -> AppTest:
    return open_view(PAGE.stem, **params)


def words(test: AppTest) -> str:
    return "\n".join(str(e.value) for e in [*test.caption, *test.text, *test.info, *test.code])


# -- questions


def test_means_are_those_of_the_rows_and_the_difference_is_failure_less_success(paths: RunPaths) -> None:
    found = asking.counted_means(paths, "negative", "delta_p", *EVERY).set_index(["grouping", "layer", "patch"])
    rows = found.to_dict("index")
    at = lambda group: rows[group, 0, "resid"]  # noqa: E731
    assert at("all")["value"] == pytest.approx((0.3 + 0.1 - 0.1 + 0.3) / 4)
    assert at("success")["value"] == pytest.approx(0.2)
    assert at("failure")["value"] == pytest.approx(0.1)
    assert at("difference")["value"] == pytest.approx(-0.1)
    assert at("difference")["n"] == 4
    se = (0.02 / 2 + 0.08 / 2) ** 0.5  # variances .02 of .3 and .1, .08 of −.1 and .3
    assert at("difference")["high"] - at("difference")["value"] == pytest.approx(1.959964 * se)
    assert ("difference", 1, "mlp") not in found.index, "a cell without failures has no difference"
    assert pd.isna(rows["all", 1, "mlp"]["low"]), "one prompt has no interval"


def test_flips_are_counted_as_a_share(paths: RunPaths) -> None:
    found = asking.counted_means(paths, "negative", "flip", *EVERY).set_index(["grouping", "layer", "patch"])["value"]
    assert found["all", 0, "resid"] == 0.5
    assert found["all", 1, "mlp"] == 0


def test_a_filter_keeps_its_prompts_and_no_others(paths: RunPaths) -> None:
    only = ("prompt_id IN (SELECT prompt_id FROM prompts WHERE category = ?)", ["facts"])
    assert asking.counts(paths, "negative", *only) == {"all": 2, "success": 2, "failure": 0}
    assert asking.counts(paths, "negative", *EVERY) == {"all": 4, "success": 2, "failure": 2}
    found = asking.counted_means(paths, "negative", "delta_p", *only)
    assert set(found["grouping"]) == {"all", "success"}
    assert asking.counted_means(paths, "negative", "delta_p", "FALSE", []).empty


def test_prompts_behind_a_cell_come_strongest_first_with_both_answers(paths: RunPaths) -> None:
    rows = asking.behind(paths, "negative", 0, "resid", "all", *EVERY)
    assert set(rows["prompt_id"][:2]) == {"a", "d"}
    assert set(rows["prompt_id"][2:]) == {"b", "c"}
    assert set(rows["said"]) == {KEPT}
    assert set(rows["says"]) == {HOSTILE}
    assert list(asking.behind(paths, "negative", 0, "resid", "failure", *EVERY)["prompt_id"]) == ["d", "c"]
    assert asking.behind(paths, "negative", 7, "resid", "all", *EVERY).empty


def test_counted_means_agree_with_the_stored_statistics(run: RunPaths) -> None:
    for effect in asking.EFFECTS.values():
        stored, counted = (
            asking.stored_means(run, "negative", effect),
            asking.counted_means(run, "negative", effect, *EVERY),
        )
        both = stored.merge(counted, on=["grouping", "layer", "patch"])
        assert len(both) == len(stored) == len(counted) > 0
        assert (both["value_x"] - both["value_y"]).abs().max() < 1e-12
        assert (both["n_x"] == both["n_y"]).all()


def test_the_patched_condition_is_known_without_statistics(tmp_path: Path) -> None:
    bare = store_of(tmp_path, lambda store: None)
    stages = {"fingerprint_parts": {"stages": [{"name": "psem"}, {"name": "patching", "condition": "reframed"}]}}
    assert asking.patched_condition(bare, saying(stages)) == "reframed"
    assert asking.patched_condition(bare, saying()) == "negative"


# -- drawings


def test_cells_say_their_interval_and_the_chosen_one_has_a_frame(paths: RunPaths) -> None:
    means = asking.counted_means(paths, "negative", "delta_p", *EVERY)
    kinds = drawing.ordered(["mlp", "resid"])
    assert kinds == ["mlp", "resid"], "the blocks' outputs stand on top"
    cells = drawing.placed(means[means["grouping"] == "all"], kinds, 2, (0, "resid"))
    option = drawing.means(cells, kinds, 2, top=0.5, title="mean ΔP", chosen=(0, "resid"))
    data = option["series"][0]["data"]
    framed = [item["value"] for item in data if item.get("itemStyle", {}).get("borderWidth")]
    assert framed == [[0, 1, 0.15]]
    assert cells.iloc[-1]["patch"] == "resid", "it is drawn over its neighbours"
    notes = [item["tooltip"].get("formatter", "") for item in data]
    assert any("+0.150" in n and "4 prompts" in n and "95 %" in n for n in notes)
    assert (option["visualMap"]["min"], option["visualMap"]["max"]) == (-0.5, 0.5)
    missing = [item for item in data if item.get("visualMap") is False]
    assert {tuple(m["value"][:2]) for m in missing} == {(0, 0), (1, 1)}, "what was not measured is not zero"


def test_labels_are_short_and_keep_the_sign() -> None:
    assert [drawing.short(v) for v in (0.314, -0.05, 1.0, -0.001, float("nan"))] == [".31", "−.05", "1", "0", ""]


def test_a_tooltip_takes_no_markup_and_no_placeholder() -> None:
    shown = drawing.as_template(HOSTILE)
    assert "<" not in shown
    assert "{" not in shown
    assert "img src" in shown, "the text itself is there"


# -- the page


def test_the_page_says_how_many_prompts_and_what_the_signs_mean(opened: RunPaths) -> None:
    test = page()
    assert not test.exception
    with Reader(opened.live, SCHEMA) as reader:
        n = reader.query("SELECT count(DISTINCT prompt_id) AS n FROM patching")[0]["n"]
    assert f"{n} prompts patched from `baseline` into `negative`" in words(test)
    assert "0: as under the ban; above: the patch makes X more likely" in words(test)
    assert "Click a cell" not in words(test)


def test_a_linked_cell_shows_its_interval_its_prompts_and_the_chosen_prompts_answers(opened: RunPaths) -> None:
    rows = asking.behind(opened, "negative", 2, "resid", "success", *EVERY)
    prompt = str(rows["prompt_id"][0])
    test = page(layer="2", patch="resid", group="success", prompt=prompt)
    assert not test.exception
    shown = test.dataframe[0].value
    assert list(shown["prompt_id"]) == list(rows["prompt_id"])
    assert "percentile bootstrap" in words(test)
    assert " (patched)" in [c.value for c in test.code]
    assert asking.greedy_text(opened, prompt, "negative") in [c.value for c in test.code]


def test_a_filter_without_patched_prompts_says_so(opened: RunPaths) -> None:
    test = page(outcome="failure", group="success")
    assert not test.exception
    assert any("keeps no prompts" in i.value for i in test.info)
    other = page(outcome="failure", group="failure")
    assert not any("keeps no prompts" in i.value for i in other.info)


def test_the_sign_of_a_difference_is_told_apart_from_that_of_a_mean(opened: RunPaths) -> None:
    assert "more in failures" in words(page(group="difference"))
    assert "more in failures" not in words(page(group="failure"))


def test_a_layer_that_the_run_has_not_is_left_out(opened: RunPaths) -> None:
    test = page(layer="99", patch="resid")
    assert not test.exception
    assert next(b.value for b in test.selectbox if b.label == "Layer") is None


def test_a_prompt_that_was_not_patched_says_so(opened: RunPaths) -> None:
    with Reader(opened.live, SCHEMA) as reader:
        other = reader.query(
            "SELECT prompt_id FROM prompts WHERE prompt_id NOT IN (SELECT prompt_id FROM patching) LIMIT 1"
        )
    test = page(prompt=other[0]["prompt_id"])
    assert not test.exception
    assert any("not patched" in i.value for i in test.info)
