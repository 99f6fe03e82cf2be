"""The page of runs: what it lists, how a run goes, what it was made of, and two runs side by side."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import experiments
from app.charts.gravity import compared as charts
from app.queries import runs as asked
from app.queries.gravity import compared, prompts_of_items
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs, read_manifest
from harness.run.differences import ABSENT
from harness.store import Batch, BatchResult, Failure, Store
from tests import synthetic
from tests.app.conftest import AHEAD, open_view, page_file
from tests.commands import saying
from tests.fakes import older_store
from tests.serving.recordings import exchange, recording_in
from tests.synthetic import Shape

VIEW = page_file("runs")
BROKEN, EMPTY, TORN = "20200101-000000-broken-0", "20200102-000000-empty-0", "20200103-000000-odd-0"
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def folder_of(root: Path, name: str, text: str) -> RunPaths:
    paths = RunPaths(root / name)
    paths.folder.mkdir(parents=True)
    paths.manifest.write_text(text)
    return paths


def edited(paths: RunPaths, **changes: Any) -> None:
    paths.manifest.write_text(json.dumps({**read_manifest(paths).tree, **changes}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that can be compared, one broken, one without results whose heartbeat is stale, one with an odd manifest."""
    root = tmp_path_factory.mktemp("runs")
    first = synthetic.write(root, Shape(30, 2, 2, 4, ("baseline", "negative", "reframed"), num_bootstraps=50),
                            datetime(2026, 1, 1, tzinfo=UTC))  # fmt: skip
    second = synthetic.write(root, Shape(20, 2, 2, 4, num_bootstraps=50), datetime(2026, 1, 2, tzinfo=UTC))
    edited(first, sanity=[{"measurement": "p_sem", "ok": True}, {"measurement": "lens", "ok": False}],
           warnings={"warning": 2, "error": 1})  # fmt: skip
    edited(second, sanity=[{"measurement": "p_sem", "ok": True}], packages={"numpy": "1", "extra": "2"}, num_failed=4)
    folder_of(root, BROKEN, "{ torn")
    stale = {"run_id": EMPTY, "fingerprint": "f00", "status": "running", "heartbeat": "2020-01-02T00:00:00+00:00"}
    folder_of(root, EMPTY, json.dumps(stale))
    folder_of(
        root, TORN, json.dumps({"run_id": TORN, "fingerprint": "0", "model": "a word", "settings": [], "sanity": 3})
    )
    return root


@pytest.fixture
def going(tmp_path: Path) -> RunPaths:
    """A run in its second stage: 60 of 100 items done in 6 s, 2 failed, one batch split."""
    paths = folder_of(tmp_path, "20260101-000000-x-0", "{}")
    parts = {"stages": [{"name": "psem"}, {"name": "greedy"}, {"name": "samples"}]}
    paths.manifest.write_text(json.dumps({
        "run_id": paths.run_id, "fingerprint": "abc", "status": "running", "heartbeat": AHEAD,
        "fingerprint_parts": parts,
    }))  # fmt: skip
    with Store(paths.results, SCHEMA) as store:
        store._insert("prompts", [{"prompt_id": "a_1", "category": "facts", "question": "?", "target": "x"}])
        store.start_stage("psem", 1, 10, 10)
        store.finish_stage("psem", "done")
        store.start_stage("greedy", 1, 100)
        batches = [Batch("greedy", n, tuple(f"k{n}_{i}" for i in range(31)), 500 + n) for n in range(2)]
        store.add_batches(batches)
        store.commit(batches[0], BatchResult(seconds=2.0, tokens=100))
        failures = [Failure("a_1|negative", "no <b>luck</b>"), Failure("other", "none")]
        kept = Batch("greedy", 1, (*batches[1].keys[:29], "a_1|negative", "other"), 501)
        store.commit(kept, BatchResult(failures=failures, seconds=4.0, tokens=500))
        store.add_batches([Batch("greedy", 2, ("k",), 700)])
        store.add_batches(
            [Batch("greedy", 3, ("k",), 350, parent=2)], Batch("greedy", 2, ("k",), 700), "too big", "oom_split"
        )
        store.publish(paths.live)
    return paths


# -- the list


def test_every_run_is_a_row_with_its_state_and_what_was_checked_of_it(root: Path) -> None:
    rows = asked.table(list_runs(root))
    assert list(rows.columns) == list(asked.LIST_COLUMNS)
    by_status = rows.groupby("status")["run"].apply(list)
    assert by_status["stopped"] == [EMPTY], "a stale heartbeat is not running, whatever the manifest says"
    assert by_status["broken"] == [TORN, BROKEN]
    second, first = (rows.iloc[n] for n in (0, 1))
    assert (first["sanity"], second["sanity"]) == ("DISAGREES on lens", "agrees")
    assert (first["warnings"], first["failed"], second["failed"]) == (3, 0, 4)
    assert (first["prompts"], len(first["fingerprint"])) == (30, 8)
    assert "JSON" in rows.set_index("run")["reason"][BROKEN]
    assert asked.table([]).empty


def test_a_run_without_a_certificate_was_not_checked() -> None:
    assert asked.verdict(saying()) == asked.verdict(saying({"sanity": []})) == "not checked"
    assert asked.verdict(saying({"sanity": [{"measurement": m, "ok": m == "c"} for m in "abc"]})) == "DISAGREES on a, b"


# -- progress


def test_progress_has_rates_time_left_and_the_last_batch_by_hand(going: RunPaths) -> None:
    stages = asked.progress(going, ["psem", "greedy", "samples"]).set_index("stage")
    greedy = stages.loc["greedy"]
    assert isinstance(greedy, pd.Series)
    assert (greedy["items"], greedy["failed"], greedy["total"]) == (60, 2, 100)
    assert greedy["done"] == pytest.approx(0.62)
    assert (greedy["items_s"], greedy["tokens_s"]) == pytest.approx((10.0, 100.0))
    assert greedy["left_s"] == pytest.approx(38 / 10)
    assert (greedy["last_items"], greedy["last_tokens"], greedy["number"], greedy["splits"]) == (31, 501, 2, 1)
    assert stages.loc["psem", "done"] == 1
    assert pd.isna(stages["left_s"]["psem"]), "a stage that is over has no time left"
    assert stages.loc["samples", "status"] == "not begun"
    told = asked.told_progress(stages.reset_index())
    assert told == "Stage 2 of 3, greedy: 60 of 100 items, 2 failed, about 4 s left in it."


def test_without_a_snapshot_the_planned_stages_have_not_begun(root: Path) -> None:
    stages = asked.progress(RunPaths(root / EMPTY), ["psem"])
    assert stages[["stage", "status"]].to_numpy().tolist() == [["psem", "not begun"]]
    assert asked.told_progress(stages) == "0 of 1 stages done."
    assert asked.events(RunPaths(root / EMPTY)).empty
    assert asked.event_counts(RunPaths(root / EMPTY)) == (0, 0)


def test_events_are_newest_first_and_name_the_prompt_where_there_is_one(going: RunPaths) -> None:
    events = asked.events(going)
    assert list(events["kind"]) == ["oom_split", "failed_item", "failed_item"]
    assert list(prompts_of_items(going, list(events["item"]))["prompt_id"]) == [None, None, "a_1"]
    assert list(prompts_of_items(going, [None, "a_1", "a"])["prompt_id"]) == [None, "a_1", None]
    assert asked.event_counts(going) == (1, 2)
    assert len(asked.events(going, limit=1)) == 1


@pytest.mark.parametrize(("seconds", "told"), [(4, "4 s"), (89.6, "90 s"), (150, "2 min"), (7200, "2.0 h")])
def test_a_duration_is_told_for_people(seconds: float, told: str) -> None:
    assert asked.duration(seconds) == told


# -- manifest


def test_changed_settings_stand_first() -> None:
    given = {"a": {"value": 1, "source": "default"}, "b": {"value": [1], "source": "flag: --b"}}
    rows = asked.settings(saying({"settings": given}))
    assert rows.to_numpy().tolist() == [["b", "[1]", "flag: --b"], ["a", "1", "default"]]
    assert asked.settings(saying()).empty


def test_leaves_are_dotted_and_the_named_ones_first() -> None:
    rows = asked.leaves({"a": {"b": None, "c": "x"}, "z": 1}, ["z"])
    assert rows.to_numpy().tolist() == [["z", "1"], ["a.b", "null"], ["a.c", "x"]]
    assert asked.leaves({}).empty


def test_differences_say_what_decides_results_first_and_what_only_one_run_has() -> None:
    this = {"fingerprint_parts": {"seed": 0, "old": None}, "packages": {"numpy": "1"},
            "settings": {"s": {"value": 1, "source": "default"}}}  # fmt: skip
    other = {"fingerprint_parts": {"seed": 1}, "packages": {"numpy": "2"},
             "settings": {"s": {"value": 1, "source": "flag"}}}  # fmt: skip
    rows = asked.manifest_differences(saying(this), saying(other))
    assert rows.to_numpy().tolist() == [
        ["identity", "old", "null", ABSENT],
        ["identity", "seed", "0", "1"],
        ["packages", "numpy", "1", "2"],
    ]
    assert asked.manifest_differences(saying(this), saying(this)).empty


def test_tables_that_are_the_same_bits_are_told_from_those_that_are_not() -> None:
    a, b = (saying({"table_sha256": h}) for h in ({"psem": "1", "lens": "2"}, {"psem": "1", "lens": "3", "new": "4"}))
    assert asked.equal_tables(a, a) == (["lens", "psem"], [])
    assert asked.equal_tables(a, b) == (["psem"], ["lens", "new"])
    assert asked.equal_tables(a, saying()) is None


def test_shared_prompts_are_counted_by_what_they_say() -> None:
    a, b = (saying({"prompts": {"row_hashes": h}}) for h in ({"p": "1", "q": "2"}, {"p": "1", "q": "3", "r": "4"}))
    assert asked.shared_prompts(a, b) == (1, 1, 2)
    assert asked.shared_prompts(a, saying()) is None


# -- two runs


def statistic(condition: str, grouping: str, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"analysis": "rates", "condition": condition, "measure": "violation_rate", "grouping": grouping,
            "value": value, "low": low, "high": high, "n": 5}  # fmt: skip


def test_results_are_joined_by_key_with_difference_and_overlap_by_hand() -> None:
    this = [statistic("negative", "[.2, .4)", 0.2, 0.1, 0.3), statistic("negative", "all", 0.5, 0.4, 0.6),
            statistic("own", "all", 0.9, 0.8, 1.0)]  # fmt: skip
    other = [statistic("negative", "all", 0.7, 0.61, 0.8), statistic("negative", "[.2, .4)", 0.35, 0.3, 0.4),
             statistic("negative", "category:x", 0.1, None, None)]  # fmt: skip
    rows = compared.compare(pd.DataFrame(this), pd.DataFrame(other))
    assert list(rows["grouping"]) == ["all", "[.2, .4)", "category:x", "all"]
    assert list(rows["intervals"]) == ["apart", "overlap", "", ""]
    assert list(rows["difference"][:2]) == pytest.approx([0.2, 0.15])
    assert list(rows["found_in"]) == ["both", "both", "other", "this"]
    assert compared.conditions_of_one(rows) == {"this": ["own"], "other": []}


def test_bins_are_told_from_other_groupings() -> None:
    found = [compared.bin_start(g) for g in ("[0, .2)", "[.8, 1]", "all", "category:[0, x")]
    assert found == [0.0, 0.8, None, None]


def test_a_whisker_spans_the_interval_and_what_is_missing_is_no_zero() -> None:
    row = {"grouping": "all", "value": 0.5, "low": 0.4, "high": 0.6, "value_other": float("nan"),
           "low_other": float("nan"), "high_other": float("nan")}  # fmt: skip
    chart = charts.intervals(pd.DataFrame([row]), ("a", "b"), "rate", 0.0, 1.0)
    this, other = chart["series"]
    assert this["data"] == [{"name": "all: 0.500 [0.400, 0.600]", "value": [0.4, 0.5, 0.5, 0.5, 0.6]}]
    assert other["data"] == [{"name": "all: not measured", "value": []}]
    assert (chart["yAxis"]["min"], chart["yAxis"]["max"]) == (0.0, 1.0)
    json.dumps(chart, allow_nan=False)


# -- the page


def opened(root: Path, monkeypatch: pytest.MonkeyPatch, **params: str) -> AppTest:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    test = open_view(VIEW.stem, **params)
    assert not test.exception
    return test


def ids(root: Path) -> tuple[str, str]:
    second, first = [e.paths.run_id for e in list_runs(root)][:2]
    return first, second


def test_the_page_opens_on_no_run_and_lists_the_broken_where_none_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "harness run" in opened(tmp_path, monkeypatch).info[0].value
    folder_of(tmp_path, BROKEN, "{ torn")
    test = opened(tmp_path, monkeypatch)
    assert list(test.dataframe[0].value["status"]) == ["broken"]
    assert any("is broken" in t.value for t in test.text)


@pytest.mark.parametrize("part", ["Progress", "Certificate", "Manifest", "Compare"])
@pytest.mark.parametrize("which", ["first", EMPTY])
def test_every_part_opens_for_a_finished_and_an_empty_run(
    part: str, which: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ids(root)[0] if which == "first" else which
    test = opened(root, monkeypatch, run=run, part=part)
    assert test.subheader[0].value == run


def test_the_certificate_says_what_disagrees(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = opened(root, monkeypatch, run=ids(root)[0], part="Certificate")
    assert "disagree on 1 of 6" in test.error[0].value
    assert test.dataframe[-1].value.iloc[0]["verdict"] == "DISAGREES"


def test_what_to_know_of_a_run_is_shown_as_text_unfolded_here_and_folded_on_the_pages_it_concerns(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / ids(root)[0], tmp_path / "20300101-000000-x-0")
    paths = RunPaths(tmp_path / "20300101-000000-x-0")
    edited(paths, run_id=paths.run_id)
    with duckdb.connect(str(paths.live)) as con:
        con.execute("UPDATE completions SET answer = '', text = '' WHERE condition = 'negative'")
        con.execute("UPDATE completions SET condition = '**x** <b>' WHERE condition = 'negative'")
    for view, is_open, is_shown in (
        (VIEW.stem, True, True),
        ("detections", False, True),
        ("activations", False, False),
    ):
        monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
        test = open_view(view)
        assert not test.exception
        boxes = [e for e in test.expander if e.label.startswith("To know of this run: empty answers")]
        assert [e.proto.expanded for e in boxes] == [is_open] * is_shown
        texts = [t.value for e in boxes for t in e.text]
        assert any(t.startswith("Under **x** <b>, ") and "are empty" in t for t in texts) is is_shown
        assert not any("<b>" in m.value for m in test.markdown)


def test_two_runs_are_compared_by_a_link(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ids(root)
    test = opened(root, monkeypatch, run=first, other=second, part="Compare", condition="negative")
    assert any("reframed" in t.value for t in test.text), "a condition that only one run has is named"
    changes, results = (d.value for d in test.dataframe[1:3])
    assert {"identity", "packages"} <= set(changes["part"])
    assert ("packages", "extra", ABSENT) in set(changes[["part", "key", "this"]].itertuples(index=False, name=None))
    assert {"both", "this"} <= set(results["found_in"])


def test_a_run_that_goes_on_says_where_it_is_and_one_whose_heartbeat_is_stale_that_it_stopped(
    going: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = opened(going.folder.parent, monkeypatch)
    assert any("60 of 100 items" in t.value for t in test.text)
    assert any("running" in c.value for c in test.caption)
    old = (datetime.now(UTC) - timedelta(minutes=5)).isoformat(timespec="seconds")
    edited(going, heartbeat=old)
    test.run()
    assert not test.exception
    assert any("stopped" in c.value for c in test.caption)


def test_a_run_of_an_older_schema_opens(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its snapshot has none of the tables that came later."""
    source = RunPaths(root / ids(root)[1])
    paths = folder_of(tmp_path, source.run_id, source.manifest.read_text())
    older_store(paths.live, 1)
    with duckdb.connect(str(paths.live)) as con:
        con.execute("INSERT INTO stages VALUES ('psem', 1, 'running', 2, 2, 0, 0, 0)")
    os.utime(paths.live)
    for part in ("Progress", "Certificate", "Manifest"):
        opened(tmp_path, monkeypatch, part=part)
    assert asked.progress(paths)["items"].tolist() == [2]
    assert asked.certificate(paths).empty
    assert compared.results(paths).empty


@pytest.mark.parametrize("part", ["Progress", "Certificate", "Manifest", "Compare"])
def test_a_run_that_a_service_recorded_is_listed_and_opens_and_is_of_no_experiment_with_pages(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_in(tmp_path) as recording:
        recording.add(exchange(1))
    test = opened(tmp_path, monkeypatch, part=part)
    (row,) = test.dataframe[0].value.to_dict("records")
    assert (row["experiment"], row["status"], row["reason"]) == ("serve lda", "finished", "")
    assert any("bundled models" in warning.value for warning in test.warning)
    entries = list_runs(tmp_path)
    assert "amplification" not in {name for pages in experiments.sections(entries).values() for name in pages}
    sql = open_view("sql", run=entries[0].paths.run_id, sql="SELECT answer->>'$.n' AS n FROM requests")
    assert not sql.exception
    assert list(sql.dataframe[-1].value["n"]) == ["1"]
