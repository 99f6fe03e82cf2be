"""The activations page: norms against their layer's mean, neurons with their sign, and what is not there is said."""

from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.gravity import activations as drawing
from app.queries.gravity import EVERY
from app.queries.gravity import activations as asking
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Store
from tests import synthetic
from tests.app.conftest import open_view, page_file, store_of
from tests.synthetic import Shape

PAGE = page_file("activations")
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def few(store: Store) -> None:
    """Two prompts and two layers; the second prompt fails. Neuron 5 recurs."""
    store._insert("prompts", [{"prompt_id": p, "category": "facts", "target": "X", "question": "Which?"} for p in "ab"])
    store._insert("contexts", [{"prompt_id": "a", "condition": "negative", "text": "No\nX X", "token_ids": [7, 8, 8],
                                "offsets": [[0, 2], [2, 4], [4, 6]]}])  # fmt: skip
    key = {"condition": "negative", "mode": "greedy", "sample_id": 0}
    store._insert("detections", [key | {"prompt_id": p, "word_present": p == "b"} for p in "ab"])
    neurons = {("a", 0): ([5, 9], [4.0, -3.0]), ("b", 0): ([5, 1], [-2.0, 1.0])}
    store._insert("activations", [
        {"prompt_id": p, "condition": "negative", "layer": layer, "resid_norm": [1.0, 2.0, 6.0] if layer == 0 else [4.0] * 3,
         "top_neurons": neurons.get((p, layer), (None, None))[0], "top_values": neurons.get((p, layer), (None, None))[1]}
        for p in "ab" for layer in (0, 1)
    ])  # fmt: skip
    store._insert("artifacts", [{"path": "resid/b.safetensors", "kind": "resid", "prompt_id": "b", "condition": "negative",
                                 "bytes": 10, "shape": [3, 4], "dtype": "float32", "sha256": "0"}])  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return store_of(tmp_path_factory.mktemp("few"), few)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.write(tmp_path_factory.mktemp("runs"), Shape(20, 3, 2, 2, num_bootstraps=20))


@pytest.fixture
def opened(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("OUTPUT_ROOT", str(run.folder.parent))
    return run


def page(**params: str) -> AppTest:
    return open_view(PAGE.stem, **params)


# -- questions


def test_norms_are_relative_to_their_layers_mean(paths: RunPaths) -> None:
    rows = asking.norms(paths, "a", "negative")
    first = rows[rows["layer"] == 0]
    assert list(first["norm"]) == [1, 2, 6]
    assert list(first["mean"]) == [3, 3, 3]
    assert list(first["relative"]) == pytest.approx([1 / 3, 2 / 3, 2])
    assert asking.norms(paths, "a", "baseline").empty


def test_tokens_are_the_pieces_of_the_text(paths: RunPaths) -> None:
    assert "".join(asking.tokens(paths, "a", "negative")) == "No\nX X"
    assert asking.tokens(paths, "b", "negative") == [], "its context is not stored"


def test_recurring_neurons_are_counted_by_outcome(paths: RunPaths) -> None:
    rows = asking.recurring(paths, "negative", 0, *EVERY).set_index("neuron")
    assert rows.index[0] == 5
    assert list(rows.loc[5][["prompts", "success", "failure"]]) == [2, 1, 1]
    assert (rows.loc[5]["mean_success"], rows.loc[5]["mean_failure"]) == (4.0, -2.0)
    assert pd.isna(rows["mean_failure"][9]), "never among a failure's largest: no mean, not zero"
    assert asking.measured(paths, "negative", 0, *EVERY) == {"all": 2, "success": 1, "failure": 1}
    assert asking.measured(paths, "negative", 1, *EVERY)["all"] == 0
    assert set(asking.recurring(paths, "negative", 0, "prompt_id = ?", ["a"]).neuron) == {5, 9}


def test_prompts_with_files_are_offered_first(paths: RunPaths) -> None:
    assert list(asking.offered(paths, "negative", *EVERY)["prompt_id"]) == ["b", "a"]
    assert asking.num_files(paths, *EVERY) == 1
    assert list(asking.files(paths, "prompt_id = ?", ["a"])["path"]) == []


# -- drawings


def test_the_grids_colour_is_symmetric_around_the_layers_mean_and_shared(paths: RunPaths) -> None:
    rows = asking.norms(paths, "a", "negative")
    low, high = drawing.span([rows, rows[rows["layer"] == 1]], "relative")
    assert (low, high) == pytest.approx((-1.584963, 1.584963))
    option = drawing.grid(rows, ["No", "\nX", " X{b}"], scale="relative", low=low, high=high)
    assert option["xAxis"]["data"] == ["0 No", "1 ⏎X", "2 ␣X{b}"], "equal tokens differ by their place"
    assert all(
        "<" not in i["tooltip"]["formatter"] and "{" not in i["tooltip"]["formatter"]
        for i in option["series"][0]["data"]
    )
    assert option["series"][0]["data"][2]["value"] == [2, 0, 1.0], "twice the mean is one octave"
    low, high = drawing.span([rows], "norm")
    assert (low, high) == pytest.approx((0, 0.778151))


def test_a_norm_of_zero_is_missing_where_colours_are_logarithms() -> None:
    rows = pd.DataFrame({"layer": [0, 0], "position": [0, 1], "norm": [0.0, 2.0], "mean": 1.0, "relative": [0.0, 2.0]})
    option = drawing.grid(rows, [], scale="relative", low=-1, high=1)
    assert [item.get("visualMap") for item in option["series"][0]["data"]] == [None, False]


def test_chips_are_green_above_the_mean_and_orange_below_with_logarithmic_opacity(paths: RunPaths) -> None:
    rows = drawing.of_layer(asking.norms(paths, "a", "negative"), 0)
    top = drawing.furthest([rows])
    assert top == pytest.approx(1.0)
    below, _, above = drawing.chips(rows, ["No", "\nX"], top)
    assert above.colour == "rgba(0, 158, 115, 1.000)"
    assert below.colour.startswith("rgba(230, 159, 0, 0.737"), "log(1 + 2/3) / log(2)"
    assert above.text == "[2]", "a token whose text is not known is its number"
    assert "0.333 × the layer's mean (3)" in below.note
    assert "0.333 to 2 × the layer's mean norm (3)" in drawing.chips_note(rows, top)


def test_bars_share_an_axis_around_zero() -> None:
    rows = pd.DataFrame({"neuron": [5, 9], "value": [4.0, -3.0]})
    option = drawing.bars(rows, top=drawing.round_up(4.0))
    assert (option["xAxis"]["min"], option["xAxis"]["max"]) == (-5, 5)
    assert option["yAxis"]["data"] == ["9", "5"], "the largest stands on top"
    assert [drawing.round_up(v) for v in (0.0, 0.013, 20, 21)] == [1.0, 0.02, 20, 50]


def test_a_neuron_that_is_not_among_the_largest_elsewhere_is_empty_there() -> None:
    own = pd.DataFrame({"layer": [0, 0], "rank": [1, 2], "neuron": [5, 9], "value": [4.0, -3.0]})
    other = pd.DataFrame({"layer": [0], "rank": [1], "neuron": [5], "value": [-2.0]})
    table = drawing.neuron_table(own, [("negative", own), ("baseline", other)])
    assert list(table["negative"]) == [4.0, -3.0]
    assert table["baseline"][0] == -2.0
    assert pd.isna(table["baseline"][1])


# -- the page


def test_without_a_prompt_some_are_offered_and_with_one_it_is_shown(opened: RunPaths) -> None:
    test = page()
    assert not test.exception
    offered = next(d.value for d in test.dataframe if "question" in d.value.columns)
    prompt = str(offered["prompt_id"][0])
    assert not any(prompt in t.value for t in test.text)
    test = page(prompt=prompt, pin=str(offered["prompt_id"][1]), layer="1")
    assert not test.exception
    titles = [t.value for t in test.text]
    assert f"{prompt}, negative" in titles
    assert f"{prompt}, baseline" in titles
    assert any(t.endswith("negative, pinned") for t in titles)
    assert any("Layer 1;" in c.value for c in test.caption)


def test_a_layer_of_a_deeper_run_breaks_nothing(opened: RunPaths) -> None:
    test = page(layer="99")
    assert not test.exception
    assert next(b.value for b in test.selectbox if b.label == "Layer") == 2, "the last one instead"


def test_a_family_without_one_list_of_neurons_says_so(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = tmp_path / run.run_id
    shutil.copytree(run.folder, folder)
    copied = RunPaths(folder)
    with Store(copied.results, SCHEMA) as store:
        store._con.execute("UPDATE activations SET top_neurons = NULL, top_values = NULL")
        store.publish(copied.live)
        prompt = store.query("SELECT min(prompt_id) AS p FROM prompts")[0]["p"]
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = page(prompt=prompt)
    assert not test.exception
    assert any("no single list" in i.value for i in test.info)
    assert not any("recur" in s.value for s in test.subheader)
