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

import torch  # noqa: E402

torch.set_num_threads(1)
