"""The case of `harness bench` for surprisal: one batch, against one text at a time."""

from collections.abc import Sequence

import numpy as np

from harness.experiments.experiment import Case
from harness.experiments.timing import Apart, Grounds, Timed, Way, in_turn
from harness_toy.forward import plain_surprisals, surprisals
from harness_toy.inputs import Inputs


def compare(grounds: Grounds) -> Timed:
    """Both ways on the first texts."""
    lm = grounds.course.lm
    given: Inputs = grounds.prepared.given
    texts = [lm.codec.context(t.text)[0] for t in given.texts[: grounds.num_contexts]]
    texts = [t for t in texts if 2 <= len(t) <= lm.max_positions]
    ways = (
        Way(f"one batch of {len(texts)}", lambda: surprisals(lm, texts)),
        Way("one text at a time", lambda: [plain_surprisals(lm, t) for t in texts], _apart),
    )
    return Timed(tuple(in_turn(grounds.course, "surprisal", ways)))


def _apart(fast: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> Apart:
    return Apart(max(float((np.abs(a - b) / np.abs(a)).max()) for a, b in zip(fast, own, strict=True)), "relative")


CASES = {"surprisal": Case(compare)}
