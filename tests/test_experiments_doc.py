"""docs/experiments.md says what is so: its code is that of the toy, and who follows its recipes gets what they promise."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.installed import TOY, metadata_of
from tests.test_cli import query

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


def run(name: str, project: Path, root: Path) -> Path:
    """`harness run NAME` with a project installed, in a process of its own; the run."""
    installed = metadata_of(project, project / "installed").parent
    path = os.pathsep.join(map(str, (ROOT, project / "src", installed)))
    command = [sys.executable, "-m", "harness", "run", name, "--paths.runs", str(root), "--runtime.device", "cpu"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (found,) = root.iterdir()
    return found


def test_the_code_is_that_of_the_toy() -> None:
    shown = section("An example")
    assert len(shown) >= 6
    for block in shown:
        assert block.text in (TOY / block.file).read_text("utf-8"), block.file


def test_who_adds_an_experiment_by_the_recipe_has_one(tmp_path: Path) -> None:
    (block,) = section("Adding an experiment")
    lines = block.text.splitlines()
    assert lines[-2:] == ["pip install -e .", "harness run mine"], "what needs an installer, and what comes of it"
    shutil.copytree(TOY, tmp_path / "here" / "tests" / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["bash", "-ec", "\n".join(lines[:-2])], cwd=tmp_path / "here", check=True, timeout=60)
    found = run("mine", tmp_path / "harness-mine", tmp_path / "runs")
    assert query(found, "SELECT count(*), round(avg(mean), 1) FROM surprisals") == [(10, 8.3)]


def test_who_adds_a_stage_by_the_recipe_has_its_rows(tmp_path: Path) -> None:
    project = Path(shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__")))
    recipe = section("Adding a stage")
    assert [b.is_new for b in recipe] == [True, False, False, False]
    for block in recipe:
        follow(block, project)
    found = run("toy", project, tmp_path / "runs")
    rows = query(
        found, "SELECT p.position, p.surprisal, s.num_tokens, s.mean FROM peaks p JOIN surprisals s USING (text_id)"
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
