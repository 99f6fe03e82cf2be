"""What a store may hold: the machinery's tables and one experiment's, by version; and its rows a piece at a time."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from harness.errors import StoreError
from harness.experiments.gravity.schema import SCHEMA
from harness.store import (
    AlteredStore,
    Batch,
    BatchResult,
    Reader,
    Row,
    Schema,
    Store,
    TableFacts,
    ask_locked,
    rows,
    schema,
)
from tests.fakes import later, older_store

TOY = Schema(
    "toy",
    (
        "CREATE TABLE things (thing VARCHAR, place INTEGER, weight DOUBLE, PRIMARY KEY (thing, place))",
        "ALTER TABLE things ADD COLUMN colour VARCHAR; CREATE VIEW heavy AS SELECT thing FROM things WHERE weight > 1",
    ),
    facts=TableFacts(derived=("sums",), orphans={"things": "SELECT 1"}),
)
CORE_TABLES = ("artifacts", "sanity_items", "stages", "batches", "events")


def applied(path: Path) -> dict[str, list[int]]:
    """What a store records, by whose it is."""
    with duckdb.connect(str(path), read_only=True) as con:
        found = con.execute("SELECT experiment, list(number ORDER BY number) FROM migrations GROUP BY 1").fetchall()
    return dict(found)


def change(path: Path, sql: str) -> None:
    with duckdb.connect(str(path)) as con:
        con.execute(sql)


# -- another experiment


def test_another_experiments_store_holds_its_tables_beside_the_machinerys(tmp_path: Path) -> None:
    path, live = tmp_path / "results.duckdb", tmp_path / "live.duckdb"
    things = [{"thing": t, "place": n, "weight": float(n), "colour": None} for t in "ab" for n in range(3)]
    with Store(path, TOY) as store:
        assert TOY.tables == ("things", *CORE_TABLES)
        assert (TOY.measured, TOY.machinery) == (("things", "artifacts"), CORE_TABLES[1:])
        assert TOY.views == ("heavy", "sanity")
        assert set(store.counts()) == set(TOY.tables)
        store.commit(Batch("s", 0, (), 0), BatchResult(rows={"things": things[::-1]}))
        store.publish(live)
        assert store.seal(tmp_path / "seal.parquet")["things"].rows == 6
    assert applied(path) == {"core": [1], "toy": [1, 2]}
    with Reader(live, TOY) as reader:
        assert reader.table("things") == things
        assert reader.table("heavy") == [{"thing": "a"}, {"thing": "b"}]
        assert "psem" not in reader.tables()
        assert reader.schema_version == 2


def test_what_is_known_of_an_experiments_tables_comes_with_what_is_known_of_the_machinerys() -> None:
    assert TOY.derived == ("sums", "sanity_items", "artifacts")
    assert set(TOY.orphans) == {"things"}
    assert all(name.startswith(("stages:", "batches:")) for name in TOY.sense)
    assert set(TOY.sense) < set(SCHEMA.sense)


def test_the_machinerys_tables_are_the_same_for_every_experiment(tmp_path: Path) -> None:
    """gravity's came to be in seven steps; only the order of its columns may tell."""
    found = []
    for of in (SCHEMA, TOY):
        with Store(tmp_path / f"{of.experiment}.duckdb", of) as store:
            found_here = store.query(
                "SELECT table_name, column_name, data_type, column_default FROM information_schema.columns "
                "WHERE table_catalog = 'run' AND NOT starts_with(table_name, 'duckdb')"
            )
            found.append(
                {tuple(r.values()) for r in found_here if r["table_name"] in (*CORE_TABLES, "sanity", "migrations")}
            )
    assert found[0] - found[1] == {("artifacts", c, "VARCHAR", None) for c in ("prompt_id", "condition")}
    assert not found[1] - found[0]


@pytest.mark.parametrize(("made", "opened"), [(TOY, SCHEMA), (SCHEMA, TOY)])
def test_a_store_of_another_experiment_is_refused_in_one_line_that_names_it(
    tmp_path: Path, made: Schema, opened: Schema
) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, made).close()
    before = path.read_bytes()
    for how in (Store, Reader):
        with pytest.raises(StoreError) as caught:
            how(path, opened)
        told = f"holds results of the experiment '{made.experiment}', expected those of '{opened.experiment}'"
        assert str(caught.value) == f"{path}: {told}"
        assert path.read_bytes() == before
    for how in (Store, Reader):  # the control
        how(path, made).close()


def test_a_store_that_was_made_before_experiments_had_names_is_no_other_experiments(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    older_store(path, SCHEMA.made_core)
    with pytest.raises(StoreError, match="a harness that knew one experiment, expected those of 'toy'"):
        Store(path, TOY)
    Reader(path, SCHEMA).close()  # the control


def test_every_pair_of_versions_is_recognised_and_brought_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machinery and an experiment go their own ways: a harness may bring one, the other or both."""
    own = (TOY, replace(TOY, migrations=(*TOY.migrations, "CREATE TABLE more (a INTEGER PRIMARY KEY)")))
    core = (schema.CORE, (*schema.CORE, "ALTER TABLE events ADD COLUMN host VARCHAR"))
    for one in (*own, SCHEMA):
        for first in core:
            path = tmp_path / f"{one.experiment}{one.version}{len(first)}.duckdb"
            monkeypatch.setattr(schema, "CORE", first)
            schema._made.cache_clear()
            Store(path, one).close()
            monkeypatch.setattr(schema, "CORE", core[1])
            schema._made.cache_clear()
            newest = own[1] if one.experiment == "toy" else later("CREATE TABLE more (a INTEGER PRIMARY KEY)")
            with Reader(path, newest) as reader:
                assert tuple(reader.version) == (len(first), one.version)
            Store(path, newest).close()
            with Reader(path, newest) as reader:
                assert reader.version == newest.newest
                assert {"more", "migrations"} <= set(reader.tables())
            if len(first) == 2:  # the control: a harness whose machinery is older
                monkeypatch.setattr(schema, "CORE", core[0])
                schema._made.cache_clear()
                with pytest.raises(StoreError, match=r"schema \d+ \(machinery 2\), this harness knows up to"):
                    Reader(path, newest)
    monkeypatch.undo()
    schema._made.cache_clear()


@pytest.mark.parametrize(
    ("sql", "told"),
    [("ALTER TABLE batches ADD COLUMN more VARCHAR", "table batches is defined otherwise"),
     ("DROP TABLE batches", "table batches is missing"), ("CREATE MACRO max(x) AS 7", "macro max is not of this schema"),
     ("DROP TABLE migrations", "table migrations is missing"),
     ("DELETE FROM migrations WHERE experiment = 'toy' AND number = 2", "migrations records 1, its tables are those of 2"),
     ("DELETE FROM migrations WHERE experiment = 'core'", r"migrations records 2 \(machinery 0\), its tables are those of 2")],
)  # fmt: skip
def test_a_change_to_another_experiments_store_is_named(tmp_path: Path, sql: str, told: str) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, TOY).close()
    Reader(path, TOY).close()  # the control
    change(path, sql)
    with pytest.raises(AlteredStore, match=told):
        Reader(path, TOY)


def test_a_schema_goes_through_json_and_answers_questions_on_the_other_side(tmp_path: Path) -> None:
    path, live = tmp_path / "results.duckdb", tmp_path / "live.duckdb"
    with Store(path, TOY) as store:
        store.publish(live)
    sent = Schema.unpacked(json.loads(json.dumps(TOY.packed())))
    assert ask_locked(live, sent, "SELECT count(*) AS n FROM things").rows["n"].to_pylist() == [0]
    with pytest.raises(StoreError, match="expected those of 'gravity'"):  # the control
        ask_locked(live, Schema.unpacked(json.loads(json.dumps(SCHEMA.packed()))), "SELECT 1")


# -- gravity's older stores


ARTIFACT = "('{0}.safetensors', 'resid', 'ab', 8, [2], 'float32', {1}, {2})"
KEYS = {
    "whole": ("'milk'", "'negative'", {"prompt_id": "milk", "condition": "negative"}),
    "half": ("'it''s'", "NULL", {"prompt_id": "it's"}),
    "none": ("NULL", "NULL", {}),
}


def old_gravity(path: Path, version: int) -> list[tuple[Any, ...]]:
    """A store of an earlier version with rows of its experiment and of the machinery; its artifacts."""
    older_store(path, version)
    with duckdb.connect(str(path)) as con:
        con.execute("INSERT INTO psem (prompt_id, condition, p_sem) VALUES ('milk', 'negative', 0.1)")
        con.execute("INSERT INTO events (level, kind, message) VALUES ('info', 'note', 'of long ago')")
        con.execute(
            "INSERT INTO batches (stage, batch_id, status, keys, num_items, padded_tokens, attempt) "
            "VALUES ('psem', 0, 'done', ['milk'], 1, 9, 1)"
        )
        for name, (prompt_id, condition, _) in KEYS.items():
            con.execute(f"INSERT INTO artifacts VALUES {ARTIFACT.format(name, prompt_id, condition)}")
        return con.execute("SELECT * FROM artifacts ORDER BY path").fetchall()


@pytest.mark.parametrize("version", range(1, SCHEMA.made_core + 1))
def test_a_gravity_store_of_every_older_version_is_read_as_it_is_and_brought_to_this_one(
    tmp_path: Path, version: int
) -> None:
    path = tmp_path / "results.duckdb"
    artifacts = old_gravity(path, version)
    with Reader(path, SCHEMA) as reader:
        assert tuple(reader.version) == (0, version)
        assert [tuple(r.values()) for r in reader.table("artifacts")] == artifacts
        assert "schema_version" in reader.tables()
    kept: list[Row] = []
    for _ in range(2):  # once is enough, twice does no harm
        with Store(path, SCHEMA) as store:
            assert [(r["prompt_id"], r["p_sem"]) for r in store.table("psem")] == [("milk", 0.1)]
            assert [r["message"] for r in store.table("events")] == ["of long ago"]
            assert [b.keys for b in store.plan("psem")] == [("milk",)]
            kept = store.table("artifacts")
    assert [tuple(r.values())[:8] for r in kept] == artifacts
    assert {r["path"].removesuffix(".safetensors"): r["keys"] for r in kept} == {n: k[2] for n, k in KEYS.items()}
    assert {(r["stage"], r["batch_id"], r["item_key"]) for r in kept} == {(None, None, None)}
    assert applied(path) == {"gravity": list(range(1, SCHEMA.version + 1)), "core": [1]}
    with Reader(path, SCHEMA) as reader:
        assert reader.version == SCHEMA.newest
        assert "schema_version" not in reader.tables()


def test_a_store_that_dies_while_it_is_set_apart_is_the_older_one_still(tmp_path: Path) -> None:
    path = tmp_path / "results.duckdb"
    artifacts = old_gravity(path, SCHEMA.made_core)
    last = SCHEMA.migrations[SCHEMA.made_core]
    broken = replace(SCHEMA, migrations=(*SCHEMA.migrations[: SCHEMA.made_core], f"{last} SELECT error('in it');"))
    with pytest.raises(StoreError, match="in it"):
        Store(path, broken)
    with Reader(path, SCHEMA) as reader:
        assert tuple(reader.version) == (0, SCHEMA.made_core)
        assert [tuple(r.values()) for r in reader.table("artifacts")] == artifacts
    Store(path, SCHEMA).close()
    assert set(applied(path)) == {"gravity", "core"}


@pytest.mark.parametrize(
    ("sql", "told"),
    [("DELETE FROM schema_version WHERE version > 3", "schema_version records 3, its tables are those of 7"),
     ("DROP VIEW violation", "view violation is missing")],
)  # fmt: skip
def test_an_older_store_that_was_changed_is_refused_by_the_name_of_it(tmp_path: Path, sql: str, told: str) -> None:
    path = tmp_path / "results.duckdb"
    older_store(path, 7)
    Reader(path, SCHEMA).close()  # the control
    change(path, sql)
    with pytest.raises(AlteredStore, match=told):
        Reader(path, SCHEMA)


def test_the_order_of_gravitys_tables_is_that_of_its_seals() -> None:
    assert SCHEMA.tables == (
        "vocabulary", "prompts", "contexts", "psem", "completions", "detections", "attention", "lens", "decomposition",
        "patching", "activations", "artifacts", "statistics", "sanity_items", "stages", "batches", "events",
    )  # fmt: skip
    assert SCHEMA.measured == SCHEMA.tables[:13]


# -- files


def test_keys_of_a_file_stand_in_columns_of_their_name_too(tmp_path: Path) -> None:
    row = {"path": "a", "stage": "s", "batch_id": 3, "item_key": "k", "keys": {"prompt_id": "p", "layer": "7"}}
    found = []
    for of in (SCHEMA, TOY):
        with Store(tmp_path / f"{of.experiment}.duckdb", of) as store:
            store.commit(Batch("s", 3, ("k",), 0), BatchResult(rows={"artifacts": [row]}))
            found += store.table("artifacts")
    gravity, toy = found
    assert (gravity["prompt_id"], gravity["condition"]) == ("p", None)
    assert "prompt_id" not in toy
    assert gravity["keys"] == toy["keys"] == row["keys"]
    assert (toy["stage"], toy["batch_id"], toy["item_key"]) == ("s", 3, "k")


# -- rows without holding a table


@pytest.fixture(params=["writer", "reader", "writer, in ranges", "reader, in ranges"])
def handle(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store | Reader]:
    """A store of 300 rows that were written in another order than that of their key; a large one is cut into ranges."""
    if "ranges" in request.param:
        monkeypatch.setattr(rows, "RANGE_ROWS", 100)
    things = [{"thing": f"t{n % 60:02d}", "place": n // 60, "weight": n / 7, "colour": "red"} for n in range(300)]
    with Store(tmp_path / "results.duckdb", TOY) as store:
        for part in range(3):
            store.commit(Batch("s", part, (), 0), BatchResult(rows={"things": things[part::3][::-1]}))
        store.publish(tmp_path / "live.duckdb")
        assert len(rows.ranges(store._con, "things", store._key("things"))) == (3 if "ranges" in request.param else 1)
        assert rows.ranges(store._con, "heavy", store._key("heavy")) == ["true"], "a view has no key"
        if request.param.startswith("writer"):
            yield store
        else:
            with Reader(tmp_path / "live.duckdb", TOY) as reader:
                yield reader


def keys_of(found: list[Row]) -> list[tuple[str, int]]:
    return [(r["thing"], r["place"]) for r in found]


def test_batches_are_the_table_a_piece_at_a_time_in_the_order_of_its_key(handle: Store | Reader) -> None:
    whole = handle.table("things")
    assert keys_of(whole) == sorted(keys_of(whole))
    unordered = handle.query("SELECT * FROM things")
    assert keys_of(unordered) != keys_of(whole), "the control: the table itself has another order"
    pieces = list(handle.batches("things", rows=64))
    assert all(isinstance(piece, pa.RecordBatch) for piece in pieces)
    assert len(pieces) > 1
    assert max(piece.num_rows for piece in pieces) <= 64
    assert [row for piece in pieces for row in piece.to_pylist()] == whole
    some = list(handle.batches("things", ["weight", "thing"]))
    assert [r for piece in some for r in piece.to_pylist()] == [
        {"weight": r["weight"], "thing": r["thing"]} for r in whole
    ]
    assert handle.table("things", ["place"]) == [{"place": r["place"]} for r in whole]


def test_the_store_answers_and_writes_while_a_stream_of_it_is_read(tmp_path: Path) -> None:
    with Store(tmp_path / "results.duckdb", TOY) as store:
        given = [{"thing": f"{n:05d}", "place": 0, "weight": 1.0} for n in range(5_000)]
        store.commit(Batch("s", 0, (), 0), BatchResult(rows={"things": given}))
        seen, streams = 0, (store.batches("things", rows=512), store.batches("things", rows=2048))
        for n, piece in enumerate(streams[0]):
            seen += piece.num_rows
            more = [{"thing": f"new {n}", "place": 1, "weight": 1.0}]
            store.commit(Batch("s", 1 + n, (), 0), BatchResult(rows={"things": more}))
            store.publish(tmp_path / "live.duckdb")
            assert store.counts()["things"] == 5_000 + n + 1
        assert seen == 5_000, "what was there when it was asked for"
        assert sum(piece.num_rows for piece in streams[1]) == 5_000
        assert sum(piece.num_rows for piece in store.batches("things")) > 5_000, "the control: a new one sees the new"
        store.seal(tmp_path / "seal.parquet")


@pytest.mark.parametrize("first", ["VARCHAR", "INTEGER", "DOUBLE"])
def test_ranges_lose_no_row_whatever_a_key_begins_with(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "RANGE_ROWS", 7)
    toy = Schema("toy", (f"CREATE TABLE t (a {first}, b INTEGER, PRIMARY KEY (a, b))",))
    texts = ["", "'", "it's", "a", "a ", "Ä", "\U0001f600", "b'", '"', "%"]
    values = texts if first == "VARCHAR" else [n - 5 if first == "INTEGER" else n / 3 - 1 for n in range(10)]
    given = [{"a": a, "b": b} for a in values for b in range(9 if a == values[3] else 3)]
    with Store(tmp_path / "results.duckdb", toy) as store:
        store.commit(Batch("s", 0, (), 0), BatchResult(rows={"t": given[::-1]}))
        assert [r for piece in store.batches("t") for r in piece.to_pylist()] == store.table("t")
        assert len(store.table("t")) == len(given)
        assert (len(rows.ranges(store._con, "t", ("a", "b"))) > 2) == (first != "DOUBLE")


def test_a_stream_in_ranges_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RANGE_ROWS", 10)
    with Store(tmp_path / "results.duckdb", TOY) as store:
        given = [{"thing": f"{n:03d}", "place": 0, "weight": 1.0} for n in range(50)]
        store.commit(Batch("s", 0, (), 0), BatchResult(rows={"things": given}))
        stream = store.batches("things")
        assert next(stream).num_rows == 10
        more = [{"thing": f"{n:03d}", "place": 1, "weight": 1.0} for n in range(50)]
        store.commit(Batch("s", 1, (), 0), BatchResult(rows={"things": more}))
        assert sum(piece.num_rows for piece in stream) == 40
        assert sum(piece.num_rows for piece in store.batches("things")) == 100, "the control"


def test_rows_with_gives_the_rows_of_these_keys_and_no_others(handle: Store | Reader) -> None:
    whole = handle.table("things")
    wanted = [{"thing": "t59"}, {"thing": "t07"}, {"thing": "t07"}, {"thing": "no such"}]
    assert handle.rows_with("things", wanted) == [r for r in whole if r["thing"] in ("t59", "t07")]
    pair = [{"place": 4, "thing": "t03"}, {"place": 0, "thing": "t50"}]
    assert keys_of(handle.rows_with("things", pair, ["thing", "place"])) == [("t03", 4), ("t50", 0)]
    assert handle.rows_with("things", [{"weight": 0.0}], ["thing"]) == [{"thing": "t00"}]
    assert handle.rows_with("heavy", [{"thing": "t01"}])[0] == {"thing": "t01"}
    assert handle.rows_with("things", []) == []
    with pytest.raises(AssertionError, match="the same columns"):  # one that names fewer would match by chance
        handle.rows_with("things", [{"thing": "t01"}, {"place": 1}])


def test_whether_anything_waits_is_told_without_a_plan(tmp_path: Path) -> None:
    with Store(tmp_path / "results.duckdb", TOY) as store:
        store.add_batches([Batch("s", n, (f"k{n}",), 1) for n in range(3)])
        store.start_stage("s", 1, 3)
        assert not store.waiting("another")
        for n in range(3):
            assert store.waiting("s")
            assert [b.batch_id for b in store.plan("s", "planned")] == list(range(n, 3))
            store.commit(Batch("s", n, (f"k{n}",), 1), BatchResult())
        assert not store.waiting("s")
        assert len(store.plan("s")) == len(store.plan("s", "done")) == 3
