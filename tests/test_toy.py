"""An experiment that is installed gets everything, without a line of harness or app that knows it: the toy in tests/toy.

Through the command line. The control of it all is a second one, which fails when it is imported.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from streamlit.testing.v1 import AppTest

from harness.cli import main
from harness.experiments import registry
from tests.commands import harness, manifest, only_run, query, refused, run_folders
from tests.installed import TOY, install, metadata_of

SMALL = ("--batching.max_tokens", "64", "--runtime.device", "cpu")
"""Four batches of surprisals."""
BROKEN = """
[project]
name = "harness-broken"
version = "1"
[project.entry-points."harness.experiments"]
broken = "harness_broken:EXPERIMENT"
"""


@pytest.fixture(scope="module", autouse=True)
def on_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The toy, and the broken one, as installed packages."""
    folder = tmp_path_factory.mktemp("installed")
    broken = folder / "broken"
    (broken / "src").mkdir(parents=True)
    (broken / "pyproject.toml").write_text(BROKEN)
    (broken / "src" / "harness_broken.py").write_text("raise RuntimeError('no such luck')\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = [install(monkeypatch, folder / p.name, p) for p in (broken, TOY)]
        yield [place for places in found for place in places]
    registry._load.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy that nobody stopped."""
    root = tmp_path_factory.mktemp("whole")
    told = harness("run", "toy", *SMALL, "--paths.runs", root)
    assert told.code == 0, told.err
    assert "Surprisal: 8.3" in told.out
    assert "This model was never trained" in told.out
    assert "`harness run toy --model ID_OR_PATH`" in told.out
    return only_run(root)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "runs" / whole.name))


def rows(run: Path) -> list[tuple[Any, ...]]:
    return query(run, "SELECT * FROM surprisals ORDER BY text_id")


def files(run: Path) -> list[tuple[Any, ...]]:
    return query(run, "SELECT path, sha256 FROM artifacts ORDER BY path")


def toy(*args: object, root: Path) -> Any:
    return harness("run", "toy", *SMALL, "--paths.runs", root, *args)


def forwards(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Calls `before` with the number of every forward of the stage `surprisal`, counted from 1."""
    from harness_toy import stages  # pyright: ignore[reportMissingImports]

    forward, count = stages.surprisals, iter(range(1, 1000))

    def counted(*args: Any) -> Any:
        before(next(count))
        return forward(*args)

    monkeypatch.setattr(stages, "surprisals", counted)


# -- what it measures


def test_a_model_that_knows_nothing_is_surprised_by_the_logarithm_of_its_vocabulary(whole: Path) -> None:
    found = rows(whole)
    assert len(found) == 10
    assert abs(np.mean([mean for *_, mean in found]) / math.log(4096) - 1) < 0.01


def test_a_trained_model_is_not(tmp_path: Path) -> None:
    """The control: the bundled demo model knows some texts, and is surprised by others."""
    assert toy("--model", "demo", root=tmp_path).code == 0
    found = [mean for *_, mean in rows(only_run(tmp_path))]
    vocabulary = manifest(only_run(tmp_path))["model"]["config"]["vocab_size"]
    assert abs(np.mean(found) / math.log(vocabulary) - 1) > 0.1


def test_every_batch_has_a_file_with_each_of_its_texts_a_token_a_number(whole: Path) -> None:
    means = {text_id: (number, mean) for text_id, number, mean in rows(whole)}
    batches = query(whole, "SELECT keys FROM batches WHERE stage = 'surprisal' AND status = 'done'")
    paths = [path for path, _ in files(whole)]
    assert len(batches) == len(paths) > 2
    texts = []
    for path in paths:
        with safe_open(whole / "artifacts" / path, "numpy") as tensors:
            texts.append(sorted(tensors.keys()))
            for name in texts[-1]:
                values = tensors.get_tensor(name)
                assert (len(values), pytest.approx(float(values.mean()), rel=1e-5)) == means[name]
    assert sorted(texts) == sorted(sorted(keys) for (keys,) in batches)


# -- stopped, failed, tried again


def test_a_signal_stops_it_and_the_same_command_ends_with_the_same_rows(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        forwards(patched, lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 2 else None)
        assert toy(root=tmp_path).code == 3
    stopped = only_run(tmp_path)
    assert 0 < len(rows(stopped)) < 10
    assert toy(root=tmp_path).code == 0
    assert (rows(only_run(tmp_path)), files(stopped)) == (rows(whole), files(whole))


def test_a_killed_run_ends_with_the_same_rows(whole: Path, tmp_path: Path, on_path: list[Path]) -> None:
    code = """
import os, signal, sys
from harness.cli import main
from harness_toy import stages
forward, count = stages.surprisals, iter(range(1, 100))
def killed(*args):
    if next(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args)
stages.surprisals = killed
main(sys.argv[1:])
"""
    path = os.pathsep.join(map(str, [*on_path, Path(__file__).parents[1]]))
    command = [sys.executable, "-c", code, "run", "toy", *SMALL, "--paths.runs", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert manifest(only_run(tmp_path))["status"] == "running"
    assert toy(root=tmp_path).code == 0
    assert (rows(only_run(tmp_path)), files(only_run(tmp_path))) == (rows(whole), files(whole))


def test_an_item_that_failed_is_tried_again_alone(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness_toy import stages  # pyright: ignore[reportMissingImports]

    forward = stages.surprisals

    def fails(lm: Any, texts: Any) -> Any:
        if any(len(t) == longest for t in texts):
            raise ValueError("unlucky")
        return forward(lm, texts)

    longest = 1 + max(number for _, number, _ in rows(whole))
    with monkeypatch.context() as patched:
        patched.setattr(stages, "surprisals", fails)
        told = toy(root=tmp_path)
    assert told.code == 1
    assert "`harness run toy --retry-failed` tries just those" in told.err
    run = only_run(tmp_path)
    num_failed = query(run, "SELECT num_failed FROM stages WHERE stage = 'surprisal'")[0][0]
    assert len(rows(run)) == 10 - num_failed < 10
    assert toy("--retry-failed", root=tmp_path).code == 0
    for (name, *_, mean), (same, *_, was) in zip(rows(run), rows(whole), strict=True):
        assert (name, pytest.approx(mean, rel=1e-5)) == (same, was), "in other company, so up to rounding"


def test_a_text_that_cannot_be_measured_is_a_row_and_exit_1(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"name": "long", "text": "one two three"}\n{"name": "none", "text": ""}\n')
    assert toy("--prompts", texts, root=tmp_path / "runs").code == 1
    run = only_run(tmp_path / "runs")
    assert [name for name, *_ in rows(run)] == ["long"]
    ((message,),) = query(run, "SELECT message FROM events WHERE kind = 'failed_item' AND item_key = 'none'")
    assert "expected 2 to 2048 tokens, found" in message
    texts.write_text('{"name": "twice", "text": "a"}\n{"name": "twice", "text": "b"}\n')
    assert "line 2: the name 'twice' is there twice" in refused(toy("--prompts", texts, root=tmp_path / "runs"))


# -- seal, verify, reproduce, diff, export


def test_a_run_is_sealed_and_verified(whole: Path) -> None:
    told = harness("verify", whole.name, "--paths.runs", whole.parent)
    assert told.code == 0, told.out
    for stage in ("texts", "surprisal", "sanity"):
        assert f"again {stage}" in told.out
    assert "bit for bit" in told.out


def test_a_byte_that_was_flipped_in_a_batchs_file_is_named(copied: Path) -> None:
    path = sorted((copied / "artifacts").rglob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    told = harness("verify", copied.name, "--paths.runs", copied.parent, "--batches", 0)
    assert told.code == 1
    assert f"artifacts/{path.relative_to(copied / 'artifacts')}: its bytes were changed" in told.out
    assert told.out.count("FAIL") == 1


def test_another_version_of_the_package_is_other_code(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sources are no part of harness, and decide results all the same."""
    changed = copied.parents[1] / "changed"
    shutil.copytree(TOY / "src" / "harness_toy", changed / "harness_toy")
    (changed / "harness_toy" / "forward.py").write_text("# changed\n")
    monkeypatch.setattr(registry, "folder_outside", lambda name: changed / "harness_toy")
    line = refused(harness("reproduce", copied.name, "--paths.runs", copied.parent))
    assert "cannot be reproduced as it was: code: was" in line


def test_a_run_is_reproduced_bit_for_bit_and_compared(copied: Path) -> None:
    told = harness("reproduce", copied.name, "--paths.runs", copied.parent)
    assert told.code == 0, told.err
    assert "Reproduced: bit for bit the same results." in told.out
    bits = harness("run", "toy", *SMALL, "--toy.unit", "bits", "--paths.runs", copied.parent)
    assert bits.code == 0
    newest = max(run_folders(copied.parent), key=lambda p: p.stat().st_ctime).name
    told = harness("diff", copied.name, newest, "--exit-code", "--paths.runs", copied.parent)
    assert told.code == 1
    assert "toy.unit" in told.out
    assert "bits a token" in told.out, "the headlines"
    assert "12.0" in told.out
    (table,) = [line for line in told.out.splitlines() if "│ surprisals" in line]
    assert "│ mean" in table


def test_its_tables_are_exported(whole: Path, tmp_path: Path) -> None:
    assert harness("export", whole.name, "--to", tmp_path, "--paths.runs", whole.parent).code == 0
    found = pq.read_table(tmp_path / "surprisals.parquet").to_pylist()
    assert [tuple(r.values()) for r in found] == rows(whole)
    assert (tmp_path / "texts.parquet").exists()
    assert not (tmp_path / "prompts.parquet").exists()


# -- what people see


def test_the_report_has_its_section_and_figure(whole: Path, tmp_path: Path) -> None:
    assert harness("report", whole.name, "--to", tmp_path, "--paths.runs", whole.parent).code == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    for told in ("How surprised is the model by each text?", "Surprisal of each text", "shuffled", "the tokens before it",
                 "This model was never trained", "Sanity certificate"):  # fmt: skip
        assert told in page, told
    assert (tmp_path / "figures" / "surprisal.png").stat().st_size > 5_000
    assert "P_sem" not in page


def test_it_is_shown_and_listed(whole: Path) -> None:
    assert "Surprisal: 8.3" in harness("show", whole.name, "--paths.runs", whole.parent).out
    assert whole.name[:15] in harness("runs", "--paths.runs", whole.parent).out


def test_sanity_and_bench_measure_it_both_ways(tmp_path: Path) -> None:
    told = harness("sanity", "toy", "--num-prompts", 3, "--runtime.device", "cpu")
    assert told.code == 0, told.out
    assert "│ surprisal   │     6 │" in told.out
    file = tmp_path / "bench.json"
    told = harness(
        "bench", "toy", "--model", "random:tiny-llama", "--contexts", 4, "--json", file, "--runtime.device", "cpu"
    )
    assert told.code == 0, told.out
    assert [f["way"] for f in json.loads(file.read_text())["figures"]] == ["one batch of 4", "one text at a time"]


def test_a_wrong_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the certificate: the batched path reads each text one token off."""
    from harness_toy import certificate  # pyright: ignore[reportMissingImports]

    forward = certificate.surprisals
    monkeypatch.setattr(certificate, "surprisals", lambda lm, texts: [np.roll(v, 1) for v in forward(lm, texts)])
    told = harness("sanity", "toy", "--num-prompts", 2, "--runtime.device", "cpu")
    assert told.code == 1
    assert "DISAGREES" in told.out


def test_its_page_shows_its_chart(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(whole.parent))
    test = AppTest.from_file(str(TOY / "src" / "harness_toy" / "page.py"), default_timeout=60).run()
    assert not test.exception, [e.value for e in test.exception]
    assert test.title[0].value == "Surprisal"
    assert "never trained" in test.warning[0].value
    (chart,) = test.get("echarts_chart")
    assert "shuffled" in json.loads(chart.proto.spec)["yAxis"]["data"]
    whole_app = AppTest.from_file(str(Path(__file__).parents[1] / "app" / "streamlit_app.py"), default_timeout=60).run()
    assert not whole_app.exception, [e.value for e in whole_app.exception]


# -- settings and help


def test_help_shows_its_settings_and_no_others() -> None:
    def helped(*args: str) -> str:
        out = StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as end:
            main([*args, "--help"])
        assert end.value.code == 0
        return out.getvalue()

    own, default = helped("run", "toy"), helped("run")
    assert "--toy.unit" in own
    assert "--model.dtype" in own
    assert "--gravity." not in own
    assert "--gravity.num_samples" in default
    assert "--toy." not in default
    assert "toy" in default, "among the experiments"
    assert "--toy.unit" in helped("sanity", "toy")


@pytest.mark.parametrize("how", ["flag", "variable", "file"])
def test_a_setting_is_given_in_three_ways(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[gravity]\nnum_samples = 3\n[toy]\nunit = "bits"\n[data]\nlimit = 2\n')
    args: tuple[object, ...] = {"flag": ("--toy.unit", "bits"), "variable": (), "file": ("--config", file)}[how]
    if how == "variable":
        monkeypatch.setenv("HARNESS_TOY__UNIT", "bits")
        monkeypatch.setenv("HARNESS_GRAVITY__NUM_SAMPLES", "3")
    told = harness("run", "toy", "--dry-run", "--limit", 2, "--runtime.device", "cpu", *args)
    assert told.code == 0, told.err
    assert "2 texts, in bits" in told.err
    if how == "file":
        told = harness(
            "run", "--dry-run", "--limit", 2, "--gravity.stages", "prompts", "--runtime.device", "cpu", *args
        )
        assert told.code == 0, told.err
        assert "2 prompts" in told.err


def test_a_setting_that_it_does_not_have_is_refused() -> None:
    assert "no such argument --toy.units; did you mean '--toy.unit'?" in refused(
        harness("run", "toy", "--toy.units", "bits")
    )
    assert "no such argument --gravity.num_samples" in refused(harness("run", "toy", "--gravity.num_samples", 3))
    assert "should be 'nats' or 'bits'; found 'bytes'" in refused(harness("run", "toy", "--toy.unit", "bytes"))
    assert "takes one model" in refused(harness("run", "toy", "--other", "demo"))


# -- the control


def test_a_package_that_cannot_be_imported_is_named_and_hinders_no_other(whole: Path) -> None:
    line = refused(harness("run", "broken"))
    assert "experiment broken (installed by harness-broken) cannot be imported: RuntimeError: no such luck" in line
    assert {"broken", "toy"} <= set(registry.names())
    told = harness("doctor", "toy", "--paths.runs", whole.parent, "--runtime.device", "cpu")
    assert told.code == 4
    (failed,) = [line for line in told.out.splitlines() if line.startswith("FAIL")]
    assert "experiments" in failed
    assert "experiment broken" in failed
    assert toy(root=whole.parent).code == 0, "it is finished"


def test_the_entry_points_are_what_makes_it_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the fixture: with its sources on the path, and nothing more, nobody knows it."""
    rest = [place for place in sys.path if not (Path(place) / "harness_toy-0.1.dist-info").exists()]
    assert len(rest) < len(sys.path)
    monkeypatch.setattr(sys, "path", rest)
    known = registry.names()
    assert "broken" in known
    assert "toy" not in known
    metadata_of(TOY, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(registry.names()) == {*known, "toy"}
