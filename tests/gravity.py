"""Short names for the tests of semantic gravity: its settings, its plan, a run of it in this process."""

from typing import Any

from harness.commands import launch
from harness.commands.launch import Plan
from harness.experiments import registry
from harness.experiments.experiment import Experiment
from harness.experiments.gravity.settings import GravitySettings
from harness.experiments.registry import resolve as resolve
from harness.settings import Resolved

EXPERIMENT: Experiment = registry.get("gravity")
FIELDS = registry.fields("gravity")


def own(resolved: Resolved) -> GravitySettings:
    """The section `[gravity]`."""
    return resolved.own(GravitySettings)


def prepare(resolved: Resolved) -> Plan:
    """What would be run."""
    return launch.prepare(resolved, EXPERIMENT)


def run(resolved: Resolved, **how: Any) -> int:
    """A run to its end; the exit code. `how` as in `launch.start`."""
    return launch.start(prepare(resolved), resolved, **how).code
