"""Recordings of the bundled pair without a service: what was asked is made up."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.commands.record import recorded
from harness.experiments import registry
from harness.experiments.weights import Models
from harness.serving.record import Exchange, Recording


def exchange(n: int, **more: Any) -> Exchange:
    found = {"time": datetime(2026, 1, 1, 0, 0, n % 60), "path": "/asked", "status": 200, "request": b"{}",
             "answer": f'{{"n": {n}}}'.encode(), "is_whole": True, "seconds": 0.5, "num_bytes": 10}  # fmt: skip
    return Exchange(**{**found, **more})


@contextmanager
def recording_in(root: Path, argv: Sequence[str] = ("harness", "serve", "lda")) -> Iterator[Recording]:
    """A recording of the bundled pair, without a service."""
    resolved = registry.resolve(
        {"paths.runs": str(root), "serve.record": "true"}, environ={}, experiment="lda", command="serve"
    )
    with recorded(resolved, "lda", Models(resolved.settings, "cpu"), list(argv)) as recording:
        yield recording
