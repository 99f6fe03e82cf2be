"""The pressure bins: where they begin and what they are called. Imports nothing, so that a page of the app may ask."""

from bisect import bisect_right

EDGES = (0.2, 0.4, 0.6, 0.8)
BIN_NAMES = ("[0, .2)", "[.2, .4)", "[.4, .6)", "[.6, .8)", "[.8, 1]")


def bin_of(p0: float) -> int:
    """The pressure bin of a P0: [0,.2) [.2,.4) [.4,.6) [.6,.8) [.8,1]."""
    return bisect_right(EDGES, p0)
