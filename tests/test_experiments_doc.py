"""docs/experiments.md says what is so: its code is that of the toy, and who follows its recipes gets what they promise."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import harness, only_run, query
from tests.installed import TOY, install

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "experiments.md").read_text("utf-8")


class Block(NamedTuple):
    """A fenced block: its language, the file it is of where it names one, whether that is to be made, its text."""

    language: str
    file: str
    is_new: bool
    text: str


def blocks(markdown: str) -> Iterator[Block]:
    for head, text in re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL):
        language, *more = head.split()
        yield Block(language, more[-1] if more else "", "new" in more, text)


def section(title: str) -> list[Block]:
    """The blocks under a heading."""
    return list(blocks(TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]))


def follow(block: Block, project: Path) -> None:
    """Do what a block of a recipe says: make a file, or put its lines with + where they belong."""
    file = project / block.file
    if block.is_new:
        assert not file.exists()
        file.write_text(block.text, "utf-8")
        return
    lines = block.text.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    content = file.read_text("utf-8")
    assert content.count(before) == 1, f"{block.file}: the lines around what is added"
    file.write_text(content.replace(before, "".join(line[1:] for line in lines)), "utf-8")


def test_the_code_is_that_of_the_toy() -> None:
    shown = section("An example")
    assert len(shown) >= 6
    for block in shown:
        assert block.text in (TOY / block.file).read_text("utf-8"), block.file


def test_who_follows_the_recipes_has_a_stage_and_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage is added to a copy of the toy, of which the experiment is then made: one run shows both."""
    here = tmp_path / "here"
    project = Path(shutil.copytree(TOY, here / "tests" / "toy", ignore=shutil.ignore_patterns("__pycache__")))
    stage = section("Adding a stage")
    assert [b.is_new for b in stage] == [True, False, False, False]
    for block in stage:
        follow(block, project)
    (block,) = section("Adding an experiment")
    lines = block.text.splitlines()
    assert lines[-2:] == ["pip install -e .", "harness run mine"], "what needs an installer, and what comes of it"
    subprocess.run(["bash", "-ec", "\n".join(lines[:-2])], cwd=here, check=True, timeout=60)
    install(monkeypatch, tmp_path / "installed", tmp_path / "harness-mine")
    told = harness("run", "mine", "--paths.runs", tmp_path / "runs", "--runtime.device", "cpu")
    assert told.code == 0, told.err
    run = only_run(tmp_path / "runs")
    assert query(run, "SELECT count(*), round(avg(mean), 1) FROM surprisals") == [(10, 8.3)]
    rows = query(
        run, "SELECT p.position, p.surprisal, s.num_tokens, s.mean FROM peaks p JOIN surprisals s USING (text_id)"
    )
    assert len(rows) == 10
    for position, peak, num_tokens, mean in rows:
        assert 1 <= position <= num_tokens
        assert peak > mean


def test_a_recipe_that_does_not_fit_its_file_would_be_seen(tmp_path: Path) -> None:
    """The control."""
    project = Path(shutil.copytree(TOY, tmp_path / "toy"))
    with pytest.raises(AssertionError, match="the lines around"):
        follow(Block("diff", "src/harness_toy/stages.py", False, ' Entry("gone"),\n+ Entry("peaks"),\n'), project)
