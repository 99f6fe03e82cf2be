"""One table of tolerances: what is said of them is what they are, and nobody keeps numbers of their own."""

import ast
import re
from pathlib import Path

import pytest

from harness import tolerance
from harness.tolerance import HALF, TOLERANCE, Tolerance, in_words

ROOT = Path(__file__).resolve().parent.parent
METHOD = re.sub(r"\s+", " ", (ROOT / "docs" / "method.md").read_text("utf-8"))


def test_the_documentation_says_the_tolerances_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"**Tolerances**: {in_words()}."
    assert told in METHOD
    monkeypatch.setitem(tolerance.TOLERANCE, "float32", Tolerance(5e-6, 1e-5))
    assert f"**Tolerances**: {in_words()}." not in METHOD, "the control"


def test_other_pages_refer_to_that_one() -> None:
    for page in ("reproducing.md", "reliability.md"):
        text = (ROOT / "docs" / page).read_text("utf-8")
        assert not re.search(r"5e-5|5 ?[·×] ?10", text), page
    assert "method.md#certificate" in (ROOT / "docs" / "reproducing.md").read_text("utf-8")
    assert "\n## Certificate\n" in (ROOT / "docs" / "method.md").read_text("utf-8")


def test_half_precision_is_held_alike() -> None:
    assert {TOLERANCE[dtype] for dtype in HALF} == {Tolerance(1e-2, 1e-2)}


def tables_of(source: str) -> list[str]:
    """Names of constants that give a dtype a small number."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        keys = {ast.unparse(key) for key in node.value.keys if key is not None}
        small = any(
            isinstance(n, ast.Constant) and isinstance(n.value, float) and n.value < 0.1 for n in ast.walk(node.value)
        )
        if small and any(re.search("float(16|32|64)", key) for key in keys):
            found.append(ast.unparse(node.targets[0]))
    return found


def test_no_other_module_has_a_table_of_its_own() -> None:
    files = [*(ROOT / "harness").rglob("*.py"), *(ROOT / "app").rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): tables_of(path.read_text("utf-8")) for path in files}
    assert {path: names for path, names in found.items() if names} == {"harness/tolerance.py": ["TOLERANCE", "LOADED"]}
    assert tables_of("_T = {torch.float64: 1e-5, torch.float32: 2e-4}") == ["_T"], "the control"
