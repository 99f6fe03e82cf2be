"""The class that a manifest is read and written through: every part by its name, the tree of JSON kept as it was read."""

import json
import tarfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from harness.engine import StageReport
from harness.errors import DamagedManifest
from harness.run import Manifest, ManifestFile, RunPaths, own_setting, read_manifest, seed_of, setting
from harness.run.manifest import RecordedStage
from tests.commands import saying

ARCHIVES = sorted((Path(__file__).parent / "fixtures" / "runs").glob("*.tar.xz"))


def text_of(archive: Path) -> str:
    """The manifest of a recorded run, as it lies in its file."""
    with tarfile.open(archive) as packed:
        member = next(m for m in packed if m.name.endswith("/manifest.json"))
        file = packed.extractfile(member)
        assert file is not None
        return file.read().decode()


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    """Text of the manifest of every recorded run, by the archive's name."""
    return {archive.name.partition(".")[0]: text_of(archive) for archive in ARCHIVES}


# -- reading


def test_what_was_read_is_kept_byte_for_byte(recorded: dict[str, str]) -> None:
    """What is sealed, hashed and compared is the tree: no key may be lost, made up or moved, of any older version."""
    assert {name[:7] for name in recorded} == {f"schema{n}" for n in range(1, 8)}
    for text in recorded.values():
        tree = json.loads(text)
        manifest = Manifest.of(tree)
        assert manifest.tree is tree
        assert json.dumps(manifest.tree, indent=2, ensure_ascii=False) + "\n" == text


def apart(told: object, tree: object, where: str = "") -> list[str]:
    """Dotted names at which a record does not say what its tree says; what the tree has not, or as null, counts as empty."""
    if isinstance(told, BaseModel):
        parts = tree if isinstance(tree, Mapping) else {}
        return [
            line
            for name in type(told).model_fields
            for line in apart(getattr(told, name), parts.get(name), f"{where}.{name}")
        ]
    if isinstance(told, Mapping) and isinstance(tree, Mapping):
        names = [*dict.fromkeys([*told, *tree])]
        return [line for name in names for line in apart(told.get(name), tree.get(name), f"{where}.{name}")]
    if isinstance(told, list) and isinstance(tree, list) and len(told) == len(tree):
        return [line for a, b in zip(told, tree, strict=True) for line in apart(a, b, f"{where}[]")]
    is_same = told in (None, {}, []) if tree is None else told == tree
    return [] if is_same else [where]


def test_every_name_says_what_the_tree_says(recorded: dict[str, str]) -> None:
    for text in recorded.values():
        tree = json.loads(text)
        assert apart(Manifest.of(tree), tree) == []
    tree = json.loads(recorded["schema7-finished"])
    told = Manifest.of(tree)
    tree["code"]["git_commit"], tree["stages"]["psem"]["sizes"] = "another", [1, 2, 3]
    assert apart(told, tree) == [".stages.psem.sizes", ".code.git_commit"], "the control"


def test_every_key_that_a_run_of_today_writes_has_a_name(recorded: dict[str, str]) -> None:
    """Only an experiment's own facts may have none, and gravity has none of its own."""
    for name in ("schema7-finished", "schema7-interrupted", "schema7-killed"):
        tree = json.loads(recorded[name])
        assert tree.keys() - Manifest.model_fields.keys() == set()
    assert {"run_id", "marbles"} - Manifest.model_fields.keys() == {"marbles"}, "the control"


def test_a_stage_that_ended_is_read_as_the_engine_reports_it() -> None:
    assert {f.name for f in fields(StageReport)} == set(RecordedStage.model_fields)


@pytest.mark.parametrize("name", sorted(Manifest.model_fields.keys() - {"run_id", "fingerprint"}))
def test_null_reads_as_a_missing_key_does(name: str) -> None:
    absent, null = saying(), saying({name: None})
    assert getattr(null, name) == getattr(absent, name)
    assert not null.says(name)
    assert null.part(name) == {}


def test_a_count_of_none_is_not_the_same_as_no_count() -> None:
    told = saying({"warnings": {}, "num_failed": 0})
    assert told.says("warnings")
    assert told.says("num_failed")
    assert not saying().says("warnings")
    assert (saying().num_failed, told.num_failed) == (None, 0)


def test_a_part_that_is_missing_has_the_names_of_one_that_is_there() -> None:
    none, some = saying(), saying({"prompts": {"used": 3, "row_hashes": {"a": "1"}}, "code": {"source_sha256": "5"}})
    assert (none.prompts.used, none.prompts.row_hashes, none.code.source_sha256) == (None, {}, None)
    assert (some.prompts.used, some.prompts.row_hashes, some.code.source_sha256) == (3, {"a": "1"}, "5")


def test_what_has_no_name_is_in_the_tree() -> None:
    told = saying(
        {"marbles": 7, "prompts": {"colour": "red"}, "fingerprint_parts": {"stages": [{"name": "a", "size": 3}]}}
    )
    assert (told.tree["marbles"], told.part("prompts")) == (7, {"colour": "red"})
    assert told.fingerprint_parts.stages[0].params == {"size": 3}
    assert not hasattr(told, "marbles")


def test_the_hashes_of_many_prompts_are_checked_and_not_copied() -> None:
    tree = {"run_id": "r", "fingerprint": "0", "prompts": {"row_hashes": {"a": "1"}}, "settings": {"a": {"value": 1}}}
    told = Manifest.of(tree)
    assert told.prompts.row_hashes is tree["prompts"]["row_hashes"]  # type: ignore[index]
    assert told.settings is not tree["settings"], "the control"
    with pytest.raises(DamagedManifest, match=r"prompts\.row_hashes\.b: input should be a valid string$"):
        saying({"prompts": {"row_hashes": {"a": "1", "b": 2}}})


def test_settings_are_found_by_name_an_experiments_own_by_both_names_of_its_section() -> None:
    given = {"toy.unit": {"value": "bits"}, "runtime.seed": {"value": 7}}
    told = saying({"experiment": "toy", "settings": given})
    assert (setting(told, "toy.unit"), setting(told, "toy.none", 3), own_setting(told, "unit")) == ("bits", 3, "bits")
    older = saying({"experiment": "toy", "settings": {"experiment.unit": {"value": "nats"}}})
    assert (own_setting(older, "unit"), own_setting(older, "none", 3)) == ("nats", 3)
    assert (seed_of(told), seed_of(older), seed_of(saying({"settings": {"runtime.seed": {"value": -1}}}))) == (7, 0, 0)


# -- what is no manifest

NO_DICT = "input should be a valid dictionary"
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "a number for a name": ({"run_id": 3}, "the manifest of 3 is damaged: run_id: input should be a valid string"),
    "no name": ({"run_id": ""}, "the manifest of  is damaged: run_id: string should have at least 1 character"),
    "null for the fingerprint": ({"fingerprint": None}, "fingerprint: input should be a valid string"),
    "a status": ({"status": 3}, "status: input should be a valid string"),
    "threads": ({"threads": 0}, "threads: input should be greater than or equal to 1"),
    "seconds": ({"seconds": float("nan")}, "seconds: input should be a finite number"),
    "true for a count": ({"num_failed": True}, "num_failed: input should be a valid integer"),
    "a count": ({"warnings": {"error": -1}}, "warnings.error: input should be greater than or equal to 0"),
    "settings": ({"settings": []}, f"settings: {NO_DICT}"),
    "a setting": ({"settings": {"a": 3}}, f"settings.a: {NO_DICT}"),
    "a setting without a value": ({"settings": {"a": {}}}, "settings.a.value: field required"),
    "a stage without a name": ({"fingerprint_parts": {"stages": [{"x": 1}]}}, "fingerprint_parts.stages.0.name: field required"),
    "a size": ({"stages": {"psem": {"sizes": [2, 0]}}}, "stages.psem.sizes.1: input should be greater than or equal to 1"),
    "a part": ({"code": "x"}, f"code: {NO_DICT}"),
    "a part of a part": ({"prompts": {"rejected": {"a": "b"}}}, "prompts.rejected.a: input should be a valid integer"),
    "argv": ({"argv": "run"}, "argv: input should be a valid list"),
    "a change": ({"resumed": [{"bit_differences": [{"key": "a", "old": 1}]}]}, "resumed.0.bit_differences.0.new: field required"),
    "a verdict": ({"sanity": [{"measurement": "p_sem", "ok": 1}]}, "sanity.0.ok: input should be a valid boolean"),
    "two of them": ({"sanity": 3, "argv": 3}, "argv: input should be a valid list"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_told_of_in_one_line_that_names_the_first_fault(case: str) -> None:
    changes, told = DAMAGED[case]
    line = told if told.startswith("the manifest") else f"the manifest of r is damaged: {told}"
    with pytest.raises(DamagedManifest) as caught:
        saying(changes)
    assert str(caught.value) == line
    assert saying().run_id == "r", "the control: without the fault it is one"


@pytest.mark.parametrize("name", Manifest.model_fields)
def test_a_value_of_a_kind_that_no_key_has_is_refused_at_every_key(name: str) -> None:
    with pytest.raises(DamagedManifest, match=rf"is damaged: {name}[:.]"):
        saying({name: {"": 1.5} if name not in ("code", "machine", "model", "other", "prompts", "fingerprint_parts",
                                                "packages", "numerics") else 1.5})  # fmt: skip


# -- writing


@pytest.fixture
def file(tmp_path: Path) -> ManifestFile:
    content = {"experiment": "toy", "fingerprint": "f", "stages": {}}
    return ManifestFile.create(RunPaths(tmp_path / "r"), content, facts={"marbles": (1, 2), "planted": True})


def test_a_new_manifest_has_its_keys_in_the_order_in_which_they_were_given(file: ManifestFile) -> None:
    tree = json.loads(file.paths.manifest.read_text())
    assert list(tree) == [
        "run_id",
        "created",
        "experiment",
        "fingerprint",
        "stages",
        "marbles",
        "planted",
        "status",
        "heartbeat",
    ]
    assert (tree["marbles"], read_manifest(file.paths).planted) == ([1, 2], True)
    file.update(sanity=[], status="finished", device="cpu")
    assert list(json.loads(file.paths.manifest.read_text())) == [*tree, "sanity", "device"]


def test_a_key_that_a_manifest_has_not_is_seen_at_once_and_nothing_is_written(file: ManifestFile) -> None:
    before = file.paths.manifest.read_bytes()
    for write in (file.update, file.with_changes):
        with pytest.raises(AssertionError, match="no key secnods"):
            write(status="finished", secnods=1.0)
    with pytest.raises(AssertionError, match="no key marbles"):
        file.update(marbles=3)
    with pytest.raises(AssertionError, match="no key colour"):
        ManifestFile.create(RunPaths(file.paths.folder / "other"), {"fingerprint": "f", "colour": "red"})
    assert file.paths.manifest.read_bytes() == before
    assert file.now.status == "running"
    file.update(status="finished", seconds=1.0)
    assert file.paths.manifest.read_bytes() != before, "the control"


@pytest.mark.parametrize(
    "changes",
    [{"seconds": "1"}, {"seconds": -1}, {"tables": {"psem": -1}}, {"stages": {"psem": 3}}, {"num_failed": True},
     {"sanity": [{"measurement": "p_sem"}]}, {"estimate": {"seconds": 1}}, {"argv": "run"}],
)  # fmt: skip
def test_a_value_of_another_kind_is_seen_at_once_and_nothing_is_written(
    file: ManifestFile, changes: dict[str, Any]
) -> None:
    before = file.paths.manifest.read_bytes()
    with pytest.raises(ValidationError):
        file.update(**changes)
    assert file.paths.manifest.read_bytes() == before
    assert file.now == read_manifest(file.paths)


def test_facts_of_an_experiment_may_have_any_names_but_those_that_the_run_gave(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "r")
    with pytest.raises(AssertionError, match="fingerprint"):
        ManifestFile.create(paths, {"fingerprint": "f"}, facts={"fingerprint": "mine"})
    with pytest.raises(ValidationError):
        ManifestFile.create(paths, {"fingerprint": "f"}, facts={"prompts": {"used": "three"}})
    assert not paths.manifest.exists()
    assert ManifestFile.create(paths, {"fingerprint": "f"}, facts={"a b": 1}).now.tree["a b"] == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=5)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["packages", "numerics", "machine", "device", "reason"]), JSON),
       st.dictionaries(st.text(max_size=3), JSON))  # fmt: skip
def test_a_changed_manifest_is_the_tree_with_these_keys_set_and_reads_as_it(
    changes: dict[str, Any], facts: dict[str, Any]
) -> None:
    before = saying({**facts, "device": "cpu", "packages": {"a": 1}})
    try:
        after = before.changed(**changes)
    except ValidationError:
        with pytest.raises(DamagedManifest):
            Manifest.of({**before.tree, **changes})
        return
    whole = {**before.tree, **changes}
    assert json.dumps(after.tree) == json.dumps(whole)
    assert after == Manifest.of(whole)
    assert before == saying({**facts, "device": "cpu", "packages": {"a": 1}}), "and the one before is as it was"


def test_a_manifest_is_not_changed_in_place(file: ManifestFile) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        file.now.status = "finished"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        file.now.code.version = "2"  # type: ignore[misc]
