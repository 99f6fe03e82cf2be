"""The default experiment deleted, its pages too: what is left is a harness, and an installed experiment works in it.

In a copy. The control is a copy in which a command imports what was deleted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.experiments import registry
from tests.installed import TOY, metadata_of

ROOT = Path(__file__).parents[1]
DELETED = registry.DEFAULT
PLACES = ("harness/experiments", "app/views", "app/queries", "app/charts")
COMMANDS = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from harness.cli import main

def told(*args):
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*args, "--paths.runs", sys.argv[1]])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

found = {" ".join(args): told(*args) for args in (
    ("run",), ("doctor",), ("run", "toy", "--runtime.device", "cpu"), ("verify", "latest"), ("report", "latest"),
    ("sanity", "toy", "--runtime.device", "cpu"), ("runs",), ("show", "latest"),
)}
os.environ["OUTPUT_ROOT"] = sys.argv[1]
for page in sys.argv[2:]:
    from streamlit.testing.v1 import AppTest
    test = AppTest.from_file(page, default_timeout=60).run()
    found[page] = {"title": [t.value for t in test.title], "errors": [e.value for e in test.exception]}
print(json.dumps(found))
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the sources without the default experiment, the toy beside it."""
    for folder in ("harness", "app"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for place in PLACES:
        shutil.rmtree(tmp_path / place / DELETED)
    metadata_of(TOY, tmp_path)
    return tmp_path


def run(house: Path, *pages: str) -> dict[str, Any]:
    """What the commands say in a process that has nothing but the copy."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(house), str(TOY / "src"))), "DATA_ROOT": str(ROOT / "data")}
    command = [sys.executable, "-c", COMMANDS, str(house / "runs"), *pages]
    done = subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
def test_without_it_an_installed_experiment_runs_and_the_machinery_asks_for_a_name(house: Path) -> None:
    pages = [str(house / "app" / "views" / "core" / "runs.py"), str(TOY / "src" / "harness_toy" / "page.py"),
             str(house / "app" / "streamlit_app.py")]  # fmt: skip
    found = run(house, *pages)
    others = [p.parent.name for p in (house / "harness" / "experiments").glob("*/__init__.py")]
    told = f"harness: name an experiment; there are: {', '.join(sorted([*others, 'toy']))}\n"
    for command in ("run", "doctor"):
        assert found[command] == {"code": 2, "out": "", "err": told}
    for command in ("run toy --runtime.device cpu", "verify latest", "report latest", "sanity toy --runtime.device cpu",
                    "runs", "show latest"):  # fmt: skip
        assert found[command]["code"] == 0, (command, found[command])
    assert "Surprisal: 8.3" in found["show latest"]["out"]
    assert [found[page] for page in pages] == [
        {"title": [title], "errors": []} for title in ("Runs", "Surprisal", "Runs")
    ]


def test_a_command_that_imports_it_would_be_seen(house: Path) -> None:
    """The control."""
    show = house / "harness" / "commands" / "show.py"
    show.write_text(show.read_text("utf-8") + f"\nimport harness.experiments.{DELETED}\n", "utf-8")
    with pytest.raises(AssertionError, match=f"No module named 'harness.experiments.{DELETED}'"):
        run(house)


def test_nobody_outside_of_it_names_it() -> None:
    """But the registry, which has a default, and knows what its section was called when there was one experiment."""

    def named(path: Path) -> list[str]:
        return re.findall(rf"{DELETED}|p_?sem|\bbaseline\b", path.read_text("utf-8"), re.IGNORECASE)

    files = [p for folder in ("harness", "app") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".j2")]
    inside = [p for p in files if any(p.is_relative_to(ROOT / place / DELETED) for place in PLACES)]
    assert len(inside) > 30
    assert all(map(named, [p for p in inside if p.name == "schema.py"])), "the control"
    outside = {str(p.relative_to(ROOT)): named(p) for p in files if p not in inside}
    assert {path: names for path, names in outside.items() if names} == {
        "harness/experiments/registry.py": [DELETED, DELETED]
    }
