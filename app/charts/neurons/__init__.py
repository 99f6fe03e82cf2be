"""Charts of neurons' pages, and how their numbers are told."""

from app.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY

COLOUR_OF = {
    "dla": BLUE, "act_grad": RED, "ig": GREEN, "relp": PURPLE, "loudest": ORANGE, "matched": SKY, "random": GREY,
}  # fmt: skip
"""Of rankings and controls; the same in every chart."""


def number_told(value: float | None) -> str:
    """Four digits that count, with a sign; – where it is not known."""
    return "–" if value is None or value != value else f"{value:+.4g}"


def size_told(value: float | None) -> str:
    """The same without a sign."""
    return "–" if value is None or value != value else f"{value:.4g}"
