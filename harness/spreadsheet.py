"""Text made harmless for a spreadsheet, which computes a cell that looks like a formula. Standard library only.

A model's answer or a prompt of somebody else's may begin with `=`; opened as CSV in Excel or LibreOffice it would run.
Source: OWASP, "CSV Injection".
"""

DANGEROUS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a cell must not begin with: the signs that start a formula, in full width too, as some spreadsheets fold them, and
the control characters that a spreadsheet drops, or takes for the start of another cell."""
_UNSEEN = " \N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\0"
"""What a spreadsheet may drop from the front of a cell, so that what follows begins it."""


def defused(cell: str) -> str:
    """The same text, with an apostrophe in front where a spreadsheet would take it for a formula; any other is unchanged.

    For cells of text alone: a number such as -1.5 is no formula, but the text `-1.5` gets its apostrophe. The writer of
    the file still has to quote separators and quotation marks, or a cell could begin another.
    """
    return f"'{cell}" if cell.lstrip(_UNSEEN).startswith(DANGEROUS) else cell
