"""Runs of neurons for the app to show, made up without a model: a finished one, and others at other moments."""

import json
from datetime import UTC, datetime

import pytest

from harness.run import RunPaths
from tests.app.conftest import AHEAD
from tests.neurons import synthetic
from tests.neurons.synthetic import STAGES, Shape

WHOLE = Shape(num_prompts=12, num_layers=3, num_neurons=32, dump_prompts=11, effects=20, curve=(1, 5, 20))
_AT_INFLUENCE = STAGES[: STAGES.index("influence") + 1]
SHAPES: dict[str, Shape] = {
    "whole": WHOLE,
    "no_dump": Shape(num_prompts=8, num_layers=2, num_neurons=16, dump="off", model="nodump"),
    "running": Shape(
        num_prompts=8, num_layers=2, num_neurons=16, is_running=True, stages=_AT_INFLUENCE, model="running"
    ),
    "early": Shape(num_prompts=8, num_layers=2, num_neurons=16, is_running=True, stages=("prompts",), model="early"),
    "peaks": Shape(num_prompts=8, num_layers=2, num_neurons=16, stages=("prompts", "partials", "peaks"), model="peaks"),
    "bfloat16": Shape(num_prompts=8, num_layers=2, num_neurons=16, dump="bfloat16", model="bfloat"),
}
"""Runs by name; the first is the newest."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunPaths]:
    """These runs by name, in a folder of their own."""
    root = tmp_path_factory.mktemp("neurons") / "runs"
    root.mkdir()
    made: dict[str, RunPaths] = {}
    for n, (name, shape) in enumerate(SHAPES.items()):
        paths = made[name] = synthetic.make(root, shape, datetime(2026, 2, 28 - n, tzinfo=UTC))
        if shape.is_running:
            manifest = json.loads(paths.manifest.read_text()) | {"status": "running", "heartbeat": AHEAD, "ended": None}
            paths.manifest.write_text(json.dumps(manifest))
    return made


@pytest.fixture
def opened(runs: dict[str, RunPaths], monkeypatch: pytest.MonkeyPatch) -> dict[str, RunPaths]:
    """The same, their folder being the folder of runs of this process."""
    monkeypatch.setenv("OUTPUT_ROOT", str(runs["whole"].folder.parent))
    return runs
