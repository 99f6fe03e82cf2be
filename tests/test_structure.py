"""The house rules as tests: who imports whom, who reads the environment, what is explained, what the README promises."""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import grimp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from harness.cli import _parser
from harness.errors import SettingsError
from harness.stats import mean_intervals

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "harness").rglob("*.py"))
README = ROOT / "README.md"
COMMANDS = ("cli", "__main__", "commands")
COMPUTING = ("models", "text", "serving", "experiments", *COMMANDS)

# Left must not reach right, not even by way of others, where True; else it must not import it itself.
FORBIDDEN: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("models", ("store", "engine", "run", "settings", "serving", "experiments", "asking", *COMMANDS), True),
    ("serving", ("store", "engine", "run", "settings", "experiments", "asking", *COMMANDS), True),
    ("serving.queue", ("models",), True),
    ("serving.http", ("models",), True),
    ("engine", ("settings", "asking", *COMPUTING), True),
    ("experiments.gravity.stages", ("store",), False),  # the engine it takes its types from does import the store
    ("experiments", ("asking", *COMMANDS), True),
    ("experiments.registry", ("experiments.gravity",), True),  # found by its name
    ("commands", ("experiments.gravity",), False),
    ("cli", ("experiments.gravity",), False),
    ("engine.executors", ("store", "run", "settings", *COMPUTING), True),
    (
        "engine.executors",
        tuple(f"engine.{name}" for name in ("engine", "estimate", "chain", "plan", "staging", "stop")),
        True,
    ),
    ("store", ("engine", "settings", "asking", *COMPUTING), True),
    ("run", ("store", "engine", "settings", "asking", *COMPUTING), True),
    ("asking", ("engine", *COMPUTING), True),
    ("settings", ("run", "store", "engine", "asking", *COMPUTING), True),
    ("text", ("models", "store", "engine", "run", "settings", "experiments", "stats", *COMMANDS), True),
    ("errors", ("run", "store", "engine", "settings", *COMPUTING), True),
    ("stats", ("run", "store", "engine", "settings", *COMPUTING), True),
)


@lru_cache(maxsize=1)
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("harness", include_external_packages=True, cache_dir=None)


def inside(graph: grimp.ImportGraph, package: str) -> set[str]:
    """A module and all below it."""
    name = f"harness.{package}"
    assert name in graph.modules, f"{name}: a rule of nothing holds"
    return {name} | graph.find_descendants(name)


def broken_arrows(graph: grimp.ImportGraph) -> list[str]:
    found = []
    for left, rights, is_deep in FORBIDDEN:
        for right in rights:
            for a in sorted(inside(graph, left)):
                for b in sorted(inside(graph, right)):
                    chain = (a, b) if graph.direct_import_exists(importer=a, imported=b) else None
                    chain = chain or (graph.find_shortest_chain(importer=a, imported=b) if is_deep else None)
                    found += [" -> ".join(chain)] if chain else []
    return found


def importers(graph: grimp.ImportGraph, package: str) -> set[str]:
    return graph.find_modules_that_directly_import(package) if package in graph.modules else set()


def cycles(graph: grimp.ImportGraph) -> list[str]:
    """The shortest way from each module of harness back to itself, where there is one."""
    found = []
    for module in sorted(m for m in graph.modules if m.startswith("harness")):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            back = graph.find_shortest_chain(importer=imported, imported=module)
            found += [" -> ".join((module, *back))] if back else []
    return found


# ---- imports --------------------------------------------------------------------------------------------------


def test_the_import_graph_holds_what_the_rules_speak_of() -> None:
    """Or the rules below would hold of nothing."""
    graph = imports()
    for left, rights, _ in FORBIDDEN:
        for name in (left, *rights):
            assert inside(graph, name), name
    assert {"torch", "duckdb", "transformers"} <= graph.modules
    assert len(graph.modules) > 40


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("harness", cache_dir=None)
    assert cycles(graph) == []
    graph.add_import(importer="harness.errors", imported="harness.cli")  # control
    assert any("harness.errors -> harness.cli" in one for one in cycles(graph))


def test_no_import_goes_against_the_arrows() -> None:
    assert broken_arrows(imports()) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("models.noise", "store"), ("models.load", "settings"), ("models.attend", "experiments.gravity.stages.psem"),
        ("engine", "experiments.gravity.stages.psem"), ("engine", "text.words"), ("engine", "experiments.registry"),
        ("experiments.gravity.stages.psem", "store"), ("experiments.gravity.stages.psem", "commands.launch"),
        ("experiments.registry", "experiments.gravity"), ("commands.launch", "experiments.gravity.schema"),
        ("cli", "experiments.gravity"), ("engine.executors", "store"), ("engine.executors.base", "engine.plan"),
        ("text.words", "models.noise"), ("run", "models.device"), ("store", "experiments.gravity.schema"),
        ("serving.worker", "settings"), ("serving.queue", "models.rollout"), ("models.rollout", "serving.queue"),
    ],
)  # fmt: skip
def test_an_import_against_the_arrows_would_be_seen(importer: str, imported: str) -> None:
    graph = grimp.build_graph("harness", cache_dir=None)
    graph.add_import(importer=f"harness.{importer}", imported=f"harness.{imported}")
    assert any(f"harness.{importer} -> harness.{imported}" in one for one in broken_arrows(graph))


def test_only_the_store_imports_duckdb() -> None:
    found = importers(imports(), "duckdb")
    assert found
    assert [name for name in found if not name.startswith("harness.store.")] == []


def test_text_and_the_machinery_import_neither_torch_nor_transformers() -> None:
    graph = imports()
    for name in ("text", "settings", "run", "store", "engine", "asking", "errors", "stats", "log"):
        for module in inside(graph, name):
            for heavy in ("torch", "transformers"):
                assert graph.find_shortest_chain(importer=module, imported=heavy) is None, (module, heavy)
    assert "harness.models.load" in importers(graph, "torch")  # control


def test_nothing_in_harness_imports_the_app() -> None:
    graph = imports()
    assert importers(graph, "app") | importers(graph, "streamlit") | importers(graph, "tests") == set()


@lru_cache
def app_imports() -> grimp.ImportGraph:
    return grimp.build_graph("app", include_external_packages=True, cache_dir=None)


def test_the_apps_views_ask_its_queries_and_never_the_store_a_model_or_duckdb() -> None:
    graph = app_imports()
    assert not {"torch", "transformers", "duckdb"} & graph.modules
    for module in graph.modules:
        asked = graph.find_modules_directly_imported_by(module) if module.startswith("app.") else set()
        if module.startswith("app.charts"):
            assert "streamlit" not in asked, f"{module} is data to chart, and draws nothing"
            assert not any(m.startswith("app.queries") for m in asked), module
        assert not (module.startswith("app.queries") and "app.chips" in asked), module
    assert "streamlit" in graph.find_modules_directly_imported_by("app.frame")  # control
    for module in (ROOT / "app").rglob("*.py"):
        asks = set(re.findall(r"^(?:from|import) (harness[\w.]*)", module.read_text("utf-8"), re.MULTILINE))
        known = {"harness.errors", "harness.run", "harness.store", "harness.spreadsheet"}
        known |= {f"harness.experiments{part}" for part in ("", ".experiment", ".registry", ".remarks")}
        if "queries" not in module.parts:
            assert asks <= known, (module, asks - known)
        assert not any(name.startswith("harness.models") for name in asks), module


def test_importing_the_machinery_does_not_load_torch() -> None:
    """By running it: an import by way of a library, or inside a package's __init__, shows here and not in the graph."""
    modules = [
        "harness.cli", "harness.settings", "harness.run", "harness.store", "harness.engine.executors", "harness.engine",
        "harness.asking", "harness.errors", "harness.commands.show", "harness.commands.report", "harness.experiments.registry",
        "harness.experiments.gravity", "harness.experiments.gravity.report", "harness.experiments.gravity.figures",
        "harness.text.words",
        "harness.text.prompts", "harness.serving.http", "harness.serving.queue",
        "harness.experiments.gravity.conditions", "harness.text.detect",
    ]  # fmt: skip
    code = (
        "import importlib, json, sys\n"
        "seen = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    seen[name] = [m for m in ('torch', 'transformers') if m in sys.modules]\n"
        "print(json.dumps(seen))"
    )

    def loaded_after(*names: str) -> dict[str, list[str]]:
        command = [sys.executable, "-c", code, json.dumps(names)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert loaded_after(*modules) == {name: [] for name in modules}
    assert loaded_after("harness.models.noise") == {"harness.models.noise": ["torch"]}  # control


# ---- the environment ------------------------------------------------------------------------------------------


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that name os.environ, os.getenv and the like, however they were imported."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.ImportFrom):
            continue
        names = (
            [node.attr] if isinstance(node, ast.Attribute)
            else [alias.name for alias in node.names] if node.module == "os"
            else []
        )  # fmt: skip
        if {"environ", "environb", "getenv", "getenvb", "putenv"} & set(names):
            yield node.lineno


def test_only_settings_read_the_environment() -> None:
    """Besides: cli hands settings on to libraries, environment describes the machine, load asks whether the hub is shut,
    asking tells its process where the system keeps libraries, fetch tells pip where to keep what is half there."""
    allowed = {"settings.py", "cli.py", "environment.py", "models/load.py", "asking.py", "models/fetch.py"}
    found = {path.relative_to(ROOT / "harness").as_posix() for path in SOURCES if any(environment_reads(parse(path)))}
    assert found <= allowed
    assert "settings.py" in found  # control
    assert set(environment_reads(ast.parse("import os\nx = os.getenv('A')\nfrom os import environ as e"))) == {2, 3}


@lru_cache(maxsize=128)
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- docstrings -----------------------------------------------------------------------------------------------

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_protocol(node: ast.ClassDef) -> bool:
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in bases)


def unexplained(tree: ast.Module, promised: set[str]) -> Iterator[str]:
    """Public classes and functions without a docstring.

    A method may go without where it is one statement, which says itself, or where it keeps the promise of a Protocol.
    """
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef) and not is_protocol(node):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    is_plain = len(method.body) == 1 or method.name in promised
                    if ast.get_docstring(method) is None and not is_plain:
                        yield f"{node.name}.{method.name}"


def test_every_public_function_and_class_says_what_it_gives() -> None:
    protocols = [n for path in SOURCES for n in parse(path).body if isinstance(n, ast.ClassDef) and is_protocol(n)]
    promised = {m.name for p in protocols for m in p.body if isinstance(m, Function)}
    missing = [
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in SOURCES
        for name in unexplained(parse(path), promised)
    ]
    assert missing == []


def test_a_missing_docstring_would_be_seen() -> None:
    code = "def a(): pass\ndef _b(): pass\nclass C:\n  '''c'''\n  def d(self):\n    e = 1\n    return e\n  def f(self): pass\n"
    assert list(unexplained(ast.parse(code), {"g"})) == ["a", "C.d"]
    assert list(unexplained(ast.parse(code), {"d"})) == ["a"]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.stat().st_size and not ast.get_docstring(parse(path))
    ]
    assert silent == []


# ---- what the documents promise -------------------------------------------------------------------------------


def documents() -> list[Path]:
    return [path for path in (README, *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]


def code_lines(markdown: str) -> Iterator[str]:
    """Lines of fenced blocks, those that end in a backslash joined with the next."""
    for block in re.findall(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[ \t]*$", markdown, flags=re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


def harness_arguments(line: str) -> Iterator[list[str]]:
    """The arguments of each harness command on a line of shell, as typed or in a container; other commands are passed over."""
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # prose or code with an apostrophe, which is no shell
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word and set(word) <= set(";|&<>()"):
            if (arguments := _arguments(command)) is not None:
                yield arguments
            command = []
        else:
            command.append(word)


def _arguments(command: list[str]) -> list[str] | None:
    words = list(command)
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    if words and words[0].split("/")[-1] == "harness":
        return words[1:]
    if (
        words[:1]
        and words[0].split("/")[-1].startswith("python")
        and words[1:3] in (["-m", "harness"], ["bootstrap.py", "harness"])
    ):
        return words[3:]
    if words[:1] in (["docker"], ["podman"]) and "run" in words[1:3]:
        for place, word in enumerate(words[3:], 3):
            if re.fullmatch(r"(\S+/)?harness(:[\w.-]+)?", word) and words[place - 1] != "--name":
                return words[place + 1 :]
    return None


def refusal(arguments: list[str]) -> str | None:
    """Why harness would not take these arguments; None when it would."""
    try:
        _, rest = _parser(arguments).parse_known_args(arguments)
    except SettingsError as e:
        return str(e)
    except SystemExit as e:  # --help
        return None if not e.code else f"exit {e.code}"
    return f"left over: {rest}" if rest else None


def command_names() -> list[str]:
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return list(commands.choices)


@pytest.mark.skipif(not README.exists(), reason="the README is not written yet")
def test_every_harness_command_in_the_documents_is_taken_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), arguments)
        for path in documents()
        if path.name
        != "experiments.md"  # it runs an experiment that its reader has just made: test_experiments_doc does too
        for line in code_lines(path.read_text(encoding="utf-8"))
        for arguments in harness_arguments(line)
    ]
    assert any(path == "README.md" and arguments[:1] == ["run"] for path, arguments in found)
    refused = {f"{path}: harness {shlex.join(arguments)}": refusal(arguments) for path, arguments in found}
    assert {line: why for line, why in refused.items() if why} == {}
    capsys.readouterr()


@pytest.mark.skipif(not README.exists(), reason="the README is not written yet")
def test_every_command_is_mentioned_in_the_documents() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents())
    assert [name for name in command_names() if not re.search(rf"\bharness {name}\b", text)] == []


def test_a_command_that_is_not_taken_would_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    text = """# x
```bash
$ harness run --limit 3  # all
HARNESS_DATA__LIMIT=3 uv run harness runs | head && harness show latest
docker run -ti --rm --name harness --gpus all -v "$PWD/runs:/runs" harness:gpu run --model \\
  ID
pip install harness
```
harness prose
```text
harness --help
.venv/bin/python -m harness doctor; python3 bootstrap.py harness bench
```
"""
    found = [arguments for line in code_lines(text) for arguments in harness_arguments(line)]
    assert found == [
        ["run", "--limit", "3"], ["runs"], ["show", "latest"], ["run", "--model", "ID"], ["--help"], ["doctor"], ["bench"]
    ]  # fmt: skip
    assert [refusal(arguments) for arguments in found] == [None] * 7
    for wrong in (["run", "--limt", "3"], ["rnu"], ["show"], ["run", "gravity", "again"], ["export", "latest"]):
        assert refusal(wrong), wrong
    assert {"run", "runs", "show", "export", "doctor", "sanity", "bench"} <= set(command_names())
    capsys.readouterr()


def test_every_module_that_tells_shapes_of_arrays_has_them_checked_at_run_time(pytestconfig: pytest.Config) -> None:
    """The option names packages, so a new one could be forgotten."""
    (given,) = {v for v in pytestconfig.getini("addopts") if v.startswith("--jaxtyping-packages=")}
    checked = given.partition("=")[2].split(",")[:-1]
    told = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "harness").rglob("*.py")
        if "from jaxtyping import" in path.read_text("utf-8")
    ]
    assert len(told) > 10
    assert [name for name in told if not any(f"{name}.".startswith(f"{package}.") for package in checked)] == []
    with pytest.raises(TypeCheckError):  # the control: it is at work
        mean_intervals(np.zeros(4))  # one dimension too few
