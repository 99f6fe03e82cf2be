"""Charts of amplification's pages, and how their numbers are told."""


def number_told(value: float) -> str:
    """Three digits behind the point, and of what is too small for them two that count."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def rate_told(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A rate with its 95 % interval where it has one; – where it is not known."""
    if value is None or value != value:
        return "–"
    if low is None or high is None or low != low or high != high:
        return number_told(value)
    return f"{number_told(value)} [{number_told(low)}, {number_told(high)}]"
