"""The pages Neurons and Token heat map: every control, the state in the link, whatever a run lacks, and hostile text."""

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
from streamlit.testing.v1 import AppTest

from app import queries
from app.experiments import pages_of
from app.queries.neurons import EXAMPLES
from app.queries.neurons import neurons as ask
from harness.run import RunPaths
from tests.app.conftest import open_file, open_view
from tests.app.neurons.conftest import WHOLE
from tests.neurons.synthetic import HOSTILE

PAGES = {page.name: page.file for page in pages_of("neurons")}
SECTIONS = ["Where the ranking lies", "Ranking", "Peak against influence", "One neuron", "Effects against claims",
            "Sets of neurons, kept and dropped"]  # fmt: skip
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def told_by(test: AppTest) -> str:
    return "\n".join(str(e.value) for e in [*test.caption, *test.info, *test.warning, *test.text, *test.code])


def page(name: str = "neurons", **params: str | list[str]) -> AppTest:
    test = open_file(PAGES[name], **params)
    assert not test.exception, [e.value for e in test.exception]
    assert "cannot be shown" not in told_by(test), told_by(test)
    return test


def labels(test: AppTest, kind: str) -> dict[str, Any]:
    return {box.label: box for box in getattr(test, kind)}


# -- Neurons


@pytest.mark.parametrize("name", PAGES)
def test_without_a_run_a_page_says_how_to_start_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert "harness run neurons" in told_by(page(name))


@pytest.mark.usefixtures("opened")
def test_a_finished_run_shows_every_part_with_a_file_to_download() -> None:
    test = page()
    assert [s.value for s in test.subheader] == SECTIONS
    told = told_by(test)
    assert "Peaks are not influence" in told
    assert "A metric keeps the neurons that it ranks first in each prompt" in told
    assert "bootstrap over prompts" in told
    keys = {b.key for b in test.get("download_button")}
    assert {
        f"download-{n}" for n in ("density", "ranking", "peak-against-influence", "effects", "agreement", "curves")
    } <= keys
    test = page(neuron="1.3")
    assert "Neuron 1.3" in [s.value for s in test.subheader]
    told = told_by(test)
    assert "norm" in told
    assert "the measured one is what happened" in told
    keys = {b.key for b in test.get("download_button")}
    assert {
        f"download-{n}" for n in ("statistics", "examples", "writes-raised", "writes-lowered", "writes-explicit")
    } <= keys


@pytest.mark.usefixtures("opened")
def test_the_view_comes_from_the_address() -> None:
    test = page(by="peak", layers=["1", "2"], q="0.5", sign="negative", share="0.001", page="1", metric="relp", prompt="p0004",
                neuron="2.7")  # fmt: skip
    boxes, numbers = labels(test, "selectbox"), labels(test, "number_input")
    assert (boxes["Rank by"].value, boxes["Metric"].value, boxes["Prompt"].value) == ("peak", "relp", "p0004")
    assert tuple(labels(test, "slider")["Layers"].value) == (1, 2)
    assert (numbers["q at most"].value, numbers["Share at least"].value) == (0.5, 0.001)
    assert test.session_state["sign"] == "negative"
    assert "Neuron 2.7" in [s.value for s in test.subheader]
    assert "prompt p0004; peaks are of all prompts" in told_by(test)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(
    "params",
    [
        {"by": "no such"}, {"layers": ["7", "99"]}, {"layers": "x"}, {"q": "nan"}, {"q": "-3"}, {"sign": "both"}, {"share": "9"},
        {"page": "999"}, {"page": "-1"}, {"metric": "none"}, {"prompt": "no such"}, {"neuron": "99.99999"},
        {"neuron": "<b>1.2</b>"}, {"neuron": "1.3", "prompt": "p0004", "by": "effect", "sign": "positive", "q": "0"},
    ],
)  # fmt: skip
def test_what_an_address_cannot_mean_is_left_out(params: dict[str, Any]) -> None:
    page("neurons", **params)
    page("heat_map", **params)


@pytest.mark.usefixtures("opened")
def test_every_control_changes_what_is_shown() -> None:
    test = page()
    for name in ask.RANKINGS:
        labels(test, "selectbox")["Rank by"].set_value(name)
        test.run()
        assert not test.exception
        assert ask.RANKINGS[name] in told_by(test)
    labels(test, "slider")["Layers"].set_value((1, 1))
    test.run()
    assert f"of {WHOLE.num_neurons:,}" in told_by(test)
    labels(test, "number_input")["q at most"].set_value(0.0)
    test.run()
    assert not test.exception
    labels(test, "text_input")["Neuron"].set_value("1.3")
    test.run()
    assert "Neuron 1.3" in [s.value for s in test.subheader]
    labels(test, "text_input")["Neuron"].set_value("what")
    test.run()
    assert "expected layer.number" in told_by(test)
    for metric in WHOLE.metrics:
        labels(test, "selectbox")["Metric"].set_value(metric)
        test.run()
        assert not test.exception
        assert f"the claim of {metric} (" in told_by(test)
    labels(test, "selectbox")["Prompt"].set_value("p0005")
    test.run()
    assert "Of the chosen prompt alone, without intervals" in told_by(test)


@pytest.mark.usefixtures("opened")
def test_a_page_beyond_the_last_is_none() -> None:
    test = page(by="peak", page="2")
    assert "Neurons 51 to 96 of 96" in told_by(test)
    test = page(by="peak", page="77")
    assert "Neurons 1 to 50 of 96" in told_by(test)


def test_a_running_run_says_what_is_not_there_yet_and_which_stage_makes_it(opened: dict[str, RunPaths]) -> None:
    told = told_by(page(run=opened["running"].run_id, neuron="0.1"))
    assert "running" in told
    assert "Measured effects: not yet. The stage `effects` makes that." in told
    assert "Curves: not yet" in told
    assert "Its write tokens: not yet. The stage `writes` makes that." in told
    told = told_by(page(run=opened["early"].run_id, neuron="0.1"))
    assert "Statistics and rankings of neurons: not yet. The stage `peaks` makes that." in told
    assert "has no row in this run" in told
    for name in ("running", "early"):
        page("heat_map", run=opened[name].run_id, neuron="0.1")


def test_a_run_of_some_stages_says_which_were_not_run(opened: dict[str, RunPaths]) -> None:
    test = page(run=opened["peaks"].run_id, neuron="0.1")
    told = told_by(test)
    assert "Influence on a target: not in this run. The stage `influence` makes that." in told
    assert "unless `neurons.effects` switches it off" in told
    assert labels(test, "selectbox")["Rank by"].options == ["peak", "background"]
    assert not labels(test, "selectbox")["Metric"].options


def _emptied(paths: RunPaths, folder: Path, *tables: str) -> RunPaths:
    shutil.copytree(paths.folder, folder / paths.run_id)
    copied = RunPaths(folder / paths.run_id)
    with duckdb.connect(str(copied.live)) as con:
        for table in tables:
            con.execute(f"DELETE FROM {table}")
    return copied


@pytest.mark.parametrize(
    "table",
    ["vocabulary", "prompts", "contexts", "neuron_rows", "artifacts", "neurons", "targets", "influence", "influence_totals",
     "effects", "curves", "neuron_writes", "statistics"],
)  # fmt: skip
def test_any_table_may_be_empty(
    runs: dict[str, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    _emptied(runs["whole"], tmp_path, table)
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    for name in PAGES:
        page(name, neuron="1.3", prompt="p0004")
        page(name)


# -- Token heat map


@pytest.mark.usefixtures("opened")
def test_the_map_draws_the_first_prompt_and_its_first_neuron() -> None:
    test = page("heat_map")
    told = told_by(test)
    assert "No prompt and no neuron is chosen in the sidebar: the first is shown" in told
    assert "Scale: one for all that is compared (" in told
    assert "opacity .05 + .95·log10(1 + 9r), r = |a| / scale; no colour under 5e-05" in told
    assert {"download-token-heat-map", "download-candidates"} <= {b.key for b in test.get("download_button")}


@pytest.mark.usefixtures("opened")
def test_the_map_comes_from_the_address() -> None:
    test = page("heat_map", prompt="p0004", pin="p0006", neuron="1.3", also="0.1 2.5", scale="one for each prompt",
                shape="power", power="3", threshold="0.01", row="7")  # fmt: skip
    told = told_by(test)
    assert "Bars under each token, from above: 1. 1.3, 2. 0.1, 3. 2.5." in told
    assert "Scale: one for each prompt (p0004 " in told
    assert ", p0006 " in told
    assert "r^3" in told
    assert "no colour under 0.01" in told
    assert labels(test, "number_input")["Tokens a row"].value == 7
    assert labels(test, "selectbox")["A second prompt beside it"].value == "p0006"


@pytest.mark.usefixtures("opened")
def test_no_more_than_four_neurons_are_drawn_and_each_once() -> None:
    told = told_by(page("heat_map", neuron="1.3", also="0.1,0.2 0.3, 0.4 0.1 what"))
    assert "1. 1.3, 2. 0.1, 3. 0.2, 4. 0.3." in told
    assert "The first 4 neurons are drawn" in told
    assert "What is no neuron is left out" in told


@pytest.mark.usefixtures("opened")
def test_every_control_of_the_map_changes_it() -> None:
    test = page("heat_map", prompt="p0004", neuron="1.3")
    for shape, formula in (("linear", "·r,"), ("square root", "√r"), ("power", "r^2"), ("logarithm", "log10(1 + 9r)")):
        labels(test, "selectbox")["From |a| / scale to opacity"].set_value(shape)
        test.run()
        assert formula in told_by(test)
    for scale in ("one for each prompt", "one for each neuron", "one for all that is compared"):
        labels(test, "selectbox")["Scale of |a|"].set_value(scale)
        test.run()
        assert f"Scale: {scale}" in told_by(test)
    labels(test, "number_input")["No colour under |a| ="].set_value(0.5)
    test.run()
    assert "no colour under 0.5" in told_by(test)
    labels(test, "selectbox")["A second prompt beside it"].set_value("p0004")
    test.run()
    assert not test.exception, "the same prompt twice is one"


def test_without_a_dump_the_setting_is_named_and_peaks_are_known(opened: dict[str, RunPaths]) -> None:
    told = told_by(page("heat_map", run=opened["no_dump"].run_id, prompt="p0003", neuron="1.3"))
    assert "`neurons.dump` was off" in told
    assert "Set it to `float16`" in told
    told = told_by(page("heat_map", run=opened["early"].run_id, prompt="p0001", neuron="1.3"))
    assert "not yet. The stage `dump` makes that." in told
    told = told_by(page("heat_map", prompt="p0011", neuron="1.3"))
    assert "Activations of p0011: not in this run" in told, "this prompt alone has no file"


def test_a_missing_file_is_a_line_and_not_the_end_of_the_page(
    runs: dict[str, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _emptied(runs["whole"], tmp_path)
    for file in (paths.artifacts / "dump").iterdir():
        file.unlink()
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = page("heat_map", prompt="p0003", neuron="1.3")
    assert "The file of these activations cannot be read" in told_by(test)
    assert "Neurons to look at" in [s.value for s in test.subheader]


@pytest.mark.usefixtures("opened")
def test_a_neuron_that_no_file_has_is_named() -> None:
    assert "Not in the files of this run: 2.9999" in told_by(page("heat_map", prompt="p0003", neuron="2.9999"))


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_stands_nowhere_as_markup(number: int) -> None:
    for name in PAGES:
        test = page(name, prompt=f"p{number:04d}", neuron="1.3")
        marked = [str(m.value) for m in [*test.markdown, *test.caption, *test.info, *test.warning, *test.subheader]]
        assert not any(sign in text for text in marked for sign in ("<script", "<b>", "\x1b", "\u202e", "\x9b"))


def test_an_id_that_is_markup_is_shown_as_text(
    runs: dict[str, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _emptied(runs["whole"], tmp_path)
    hostile = "![x](http://127.0.0.1/x.png)<img src=x onerror=alert(1)>"
    with duckdb.connect(str(paths.live)) as con:
        for table in ("prompts", "contexts", "influence", "influence_totals", "effects", "curves", "targets"):
            con.execute(f"UPDATE {table} SET prompt_id = ? WHERE prompt_id = 'p0011'", [hostile])
        con.execute("UPDATE influence_totals SET metric = ? WHERE prompt_id = ? AND metric = 'ig'", [hostile, hostile])
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    for name in PAGES:
        test = page(name, prompt=hostile, neuron="1.3")
        marked = [str(m.value) for m in [*test.markdown, *test.caption, *test.info, *test.warning, *test.subheader]]
        assert not any("![" in text or "<img" in text for text in marked)
        assert hostile not in labels(test, "selectbox")["Metric"].options


# -- what the core shows of it


@pytest.mark.parametrize("title", EXAMPLES)
def test_every_example_is_answered(runs: dict[str, RunPaths], title: str) -> None:
    rows = queries.ask(runs["whole"], EXAMPLES[title])
    assert len(rows) or title in ("Loud, and of no influence", "Beyond the background"), "planted runs may have none"


def test_the_page_of_questions_offers_the_examples_and_the_filters(opened: dict[str, RunPaths]) -> None:
    test = open_view("sql", run=opened["whole"].run_id)
    assert not test.exception
    assert set(EXAMPLES) <= {b.label for b in test.button}
    assert {"Prompt", "Metric"} <= {b.label for b in test.selectbox}


def test_two_runs_are_compared(opened: dict[str, RunPaths]) -> None:
    whole, other = opened["whole"].run_id, opened["no_dump"].run_id
    for measure in ("spearman", "area_keep"):
        test = open_view("runs", run=whole, part="Compare", other=other, compared=measure)
        assert not test.exception
        assert "difference = other − this" in told_by(test)
    test = open_view("runs", run=whole, part="Compare", other=opened["running"].run_id)
    assert "The other run has no statistics." in [i.value for i in test.info]
