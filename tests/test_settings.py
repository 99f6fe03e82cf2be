"""Settings: which source wins, what each source may say, and what it is told when it says something else."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.errors import SettingsError
from harness.experiments.gravity.inputs import conditions_of
from harness.experiments.gravity.settings import TemplateSettings
from harness.settings import ALIASES, Resolved
from tests.gravity import FIELDS, own, resolve

BAN = "Name no {category}.\nQuestion: {question}\nAnswer:"
OTHER: dict[str, Any] = {  # a legal value that is not the default, for every setting; a test says when one is missing
    "model.name": "gpt2", "model.revision": "main", "model.dtype": "float64", "model.trust_remote_code": True,
    "other.name": "gpt2", "other.revision": "main", "other.dtype": "float64", "other.trust_remote_code": True,
    "data.prompts": "mine.csv", "data.limit": 7, "batching.max_tokens": 64, "batching.reserve_gb": 1.5,
    "runtime.device": "cpu", "runtime.seed": 9, "runtime.threads": 1, "runtime.executor": "inline",
    "runtime.reserve_disk_gb": 0.25,
    "paths.runs": "there", "paths.data": "stuff", "paths.hf_home": "cache", "paths.cache": "kept",
    "gravity.stages": ("psem", "greedy"), "gravity.sanity.num_prompts": 1, "gravity.sanity.budget": 7.5,
    "gravity.conditions": ("negative",), "gravity.templates": {"ban": {"text": BAN}}, "gravity.chat": True,
    "gravity.num_samples": 3, "gravity.sample_conditions": ("negative",),
    "gravity.temperature": 0.5, "gravity.top_p": 0.25, "gravity.max_new_tokens_greedy": 2,
    "gravity.max_new_tokens_samples": 3, "gravity.stop_at_newline": False, "gravity.select.min_p0": 0.5,
    "gravity.select.per_bin": 5, "gravity.select.max_categories": 1, "gravity.stored.prompts": ("a", "b"),
    "gravity.stored.max_per_category": 3, "gravity.patching.condition": "ban", "gravity.patching.min_p0": 0.5,
    "gravity.patching.max_prompts": 4,
}  # fmt: skip


def variable(name: str) -> str:
    return "HARNESS_" + name.upper().replace(".", "__")


def as_text(value: object) -> str:
    """How a flag or a variable spells a value."""
    if isinstance(value, tuple):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def toml_file(folder: Path, values: dict[str, Any]) -> Path:
    """A settings file of these dotted names; JSON's spelling of these kinds of values is TOML's too."""

    def spell(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {spell(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    path = folder / "settings.toml"
    path.write_text("".join(f"{name} = {spell(value)}\n" for name, value in values.items()), "utf-8")
    return path


def at(resolved: Resolved, name: str) -> Any:
    """The value of a dotted name."""
    value: Any = resolved.settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def refusal(
    flags: dict[str, str] | None = None, config: Path | None = None, environ: dict[str, str] | None = None
) -> str:
    """The message of the SettingsError these sources must raise: one line."""
    with pytest.raises(SettingsError) as caught:
        resolve(flags, config, environ or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


# Sources


def test_without_any_source_every_setting_is_its_default_and_says_so() -> None:
    resolved = resolve({}, None, {})
    assert resolved.settings == FIELDS.tree()
    assert {source for _, _, source in resolved.rows()} == {"default"}
    assert [name for name, _, _ in resolved.rows()] == list(FIELDS.names)


def test_flags_beat_variables_beat_the_file_beats_defaults(tmp_path: Path) -> None:
    config = toml_file(tmp_path, {"runtime.seed": 1, "gravity.top_p": 0.5, "data.limit": 5})
    environ = {"HARNESS_RUNTIME__SEED": "2", "HARNESS_GRAVITY__TOP_P": "0.6"}
    resolved = resolve({"runtime.seed": "3"}, config, environ)
    found = {name: (value, source) for name, value, source in resolved.rows()}
    assert found["runtime.seed"] == (3, "flag: --runtime.seed")
    assert found["gravity.top_p"] == (0.6, "env: HARNESS_GRAVITY__TOP_P")
    assert found["data.limit"] == (5, f"file: {config}")
    assert found["gravity.num_samples"] == (16, "default")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_by=st.dictionaries(st.sampled_from(["runtime.seed", "gravity.num_samples", "data.limit"]),
                                st.sets(st.sampled_from(["file", "env", "flag"]), min_size=1)))  # fmt: skip
def test_any_mix_of_sources_resolves_each_setting_by_its_strongest(
    tmp_path: Path, given_by: dict[str, set[str]]
) -> None:
    number = {"file": 11, "env": 12, "flag": 13}
    config = toml_file(tmp_path, {n: 11 for n, by in given_by.items() if "file" in by})
    environ = {variable(n): "12" for n, by in given_by.items() if "env" in by}
    resolved = resolve({n: "13" for n, by in given_by.items() if "flag" in by}, config, environ)
    sources = {name: source for name, _, source in resolved.rows()}
    for name, by in given_by.items():
        strongest = max(by, key=lambda s: number[s])
        assert at(resolved, name) == number[strongest]
        assert sources[name].startswith(strongest + ": ")


def test_the_table_of_other_values_names_every_setting() -> None:
    """The control of the tests below: a new setting must be added there, with a value that differs from its default."""
    assert list(OTHER) == list(FIELDS.names)
    default = resolve({}, None, {})
    same = [n for n, value in OTHER.items() if str(at(default, n)) == str(value)]
    assert same == ["runtime.executor"], "the only setting with one legal value"


@pytest.mark.parametrize("by", ["flag", "env", "file"])
@pytest.mark.parametrize(
    "name", [name for name in OTHER if not name.endswith(".trust_remote_code")]
)  # a flag, beside --model or --other
def test_every_setting_can_be_set_by_flag_variable_and_file(tmp_path: Path, name: str, by: str) -> None:
    value = OTHER[name]
    if by == "flag":
        resolved = resolve({name: as_text(value)}, None, {})
    elif by == "env":
        resolved = resolve({}, None, {variable(name): as_text(value)})
    else:
        resolved = resolve({}, toml_file(tmp_path, {name: value}), {})
    want = {"ban": TemplateSettings(text=BAN)} if name == "gravity.templates" else value
    found = at(resolved, name)
    assert (str(found) if isinstance(found, Path) else found) == want
    (changed,) = [n for n, _, source in resolved.rows() if source.startswith(by + ": ")]
    assert changed == name


def test_names_people_already_have_are_aliases_that_the_full_name_beats() -> None:
    environ = {alias: f"/{alias}" for alias in ALIASES}
    resolved = resolve({}, None, environ)
    assert {alias: str(at(resolved, name)) for alias, name in ALIASES.items()} == environ
    assert set(ALIASES) == {"HF_HOME", "MODEL_PATH", "DATA_ROOT", "OUTPUT_ROOT"}
    assert ("paths.runs", "/OUTPUT_ROOT", "env: OUTPUT_ROOT") in list(resolved.rows())
    both = resolve({}, None, environ | {"HARNESS_PATHS__RUNS": "/full"})
    assert at(both, "paths.runs") == Path("/full")
    assert at(resolve({}, None, {"OUTPUT_ROOT": ""}), "paths.runs") == Path("runs"), "an empty alias is not set"


def test_a_sections_former_name_is_the_section_and_sources_keep_what_was_typed(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(
        '[experiment]\nnum_samples = 3\n[experiment.sanity]\nbudget = 9\n[experiment.conditions.mine]\ntext = "{question}"\n'
    )
    environ = {"HARNESS_EXPERIMENT__TOP_P": "0.5"}
    resolved = resolve({"experiment.chat": "true", "gravity.num_samples": "4"}, config, environ)
    (note,) = resolved.notes
    assert note.startswith("experiment.* is read as gravity.*")
    assert resolve({"gravity.chat": "true"}, None, {}).notes == (), "its own name needs no word"
    found = {name: (value, source) for name, value, source in resolved.rows()}
    assert found["gravity.chat"] == (True, "flag: --experiment.chat")
    assert found["gravity.num_samples"] == (4, "flag: --gravity.num_samples"), (
        "a flag beats the file under this name too"
    )
    assert found["gravity.top_p"] == (0.5, "env: HARNESS_EXPERIMENT__TOP_P")
    assert found["gravity.sanity.budget"] == (9.0, f"file: {config}")
    assert list(own(resolved).conditions) == ["mine"]
    assert [name for name, _, _ in resolved.rows()] == list(FIELDS.names), "what is recorded has one name"
    assert own(resolve({"gravity.num_samples": "5"}, config, {})).num_samples == 5


def test_two_names_of_one_setting_in_one_place_are_refused(tmp_path: Path) -> None:
    config = toml_file(tmp_path, {"gravity.chat": True, "experiment.chat": True})
    for told in (
        refusal({"gravity.chat": "true", "experiment.chat": "true"}),
        refusal({}, environ={"HARNESS_GRAVITY__CHAT": "1", "HARNESS_EXPERIMENT__CHAT": "1"}),
        refusal({}, config),
    ):
        assert "gravity.chat" in told
        assert "experiment.chat" in told
        assert "keep one" in told
        assert "\n" not in told


def test_an_unknown_name_in_a_section_named_otherwise_is_refused_with_the_nearest() -> None:
    assert "did you mean 'gravity.chat'" in refusal({"gravity.chatt": "true"})


def test_what_a_container_says_of_itself_is_not_taken_for_a_setting() -> None:
    resolve({}, None, {"HARNESS_IMAGE_REVISION": "abc", "HARNESS_IMAGE_DIGEST": "sha256:1"})


def test_other_programs_variables_are_left_alone() -> None:
    assert resolve({}, None, {"PATH": "/bin", "MODEL": "x", "harness_model__name": "x"}).settings == FIELDS.tree()


def test_settings_are_frozen_all_the_way_down() -> None:
    resolved = resolve({}, None, {})
    tree = resolved.settings
    for part, name in ((tree, "model"), (tree.model, "name"), (own(resolved).select, "min_p0")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "changed")
    assert tree == FIELDS.tree()


def test_every_setting_whose_name_does_not_say_all_has_a_description() -> None:
    bare = [name for name in list(FIELDS.names) if not FIELDS.describe(name)]
    assert bare == ["gravity.temperature", "gravity.max_new_tokens_greedy", "gravity.max_new_tokens_samples"]
    assert set(FIELDS.short_flags.values()) <= set(FIELDS.names)


# Unknown names


@pytest.mark.parametrize(
    ("written", "meant"),
    [("model.nam", "model.name"), ("batching.max_token", "batching.max_tokens"), ("experimnt.top_p", "gravity.top_p"),
     ("gravity.select.min_p", "gravity.select.min_p0"), ("model", "model.name")],
)  # fmt: skip
def test_unknown_names_are_refused_in_each_source_with_the_nearest_known_one(
    tmp_path: Path, written: str, meant: str
) -> None:
    message = refusal({written: "1"})
    assert message == f"--{written}: no such setting; did you mean '{meant}'?"
    message = refusal(environ={variable(written): "1"})
    assert message == f"{variable(written)}: no such setting; did you mean '{variable(meant)}'?"
    if "." in written:
        config = toml_file(tmp_path, {written: 1})
        assert refusal(config=config) == f"{config}: [{written}]: no such setting; did you mean '{meant}'?"


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    assert refusal({"zzzz.qqqq": "1"}) == "--zzzz.qqqq: no such setting"


def test_a_plain_value_outside_any_table_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("top_p = 1\n")
    assert refusal(config=path) == f"{path}: expected tables such as [model]; found the plain value 'top_p'"


@pytest.mark.parametrize("key", ["txt", "negatio"])
def test_an_unknown_key_of_a_condition_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    values = {"text": BAN, key: "x"} if key != "txt" else {"txt": BAN}
    for field in ("templates", "conditions"):
        message = refusal(config=toml_file(tmp_path, {f"gravity.{field}": {"ban": values}}))
        assert f"gravity.{field}" in message
        assert re.search(rf"\b{key}\b.*(no such setting|not permitted)", message), message
        assert "valid tuple" not in message, "which speaks of the other way to write conditions"


def test_a_settings_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert refusal(config=missing) == f"--config: no file {str(missing)!r}"
    assert "is not a TOML file" in refusal(config=tmp_path)
    for content in (b"[[x]", b"\xff\xfe[model]", b"[model]\nname='a'\nname='b'\n"):
        (tmp_path / "bad.toml").write_bytes(content)
        assert f"{tmp_path / 'bad.toml'} is not a TOML file" in refusal(config=tmp_path / "bad.toml")


# Values


@pytest.mark.parametrize(
    ("name", "value"),
    [("data.limit", "0"), ("data.limit", "-3"), ("data.limit", "some"), ("data.limit", "1.5"), ("model.dtype", "int8"),
     ("model.trust_remote_code", "perhaps"), ("gravity.num_samples", "0"), ("gravity.temperature", "0"),
     ("gravity.temperature", "nan"), ("gravity.temperature", "inf"), ("gravity.top_p", "0"),
     ("gravity.top_p", "1.5"), ("gravity.max_new_tokens_greedy", "0"), ("gravity.max_new_tokens_samples", "0"),
     ("gravity.chat", "maybe"), ("gravity.select.min_p0", "-.1"), ("gravity.select.per_bin", "0"),
     ("gravity.select.max_categories", "0"), ("gravity.stages", "[1, 2]"), ("gravity.stages", "[psem"),
     ("gravity.conditions", '{"ban": 3}'), ("batching.max_tokens", "0"), ("batching.max_tokens", "lots"),
     ("batching.reserve_gb", "-1"), ("batching.reserve_gb", "inf"), ("runtime.device", "gpu"), ("runtime.seed", "lucky"),
     ("runtime.threads", "0"), ("runtime.threads", "two"), ("runtime.executor", "ray"), ("runtime.reserve_disk_gb", "-1")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_naming_setting_source_and_what_was_found(name: str, value: str) -> None:
    shown = value.strip("[{}]").split(",")[0].split(":")[-1].strip()
    for source, message in (
        (f"flag: --{name}", refusal({name: value})),
        (f"env: {variable(name)}", refusal(environ={variable(name): value})),
    ):
        assert message.startswith(f"{name} ({source}): "), message
        assert shown in message.rsplit("; found ", 1)[1], message


def test_a_value_out_of_range_in_a_file_names_the_file(tmp_path: Path) -> None:
    config = toml_file(tmp_path, {"gravity.select.min_p0": 2})
    assert refusal(config=config) == (
        f"gravity.select.min_p0 (file: {config}): input should be less than or equal to 1; found 2"
    )


@pytest.mark.parametrize("name", ["gravity.conditions", "gravity.stages", "gravity.sample_conditions"])
@pytest.mark.parametrize("text", ["a,b", " a , b ,", '["a", "b"]'])
def test_lists_may_be_written_with_commas_or_as_json(name: str, text: str) -> None:
    assert at(resolve({name: text}, None, {}), name) == ("a", "b")
    assert at(resolve({}, None, {variable(name): text}), name) == ("a", "b")


@pytest.mark.parametrize("name", ["gravity.stages", "gravity.sample_conditions"])
@pytest.mark.parametrize("text", ["", "  ", "[]"])
def test_an_empty_list_may_be_written_as_nothing(name: str, text: str) -> None:
    """As compose files and shell scripts do: HARNESS_GRAVITY__STAGES= ."""
    assert at(resolve({}, None, {variable(name): text}), name) == ()


def test_limit_and_max_tokens_take_a_number_or_a_word() -> None:
    assert [at(resolve({"data.limit": t}, None, {}), "data.limit") for t in ("5", "all", "auto")] == [5, "all", "auto"]
    assert at(resolve({"batching.max_tokens": "auto"}, None, {}), "batching.max_tokens") == "auto"
    data = {t: resolve({"data.limit": t}, None, {}).settings.data.num_prompts for t in ("5", "all", "auto")}
    assert data == {"5": 5, "all": None, "auto": 250}
    assert resolve({"data.prompts": "mine.csv"}, None, {}).settings.data.num_prompts is None


# Conditions


def test_conditions_may_be_names_a_table_of_strings_or_a_table_of_tables(tmp_path: Path) -> None:
    table = {"ban": {"text": BAN, "negation": "Name no"}}
    names = resolve({"gravity.conditions": "negative"}, None, {})
    strings = resolve({}, toml_file(tmp_path, {"gravity.conditions": {"ban": BAN}}), {})
    tables = resolve({}, toml_file(tmp_path, {"gravity.conditions": table}), {})
    as_json = resolve({}, None, {"HARNESS_GRAVITY__CONDITIONS": json.dumps(table)})
    assert list(conditions_of(own(names))) == ["negative"]
    assert list(conditions_of(own(strings))) == ["baseline", "negative", "ban"], "own ones stand beside the built in"
    assert conditions_of(own(strings))["ban"].text == BAN
    assert conditions_of(own(tables))["ban"].negation == "Name no"
    assert as_json.settings == tables.settings


def test_own_templates_are_named_by_conditions(tmp_path: Path) -> None:
    config = toml_file(tmp_path, {"gravity.templates": {"ban": BAN}, "gravity.conditions": ["baseline", "ban"]})
    assert list(conditions_of(own(resolve({}, config, {})))) == ["baseline", "ban"]
    assert list(conditions_of(own(resolve({"gravity.conditions": "ban"}, config, {})))) == ["ban"]


@pytest.mark.parametrize(
    ("conditions", "told"),
    [('["negativ"]', "did you mean 'negative'"), ("[]", "at least one"), ('{"x": "no field"}', "{question} once"),
     ('{"x": "{question} {question}"}', "found it 2 times"), ('{"x": "{question} {word}"}', "no field {word}"),
     ('{"x": {"text": "{question}", "negation": "never"}}', "gravity.conditions.x.negation")],
)  # fmt: skip
def test_conditions_that_cannot_be_rendered_are_refused(conditions: str, told: str) -> None:
    resolved = resolve({"gravity.conditions": conditions}, None, {})
    with pytest.raises(SettingsError) as caught:
        conditions_of(own(resolved))
    assert told in str(caught.value)


# Imports


def test_settings_and_cli_import_neither_torch_nor_the_environment() -> None:
    """`harness runs` should answer at once, and `harness run --help` soon. The control: the launcher does import torch."""
    code = (
        "import sys, harness.settings, harness.cli; slow = {'torch', 'transformers', 'duckdb'}; "
        "print(sorted(slow & set(sys.modules))); harness.cli._parser(['run', '--help']); "
        "print(sorted((slow - {'duckdb'}) & set(sys.modules))); "
        "import harness.commands.launch; print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout.splitlines() == ["[]", "[]", "True"]
