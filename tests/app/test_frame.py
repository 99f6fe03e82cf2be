"""What every page must do: open on any run without an exception, say what is missing, keep its state in the address."""

from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.chips import shade
from app.experiments import CORE, names, pages_of
from app.frame import csv_of, for_spreadsheets
from harness.experiments.gravity.schema import SCHEMA
from tests.app.conftest import BROKEN, EMPTY, FAILED, OLDER, PAGES, RUNNING, open_view

VIEWS = Path(__file__).parents[2] / "app" / "views"
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def page(name: str, **params: str) -> AppTest:
    """A page as it opens at an address."""
    return open_view(name, **params)


def told(test: AppTest) -> str:
    """Everything the page says in words."""
    return "\n".join(str(e.value) for e in [*test.info, *test.warning, *test.caption, *test.markdown])


def test_there_is_a_file_for_every_page_and_a_page_for_every_file() -> None:
    files = {p.relative_to(VIEWS).as_posix() for p in VIEWS.rglob("*.py")}
    pages = [*CORE, *(page for name in names() for page in pages_of(name))]
    assert files - {page.file.relative_to(VIEWS).as_posix() for page in pages} == {
        "__init__.py",
        "core/__init__.py",
        "gravity/__init__.py",
        "gravity/extras.py",
        "lda/__init__.py",
        "lda/extras.py",
        "neurons/__init__.py",
        "neurons/extras.py",
        "neurons/tokens.py",
    }
    assert all(page.file.exists() for page in pages)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_where_there_is_no_run_and_says_how_to_start_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    test = page(name)
    assert not test.exception
    assert "harness run" in told(test)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    "run", ["", EMPTY, OLDER, RUNNING, FAILED], ids=["finished", "empty", "older", "running", "failed"]
)
def test_a_page_opens_on_any_run_without_an_exception(name: str, run: str) -> None:
    test = page(name, **({"run": run} if run else {}))
    assert not test.exception, [e.value for e in test.exception]
    if run == EMPTY:
        assert "no results" in told(test)
    if run in (RUNNING, FAILED):
        assert run.split("-")[2] in told(test)
    if not run:
        assert "planted" in told(test)


@pytest.mark.usefixtures("opened")
def test_a_broken_run_is_no_choice_and_breaks_nothing() -> None:
    test = page("pressure")
    (runs,) = (b for b in test.selectbox if b.label == "Run")
    assert BROKEN not in runs.options
    assert EMPTY in runs.options


@pytest.mark.usefixtures("opened")
def test_filters_come_from_the_address_and_what_is_not_known_is_left_out() -> None:
    test = page("pressure", category="facts", outcome="failure", run=RUNNING, condition="no such")
    values = {b.label: b.value for b in test.selectbox}
    assert (values["Run"], values["Category"], values["Condition"]) == (RUNNING, "facts", "negative")
    assert not test.exception


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("name", [n for n in PAGES if n not in ("runs", "sql")])
def test_a_chosen_prompt_is_shown_with_any_filter(name: str, root: Path) -> None:
    from harness.run import list_runs
    from harness.store import Reader

    with Reader(list_runs(root)[0].paths.live, SCHEMA) as reader:
        ids = [r["prompt_id"] for r in reader.query("SELECT prompt_id FROM prompts ORDER BY 1")]
    for outcome in ("all", "failure"):
        test = page(name, prompt=ids[0], pin=ids[1], outcome=outcome)
        assert not test.exception, [e.value for e in test.exception]


def test_downloads_hold_lists_that_can_be_read_back() -> None:
    data = pd.DataFrame({"a": [1, 2], "rows": [[0.5, 0.25], None], "text": ['<b>"x"</b>', "ü"]})
    back = pd.read_csv(__import__("io").BytesIO(csv_of(data)))
    assert list(back["rows"].fillna("")) == ["[0.5, 0.25]", ""]
    assert list(back["text"]) == ['<b>"x"</b>', "ü"]


def test_a_shade_is_none_for_what_was_not_measured_and_never_leaves_its_range() -> None:
    assert shade(None, 1.0) == shade(float("nan"), 1.0) == shade(0.5, 0.0) == ""
    assert shade(0.0, 1.0).endswith("0.000)")
    assert shade(2.0, 1.0) == shade(1.0, 1.0)


def test_text_that_a_spreadsheet_would_compute_is_marked_and_counted_and_numbers_stay() -> None:
    data = pd.DataFrame({"@name": ["=1", "a", None, "=1"], "kind": pd.Categorical(["+x", "y", "y", "y"]),
                         "number": [-1.5, 2, 3, 4], "lists": [[-1], [], ["=a"], [1]]})  # fmt: skip
    before = data.copy(deep=True)
    safe, number = for_spreadsheets(data)
    assert number == 4, "three cells and a name"
    assert safe["'@name"].to_list()[:2] == ["'=1", "a"]
    assert list(safe["kind"]) == ["'+x", "y", "y", "y"]
    assert safe["number"].equals(data["number"])
    assert safe["lists"].to_list() == data["lists"].to_list()
    pd.testing.assert_frame_equal(data, before)
    assert for_spreadsheets(data[["number"]])[1] == 0
