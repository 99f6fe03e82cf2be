"""Experiments installed for a test: what an installer leaves on the path, without an installer and its network."""

import tomllib
from pathlib import Path

import pytest

from harness.experiments import registry

TOY = Path(__file__).parent / "toy"


def metadata_of(project: Path, to: Path) -> Path:
    """Writes into `to` what pip writes of a project: its name, version and entry points, by which it is found."""
    told = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
    folder = to / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
    folder.mkdir(parents=True)
    lines = [
        line
        for group, entries in told["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {place}" for name, place in entries.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n", "utf-8"
    )
    (folder / "RECORD").write_text("", "utf-8")
    return folder


def install(monkeypatch: pytest.MonkeyPatch, to: Path, project: Path = TOY) -> list[Path]:
    """Has a project's experiments found in this process until the test ends; what has to be on the path for others."""
    metadata_of(project, to)
    on_path = [to, project / "src"]
    for folder in on_path:
        monkeypatch.syspath_prepend(str(folder))
    registry._load.cache_clear()
    return on_path
