"""The experiments' tables of contents. A stage is one file beside this one and one entry here, in the order of running."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from harness.engine import Stage
from harness.errors import SettingsError
from harness.experiments.gravity.certificate import Sanity
from harness.experiments.gravity.inputs import Inputs
from harness.experiments.gravity.stages.analysis import Analysis
from harness.experiments.gravity.stages.detect import Detect
from harness.experiments.gravity.stages.generate import Greedy, Samples
from harness.experiments.gravity.stages.mechanism import Mechanism
from harness.experiments.gravity.stages.patching import Patching
from harness.experiments.gravity.stages.prompts import Prompts
from harness.experiments.gravity.stages.psem import Psem
from harness.experiments.gravity.stages.select import Select
from harness.experiments.gravity.stages.single_token import SingleToken
from harness.experiments.gravity.stages.vocabulary import TokenTexts
from harness.settings import nearest


@runtime_checkable
class Entry(Protocol):
    """What a table of contents knows of a stage: its name, what it needs before it, and how to build it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def optional(self) -> bool: ...

    def build(self, given: Inputs, /) -> Stage[Any]: ...


EXPERIMENTS: dict[str, tuple[Entry, ...]] = {
    "gravity": (
        TokenTexts,
        Prompts,
        Sanity,
        SingleToken,
        Psem,
        Select,
        Greedy,
        Samples,
        Detect,
        Mechanism,
        Patching,
        Analysis,
    ),  # type: ignore[dict-item]
}


def wanted(experiment: str, names: Sequence[str]) -> tuple[str, ...]:
    """The stages to run, in order: those named and all they need; none named: all that are not optional."""
    entries = {e.name: e for e in EXPERIMENTS[experiment]}
    for name in names:
        if name not in entries:
            raise SettingsError(
                f"experiment.stages: {experiment} has no stage {name[:80]!r}{nearest(name, list(entries))}; "
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


def optional(experiment: str) -> tuple[str, ...]:
    """The stages that run only where they are named."""
    return tuple(e.name for e in EXPERIMENTS[experiment] if e.optional)


def build(experiment: str, given: Inputs) -> tuple[Stage[Any], ...]:
    """The stages of `given.stages`, ready to run."""
    return tuple(e.build(given) for e in EXPERIMENTS[experiment] if e.name in given.stages)
