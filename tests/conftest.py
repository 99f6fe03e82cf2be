"""Shared set-up: one torch thread (tiny models are faster so), no hub, quiet libraries."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="harness-tests-state-")  # not a developer's own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: commands that tests start must not fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [n for n in os.environ if n.startswith("HARNESS_")] + ["MODEL_PATH", "DATA_ROOT", "OUTPUT_ROOT"]:
    os.environ.pop(name, None)  # a developer's own settings must not decide a test

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from harness.experiments.gravity import certificate  # noqa: E402
from tests.reference import KeptReference  # noqa: E402

torch.set_num_threads(1)

_CHECKED = (
    "models",
    "neurons",
    "stages",
    "test_stats.py",
    "test_fit.py",
    "test_figures.py",
    "test_launch.py",
    "test_structure.py",
)
"""Tests of what makes arrays, and of whole runs: there their shapes and types are checked at every call. In the others, which
run the same code to look at something else, a quarter of the time went to it."""


@pytest.fixture(scope="module", autouse=True)
def shapes(request: pytest.FixtureRequest) -> None:
    """Whether arrays are checked in this module, fixtures included."""
    here = request.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", here not in _CHECKED)


@pytest.fixture(scope="session", autouse=True)
def reference() -> Iterator[KeptReference]:
    """Certificates of this process take the plain reference from one place, see `tests.reference`."""
    kept = KeptReference()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "plain", kept)
        yield kept
