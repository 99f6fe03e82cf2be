"""The app as a house of several experiments: what the navigation offers, whose runs a page shows, what the core knows."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import experiments
from app.experiments import CORE, Extras, Page
from app.queries import runs as asked
from harness.errors import SettingsError
from harness.experiments.remarks import Remark
from harness.run import Manifest, RunEntry, RunPaths, list_runs
from harness.store import Reader, Schema, Store
from tests import synthetic
from tests.app.conftest import PAGES, open_file, open_view, page_file
from tests.commands import saying
from tests.synthetic import Shape

APP = Path(__file__).parents[2] / "app"
PAGE = '''
"""What a page of somebody else looks like."""

import streamlit as st

from app import frame
from app.selection import Selection

selected = frame.open_page(__file__, Selection)
if selected:
    st.text(f"{selected.paths.run_id} has {selected.manifest.tree['marbles']} marbles")
'''
EXTRAS = """
import streamlit as st
from app.experiments import Extras

EXTRAS = Extras(
    examples={"Marbles": "SELECT 7 AS marbles"},
    compare=lambda selected, entry, other: st.text("marbles side by side"),
)
"""
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


TOO_MANY = "Too many marbles. Take some away."


class Toy:
    """An experiment from outside: a table of its own, and two pages, one at an address that is taken."""

    name, title = "toy", "Marbles"
    planted = "These marbles are painted."
    schema = Schema("toy", ("CREATE TABLE marbles (marble INTEGER PRIMARY KEY)",))

    def __init__(self, folder: Path):
        pages = (("marbles", "Heap", ("heap",)), ("prompt", "One marble", ()))
        for name, _, _ in pages:
            (folder / f"{name}.py").write_text(PAGE)
        (folder / "extras.py").write_text(EXTRAS)
        self.pages = tuple(Page(name, title, folder / f"{name}.py", ("stages",), kinds) for name, title, kinds in pages)

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        assert "marbles" in reader.tables()
        return [Remark("heap", None, 3, 3, "Too many marbles.", "Take some away.", "a heap")]


@pytest.fixture
def toy(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The same, installed, after the experiments that are."""
    toy, names, get = Toy(tmp_path_factory.mktemp("toy")), experiments.names, experiments.get
    monkeypatch.setattr(experiments, "names", lambda: (*names(), "toy"))
    monkeypatch.setattr(experiments, "get", lambda name: toy if name == "toy" else get(name))
    return toy


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default experiment, two of the toy, which are newer, and one of an experiment nobody has."""
    root = tmp_path_factory.mktemp("house")
    paths = synthetic.write(root, Shape(6, 2, 2, 2, num_bootstraps=20))
    manifest = json.loads(paths.manifest.read_text())
    for name, told in (
        ("20990101-000000-toy-0", {"experiment": "toy", "marbles": 3, "planted": True}),
        ("20990102-000000-toy-0", {"experiment": "toy", "marbles": 4, "planted": False}),
        ("20990103-000000-gone-0", {"experiment": "gone"}),
    ):
        if told["experiment"] == "toy":
            marbles_of(root / name, manifest | told)
        else:
            (root / name).mkdir()
            (root / name / "manifest.json").write_text(json.dumps(manifest | told | {"run_id": name}))
            (root / name / "live.duckdb").write_bytes(paths.live.read_bytes())
    return root


def marbles_of(folder: Path, manifest: dict[str, Any]) -> None:
    """A run of the toy in a new folder, with the store of one."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"run_id": folder.name}))
    with Store(folder / "results.duckdb", Toy.schema) as store:
        store.start_stage("marbles", 1, 1)
        store.publish(folder / "live.duckdb")


@pytest.fixture
def opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    return root


def runs_offered(test: AppTest) -> Sequence[str]:
    return next(box for box in test.selectbox if box.label == "Run").options


def entry(**manifest: Any) -> RunEntry:
    return RunEntry(RunPaths(Path("x")), saying(manifest), None)


def test_the_core_names_no_experiment() -> None:
    def named(text: str) -> list[str]:
        return re.findall(r"gravity|p_?sem|baseline|negative|condition|\blda\b|amplif|neuron", text, re.IGNORECASE)

    for file in APP.rglob("*.py"):
        if not {"gravity", "lda", "neurons"} & set(file.parts):
            text = re.sub(r"# Stands in for .*?# Until here\.", "", file.read_text("utf-8"), flags=re.DOTALL)
            assert named(text) == [], file
    for name in ("gravity/pressure.py", "lda/amplification.py", "neurons/heat_map.py"):
        assert named((APP / "queries" / name).read_text("utf-8"))  # control


def test_the_navigation_has_the_core_and_the_experiments_that_have_a_run(toy: Toy) -> None:
    default = experiments.get(experiments.names()[0])
    core, own = [page.name for page in CORE], [page.name for page in default.pages]
    marbles = {"marbles": toy.pages[0], "toy-prompt": toy.pages[1]}

    def shown(*entries: RunEntry) -> dict[str, list[str]]:
        return {title: list(pages) for title, pages in experiments.sections(entries).items()}

    assert shown() == {"": core, default.title: own}, "no run yet"
    assert shown(entry(experiment="gone")) == {"": core, default.title: own}
    assert shown(entry(experiment=default.name)) == shown(entry()) == {"": core, default.title: own}
    assert shown(entry(experiment="toy")) == {"": core, "Marbles": list(marbles)}, "addresses stay as they would be"
    assert experiments.sections([entry(experiment="toy")])["Marbles"] == marbles
    assert list(shown(entry(experiment="toy"), entry())) == ["", default.title, "Marbles"]


@pytest.mark.usefixtures("opened")
def test_the_app_itself_opens_with_pages_from_outside(toy: Toy) -> None:
    test = AppTest.from_file(str(APP / "streamlit_app.py"), default_timeout=60).run()
    assert not test.exception, [e.value for e in test.exception]
    assert test.title[0].value == "Runs"


@pytest.mark.usefixtures("opened")
def test_a_page_from_outside_is_drawn_of_runs_of_its_experiment_and_no_other(toy: Toy) -> None:
    test = open_file(toy.pages[0].file)
    assert not test.exception, [e.value for e in test.exception]
    assert test.title[0].value == "Heap"
    assert list(runs_offered(test)) == ["20990102-000000-toy-0", "20990101-000000-toy-0"]
    assert "20990102-000000-toy-0 has 4 marbles" in [t.value for t in test.text]
    assert TOO_MANY in [t.value for t in test.text]
    assert not test.warning
    test = open_file(toy.pages[1].file, run="20990101-000000-toy-0")
    assert [w.value for w in test.warning] == ["These marbles are painted."]
    assert TOO_MANY not in [t.value for t in test.text], "the page does not concern that kind of remark"
    assert list(runs_offered(open_view("pressure"))) == [list_runs(_root())[-1].paths.run_id]


def _root() -> Path:
    from app.queries import runs_root

    return runs_root()


@pytest.mark.usefixtures("opened")
def test_a_run_chosen_on_another_experiments_page_is_no_choice_here(toy: Toy) -> None:
    assert not open_view("pressure", run="20990101-000000-toy-0").exception, "a link"
    test = AppTest.from_file(str(page_file("pressure")), default_timeout=60)
    test.session_state["run"] = "20990101-000000-toy-0"
    test.run()
    assert not test.exception, [e.value for e in test.exception]
    assert next(box for box in test.selectbox if box.label == "Run").value == list_runs(_root())[-1].paths.run_id


@pytest.mark.usefixtures("toy")
def test_a_page_says_how_to_start_a_run_of_its_experiment(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert "harness run toy" in open_file(toy.pages[0].file).info[0].value


@pytest.mark.usefixtures("opened", "toy")
def test_runs_of_all_experiments_are_listed_and_one_that_is_not_installed_says_so() -> None:
    rows = asked.table(list_runs(_root())).set_index("run")
    assert list(rows["experiment"][:3]) == ["gone", "toy", "toy"]
    assert "'gone' is not installed" in rows["reason"]["20990103-000000-gone-0"]
    assert rows.loc["20990102-000000-toy-0", "reason"] == ""
    test = open_view("runs", run="20990103-000000-gone-0")
    assert not test.exception, [e.value for e in test.exception]
    assert any("'gone' is not installed" in t.value for t in test.text)
    for part in ("Progress", "Certificate", "Manifest", "Compare"):
        assert not open_view("runs", run="20990103-000000-gone-0", part=part).exception
    assert not open_view("sql", run="20990103-000000-gone-0").text_area, "what cannot be read cannot be asked"


@pytest.mark.usefixtures("opened", "toy")
def test_pages_of_the_core_take_what_the_runs_experiment_gives() -> None:
    toy = open_view("sql", run="20990102-000000-toy-0")
    labels = [b.label for b in toy.button]
    assert "Marbles" in labels
    assert "Backfire" not in labels
    assert "Condition" not in [box.label for box in toy.selectbox]
    default = open_view("sql", run=list_runs(_root())[-1].paths.run_id)
    assert {"Backfire", "Events"} <= {b.label for b in default.button}
    assert "Condition" in [box.label for box in default.selectbox]
    both = {"run": "20990102-000000-toy-0", "part": "Compare"}
    texts = [t.value for t in open_view("runs", **both, other="20990101-000000-toy-0").text]
    assert "marbles side by side" in texts
    mixed = open_view("runs", **both, other=list_runs(_root())[-1].paths.run_id)
    assert "marbles side by side" not in [t.value for t in mixed.text]
    assert any("two experiments" in c.value for c in mixed.caption)


def test_an_experiment_without_extras_gives_nothing_more(toy: Toy) -> None:
    (toy.pages[0].file.parent / "extras.py").unlink()
    assert experiments.extras_of("toy") == Extras()
    assert experiments.extras_of("gone") == Extras()
    assert experiments.extras_of(experiments.names()[0]).choices  # control


def test_a_row_chooses_what_it_names() -> None:
    extras = Extras(choices={"prompt_id": "prompt"})
    assert extras.chosen({"prompt_id": "a", "x": 1}) == {"prompt": "a"}
    assert extras.chosen({"prompt_id": pd.NA}) == extras.chosen({"prompt_id": None}) == extras.chosen({"x": 1}) == {}


def test_a_file_of_no_experiment_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no installed experiment has this page"):
        experiments.page_of(tmp_path / "page.py")
    assert experiments.page_of(PAGES["pressure"].file)[1] == PAGES["pressure"]
