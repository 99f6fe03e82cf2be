"""A finding of `harness doctor` and `harness verify`, and how it is shown: one line each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

from harness.log import print_out

_AT_MOST = 20
"""Lines about one kind of trouble; the rest is counted."""


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `FAIL`, or `skip` where something could not be looked at, with the reason."""

    verdict: Literal["ok", "FAIL", "skip"]
    name: str
    finding: str


def checks_of(name: str, problems: Iterable[str], fine: str) -> Iterator[Check]:
    """A failed check for each of the first problems, or one that holds."""
    found = list(problems)
    yield from (Check("FAIL", name, problem) for problem in found[:_AT_MOST])
    if len(found) > _AT_MOST:
        yield Check("FAIL", name, f"and {len(found) - _AT_MOST} more")
    if not found:
        yield Check("ok", name, fine)


def print_checks(checks: Iterable[Check]) -> list[Check]:
    """Show every check as it is made; all of them."""
    shown = []
    for check in checks:
        # As text, whatever stands in it: a value may look like markup, and its line breaks could forge a line.
        print_out(Text(f"{check.verdict:<4} {check.name:<15} {' '.join(check.finding.split())}"))
        shown.append(check)
    return shown
