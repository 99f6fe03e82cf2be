"""What an experiment gives the harness: one object, found by its name in the registry (docs/experiments.md).

The commands, the engine and the app know experiments by this face alone. Its module is imported to list it, so it loads
no torch: what needs a model is imported inside the functions that need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from harness.engine import AnyStage
from harness.errors import SettingsError, nearest
from harness.experiments.remarks import Remark
from harness.experiments.weights import Models
from harness.run import Manifest, RunPaths
from harness.settings import ExperimentSettings, Resolved
from harness.store import Reader, Schema

if TYPE_CHECKING:
    from harness.serving.http import Service


@dataclass(frozen=True)
class Entry:
    """A line of an experiment's table of contents: a stage's name, how it is built from what `prepare` made, and the names of
    the stages that must have run before it. One that is optional runs only where it is named."""

    name: str
    build: Callable[[Any], AnyStage]
    needs: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Page:
    """A page of the review app: a script of its own.

    `name` is its address. A relative `file` is of the app's own folder of views. `needs` are tables that must have rows;
    `remarks` are the kinds of remark that concern it.
    """

    name: str
    title: str
    file: Path
    needs: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the report, its cells text. The first `num_words` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    num_words: int = 1
    absent: str = "not measured"
    """What stands in place of a table without rows."""


class Drawn(NamedTuple):
    """A figure of the report: its title, its caption, and how it is drawn (a matplotlib Figure)."""

    title: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Section:
    """A part of the report: paragraphs, figures by name, tables, and HTML that the experiment itself has escaped."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    html: str = ""


@dataclass(frozen=True)
class Report:
    """What an experiment adds to the shared page: headlines, sections and figures by name, its method and its limits."""

    question: str = ""
    """What the run asks, in a sentence."""
    headlines: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    figures: Mapping[str, Drawn] = field(default_factory=dict)
    method: tuple[tuple[str, str], ...] = ()
    """(term, what it means)."""
    method_text: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    style: str = ""
    """CSS of its sections."""


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, checked; no weights were loaded.

    `given` is what the experiment's stages are built from, and nobody else's affair.
    """

    given: Any
    parts: Mapping[str, Any]
    """Its parts of the fingerprint, beside model, stages and seed: everything else that decides results."""
    num_subjects: int
    """What the run's length grows with: prompts, where an experiment has them."""
    about: str
    """In a few words, for the log: `250 texts, in nats`."""
    facts: Mapping[str, Any]
    """For the manifest, by key: `prompts` and `planted`, which every command shows, and any of the experiment's own, which are
    in its `tree`."""
    some: Callable[[int, tuple[str, ...]], Any]
    """`given` of so many of its subjects and these stages, for the estimate."""
    num_contexts: int
    """Texts that each measuring stage forwards, so that a run too small for an estimate has none."""
    warnings: tuple[str, ...] = ()
    """To be logged whenever the run starts or goes on."""
    events: tuple[tuple[str, str], ...] = ()
    """(kind, message) of what the store of a new run says first, such as prompts that were refused."""


class Headline(NamedTuple):
    """A number that two runs are compared by at first sight, with its 95 % interval where it has one."""

    subject: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None


class Case(NamedTuple):
    """A case of `harness bench`: the fast path against plain ones, results compared.

    `run` takes `timing.Grounds` and gives `timing.Timed` (not named here: they know torch). One that is not `usual` is made
    only where it is asked for.
    """

    run: Callable[[Any], Any]
    usual: bool = True


@runtime_checkable
class Experiment(Protocol):
    """One experiment. A part that it does not have is empty."""

    @property
    def name(self) -> str:
        """As in `harness run NAME` and as its section of settings is called."""
        ...

    @property
    def title(self) -> str: ...

    @property
    def sentence(self) -> str:
        """What it measures, for help texts."""
        ...

    @property
    def planted(self) -> str:
        """What is said wherever a run is shown whose manifest has `planted`: its truth is made, and says nothing of the world."""
        ...

    @property
    def other_model(self) -> Literal["none", "optional", "required"]:
        """Whether it takes a second model, `--other`."""
        ...

    @property
    def settings(self) -> type[ExperimentSettings]:
        """Its own section."""
        ...

    @property
    def schema(self) -> Schema:
        """Its tables and views, and facts about them."""
        ...

    @property
    def stages(self) -> tuple[Entry, ...]:
        """Its table of contents, in the order of running."""
        ...

    @property
    def pages(self) -> tuple[Page, ...]:
        """Its pages of the review app."""
        ...

    def demo(self) -> Mapping[str, Any]:
        """Settings by dotted name that `harness run NAME` has where no model is named: bundled, offline, a truth that is
        known. Weaker than whatever the user gives."""
        ...

    def prepare(self, resolved: Resolved, models: Models, stages: tuple[str, ...]) -> Prepared:
        """Check all input and say what the named stages would be run on. Writes nothing, loads no weights.

        Raises HarnessError, one line, for input that cannot be used."""
        ...

    def render(self, reader: Reader, manifest: Manifest) -> list[object]:
        """The headline results for a terminal: lines and Rich tables."""
        ...

    def remarks(self, reader: Reader, manifest: Manifest) -> list[Remark]:
        """What the run should say of itself."""
        ...

    def headlines(self, reader: Reader, manifest: Manifest) -> list[Headline]:
        """The numbers that `harness diff` shows side by side."""
        ...

    def report(self, reader: Reader, manifest: Manifest) -> Report:
        """Its part of the page that `harness report` writes."""
        ...

    def certify(self, prepared: Prepared, num_subjects: int) -> Mapping[str, list[dict[str, Any]]]:
        """The tables that its stage `sanity` reads, for the first subjects, made without a run."""
        ...

    @property
    def benches(self) -> Mapping[str, Case]:
        """Cases of `harness bench` by name."""
        ...


@runtime_checkable
class Served(Protocol):
    """An experiment that can also be asked over HTTP, by `harness serve NAME`."""

    def service(self, resolved: Resolved, models: Models, keys: tuple[bytes, ...]) -> "Service":
        """Its service, the models loaded, ready to be run; a request needs one of `keys` where there are any.

        `resolved` has the section `serve`. Raises HarnessError, one line, for what cannot be served."""
        ...


@runtime_checkable
class Browsed(Protocol):
    """An experiment whose runs can also be looked at on a terminal, by `harness browse RUN`."""

    def browse(self, paths: RunPaths) -> int:
        """Show a run, finished or not, until it is left; the exit code.

        Raises HarnessError, one line, for a run that has nothing to show."""
        ...


class Contents:
    """An experiment's table of contents: which stages a run has, in order."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {e.name: e for e in self._experiment.stages}

    @property
    def optional(self) -> tuple[str, ...]:
        """The stages that run only where they are named."""
        return tuple(name for name, e in self._entries.items() if e.optional)

    def wanted(self, names: Sequence[str]) -> tuple[str, ...]:
        """The stages to run, in order: those named and all they need; none named: all that are not optional."""
        entries, own = self._entries, self._experiment.name
        for name in names:
            if name not in entries:
                raise SettingsError(
                    f"{own}.stages: {own} has no stage {name[:80]!r}{nearest(name, list(entries))}; "
                    f"its stages are {', '.join(entries)}"
                )
        chosen = set(names) or {e.name for e in entries.values() if not e.optional}
        pending = list(chosen)
        while pending:
            for need in entries[pending.pop()].needs:
                if need not in chosen:
                    chosen.add(need)
                    pending.append(need)
        return tuple(name for name in entries if name in chosen)

    def build(self, given: Any, names: Sequence[str]) -> tuple[AnyStage, ...]:
        """The stages with these names, ready to run."""
        return tuple(e.build(given) for name, e in self._entries.items() if name in names)
