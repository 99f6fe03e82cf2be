"""The experiments' tables of contents. A stage is one file beside this one and one entry here, in the order of running."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from harness.engine import Stage
from harness.errors import SettingsError
from harness.settings import nearest
from harness.stages.analysis import Analysis
from harness.stages.detect import Detect
from harness.stages.generate import Greedy, Samples
from harness.stages.inputs import Inputs
from harness.stages.mechanism import Mechanism
from harness.stages.patching import Patching
from harness.stages.prompts import Prompts
from harness.stages.psem import Psem
from harness.stages.sanity import Sanity
from harness.stages.select import Select
from harness.stages.single_token import SingleToken
from harness.stages.vocabulary import TokenTexts


@runtime_checkable
class Entry(Protocol):
    """What a table of contents knows of a stage: its name, what it needs before it, and how to build it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def optional(self) -> bool: ...

    def build(self, given: Inputs, /) -> Stage: ...


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


def build(experiment: str, given: Inputs) -> tuple[Stage, ...]:
    """The stages of `given.stages`, ready to run."""
    return tuple(e.build(given) for e in EXPERIMENTS[experiment] if e.name in given.stages)
