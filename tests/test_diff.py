"""`harness diff`: what is counted, how large it is said to be and in which row; what is rounding; what explains other bits."""

import copy
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.commands import diff
from harness.commands.diff import ColumnDrift, TableDrift, joined, table_drift
from harness.experiments.gravity.stages import psem
from harness.run.differences import environment_differences
from harness.store import Aligned
from harness.tolerance import TOLERANCE
from tests.app.conftest import _older_schema
from tests.cases import some_of
from tests.commands import ROWS, Told, harness, manifest, prompt_file, run_folders
from tests.gravity import EXPERIMENT

# One table against a plain loop

FINITE = st.floats(-1e6, 1e6, allow_nan=False)
FLOATS = st.floats(-1e6, 1e6, allow_nan=False, width=32)
KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "number": (pa.float64(), FINITE), "single": (pa.float32(), FLOATS), "count": (pa.int32(), st.integers(-3, 3)),
    "text": (pa.string(), st.sampled_from(["", "a", "NULL"])), "flag": (pa.bool_(), st.booleans()),
    "numbers": (pa.list_(pa.float64()), st.lists(st.none() | FINITE, max_size=3)),
    "singles": (pa.list_(pa.float32()), st.lists(FLOATS, max_size=3)),
    "ids": (pa.list_(pa.int32()), st.lists(st.integers(0, 3), max_size=3)),
    "span": (pa.list_(pa.int32(), 2), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
    "pair": (pa.list_(pa.float64(), 2), st.lists(FINITE, min_size=2, max_size=2)),
    "spans": (pa.struct([("a", pa.list_(pa.int32()))]),
              st.fixed_dictionaries({"a": st.none() | st.lists(st.integers(0, 2), max_size=2)})),
}  # fmt: skip


def aligned(kind: pa.DataType, one: Sequence[Any], other: Sequence[Any]) -> Aligned:
    first, second = (
        pa.table({"prompt_id": [f"p{i}" for i in range(len(v))], "layer": list(range(len(v))), "x": pa.array(v, kind)})
        for v in (one, other)
    )
    return Aligned(("prompt_id", "layer"), first, second, 0, 0)


def flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def by_hand(
    kind: pa.DataType, one: Sequence[Any], other: Sequence[Any]
) -> tuple[int, float | None, float | None, float]:
    """Rows that differ; largest difference, absolute and relative; largest as a share of max(1, |x|)."""
    apart = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else kind
    is_number = pa.types.is_floating(inner)
    shapes = [[None if v is None else [x is None for x in flat(v)] for v in side] for side in (one, other)]
    if not is_number or shapes[0] != shapes[1]:
        return len(apart), None, None, math.inf
    pairs = [p for a, b in apart for p in zip(flat(a), flat(b), strict=True) if p[0] != p[1]]
    gaps = [abs(a - b) for a, b in pairs]
    return (
        len(apart),
        max(gaps),
        max(g / max(abs(a), abs(b)) for g, (a, b) in zip(gaps, pairs, strict=True)),
        max(g / max(1.0, abs(a), abs(b)) for g, (a, b) in zip(gaps, pairs, strict=True)),
    )


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_table_in_pieces_is_as_far_apart_as_it_is_whole(name: str, data: st.DataObject) -> None:
    kind, values = KINDS[name]
    one = data.draw(st.lists(values, min_size=1, max_size=6))
    other = [data.draw(st.just(v) | values) for v in one]
    cut = data.draw(st.integers(0, len(one)))
    whole = aligned(kind, one, other)._replace(only_one=3, only_other=2)
    pieces = [
        whole._replace(one=whole.one.slice(*part), other=whole.other.slice(*part), only_one=n, only_other=2 * n - 2)
        for n, part in ((1, (0, cut)), (2, (cut,)))
    ]
    found, plain = joined([table_drift("t", piece) for piece in pieces]), table_drift("t", whole)
    if all(c.max_abs is not None for d in (found, plain) for c in d.columns):
        assert found == plain
    else:  # lists of other lengths in one piece alone: what is told of numbers is left out, and the key may be another
        assert [(c.column, c.num_rows, c.max_abs, c.scaled) for c in found.columns] == [
            (c.column, c.num_rows, c.max_abs, c.scaled) for c in plain.columns
        ]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_column_is_compared_as_a_plain_loop_would(name: str, data: st.DataObject) -> None:
    kind, values = KINDS[name]
    one = data.draw(st.lists(st.none() | values, max_size=5))
    other = [data.draw(st.just(v) | st.none() | values) for v in one]
    one, other = (pa.array(side, kind).to_pylist() for side in (one, other))
    drift = table_drift("t", aligned(kind, one, other))
    assert (drift.num_rows, drift.only_one, drift.only_other) == (len(one), 0, 0)
    assert drift.is_equal == (one == other)
    if one == other:
        assert drift.columns == ()
        return
    (column,) = drift.columns
    num, largest, relative, scaled = by_hand(kind, one, other)
    assert (column.column, column.num_rows) == ("x", num)
    assert column.max_abs == pytest.approx(largest)
    assert column.max_rel == pytest.approx(relative)
    assert column.scaled == pytest.approx(scaled)
    worst = int(column.worst.split(", ")[1])
    assert column.worst == f"p{worst}, {worst}"
    assert one[worst] != other[worst]
    if largest is not None:
        assert by_hand(kind, [one[worst]], [other[worst]])[3] == pytest.approx(scaled), "no row is further apart"


def test_a_single_planted_difference_is_found_in_its_row_with_its_size() -> None:
    one = [[float(10 * i + j) for j in range(4)] for i in range(6)]
    other = copy.deepcopy(one)
    other[4][2] += 0.25
    (column,) = table_drift("t", aligned(pa.list_(pa.float32()), one, other)).columns
    about: Any = pytest.approx(0.25 / 42.25)
    assert column == ColumnDrift("x", 1, 0.25, about, about, "p4, 4")


def test_keys_are_not_compared_and_no_rows_in_common_are_no_drift_of_columns() -> None:
    drift = table_drift("t", aligned(pa.float64(), [], [])._replace(only_one=3, only_other=2))
    assert drift == TableDrift("t", 0, 3, 2, ())
    assert not drift.is_equal


# What is rounding

SCHEMA = EXPERIMENT.schema


def verdict(drifts: Sequence[TableDrift], dtype: str) -> str:
    return diff.verdict(drifts, dtype, SCHEMA)


def drifted(table: str = "psem", column: str = "p_sem", scaled: float = 0.0, only: int = 0) -> TableDrift:
    columns = (ColumnDrift(column, 1, scaled, scaled, scaled, "a"),) if scaled else ()
    return TableDrift(table, 9, 0, only, columns)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rounding_ends_at_the_tolerance_of_the_dtype(dtype: str) -> None:
    edge = TOLERANCE[dtype].nats
    same = drifted()
    assert verdict([], dtype) == verdict([same, same], dtype) == "identical"
    assert verdict([same, drifted(scaled=edge)], dtype) == "rounding"
    assert verdict([same, drifted(scaled=math.nextafter(edge, 1))], dtype) == "apart"
    assert verdict([drifted(scaled=math.inf)], dtype) == "apart"
    assert verdict([drifted(only=1)], dtype) == "apart"
    assert verdict([drifted()], dtype) == "identical"


def test_half_precision_is_let_more_room_than_single() -> None:
    assert TOLERANCE["bfloat16"] > TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("table", "column"), [*((t, "value") for t in SCHEMA.derived), *(("lens", c) for c in SCHEMA.ranks)], ids=lambda v: str(v)
)  # fmt: skip
def test_ranks_and_tables_that_rest_on_others_are_left_out_of_the_verdict_and_not_of_what_is_identical(
    table: str, column: str
) -> None:
    drift = drifted(table, column, scaled=math.inf)
    assert verdict([drift, drifted()], "float32") == "rounding"
    assert verdict([drift, drifted("psem", "text", math.inf)], "float32") == "apart", "the control"
    if table in SCHEMA.derived:
        assert verdict([drifted(table, only=1)], "float32") == "rounding"


# What explains other bits

HERE: dict[str, Any] = {
    "packages": {"torch": "2.11", "numpy": "2.0"}, "numerics": {"matmul_tf32": False, "sdpa_kernels": ["math"]},
    "machine": {"cpu": "a", "cpu_capability": "AVX2", "torch": "2.11", "gpus": [], "hostname": "a", "ram_bytes": 1,
                "python": "3.11.1", "cuda": None, "cudnn": None, "driver": None, "cublas_workspace_config": None},
    "code": {"source_sha256": "a", "git_commit": "a"}, "device": "cpu", "threads": 2, "lock_sha256": "a",
    "settings": {"runtime.seed": {"value": 0, "source": "default"}},
    "stages": {"psem": {"sizes": [3, 2], "seconds": 1.0}, "greedy": {"sizes": [5]}},
}  # fmt: skip
EXPLAINS = {
    "packages/torch": ("packages.torch", "2.12"), "packages/numpy": ("packages.numpy", "2.1"),
    "machine/torch": ("machine.torch", "2.12"), "machine/cpu": ("machine.cpu", "b"), "machine/python": ("machine.python", "3.12"),
    "machine/cpu_capability": ("machine.cpu_capability", "AVX512"), "machine/cuda": ("machine.cuda", "13"),
    "machine/cudnn": ("machine.cudnn", 9), "machine/driver": ("machine.driver", "1"),
    "machine/cublas_workspace_config": ("machine.cublas_workspace_config", ":4096:8"),
    "machine/gpus": ("machine.gpus.H100.name", [{"name": "H100"}]), "device": ("machine.device", "cuda"),
    "threads": ("machine.threads", 4), "numerics/matmul_tf32": ("numerics.matmul_tf32", True),
    "numerics/sdpa_kernels": ("numerics.sdpa_kernels", ["flash", "math"]),
    "code/source_sha256": ("code.source_sha256", "b"), "stages/psem/sizes": ("stages.psem.sizes", [2, 3]),
}  # fmt: skip
EXPLAINS_NOTHING = {
    "packages/more": "1.0", "machine/hostname": "b", "machine/ram_bytes": 2, "code/git_commit": "b", "lock_sha256": "b",
    "settings/runtime.seed": {"value": 1, "source": "flag"}, "stages/psem/seconds": 2.0, "stages/more": {"sizes": [1]},
    "stages/psem/sizes": (3, 2), "run_id": "b",
}  # fmt: skip


def changed(name: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(HERE)
    *parents, last = name.split("/")
    part = tree
    for parent in parents:
        part = part[parent]
    part[last] = value
    return tree


@pytest.mark.parametrize("name", EXPLAINS)
def test_what_may_change_the_last_bits_is_named(name: str) -> None:
    key, value = EXPLAINS[name]
    found = environment_differences(HERE, changed(name, value))
    assert key in {d.key for d in found}
    if name == "machine/gpus":
        return  # a list that was empty has no leaf to stand beside the new ones
    assert [d.key for d in found] == [key]
    back = environment_differences(changed(name, value), HERE)
    assert sorted((d.key, str(d.old)) for d in back) == sorted((d.key, str(d.new)) for d in found)


@pytest.mark.parametrize("name", EXPLAINS_NOTHING)
def test_what_can_change_no_bit_is_not_named(name: str) -> None:
    for one, other in ((HERE, changed(name, EXPLAINS_NOTHING[name])), (changed(name, EXPLAINS_NOTHING[name]), HERE)):
        assert environment_differences(one, other) == []
    assert environment_differences(HERE, HERE) == []


def test_a_manifest_of_an_older_version_that_says_less_is_told_as_not_the_same() -> None:
    old = {k: v for k, v in HERE.items() if k not in ("numerics", "threads", "stages")}
    assert {d.key for d in environment_differences(old, HERE)} == {
        "numerics.matmul_tf32", "numerics.sdpa_kernels", "machine.threads"}  # fmt: skip


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, others that differ from it in one thing each, all in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    base = ("run", "--paths.runs", folder / "runs", "--stages", "psem,samples,detect", "--gravity.num_samples", 2)
    prompts, others = (
        prompt_file(folder),
        prompt_file(folder, [{**ROWS[0], "prompt_id": "other", "target": "water"}], "o.jsonl"),
    )
    wanted: dict[str, tuple[object, ...]] = {
        "base": ("--prompts", prompts), "seed": ("--prompts", prompts, "--runtime.seed", 1),
        "model": ("--prompts", prompts, "--model", "random:tiny-llama"), "others": ("--prompts", others),
        "fewer": ("--prompts", prompts, "--limit", 2), "again": ("--prompts", prompts, "--resume", "new"),
    }  # fmt: skip
    found: dict[str, Path] = {}
    for name, args in wanted.items():
        told = harness(*base, *args)
        assert told.code == 0, told.err
        (found[name],) = set(run_folders(folder / "runs")) - set(found.values())
    return found


def compare(runs: dict[str, Path], one: str, other: str, *more: str) -> Told:
    told = harness("diff", runs[one].name, runs[other].name, "--paths.runs", runs[one].parent, *more)
    assert "Traceback" not in told.err
    return told


def cells(told: Told) -> list[list[str]]:
    return [[c.strip() for c in line.strip("│").split("│")] for line in told.out.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("other", some_of(["again", "base"], 1))
def test_a_run_beside_itself_or_the_same_again_differs_in_nothing(runs: dict[str, Path], other: str) -> None:
    told = compare(runs, "base", other, "--exit-code")
    assert told.code == 0
    assert "The fingerprints are equal" in told.out
    assert "The manifests say the same of" in told.out
    assert "All 13 measured tables are equal, bit for bit" in told.out
    assert not cells(told)


def test_another_seed_is_named_first_and_then_what_it_decided(runs: dict[str, Path]) -> None:
    told = compare(runs, "base", "seed")
    assert told.code == 0, "a difference is an answer, not a failure"
    assert compare(runs, "base", "seed", "--exit-code").code == 1
    rows = cells(told)
    assert ["identity", "seed", "0", "1"] in rows
    assert ["settings", "runtime.seed", "0", "1"] in rows
    assert told.out.index("Manifests") < told.out.index("Results")
    assert "fingerprints are equal" not in told.out
    (equal,) = re.findall(r"Equal, bit for bit: (.*)\.", told.out)
    assert "psem (6)" in equal
    (first,) = [row for row in rows if row[0] == "completions"]
    assert first[1:4] == ["18", "0", "0"]


def test_another_model_is_named_by_its_weights(runs: dict[str, Path]) -> None:
    rows = cells(compare(runs, "base", "model"))
    assert {"model.weights_sha256"} <= {row[1] for row in rows if row[0] == "identity"}
    assert ["settings", "model.name", "demo", "random:tiny-llama"] in rows


def test_rows_that_only_one_run_has_are_counted_on_their_side(runs: dict[str, Path]) -> None:
    for one, other, counts in (("base", "others", ["0", "6", "2"]), ("others", "base", ["0", "2", "6"]),
                               ("base", "fewer", ["4", "2", "0"])):  # fmt: skip
        told = compare(runs, one, other, "--exit-code")
        assert told.code == 1
        (psem_row,) = [row for row in cells(told) if row[0] == "psem"]
        assert psem_row[1:4] == counts


def test_an_unfinished_run_is_compared_as_far_as_it_got(runs: dict[str, Path], tmp_path: Path) -> None:
    measure, calls = psem.Psem.run, iter(range(99))

    def stopping(self: Any, context: Any, items: Sequence[Any]) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, context, items)

    root = tmp_path / "runs"
    whole = Path(shutil.copytree(runs["base"], root / runs["base"].name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping)
        assert harness("run", "--prompts", runs["base"].parent.parent / "prompts.jsonl", "--paths.runs", root,
                       "--stages", "psem,samples,detect", "--gravity.num_samples", 2, "--resume", "new",
                       "--batching.max_tokens", 64).code == 3  # fmt: skip
    half = next(p for p in run_folders(root) if p != whole)
    told = compare({"whole": whole, "half": half}, "whole", "half")
    assert told.code == 0
    assert f"B = {half.name} (interrupted)" in told.out
    (psem_row,) = [row for row in cells(told) if row[0] == "psem"]
    assert psem_row[1:4] == ["3", "3", "0"]


def test_a_run_of_an_older_schema_is_compared_in_what_both_have(runs: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    whole = Path(shutil.copytree(runs["base"], root / runs["base"].name))
    old = root / "20200103-000000-older-00000000"
    old.mkdir()
    _older_schema(old / "live.duckdb")
    before = (old / "live.duckdb").read_bytes()
    (old / "manifest.json").write_text(json.dumps({"run_id": old.name, "fingerprint": "0", "status": "finished"}))
    for names in (("whole", "old"), ("old", "whole"), ("old", "old")):
        told = compare({"whole": whole, "old": old}, *names)
        assert told.code == 0, told.err
        if names[0] != names[1]:
            (psem_row,) = [row for row in cells(told) if row[0] == "psem"]
            assert sorted(psem_row[1:4]) == ["0", "2", "6"]
    assert (old / "live.duckdb").read_bytes() == before, (
        "an empty store took its place once: there were no results beside it"
    )


@pytest.mark.parametrize("command", ["show", "diff", "export", "report", "verify"])
def test_a_snapshot_without_its_store_is_never_replaced_by_an_empty_one(
    runs: dict[str, Path], tmp_path: Path, command: str
) -> None:
    """All that is left of an unfinished run, say, is what somebody sent along: its manifest and its snapshot."""
    run = Path(shutil.copytree(runs["base"], tmp_path / "runs" / runs["base"].name))
    for name in ("results.duckdb", "seal.json", "seal.parquet"):
        (run / name).unlink()
    (run / "manifest.json").write_text(json.dumps(manifest(run) | {"status": "interrupted"}))
    before = (run / "live.duckdb").read_bytes()
    more = {"diff": (run.name,), "export": ("--to", tmp_path / "out"), "report": ("--to", tmp_path / "out")}
    told = harness(command, run.name, *more.get(command, ()), "--paths.runs", run.parent)
    assert "Traceback" not in told.err
    assert (run / "live.duckdb").read_bytes() == before
    assert not (run / "results.duckdb").exists()
    assert told.code == (1 if command == "verify" else 0), told


PLANTED: dict[str, tuple[str, str, str, str | None]] = {  # column: (change, row, its key, size)
    "p_word": ("p_word + 0.25", "prompt_id = 'milk' AND condition = 'negative'", "milk, negative", "2.5e-01"),
    "logprobs": ("list_transform(logprobs, lambda x: x - 0.5)", "prompt_id = 'worm' AND condition = 'baseline'",
                 "worm, baseline", "5.0e-01"),
    "num_sequences": ("num_sequences + 1", "prompt_id = 'milk' AND condition = 'negative'", "milk, negative", None),
    "entropy": ("NULL", "prompt_id = 'milk' AND condition = 'negative'", "milk, negative", None),
    "top_ids": ("list_reverse(top_ids)", "prompt_id = 'milk' AND condition = 'negative'", "milk, negative", None),
    "sequences": ("[[1]]", "prompt_id = 'paris' AND condition = 'negative'", "paris, negative", None),
    "word_end": ("word_end[2:]", "prompt_id = 'milk' AND condition = 'baseline'", "milk, baseline", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The table of results of a run beside a copy with one value changed in each of some columns."""
    root = tmp_path_factory.mktemp("planted")
    pair = {name: Path(shutil.copytree(runs["base"], root / name)) for name in ("one", "other")}
    with duckdb.connect(str(pair["other"] / "live.duckdb")) as con:
        for column, (value, where, *_) in PLANTED.items():
            con.execute(f"UPDATE psem SET {column} = {value} WHERE {where}")
    for name, path in pair.items():
        (path / "manifest.json").write_text(json.dumps(manifest(path) | {"run_id": name}))
    told = compare(pair, "one", "other", "--exit-code")
    assert told.code == 1
    return cells(told)


@pytest.mark.parametrize("column", PLANTED)
def test_one_value_changed_in_a_column_is_counted_sized_and_its_row_named(
    planted: list[list[str]], column: str
) -> None:
    *_, key, size = PLANTED[column]
    (row,) = [r for r in planted if len(r) == 9 and r[4] == column]
    assert row[5] == "1"
    assert row[8] == key
    assert row[6] == (size or "")
    assert bool(row[7]) == bool(size)
    assert sorted(r[4] for r in planted if len(r) == 9) == sorted(PLANTED), "and no other column"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was analysed; tests copy it."""
    folder = tmp_path_factory.mktemp("analysed")
    args = ("--prompts", prompt_file(folder), "--paths.runs", folder / "runs", "--gravity.num_samples", 2)
    told = harness("run", *args, "--stages", "analysis")
    assert told.code == 0, told.err
    (run,) = run_folders(folder / "runs")
    return run


@pytest.mark.parametrize(("is_other_code", "code"), [(True, 0), (False, 1)])
def test_an_analysis_that_only_newer_code_makes_is_counted_and_is_no_difference(
    analysed: Path, tmp_path: Path, is_other_code: bool, code: int
) -> None:
    """Of the same code a row that is missing is one: the control."""
    one = Path(shutil.copytree(analysed, tmp_path / "runs" / analysed.name))
    pair = {"one": one, "other": Path(shutil.copytree(one, one.parent / "other"))}
    told = manifest(one)
    if is_other_code:
        told["code"]["source_sha256"] = "older"
    (pair["other"] / "manifest.json").write_text(json.dumps(told | {"run_id": "other"}))
    with duckdb.connect(str(pair["other"] / "live.duckdb")) as con:
        con.execute("DELETE FROM statistics WHERE analysis = 'taxonomy'")
    found = compare(pair, "one", "other", "--exit-code")
    assert found.code == code
    (row,) = [row for row in cells(found) if row[0] == "statistics"]
    assert (row[2], row[3]) == ("3", "0"), "kinds of failure under one condition"
    with duckdb.connect(str(pair["other"] / "live.duckdb")) as con:
        con.execute("UPDATE statistics SET value = value + 1 WHERE analysis = 'rates'")
    assert compare(pair, "one", "other", "--exit-code").code == 1


def test_a_run_that_is_not_there_is_one_line(runs: dict[str, Path]) -> None:
    told = harness("diff", "latest", "nosuchrun", "--paths.runs", runs["base"].parent)
    assert (told.code, told.out) == (2, "")
    assert re.fullmatch(r"harness: [^\n]*nosuchrun[^\n]*\n", told.err)
