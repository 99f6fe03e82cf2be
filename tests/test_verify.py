"""`harness verify`: one change anywhere in a finished run is named, a wrong number is measured again, an honest run is green."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import environment
from harness.engine.executors import ItemResult
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.stages import psem
from harness.run import RunPaths, read_manifest
from harness.store import Broken, Reader, Store, seal
from tests.commands import DATA, ROWS, Told, harness, manifest, only_run, prompt_file, query

BROKEN = ({**ROWS[0], "prompt_id": "x", "target": "R2"}, {**ROWS[1], "prompt_id": "y", "target": "bird"})


def start(folder: Path, *args: object) -> Path:
    """A finished run of three prompts in small batches, with two rows that are no prompts."""
    told = harness("run", "--prompts", prompt_file(folder, (*ROWS, *BROKEN)), "--paths.runs", folder / "runs",
                   "--gravity.num_samples", 2, "--batching.max_tokens", 64, *args)  # fmt: skip
    assert told.code == 0, told.err
    return only_run(folder / "runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage but the optional ones. Tests change a copy."""
    return start(tmp_path_factory.mktemp("whole"), "--gravity.sanity.num_prompts", 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that measure, in six batches or so. Tests change a copy."""
    return start(tmp_path_factory.mktemp("small"), "--stages", "psem,greedy")


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.name))


def verify(run: Path, *more: object, batches: int = 0) -> Told:
    return harness("verify", run.name, "--paths.runs", run.parent, "--batches", batches, *more)


def failures(told: Told) -> list[str]:
    """What failed, as `name finding`."""
    lines = [line for line in told.out.splitlines() if line.startswith("FAIL")]
    assert (told.code == 1) == bool(lines), told
    assert told.code in (0, 1)
    assert "Traceback" not in told.err
    return [" ".join(line.removeprefix("FAIL").split()) for line in lines]


def lines_of(told: Told, verdict: str) -> list[str]:
    return [" ".join(line.split()) for line in told.out.splitlines() if line.startswith(verdict)]


def change(store: Path, *sql: str) -> None:
    with duckdb.connect(str(store)) as con:
        for statement in sql:
            con.execute(statement)


def sealed_anew(run: Path) -> None:
    """As somebody would who changes a row and hides it: snapshot, manifest and seal fit the rows again."""
    paths = RunPaths(run)
    with Store(paths.results, SCHEMA) as store:
        store.publish(paths.live)
        tables = store.seal(paths.row_digests)
    now = dict(read_manifest(paths).tree)
    now["tables"] = {name: table.rows for name, table in tables.items()}
    now["table_sha256"] = {name: tables[name].sha256 for name in now["table_sha256"]}
    paths.manifest.write_text(json.dumps(now), "utf-8")
    seal.write(paths, SCHEMA, tables, now)


def hashes(run: Path) -> dict[str, str]:
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in run.rglob("*") if p.is_file()
    }  # fmt: skip


# An honest run


def test_an_untouched_run_is_green_with_every_stage_measured_and_nothing_in_it_changes(whole: Path) -> None:
    before = hashes(whole)
    told = verify(whole, batches=2)
    assert told.code == 0, told.out
    assert told.out.splitlines()[-1] == "Every check holds."
    assert hashes(whole) == before
    stages = {re.split(r"\s+batch", line)[0] for line in lines_of(told, "ok") if line.startswith("ok again ")}
    assert {f"ok again {name}" for name in manifest(whole)["stages"]} <= stages
    assert any("must agree bit for bit" in line for line in lines_of(told, "ok"))


def test_a_run_that_may_not_be_written_to_is_verified_all_the_same(whole: Path, tmp_path: Path) -> None:
    run = copied(whole, tmp_path)
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert verify(run).code == 0
    finally:
        for path in (run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_no_batch_is_measured_where_none_is_asked_for_and_a_negative_number_is_refused(small: Path) -> None:
    told = verify(small)
    assert told.code == 0
    assert "skip again no batch was asked for" in lines_of(told, "skip")
    assert not [line for line in lines_of(told, "ok") if line.startswith("ok again")]
    told = verify(small, batches=-1)
    assert (told.code, told.out) == (2, "")
    assert "--batches: expected 0 or more, found -1" in told.err


def test_the_same_sample_draws_the_same_batches_and_another_may_draw_others(small: Path) -> None:
    drawn = [lines_of(verify(small, "--sample", seed, batches=2), "ok") for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(line for line in lines if "again psem" in line) for lines in drawn}) > 1


# Rows


def key_of(con: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    found = con.execute(
        "SELECT constraint_column_names FROM duckdb_constraints() WHERE table_name = ? AND constraint_type = 'PRIMARY KEY'",
        [table],
    ).fetchall()
    return list(found[0][0])


def change_three_rows(con: duckdb.DuckDBPyConnection, table: str) -> set[Broken]:
    """Change the first row of a table, remove its last and add one; what must be found of it."""
    key = key_of(con, table)
    rows = con.execute(f"SELECT {', '.join(key)} FROM {table} ORDER BY ALL").fetchall()
    assert len(rows) > 1, table
    changed, removed = rows[0], rows[-1]
    here = " AND ".join(f"{name} = ?" for name in key)
    kinds = {name: str(kind) for name, kind, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
    added = ("added" if kinds[key[0]] == "VARCHAR" else -1, *changed[1:])
    con.execute(f"INSERT INTO {table} BY NAME SELECT * REPLACE (? AS {key[0]}) FROM {table} WHERE {here}",
                [added[0], *changed])  # fmt: skip
    column = next(name for name in kinds if name not in key and kinds[name] != "TIMESTAMP")
    kind = kinds[column]
    other = (f"list_append(coalesce({column}, []), 1)" if kind.endswith("]") else f"NOT {column}"
             if kind == "BOOLEAN" else f"coalesce({column}, '') || ' '" if kind == "VARCHAR"
             else f"coalesce({column}, 0) + 1")  # fmt: skip
    con.execute(f"UPDATE {table} SET {column} = {other} WHERE {here}", list(changed))
    con.execute(f"DELETE FROM {table} WHERE {here}", list(removed))
    return {
        Broken(table, json.dumps(dict(zip(key, row, strict=True)), separators=(",", ":"), ensure_ascii=False), how)
        for row, how in ((changed, "changed"), (removed, "missing"), (added, "added"))
    }


@pytest.fixture(scope="module")
def changed_everywhere(
    whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, set[Broken]], set[Broken]]:
    """A run with three rows changed in every table, what they are, and what is found."""
    run = copied(whole, tmp_path_factory.mktemp("everywhere"))
    with duckdb.connect(str(run / "results.duckdb")) as con:
        expected = {table: change_three_rows(con, table) for table in SCHEMA.tables}
    sealed = seal.read(RunPaths(run))
    assert sealed is not None
    with Reader(run / "results.duckdb", SCHEMA) as reader, (run / "seal.parquet").open("rb") as digests:
        return run, expected, set(reader.broken_rows(digests, sealed.tables, at_most=1_000))


@pytest.mark.parametrize("table", SCHEMA.tables)
def test_a_row_changed_removed_or_added_in_any_table_is_found_by_its_key(
    changed_everywhere: tuple[Path, dict[str, set[Broken]], set[Broken]], table: str
) -> None:
    _, expected, found = changed_everywhere
    assert {b for b in found if b.table == table} == expected[table]


def test_rows_that_are_not_as_they_were_are_named_and_more_than_fit_are_not_all_listed(
    changed_everywhere: tuple[Path, dict[str, set[Broken]], set[Broken]],
) -> None:
    run, expected, found = changed_everywhere
    assert len(found) == 3 * len(SCHEMA.tables)
    lines = [line for line in failures(verify(run)) if line.startswith("rows ")]
    assert 20 <= len(lines) <= 21
    for _, key, how in expected["activations"]:
        told = ", ".join(f"{name}={value}" for name, value in json.loads(key).items())
        assert f"rows results.duckdb: activations {told}: {how}" in lines


def test_a_row_of_the_snapshot_alone_is_named_as_the_snapshots(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    change(run / "live.duckdb", "UPDATE psem SET p_sem = 0 WHERE prompt_id = 'milk' AND condition = 'negative'")
    assert failures(verify(run)) == ["snapshot live.duckdb: psem prompt_id=milk, condition=negative: changed"]
    (run / "live.duckdb").unlink()
    (line,) = failures(verify(run))
    assert line.startswith("snapshot ")


def one_double(con: duckdb.DuckDBPyConnection) -> None:
    (value,) = con.execute("SELECT p_sem FROM psem WHERE prompt_id = 'milk' AND condition = 'negative'").fetchall()[0]
    con.execute("UPDATE psem SET p_sem = ? WHERE prompt_id = 'milk' AND condition = 'negative'",
                [math.nextafter(value, 1)])  # fmt: skip


def one_float_of_a_list(con: duckdb.DuckDBPyConnection) -> None:
    where = "prompt_id = 'milk' AND condition = 'negative' AND mode = 'greedy'"
    (values,) = con.execute(f"SELECT logprobs FROM completions WHERE {where}").fetchall()[0]
    values[-1] = float(np.nextafter(np.float32(values[-1]), np.float32(2)))
    con.execute(f"UPDATE completions SET logprobs = ?::FLOAT[] WHERE {where}", [values])


SMALLEST: dict[str, tuple[str, str | Callable[[duckdb.DuckDBPyConnection], None]]] = {
    "a double": ("psem prompt_id=milk, condition=negative", one_double),
    "a float of a list": ("completions prompt_id=milk, condition=negative, mode=greedy, sample_id=0", one_float_of_a_list),
    "NULL to the empty text": ("prompts prompt_id=milk", "UPDATE prompts SET tier = '' WHERE prompt_id = 'milk'"),
    "NULL to 'NULL'": ("prompts prompt_id=milk", "UPDATE prompts SET tier = 'NULL' WHERE prompt_id = 'milk'"),
    "NULL to 'null'": ("prompts prompt_id=milk", "UPDATE prompts SET tier = 'null' WHERE prompt_id = 'milk'"),
    "the end of a text": ("events event_id=1", "UPDATE events SET message = message || chr(10) WHERE event_id = 1"),
    "the order of a list": ("contexts prompt_id=milk, condition=negative",
                            "UPDATE contexts SET token_ids = list_reverse(token_ids) WHERE prompt_id = 'milk' "
                            "AND condition = 'negative'"),
    "NULL in a struct": ("contexts prompt_id=milk, condition=negative",
                         "UPDATE contexts SET spans = struct_update(spans, mention := NULL::INTEGER[2]) "
                         "WHERE prompt_id = 'milk' AND condition = 'negative'"),
    "an empty list to NULL": ("prompts prompt_id=worm",
                              "UPDATE prompts SET alternatives = NULL WHERE prompt_id = 'worm'"),
    "a microsecond": ("events event_id=1", "UPDATE events SET time = time + INTERVAL 1 MICROSECOND WHERE event_id = 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALLEST)
def test_the_smallest_change_of_one_value_is_named(small: Path, tmp_path: Path, kind: str) -> None:
    run = copied(small, tmp_path)
    row, how = SMALLEST[kind]
    with duckdb.connect(str(run / "results.duckdb")) as con:
        if isinstance(how, str):
            assert con.execute(how).fetchall()[0][0], "the control: there was a row to change"
        else:
            how(con)
    found = failures(verify(run))
    assert found
    assert all(re.fullmatch(rf"rows results.duckdb: {row}.*: changed", line) for line in found), found


# Tables and views


@pytest.mark.parametrize(
    ("sql", "told"),
    [("DROP VIEW violation", "schema view violation is missing"), ("DROP TABLE lens CASCADE", "schema table lens is missing"),
     ("CREATE OR REPLACE VIEW violation AS SELECT prompt_id, condition, 0 AS rate FROM detections",
      "schema view violation is defined otherwise"),
     ("CREATE TABLE mine (a INTEGER)", "schema table mine is not of this schema"),
     ("ALTER TABLE lens DROP COLUMN entropy", "schema table lens is defined otherwise"),
     ("ALTER TABLE lens ALTER step TYPE BIGINT", "schema table lens is defined otherwise"),
     ("ALTER TABLE lens RENAME COLUMN entropy TO surprise", "schema table lens is defined otherwise"),
     ("DROP TABLE migrations", "schema table migrations is missing")],
)  # fmt: skip
def test_a_table_or_view_dropped_added_or_defined_otherwise_is_named(
    small: Path, tmp_path: Path, sql: str, told: str
) -> None:
    run = copied(small, tmp_path)
    change(run / "results.duckdb", *([f"DROP VIEW {v}" for v in ("lens_moments",)] if "ALTER" in sql else []), sql)
    assert [line for line in failures(verify(run)) if line.startswith(told)]


@pytest.mark.parametrize("sql", ["UPDATE migrations SET number = number + 9 WHERE number > 3",
                                 "DELETE FROM migrations",
                                 "DELETE FROM migrations WHERE number > 3",
                                 "UPDATE migrations SET experiment = 'another' WHERE number > 3"])  # fmt: skip
def test_another_number_of_the_schema_does_not_hide_what_was_done_to_it(small: Path, tmp_path: Path, sql: str) -> None:
    """A store of another version is not compared with this one's definitions: that let a dropped view pass."""
    run = copied(small, tmp_path)
    change(run / "results.duckdb", "DROP VIEW violation", sql)
    assert [line for line in failures(verify(run)) if line.startswith(("schema view violation is missing", "store "))]


# The manifest


def nested(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for part in parents:
        tree = tree[part]
    tree[last] = value


KEYS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "changed": ("planted: was True, is False", lambda m: nested(m, "planted", False)),
    "removed": ("random_numbers: was", lambda m: m.pop("random_numbers")),
    "added": ("comment: was (absent), is better", lambda m: nested(m, "comment", "better")),
    "nested": ("settings.runtime.seed.value: was 0, is 1", lambda m: nested(m, "settings/runtime.seed/value", 1)),
    "deep": ("model.config.hidden_size: was", lambda m: nested(m, "model/config/hidden_size", 8)),
    "a version": ("packages.torch: was", lambda m: nested(m, "packages/torch", "0.1")),
    "a list": ("stages.psem.sizes: was", lambda m: m["stages"]["psem"]["sizes"].append(1)),
    "a list's item": ("fingerprint_parts.stages.psem.version: was",
                      lambda m: next(s for s in m["fingerprint_parts"]["stages"] if s["name"] == "psem").update(version=9)),
    "NULL": ("reason: was (absent), is why", lambda m: nested(m, "reason", "why")),
    "status": ("status: was finished, is running", lambda m: nested(m, "status", "running")),
    "running now": ("status: was finished, is running", lambda m: m.update(status="running", heartbeat=now())),
    "run_id": ("run_id: was", lambda m: nested(m, "run_id", "20200101-000000-other-00000000")),
    "no run_id": ("run_id: was", lambda m: m.pop("run_id")),
    "fingerprint": ("fingerprint: was", lambda m: nested(m, "fingerprint", "0" * 64)),
    "an empty table": ("stages.greedy.sizes: was", lambda m: nested(m, "stages", {})),
    "a hash": ("table_sha256.psem: was", lambda m: nested(m, "table_sha256/psem", "0" * 64)),
}  # fmt: skip


def now() -> str:
    return datetime.now(UTC).isoformat()


@pytest.fixture(scope="module")
def to_edit(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(small, tmp_path_factory.mktemp("edit"))


def keys_after(run: Path, edit: Callable[[dict[str, Any]], object]) -> list[str]:
    """The keys that are found changed after an edit of the manifest, each with both values."""
    paths, text = RunPaths(run), (run / "manifest.json").read_text()
    content = json.loads(text)
    edit(content)
    paths.manifest.write_text(json.dumps(content))
    try:
        sealed = seal.read(paths)
        assert sealed is not None
        return [f"{d.key}: was {d.old}, is {d.new}" for d in seal.changed_keys(sealed, paths)]
    finally:
        paths.manifest.write_text(text)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_the_manifest_that_is_not_as_it_was_is_found_with_both_values(to_edit: Path, kind: str) -> None:
    told, edit = KEYS[kind]
    found = keys_after(to_edit, edit)
    assert [line for line in found if line.startswith(told)], found
    assert len(found) == 1 or kind in ("running now", "an empty table")


@pytest.mark.parametrize("kind", ["nested", "running now", "no run_id"])
def test_a_key_that_is_not_as_it_was_is_named_and_all_else_still_looked_at(
    small: Path, tmp_path: Path, kind: str
) -> None:
    run = copied(small, tmp_path)
    told, edit = KEYS[kind]
    content = manifest(run)
    edit(content)
    (run / "manifest.json").write_text(json.dumps(content))
    found = verify(run)
    assert failures(found)[0].startswith("manifest ")
    assert [line for line in failures(found) if line.startswith(f"manifest {told}")]
    assert len([line for line in lines_of(found, "ok") if re.match("ok (rows|snapshot|schema|keys|files) ", line)]) == 5


def test_a_manifest_that_only_lies_otherwise_in_its_file_is_the_same(small: Path, tmp_path: Path) -> None:
    """The control: spaces, escapes and the order of keys say nothing."""
    run = copied(small, tmp_path)
    (run / "manifest.json").write_text(json.dumps(dict(reversed(manifest(run).items())), indent=7, ensure_ascii=True))
    assert failures(verify(run)) == []


UNSEEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "true to 1": lambda m: nested(m, "planted", 1),
    "0 to 0.0": lambda m: nested(m, "num_failed", 0.0),
    "0 to false": lambda m: nested(m, "settings/runtime.seed/value", False),
    "the order of stages": lambda m: m["fingerprint_parts"]["stages"].reverse(),
    "a stage twice": lambda m: m["fingerprint_parts"]["stages"].insert(0, {"name": "psem", "version": 9}),
    "a name with a dot, nested": lambda m: nested(
        m["settings"], "runtime", {"seed": m["settings"].pop("runtime.seed")}
    ),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_change_that_dotted_names_and_equal_numbers_hide_is_found_too(to_edit: Path, kind: str) -> None:
    """`1 == True` in Python, and a list of named things was compared by name: such edits passed."""
    assert keys_after(to_edit, UNSEEN[kind])
    assert keys_after(to_edit, lambda m: m) == [], "the control"


def test_a_key_that_is_there_twice_is_named(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace("{", '{"status": "running",', 1))
    (line,) = failures(verify(run))
    assert "status" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"run_id": "a"}'])
def test_a_manifest_that_is_none_any_more_fails_and_the_rest_is_still_looked_at(
    small: Path, tmp_path: Path, text: str
) -> None:
    run = copied(small, tmp_path)
    (run / "manifest.json").write_text(text)
    told = verify(run)
    assert [line for line in failures(told) if line.startswith("manifest ")]
    assert [line for line in lines_of(told, "ok") if line.startswith("ok rows")]
    (run / "manifest.json").unlink()
    assert [line for line in failures(verify(run)) if line.startswith("manifest ")]


@pytest.mark.parametrize("value", [r"\[/x] [bold", ":warning: two\nFAIL lines"])
def test_a_value_is_printed_as_it_stands_whatever_a_terminal_would_make_of_it(
    small: Path, tmp_path: Path, value: str
) -> None:
    run = copied(small, tmp_path)
    (run / "manifest.json").write_text(json.dumps(manifest(run) | {"device": value}))
    assert failures(verify(run)) == [f"manifest device: was cpu, is {' '.join(value.split())}"]


def test_a_manifest_or_seal_nested_too_deep_to_read_is_one_line(small: Path, tmp_path: Path) -> None:
    for name in ("manifest", "seal"):
        run = copied(small, tmp_path / name)
        (run / f"{name}.json").write_text("[" * 100_000)
        assert [line for line in failures(verify(run)) if line.startswith(f"{name} ")]


# Files beside the store


def test_a_changed_or_missing_patch_of_the_code_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = b"diff --git a/x b/x\n"
    run = copied(small, tmp_path)
    content = manifest(run)
    content["code"]["diff_sha256"] = hashlib.sha256(patch).hexdigest()
    (run / "working_tree.diff").write_bytes(patch)
    (run / "manifest.json").write_text(json.dumps(content))
    sealed_anew(run)
    assert failures(verify(run)) == [], "the control"
    (run / "working_tree.diff").write_bytes(patch + b" ")
    assert failures(verify(run)) == ["code working_tree.diff: it was changed"]
    (run / "working_tree.diff").unlink()
    (line,) = failures(verify(run))
    assert line.startswith("code working_tree.diff: cannot be read")


def test_an_artifact_changed_cut_short_or_missing_is_named_and_an_extra_one_only_counted(
    whole: Path, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path)
    (run / "artifacts" / "more.bin").write_bytes(b"x")
    told = verify(run)
    assert failures(told) == []
    assert any("1 more that no row speaks of" in line for line in lines_of(told, "ok"))
    first, second, third = (path for (path,) in query(run, "SELECT path FROM artifacts ORDER BY path LIMIT 3"))
    files = run / "artifacts"
    content = (files / first).read_bytes()
    (files / first).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    size = (files / second).stat().st_size
    os.truncate(files / second, size - 1)
    (files / third).unlink()
    assert failures(verify(run)) == [
        f"files artifacts/{first}: its bytes were changed",
        f"files artifacts/{second}: {size - 1} bytes instead of {size}",
        f"files artifacts/{third}: cannot be read: No such file or directory",
    ]


# The seal itself


def test_a_changed_seal_says_so_and_a_missing_one_fails_a_finished_run(small: Path, tmp_path: Path) -> None:
    def found(name: str, edit: Callable[[RunPaths], object]) -> list[str]:
        run = copied(small, tmp_path / name)
        edit(RunPaths(run))
        return failures(verify(run))

    text = (small / "seal.json").read_text()
    digests = (small / "seal.parquet").read_bytes()
    first = found("value", lambda p: p.seal.write_text(text.replace('"planted": true', '"planted": false')))[0]
    assert first.startswith("seal ")
    assert first.endswith("its own sha256 does not fit")
    for name, content in (("json", "{"), ("list", "[]"), ("text", '"a"'), ("empty", "{}"), ("nothing", "")):
        found_here = found(name, lambda p, content=content: p.seal.write_text(content))
        assert found_here[0].startswith("seal "), found_here
    flipped = digests[:100] + bytes([digests[100] ^ 1]) + digests[101:]
    assert [line.split()[0] for line in found("digests", lambda p: p.row_digests.write_bytes(flipped))] == [
        "rows", "snapshot"]  # fmt: skip
    assert [line.split()[0] for line in found("no digests", lambda p: p.row_digests.unlink())] == ["rows", "snapshot"]
    assert found("no seal", lambda p: p.seal.unlink()) == [
        "seal seal.json is missing: what rows and manifest were cannot be told"]  # fmt: skip


def test_a_run_in_a_folder_of_another_name_is_named(small: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small, tmp_path / "20990101-000000-other-00000000"))
    assert failures(verify(run)) == [f"identity run_id: {small.name} lies in a folder called {run.name}"]


@pytest.fixture(scope="module")
def to_damage(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Any]]:
    run = copied(small, tmp_path_factory.mktemp("damage"))
    return run, (run / "results.duckdb").read_bytes(), tables_of(run / "results.duckdb")


def tables_of(store: Path) -> dict[str, Any]:
    with Reader(store, SCHEMA) as reader:
        return {name: reader.table(name) for name in SCHEMA.tables}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_of_the_store_is_never_a_traceback_and_never_a_wrong_row_that_passes(
    to_damage: tuple[Path, bytes, dict[str, Any]], data: st.DataObject
) -> None:
    run, content, rows = to_damage
    place = data.draw(st.one_of(st.integers(0, 12_287), st.integers(0, len(content) - 1)))
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[place:]
    (run / "results.duckdb").write_bytes(damaged)
    try:
        told = verify(run)
        if not failures(told):  # in a place that nothing is kept in
            assert tables_of(run / "results.duckdb") == rows
    finally:
        (run / "results.duckdb").write_bytes(content)


# What hangs together


@pytest.mark.parametrize(
    ("sql", "told"),
    [("DELETE FROM prompts WHERE prompt_id = 'milk'", "keys contexts: no row it belongs to for milk"),
     ("DELETE FROM contexts WHERE prompt_id = 'milk' AND condition = 'negative'",
      "keys psem (context): no row it belongs to for milk, negative"),
     ("INSERT INTO detections (prompt_id, condition, mode, sample_id) VALUES ('milk', 'negative', 'greedy', 7)",
      "keys detections: no row it belongs to for milk, negative, greedy, 7"),
     ("INSERT INTO patching (prompt_id, layer, patch) VALUES ('ghost', 0, 'resid')",
      "keys patching: no row it belongs to for ghost"),
     ("INSERT INTO attention (prompt_id, condition, step_kind, layer) VALUES ('milk', 'ghost', 'first', 0)",
      "keys attention (context): no row it belongs to for milk, ghost"),
     ("UPDATE psem SET num_sequences = num_sequences + 1 WHERE prompt_id = 'milk' AND condition = 'negative'",
      "keys psem: lists not as long as num_sequences: milk, negative"),
     ("UPDATE psem SET p_sem = 1.5 WHERE prompt_id = 'milk' AND condition = 'negative'",
      "keys psem: a probability outside [0, 1]: milk, negative"),
     ("UPDATE completions SET logprobs = logprobs[2:] WHERE prompt_id = 'milk' AND condition = 'negative' AND mode = 'greedy'",
      "keys completions: not a log-probability a token: milk, negative, greedy, 0"),
     ("UPDATE stages SET num_done = num_done - 1 WHERE stage = 'psem'", "keys stages: not every item is done or failed: psem"),
     ("DELETE FROM stages WHERE stage = 'psem'", "keys stages: psem was planned and is not there"),
     ("UPDATE batches SET status = 'planned' WHERE stage = 'psem' AND batch_id = 0",
      "keys batches: planned, and never computed: psem, 0"),
     ("UPDATE batches SET keys = keys[2:] WHERE stage = 'psem' AND batch_id = 0",
      "keys batches: not as many keys as items: psem, 0")],
)  # fmt: skip
def test_a_row_without_what_it_belongs_to_is_named_though_the_seal_was_made_anew(
    small: Path, tmp_path: Path, sql: str, told: str
) -> None:
    run = copied(small, tmp_path)
    change(run / "results.duckdb", sql)
    sealed_anew(run)
    found = failures(verify(run))
    assert told in found
    assert {line.split()[0] for line in found} == {"keys"}, "rows, snapshot and manifest fit the new seal"


def test_rows_that_the_manifest_counts_otherwise_are_named(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    sealed_anew(run)
    paths = RunPaths(run)
    content = manifest(run)
    content["tables"]["psem"] += 1
    paths.manifest.write_text(json.dumps(content))
    with Store(paths.results, SCHEMA) as store:
        seal.write(paths, SCHEMA, store.seal(paths.row_digests), content)
    assert failures(verify(run)) == ["keys psem: the manifest counts 7 rows, found 6"]


# Measured again

MILK = "prompt_id = 'milk' AND condition = 'negative'"
PLANTED = {  # stage: (table, column, the row, its new value); nothing that a later stage reads
    "vocabulary": ("vocabulary", "is_special", "token_id = 77", "NOT is_special"),
    "prompts": ("prompts", "source", "prompt_id = 'milk'", "'elsewhere'"),
    "psem": ("psem", "top_probs", MILK, "list_transform(top_probs, lambda x: x + 1e-12)"),
    "greedy": ("completions", "margins", f"{MILK} AND mode = 'greedy'", "list_transform(margins, lambda x: x + 1e-3)"),
    "samples": ("completions", "finish_reason", f"{MILK} AND mode = 'sample' AND sample_id = 1", "'tired'"),
    "detect": ("detections", "num_occurrences", f"{MILK} AND mode = 'greedy'", "num_occurrences + 1"),
    "mechanism": ("attention", "mean_row", f"{MILK} AND step_kind = 'first' AND layer = 1",
                  "list_transform(mean_row, lambda x: x + 1e-3)"),
    "analysis": ("statistics", "se", "true QUALIFY row_number() OVER (ORDER BY ALL) = 1", "1e-9"),
    "sanity": ("sanity_items", "max_abs", "measurement = 'entropy' AND subject LIKE '%baseline'", "max_abs + 1e-9"),
}  # fmt: skip
MORE = {
    "decomposition": ("p_in", f"{MILK} AND step_kind = 'first' AND layer = 1"),
    "lens": ("entropy", f"{MILK} AND step_kind = 'first' AND layer = 1"),
    "patching": ("p_sem_patched", "layer = 1 AND patch = 'resid'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A run with one wrong value in each stage's rows, sealed anew, and what verify says of it."""
    run = copied(whole, tmp_path_factory.mktemp("planted"))
    with duckdb.connect(str(run / "results.duckdb")) as con:
        for table, column, where, value in PLANTED.values():
            if "QUALIFY" in where:
                con.execute(f"UPDATE {table} SET {column} = coalesce({column}, 0) + {value} WHERE rowid = (SELECT min(rowid) "
                            f"FROM {table} WHERE {column} IS NOT NULL)")  # fmt: skip
            else:
                assert con.execute(f"UPDATE {table} SET {column} = {value} WHERE {where}").fetchall() == [(1,)], table
        for table, (column, where) in MORE.items():
            assert con.execute(f"UPDATE {table} SET {column} = {column} + 1e-12 WHERE {where}").fetchall() == [(1,)], (
                table
            )
        (path,) = con.execute("SELECT min(path) FROM artifacts").fetchall()[0]
        content = (run / "artifacts" / path).read_bytes()
        content = content[:-1] + bytes([content[-1] ^ 1])
        (run / "artifacts" / path).write_bytes(content)
        con.execute("UPDATE artifacts SET sha256 = ? WHERE path = ?", [hashlib.sha256(content).hexdigest(), path])
    sealed_anew(run)
    return run, verify(run, batches=99)


@pytest.mark.thorough
def test_a_run_sealed_anew_without_a_change_is_green_when_every_batch_is_measured_again(
    whole: Path, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path)
    sealed_anew(run)
    told = verify(run, batches=99)
    assert failures(told) == []
    batches = query(whole, "SELECT count(*) FROM batches WHERE status = 'done'")[0][0]
    assert len([line for line in lines_of(told, "ok") if re.match(r"ok again \w+ batch", line)]) == batches


@pytest.mark.parametrize("stage", PLANTED)
def test_a_wrong_value_that_the_seal_does_not_betray_is_named_by_stage_batch_and_column(
    planted: tuple[Path, Told], stage: str
) -> None:
    table, column, *_ = PLANTED[stage]
    found = [line for line in failures(planted[1]) if line.startswith(f"again {stage} ")]
    num = r"\d+" if stage == "analysis" else "1"  # it rests on the others' rows
    pattern = rf"again {stage} batch \d+: {table}\.{column}: {num} of \d+ rows are not the same.*; furthest: \S.*"
    assert [line for line in found if re.fullmatch(pattern, line)], found
    assert {line.split()[0] for line in failures(planted[1])} == {"again"}, "everything else fits the new seal"


def test_a_wrong_value_of_every_table_of_a_stage_is_named_with_its_key_and_size(planted: tuple[Path, Told]) -> None:
    found = failures(planted[1])
    for table, key in (("lens", "milk, negative, first, 1"), ("decomposition", "milk, negative, first, 1"),
                       ("patching", r"\w+, 1, resid")):  # fmt: skip
        column = MORE[table][0]
        (line,) = [x for x in found if f"{table}.{column}: 1 of" in x]
        assert re.search(rf"; furthest: {key}$", line), line
        assert re.search(r"by up to (9\.9\d|1\.00)e-1[23]", line), line
    assert [line for line in found if re.search(r"again mechanism batch \d+: artifacts.sha256: 1 of", line)]


def elsewhere() -> dict[str, Any]:
    return environment_machine() | {"torch": "0.0.1"}


environment_machine = environment.machine


@pytest.mark.parametrize(("by", "is_found"), [(1e-7, False), (1e-3, True)])
def test_on_another_machine_rounding_is_let_pass_and_a_wrong_value_is_not(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, is_found: bool
) -> None:
    run = copied(small, tmp_path)
    change(run / "results.duckdb", f"UPDATE psem SET p_word = p_word + {by} WHERE {MILK}")
    sealed_anew(run)
    assert failures(verify(run, batches=99)), "the control: here the bits must be the same"
    monkeypatch.setattr(environment, "machine", elsewhere)
    told = verify(run, batches=99)
    assert bool(failures(told)) == is_found
    assert "within 5e-05, since here is not as there: machine.torch" in told.out


def test_another_text_is_named_on_another_machine_too(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(small, tmp_path)
    change(run / "results.duckdb", f"UPDATE completions SET finish_reason = 'tired' WHERE {MILK} AND mode = 'greedy'")
    sealed_anew(run)
    monkeypatch.setattr(environment, "machine", elsewhere)
    found = failures(verify(run, batches=99))
    assert len(found) == 1
    assert "completions.finish_reason: 1 of" in found[0]


# What was measured is not here any more


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A run with a model folder and a prompt file of its own."""
    model = Path(shutil.copytree(DATA / "models" / "demo", tmp_path / "model"))
    run = start(tmp_path, "--stages", "psem", "--model", model)
    return run, model / "model.safetensors", tmp_path / "prompts.jsonl"


def test_a_changed_checkpoint_or_prompt_is_not_what_was_measured_and_an_absent_one_is_left_out(
    own: tuple[Path, Path, Path],
) -> None:
    run, weights, prompts = own
    assert failures(verify(run, batches=1)) == [], "the control"
    for file, told in ((weights, "model.weights_sha256: was"), (prompts, "data (prompts.sha256): was")):
        content = file.read_bytes()
        other = content[:-1] + bytes([content[-1] ^ 1]) if file == weights else content.replace(b"spilled", b"spilt")
        file.unlink()  # its bytes may be mapped by a model of this process
        file.write_bytes(other)
        (line,) = failures(verify(run, batches=1))
        assert line.startswith(f"again this is not what was measured: {told}"), line
        assert file == weights or "(prompts: 1 changed, such as milk)" in line
        file.unlink()
        left = verify(run, batches=1)
        assert failures(left) == []
        assert [line for line in lines_of(left, "skip") if "cannot be measured again here" in line], left.out
        assert left.out.endswith("Every check holds (1 left out). Nothing was measured again.\n")
        file.write_bytes(content)
    moved = prompts.rename(prompts.with_name("moved.jsonl"))
    told_moved = verify(run, "--prompts", moved, batches=1)
    assert failures(told_moved) == []
    assert not lines_of(told_moved, "skip")


# Runs that did not go straight to their end


def stopping(measure: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A stage's `run` that gets a signal in its n-th batch."""
    calls = iter(range(10_000))

    def run(self: Any, context: Any, items: Sequence[Any]) -> Any:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, context, items)

    return run


@pytest.mark.thorough
def test_a_run_that_was_stopped_is_verified_as_far_as_it_got_and_again_when_it_is_finished(tmp_path: Path) -> None:
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", "psem,greedy",
            "--batching.max_tokens", 64)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping(psem.Psem.run, 3))
        assert harness(*args).code == 3
    run = only_run(tmp_path / "runs")
    told = verify(run, batches=99)
    assert failures(told) == []
    assert [line for line in lines_of(told, "skip") if line.startswith("skip seal")]
    assert len([line for line in lines_of(told, "ok") if line.startswith("ok again psem")]) == 4
    assert not [line for line in lines_of(told, "ok") if line.startswith("ok again greedy")]
    for heartbeat in (now(), "2020-01-01T00:00:00+00:00"):  # as if it ran; as if it was killed
        content = manifest(run)
        (run / "manifest.json").write_text(json.dumps(content | {"status": "running", "heartbeat": heartbeat}))
        assert failures(verify(run, batches=1)) == []
        (run / "manifest.json").write_text(json.dumps(content))
    change(run / "results.duckdb", f"UPDATE psem SET p_word = p_word + 1e-9 WHERE {MILK}")
    assert failures(verify(run, batches=99)), "the control: without a seal a wrong number is still measured again"
    change(run / "results.duckdb", f"UPDATE psem SET p_word = p_word - 1e-9 WHERE {MILK}")
    assert harness(*args).code == 0
    told = verify(run, batches=99)
    assert failures(told) == []
    assert [line for line in lines_of(told, "ok") if line.startswith("ok rows")]


def test_a_killed_writers_last_rows_are_looked_at_too(small: Path, tmp_path: Path) -> None:
    """A run whose log of writes is still there, as after a kill: the sealed rows are those of both together."""
    run = copied(small, tmp_path)
    with duckdb.connect(str(run / "results.duckdb")) as con:
        con.execute("SET wal_autocheckpoint = '1TB'; PRAGMA disable_checkpoint_on_shutdown")
        con.execute(f"UPDATE psem SET p_sem = 0.5 WHERE {MILK}")
    assert (run / "results.duckdb.wal").exists()
    assert failures(verify(run)) == ["rows results.duckdb: psem prompt_id=milk, condition=negative: changed"]


def failing(keys: set[str]) -> Callable[..., Any]:
    measure = psem.Psem.run

    def run(self: Any, context: Any, items: Sequence[Any]) -> list[Any]:
        return [ItemResult.failed(r.key, "it is tired") if r.key in keys else r for r in measure(self, context, items)]

    return run


@pytest.fixture
def tired(tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """A run with one item that failed, among others in its batch, and its command."""
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", "psem,greedy",
            "--batching.max_tokens", "8192")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", failing({"paris|negative"}))
        assert harness(*args).code == 1
        run = only_run(tmp_path / "runs")
        assert failures(verify(run, batches=9)) == [], "it fails again as it did"
    assert query(run, "SELECT max(num_items) FROM batches WHERE stage = 'psem'")[0][0] > 1
    return run, args


def test_an_item_that_failed_and_does_not_now_or_the_other_way_round_is_named(
    tired: tuple[Path, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tired
    (line,) = failures(verify(run, batches=9))
    assert "paris|negative failed in the run and does not now" in line
    monkeypatch.setattr(psem.Psem, "run", failing({"paris|negative", "milk|negative"}))
    (line,) = failures(verify(run, batches=9))
    assert "milk|negative fails now: it is tired" in line


def test_an_item_that_was_tried_again_alone_is_measured_again_alone(
    tired: tuple[Path, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows come from a batch of one; compared with what its first batch gives now, the last bits are others."""
    run, args = tired
    assert harness(*args, "--retry-failed").code == 0
    told = verify(run, batches=9)
    assert failures(told) == []
    assert len([line for line in lines_of(told, "ok") if line.startswith("ok again psem")]) == 2
    monkeypatch.setattr(psem.Psem, "run", failing({"paris|negative"}))
    (line,) = failures(verify(run, batches=9))
    assert "paris|negative fails now" in line, "what it did before it was tried again is no excuse"


def test_a_sealed_run_that_goes_on_and_is_stopped_again_has_no_seal_any_more(
    tired: tuple[Path, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sealed is not what it is now; the old seal would call every new row a forgery."""
    run, args = tired
    assert (run / "seal.json").exists()
    monkeypatch.setattr(psem.Psem, "run", stopping(psem.Psem.run, 0))
    assert harness(*args, "--retry-failed").code == 3
    assert not (run / "seal.json").exists()
    assert not (run / "seal.parquet").exists()
    told = verify(run, batches=9)
    assert failures(told) == []
    assert [line for line in lines_of(told, "skip") if line.startswith("skip seal")]


@pytest.mark.thorough
def test_a_run_with_a_selection_is_green_and_verifying_writes_no_file_of_its_stages(tmp_path: Path) -> None:
    run = start(tmp_path, "--stages", "select,single_token,psem,greedy,detect,analysis")
    files = sorted((run / "artifacts" / "single_token").iterdir())
    assert files
    before = [path.stat().st_mtime_ns for path in files]
    assert failures(verify(run, batches=9)) == []
    assert [path.stat().st_mtime_ns for path in files] == before
    files[0].write_text("altered")
    assert failures(verify(run, batches=9)), "the control"


# Manifests that no harness writes, of runs without a seal

DAMAGED: dict[str, Any] = {
    "settings": {"runtime.seed": 3}, "model": [1], "fingerprint_parts": {"stages": [{"x": 1}]}, "code": "x", "prompts": 3,
    "stages": {"psem": 5}, "tables": [1], "machine": "here",
}  # fmt: skip


@pytest.mark.parametrize("key", DAMAGED)
def test_a_damaged_manifest_without_a_seal_is_one_line_and_never_a_traceback(
    small: Path, tmp_path: Path, key: str
) -> None:
    run = copied(small, tmp_path)
    for name in ("seal.json", "seal.parquet"):
        (run / name).unlink()
    (run / "manifest.json").write_text(json.dumps(manifest(run) | {key: DAMAGED[key]}))
    assert failures(verify(run, batches=1))


def test_a_manifest_with_little_in_it_is_verified_as_far_as_it_goes(small: Path, tmp_path: Path) -> None:
    run = copied(small, tmp_path)
    for name in ("seal.json", "seal.parquet"):
        (run / name).unlink()
    (run / "manifest.json").write_text(json.dumps({"run_id": run.name, "fingerprint": "0", "status": "finished"}))
    told = verify(run, batches=1)
    assert failures(told) == ["identity fingerprint: it is not that of fingerprint_parts"]
    assert [line for line in lines_of(told, "ok") if line.startswith("ok keys")]


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert harness("verify", "latest", "--paths.runs", tmp_path).code == 2
    (tmp_path / "empty").mkdir()
    told = harness("verify", "empty", "--paths.runs", tmp_path)
    assert told.code == 2
    assert re.fullmatch(r"harness: [^\n]+\n", told.err)
