"""The page of one prompt: every side of it, from the store, with its neighbours in the filter and a pinned one beside it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.gravity import prompt as drawing
from app.queries.gravity import prompt as asking
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Reader, Store
from tests import synthetic
from tests.app.conftest import open_view, page_file, store_of
from tests.synthetic import Shape

PAGE = page_file("prompt")
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    shape = Shape(30, 3, 2, 4, ("baseline", "negative", "reframed"), num_bootstraps=20)
    return synthetic.write(tmp_path_factory.mktemp("runs"), shape)


@pytest.fixture
def opened(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("OUTPUT_ROOT", str(run.folder.parent))
    return run


@pytest.fixture(scope="module")
def ids(run: RunPaths) -> list[str]:
    with Reader(run.live, SCHEMA) as reader:
        return [r["prompt_id"] for r in reader.query("SELECT prompt_id FROM prompts ORDER BY prompt_id")]


def page(**params: str) -> AppTest:
    return open_view(PAGE.stem, **params)


def button(test: AppTest, label: str):
    return next(b for b in test.button if b.label == label)


# -- questions


def test_equal_samples_are_counted_together(tmp_path: Path) -> None:
    def fill(store: Store) -> None:
        key = {"prompt_id": "a", "condition": "negative", "mode": "sample"}
        texts = [" milk", " tea", " milk", "<b>milk"]
        store._insert("completions", [key | {"sample_id": n, "text": t} for n, t in enumerate(texts)])
        store._insert("detections", [key | {"sample_id": n, "word_present": "milk" in t} for n, t in enumerate(texts)])

    rows = asking.samples(store_of(tmp_path, fill), "a")
    assert rows[["text", "number", "word_present"]].to_numpy().tolist() == [
        [" milk", 2, True], [" tea", 1, False], ["<b>milk", 1, True]
    ]  # fmt: skip


def test_an_event_concerns_the_prompt_that_it_names_and_no_other(tmp_path: Path) -> None:
    def fill(store: Store) -> None:
        for key in ("a", "a|negative", "ab", "ab|negative", None):
            store.event("warning", "failed_item", "made up", "psem", key)

    assert list(asking.events(store_of(tmp_path, fill), "a")["item_key"]) == ["a", "a|negative"]


def test_pressure_is_that_of_the_store_under_every_condition(run: RunPaths, ids: list[str]) -> None:
    rows = asking.pressure(run, ids[0])
    assert list(rows["condition"]) == ["baseline", "negative", "reframed"]
    with Reader(run.live, SCHEMA) as reader:
        stored = reader.query("SELECT p_sem FROM psem WHERE prompt_id = ? ORDER BY condition", [ids[0]])
    assert list(rows["p_sem"]) == [r["p_sem"] for r in stored]
    assert pd.isna(rows["delta"][0]), "baseline is not suppressed against itself"
    assert rows["delta"][1] == pytest.approx(rows["p_sem"][0] - rows["p_sem"][1])
    assert set(rows["num_samples"]) == {4}


def test_ratios_are_means_over_heads(run: RunPaths, ids: list[str]) -> None:
    rows = asking.ratios(run, ids[0], "first")
    with Reader(run.live, SCHEMA) as reader:
        (stored,) = reader.query(
            "SELECT iar FROM attention WHERE prompt_id = ? AND condition = 'negative' AND step_kind = 'first' AND layer = 1",
            [ids[0]],
        )
    here = rows[(rows["condition"] == "negative") & (rows["layer"] == 1)]
    assert float(here["iar"].iloc[0]) == pytest.approx(float(np.mean(stored["iar"])), abs=1e-6)
    assert rows[rows["condition"] == "baseline"]["tmf"].isna().all(), "baseline does not mention X"


# -- drawings


def test_a_marked_answer_is_the_whole_text_with_every_occurrence() -> None:
    chips = drawing.marked("<i>tea</i> or tea?", [[14, 17], [3, 6]])
    assert "".join(c.text for c in chips) == "<i>tea</i> or tea?"
    assert [c.text for c in chips if c.is_marked] == ["tea", "tea"]
    assert [c.is_marked for c in drawing.marked("coffee", [])] == [False]


def test_a_token_in_two_parts_shows_the_inner_one_and_says_both() -> None:
    chips = drawing.spans_on(["Do", " not", " say", " X"], {"instruction": (0, 4), "mention": (3, 4)})
    assert chips[3].note == "3 ␣X: mention, instruction"
    assert chips[3].underline != chips[2].underline != ""
    assert drawing.spans_on(["a"], {})[0].underline == ""


def test_shares_above_the_scale_take_its_end_and_still_say_their_number() -> None:
    rows = pd.DataFrame({"layer": [0, 0], "position": [0, 1], "share": [0.9, 0.1]})
    option = drawing.share_grid(rows, ["<s>", "{b}"], 0.2)
    first, second = option["series"][0]["data"]
    assert (first["value"], second["value"]) == ([0, 0, 0.2], [1, 0, 0.1])
    assert "0.9000 of the attention" in first["tooltip"]["formatter"]
    assert "<s>" not in first["tooltip"]["formatter"]
    assert "{" not in second["tooltip"]["formatter"]


def test_ratios_without_a_span_have_no_curve() -> None:
    rows = pd.DataFrame(
        {"condition": "reframed", "layer": [0, 1], "iar": [0.5, 0.6], "nf": None, "tmf": None, "pi": None}
    )
    option = drawing.ratio_lines(rows.astype({"nf": float, "tmf": float, "pi": float}), "reframed", 0, 1)
    assert [s["name"] for s in option["series"]] == ["IAR"]
    assert drawing.ratio_range([rows.assign(pi=[-0.05, 0.1])]) == (-0.2, 1.0)
    assert drawing.ratio_range([]) == (0.0, 1.0)


# -- the page


def test_next_and_previous_walk_through_the_filter_and_pin_keeps_one(opened: RunPaths, ids: list[str]) -> None:
    test = page()
    assert not test.exception
    assert any(t.value == f"1 of {len(ids)}" for t in test.text)
    assert button(test, "Previous").disabled
    test = button(test, "Next").click().run()
    assert test.session_state["prompt"] == ids[1]
    assert any(t.value == f"2 of {len(ids)}" for t in test.text)
    test = button(button(test, "Pin").click().run(), "Next").click().run()
    assert not test.exception
    assert (test.session_state["pin"], test.session_state["prompt"]) == (ids[1], ids[2])
    assert len([c for c in test.code if ids[1] in c.value and "(pinned)" in c.value]) == 1
    assert button(page(prompt=ids[-1]), "Next").disabled


def test_a_prompt_outside_the_filter_is_shown_and_next_leads_into_it(opened: RunPaths) -> None:
    with Reader(opened.live, SCHEMA) as reader:
        rows = reader.query("SELECT prompt_id, outcome FROM outcomes WHERE condition = 'negative' ORDER BY prompt_id")
    failures = [r["prompt_id"] for r in rows if r["outcome"] == "failure"]
    kept = next(r["prompt_id"] for r in rows if r["outcome"] == "success")
    test = page(prompt=kept, outcome="failure", condition="negative")
    assert any(t.value == f"not among the filter's {len(failures)}" for t in test.text)
    assert button(test, "Previous").disabled
    assert button(test, "Next").click().run().session_state["prompt"] == failures[0]


def test_every_side_is_there_for_two_prompts_at_every_step(opened: RunPaths, ids: list[str]) -> None:
    one = page(prompt=ids[0])
    two = page(prompt=ids[0], pin=ids[3], step="decision")
    assert not two.exception
    titles = [s.value for s in two.subheader]
    assert titles == [s.value for s in one.subheader]
    assert {"What the model sees", "Pressure of X", "Samples", "Attention ratios", "Logit lens", "Contributions", "Patching",
            "Residual norms", "Events"} <= set(titles)  # fmt: skip
    assert len(two.dataframe) == 2 * len(one.dataframe)


def test_a_run_that_measured_only_pressure_says_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.write(tmp_path, Shape(8, 3, 2, 2, num_bootstraps=20, mechanism=False))
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = page()
    assert not test.exception
    assert sum("Not measured" in i.value for i in test.info) >= 5
