"""Experiments by name: the packages beside this file, and what installed packages register.

A package that is installed adds an experiment by the entry-point group `harness.experiments`; its entry gives an object as
`experiment.Experiment` describes it. Nothing is imported until an experiment is asked for.
"""

import inspect
import pkgutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import experiments, settings
from harness.errors import SettingsError, nearest
from harness.settings import Fields, Own, Resolved

if TYPE_CHECKING:  # it knows the store: `harness --help` should not wait for a database
    from harness.experiments.experiment import Experiment
    from harness.run import Manifest

DEFAULT = "gravity"
"""What `harness run` runs without a name."""
GROUP = "harness.experiments"
_FORMER = {"experiment": "gravity"}
"""What its section was called when there was one experiment: older files, variables and manifests say so."""


def names() -> tuple[str, ...]:
    """Every experiment that is installed, the default one first."""
    return tuple(sorted(_places(), key=lambda name: (name != DEFAULT, name)))


def get(name: str) -> "Experiment":
    """The experiment of this name. Raises SettingsError where there is none, or where it cannot be imported."""
    places = _places()
    if name not in places:
        # Who named none was given the default one.
        told = "name an experiment" if name == DEFAULT else f"no experiment {name[:80]!r}{nearest(name, list(places))}"
        raise SettingsError(f"{told}; there are: {', '.join(names())}")
    try:
        return _load(name)
    except SettingsError:
        raise
    except Exception as e:  # an installed package may fail in any way
        raise SettingsError(
            f"experiment {name} ({places[name]}) cannot be imported: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
        ) from e


def of_run(manifest: "Manifest") -> "Experiment":
    """What a run is shown and checked by: its experiment; of one that a service recorded, which needs none, what all such runs
    have. A manifest that names no experiment is older than they are several. Raises SettingsError as `get` does."""
    name = manifest.experiment or DEFAULT
    if manifest.kind is None:
        return get(name)
    from harness.experiments.requests import KIND, Requests

    if manifest.kind != KIND:
        raise SettingsError(
            f"a run of the kind {manifest.kind[:80]!r}, which this harness does not know; use a newer one"
        )
    return Requests(name)


def fields(experiment: str | None, command: str | None = None) -> Fields:
    """The settings of a command about this experiment; about none, the shared ones. `command`: one with a section."""
    own = None if experiment is None else Own(experiment, get(experiment).settings)
    return Fields(own, names(), _FORMER, command)


def current(section: str) -> str:
    """The name that a section has today."""
    return _FORMER.get(section, section)


def resolve(
    flags: Mapping[str, str] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    recorded: Mapping[str, Any] | None = None,
    recorded_by: str = "",
    experiment: str | None = DEFAULT,
    command: str | None = None,
) -> Resolved:
    """The settings of a command about an experiment, see `settings.resolve`. Raises SettingsError."""
    defaults = {} if experiment is None else get(experiment).demo()
    return settings.resolve(flags, config, environ, recorded, recorded_by, fields(experiment, command), defaults)


def served() -> tuple[str, ...]:
    """The experiments that `harness serve` takes; one that cannot be imported is passed over."""
    from harness.experiments.experiment import Served

    return _that_are(Served)


def browsed() -> tuple[str, ...]:
    """As `served`, those whose runs `harness browse` takes."""
    from harness.experiments.experiment import Browsed

    return _that_are(Browsed)


def _that_are(kind: type) -> tuple[str, ...]:
    found = []
    for name in names():
        with suppress(SettingsError):
            found += [name] if isinstance(get(name), kind) else []
    return tuple(found)


def run_command(name: str) -> str:
    """What is typed to run an experiment."""
    return "harness run" if name == DEFAULT else f"harness run {name}"


def folder_outside(name: str) -> Path | None:
    """The folder of an installed experiment's package; None for one that is part of harness, or a single file."""
    if (Path(__file__).parent / name).is_dir():
        return None
    package = next((e.module.partition(".")[0] for e in _entry_points() if e.name == name), None)
    spec = util.find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _places() -> dict[str, str]:
    """Name -> where it comes from. A package beside this file stands before one that is installed under its name."""
    found = {e.name: f"installed by {e.dist.name if e.dist else 'an unnamed package'}" for e in _entry_points()}
    return found | {m.name: "part of harness" for m in pkgutil.iter_modules(experiments.__path__) if m.ispkg}


@lru_cache
def _load(name: str) -> "Experiment":
    if (Path(__file__).parent / name / "__init__.py").exists():
        found = import_module(f"{experiments.__name__}.{name}").EXPERIMENT
    else:
        found = next(e for e in _entry_points() if e.name == name).load()
    from harness.experiments.experiment import Experiment

    parts = [part for part in vars(Experiment) if not part.startswith("_")]
    absent = object()  # looked for, not asked for: a part may import torch when it is made
    missing = [part for part in parts if inspect.getattr_static(found, part, absent) is absent]
    if missing:
        raise SettingsError(
            f"experiment {name} ({_places()[name]}) gives no {', '.join(missing)}; see docs/experiments.md"
        )
    if found.name != name:
        raise SettingsError(f"experiment {name} ({_places()[name]}) calls itself {found.name!r}: expected one name")
    if name in settings.Settings.model_fields or name in settings.COMMANDS:
        raise SettingsError(f"experiment {name} ({_places()[name]}): [{name}] is a section of settings that all share")
    return found


def _entry_points() -> tuple[metadata.EntryPoint, ...]:
    return _entry_points_of(tuple((place, _changed(place)) for place in sys.path))


@lru_cache(maxsize=4)
def _entry_points_of(_: tuple[tuple[str, int], ...]) -> tuple[metadata.EntryPoint, ...]:
    """Looked for once in these folders as they are: a command asks some ten times, and 130 packages take 10 ms each time."""
    return tuple(metadata.entry_points(group=GROUP))


def _changed(place: str) -> int:
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0
