"""The seal's digests: equal rows give equal ones, any change another, and a later migration breaks none."""

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import RunError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Batch, BatchResult, Reader, Row, Schema, Store, TableSeal, seal
from tests.fakes import later

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.none() | st.sampled_from(["", "NULL", "null", "a", '"', "\\", "a\nb", "é", "e\u0301", "\U0001f600"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4
)  # fmt: skip
SPANS = st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)).map(list)
ROWS: dict[str, st.SearchStrategy[Row]] = {
    "psem": st.fixed_dictionaries({
        "p_sem": st.none() | FLOATS, "num_sequences": st.none() | st.integers(-9, 9),
        "sequences": st.none() | st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2),
        "logprobs": st.none() | st.lists(st.none() | FLOATS, max_size=3)}),
    "completions": st.fixed_dictionaries({
        "text": TEXTS, "answer": TEXTS, "logprobs": st.none() | st.lists(st.floats(width=32, allow_nan=False,
        allow_infinity=False), max_size=3), "mode": st.just("greedy"), "sample_id": st.just(0)}),
    "contexts": st.fixed_dictionaries({
        "spans": st.none() | st.fixed_dictionaries(dict.fromkeys(("instruction", "negation", "mention", "question"), SPANS)),
        "offsets": st.none() | st.lists(SPANS.filter(bool), max_size=2)}),
    "detections": st.fixed_dictionaries({
        "word_present": st.none() | st.booleans(), "mode": st.just("greedy"), "sample_id": st.just(0)}),
}  # fmt: skip


def keyed(rows: list[Row]) -> list[Row]:
    return [{"prompt_id": f"p{n}", "condition": "baseline", **row} for n, row in enumerate(rows)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[Row]]:
    name = draw(st.sampled_from(sorted(ROWS)))
    return name, keyed(draw(st.lists(ROWS[name], min_size=1, max_size=4)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("seal") / "results.duckdb", SCHEMA) as opened:
        yield opened


def sealed(store: Store, table: str, rows: list[Row]) -> TableSeal:
    """The seal of a table that holds just these rows, inserted in this order."""
    gone = [(table, {"condition": "baseline"})]
    store.commit(Batch("s", 0, (), 1), BatchResult(rows={}, replaced=gone))
    store.commit(Batch("s", 0, (), 1), BatchResult(rows={table: rows}))
    return store.seal(store.path.with_suffix(".parquet"))[table]


def same(a: Any, b: Any) -> bool:
    """Equal as a store tells it: 0.0 and -0.0 are two values, and so are NULL and ''."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return type(a) is type(b) and a == b


@settings(max_examples=30, deadline=None)
@given(given_rows=tables(), data=st.data())
def test_equal_rows_have_equal_digests_in_any_order_and_another_value_has_another(
    store: Store, given_rows: tuple[str, list[Row]], data: st.DataObject
) -> None:
    name, rows = given_rows
    first = sealed(store, name, rows)
    assert first.rows == len(rows)
    assert sealed(store, name, data.draw(st.permutations(rows))) == first
    n = data.draw(st.integers(0, len(rows) - 1))
    other = copy.deepcopy(rows)
    other[n] |= data.draw(ROWS[name])
    assert (sealed(store, name, other) == first) == same(rows, other)


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [("completions", "text", [None, "", "NULL", "null", " ", "\\N", "é", "e\u0301", "None"]),
     ("psem", "p_sem", [None, 0.0, -0.0, 5e-324, 0.1, math.nextafter(0.1, 1), 1e308, -1e308, 1e22, 1e22 + 2e6]),
     ("psem", "logprobs", [None, [], [None], [0.0], [-0.0], [0.0, 0.0], [0.1], [math.nextafter(0.1, 0)]]),
     ("completions", "logprobs", [None, [], [0.10000000149011612], [0.10000000894069672], [16777216.0], [16777218.0]]),
     ("psem", "sequences", [None, [], [[]], [[], []], [[1], [2]], [[1, 2]], [[2], [1]]]),
     ("detections", "word_present", [None, False, True])],
)  # fmt: skip
def test_values_that_are_easily_taken_for_each_other_have_digests_of_their_own(
    store: Store, table: str, column: str, values: list[Any]
) -> None:
    more = {"mode": "greedy", "sample_id": 0} if table != "psem" else {}
    found = {sealed(store, table, keyed([{column: v, **more}])).sha256 for v in values}
    assert len(found) == len(values)


def test_the_same_value_in_another_column_or_another_rows_key_is_another_digest(store: Store) -> None:
    a = sealed(store, "completions", keyed([{"mode": "greedy", "sample_id": 0, "text": "a", "answer": None}]))
    b = sealed(store, "completions", keyed([{"mode": "greedy", "sample_id": 0, "text": None, "answer": "a"}]))
    c = sealed(store, "completions", keyed([{"mode": "greedy", "sample_id": 1, "text": "a", "answer": None}]))
    assert len({a.sha256, b.sha256, c.sha256}) == 3


def test_two_rows_that_change_places_have_another_digest(store: Store) -> None:
    one = sealed(store, "psem", keyed([{"p_sem": 0.25}, {"p_sem": 0.75}]))
    assert one != sealed(store, "psem", keyed([{"p_sem": 0.75}, {"p_sem": 0.25}]))


def test_a_seal_has_every_table_and_its_file_a_row_for_every_row(store: Store, tmp_path: Path) -> None:
    sealed(store, "psem", keyed([{"p_sem": 0.5}] * 3))
    found = store.seal(tmp_path / "seal.parquet")
    assert tuple(found) == SCHEMA.tables
    assert {name: t.rows for name, t in found.items()} == store.counts()
    rows = duckdb.execute(
        f"SELECT tbl, key FROM '{tmp_path / 'seal.parquet'}' WHERE tbl = 'psem' ORDER BY key"
    ).fetchall()
    assert rows == [("psem", f'{{"prompt_id":"p{n}","condition":"baseline"}}') for n in range(3)]


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A folder with a store of two rows, sealed with a manifest."""
    paths = RunPaths(tmp_path / "run")
    paths.folder.mkdir()
    with Store(paths.results, SCHEMA) as writer:
        writer.commit(Batch("s", 0, (), 1), BatchResult(rows={"psem": keyed([{"p_sem": 0.5}, {"p_sem": 0.25}])}))
        seal.write(paths, SCHEMA, writer.seal(paths.row_digests), {"run_id": "run", "é": [1, {"a": None}], "x": 1.0})
    return paths


def broken(run: RunPaths, schema: Schema = SCHEMA) -> list[str]:
    found = seal.read(run)
    assert found is not None
    return list(seal.changed_rows(found, run, run.results, schema))


def test_a_seal_reads_as_it_was_written(run: RunPaths) -> None:
    found = seal.read(run)
    assert found is not None
    assert found.manifest == {"run_id": "run", "é": [1, {"a": None}], "x": 1.0}
    assert found.tables["psem"].rows == 2
    assert found.tables["lens"].rows == 0
    assert broken(run) == []


def test_a_column_or_table_that_a_later_version_adds_does_not_break_an_older_seal(
    run: RunPaths,
) -> None:
    schema = later("ALTER TABLE psem ADD COLUMN surprise DOUBLE DEFAULT 1; CREATE TABLE later (a INTEGER PRIMARY KEY)")
    Store(run.results, schema).close()
    assert broken(run, schema) == []
    with duckdb.connect(str(run.results)) as con:  # the control
        con.execute("UPDATE psem SET p_word = 1 WHERE prompt_id = 'p1'")
    assert broken(run, schema) == ["results.duckdb: psem prompt_id=p1, condition=baseline: changed"]


def test_a_column_or_table_that_a_later_version_drops_is_named_beside_the_rows_of_the_others(run: RunPaths) -> None:
    schema = later("ALTER TABLE psem DROP COLUMN entropy; DROP TABLE patching;")
    Store(run.results, schema).close()
    with duckdb.connect(str(run.results)) as con:
        con.execute("INSERT INTO prompts (prompt_id) VALUES ('new')")
    assert broken(run, schema) == [
        "results.duckdb: patching: missing", "results.duckdb: psem.entropy: missing",
        "results.duckdb: prompts prompt_id=new: added",
    ]  # fmt: skip


def test_a_store_with_a_table_that_no_version_has_is_not_read_at_all(run: RunPaths) -> None:
    with duckdb.connect(str(run.results)) as con:
        con.execute("CREATE TABLE later (a INTEGER PRIMARY KEY)")
    assert broken(run) == ["results.duckdb: nothing of it is read: table later is not of this schema"]


def test_a_table_that_is_empty_now_or_was_is_told_row_by_row(run: RunPaths) -> None:
    with duckdb.connect(str(run.results)) as con:
        con.execute("DELETE FROM psem")
    assert broken(run) == [f"results.duckdb: psem prompt_id=p{n}, condition=baseline: missing" for n in (0, 1)]


def test_before_a_run_goes_on_its_seal_is_taken_off_and_one_that_has_none_has_none(run: RunPaths) -> None:
    seal.remove(run)
    seal.remove(run)
    assert seal.read(run) is None
    assert not run.row_digests.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"a"', b"{}", b'{"sha256": 1}', b"\xff\xfe", b"null"])
def test_what_is_no_seal_is_refused_in_one_line(run: RunPaths, content: bytes) -> None:
    run.seal.write_bytes(content)
    with pytest.raises(RunError, match=r"seal\.json"):
        seal.read(run)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_seal_is_seen_or_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    paths = RunPaths(tmp_path_factory.getbasetemp() / "flipped")
    if not paths.folder.exists():
        paths.folder.mkdir()
        paths.row_digests.write_bytes(b"digests")
        seal.write(
            paths,
            SCHEMA,
            {"psem": TableSeal(("a", "b"), 2, "0" * 64)},
            {"run_id": "run", "é": [1, {"a": None}], "x": 1.5},
        )
        (paths.folder / "whole").write_bytes(paths.seal.read_bytes())
    content = bytearray((paths.folder / "whole").read_bytes())
    paths.seal.write_bytes(content)
    whole = seal.read(paths)
    content[place % len(content)] ^= 1 << bit
    paths.seal.write_bytes(content)
    with suppress(RunError):
        assert seal.read(paths) == whole  # a space between two values, say


def test_a_reader_of_the_snapshot_names_a_row_as_the_writers_file_does(run: RunPaths) -> None:
    found = seal.read(run)
    assert found is not None
    with Store(run.results, SCHEMA) as writer:
        writer.publish(run.live)
        assert list(seal.changed_rows(found, run, run.live, SCHEMA)) == []
        writer.event("info", "note", "after the seal")
        writer.publish(run.live)
    assert list(seal.changed_rows(found, run, run.live, SCHEMA)) == ["live.duckdb: events event_id=1: added"]
    with Reader(run.live, SCHEMA) as reader, run.row_digests.open("rb") as digests:
        assert [b.how for b in reader.broken_rows(digests, found.tables)] == ["added"]
