"""How far rounding may move a number, by the dtype a model computes in: the certificate's tolerances, and everybody's."""

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
