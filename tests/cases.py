"""Many cases of one law: a few of them for every change, the others for `just test-thorough`, which CI runs as well."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_of(cases: Iterable[Any], quick: int | Iterable[Any]) -> list[Any]:
    """Parameters of a test that takes seconds: `quick` names those that `just test` takes, or counts them from the first."""
    given = list(cases)
    chosen = given[:quick] if isinstance(quick, int) else list(quick)
    assert chosen, "a law without a case"
    assert all(case in given for case in chosen), "no such case"
    return [
        pytest.param(
            *(case if type(case) is tuple else (case,)), marks=[] if case in chosen else [pytest.mark.thorough]
        )
        for case in given
    ]
