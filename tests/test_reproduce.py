"""`harness reproduce`: the same bits from a manifest, a refusal that names what is not as it was, going on after a stop."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pytest

from harness import environment
from harness.engine.executors import ItemResult
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.stages import psem
from harness.store import Reader
from tests.cases import some_of
from tests.commands import (
    DATA,
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

STAGES = "psem,samples,detect"


class Recorded(NamedTuple):
    """A finished run in small batches, with a model folder and a prompt file of its own."""

    folder: Path
    run: Path
    args: tuple[object, ...]

    @property
    def root(self) -> Path:
        return self.run.parent

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Tests read it, and copy it where they change it."""
    folder = tmp_path_factory.mktemp("recorded")
    model = shutil.copytree(DATA / "models" / "demo", folder / "model")
    args = ("run", "--prompts", prompt_file(folder), "--model", model, "--paths.runs", folder / "runs", "--stages", STAGES,
            "--gravity.num_samples", 2, "--batching.max_tokens", 64, "--runtime.seed", 7)  # fmt: skip
    told = harness(*args)
    assert told.code == 0, told.err
    return Recorded(folder, only_run(folder / "runs"), args)


def reproduce(wanted: object, root: Path, *more: object) -> Told:
    return harness("reproduce", wanted, "--paths.runs", root, *more)


def new_run(root: Path, *old: Path) -> Path:
    (found,) = set(run_folders(root)) - set(old)
    return found


def copied(recorded: Recorded, to: Path) -> Path:
    return Path(shutil.copytree(recorded.run, to / "runs" / recorded.run.name))


def edited(run: Path, **changes: Any) -> Path:
    (run / "manifest.json").write_text(json.dumps(manifest(run) | changes))
    return run


def rows(run: Path) -> dict[str, Any]:
    """Every measured table, of the store itself and not of its snapshot."""
    with Reader(run / "results.duckdb", SCHEMA) as reader:
        return {name: reader.table(name) for name in SCHEMA.measured}


def sizes(run: Path) -> dict[str, list[int]]:
    return {name: stage["sizes"] for name, stage in manifest(run)["stages"].items()}


# The same bits


@pytest.fixture(scope="module")
def again(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A reproduction where batches would be cut otherwise now, and what it said."""
    root = tmp_path_factory.mktemp("again")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        told = reproduce(recorded.run / "manifest.json", root, "--batching.max_tokens", "auto")
    assert told.code == 0, told.err
    return only_run(root), told


def test_every_row_of_every_table_comes_out_again_in_the_recorded_batches(
    recorded: Recorded, again: tuple[Path, Told], tmp_path: Path
) -> None:
    run, told = again
    assert rows(run) == rows(recorded.run)
    assert manifest(run)["table_sha256"] == manifest(recorded.run)["table_sha256"]
    assert manifest(run)["fingerprint"] == manifest(recorded.run)["fingerprint"]
    assert "the bits must be the same" in told.out
    assert told.out.endswith("Reproduced: bit for bit the same results.\n")
    assert sizes(run) == sizes(recorded.run)
    plan = "SELECT stage, batch_id, keys FROM batches ORDER BY 1, 2"
    assert query(run, plan) == query(recorded.run, plan)
    other = harness(*recorded.args, "--paths.runs", tmp_path, "--batching.max_tokens", "auto")
    assert other.code == 0
    assert sizes(only_run(tmp_path))["psem"] != sizes(recorded.run)["psem"], "the control: here they are cut otherwise"


def test_the_new_manifest_says_what_it_repeats_and_where_each_setting_came_from(
    recorded: Recorded, again: tuple[Path, Told]
) -> None:
    found = manifest(again[0])
    assert found["parent"] == recorded.run.name
    assert manifest(recorded.run)["parent"] is None
    assert found["accepted_differences"] == []
    assert found["argv"][:2] == ["harness", "reproduce"]
    told = f"run: run {recorded.run.name}"
    assert found["settings"]["runtime.seed"] == {"value": 7, "source": told}
    assert found["settings"]["gravity.num_samples"] == {"value": 2, "source": told}
    assert found["settings"]["batching.max_tokens"] == {"value": "auto", "source": "flag: --batching.max_tokens"}
    assert found["settings"]["paths.runs"] == {"value": str(again[0].parent), "source": "flag: --paths.runs"}
    assert found["settings"]["paths.data"]["source"] == "default"
    assert found["settings"]["runtime.threads"] == {"value": manifest(recorded.run)["threads"], "source": told}
    assert {name: s["value"] for name, s in found["settings"].items() if s["source"] == told} | {
        "runtime.threads": None
    } == {
        name: s["value"]
        for name, s in manifest(recorded.run)["settings"].items()
        if not name.startswith("paths.") and name != "batching.max_tokens" and not name.endswith(".trust_remote_code")
    }
    assert not [p for p in again[0].rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_variable_wins_over_what_was_recorded_and_a_flag_over_both(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_RUNTIME__RESERVE_DISK_GB", "0.25")
    monkeypatch.setenv("HARNESS_BATCHING__RESERVE_GB", "3")
    assert reproduce(recorded.run / "manifest.json", tmp_path, "--batching.reserve_gb", 2).code == 0
    found = manifest(only_run(tmp_path))["settings"]
    assert found["runtime.reserve_disk_gb"] == {"value": 0.25, "source": "env: HARNESS_RUNTIME__RESERVE_DISK_GB"}
    assert found["batching.reserve_gb"] == {"value": 2.0, "source": "flag: --batching.reserve_gb"}


def test_a_run_is_reproduced_by_its_id_beside_it_and_can_be_verified_and_reproduced_itself(
    recorded: Recorded, tmp_path: Path
) -> None:
    old = copied(recorded, tmp_path)
    assert reproduce("latest", old.parent).code == 0
    one = new_run(old.parent, old)
    assert manifest(one)["parent"] == old.name
    assert harness("verify", one.name, "--paths.runs", one.parent).code == 0
    assert reproduce(one.name, old.parent).code == 0
    two = new_run(old.parent, old, one)
    assert manifest(two)["parent"] == one.name
    assert rows(two) == rows(recorded.run)
    assert f"repeats run {old.name}" in re.sub(r" +", " ", harness("show", one.name, "--paths.runs", one.parent).out)


@pytest.mark.thorough
def test_a_run_with_every_stage_comes_out_again_bit_for_bit(tmp_path: Path) -> None:
    stages = "select,single_token,sanity,psem,greedy,samples,detect,mechanism,patching,analysis"
    told = harness("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs",
                   "--stages", stages, "--gravity.num_samples", 2, "--gravity.sanity.num_prompts", 1,
                   "--batching.max_tokens", 64)  # fmt: skip
    assert told.code == 0, told.err
    one = only_run(tmp_path / "runs")
    told = reproduce(one.name, one.parent, "--batching.max_tokens", "auto")
    assert told.code == 0, told.err
    two = new_run(one.parent, one)
    assert rows(two) == rows(one)
    assert [name for name, table in rows(two).items() if not len(table)] == []
    assert sizes(two) == sizes(one)


# From the manifest alone


def test_a_manifest_without_its_results_is_compared_by_the_hashes_in_it(recorded: Recorded, tmp_path: Path) -> None:
    alone = tmp_path / "somebody_s.json"
    alone.write_text((recorded.run / "manifest.json").read_text())
    told = reproduce(alone, tmp_path / "runs")
    assert told.code == 0, told.err
    assert f"Equal, bit for bit, to what the manifest records: {', '.join(SCHEMA.measured)}." in told.out
    content = manifest(recorded.run)
    content["table_sha256"]["lens"] = "0" * 64
    alone.write_text(json.dumps(content))
    told = reproduce(alone, tmp_path / "runs")
    assert told.code == 1
    assert "Not equal: lens; " in told.out
    del content["table_sha256"]
    alone.write_text(json.dumps(content))
    told = reproduce(alone, tmp_path / "runs")
    assert told.code == 0
    assert "nothing to compare with" in told.out


def test_a_manifest_of_another_machine_needs_only_its_prompts_and_model_told(
    recorded: Recorded, tmp_path: Path
) -> None:
    alone = tmp_path / "theirs.json"
    content = manifest(recorded.run)
    for name, value in (("model.name", "/theirs/model"), ("data.prompts", "/theirs/prompts.jsonl"),
                        ("paths.runs", "/theirs/runs"), ("paths.data", "/theirs/data")):  # fmt: skip
        content["settings"][name]["value"] = value
    alone.write_text(json.dumps(content))
    assert "/theirs/prompts.jsonl" in refused(reproduce(alone, tmp_path / "runs"))
    assert "/theirs/model" in refused(reproduce(alone, tmp_path / "runs", "--prompts", recorded.prompts))
    assert not (tmp_path / "runs").exists()
    shuffled = prompt_file(tmp_path, ROWS[::-1], "mine.jsonl")  # known by their content, in whatever order
    told = reproduce(alone, tmp_path / "runs", "--prompts", shuffled, "--model", recorded.model)
    assert told.code == 0, told.err
    assert rows(only_run(tmp_path / "runs")) == rows(recorded.run)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("none.json", "no file"), ("latest", "no run in"), ("a.json", "not readable as JSON"), ("b.json", "expected a manifest"),
     ("c.json", "has no settings")],
)  # fmt: skip
def test_what_is_no_manifest_is_one_line_and_no_run(tmp_path: Path, wanted: str, told: str) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text('{"run_id": "c", "fingerprint": "0"}')
    name = wanted if wanted == "latest" else tmp_path / wanted
    assert told in refused(reproduce(name, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_settings_that_this_version_does_not_have_are_named(recorded: Recorded, tmp_path: Path) -> None:
    run = copied(recorded, tmp_path)
    settings = manifest(run)["settings"]
    for section in ("experiment", "gravity"):  # as it was called once, and is now
        edited(run, settings=settings | {f"{section}.num_sample": {"value": 2, "source": "default"}})
        message = refused(reproduce(run.name, run.parent))
        assert f"run {run.name} was made by another version of harness" in message
        assert "'gravity.num_sample'" in message
        assert "did you mean 'gravity.num_samples'" in message
    edited(run, settings=settings | {"runtime.seed": {"value": "seven", "source": "default"}})
    assert "runtime.seed" in refused(reproduce(run.name, run.parent))
    edited(run, settings=settings, experiment="gravitas")
    assert "no experiment 'gravitas'" in refused(reproduce(run.name, run.parent))
    assert run_folders(run.parent) == [run]


DAMAGED: dict[str, Any] = {
    "settings": {"runtime.seed": 3}, "more settings": {"runtime.seed": {}}, "model": [1], "fingerprint_parts": {"stages": 3},
    "code": "x", "prompts": 3, "stages": {"psem": 5}, "stages' sizes": {"psem": {"sizes": 5}}, "machine": "here",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_manifest_is_one_line_and_no_run(recorded: Recorded, tmp_path: Path, kind: str) -> None:
    key = {"more settings": "settings", "stages' sizes": "stages"}.get(kind, kind)
    alone = tmp_path / "damaged.json"
    alone.write_text(json.dumps(manifest(recorded.run) | {key: DAMAGED[kind]}))
    assert recorded.run.name in refused(reproduce(alone, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


# What is not as it was


def other_weights(recorded: Recorded, folder: Path) -> tuple[object, ...]:
    model = Path(shutil.copytree(recorded.model, folder / "other"))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return ("--model", model)


def other_prompts(recorded: Recorded, folder: Path) -> tuple[object, ...]:
    new = {"prompt_id": "rome", "category": "facts", "question": "What is the capital of Italy?", "target": "Rome"}
    changed = {**ROWS[1], "question": "Which animal does the early bird catch?"}
    return ("--prompts", prompt_file(folder, (ROWS[0], changed, new)))


CHANGES: dict[str, tuple[Callable[[Recorded, Path], tuple[object, ...]], list[str]]] = {
    "weights": (other_weights, ["model.weights_sha256: was "]),
    "prompts": (other_prompts, ["data (prompts.sha256): was ", "1 changed, such as worm", "1 missing, such as paris",
                                "1 new, such as rome"]),
    "seed": (lambda *_: ("--runtime.seed", 8), ["seed: was 7, is 8"]),
    "template": (lambda *_: ("--gravity.conditions", "baseline,indirect"), ["conditions."]),
    "stages": (lambda *_: ("--stages", "psem"), ["stages.samples"]),
    "samples": (lambda *_: ("--gravity.temperature", 0.5), ["temperature: was 1.0, is 0.5"]),
    "dtype": (lambda *_: ("--model.dtype", "float64"), ["model.dtype: was float32, is float64"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_not_as_it_was_is_refused_by_name_and_nothing_is_written(
    recorded: Recorded, tmp_path: Path, kind: str
) -> None:
    make, told = CHANGES[kind]
    args = make(recorded, tmp_path)
    if kind == "template":
        own = 'Answer in one word, and not "{target}".\nQuestion: {question}\nAnswer:'
        args = ("--gravity.templates", json.dumps({"negative": own}))
    message = refused(reproduce(recorded.run / "manifest.json", tmp_path / "runs", *args))
    assert f"run {recorded.run.name} cannot be reproduced as it was: " in message
    for part in told:
        assert part in message
    assert "--anyway" in message
    named = {"code", "data", "seed", "model", "conditions", "stages"} - {
        told[0].split(".")[0].split(" ")[0].rstrip(":")
    }
    if kind in ("weights", "seed", "dtype"):
        assert not [n for n in named if re.search(rf"(; |: ){n}[ .(]", message.split(" as it was")[1])], "that alone"
    assert not (tmp_path / "runs").exists()


def test_other_code_is_refused_by_commit_and_hash_and_goes_on_where_it_is_accepted(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "source_sha256", lambda *_: "f" * 64)
    file = recorded.run / "manifest.json"
    message = refused(reproduce(file, tmp_path / "runs"))
    assert re.search(r"code: was commit \w+.*, sources \w{12}, is commit \w+.*, sources ffffffffffff", message)
    assert not (tmp_path / "runs").exists()
    told = reproduce(file, tmp_path / "runs", "--anyway")
    assert told.code == 0, told.err
    assert "not as in run" in told.err
    found = manifest(only_run(tmp_path / "runs"))
    assert [d["key"] for d in found["accepted_differences"]] == ["code"]
    assert "code.source_sha256" in told.out, "and the last bits may differ, it says"
    assert "Reproduced: bit for bit the same results." in told.out


def test_what_is_accepted_is_recorded_with_both_values_and_a_difference_is_no_failure_then(
    recorded: Recorded, tmp_path: Path
) -> None:
    told = reproduce(recorded.run / "manifest.json", tmp_path, "--anyway", "--runtime.seed", 8)
    assert told.code == 0, told.err
    run = only_run(tmp_path)
    assert manifest(run)["accepted_differences"] == [{"key": "seed", "old": 7, "new": 8}]
    assert manifest(run)["parent"] == recorded.run.name
    assert "Not reproduced: results differ by more than rounding." in told.out
    equal = re.search(r"Equal, bit for bit: (.*)\.", told.out)
    assert equal
    assert "psem (6)" in equal[1], "the seed decides samples and nothing else here"
    assert "completions" not in equal[1]


# Rounding, and more than rounding

MILK = "prompt_id = 'milk' AND condition = 'negative'"
machine = environment.machine


@pytest.mark.parametrize(
    ("change", "is_elsewhere", "code", "told"),
    some_of([("p_word = p_word + 1e-7", False, 1, "Nothing here explains that the bits are not the same"),
     ("p_word = p_word + 1e-7", True, 0, "Reproduced up to rounding"), ("p_word = p_word + 1e-3", True, 1, "Not reproduced"),
     ("num_sequences = num_sequences + 1", True, 1, "Not reproduced"), ("p_word = p_word", True, 0, "bit for bit the same")], 3),
)  # fmt: skip
def test_rounding_is_let_pass_where_something_explains_it_and_no_more_than_rounding(
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    is_elsewhere: bool,
    code: int,
    told: str,
) -> None:
    run = copied(recorded, tmp_path)
    with duckdb.connect(str(run / "live.duckdb")) as con:
        con.execute(f"UPDATE psem SET {change} WHERE {MILK}")
    if is_elsewhere:
        monkeypatch.setattr(environment, "machine", lambda: machine() | {"cpu": "another"})
    found = reproduce(run.name, run.parent)
    assert (found.code, told in found.out) == (code, True), found.out
    assert ("machine.cpu: was" in found.out) == is_elsewhere
    if "+" in change:
        assert re.search(r"psem .* 1 ", found.out)
        assert "milk, negative" in re.sub(r"\s+", " ", found.out)


# Stopped on the way


def stopping(after: int) -> Callable[..., Any]:
    """`Psem.run` that gets a signal in its n-th batch."""
    measure, calls = psem.Psem.run, iter(range(10_000))

    def run(self: Any, context: Any, items: Sequence[Any]) -> Any:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, context, items)

    return run


def test_the_same_command_goes_on_with_a_stopped_reproduction_and_a_plain_run_is_another(
    recorded: Recorded, tmp_path: Path
) -> None:
    file, root = recorded.run / "manifest.json", tmp_path / "runs"
    plain = (*recorded.args, "--paths.runs", root)
    args = (file, root, "--batching.max_tokens", "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping(2))
        told = reproduce(*args)
        assert told.code == 3, told.err
        assert "type the same command again" in told.err
    begun = only_run(root)
    assert manifest(begun)["status"] == "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping(1))
        assert harness(*plain).code == 3
    ordinary = new_run(root, begun)
    assert manifest(ordinary)["parent"] is None

    told = reproduce(*args)
    assert told.code == 0, told.err
    assert "continued" in told.err
    assert set(run_folders(root)) == {begun, ordinary}
    assert len(manifest(begun)["resumed"]) == 1
    assert rows(begun) == rows(recorded.run)
    assert sizes(begun) == sizes(recorded.run)
    assert manifest(ordinary)["status"] == "interrupted"
    assert harness(*plain).code == 0
    assert set(run_folders(root)) == {begun, ordinary}
    assert manifest(ordinary)["status"] == "finished"
    assert len(manifest(ordinary)["resumed"]) == 1

    before = (begun / "manifest.json").read_bytes()
    assert reproduce(*args).code == 0
    assert len(run_folders(root)) == 3, "a finished reproduction is not gone on with: it is made once more"
    assert (begun / "manifest.json").read_bytes() == before
    told = harness(*plain)
    assert f"Run {ordinary.name} is finished already" in told.out


def test_a_stopped_reproduction_is_cut_as_recorded_by_whoever_goes_on_with_it(
    recorded: Recorded, tmp_path: Path
) -> None:
    other_budget = ("--batching.max_tokens", "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping(1))
        assert reproduce(recorded.run / "manifest.json", tmp_path, *other_budget).code == 3
    begun = only_run(tmp_path)
    told = harness(*recorded.args, "--paths.runs", tmp_path, *other_budget, "--resume", begun.name)
    assert told.code == 0, told.err
    assert sizes(begun) == sizes(recorded.run)
    assert rows(begun) == rows(recorded.run)


def test_an_unfinished_run_is_reproduced_as_far_as_it_can_be_compared(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", stopping(2))
        assert harness(*recorded.args, "--paths.runs", tmp_path).code == 3
    half = only_run(tmp_path)
    before = query(half, "SELECT count(*) FROM psem")
    told = reproduce(half.name, tmp_path)
    assert "is not finished: only what it has can be compared" in told.err
    run = new_run(tmp_path, half)
    assert rows(run)["psem"] == rows(recorded.run)["psem"]
    assert query(half, "SELECT count(*) FROM psem") == before
    assert manifest(half)["status"] == "interrupted"


# A run with failed items


def failing(*keys: str) -> Callable[..., Any]:
    measure = psem.Psem.run

    def run(self: Any, context: Any, items: Sequence[Any]) -> list[Any]:
        return [ItemResult.failed(r.key, "it is tired") if r.key in keys else r for r in measure(self, context, items)]

    return run


def test_a_run_whose_failed_item_was_tried_again_alone_is_reproduced_up_to_that_ones_rounding(tmp_path: Path) -> None:
    """Its rows come from a batch of one; the reproduction measures it among others, which is named and explains the bits."""
    args = ("run", "--prompts", prompt_file(tmp_path), "--paths.runs", tmp_path / "runs", "--stages", "psem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psem.Psem, "run", failing("paris|negative"))
        assert harness(*args).code == 1
        run = only_run(tmp_path / "runs")
        told = reproduce(run.name, run.parent)
        assert told.code == 1, "the item fails again, and that is what the run came to"
        assert "Reproduced: bit for bit the same results." in told.out
        shutil.rmtree(new_run(run.parent, run))
    assert harness(*args, "--retry-failed").code == 0
    told = reproduce(run.name, run.parent)
    assert told.code == 0, told.out
    assert "stages.psem.retried: was 1, is 0" in told.out
