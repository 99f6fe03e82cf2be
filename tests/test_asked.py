"""A finished run typed again: recognised without torch, and only where nothing that decides its results has changed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness import environment
from harness.commands import asked, launch
from harness.experiments import registry
from harness.run import RunPaths
from tests.cases import some_of
from tests.commands import DATA, ROWS, harness, manifest, only_run, prompt_file, run_folders
from tests.gravity import resolve

LOADED = """
import sys
from harness.cli import main
code = main(sys.argv[1:])
print(sorted({"torch", "transformers"} & {*sys.modules}), code)
"""


class Typed(NamedTuple):
    """A command that made a run, and what it named."""

    args: tuple[object, ...]
    root: Path
    prompts: Path
    model: Path

    def asked(self) -> str | None:
        flags = {"model.name": str(self.model), "data.prompts": str(self.prompts), "gravity.stages": "prompts,psem"}
        flags["paths.runs"] = str(self.root)
        return asked.hash_of(resolve(flags, environ={}), registry.get("gravity"))


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    root, model = tmp_path / "runs", tmp_path / "model"
    shutil.copytree(DATA / "models" / "demo", model)
    prompts = prompt_file(tmp_path)
    args = ("run", "--model", model, "--prompts", prompts, "--stages", "prompts,psem", "--paths.runs", root)
    told = harness(*args)
    assert told.code == 0, told.err
    return Typed(args, root, prompts, model)


def never(*_: object) -> Any:
    raise AssertionError("asked in full")


def test_a_finished_run_typed_again_loads_no_torch_and_says_what_the_long_way_says(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", LOADED, *map(str, typed.args)]
    environ = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    told = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    *said, loaded = told.stdout.splitlines()
    assert loaded == "[] 0", told.stderr
    monkeypatch.setattr(asked, "hash_of", lambda *_: None)
    in_full = harness(*typed.args)
    assert in_full.code == 0
    assert said == in_full.out.splitlines()
    assert "is finished already" in said[-1]
    assert len(run_folders(typed.root)) == 1


def test_the_long_way_is_not_taken(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "prepare", never)
    assert harness(*typed.args).code == 0
    for more in (("--limit", "2"), ("--resume", "new"), ("--retry-failed",), ("--dry-run",)):
        with pytest.raises(AssertionError, match="asked in full"):
            harness(*typed.args, *more)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _older(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 1_000_000))


CHANGES: dict[str, Callable[[Typed, pytest.MonkeyPatch], object]] = {
    "the prompts": lambda t, _: _longer(t.prompts),
    "the prompts' time": lambda t, _: _older(t.prompts),
    "the model's weights": lambda t, _: _older(t.model / "model.safetensors"),
    "one more file of the model": lambda t, _: (t.model / "chat_template.jinja").write_text("{{ messages }}"),
    "the code": lambda _, m: m.setattr(environment, "source_sha256", lambda *_: "0" * 64),
    "a package": lambda _, m: m.setattr(environment, "packages", lambda: {"tokenizers": "0.0.1"}),
    "a GPU that is hidden": lambda _, m: m.setenv("CUDA_VISIBLE_DEVICES", "7"),
    "a Python": lambda _, m: m.setattr(sys, "version", "3.99.0"),
}  # fmt: skip


@pytest.mark.parametrize("change", some_of(CHANGES, 3))
def test_whatever_may_decide_a_result_asks_in_full(typed: Typed, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = typed.asked()
    assert before is not None
    assert before == manifest(only_run(typed.root))["asked_sha256"] == typed.asked(), "the control"
    CHANGES[change](typed, monkeypatch)
    assert typed.asked() != before
    monkeypatch.setattr(launch, "prepare", never)
    with pytest.raises(AssertionError, match="asked in full"):
        harness(*typed.args)


def test_other_prompts_in_the_same_file_are_another_run(typed: Typed) -> None:
    prompt_file(typed.prompts.parent, ROWS[:2])
    assert harness(*typed.args).code == 0
    assert len(run_folders(typed.root)) == 2


@pytest.mark.parametrize(
    ("flags", "is_known"),
    [({}, True), ({"model.name": "random:llama-tiny"}, True), ({"model.name": "someone/some-model"}, False)],
)
def test_what_lies_elsewhere_is_asked_for_in_full(flags: dict[str, str], is_known: bool) -> None:
    found = asked.hash_of(resolve(flags, environ={}), registry.get("gravity"))
    assert (found is not None) is is_known


def test_a_folder_of_very_many_files_is_no_short_cut(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed.asked() is not None
    monkeypatch.setattr(asked, "_MOST_FILES", 3)
    assert typed.asked() is None


def _change(run: Path, **values: Any) -> None:
    path = RunPaths(run).manifest
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"status": "interrupted"},
        {"status": "failed"},
        {"parent": "another"},
        {"asked_sha256": None},
        {"asked_sha256": 7},
    ],
)
def test_a_run_that_is_not_finished_or_repeats_another_is_not_the_one(typed: Typed, values: dict[str, Any]) -> None:
    told = typed.asked()
    assert told is not None
    run = only_run(typed.root)
    assert asked.finished_run(typed.root, told) == RunPaths(run), "the control"
    _change(run, **values)
    assert asked.finished_run(typed.root, told) is None


def test_an_unfinished_run_of_the_same_fingerprint_is_gone_on_with_first(typed: Typed) -> None:
    told = typed.asked()
    assert told is not None
    run = only_run(typed.root)
    other = run.with_name(f"{run.name}-x")
    shutil.copytree(run, other)
    assert asked.finished_run(typed.root, told) is not None
    _change(other, status="interrupted", asked_sha256="of other code")
    assert asked.finished_run(typed.root, told) is None


def test_a_run_with_a_failed_item_ends_with_1_again(typed: Typed) -> None:
    run = only_run(typed.root)
    _change(run, num_failed=2)
    told = harness(*typed.args)
    assert told.code == 1
    assert "2 items failed; `harness run --retry-failed` tries just those." in told.out
