"""A run's folder comes from a stranger: nothing in it runs, nothing outside of it is read, written or shown."""

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from safetensors.numpy import save_file

from app.queries.gravity import attention
from harness.commands import given
from harness.errors import HarnessError, RunError
from harness.experiments.gravity.schema import SCHEMA
from harness.files import open_inside
from harness.run import RunPaths, read_manifest
from harness.run.tensors import HEADER_BYTES, open_tensors
from harness.store import AlteredStore, Reader, Store, seal
from tests.cases import some_of
from tests.commands import ROWS, Told, harness, only_run, prompt_file, refused
from tests.test_verify import change, copied, failures, hashes, sealed_anew
from tests.tiny import build_model, byte_tokenizer

SECRET = "the-secret-of-this-machine"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that brings Python of its own, which leaves a file named `ran` beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model("tiny-llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def armed(checkpoint: Path, to: Path) -> Path:
    folder = Path(shutil.copytree(checkpoint, to))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "armed", "auto_map": {"AutoConfig": "armed.Config", "AutoModelForCausalLM": "armed.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "armed.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'armed'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A run of a model folder and a prompt file of its own. Tests change a copy."""
    folder = tmp_path_factory.mktemp("made")
    told = harness("run", "--model", checkpoint, "--prompts", prompt_file(folder), "--paths.runs", folder / "runs",
                   "--stages", "psem,mechanism", "--gravity.stored.prompts", "milk")  # fmt: skip
    assert told.code == 0, told.err
    return folder / "runs"


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return copied(only_run(runs), tmp_path / "runs")


def edited(run: Path, **settings: Any) -> None:
    """The manifest with other settings, and a seal that fits it."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in settings.items():
        manifest["settings"][name.replace("__", ".")] = {"value": value, "source": "default"}
    path.write_text(json.dumps(manifest))
    sealed_anew(run)


def again(command: str, run: Path, *more: object) -> Told:
    return harness(command, run.name, "--paths.runs", run.parent, *more)


# -- trust, and what is recorded of this machine


@pytest.mark.parametrize("command", ["verify", "reproduce"])
def test_a_manifest_cannot_make_a_command_run_the_python_of_a_model(run: Path, checkpoint: Path, command: str) -> None:
    folder = armed(checkpoint, run / "model")
    edited(run, model__name=str(folder), model__trust_remote_code=True)
    told = again(command, run)
    assert not (folder / "ran").exists()
    assert "--model" in told.out + told.err
    assert told.code == {"verify": 0, "reproduce": 2}[command]
    told = again(command, run, "--model", folder)  # named, and still not trusted
    assert not (folder / "ran").exists()
    assert "Traceback" not in told.err


def test_trust_given_on_the_command_line_by_name_is_said_and_does_run_it(checkpoint: Path, tmp_path: Path) -> None:
    """The control of the test above: the folder's Python is one that runs."""
    folder = armed(checkpoint, tmp_path / "model")
    told = harness("run", "--model", folder, "--model.trust_remote_code", "true", "--stages", "psem", "--prompts",
                   prompt_file(tmp_path), "--paths.runs", tmp_path / "runs")  # fmt: skip
    assert (folder / "ran").exists()
    assert "its own Python may run here: trusted on this command line" in told.err


def test_trust_from_a_settings_file_or_a_variable_or_without_a_name_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = armed(checkpoint, tmp_path / "model")
    file = tmp_path / "settings.toml"
    file.write_text(f"[model]\ntrust_remote_code = true\nname = {json.dumps(str(folder))}\n")
    rule = "trust is given on the command line, to a model that is named there"
    assert rule in refused(harness("run", "--config", file, "--paths.runs", tmp_path / "runs"))
    file.write_text(f"[model]\nname = {json.dumps(str(folder))}\n")
    found = refused(harness("run", "--config", file, "--model.trust_remote_code", "true"))
    assert rule in found
    assert "expected --model beside it" in found
    monkeypatch.setenv("HARNESS_MODEL__TRUST_REMOTE_CODE", "true")
    assert rule in refused(harness("run", "--model", folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("setting", ["model__name", "data__prompts"])
def test_a_path_that_this_user_did_not_give_is_not_opened_but_asked_for(
    run: Path, tmp_path: Path, setting: str
) -> None:
    """A pipe in its place would be waited for, if it were opened."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    edited(run, **{setting: str(pipe)})
    flag = given.FLAGS[setting.replace("__", ".")]
    line = refused(again("reproduce", run))
    assert "no path that a run's folder names is opened; say where it is with" in line
    told = again("verify", run)
    assert told.code == 0
    assert f"{flag} PATH" in told.out


def test_a_run_made_by_this_user_is_measured_again_without_naming_its_paths_and_elsewhere_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = again("verify", run)
    assert told.code == 0
    assert "ok   again psem" in told.out
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody else"))
    told = again("verify", run)
    assert "ok   again psem" not in told.out
    assert "say where it is with --model PATH" in told.out
    manifest = read_manifest(RunPaths(run))
    paths = {name: manifest.settings[name].value for name in ("model.name", "data.prompts")}
    told = again("verify", run, "--model", paths["model.name"], "--prompts", paths["data.prompts"])
    assert "ok   again psem" in told.out


def test_the_key_that_tells_own_runs_is_this_users_alone_and_a_mark_holds_for_its_paths_only(tmp_path: Path) -> None:
    paths = {"model.name": "/models/a", "data.prompts": "/b.csv"}
    mark = given.mark(paths, tmp_path)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert given.is_own(paths, mark, tmp_path)
    assert not given.is_own({**paths, "model.name": "/models/other"}, mark, tmp_path)
    for wrong in (None, 3, "", "é", mark[:-1] if mark else ""):
        assert not given.is_own(paths, wrong, tmp_path)
    assert given.mark({"model.name": "demo", "data.prompts": "bundled"}, tmp_path) is None
    assert given.recorded_paths({"model.name": "Qwen/Qwen2.5-7B-Instruct", "data.prompts": "bundled"}) == {}
    assert given.recorded_paths({"model.name": "random:qwen2.5-7b"}) == {}
    assert given.recorded_paths({"model.name": "../x"}) == {"model.name": "../x"}


def test_a_recorded_number_of_threads_is_no_more_than_this_machine_has(run: Path) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 100_000, "device": "cpu"}))
    sealed_anew(run)
    assert again("verify", run).code == 0


# -- stores

READERS = ("show", "report", "export", "diff", "verify", "reproduce")


def ask(command: str, run: Path, to: Path) -> tuple[Told, str]:
    """A command that reads a run, and all that it printed or wrote."""
    more = {
        "export": ["--to", to, "--format", "csv"],
        "report": ["--to", to],
        "diff": [run.name],
        "verify": ["--batches", 0],
    }
    told = again(command, run, *more.get(command, []))
    written = b"".join(p.read_bytes() for p in to.rglob("*") if p.is_file()) if to.exists() else b""
    return told, told.out + told.err + written.decode("utf-8", "replace")


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("file", ["results.duckdb", "live.duckdb"])
def test_a_view_that_reads_a_file_of_the_user_is_not_asked(run: Path, tmp_path: Path, command: str, file: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    planted = f"CREATE OR REPLACE VIEW violation AS SELECT content AS prompt_id, content AS condition, 1 AS num_samples, " \
              f"1 AS num_violations, 1.0 AS rate FROM read_text('{secret}')"  # fmt: skip
    for name in ("results.duckdb", "live.duckdb") if file == "results.duckdb" else ("live.duckdb",):
        change(run / name, planted)
    with duckdb.connect(str(run / file), read_only=True) as con:  # the control: as it stands the view gives it away
        assert SECRET in str(con.execute("SELECT * FROM violation").fetchall())
    told, everything = ask(command, run, tmp_path / "out")
    assert SECRET not in everything
    assert told.code == (1 if command == "verify" else 2), told
    assert "view violation is defined otherwise" in everything
    assert "Traceback" not in everything


PLANTED = {
    "a scalar macro": ("CREATE MACRO sha256(x) AS 'evil'", "macro sha256 is not of this schema"),
    "a table macro": ("CREATE MACRO duckdb_tables() AS TABLE SELECT 'evil' AS sql", "macro duckdb_tables is not of this schema"),
    "an aggregate's name": ("CREATE MACRO count(x) AS 7", "macro count is not of this schema"),
    "a view with a system name": ("CREATE VIEW sqlite_master AS SELECT 1", "view sqlite_master"),
    "a table": ("CREATE TABLE more (a INTEGER)", "table more is not of this schema"),
    "a schema": ("CREATE SCHEMA other", "schema other.other is not of this schema"),
    "a type": ("CREATE TYPE mood AS ENUM ('a')", "type mood is not of this schema"),
    "a sequence": ("CREATE SEQUENCE more", "sequence more is not of this schema"),
    "an index": ("CREATE INDEX more ON prompts (category)", "index more is not of this schema"),
    "a trigger": ("CREATE TRIGGER more AFTER INSERT ON events FOR EACH STATEMENT INSERT INTO psem (prompt_id, condition) "
                  "VALUES ('x', 'y')", "trigger more is not of this schema"),
    "a default": ("ALTER TABLE prompts ALTER category SET DEFAULT 'evil'", "table prompts is defined otherwise"),
    "a table instead of a view": ("DROP VIEW violation; CREATE TABLE violation (a INTEGER)", "table violation is not of"),
    "a view instead of a table": ("DROP TABLE migrations; CREATE VIEW migrations AS SELECT 'gravity' AS experiment, 8 AS number",
                                  "view migrations is not of this schema"),
    "another version's number": ("DELETE FROM migrations WHERE experiment = 'gravity' AND number > 3", "migrations records 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_store_with_anything_planted_in_it_is_refused_by_the_name_of_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / "results.duckdb"
    Store(path, SCHEMA).close()
    with Reader(path, SCHEMA) as reader:  # the control
        assert reader.query("SELECT count(*) AS n FROM violation") == [{"n": 0}]
    sql, told = PLANTED[what]
    change(path, *sql.split("; "))
    for opened in (Reader, Store):
        with pytest.raises(AlteredStore, match=told):
            opened(path, SCHEMA)


def test_a_reader_sees_no_file_no_network_and_no_other_setting(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text(SECRET)
    path = tmp_path / "results.duckdb"
    with Store(path, SCHEMA) as store:
        store.publish(tmp_path / "live.duckdb")
    with Reader(tmp_path / "live.duckdb", SCHEMA) as reader:
        for sql in (
            f"SELECT * FROM read_text('{tmp_path}/secret.txt')",
            f"ATTACH '{path}' AS other",
            f"COPY prompts TO '{tmp_path}/out.csv'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            f"WITH x AS (COPY (SELECT 1) TO '{tmp_path}/live.duckdb') SELECT 1",
            "SET temp_directory = '/tmp'",
        ):
            with pytest.raises(HarnessError):
                reader.query(sql)


def test_the_writer_of_a_run_does_not_write_through_a_link(tmp_path: Path) -> None:
    with Store(tmp_path / "other.duckdb", SCHEMA) as store:
        store.event("info", "note", "of another run")
    (tmp_path / "results.duckdb").symlink_to(tmp_path / "other.duckdb")
    before = (tmp_path / "other.duckdb").read_bytes()
    with pytest.raises(HarnessError, match="found a link"):
        Store(tmp_path / "results.duckdb", SCHEMA)
    with pytest.raises(HarnessError, match="found a link"):
        Reader(tmp_path / "results.duckdb", SCHEMA)
    assert (tmp_path / "other.duckdb").read_bytes() == before


# -- files and names


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name is at most about 100 characters long
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def in_a_linked_folder(path: Path) -> None:
    shutil.move(path.parent, path.parent.with_name("elsewhere"))
    path.parent.symlink_to(path.parent.with_name("elsewhere"))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": socket_at,
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("what", [*SPECIAL, "a link where a folder should be"])
def test_an_artifact_that_is_no_regular_file_in_the_run_is_named_and_not_opened(run: Path, what: str) -> None:
    path = next((run / "artifacts" / "attention").iterdir())
    if what in SPECIAL:
        path.unlink()
        SPECIAL[what](path)
        told = f"expected a regular file, found {what}"
    else:
        in_a_linked_folder(path)
        told = "found a link or file where a folder should be"
    found = failures(again("verify", run, "--batches", 0))
    assert [line for line in found if line.startswith("files artifacts/attention/") and told in line], found
    with pytest.raises(HarnessError, match="cannot be read"):
        attention.head_rows(RunPaths(run), "milk", "negative", "first", 0)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../manifest.json", "attention/../../manifest.json", "a\0b", "", "."]
)
def test_an_artifact_whose_row_leads_out_of_the_run_is_not_opened(run: Path, name: str) -> None:
    with pytest.raises(RunError):
        open_tensors(run / "artifacts", name).__enter__()
    if name and "\0" not in name:
        change(
            run / "results.duckdb",
            f"UPDATE artifacts SET path = '{name}' WHERE kind = 'attention' AND condition = 'negative'",
        )
        found = failures(again("verify", run, "--batches", 0))
        assert [line for line in found if line.startswith("files ") and "cannot be read" in line], found


def test_a_regular_file_in_the_run_is_opened(run: Path) -> None:
    """The control of the tests above."""
    name = next((run / "artifacts" / "attention").iterdir()).name
    with open_inside(run / "artifacts", f"attention/{name}") as file:
        assert file.read(8)
    assert attention.head_rows(RunPaths(run), "milk", "negative", "first", 0) is not None


def test_a_header_of_a_tensor_file_that_is_too_long_is_not_parsed(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "fine.safetensors")
    with open_tensors(tmp_path, "fine.safetensors") as file:
        assert file.get_tensor("x").tolist() == [0, 0, 0]
    for length, rest in ((2**63, b""), (HEADER_BYTES + 1, b" " * (HEADER_BYTES + 1)), (4, b"[1]\n"), (9, b'{"a":')):
        (tmp_path / "bad.safetensors").write_bytes(length.to_bytes(8, "little") + rest)
        with pytest.raises(RunError, match=r"bad\.safetensors: cannot be read"):
            open_tensors(tmp_path, "bad.safetensors").__enter__()


@pytest.mark.parametrize(
    "name", some_of(["run.lock", "results.duckdb.wal", "logs/run.log", "artifacts/attention/x.safetensors"], 1)
)
def test_a_link_in_a_run_is_never_written_through(run: Path, tmp_path: Path, name: str) -> None:
    """`harness show` once emptied what `run.lock` pointed to."""
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "failed"}))
    for command in ("show", "runs", "verify", "report"):
        harness(command, *([run.name] if command != "runs" else []), "--paths.runs", run.parent)
    paths = {k: manifest["settings"][k]["value"] for k in ("model.name", "data.prompts")}
    line = refused(harness("run", "--model", paths["model.name"], "--prompts", paths["data.prompts"], "--paths.runs", run.parent,
                           "--stages", "psem,mechanism", "--gravity.stored.prompts", "milk"))  # fmt: skip
    assert "found a link" in line
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("name", ["manifest.json", "seal.json", "live.duckdb", "results.duckdb"])
def test_a_pipe_or_device_in_place_of_a_file_is_refused_and_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    for command in ("runs", "show", "verify"):
        told = harness(command, *([run.name] if command != "runs" else []), "--paths.runs", run.parent)
        assert told.code in (0, 1, 2)
        assert "Traceback" not in told.err


def test_readers_write_nothing_into_a_run_that_was_killed(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    seal.remove(RunPaths(run))
    with Store(run / "results.duckdb", SCHEMA) as store:
        store.event("info", "note", "newer than the snapshot")
    before = hashes(run)
    for command in ("show", "verify", "runs", "diff"):
        told, _ = ask(command, run, run.parent / "out")
        assert told.code in (0, 2)
    told, written = ask("export", run, run.parent / "out")
    assert told.code == 0
    assert "newer than the snapshot" in written
    assert hashes(run) == before


# -- what is shown

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e<script>[red]"


def test_control_characters_of_a_run_reach_no_terminal(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"argv": ["harness", HOSTILE], "reason": HOSTILE, "status": "failed"}
    manifest["model"]["name"] = HOSTILE
    (run / "manifest.json").write_text(json.dumps(manifest))
    with Store(run / "results.duckdb", SCHEMA) as store:
        store.event("warning", "note", HOSTILE)
        store.publish(run / "live.duckdb")
    for command in (["runs"], ["show", run.name], ["diff", run.name, run.name], ["verify", run.name, "--batches", 0]):
        told = harness(*command, "--paths.runs", run.parent)
        shown = told.out + told.err
        assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e"], (
            command
        )
    assert "\\x1b]0;owned" in harness("show", run.name, "--paths.runs", run.parent).out
    line = refused(harness("show", HOSTILE, "--paths.runs", run.parent))
    assert "\x1b" not in line


def test_cells_that_would_be_formulas_are_defused_on_wish_and_said(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "question": f"=1+1, {ROWS[0]['question']}", "source": "@me"}, ROWS[1]]
    told = harness(
        "run", "--prompts", prompt_file(tmp_path, rows), "--paths.runs", tmp_path / "runs", "--stages", "psem"
    )
    assert told.code == 0, told.err
    found = {}
    for name, more in (("plain", []), ("safe", ["--safe"])):
        told = harness(
            "export", "latest", "--to", tmp_path / name, "--format", "csv", "--paths.runs", tmp_path / "runs", *more
        )
        assert told.code == 0
        found[name] = (tmp_path / name / "prompts.csv").read_text()
    assert "'=1+1" not in found["plain"]
    assert "=1+1" in found["plain"]
    assert "\"'=1+1" in found["safe"]
    assert '"\'@me"' in found["safe"]
    assert '"worm"' in found["safe"]
    assert "cells that a spreadsheet would take for formulas begin with an apostrophe now" in told.out
    line = refused(harness("export", "latest", "--to", tmp_path / "x", "--safe", "--paths.runs", tmp_path / "runs"))
    assert "expected --format csv, found parquet" in line
