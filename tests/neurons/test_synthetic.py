"""The synthetic run is a run like any other: the same files and schema, and the numbers of one table fit those of another."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.experiments.neurons.schema import SCHEMA
from harness.files import file_sha256
from harness.run import RunPaths, list_runs, locked, read_manifest, state
from harness.store import Reader
from tests.neurons import synthetic
from tests.neurons.synthetic import Shape

SMALL = Shape(num_prompts=30, num_layers=3, num_neurons=32)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.make(tmp_path_factory.mktemp("runs"), SMALL)


@pytest.fixture(scope="module")
def reader(paths: RunPaths):
    with Reader(paths.live, SCHEMA) as reader:
        yield reader


def test_the_folder_is_a_finished_run_with_every_table_filled(paths: RunPaths, reader: Reader) -> None:
    (entry,) = list_runs(paths.folder.parent)
    assert entry.problem is None
    assert state(read_manifest(paths)) == "finished"
    counts = {name: reader.query(f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in SCHEMA.tables}
    assert {name for name, n in counts.items() if not n} == {"batches", "left_out", "sanity_items"}
    assert counts["neurons"] == counts["neuron_writes"] == 96
    assert counts["influence"] == 30 * 4 * 96  # each of them, as there are fewer than are kept
    for checks in (SCHEMA.orphans, SCHEMA.sense):
        assert {what: rows for what, sql in checks.items() if (rows := reader.query(sql))} == {}


def test_a_dumped_value_is_the_one_that_tables_tell(paths: RunPaths, reader: Reader) -> None:
    told = [(r["path"], r["sha256"]) for r in reader.query("SELECT path, sha256 FROM artifacts")]
    assert [(path, file_sha256(paths.artifacts / path)) for path, _ in told] == told
    files = {path: load_file(paths.artifacts / path) for path, _ in told}
    rows = reader.query(
        "SELECT n.path, n.row_start + e.position AS row, e.layer, e.neuron, e.value FROM ("
        "SELECT layer, neuron, unnest(examples, recursive := true) FROM neurons) e JOIN neuron_rows n "
        "USING (prompt_id) UNION ALL "
        "SELECT n.path, n.row_start + i.position, i.layer, i.neuron, i.activation FROM influence i JOIN neuron_rows n "
        "USING (prompt_id)"
    )
    assert len(rows) > 1000
    for r in rows:
        assert files[r["path"]][f"a.{r['layer']}"][r["row"], r["neuron"]] == np.float16(r["value"])
    largest = {(r["layer"], r["neuron"]): r["max_peak"] for r in reader.query("SELECT * FROM neurons")}
    for layer in range(3):
        seen = np.abs(np.concatenate([f[f"a.{layer}"] for f in files.values()])).max(axis=0)
        assert seen == pytest.approx([largest[layer, n] for n in range(32)], rel=1e-3)  # float16 has eleven bits


def test_bfloat16_is_written_as_the_nearest(tmp_path: Path) -> None:
    values = np.array([[1.0, -2.5, 3.140625, 1.00390625, 1.01171875]], dtype=np.float32)  # the last two are halfway
    synthetic.write_tensors(tmp_path / "x.safetensors", {"a.0": values}, "bfloat16")
    raw = (tmp_path / "x.safetensors").read_bytes()[-10:]
    read = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert read.tolist() == [1.0, -2.5, 3.140625, 1.0, 1.015625]


def test_a_run_that_goes_on_has_half_a_stage_and_ends_as_one_made_at_once(tmp_path: Path, paths: RunPaths) -> None:
    shape = Shape(**{**SMALL.__dict__, "stages": ("prompts", "dump", "peaks", "influence"), "is_running": True})
    half = synthetic.make(tmp_path, shape)
    with locked(half):
        assert state(read_manifest(half)) == "running"
        with Reader(half.live, SCHEMA) as reader:
            (row,) = reader.query("SELECT status, num_done, num_items FROM stages WHERE stage = 'influence'")
            assert row == {"status": "running", "num_done": 15, "num_items": 30}
            assert len(reader.query("SELECT DISTINCT prompt_id FROM influence")) == 15
            assert not reader.query("SELECT 1 FROM effects LIMIT 1")
        synthetic.go_on(half, shape, is_last=True)
    with Reader(half.live, SCHEMA) as one, Reader(paths.live, SCHEMA) as other:
        for table in SCHEMA.measured:
            assert one.table(table) == other.table(table), table
    assert state(read_manifest(half)) == "finished"


def test_the_command_prints_the_folder_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.main(["--prompts", "3", "--layers", "1", "--neurons", "8", "--to", str(tmp_path)])
    assert read_manifest(RunPaths(Path(capsys.readouterr().out.strip()))).prompts.used == 3
