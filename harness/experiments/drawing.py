"""How the figures of every experiment look: colours, panels, labels. Knows no experiment and no row."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, which survives the usual kinds of colour blindness.
BLUE, VERMILLION, ORANGE, GREEN, SKY, PURPLE, BLACK = (
    "#0072B2",
    "#D55E00",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#222222",
)
GREY = "#767676"
WIDTH = 9.0
"""Inches: 1,350 pixels at 150 dpi, sharp in a column of 900."""
_COLUMNS = 3


def panels(
    wanted: Sequence[object], reason: str, columns: int = _COLUMNS, height: float = 3.4, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one axes a panel; with none, a figure that says why."""
    if not wanted:
        figure = Figure(figsize=(WIDTH, 1.6), layout="constrained")
        ax = figure.add_subplot()
        ax.set_axis_off()
        say(ax, f"not measured\n({reason})")
        return figure, []
    columns = min(columns, len(wanted))
    rows = -(-len(wanted) // columns)
    # One wide panel would be mostly air; two or three share the width.
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.72 * WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    axes = [*grid.flat]
    for spare in axes[len(wanted) :]:
        spare.remove()
    for ax in axes[: len(wanted)]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes[: len(wanted)]


def say(ax: Axes, text: str) -> None:
    """Grey words in the middle, for what is not there."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, fontsize=10, transform=ax.transAxes)


def label(ax: Axes, title: str, x: str, y: str) -> None:
    """The title of a panel, and what its axes are."""
    ax.set_title(plain(title), fontsize=10, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def plain(text: str) -> str:
    """Names are the user's: a dollar sign in one must not be read as mathematics."""
    return text.replace("$", r"\$")


def legend(ax: Axes, where: Literal["best", "upper left", "lower right"] = "best") -> None:
    """What is drawn in a panel, where anything is."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(
            handles,
            [plain(text) for text in labels],
            fontsize=7.5,
            frameon=True,
            framealpha=0.8,
            edgecolor="none",
            loc=where,
        )
