"""The review app by AppTest: it opens on no run, a finished, a broken and an empty one, and shows what the store holds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import charts
from harness import launch
from harness.run import list_runs
from harness.settings import resolve
from harness.stats import fit_violations

PAGES = Path(__file__).parent.parent / "app" / "pages"
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, one broken folder and one run without results."""
    root = tmp_path_factory.mktemp("app") / "runs"
    flags = {"data.limit": "15", "experiment.num_samples": "4", "paths.runs": str(root), "runtime.device": "cpu"}
    assert launch.run(resolve(flags, environ={})) == 0
    (root / "20200101-000000-broken-00000000").mkdir()
    (root / "20200101-000000-broken-00000000" / "manifest.json").write_text("{ torn")
    empty = root / "20200102-000000-empty-00000000"
    empty.mkdir()
    manifest = {"run_id": empty.name, "fingerprint": "0", "status": "running", "heartbeat": "2020-01-02T00:00:00+00:00"}
    (empty / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def opened(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(finished))


def page(name: str, **params: str) -> AppTest:
    test = AppTest.from_file(str(PAGES / f"{name}.py"), default_timeout=60)
    for key, value in params.items():
        test.query_params[key] = value
    return test.run()


@pytest.mark.parametrize("name", ["runs", "pressure", "answers"])
def test_a_page_opens_on_no_run_and_says_how_to_start_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = page(name)
    assert not test.exception
    assert "harness run" in test.info[0].value


@pytest.mark.usefixtures("opened")
def test_runs_are_listed_with_their_state_and_a_broken_one_with_its_reason() -> None:
    test = page("runs")
    assert not test.exception
    table = test.dataframe[0].value.set_index("run")
    assert list(table["status"]) == ["finished", "stopped", "broken"]
    assert "JSON" in table.loc["20200101-000000-broken-00000000", "reason"]


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("name", ["runs", "pressure", "answers"])
def test_a_run_without_results_says_so(name: str) -> None:
    test = page(name, run="20200102-000000-empty-00000000")
    assert not test.exception
    assert any("no snapshot yet" in w.value for w in [*test.warning, *test.caption])


@pytest.mark.usefixtures("opened")
def test_pressure_shows_the_numbers_of_the_store_and_that_they_are_planted(finished: Path) -> None:
    test = page("pressure", condition="negative")
    assert not test.exception
    metrics = {m.label: m.value for m in test.metric}
    assert metrics["prompts"] == "15"
    assert any("planted" in c.value for c in test.caption)
    bins = test.dataframe[0].value
    assert int(bins["prompts"].sum()) == 15
    assert test.query_params["run"] == list_runs(finished)[0].paths.run_id, "a copied link opens the same run"


@pytest.mark.usefixtures("opened")
def test_answers_are_filtered_by_what_was_detected() -> None:
    test = page("answers", condition="baseline")
    assert not test.exception
    assert len(test.dataframe[0].value) == 15 * 4
    next(b for b in test.selectbox if b.label == "Says X").select("true").run()
    assert set(test.dataframe[0].value["word_present"]) == {True}


def test_the_curve_is_drawn_through_the_fit() -> None:
    p0 = np.linspace(0.05, 0.95, 40)
    fit = fit_violations(p0, np.round(16 / (1 + np.exp(2.4 - 2.27 * p0))), np.full(40, 16.0), num_bootstraps=50)
    assert fit is not None
    points = pd.DataFrame({"p0": p0, "rate": 0.2, "prompt_id": "a", "category": "facts", "target": "x"})
    spec = charts.rate_against_pressure(points, fit).to_dict()
    assert len(spec["layer"]) == 2
    assert len(charts.rate_against_pressure(points, None).to_dict()["layer"]) == 1
