"""The command line as people meet it: what each command prints, where, and the exit code it ends with."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import ItemFailed
from harness.experiments.gravity.bins import bin_of
from harness.experiments.gravity.stages import psem
from harness.experiments.gravity.stages.select import Candidate, choose
from harness.experiments.gravity.stages.single_token import SingleToken
from harness.text.prompts import read_prompts
from tests.commands import (
    BAN,
    DATA,
    REFRAME,
    ROWS,
    SECRET,
    Told,
    harness,
    manifest,
    only_run,
    prompt_file,
    query,
    refused,
    run_folders,
)
from tests.gravity import FIELDS, own, resolve


class Finished(NamedTuple):
    """A finished run of three prompts, how it was started and what it said."""

    root: Path
    run: Path
    args: tuple[object, ...]
    told: Told


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Started with secrets in the environment, and two rows that are no prompts. Tests read it and change nothing."""
    folder = tmp_path_factory.mktemp("finished")
    broken = ({**ROWS[0], "prompt_id": "x", "target": "R2"}, {**ROWS[1], "prompt_id": "y", "target": "bird"})
    prompts = prompt_file(folder, (ROWS[0], broken[0], *ROWS[1:], broken[1]))
    root = folder / "runs"
    args = ("run", "--prompts", prompts, "--paths.runs", root, "--gravity.num_samples", 2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FAKE_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, SECRET)
        told = harness(*args)
    assert told.code == 0, told.err
    return Finished(root, only_run(root), args, told)


# Bad input: one line, exit 2, nothing written

GOOD_LINE = json.dumps(ROWS[0]).encode() + b"\n"
BAD_FILES: dict[str, tuple[str, bytes]] = {
    "no suffix": ("prompts", GOOD_LINE), "unknown suffix": ("prompts.txt", GOOD_LINE), "empty": ("p.jsonl", b""),
    "only blank lines": ("p.jsonl", b"\n \n"), "only a header": ("p.csv", b"category,question,target\n"),
    "not json": ("p.jsonl", GOOD_LINE + b"{oops}\n"), "cut short": ("p.jsonl", GOOD_LINE + GOOD_LINE[:40]),
    "no object": ("p.jsonl", b"[1, 2]\n"), "a key twice": ("p.jsonl", b'{"target": "a", "target": "b"}\n'),
    "missing field": ("p.jsonl", b'{"category": "a", "question": "b"}\n'),
    "missing column": ("p.csv", b"category,question\na,b\n"),
    "a column twice": ("p.csv", b"category,question,target,target\na,b,c,d\n"),
    "semicolons": ("p.csv", b"category;question;target\na;b;cc\n"),
    "too many cells": ("p.csv", b"category,question,target\na,b,cc,d\n"),
    "too few cells": ("p.csv", b"category,question,target\na,b\n"),
    "open quote": ("p.csv", b'category,question,target\na,"b,cc\n'),
    "not utf-8": ("p.jsonl", GOOD_LINE + GOOD_LINE.replace(b"milk", b"m\xe9lk")),
    "utf-16": ("p.jsonl", GOOD_LINE.decode().encode("utf-16")), "a NUL": ("p.jsonl", GOOD_LINE + b"\0"),
    "no parquet": ("p.parquet", b"PAR1 and then nothing"), "an empty parquet": ("p.parquet", b""),
    "ids twice": ("p.jsonl", GOOD_LINE + GOOD_LINE.replace(b"crying", b"weeping")),
    "a number": ("p.jsonl", GOOD_LINE.replace(b'"target": "milk"', b'"target": 3')),
    "a text for a list": ("p.jsonl", GOOD_LINE.replace(b'["water", "wine", "juice"]', b'"water"')),
    "no row keeps the rules": ("p.jsonl", GOOD_LINE.replace(b"milk", b"m1lk")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_prompt_file_is_one_line_and_exit_2_and_no_run(tmp_path: Path, kind: str) -> None:
    name, content = BAD_FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(harness("run", "--prompts", path, "--paths.runs", tmp_path / "runs"))
    assert name in message
    assert not (tmp_path / "runs").exists()


def test_a_prompt_file_that_is_not_there_or_a_folder_is_one_line_and_no_run(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert str(path) in refused(harness("run", "--prompts", path, "--paths.runs", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [(["rum"], r"'rum'.*'run'"), (["run", "--modle", "x"], "no such argument --modle; did you mean '--model'"),
     (["run", "--gravity.topp=1"], "no such argument --gravity.topp=1; did you mean '--gravity.top_p'"),
     (["run", "--lim", "3"], "no such argument --lim; did you mean '--limit'"), (["run", "--limit"], "--limit"),
     (["run", "gravitas"], "no experiment 'gravitas'; did you mean 'gravity'"), (["run", "gravity", "extra"], "extra"),
     (["run", "--stages", "psme"], "no stage 'psme'; did you mean 'psem'"),
     (["run", "--gravity.conditions", "negativ"], "no condition 'negativ'; did you mean 'negative'"),
     (["run", "--gravity.sample_conditions", "negativ"], "no condition 'negativ'.*; did you mean 'negative'"),
     (["run", "--model", "random:tiny-lama"], "no shape 'tiny-lama'.*tiny-llama"),
     (["run", "--model", "/no/such/folder"], "no folder '/no/such/folder'"),
     (["run", "--model", "nobody/nothing"], "'nobody/nothing' is no folder here"), (["run", "--model", "a/b/c"], "a/b/c"),
     (["run", "--model", DATA], "config.json"), (["run", "--limit", "0"], "data.limit"),
     (["run", "--config", "/no/such.toml"], "no file '/no/such.toml'"), (["run", "--resume", "nosuchrun"], "nosuchrun"),
     (["show"], "run"), (["show", "latest"], "no run in"), (["export", "latest"], "--to"),
     (["export", "latest", "--to", "x"], "no run in"), (["export", "x", "--to", "x", "--format", "xml"], "xml"),
     (["sanity", "--num-prompts", "0"], "--num-prompts"), (["sanity", "--num-prompts", "few"], "few"),
     (["bench", "--shape", "huge"], "huge"), (["bench", "--stage", "psme"], "psme")],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)  # fmt: skip
def test_what_is_not_known_is_one_line_and_exit_2_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[object], told: str
) -> None:
    monkeypatch.setenv("HARNESS_PATHS__RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HARNESS_DATA__PROMPTS", str(prompt_file(tmp_path)))  # sooner read than the bundled ones
    assert re.search(told, refused(harness(*args)))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_variable_is_one_line_and_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_GRAVITY__TOPP", "1")
    assert "did you mean 'HARNESS_GRAVITY__TOP_P'" in refused(harness("run"))
    assert harness("runs").code == 0, "a command about no experiment leaves its variables to it"
    monkeypatch.setenv("HARNESS_DATA__LIMT", "1")
    assert "did you mean 'HARNESS_DATA__LIMIT'" in refused(harness("runs"))


def test_chat_with_a_model_that_has_no_template_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", "prompts")
    assert "chat template" in refused(harness(*args, "--gravity.chat", "true"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["run", "sanity"])
def test_cuda_without_a_gpu_is_one_line_and_exit_4_and_no_run(tmp_path: Path, command: str) -> None:
    message = refused(harness(command, "--runtime.device", "cuda", "--paths.runs", tmp_path / "runs"), code=4)
    assert "runtime.device=cuda" in message
    assert not (tmp_path / "runs").exists()


def test_runs_that_cannot_be_kept_where_asked_are_one_line_and_exit_4(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "taken")
    assert "paths.runs" in refused(harness(*args), code=4)


def test_a_stage_that_cannot_be_made_ready_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its set-up fails, not a batch: that must not be a traceback either."""

    def setup(self: SingleToken) -> None:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "in the way")

    monkeypatch.setattr(SingleToken, "setup", setup)
    told = harness(
        "run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", "single_token"
    )
    assert told.code in (2, 4)
    assert "in the way" in told.err.splitlines()[-1]
    assert manifest(only_run(tmp_path / "runs"))["status"] == "failed"


# Help


def test_help_names_every_command_and_every_setting() -> None:
    told = harness()
    assert told.code == 0
    for command in ("run", "runs", "show", "export", "doctor", "sanity", "bench"):
        assert re.search(rf"^\s+{command}\s", told.out, re.MULTILINE)
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    assert all(f"--{name}" in out.getvalue() for name in list(FIELDS.names))
    assert all(f"--{short}" in out.getvalue() for short in ("model ", "prompts ", "limit ", "stages ", "config "))


# A finished run


def test_a_run_says_what_it_did_on_stdout_and_how_on_stderr(finished: Finished) -> None:
    told = finished.told
    assert finished.run.name in told.out
    assert "negative" in told.out
    assert "INFO" not in told.out
    assert "psem done: 6 items" in told.err
    assert f"harness report {finished.run.name}" in told.out
    assert "Certificate: all 19 measurements agree" in told.out


def test_rejected_rows_are_counted_and_listed_with_row_numbers_and_stored(finished: Finished) -> None:
    assert re.search(r"prompts.jsonl row 2: target_not_alphabetic", finished.told.err)
    assert re.search(r"prompts.jsonl row 5: target_in_question", finished.told.err)
    assert "2 rows rejected (1 target_in_question, 1 target_not_alphabetic)" in finished.told.err
    assert manifest(finished.run)["prompts"]["rejected"] == {"target_not_alphabetic": 1, "target_in_question": 1}
    events = query(finished.run, "SELECT message FROM events WHERE kind = 'rejected_prompt' ORDER BY event_id")
    assert [m.split(":")[0] for (m,) in events] == ["row 2", "row 5"]
    assert query(finished.run, "SELECT prompt_id FROM prompts ORDER BY 1") == [("milk",), ("paris",), ("worm",)]


def test_the_manifest_says_what_the_run_was(finished: Finished) -> None:
    found = manifest(finished.run)
    assert found["run_id"] == finished.run.name
    assert found["status"] == "finished"
    assert found["fingerprint"][:8] == finished.run.name.rsplit("-", 1)[1]
    assert found["settings"]["gravity.num_samples"] == {"value": 2, "source": "flag: --gravity.num_samples"}
    assert found["settings"]["runtime.seed"] == {"value": 0, "source": "default"}
    assert set(found["settings"]) == set(FIELDS.names)
    for key in ("created", "heartbeat", "ended", "fingerprint_parts", "experiment", "device", "lock_sha256", "seconds"):
        assert key in found
    assert {"git_commit", "git_dirty", "version"} <= set(found["code"])
    assert {"torch", "duckdb", "transformers"} <= set(found["packages"])
    assert {"python", "os", "cpu", "ram_bytes", "gpus", "driver", "cuda", "cudnn", "slurm", "container"} <= set(
        found["machine"]
    )
    assert {"matmul_tf32", "cudnn_tf32", "deterministic_algorithms", "attention"} <= set(found["numerics"])
    assert {"name", "revision", "weights_sha256", "tokenizer_sha256", "config", "generation_config", "dtype"} <= set(
        found["model"]
    )
    assert found["prompts"]["row_hashes"].keys() == {"milk", "worm", "paris"}
    assert len(found["prompts"]["sha256"]) == 64
    assert "splitmix64" in found["random_numbers"]
    assert list(found["stages"]) == [
        "vocabulary", "prompts", "sanity", "psem", "greedy", "samples", "detect", "mechanism", "patching", "analysis",
    ]  # fmt: skip
    assert len(found["sanity"]) == 19
    assert all(v["ok"] and v["max_abs"] <= v["tolerance"] for v in found["sanity"])
    assert {"num_items", "num_failed", "seconds", "tokens", "peak_bytes", "num_batches", "splits"} <= set(
        found["stages"]["psem"]
    )
    assert found["tables"]["completions"] == 3 * 2 * (1 + 2)
    assert found["planted"] is True


def test_the_manifest_holds_the_command_that_was_given_and_not_this_processs(finished: Finished) -> None:
    """It is what a person types to go on; in a notebook or a test, sys.argv is another program's."""
    assert manifest(finished.run)["argv"] == ["harness", *map(str, finished.args)]


def test_no_secret_of_the_environment_gets_into_a_run(finished: Finished) -> None:
    files = [p for p in finished.run.rglob("*") if p.is_file()]
    assert {"manifest.json", "results.duckdb", "live.duckdb", "run.log"} <= {p.name for p in files}
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert [p for p in files if b"spilled" in p.read_bytes()], "the control: what is in the rows is found so"


def test_the_log_is_json_lines(finished: Finished) -> None:
    lines = (finished.run / "logs" / "run.log").read_text().splitlines()
    assert any("psem done" in json.loads(line)["record"]["message"] for line in lines)


# runs, show, RUN


def test_runs_and_show_of_a_finished_run(finished: Finished) -> None:
    told = harness("runs", "--paths.runs", finished.root)
    assert told.code == 0
    assert re.search(rf"{finished.run.name} .*finished .*demo .* 3 ", told.out)
    told = harness("show", "latest", "--paths.runs", finished.root)
    assert told.code == 0
    for part in (finished.run.name, "finished", "psem", "row 2: target_not_alphabetic", "gravity.num_samples = 2"):
        assert part in told.out


def test_runs_of_no_runs_say_how_to_start_one(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        told = harness("runs", "--paths.runs", root)
        assert told.code == 0
        assert "No run in" in told.out
        assert "harness run" in told.out
    assert not (tmp_path / "none").exists()


@pytest.fixture
def many_runs(tmp_path: Path, finished: Finished) -> tuple[Path, str]:
    """A folder with copies of the finished run under ids that share beginnings, and the id of the newest."""
    for name in ("20250101-000000-a-11111111", "20250101-000000-a-11111111-2", "20250301-000000-b-22222222"):
        shutil.copytree(finished.run, tmp_path / "runs" / name)
        path = tmp_path / "runs" / name / "manifest.json"
        path.write_text(json.dumps(manifest(finished.run) | {"run_id": name}))
    return tmp_path / "runs", "20250301-000000-b-22222222"


def test_a_run_is_named_by_id_unique_prefix_or_latest(many_runs: tuple[Path, str], tmp_path: Path) -> None:
    root, newest = many_runs
    for wanted, found in (
        ("20250101-000000-a-11111111", "20250101-000000-a-11111111"),  # though another id begins with it
        ("20250101-000000-a-11111111-", "20250101-000000-a-11111111-2"),
        ("202503", newest),
        ("latest", newest),
    ):
        told = harness("export", wanted, "--to", tmp_path / "out", "--format", "csv", "--paths.runs", root)
        assert told.code == 0
        assert told.out.startswith(f"{found}: ")


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("2025", "3 runs begin so: .*20250301"), ("20250101", "2 runs begin so"), ("nothing", "found none among 3"),
     ("", "found none"), ("..", "no run|none"), ("a-11111111", "found none"), ("Latest", "found none")],
)  # fmt: skip
def test_a_run_that_is_not_one_is_one_line_and_exit_2(many_runs: tuple[Path, str], wanted: str, told: str) -> None:
    root, _ = many_runs
    for args in (("show", wanted), ("export", wanted, "--to", root.parent / "out")):
        assert re.search(told, refused(harness(*args, "--paths.runs", root)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "expected a manifest.json, found none"), ("{", "not readable as JSON"), ("[]", "expected a manifest with"),
     ("{}", "expected a manifest with")],
)  # fmt: skip
def test_a_broken_run_folder_is_a_row_with_its_reason_and_never_a_traceback(
    many_runs: tuple[Path, str], content: str | None, reason: str
) -> None:
    root, newest = many_runs
    broken = root / "20990101-000000-broken"
    broken.mkdir()
    if content is not None:
        (broken / "manifest.json").write_text(content)
    listed = harness("runs", "--paths.runs", root)
    assert listed.code == 0
    assert "broken" in listed.out
    assert newest in listed.out
    assert reason.replace(" ", "") in re.sub(r"[\s│┃]", "", listed.out), "wrapped by the table"
    assert reason in refused(harness("show", broken.name, "--paths.runs", root))
    assert reason in refused(harness("export", broken.name, "--to", root.parent / "out", "--paths.runs", root))
    assert newest in harness("show", "latest", "--paths.runs", root).out, "latest is the latest that can be read"


@pytest.mark.parametrize("damage", ["garbage", "none"])
def test_a_run_whose_results_are_damaged_is_one_line(many_runs: tuple[Path, str], damage: str) -> None:
    root, newest = many_runs
    for name in ("results.duckdb", "live.duckdb"):
        (root / newest / name).unlink()
        if damage == "garbage":
            (root / newest / name).write_bytes(b"garbage" * 1000)
    assert harness("runs", "--paths.runs", root).code == 0
    assert newest in refused(harness("show", "latest", "--paths.runs", root))
    assert newest in refused(harness("export", "latest", "--to", root.parent / "out", "--paths.runs", root))


def test_show_of_a_manifest_with_little_in_it_still_shows(many_runs: tuple[Path, str]) -> None:
    root, newest = many_runs
    (root / newest / "manifest.json").write_text(json.dumps({"run_id": newest, "fingerprint": "0"}))
    assert harness("runs", "--paths.runs", root).code == 0
    assert harness("show", newest, "--paths.runs", root).code == 0


# Export

# From the contract of the tables (schema.md); DuckDB's own spelling of the types. None: whatever it is.
IDS = {"prompt_id": "VARCHAR", "condition": "VARCHAR"}
COMPLETION = {**IDS, "mode": "VARCHAR", "sample_id": "INTEGER"}
STEP = {**IDS, "step_kind": "VARCHAR", "layer": "INTEGER", "step": "INTEGER"}
CONTRACT: dict[str, dict[str, str]] = {
    "prompts": {"prompt_id": "VARCHAR", "category": "VARCHAR", "question": "VARCHAR", "target": "VARCHAR",
                "source": "VARCHAR", "style": "VARCHAR", "row_hash": "VARCHAR", "single_token": "BOOLEAN", "tier": "VARCHAR"},
    "contexts": {**IDS, "text": "VARCHAR", "token_ids": "INTEGER[]", "spans":
                 "STRUCT(instruction INTEGER[], negation INTEGER[], mention INTEGER[], question INTEGER[])"},
    "psem": {**IDS, "p_sem": "DOUBLE", "p_word": "DOUBLE", "paper_p_sem": "DOUBLE", "num_sequences": "INTEGER",
             "sequences": "INTEGER[][]", "logprobs": "DOUBLE[]", "entropy": "DOUBLE", "top_ids": "INTEGER[]",
             "top_probs": "DOUBLE[]"},
    "completions": {**COMPLETION, "token_ids": "INTEGER[]", "text": "VARCHAR", "answer": "VARCHAR",
                    "finish_reason": "VARCHAR", "logprobs": "FLOAT[]", "margins": "FLOAT[]"},
    "detections": {**COMPLETION, "word_present": "BOOLEAN", "word_present_full": "BOOLEAN", "format_ok": "BOOLEAN",
                   "num_occurrences": "INTEGER", "first_step": "INTEGER", "char_spans": "INTEGER[][]",
                   "token_spans": "INTEGER[][]"},
    "attention": {**STEP, "iar": "FLOAT[]", "nf": "FLOAT[]", "tmf": "FLOAT[]", "pi": "FLOAT[]", "mean_row": "FLOAT[]"},
    "lens": {**STEP, "p_target": "DOUBLE", "p_emitted": "DOUBLE", "entropy": "DOUBLE", "kl_final": "DOUBLE",
             "top_ids": "INTEGER[]", "top_probs": "DOUBLE[]"},
    "decomposition": {**STEP, "p_in": "DOUBLE", "p_attn": "DOUBLE", "p_out": "DOUBLE", "attn_contrib": "DOUBLE",
                      "ffn_contrib": "DOUBLE"},
    "patching": {"prompt_id": "VARCHAR", "layer": "INTEGER", "patch": "VARCHAR", "p_sem_original": "DOUBLE",
                 "p_sem_patched": "DOUBLE", "delta_p": "DOUBLE", "continuation": "VARCHAR", "flipped": "BOOLEAN"},
    "activations": {**IDS, "layer": "INTEGER", "resid_norm": "FLOAT[]", "top_neurons": "INTEGER[]", "top_values": "FLOAT[]"},
    "artifacts": {"path": "VARCHAR", "kind": "VARCHAR", "sha256": "VARCHAR", "bytes": "BIGINT", "shape": "INTEGER[]",
                  "dtype": "VARCHAR", **IDS},
    "stages": {"stage": "VARCHAR", "version": "INTEGER", "status": "VARCHAR", "num_items": "INTEGER", "num_done": "INTEGER",
               "num_failed": "INTEGER", "seconds": "DOUBLE", "tokens": "BIGINT", "prefill_tokens": "BIGINT",
               "padding_tokens": "BIGINT"},
    "batches": {"stage": "VARCHAR", "batch_id": "INTEGER", "parent": "INTEGER", "status": "VARCHAR", "keys": "VARCHAR[]",
                "num_items": "INTEGER", "padded_tokens": "BIGINT", "seconds": "DOUBLE", "peak_bytes": "BIGINT",
                "attempt": "INTEGER", "tokens": "BIGINT", "prefill_tokens": "BIGINT", "padding_tokens": "BIGINT",
                "work_s": "DOUBLE"},
    "events": {"event_id": "BIGINT", "time": "TIMESTAMP", "level": "VARCHAR", "stage": "VARCHAR",
               "batch_id": "INTEGER", "item_key": "VARCHAR", "kind": "VARCHAR", "message": "VARCHAR"},
    "suppression": {**IDS, "p0": "DOUBLE", "p1": "DOUBLE", "delta": "DOUBLE", "relative": "DOUBLE", "log": "DOUBLE"},
    "violation": {**IDS, "num_samples": "BIGINT", "num_violations": "BIGINT", "rate": "DOUBLE"},
    "outcomes": {**IDS, "word_present": "BOOLEAN", "outcome": "VARCHAR", "taxonomy": "VARCHAR"},
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in every format, a folder each."""
    folder = tmp_path_factory.mktemp("exported")
    for form in ("parquet", "csv", "jsonl"):
        told = harness("export", "latest", "--to", folder / form, "--format", form, "--paths.runs", finished.root)
        assert told.code == 0, told.err
        assert json.loads((folder / form / "manifest.json").read_text()) == manifest(finished.run)
    return folder


@pytest.mark.parametrize("table", CONTRACT)
def test_exported_parquet_has_the_contracts_columns_and_types_and_the_runs_rows(
    exported: Path, finished: Finished, table: str
) -> None:
    path = exported / "parquet" / f"{table}.parquet"
    described = duckdb.sql(f"DESCRIBE SELECT * FROM '{path}'")
    assert described is not None
    types = dict(described.project("column_name, column_type").fetchall())
    plain = {name: re.sub(r'"', "", kind).replace("INTEGER[2]", "INTEGER[]") for name, kind in types.items()}
    assert plain | CONTRACT[table] == plain
    assert pq.read_table(path).num_rows == query(finished.run, f"SELECT count(*) FROM {table}")[0][0]


@pytest.mark.parametrize("table", CONTRACT)
def test_exported_csv_and_jsonl_have_the_same_rows_as_parquet(exported: Path, table: str) -> None:
    rows = pq.read_table(exported / "parquet" / f"{table}.parquet").to_pylist()
    lines = (exported / "jsonl" / f"{table}.jsonl").read_text("utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    names = list(CONTRACT[table])
    exact = [n for n in names if n != "time" and "FLOAT" not in CONTRACT[table][n]]  # FLOATs print in fewer digits
    assert [{n: r[n] for n in exact} for r in read] == [{n: r[n] for n in exact} for r in rows]
    with duckdb.connect(":memory:") as con:
        path = exported / "csv" / f"{table}.csv"
        found = con.execute(f"SELECT * FROM read_csv('{path}', header = true, all_varchar = true)")
        columns = [d[0] for d in found.description or []]
        cells = found.fetchall()
    assert set(names) <= set(columns)
    assert len(cells) == len(rows)
    for name in [n for n in names if CONTRACT[table][n] == "VARCHAR"]:
        assert [c[columns.index(name)] for c in cells] == [r[name] for r in rows]


def test_every_table_the_run_has_is_exported(exported: Path, finished: Finished) -> None:
    names = {
        n
        for (n,) in query(finished.run, "SELECT table_name FROM information_schema.tables WHERE table_catalog = 'run'")
    }
    # But for the view that unfolds `attention` into a row a head.
    assert {p.stem for p in (exported / "csv").glob("*.csv")} == names - {"attention_heads"}
    assert set(CONTRACT) <= names


def test_exported_numbers_are_the_measured_ones(exported: Path, finished: Finished) -> None:
    sql = "SELECT prompt_id, condition, p_sem, p_word, sequences, logprobs FROM {} ORDER BY 1, 2"
    assert duckdb.execute(sql.format(f"'{exported / 'parquet' / 'psem.parquet'}'")).fetchall() == query(
        finished.run, sql.format("psem")
    )


def test_export_to_where_nothing_can_be_written_is_one_line_and_exit_4(tmp_path: Path, finished: Finished) -> None:
    (tmp_path / "taken").write_text("")
    told = harness("export", "latest", "--to", tmp_path / "taken", "--paths.runs", finished.root)
    assert "--to" in refused(told, code=4)


# Doctor


def test_doctor_finds_nothing_wrong_here_and_leaves_nothing_behind(tmp_path: Path) -> None:
    told = harness("doctor", "--paths.runs", tmp_path / "runs", "--runtime.device", "cpu")
    assert told.code == 0, told.out
    lines = told.out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert [line.split()[1] for line in lines][:4] == ["code", "python", "gpu", "memory"]
    assert not list((tmp_path / "runs").iterdir())


def test_doctor_tells_each_thing_that_is_wrong_and_exits_4(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    told = harness(
        "doctor", "--paths.runs", tmp_path / "taken", "--model", tmp_path / "none", "--prompts", tmp_path / "none.csv"
    )
    assert told.code == 4
    wrong = {line.split()[1] for line in told.out.splitlines() if line.startswith("FAIL")}
    assert {"runs", "input", "model"} <= wrong
    assert "Traceback" not in told.err


# Going on with a run


def test_the_same_command_again_reports_the_finished_run_and_exits_0(finished: Finished) -> None:
    for more in ((), ("--resume", "auto"), ("--resume", finished.run.name), ("--resume", "latest")):
        before = (finished.run / "manifest.json").read_bytes()
        told = harness(*finished.args, *more)
        assert told.code == 0
        assert f"Run {finished.run.name} is finished already" in told.out
        assert (finished.run / "manifest.json").read_bytes() == before
    assert run_folders(finished.root) == [finished.run]


def test_going_on_with_other_settings_is_refused_naming_each_key_with_both_values(finished: Finished) -> None:
    changes = ("--gravity.num_samples", 3, "--gravity.top_p", 0.5, "--runtime.seed", 4, "--limit", 2)
    told = harness(*finished.args, *changes, "--resume", finished.run.name)
    message = refused(told._replace(err=told.err.splitlines(keepends=True)[-1]))  # below what is said of rejected rows
    assert finished.run.name in message
    for change in (
        "stages.samples.num_samples: was 2, now 3",
        "stages.samples.top_p: was 0.9, now 0.5",
        "seed: was 0, now 4",
        "prompts.number: was 3, now 2",
        "stages.sanity.sampling.samples.top_p: was 0.9, now 0.5",
    ):
        assert change in message
    assert len(re.findall(r": was ", message)) == 6, "those five and the hash of the prompts, and nothing that is equal"


def test_resume_new_measures_it_all_again(finished: Finished, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    args = [root if a == finished.root else a for a in finished.args]
    short = ["--stages", "psem"]
    assert [harness(*args, *short, "--resume", "new").code for _ in range(2)] == [0, 0]
    first, second = run_folders(root)
    assert manifest(first)["fingerprint"] == manifest(second)["fingerprint"]
    sql = "SELECT * FROM psem ORDER BY prompt_id, condition"
    assert query(first, sql) == query(second, sql)


def test_a_failed_item_is_exit_1_and_retry_recovers_once_its_cause_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    root = tmp_path / "runs"
    args = [root if a == finished.root else a for a in finished.args] + ["--stages", "psem,detect"]
    args += ["--batching.max_tokens", "8192"]  # one batch, in which one context is the shortest
    real = psem.score_trees

    def faulty(lm: Any, contexts: Sequence[Sequence[int]], tries: Sequence[Any]) -> list[Any]:
        """The shortest context cannot be scored for now."""
        at = min(range(len(contexts)), key=lambda i: len(contexts[i]))
        return [ItemFailed("a cosmic ray") if i == at else s for i, s in enumerate(real(lm, contexts, tries))]

    monkeypatch.setattr(psem, "score_trees", faulty)
    told = harness(*args)
    assert told.code == 1
    assert "a cosmic ray" in told.err
    assert "--retry-failed" in told.err
    run = only_run(root)
    failed = "SELECT stage, item_key, message FROM events WHERE kind = 'failed_item'"
    ((stage, key, message),) = query(run, failed)
    assert (stage, message) == ("psem", "a cosmic ray")
    assert manifest(run)["num_failed"] == 1
    assert query(run, "SELECT count(*) FROM psem") == [(5,)]

    again = harness(*args)
    assert again.code == 1, "nothing left to do, and still a failed item"
    assert "1 items failed" in again.out
    assert harness(*args, "--retry-failed").code == 1, "the cause is still there"
    shown = harness("show", "latest", "--paths.runs", root)
    assert shown.code == 0
    assert "a cosmic ray" in shown.out
    assert key in shown.out

    monkeypatch.undo()
    told = harness(*args, "--retry-failed")
    assert told.code == 0, told.err
    assert manifest(run)["num_failed"] == 0
    assert query(run, "SELECT num_items, num_done, num_failed FROM stages WHERE stage = 'psem'") == [(6, 6, 0)]
    sql = "SELECT prompt_id, condition, p_sem FROM psem ORDER BY ALL"
    for (*ids, p), (*same, q) in zip(query(run, sql), query(finished.run, sql), strict=True):
        assert ids == same
        assert p == pytest.approx(q, abs=1e-6)  # another batch, so other rounding
    assert harness(*args).code == 0
    assert run_folders(root) == [run]


# Stages


@pytest.mark.parametrize(
    ("asked", "run"),
    [("psem", ["prompts", "psem"]), ("detect", ["prompts", "greedy", "detect"]), ("prompts", ["prompts"]),
     ("detect,select", ["prompts", "psem", "select", "greedy", "detect"])],
)  # fmt: skip
def test_a_subset_of_stages_pulls_in_what_it_needs_and_nothing_else(tmp_path: Path, asked: str, run: list[str]) -> None:
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", asked)
    told = harness(*args)
    assert told.code == 0, told.err
    found = only_run(tmp_path / "runs")
    assert list(manifest(found)["stages"]) == ["vocabulary", *run]
    assert {s for (s,) in query(found, "SELECT stage FROM stages WHERE status = 'done'")} == {"vocabulary", *run}
    assert (query(found, "SELECT count(*) FROM psem")[0][0] > 0) == ("psem" in run)
    assert (query(found, "SELECT count(*) FROM completions")[0][0] > 0) == ("greedy" in run)


def test_single_token_writes_the_kept_rows_and_a_summary_and_filters_later_stages(tmp_path: Path) -> None:
    long = {"prompt_id": "long", "category": "idioms", "question": "Which word is long?", "target": "incomprehensibly"}
    rows = [ROWS[0] | {"target": "water"}, long, ROWS[2]]
    prompts = prompt_file(tmp_path, rows)
    before = prompts.read_bytes()
    args = ("run", "--prompts", prompts, "--paths.runs", tmp_path / "runs",
            "--stages", "single_token,psem,greedy", "--experiment.conditions", "baseline")  # fmt: skip
    told = harness(*args)
    assert told.code == 0, told.err
    run = only_run(tmp_path / "runs")
    known = dict(query(run, "SELECT prompt_id, single_token FROM prompts"))
    kept = {i for i, single in known.items() if single}
    assert known["long"] is False
    assert "milk" in kept, "water is a token of the demo model's: the control"
    for table in ("psem", "completions"):
        assert {i for (i,) in query(run, f"SELECT prompt_id FROM {table}")} == kept
    folder = run / "artifacts" / "single_token"
    for category in ("idioms", "facts"):
        summary = json.loads((folder / f"{category}_summary.json").read_text())
        mine = [r for r in rows if r["category"] == category]
        gone = sorted(r["target"] for r in mine if r["prompt_id"] not in kept)
        assert summary == {
            "category": category, "prompts": len(mine), "kept": len(mine) - len(gone), "removed": gone
        }  # fmt: skip
    back = read_prompts(folder / "idioms_validated.jsonl").prompts
    assert [(p.prompt_id, p.question, p.target, p.alternatives) for p in back] == [
        ("milk", rows[0]["question"], "water", ("water", "wine", "juice"))
    ]
    assert prompts.read_bytes() == before
    assert not list(DATA.glob("*single_token*")), "nothing beside the run"
    assert {p for (p,) in query(run, "SELECT path FROM artifacts WHERE kind = 'prompts'")} == {
        f"single_token/{p.name}" for p in folder.iterdir()
    }
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{c}_{what}" for c in ("facts", "idioms") for what in ("summary.json", "validated.jsonl")
    ]


def test_select_marks_the_admitted_prompts_and_later_stages_measure_only_those(tmp_path: Path) -> None:
    told = harness("run", "--limit", "10", "--paths.runs", tmp_path, "--stages", "select,greedy",
                   "--gravity.select.min_p0", "0.5", "--gravity.conditions", "baseline")  # fmt: skip
    assert told.code == 0, told.err
    run = only_run(tmp_path)
    p0 = dict(query(run, "SELECT prompt_id, p_sem FROM psem"))
    tiers = dict(query(run, "SELECT prompt_id, tier FROM prompts"))
    assert len(p0) == 10
    chosen = {i for i, tier in tiers.items() if tier is not None}
    assert chosen == {i for i, p in p0.items() if p >= 0.5}, "no cap binds on so few"
    assert 0 < len(chosen) < 10
    assert {i for (i,) in query(run, "SELECT prompt_id FROM completions")} == chosen


# The selection against brute force

CANDIDATES = st.lists(
    st.tuples(st.sampled_from(["idioms", "facts", "ood"]), st.sampled_from(["milk", "worm", "sea"]), st.integers(0, 20)),
    max_size=8,
).map(lambda rows: [Candidate(f"p{i}", c, t, p / 20) for i, (c, t, p) in enumerate(rows)])  # fmt: skip


def is_allowed(chosen: Sequence[Candidate], min_p0: float, per_bin: int, max_categories: int) -> bool:
    """The rules of stage `select`, said once more in the plainest way."""
    cells = [(c.category, bin_of(c.p0)) for c in chosen]
    spread = {c.target: {d.category for d in chosen if d.target == c.target} for c in chosen}
    return (
        all(c.p0 >= min_p0 for c in chosen)
        and all(cells.count(cell) <= per_bin for cell in cells)
        and all(len(categories) <= max_categories for categories in spread.values())
    )


def worth(chosen: Sequence[Candidate]) -> tuple[int, float]:
    return len(chosen), round(sum(c.p0 for c in chosen), 6)


@settings(max_examples=60, deadline=None)
@given(CANDIDATES, st.sampled_from([0.0, 0.2, 0.5]), st.integers(1, 3), st.integers(1, 2))
def test_selection_is_as_good_as_the_best_of_all_subsets(
    candidates: list[Candidate], min_p0: float, per_bin: int, max_categories: int
) -> None:
    rules = (min_p0, per_bin, max_categories)
    subsets = itertools.chain.from_iterable(itertools.combinations(candidates, n) for n in range(len(candidates) + 1))
    best = max(worth(s) for s in subsets if is_allowed(s, *rules))
    ids = choose(candidates, *rules)
    chosen = [c for c in candidates if c.prompt_id in ids]
    assert len(set(ids)) == len(ids) == len(chosen)
    assert is_allowed(chosen, *rules)
    assert worth(chosen) == best


def greedily(candidates: Sequence[Candidate], *rules: Any) -> list[Candidate]:
    chosen: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: -c.p0):
        if is_allowed([*chosen, c], *rules):
            chosen.append(c)
    return chosen


def test_taking_the_highest_pressure_first_is_not_the_best_selection() -> None:
    """The control: where a target may stand in one category only, the one of highest P0 can cost two others."""
    candidates = [Candidate("a", "idioms", "milk", 0.9), Candidate("b", "facts", "milk", 0.7),
                  Candidate("c", "facts", "milk", 0.5)]  # fmt: skip
    assert [c.prompt_id for c in greedily(candidates, 0.2, 1, 1)] == ["a"]
    assert choose(candidates, 0.2, 1, 1) == ["b", "c"]


def test_selection_does_not_depend_on_the_order_of_the_candidates() -> None:
    candidates = [Candidate(f"p{i}", "idioms", "milk", 0.5) for i in range(5)]
    assert choose(candidates, 0.2, 2, 1) == choose(candidates[::-1], 0.2, 2, 1)


# Conditions of one's own


def test_conditions_of_ones_own_flow_through_every_table(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    tables = {"kind_ban": {"text": BAN}, "reframe": {"text": REFRAME, "negation": "but"}}
    config.write_text("".join(
        f"[gravity.conditions.{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
        for name, table in tables.items()
    ))  # fmt: skip
    root = tmp_path / "runs"
    prompt_file(tmp_path)
    typed = ("run", "--config", config, "--prompts", tmp_path / "prompts.jsonl", "--paths.runs", root)
    few = ("--gravity.num_samples", 2, "--gravity.sanity.num_prompts", 1)
    told = harness(*typed, *few)
    assert told.code == 0, told.err
    run = only_run(root)
    everyone = {"baseline", "negative", "kind_ban", "reframe"}
    for table in ("contexts", "psem", "completions", "detections", "violation"):
        assert {c for (c,) in query(run, f"SELECT DISTINCT condition FROM {table}")} == everyone
        assert query(run, f"SELECT count(DISTINCT prompt_id) FROM {table}") == [(3,)]
    for view in ("suppression", "outcomes"):
        assert {c for (c,) in query(run, f"SELECT DISTINCT condition FROM {view}")} == everyone - {"baseline"}
    assert all(re.search(rf"│ {name} ", told.out) for name in everyone)
    spans = dict(query(run, "SELECT condition, spans FROM contexts WHERE prompt_id = 'milk'"))
    assert spans["kind_ban"]["mention"] is None
    assert spans["kind_ban"]["negation"] is not None
    assert spans["reframe"]["mention"] is not None
    assert spans["reframe"]["negation"] is not None
    assert spans["baseline"]["negation"] is None
    (text,) = query(run, "SELECT text FROM contexts WHERE prompt_id = 'milk' AND condition = 'kind_ban'")[0]
    assert text == BAN.format(category="idioms", question=ROWS[0]["question"])
    assert "finished already" in harness(*typed, *few).out


# As a process


def shell(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(DATA.parent)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, env=env, **kwargs)


def test_a_refusal_is_the_process_exit_code_and_one_line(tmp_path: Path) -> None:
    done = shell(
        "-m", "harness", "run", "--prompts", str(tmp_path / "none.jsonl"), "--paths.runs", str(tmp_path / "runs")
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"harness: .*none.jsonl.*\n", done.stderr)


def test_listing_runs_needs_no_torch(finished: Finished) -> None:
    code = (
        "import sys; from harness.cli import main; "
        f"code = main(['runs', '--paths.runs', {str(finished.root)!r}]); print('torch' in sys.modules, code)"
    )
    done = shell("-c", code)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
    assert finished.run.name in done.stdout


def test_a_reader_that_goes_away_is_no_error(finished: Finished) -> None:
    """`harness show latest | head -1`"""
    command = f"{sys.executable} -m harness show latest --paths.runs {finished.root} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=DATA.parent, check=True
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "0"


# What is inside, and the report


def test_every_table_of_the_mechanism_is_filled_and_no_probability_leaves_its_range(finished: Finished) -> None:
    for table in ("attention", "lens", "decomposition", "activations", "patching", "artifacts", "statistics", "sanity"):
        assert query(finished.run, f"SELECT count(*) FROM {table}")[0][0] > 0, table
    layers = query(finished.run, "SELECT count(DISTINCT layer) FROM lens")[0][0]
    assert query(finished.run, "SELECT count(*) FROM lens")[0][0] == 3 * 2 * 2 * layers
    for column in ("lens.p_target", "lens.p_emitted", "decomposition.p_attn", "patching.p_sem_patched"):
        table, name = column.split(".")
        low, high = query(finished.run, f"SELECT min({name}), max({name}) FROM {table}")[0]
        assert 0 <= low <= high <= 1 + 1e-6, column


def test_the_last_layers_lens_is_the_mass_of_the_first_tokens_and_baseline_has_no_ban_to_attend_to(
    finished: Finished,
) -> None:
    """Every target of these rows is one token or more, so the lens' mass bounds P_sem from above."""
    rows = query(finished.run, """
        SELECT l.p_target, p.p_sem FROM lens l JOIN psem p USING (prompt_id, condition)
        WHERE l.step_kind = 'first' AND l.layer = (SELECT max(layer) FROM lens)""")  # fmt: skip
    assert len(rows) == 6
    assert all(p_target >= p_sem - 1e-5 for p_target, p_sem in rows)
    found = query(
        finished.run,
        "SELECT condition, bool_and(nf IS NULL), bool_and(tmf IS NULL) FROM attention GROUP BY 1 ORDER BY 1",
    )
    assert found == [("baseline", True, True), ("negative", False, False)]


def test_every_text_can_be_read_from_its_token_ids_without_the_tokenizer(finished: Finished) -> None:
    texts = dict(query(finished.run, "SELECT token_id, CASE WHEN is_special THEN '' ELSE text END FROM vocabulary"))
    completions = query(finished.run, "SELECT token_ids, text FROM completions")
    assert completions
    assert all("".join(texts[t] for t in token_ids) == text for token_ids, text in completions)
    for token_ids, text, offsets in query(finished.run, "SELECT token_ids, text, offsets FROM contexts"):
        assert [text[a:b] for a, b in offsets] == [texts[t] for t in token_ids]
    assert query(finished.run, "SELECT count(*) FROM vocabulary WHERE is_special AND text <> ''")[0][0] > 0


def test_files_of_the_run_are_what_their_rows_say(finished: Finished) -> None:
    rows = query(finished.run, "SELECT path, sha256, bytes, kind FROM artifacts")
    assert {kind for *_, kind in rows} == {"attention", "resid"}
    for path, sha256, size, _ in rows:
        content = (finished.run / "artifacts" / path).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, size)


def test_a_report_is_one_page_with_all_figures_beside_it(finished: Finished, tmp_path: Path) -> None:
    told = harness("report", finished.run.name, "--paths.runs", finished.root, "--to", tmp_path / "out")
    assert told.code == 0, told.err
    assert str(tmp_path / "out") in told.out
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Planted" in page
    names = {p.stem for p in (tmp_path / "out" / "figures").glob("*.svg")}
    assert len(names) == 8
    assert names == {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")}


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    refused(harness("report", "latest", "--paths.runs", tmp_path))


# Settings files that are shipped


def test_the_papers_settings_are_the_papers(tmp_path: Path) -> None:
    resolved = resolve({}, DATA / "settings" / "paper.toml", {})
    assert resolved.settings.model.name == "Qwen/Qwen2.5-7B-Instruct"
    e = own(resolved)
    assert (e.num_samples, e.temperature, e.top_p, e.max_new_tokens_greedy, e.max_new_tokens_samples) == (
        16,
        1,
        0.9,
        8,
        10,
    )
    assert (e.stop_at_newline, e.chat, e.patching.min_p0, e.patching.condition) == (False, False, None, "negative")


@pytest.mark.thorough
def test_the_shipped_phrasings_run_and_are_compared_with_the_ban(tmp_path: Path) -> None:
    told = harness("run", "--config", DATA / "settings" / "phrasings.toml", "--limit", 8, "--gravity.num_samples", 2,
                   "--gravity.sanity.num_prompts", 1, "--paths.runs", tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    run = only_run(tmp_path)
    compared = "SELECT DISTINCT condition, measured FROM statistics WHERE analysis = 'phrasing' ORDER BY ALL"
    assert query(run, compared) == [("category_ban", "negative"), ("reframing", "negative")]
    # Neither names the word, and the reframing forbids nothing.
    have = ", ".join(f"bool_or(spans.{span} IS NOT NULL)" for span in ("mention", "negation"))
    spans = f"SELECT condition, {have} FROM contexts GROUP BY 1 ORDER BY 1"
    assert query(run, spans) == [
        ("baseline", False, False), ("category_ban", False, True), ("negative", True, True), ("reframing", False, False),
    ]  # fmt: skip


def test_a_condition_to_patch_that_is_not_run_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    message = refused(harness("run", "--gravity.patching.condition", "negativ", "--paths.runs", tmp_path))
    assert "did you mean 'negative'?" in message
    refused(harness("run", "--gravity.patching.condition", "baseline", "--paths.runs", tmp_path))


def test_without_the_condition_to_patch_nothing_is_patched_and_nothing_fails(tmp_path: Path) -> None:
    told = harness("run", "--gravity.conditions", "baseline", "--limit", 4, "--gravity.num_samples", 2,
                   "--paths.runs", tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    assert query(only_run(tmp_path), "SELECT count(*) FROM patching") == [(0,)]


# A signal before there is anything to lose


@pytest.mark.parametrize(
    ("command", "where"),
    [("run", "launch.prepare"), ("doctor", "doctor.examine"), ("sanity", "sanity.command")],
)
def test_a_signal_before_the_work_begins_ends_any_command_with_exit_3_and_no_traceback(
    tmp_path: Path, command: str, where: str
) -> None:
    module, name = where.split(".")
    code = (
        "import sys, time\nfrom harness.cli import main\n"
        f"from harness.commands import {module}\n"
        "def hang(*args, **kwargs):\n    print('begun', flush=True)\n    time.sleep(600)\n"
        f"{module}.{name} = hang\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    args = [command, "--paths.runs", str(tmp_path / "runs")]
    with subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=DATA.parent
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert err.splitlines()[-1] == "harness: stopped; nothing is lost, type the same command again"
    assert "Traceback" not in err + out
    assert not (tmp_path / "runs").exists()
