"""How far rounding may move a number, by the dtype a model computes in. The only such numbers there are.

The certificate, `diff`, `verify` and `reproduce` judge by `TOLERANCE`; a model that is loaded is held to `LOADED`.
"""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Absolute: on log-probabilities (nats), and whatever has a scale of its own, as a share of it; on probabilities."""

    nats: float
    prob: float


TOLERANCE = {
    "float64": Tolerance(1e-6, 1e-6),
    "float32": Tolerance(5e-5, 1e-5),
    "bfloat16": Tolerance(1e-2, 1e-2),
    "float16": Tolerance(1e-2, 1e-2),
}
"""Float64 is no tighter than 1e-6: the families' own eager softmax and norms, which are the reference, run in float32."""
HALF = ("bfloat16", "float16")
LOADED = {"float64": 1e-5, "float32": 2e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Between a model's parts and what it says itself, as a share of the larger side's greatest magnitude: wide enough for
rounding through every layer, far below any structural mistake. Float64 is held against parts computed in float32, as above."""


def in_words() -> str:
    """`TOLERANCE` as the documentation says it."""
    half = TOLERANCE["bfloat16"]
    assert all(TOLERANCE[dtype] == half for dtype in HALF), "they are told of together"
    return "; ".join(
        [
            *(f"{name} {_sizes(held)}" for name, held in TOLERANCE.items() if name not in HALF),
            f"half precision {_sizes(half)}",
        ]
    )


def _sizes(held: Tolerance) -> str:
    nats, prob = (f"{size:.0e}".replace("e-0", "e-") for size in held)
    return nats if nats == prob else f"{nats} on log-probabilities and {prob} on probabilities"
