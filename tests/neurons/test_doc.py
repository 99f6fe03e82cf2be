"""docs/neurons.md says what is so: its settings are settings, its commands commands, and its prompt files prompt files."""

import re
import shlex
from pathlib import Path

import pytest

from harness.cli import _parser
from harness.experiments import registry
from harness.experiments.neurons import method
from harness.experiments.neurons.prompts import read_prompts
from harness.experiments.neurons.schema import SCHEMA
from harness.experiments.neurons.settings import NeuronsSettings

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "neurons.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}[^\n]*\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    line.split(" #")[0].strip()
    for block in blocks("sh")
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if line.startswith("harness ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_taken(command: str) -> None:
    words = shlex.split(command)[1:]
    _parser(words).parse_args(words)


def test_its_settings_file_is_read(tmp_path: Path) -> None:
    (found,) = blocks("toml")
    path = tmp_path / "neurons.toml"
    path.write_text(found, "utf-8")
    own = registry.resolve(config=path, environ={}, experiment="neurons").own(NeuronsSettings)
    assert own.target == "next_token"
    assert own.background.endswith(".txt")


def test_its_prompt_file_is_read_whole(tmp_path: Path) -> None:
    (found,) = blocks("json")
    path = tmp_path / "prompts.jsonl"
    path.write_text(found, "utf-8")
    read = read_prompts(path)
    assert not read.rejections
    assert len(read.prompts) == len(found.splitlines())
    assert {(p.target, p.contrast) for p in read.prompts} == {(" are", " is"), (" is", " are")}


def test_settings_that_it_names_are_there() -> None:
    known = {name.split(".", 1)[1] for name in registry.fields("neurons").names if name.startswith("neurons.")}
    named = set(re.findall(r"neurons\.([a-z]\w*)", TEXT)) - {"toml", "md", "png"}
    assert named
    assert named <= known


def test_the_method_is_told_once_for_the_page_and_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (DOCS / "method.md").read_text("utf-8")
    assert "\n## Neurons\n" in told
    assert f"\n{method.terms_markdown()}\n" in told
    assert f"\n{method.limits_markdown()}\n" in told
    assert method.QUESTION in told
    assert method.SOURCES in told
    monkeypatch.setattr(method, "LIMITS", (*method.LIMITS[:-1], "another"))
    assert method.limits_markdown() not in told, "the control"


def test_every_table_has_a_row_in_the_documentation() -> None:
    section = (DOCS / "tables.md").read_text("utf-8").partition("\n## Neurons\n")[2].partition("\n## ")[0]
    tables = {t for m in SCHEMA.migrations for t in re.findall(r"CREATE TABLE (\w+)", m)}
    views = {v for m in SCHEMA.migrations for v in re.findall(r"CREATE VIEW (\w+)", m)}
    assert {name for name in tables | views if f"`{name}`" not in section} == set()
