"""Runs made by earlier versions list, show, verify, export, report, go on where they are unfinished, and open in the app.

The runs are in tests/fixtures/runs, one or more for each schema of the store; its README says which commit made which.
Everything here goes through the command line and the app's pages: what lies behind them may move.
"""

import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.app.conftest import open_view
from tests.cases import some_of
from tests.commands import Told, harness
from tests.test_launch import compare

ARCHIVES = Path(__file__).resolve().parent / "fixtures" / "runs"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in ARCHIVES.glob("*.tar.xz"))
FINISHED = [name for name in NAMES if name.endswith("-finished")]
TODAY = [name for name in NAMES if name.startswith("schema7-")]
"""Runs whose stages are those of today: they can be measured again, and go on."""
OLDER = [name for name in NAMES if name not in TODAY]
SEALED = [name for name in FINISHED if name[len("schema")] >= "4"]
STATUS = {"finished": "finished", "interrupted": "interrupted", "killed": "stopped"}
QUICK = ("schema1-finished", "schema7-finished", "schema7-killed")
"""Of commands that take seconds, the others are for the thorough tests."""
PAGES = ("runs", "pressure", "prompt")


def some(names: Iterable[str]) -> list[Any]:
    given = list(names)
    return some_of(given, [name for name in given if name in QUICK] or 1)


def unpack(name: str, root: Path) -> Path:
    """The run of an archive, in a folder of runs."""
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        run = archive.getnames()[0].partition("/")[0]
        archive.extractall(root, filter="data")
    return root / run


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text("utf-8"))


def command_of(run: Path, root: Path) -> list[str]:
    """What was typed to make a run, with `root` as the folder of runs."""
    argv = manifest(run)["argv"][1:]
    argv[argv.index("--paths.runs") + 1] = str(root)
    return argv


def failing(told: Told) -> set[str]:
    """The checks that `verify` says have failed."""
    return set(re.findall(r"^FAIL (\S+)", told.out, re.MULTILINE))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Every recorded run by its archive's name, all in one folder. Tests read them and change nothing."""
    root = tmp_path_factory.mktemp("old") / "runs"
    yield {name: unpack(name, root) for name in NAMES}
    shutil.rmtree(root)


def test_there_is_a_finished_run_of_every_schema_and_one_of_each_other_end() -> None:
    assert {name.split("-")[0] for name in FINISHED} == {f"schema{n}" for n in range(1, 8)}
    assert {name.split("-")[1] for name in TODAY} == set(STATUS)
    readme = (ARCHIVES / "README.md").read_text()
    assert re.findall(r"^\| (schema\S+)", readme, re.MULTILINE) == NAMES


def test_every_old_run_is_listed_with_how_it_ended(runs: dict[str, Path]) -> None:
    told = harness("runs", "--paths.runs", next(iter(runs.values())).parent)
    assert told.code == 0, told.err
    for name, run in runs.items():
        status = STATUS[name.split("-")[1]]
        assert re.search(rf"{run.name} +│ {status} +│ demo +│ +2 │", told.out), name


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_shows_its_headline(runs: dict[str, Path], name: str) -> None:
    run = runs[name]
    told = harness("show", run.name, "--paths.runs", run.parent)
    assert told.code == 0, told.err
    assert f"commit {manifest(run)['code']['git_commit']}" in told.out
    assert re.search(r"│ prompts +│ done +│ +2 │ +2 │", told.out)
    if name != "schema6-interrupted":  # it was stopped before
        assert re.search(r"│ baseline +│ +2 │ +0\.655 │", told.out)
        assert re.search(r"│ negative +│ +2 │ +0\.291 │", told.out)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_is_as_it_was_sealed_and_hangs_together(runs: dict[str, Path], name: str) -> None:
    run = runs[name]
    told = harness("verify", run.name, "--batches", 0, "--paths.runs", run.parent)
    assert told.code == 0, told.out
    assert "Every check holds" in told.out
    expected = ["manifest", "rows", "snapshot"] if name in SEALED else []
    for check in ["identity", "keys", "files", *expected]:
        assert re.search(rf"^ok +{check} ", told.out, re.MULTILINE), check


@pytest.mark.parametrize("name", SEALED)
def test_a_flipped_byte_in_an_old_store_is_named(name: str, tmp_path: Path) -> None:
    """The control of the test above: a letter of a question is another one."""
    run = unpack(name, tmp_path)
    store = run / "results.duckdb"
    content = bytearray(store.read_bytes())
    content[content.index(b"Fill the blank")] ^= 1
    store.write_bytes(content)
    told = harness("verify", run.name, "--batches", 0, "--paths.runs", tmp_path)
    assert told.code == 1
    assert failing(told) <= {"rows", "store"}
    assert failing(told)
    assert "results.duckdb" in told.out


@pytest.mark.parametrize("name", some_of(["schema7-finished", "schema7-killed"], 1))
def test_a_run_with_the_stages_of_today_gives_the_same_numbers_again(runs: dict[str, Path], name: str) -> None:
    """Bit for bit where code and machine are as they were; else within the tolerance, and it says what is not."""
    run = runs[name]
    told = harness("verify", run.name, "--sample", 1, "--paths.runs", run.parent)
    assert told.code == 0, told.out
    assert re.search(r"rows must agree (bit for bit|within \S+, since here is not as there: \S)", told.out)
    for stage in ("sanity", "psem", "samples", "mechanism"):
        assert re.search(rf"^ok +again {stage} +batch .*: the same rows", told.out, re.MULTILINE), stage


@pytest.mark.parametrize("name", some(OLDER))
def test_a_stage_that_is_another_now_is_left_out_with_its_reason_and_the_others_give_the_same_numbers(
    runs: dict[str, Path], name: str
) -> None:
    run = runs[name]
    told = harness("verify", run.name, "--sample", 1, "--paths.runs", run.parent)
    assert (told.code, failing(told)) == (0, set()), told.out
    why = dict(re.findall(r"^skip again (\S+) +(.*)", told.out, re.MULTILINE))
    another = "this is not the stage that was run: stages.sanity.version: was 1, is "
    assert why["sanity"].startswith("the run has no such stage" if name == "schema1-finished" else another)
    planned = {stage["name"] for stage in manifest(run)["fingerprint_parts"]["stages"]}
    assert {stage for stage, reason in why.items() if reason == "the run has no such stage"}.isdisjoint(planned)
    measured = set(re.findall(r"^ok +again (\S+) +batch .*: the same rows", told.out, re.MULTILINE))
    assert {"prompts", "psem"} <= measured
    assert measured == planned - {"sanity"} or name not in FINISHED


def test_an_older_run_of_another_seed_is_not_measured_again_at_all(runs: dict[str, Path]) -> None:
    """The control of the test above: what no stage is alone in fails as a whole."""
    run = runs["schema1-finished"]
    told = harness("verify", run.name, "--runtime.seed", 5, "--paths.runs", run.parent)
    assert (told.code, failing(told)) == (1, {"again"}), told.out
    assert re.search(r"^FAIL again +this is not what was measured: seed: was \d+, is 5$", told.out, re.MULTILINE)
    assert not re.search("^(ok|skip) +again", told.out, re.MULTILINE)


@pytest.mark.parametrize("name", some(NAMES))
def test_an_old_run_is_exported_with_as_many_rows_as_its_manifest_counts(
    runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    run = runs[name]
    told = harness("export", run.name, "--to", tmp_path, "--paths.runs", run.parent)
    assert told.code == 0, told.err
    found = {path.stem: pq.read_metadata(path).num_rows for path in tmp_path.glob("*.parquet")}
    counted = manifest(run).get("tables") or {}
    assert counted.items() <= found.items()
    assert bool(counted) == (name in FINISHED)
    assert found["prompts"] == 2
    assert found["contexts"] == 4
    assert manifest(tmp_path) == manifest(run)


@pytest.mark.parametrize("name", some_of(NAMES, ["schema1-finished"]))
def test_an_old_run_has_a_report(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    run = runs[name]
    told = harness("report", run.name, "--to", tmp_path, "--paths.runs", run.parent)
    assert told.code == 0, told.err
    page = (tmp_path / "report.html").read_text("utf-8")
    assert run.name in page
    assert page.rstrip().endswith("</html>")
    assert ("0.655" in page) == (name != "schema6-interrupted")


@pytest.mark.parametrize("name", some(n for n in TODAY if n not in FINISHED))
def test_an_unfinished_run_goes_on_by_its_own_command_and_ends_as_one_that_was_never_stopped(
    name: str, tmp_path: Path
) -> None:
    run, whole = unpack(name, tmp_path), unpack("schema7-finished", tmp_path)
    told = harness("diff", run.name, whole.name, "--exit-code", "--paths.runs", tmp_path)
    assert told.code == 1, "the control: as it was left, it has fewer rows"
    told = harness(*command_of(run, tmp_path))
    assert told.code == 0, told.err
    assert f"run {run.name} (continued)" in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((run.name, whole.name)), "and no other run is made"
    assert manifest(run)["status"] == "finished"
    assert len(manifest(run)["resumed"]) == 1
    assert manifest(run)["fingerprint"] == manifest(whole)["fingerprint"]
    # Not to the last bit: the runs were made on one processor, and what was left of this one on another.
    compare(run, whole, tolerance=1e-5)
    told = harness("verify", run.name, "--batches", 0, "--paths.runs", tmp_path)
    assert told.code == 0, told.out


def test_a_finished_run_is_recognised_by_its_own_command(runs: dict[str, Path]) -> None:
    run = runs["schema7-finished"]
    told = harness(*command_of(run, run.parent), "--resume", run.name)
    assert told.code == 0, told.err
    assert f"Run {run.name} is finished already" in told.out


@pytest.mark.parametrize("name", some(n for n in OLDER if n not in FINISHED))
def test_an_older_unfinished_run_is_not_gone_on_with_in_other_stages(name: str, tmp_path: Path) -> None:
    run = unpack(name, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    told = harness(*command_of(run, tmp_path), "--resume", run.name)
    assert (told.code, told.out) == (2, "")
    assert "cannot be continued with other settings: stages.sanity.version: was 1, now " in told.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore")  # streamlit's own
@pytest.mark.parametrize("name", some(NAMES))
@pytest.mark.parametrize("page", PAGES)
def test_an_old_run_opens_in_the_app(
    runs: dict[str, Path], name: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[name]
    monkeypatch.setenv("OUTPUT_ROOT", str(run.parent))
    shown = open_view(page, run=run.name)
    assert not shown.exception, [e.value for e in shown.exception]
    assert shown.selectbox(key="run").value == run.name
    told = "\n".join(str(e.value) for e in [*shown.info, *shown.code, *shown.warning])
    assert "no results" not in told
    assert "not a results store" not in told
    if page == "pressure" and name != "schema6-interrupted":
        assert {m.label: m.value for m in shown.metric}["prompts"] == "2"
