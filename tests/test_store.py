"""The store: migrations, round trips, transactions, views, snapshots and their readers."""

import csv
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.engine.executors import Item, ItemResult
from harness.errors import EnvironmentFault, StoreError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Failure, Reader, Row, Store, certificate, schema, writer
from tests.cases import some_of
from tests.fakes import Fake, later, measured, older_store, plan_of, run_stages, same_lengths, scored

ROOT = Path(__file__).parents[1]
BATCH = Batch("scores", 0, ("a", "b"), 10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "results.duckdb", SCHEMA) as opened:
        opened.add_batches([BATCH])
        opened.start_stage("scores", 1, 2)
        yield opened


def psem(prompt_id: str, p_sem: float | None, condition: str = "baseline") -> Row:
    return {"prompt_id": prompt_id, "condition": condition, "p_sem": p_sem}


def put(store: Store, **rows: list[Row]) -> None:
    store.commit(BATCH, BatchResult(rows=dict(rows)))


def names(store: Store) -> set[str]:
    return {r["n"] for r in store.query("SELECT table_name AS n FROM information_schema.tables")}


# -- migrations

APPLIED = "SELECT experiment, number, epoch_us(applied) AS t FROM migrations ORDER BY ALL"


def newest(store: Store) -> int:
    return store.query("SELECT max(number) AS v FROM migrations WHERE experiment = 'gravity'")[0]["v"]


def test_a_fresh_file_has_every_table_and_view_and_a_second_opening_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    with Store(path, SCHEMA) as first:
        assert {*SCHEMA.tables, *SCHEMA.views} <= names(first)
        put(first, psem=[psem("a", 0.5)])
        applied = first.query(APPLIED)
    with Store(path, SCHEMA) as second:
        assert second.query(APPLIED) == applied
        own = [r["number"] for r in applied if r["experiment"] == "gravity"]
        assert own == list(range(1, SCHEMA.version + 1))
        assert [r["number"] for r in applied if r["experiment"] == "core"] == list(range(1, len(schema.CORE) + 1))
        assert len(applied) == len(own) + len(schema.CORE)
        assert second.table("psem")[0]["p_sem"] == 0.5


ADDED = "CREATE TABLE added (a INTEGER PRIMARY KEY); ALTER TABLE psem ADD COLUMN extra DOUBLE;"


def test_an_older_file_is_brought_to_this_schema_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    with Store(path, SCHEMA) as old:
        put(old, psem=[psem("a", 0.5)])
        assert "added" not in names(old)
    for _ in range(2):  # once is enough, twice does no harm
        with Store(path, later(ADDED)) as new:
            assert "added" in names(new)
            assert [(r["p_sem"], r["extra"]) for r in new.query("SELECT * FROM psem")] == [(0.5, None)]
            assert newest(new) == SCHEMA.version + 1


def test_a_failure_inside_a_migration_leaves_it_pending_and_nothing_half_done(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, SCHEMA).close()
    with pytest.raises(Exception, match="in the middle"):
        Store(path, later(ADDED + "SELECT error('in the middle');"))
    with Store(path, SCHEMA) as store:
        assert "added" not in names(store)
        assert newest(store) == SCHEMA.version
    with Store(path, later(ADDED)) as store:
        assert "added" in names(store)


def test_a_crash_inside_the_first_migration_leaves_a_file_that_opens(tmp_path: Path) -> None:
    """Killed after the tables were made and before they were committed, and again just after."""
    path = tmp_path / "results.duckdb"
    code = (
        "import os, signal, sys, pathlib\nfrom harness.store import Store, schema\n"
        "from harness.experiments.gravity.schema import SCHEMA\n"
        "class Clock:\n    def now(*_):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "schema.datetime = Clock()\nStore(pathlib.Path(sys.argv[1]), SCHEMA)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == -signal.SIGKILL
    with Store(path, SCHEMA) as store:
        assert set(SCHEMA.tables) <= names(store)
        assert store.counts() == dict.fromkeys(SCHEMA.tables, 0)


def test_a_file_of_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, later(ADDED)).close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"schema {SCHEMA.version + 1}, this harness knows up to {SCHEMA.version}"):
        Store(path, SCHEMA)
    assert path.read_bytes() == before


# -- the certificate


def item(measurement: str, subject: str, **more: Any) -> Row:
    return {
        "measurement": measurement, "subject": subject, "num_items": 2, "max_abs": 1e-6, "max_rel": 1e-5, "flips": 0,
        "near_ties": 0, "tolerance": 1e-5, "worst": subject, "repeated": None, "ok": True, "left_out": False, "seconds": 0.5,
    } | more  # fmt: skip


LEFT = {"num_items": 0, "max_abs": None, "max_rel": None, "worst": None, "ok": None, "left_out": True, "seconds": 0.0}


def test_the_certificate_is_a_row_a_measurement_of_what_its_items_came_to(store: Store) -> None:
    store._insert("sanity_items", [
        item("lens", "a"), item("lens", "b", max_abs=3e-6, flips=1, near_ties=1), item("lens", "c", **LEFT),
        item("p_sem", "a", ok=False, max_abs=2e-5, repeated="float64: still apart"),
        item("p_sem", "b", max_abs=9e-5, repeated="x"),
        item("greedy", "b", **LEFT), item("greedy", "a", **LEFT),
    ])  # fmt: skip
    found = {row["measurement"]: row for row in store.table("sanity")}
    assert found["lens"] == {
        "measurement": "lens", "num_items": 4, "max_abs": 3e-6, "max_rel": 1e-5, "flips": 1, "near_ties": 1, "tolerance": 1e-5,
        "worst": "b", "repeated": None, "ok": True, "num_left_out": 1, "left_out": ["c"],
    }  # fmt: skip
    apart = found["p_sem"]
    assert (apart["ok"], apart["worst"], apart["repeated"]) == (False, "a", "float64: still apart"), (
        "what disagrees is the worst"
    )
    assert (found["greedy"]["ok"], found["greedy"]["left_out"], found["greedy"]["num_items"]) == (None, ["a", "b"], 0)
    assert certificate(store.table("sanity_items")) == store.table("sanity"), "and so it is without a store"


def test_a_certificate_of_an_older_schema_is_kept(tmp_path: Path) -> None:
    """It was a table, a row a measurement."""
    path = tmp_path / "results.duckdb"
    old = next(n for n, sql in enumerate(SCHEMA.migrations) if "CREATE TABLE sanity_items" in sql)
    older_store(path, old)
    values = ("lens", 12, 1e-6, 2e-5, 1, 1, 1e-5, "a|negative", None, True)
    with duckdb.connect(str(path)) as con:
        con.execute(f"INSERT INTO sanity VALUES ({', '.join('?' * len(values))})", values)
    with Store(path, SCHEMA) as store:
        (row,) = store.table("sanity")
        assert tuple(row.values()) == (*values, 0, [])


# -- means


PLAIN_MEAN = "SELECT layer, measured, avg(p_target) FROM lens JOIN compared ON lens.prompt_id = compared.prompt_id AND " \
             "lens.condition = measured GROUP BY ALL ORDER BY ALL"  # fmt: skip


def test_means_have_the_same_bits_whatever_parts_a_store_has_and_in_whatever_order_it_was_filled(
    tmp_path: Path,
) -> None:
    """A run killed during `mechanism` once ended with statistics whose last bits were others: the rows before the kill and
    those after it were two parts of a table, and DuckDB began to add up with the second."""
    rng = random.Random(1)
    told = [{"prompt_id": f"p{n}", "condition": c, "step_kind": kind, "layer": layer, "step": 0} for n in range(10)
            for c in ("baseline", "negative") for kind in ("first", "decision") for layer in range(2)]  # fmt: skip
    lens = [key | {"p_target": rng.random() ** 9, "p_emitted": rng.random(), "entropy": 9 * rng.random(),
                   "kl_final": rng.random()} for key in told]  # fmt: skip
    parts = [
        key | {"attn_contrib": rng.gauss(0, 1), "ffn_contrib": rng.gauss(0, 1), "p_out": rng.random()} for key in told
    ]
    heads = [key | {"pi": [rng.gauss(0, 1) for _ in range(3)], "iar": [rng.random() for _ in range(3)]} for key in told]
    said = [{"prompt_id": f"p{n}", "condition": "negative", "mode": "greedy", "sample_id": 0, "word_present": n % 3 == 0}
            for n in range(10)]  # fmt: skip

    def filled(name: str, order: int, opened_again_after: int | None) -> tuple[dict[str, list[Row]], list[Row]]:
        path = tmp_path / name
        store = Store(path, SCHEMA)
        store.add_batches([replace(BATCH, batch_id=n) for n in range(6)])
        for n in range(6):  # as batches come
            rows = {
                "lens": lens[n::6],
                "decomposition": parts[n::6],
                "attention": heads[n::6],
                "detections": said[n::6],
            }
            store.commit(replace(BATCH, batch_id=n), BatchResult(rows={t: r[::order] for t, r in rows.items()}))
            if n == opened_again_after:
                store.close()
                store = Store(path, SCHEMA)
        views = {v: store.table(v) for v in ("lens_moments", "decomposition_moments", "attention_moments", "outcomes")}
        plain = store.query(PLAIN_MEAN)
        store.publish(path.with_name("live.duckdb"))
        store.close()
        with Reader(path.with_name("live.duckdb"), SCHEMA, threads=1) as reader:
            assert {v: reader.table(v) for v in views} == views
        return views, plain

    views, plain = filled("whole.duckdb", 1, None)
    assert all(views.values())
    assert [filled(f"{n}.duckdb", 1, n)[0] for n in (0, 3)] == [views, views]
    other, other_plain = filled("other.duckdb", -1, None)
    assert other == views
    assert other_plain != plain, "the control: these means do depend on the order"


# -- round trips

LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
SPANS = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(list)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "VARCHAR": LETTERS | st.sampled_from(["", "NULL", 'a"b', "it's", "a,b\nc", "Zürich 日本 \U0001f600", "[1, 2]"]),
    "BOOLEAN": st.booleans(),
    "INTEGER": st.integers(-(2**31), 2**31 - 1),
    "BIGINT": st.integers(-(2**63), 2**63 - 1),
    "DOUBLE": st.floats(allow_nan=False, allow_infinity=False),
    "FLOAT": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "INTEGER[2]": SPANS,
    "MAP(VARCHAR, VARCHAR)": st.dictionaries(LETTERS, st.none() | LETTERS, max_size=3),
    "TIMESTAMP": st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1)),
    "TIMESTAMP WITH TIME ZONE": st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
}


def values(sql_type: str) -> st.SearchStrategy[Any]:
    """Everything a column of this type may hold, NULL apart."""
    if sql_type in VALUES:
        return VALUES[sql_type]
    if sql_type.startswith("STRUCT("):
        fields = [f.rsplit(" ", 1) for f in sql_type.removeprefix("STRUCT(").removesuffix(")").split(", ")]
        return st.fixed_dictionaries({n.strip('"'): st.none() | values(t) for n, t in fields})
    assert sql_type.endswith("[]"), sql_type
    return st.lists(values(sql_type.removesuffix("[]")), max_size=4)


def columns(store: Store, table: str) -> dict[str, str]:
    return {
        r["n"]: r["t"]
        for r in store.query(
            "SELECT column_name AS n, data_type AS t FROM information_schema.columns "
            "WHERE table_name = ? AND table_catalog = current_database()", [table])
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Fixed-size arrays come back as tuples; times in the machine's own zone."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.astimezone(UTC) if isinstance(value, datetime) and value.tzinfo else value


@pytest.mark.parametrize("table", SCHEMA.tables)
def test_a_row_comes_back_as_it_went_in(table: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round trip")
    store = Store(folder / "results.duckdb", SCHEMA)
    types, key = columns(store, table), store._key(table)
    rows = st.fixed_dictionaries({n: values(t) if n in key else st.none() | values(t) for n, t in types.items()})
    several = st.lists(rows, min_size=1, max_size=3, unique_by=lambda r: tuple(str(r[k]) for k in key))

    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))  # type: ignore[arg-type]
    @given(several)
    def check(given_rows: list[Row]) -> None:
        store.query(f"DELETE FROM {table}")
        store.commit(Batch("no such stage", 0, (), 0), BatchResult(rows={table: given_rows}))
        found = {tuple(r[k] for k in key): plain(r) for r in store.table(table)}
        assert found == {tuple(r[k] for k in key): r for r in given_rows}

    check()
    store.publish(folder / "live.duckdb")
    with Reader(folder / "live.duckdb", SCHEMA) as reader:  # and a snapshot holds the same
        assert [plain(r) for r in reader.query(f"SELECT * FROM {table} ORDER BY ALL")] == [
            plain(r) for r in store.query(f"SELECT * FROM {table} ORDER BY ALL")
        ]
        assert len(reader.table(table)) == len(store.table(table))
    store.close()


def test_spans_that_are_missing_stay_missing(store: Store) -> None:
    spans = {"instruction": [0, 5], "negation": None, "mention": None, "question": [6, 9]}
    put(store, contexts=[{"prompt_id": "a", "condition": "x", "token_ids": [], "spans": spans},
                         {"prompt_id": "b", "condition": "x", "token_ids": [1], "spans": None}])  # fmt: skip
    a, b = store.table("contexts")
    assert plain(a["spans"]) == spans
    assert (a["token_ids"], b["token_ids"], b["spans"], a["text"]) == ([], [1], None, None)


def test_events_can_be_read_whole(store: Store) -> None:
    """`events.time` needs nothing installed beyond what the project declares."""
    store.event("warning", "rejected_prompt", "row 3: no target", item_key="x")
    (row,) = store.table("events")
    assert row["message"] == "row 3: no target"
    assert abs((datetime.now(UTC) - plain(row["time"]).replace(tzinfo=UTC)).total_seconds()) < 60


# -- transactions


def test_a_row_that_cannot_be_stored_takes_its_whole_batch_with_it(store: Store) -> None:
    """Good rows in another table, an update, a failure and the mark: none of it, and the message names the cause."""
    put(store, prompts=[{"prompt_id": "a", "tier": None}])
    store.query("UPDATE batches SET status = 'planned'")
    result = BatchResult(
        rows={"completions": [{"prompt_id": "a", "condition": "c", "mode": "m", "sample_id": 0}],
              "psem": [psem("a", 0.1), psem("a", 0.2)]},
        updates={"prompts": [{"prompt_id": "a", "tier": "high"}]}, failures=[Failure("b", "why")], tokens=7,
    )  # fmt: skip
    before = store.stage_rows()
    with pytest.raises(Exception, match=r"(?i)constraint|duplicate key"):
        store.commit(BATCH, result)
    counts = store.counts()
    assert (counts["psem"], counts["completions"], counts["events"]) == (0, 0, 0)
    assert store.table("prompts")[0]["tier"] is None
    assert store.plan("scores")[0].status == "planned"
    assert store.stage_rows() == before
    # Control: without the second row all of it is there; the store goes on after the failure.
    store.commit(BATCH, replace(result, rows=result.rows | {"psem": [psem("a", 0.1)]}))
    counts = store.counts()
    assert (counts["psem"], counts["completions"], counts["events"]) == (1, 1, 1)
    assert store.plan("scores")[0].status == "done"
    (row,) = store.stage_rows()
    assert (row["tokens"], row["num_failed"]) == (7, 1)


def test_a_column_that_a_table_does_not_have_is_refused(store: Store) -> None:
    with pytest.raises(AssertionError, match="no column"):
        put(store, psem=[psem("a", 0.5) | {"p_semm": 0.5}])
    assert store.counts()["psem"] == 0


def test_rows_of_one_batch_with_different_columns_lose_nothing(store: Store) -> None:
    """The second row has a value that the first has not. It is stored, or the batch is refused: never dropped."""
    try:
        put(store, psem=[{"prompt_id": "a", "condition": "baseline"}, psem("b", 0.5)])
    except AssertionError:
        assert store.counts()["psem"] == 0
    else:
        assert [r["p_sem"] for r in store.table("psem")] == [None, 0.5]


def test_changes_of_one_batch_with_different_columns_lose_nothing(store: Store) -> None:
    """Two items change different columns: neither may wipe out what the other's row holds."""
    put(store, prompts=[{"prompt_id": "a", "tier": "old", "style": "old"}, {"prompt_id": "b", "tier": "old"}])
    changes = [{"prompt_id": "a", "tier": "new"}, {"prompt_id": "b", "style": "new"}]
    try:
        store.commit(BATCH, BatchResult(updates={"prompts": changes}))
    except AssertionError:
        changes = []
    assert [(r["tier"], r["style"]) for r in store.table("prompts")] == (
        [("new", "old"), ("old", "new")] if changes else [("old", "old"), ("old", None)]
    )


@pytest.mark.parametrize("table", [t for t in SCHEMA.tables if t not in ("events", "batches", "stages")])
def test_a_primary_key_cannot_be_written_twice(table: str, store: Store) -> None:
    types = columns(store, table)
    row = {name: "x" if types[name] == "VARCHAR" else 1 for name in store._key(table)}
    assert row
    put(store, **{table: [row]})
    with pytest.raises(Exception, match=r"(?i)duplicate key|constraint"):
        put(store, **{table: [row]})
    assert store.counts()[table] == 1


def test_an_update_changes_the_given_columns_of_the_given_rows_and_no_others(store: Store) -> None:
    put(store, prompts=[{"prompt_id": p, "category": "idioms", "tier": None, "alternatives": ["z"]} for p in "abc"])
    store.commit(BATCH, BatchResult(updates={"prompts": [
        {"prompt_id": "b", "tier": "high", "alternatives": []}, {"prompt_id": "c", "tier": "low", "alternatives": None},
        {"prompt_id": "nobody", "tier": "low", "alternatives": None},
    ]}))  # fmt: skip
    assert [(r["prompt_id"], r["category"], r["tier"], r["alternatives"]) for r in store.table("prompts")] == [
        ("a", "idioms", None, ["z"]), ("b", "idioms", "high", []), ("c", "idioms", "low", None),
    ]  # fmt: skip


def test_an_item_failed_until_it_is_measured_again(store: Store) -> None:
    """The last word counts, whatever the number of attempts."""
    store.commit(BATCH, BatchResult(failures=[Failure("a", "one"), Failure("b", "two")]))
    assert store.failed("scores") == ["a", "b"]
    assert store.failed("another stage") == []
    again = [replace(BATCH, batch_id=n, keys=(key,), attempt=2, parent=0) for n, key in ((1, "a"), (2, "b"))]
    store.add_batches(again)
    store.commit(again[0], BatchResult(rows={"psem": [psem("a", 0.5)]}))
    assert store.failed("scores") == ["b"]
    store.commit(again[1], BatchResult(failures=[Failure("b", "three")]))
    assert store.failed("scores") == ["b"]
    assert store.stage_rows()[0]["num_failed"] == 1
    third = replace(again[1], batch_id=3, attempt=3, parent=2)
    store.add_batches([third])
    store.commit(third, BatchResult(rows={"psem": [psem("b", 0.5)]}))
    assert store.failed("scores") == []
    (row,) = store.stage_rows()
    assert (row["num_done"], row["num_failed"]) == (2, 0)


# -- views


def test_suppression_against_numbers_worked_by_hand(store: Store) -> None:
    put(store, psem=[
        psem("a", 0.8), psem("a", 0.2, "negative"), psem("a", 0.9, "hint"),
        psem("b", 0.0), psem("b", 0.1, "negative"),
        psem("alone", 0.3, "negative"), psem("base", 0.3),
    ])  # fmt: skip
    rows = {(r["prompt_id"], r["condition"]): r for r in store.query("SELECT * FROM suppression")}
    assert set(rows) == {("a", "negative"), ("a", "hint"), ("b", "negative")}
    a = rows["a", "negative"]
    assert (a["p0"], a["p1"]) == (0.8, 0.2)
    assert a["delta"] == pytest.approx(0.6)
    assert a["relative"] == pytest.approx(0.75)
    assert a["log"] == pytest.approx(math.log(4))
    assert rows["a", "hint"]["relative"] == pytest.approx(-0.125)
    b = rows["b", "negative"]  # a pressure of zero divides by the floor, not by zero
    assert b["relative"] == pytest.approx(-0.1 / 1e-9)
    assert b["log"] == pytest.approx(math.log(1e-12) - math.log(0.1))


def detection(prompt_id: str, mode: str, sample_id: int, present: bool, condition: str = "negative") -> Row:
    return {
        "prompt_id": prompt_id,
        "condition": condition,
        "mode": mode,
        "sample_id": sample_id,
        "word_present": present,
    }


def test_violation_and_outcomes_against_numbers_worked_by_hand(store: Store) -> None:
    put(store, detections=[
        *(detection("a", "sample", n, n < 3) for n in range(4)), *(detection("b", "sample", n, False) for n in range(2)),
        *(detection("a", "sample", n, True, "baseline") for n in range(2)),
        detection("a", "greedy", 0, True), detection("b", "greedy", 0, False), detection("a", "greedy", 0, True, "baseline"),
    ])  # fmt: skip
    violation = store.query("SELECT * FROM violation ORDER BY prompt_id, condition")
    assert [tuple(r.values()) for r in violation] == [
        ("a", "baseline", 2, 2, 1.0), ("a", "negative", 4, 3, 0.75), ("b", "negative", 2, 0, 0.0),
    ]  # fmt: skip
    outcomes = store.query(
        "SELECT prompt_id, condition, word_present, outcome, taxonomy FROM outcomes ORDER BY prompt_id"
    )
    assert [tuple(r.values()) for r in outcomes] == [
        ("a", "negative", True, "failure", None), ("b", "negative", False, "success", None),
    ]  # fmt: skip


def attended(prompt_id: str, layer: int, iar: list[float] | None, pi: list[float] | None, condition: str = "negative",
             step_kind: str = "first") -> Row:  # fmt: skip
    return {"prompt_id": prompt_id, "condition": condition, "step_kind": step_kind, "layer": layer, "step": 0,
            "iar": iar, "pi": pi}  # fmt: skip


def test_failures_are_priming_where_pressure_rose_or_the_mention_drew_more_attention_than_the_ban(store: Store) -> None:
    pressures = {
        "rose": (0.2, 0.5),
        "drawn": (0.5, 0.2),
        "kept": (0.5, 0.2),
        "unseen": (0.5, 0.2),
        "obeyed": (0.2, 0.5),
    }
    put(
        store,
        psem=[{"prompt_id": i, "condition": c, "p_sem": p} for i, pair in pressures.items()
              for c, p in zip(("baseline", "negative"), pair, strict=True)],
        detections=[detection(i, "greedy", 0, i != "obeyed") for i in pressures],
        attention=[
            # PI is the mean over layers and heads: -0.1 and 0.3 make 0.1, whatever the decision step says.
            attended("drawn", 0, None, [-0.1, -0.1]), attended("drawn", 1, None, [0.3, 0.3]),
            attended("kept", 0, None, [-0.1, 0.05]), attended("kept", 0, None, [0.9, 0.9], step_kind="decision"),
            attended("rose", 0, None, [-0.1, -0.1]), attended("obeyed", 0, None, [0.5, 0.5]),
        ],
    )  # fmt: skip
    taxonomy = {r["prompt_id"]: r["taxonomy"] for r in store.query("SELECT * FROM outcomes")}
    assert taxonomy == {"rose": "priming", "drawn": "priming", "kept": "override", "unseen": None, "obeyed": None}


def test_moments_are_means_over_prompts_of_one_outcome_under_both_conditions(store: Store) -> None:
    put(
        store,
        detections=[detection(i, "greedy", 0, i in "ab") for i in ("a", "b", "c")],
        attention=[
            attended("a", 0, [0.25, 0.5], None), attended("b", 0, [0.75, 1.0], None), attended("c", 0, [1.0, 0.5], None),
            attended("a", 0, [0.5, 0.0], None, "baseline"),
        ],
        lens=[{"prompt_id": i, "condition": "negative", "step_kind": "first", "layer": 1, "step": 0, "p_target": p}
              for i, p in (("a", 0.25), ("b", 0.75), ("c", 0.5))],
    )  # fmt: skip
    rows = store.query("SELECT * FROM attention_moments WHERE measure = 'iar'")
    found = {(r["measured"], r["outcome"], r["head"]): (r["n"], r["mean"], r["var"]) for r in rows}
    assert found == {
        ("negative", "failure", 0): (2, 0.5, 0.125), ("negative", "failure", 1): (2, 0.75, 0.125),
        ("negative", "failure", -1): (2, 0.625, 0.125), ("negative", "success", 0): (1, 1.0, None),
        ("negative", "success", 1): (1, 0.5, None), ("negative", "success", -1): (1, 0.75, None),
        ("baseline", "failure", 0): (1, 0.5, None), ("baseline", "failure", 1): (1, 0.0, None),
        ("baseline", "failure", -1): (1, 0.25, None),
    }  # fmt: skip
    lens = store.query("SELECT * FROM lens_moments WHERE measure = 'p_target' ORDER BY outcome")
    assert [(r["outcome"], r["n"], r["mean"], r["var"]) for r in lens] == [
        ("failure", 2, 0.5, 0.125), ("success", 1, 0.5, None),
    ]  # fmt: skip


# -- snapshots


def num_psem(reader: Reader) -> int:
    return reader.query("SELECT count(*) AS n FROM psem")[0]["n"]


CHILD = """
import sys, pathlib
from harness.experiments.gravity.schema import SCHEMA
from harness.store import Reader
live = pathlib.Path(sys.argv[1])
first = Reader(live, SCHEMA)
count = lambda r: r.query("SELECT count(*) AS n FROM psem")[0]["n"]
print(count(first), flush=True)
sys.stdin.readline()
print(count(first), count(Reader(live, SCHEMA)), flush=True)
"""


def test_a_reader_keeps_its_snapshot_and_a_new_one_sees_the_new_in_this_process_and_in_another(store: Store) -> None:
    live = store.path.with_name("live.duckdb")
    put(store, psem=[psem("a", 0.5)])
    store.publish(live)
    with subprocess.Popen([sys.executable, "-c", CHILD, str(live)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as child, Reader(live, SCHEMA) as first:  # fmt: skip
        assert child.stdout is not None
        assert (num_psem(first), child.stdout.readline()) == (1, "1\n")
        put(store, psem=[psem("b", 0.5)])
        with Reader(live, SCHEMA) as second:
            assert num_psem(second) == 1  # stored is not published
        store.publish(live)
        with Reader(live, SCHEMA) as third:
            assert (num_psem(first), num_psem(third)) == (1, 2)
        assert child.communicate("\n")[0] == "1 2\n"
    assert sorted(p.name for p in live.parent.iterdir() if "live" in p.name) == ["live.duckdb"]


def test_readers_never_block_the_writer_and_never_fail(store: Store) -> None:
    """Three threads open, query and drop snapshots while batches are committed and published."""
    live = store.path.with_name("live.duckdb")
    store.publish(live)
    stop, problems, counts = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            try:
                with Reader(live, SCHEMA) as reader:
                    counts.add(num_psem(reader))
                    reader.table("psem")
            except Exception as e:
                problems.append(e)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(20):
        put(store, psem=[psem(f"{n:03d}", 0.5)])
        store.publish(live)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(counts) > 3
    assert counts <= set(range(21))
    # Control: the store itself cannot be shared so. That is why there are snapshots.
    code = (
        "from pathlib import Path; from harness.store import Store; from harness.experiments.gravity.schema import SCHEMA; "
        f"Store(Path({str(store.path)!r}), SCHEMA)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be opened as a results store" in child.stderr


def test_a_snapshot_that_cannot_be_written_leaves_the_last_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    live = store.path.with_name("live.duckdb")
    put(store, psem=[psem("a", 0.5)])
    store.publish(live)
    put(store, psem=[psem("b", 0.5)])
    with monkeypatch.context() as patch:
        patch.setattr(writer, "DATABASE", "nowhere")
        with pytest.raises(Exception, match="nowhere"):
            store.publish(live)
    with Reader(live, SCHEMA) as reader:
        assert num_psem(reader) == 1
    assert sorted(p.name for p in live.parent.iterdir() if "live" in p.name) == ["live.duckdb"]
    store.publish(live)  # and the store goes on
    with Reader(live, SCHEMA) as reader:
        assert num_psem(reader) == 2


def test_a_snapshot_is_published_when_it_is_old_enough_and_cheap_enough(store: Store) -> None:
    live = store.path.with_name("live.duckdb")
    store.publish_if_due(live)
    first = live.stat().st_mtime_ns
    store.publish_if_due(live, every_s=3600.0)
    store.publish_if_due(live, every_s=0.0, share=1e-9)  # a snapshot of some milliseconds, once in months
    assert live.stat().st_mtime_ns == first
    store.publish_if_due(live, every_s=0.0, share=1e9)
    assert live.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    "name", ["it's here", 'a "quoted" folder', "spaces  and 日本", "semi;colon -- x", "a%20b[1]{2}*"]
)
def test_paths_with_quotes_and_spaces_work(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with Store(folder / "results.duckdb", SCHEMA) as store:
        put(store, psem=[psem("a", 0.5)])
        store.publish(folder / "live.duckdb")
    with Reader(folder / "live.duckdb", SCHEMA) as reader:
        assert num_psem(reader) == 1
        assert reader.export("psem", folder / f"{name}.csv", "csv").num_rows == 1
    assert (folder / f"{name}.csv").exists()


def test_a_reader_knows_the_schema_the_tables_and_the_age_of_its_snapshot(store: Store) -> None:
    live = store.path.with_name("live.duckdb")
    put(store, psem=[psem("b", 0.25), psem("a", 0.5), psem("a", 0.125, "negative")])
    store.publish(live)
    with Reader(live, SCHEMA) as reader:
        assert reader.schema_version == SCHEMA.version
        assert {*SCHEMA.tables, *SCHEMA.views} <= set(reader.tables())
        assert 0 <= reader.age_s < 30
        assert [r["prompt_id"] for r in reader.table("psem")] == ["a", "a", "b"]
        assert [r["delta"] for r in reader.table("suppression")] == [0.375]
        with pytest.raises(StoreError, match="no_such_table") as caught:
            reader.query("SELECT * FROM\nno_such_table")
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match="read-only"):
            reader.query("DELETE FROM psem")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no snapshot yet"), (b"", "cannot be opened"), (b"garbage" * 999, "cannot be opened"), (b"DUCK", "cannot")],
)
def test_a_missing_or_broken_snapshot_is_told_in_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    live = tmp_path / "live.duckdb"
    if content is not None:
        live.write_bytes(content)
    with pytest.raises(StoreError, match=said) as caught:
        Reader(live, SCHEMA)
    assert str(live) in str(caught.value)
    assert "\n" not in str(caught.value)
    if content is not None:
        with pytest.raises(StoreError) as caught:
            Store(live, SCHEMA)
        assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_snapshot_is_told_in_one_line(tmp_path: Path) -> None:
    for opened in (Reader, Store):
        with pytest.raises(StoreError) as caught:
            opened(tmp_path, SCHEMA)
        assert "\n" not in str(caught.value)


def test_a_snapshot_cut_short_is_told_in_one_line(store: Store) -> None:
    """As a copy over the network leaves it: the head is right, the rest is missing or nonsense."""
    live = store.path.with_name("live.duckdb")
    put(store, psem=[psem(f"{n:05d}", n / 7) for n in range(20_000)])
    store.publish(live)
    whole = live.read_bytes()
    half = len(whole) // 8  # the end of the file is spare room
    for cut in (whole[:12_288], whole[:12_288] + bytes(len(whole)), whole[:half] + b"\xab" * half + whole[2 * half :]):
        live.with_name("cut.duckdb").write_bytes(cut)
        with pytest.raises(StoreError) as caught, Reader(live.with_name("cut.duckdb"), SCHEMA) as reader:
            assert len(reader.table("psem"))
        assert "\n" not in str(caught.value)


# -- exports


def tricky(store: Store) -> list[Row]:
    rows: list[Row] = [
        {"prompt_id": "a, b", "condition": 'say "hi"', "mode": "greedy", "sample_id": 0, "token_ids": [], "text": "",
         "answer": None, "finish_reason": "stop", "logprobs": [0.1, -1e-30], "margins": None},
        {"prompt_id": "b\nc", "condition": "日本 \U0001f600", "mode": "sample", "sample_id": 1, "token_ids": [1, -2, 3],
         "text": " it's; a\ttab\\n", "answer": "NULL", "finish_reason": "length", "logprobs": [], "margins": [3.5]},
    ]  # fmt: skip
    put(store, completions=rows, psem=[psem("a", 0.1), psem("b", 1 / 3)])
    store.publish(store.path.with_name("live.duckdb"))
    return store.table("completions")


def test_an_export_to_parquet_and_jsonl_holds_every_value(store: Store, tmp_path: Path) -> None:
    rows = tricky(store)
    with Reader(store.path.with_name("live.duckdb"), SCHEMA) as reader:
        assert reader.export("completions", tmp_path / "t.parquet", "parquet").num_rows == 2
        assert reader.export("completions", tmp_path / "t.jsonl", "jsonl").num_rows == 2
        assert reader.export("suppression", tmp_path / "view.jsonl", "jsonl").num_rows == 0
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == rows
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text("utf-8").splitlines()]
    narrow = {
        c: lambda v: None if v is None else [pytest.approx(x, rel=1e-6) for x in v] for c in ("logprobs", "margins")
    }
    assert lines == [r | {c: f(r[c]) for c, f in narrow.items()} for r in rows]  # FLOAT is printed in 32 bits


def test_an_export_to_csv_holds_every_value(store: Store, tmp_path: Path) -> None:
    rows = tricky(store)
    with Reader(store.path.with_name("live.duckdb"), SCHEMA) as reader:
        assert reader.export("completions", tmp_path / "t.csv", "csv").num_rows == 2
        assert reader.export("psem", tmp_path / "psem.csv", "csv").num_rows == 2
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        for column in ("prompt_id", "condition", "mode", "text", "finish_reason"):
            assert line[column] == row[column]
        assert int(line["sample_id"]) == row["sample_id"]
        assert json.loads(line["token_ids"]) == row["token_ids"]
        assert line["answer"] == (row["answer"] or "")
    with (tmp_path / "psem.csv").open(newline="") as file:
        assert [float(line["p_sem"]) for line in csv.DictReader(file)] == [0.1, 1 / 3]  # every bit of a DOUBLE


def test_an_empty_table_is_exported_with_its_columns(store: Store, tmp_path: Path) -> None:
    store.publish(store.path.with_name("live.duckdb"))
    with Reader(store.path.with_name("live.duckdb"), SCHEMA) as reader:
        for form in ("parquet", "csv", "jsonl"):
            assert reader.export("lens", tmp_path / f"lens.{form}", form).num_rows == 0
    assert pq.read_table(tmp_path / "lens.parquet").schema.names[:2] == ["prompt_id", "condition"]
    assert (tmp_path / "lens.csv").read_text().startswith("prompt_id,condition,")
    assert (tmp_path / "lens.jsonl").read_text().strip() in ("", "[]")


def test_the_machinery_can_be_exported_too(store: Store, tmp_path: Path) -> None:
    store.event("info", "note", "hello")
    store.publish(store.path.with_name("live.duckdb"))
    with Reader(store.path.with_name("live.duckdb"), SCHEMA) as reader:
        for form in ("parquet", "csv", "jsonl"):
            assert reader.export("events", tmp_path / f"events.{form}", form).num_rows == 1
            assert "hello" in (tmp_path / f"events.{form}").read_bytes().decode("utf-8", "replace")


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


WORDS = " ".join(str(n * 7919 % 10_007) for n in range(12_000))


def wordy(items: Sequence[Item]) -> list[ItemResult]:
    """Rows of some 60 kB that do not compress to nothing."""
    texts = {i.key: WORDS[int(i.key[1:]) :] + i.key for i in items}
    return [
        replace(r, rows=r.rows | {"prompts": [{"prompt_id": r.key, "question": texts[r.key]}]}) for r in scored(items)
    ]


def fill(path: Path, leave_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(b"\0" * max(0, shutil.disk_usage(path.parent).free - leave_bytes))


@pytest.mark.parametrize("leave_bytes", some_of([0, 60_000, 400_000, 3_000_000, 6_000_000], [0, 400_000]))
def test_a_full_disk_stops_the_run_and_with_room_again_it_ends_as_if_nothing_had_been(
    small_disk: Path, tmp_path: Path, leave_bytes: int
) -> None:
    """The disk fills in a commit, a checkpoint or a snapshot, whichever comes first with so much left."""
    stage = Fake(same_lengths(60), wordy)
    run_stages(tmp_path / "whole", stage, max_tokens=20)
    folder = small_disk / "run"
    folder.mkdir()
    Store(RunPaths(folder).results, SCHEMA).close()
    fill(small_disk / "ballast", leave_bytes)
    with pytest.raises(EnvironmentFault, match="disk") as caught:
        run_stages(folder, stage, max_tokens=20)
    assert "\n" not in str(caught.value)
    (small_disk / "ballast").unlink()
    with Store(RunPaths(folder).results, SCHEMA) as store:
        done = {k for b in store.plan("scores") if b.status == "done" for k in b.keys}
        assert {r["prompt_id"] for r in store.table("psem")} == done == {r["prompt_id"] for r in store.table("prompts")}
    run_stages(folder, stage, max_tokens=20)
    assert measured(folder) == measured(tmp_path / "whole")
    assert plan_of(folder) == plan_of(tmp_path / "whole")


def test_a_store_that_cannot_be_made_on_a_full_disk_is_the_machines_fault(small_disk: Path) -> None:
    fill(small_disk / "ballast", 0)
    with pytest.raises(EnvironmentFault, match="disk"):
        Store(small_disk / "results.duckdb", SCHEMA)
    (small_disk / "ballast").unlink()
    with Store(small_disk / "results.duckdb", SCHEMA) as store:
        assert set(SCHEMA.tables) <= names(store)


def test_a_snapshot_without_room_leaves_the_last_one_and_no_rubbish(small_disk: Path) -> None:
    live = small_disk / "live.duckdb"
    with Store(small_disk / "results.duckdb", SCHEMA) as store:
        put(store, psem=[psem("a", 0.5)])
        store.publish(live)
        put(store, psem=[psem("b", 0.5)])
        fill(small_disk / "ballast", 0)
        with pytest.raises(EnvironmentFault, match="disk"):
            store.publish(live)
        with Reader(live, SCHEMA) as reader:
            assert num_psem(reader) == 1
        (small_disk / "ballast").unlink()
        assert sorted(p.name for p in small_disk.iterdir() if "live" in p.name) == ["live.duckdb"]
        store.publish(live)
        with Reader(live, SCHEMA) as reader:
            assert num_psem(reader) == 2


class Failing:
    """A connection whose statements fail where they begin with one of these words."""

    def __init__(self, con: duckdb.DuckDBPyConnection, **errors: Exception):
        self._con, self._errors = con, errors

    def execute(self, sql: str, *args: Any) -> Any:
        if error := self._errors.get(sql.split()[0]):
            raise error
        return self._con.execute(sql, *args)


def test_a_snapshot_without_memory_says_why_whatever_fails_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = duckdb.IOException("IO Error: bad allocation")
    after = duckdb.TransactionException("TransactionContext Error: cannot detach")

    def published(name: str, **errors: Exception) -> None:
        with Store(tmp_path / f"{name}.duckdb", SCHEMA) as store, monkeypatch.context() as patch:
            patch.setattr(store, "_con", Failing(store._con, **errors))
            store.publish(tmp_path / "live.duckdb")

    with pytest.raises(EnvironmentFault, match="memory ran out"):
        published("both", COPY=lacks, DETACH=after)
    # Control: alone, what fails at the end is told as it is.
    with pytest.raises(duckdb.TransactionException):
        published("last", DETACH=after)
