"""Which experiments there are, and what each gives to the app: the only module of it that asks the registry.

An experiment gives pages. Beside them may lie `extras.py` with `EXTRAS`: what it gives to the pages of the core and to
the head of its own. Every part of it may be left out.
"""

import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from app.selection import Selection
from harness.errors import SettingsError
from harness.experiments import registry
from harness.experiments.experiment import Experiment, Page
from harness.experiments.registry import DEFAULT, get, names
from harness.experiments.remarks import Remark, of_certificate
from harness.run import Manifest, RunEntry, RunPaths
from harness.store import Reader, Schema

_VIEWS = Path(__file__).parent / "views"


CORE = (
    Page("runs", "Runs", _VIEWS / "core" / "runs.py"),
    Page("sql", "SQL", _VIEWS / "core" / "sql.py"),
)
"""The pages that every run has; the first is where the app opens."""


@dataclass(frozen=True)
class Extras:
    """What an experiment gives beside its pages.

    `pick` draws its filters under the choice of the run. `examples` are questions in SQL by title. `choices`: a column of a
    table, and the shared state that a click on one of its values sets; `of_items` gives such columns for the keys of items
    that events name. `compare` draws two runs' results side by side, the first of them as it is selected.
    """

    pick: Callable[[RunEntry], Selection] = Selection
    examples: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    of_items: Callable[[RunPaths, Sequence[str | None]], pd.DataFrame] | None = None
    compare: Callable[[Selection | None, RunEntry, RunEntry], None] | None = None

    def chosen(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The shared state that a click on a row of a table sets; nothing where the row names nothing."""
        return {key: row[column] for column, key in self.choices.items() if not pd.isna(row.get(column))}


def of_run(manifest: Manifest) -> str:
    """The name of a run's experiment; the default one's where the manifest is older than the question. A run that a service
    recorded is of no experiment with pages, and is called by its kind too."""
    name = manifest.experiment or DEFAULT
    return f"{manifest.kind} {name}" if manifest.kind else name


def problem(name: str) -> str | None:
    """Why an experiment's runs cannot be opened; None where it is installed."""
    try:
        get(name)
    except SettingsError as e:
        return f"its experiment {name!r} is not installed: {e}"
    return None


def problem_of(manifest: Manifest) -> str | None:
    """Why a run cannot be opened; None where it can."""
    if manifest.kind is None:
        return problem(of_run(manifest))
    try:
        _shown_by(manifest)
    except SettingsError as e:
        return str(e)
    return None


def _shown_by(manifest: Manifest) -> Experiment:
    """What has a run's tables and what is said of it. Raises SettingsError where it is not installed."""
    return get(of_run(manifest)) if manifest.kind is None else registry.of_run(manifest)


def schema_of(manifest: Manifest) -> Schema:
    """The tables of a run's experiment. Raises SettingsError where it is not installed."""
    return _shown_by(manifest).schema


def planted_of(manifest: Manifest) -> str:
    """What is said above a run whose truth is planted; empty for any other."""
    return _shown_by(manifest).planted if manifest.planted else ""


def remarks_of(reader: Reader, manifest: Manifest) -> list[Remark]:
    """What a run should say of itself."""
    return [*_shown_by(manifest).remarks(reader, manifest), *of_certificate(reader, manifest)]


def pages_of(name: str) -> tuple[Page, ...]:
    """The pages of an experiment; none where it is not installed."""
    if problem(name) is not None:
        return ()
    return tuple(replace(page, file=_VIEWS / page.file) for page in get(name).pages)


def page_of(file: Path) -> tuple[str, Page]:
    """The page that a file draws, and the name of its experiment. Raises SettingsError where nobody has such a page."""
    for name in names():
        for page in pages_of(name):
            if page.file.resolve() == file.resolve():
                return name, page
    raise SettingsError(f"{file}: no installed experiment has this page")


def extras_of(name: str) -> Extras:
    """What an experiment gives beside its pages."""
    beside = (page.file.resolve().parent / "extras.py" for page in pages_of(name))
    file = next(filter(Path.exists, beside), None)
    if file is None:
        return Extras()
    module = _module_name(file)
    return import_module(module).EXTRAS if module else runpy.run_path(str(file))["EXTRAS"]


def sections(entries: Sequence[RunEntry]) -> dict[str, dict[str, Page]]:
    """What the navigation offers: by title of a section its pages by address. First, without a title, those of the core;
    then those of the experiments that have a run, or of the default one where none has."""
    has_run = {of_run(entry.manifest) for entry in entries if entry.manifest is not None}
    shown = [name for name in names() if name in has_run and problem(name) is None] or list(names()[:1])
    found: dict[str, dict[str, Page]] = {"": {page.name: page for page in CORE}}
    taken = {page.name for page in CORE}
    for name in names():  # those not shown too: an address does not change when a first run of another one begins
        own = {f"{name}-{page.name}" if page.name in taken else page.name: page for page in pages_of(name)}
        taken |= own.keys()
        if name in shown and own:
            title = get(name).title
            found[f"{title} ({name})" if title in found else title] = own
    return found


def _module_name(file: Path) -> str | None:
    """The name by which a file of a package is imported; None for one that lies in no package."""
    parts = [file.stem]
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) if len(parts) > 1 else None
