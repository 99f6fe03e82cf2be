"""Running out of memory in a real run: the same rows, the splits on record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.stages import generate, psem
from harness.run import list_runs, read_manifest
from harness.store import Reader
from tests import gravity
from tests.gravity import resolve

FLAGS = {"data.limit": "6", "gravity.num_samples": "5", "runtime.device": "cpu",
         "gravity.stages": "psem,greedy,samples,detect"}  # fmt: skip
MEASURED = {
    "psem": "prompt_id, condition, p_sem, p_word, logprobs",
    "completions": "prompt_id, condition, mode, sample_id, token_ids, text, finish_reason, logprobs, margins",
    "detections": "*",
}


def run(root: Path, **flags: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a fresh run, and of its splits."""
    assert gravity.run(resolve({**FLAGS, "paths.runs": str(root), **flags}, environ={}), resume="new") == 0
    paths = list_runs(root)[0].paths
    with Reader(paths.live, SCHEMA) as reader:
        rows = {t: reader.query(f"SELECT {c} FROM {t} ORDER BY ALL") for t, c in MEASURED.items()}
        rows["splits"] = reader.query("SELECT stage, count(*) AS n FROM batches WHERE status = 'split' GROUP BY stage")
        rows["events"] = reader.query("SELECT * FROM events WHERE kind IN ('oom_split', 'ceiling_split')")
    rows["stages"] = [dict(read_manifest(paths).part("stages"))]
    return rows


def cramped(function: Any, place: int, most: int) -> Any:
    """`function`, out of memory for more than `most` items in its argument number `place`."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        items: Sequence[Any] = args[place]
        if len(items) > most:
            raise MemoryError(f"{len(items)} items")
        return function(*args, **kwargs)

    return limited


def test_a_run_that_runs_out_of_memory_ends_with_the_rows_of_one_that_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(generate, "decode", cramped(generate.decode, 1, 7))
    monkeypatch.setattr(psem, "score_trees", cramped(psem.score_trees, 1, 3))
    split = run(tmp_path / "split")

    assert not whole["splits"], "the control has memory enough"
    assert {r["stage"] for r in split["splits"]} == {"psem", "greedy", "samples"}
    assert len(split["events"]) == sum(r["n"] for r in split["splits"]), "every split is an event"
    assert [c["token_ids"] for c in split["completions"]] == [c["token_ids"] for c in whole["completions"]]
    assert split["detections"] == whole["detections"]
    for a, b in zip(split["psem"], whole["psem"], strict=True):
        # Other batches round differently in float32: a few units in the seventh digit.
        assert a["p_sem"] == pytest.approx(b["p_sem"], rel=1e-5)
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=5e-5)
    assert split["stages"][0]["samples"]["splits"] > 0


@pytest.mark.thorough
def test_the_order_and_number_of_prompts_do_not_decide_a_sample(tmp_path: Path) -> None:
    """Control: another seed gives other samples."""
    few = run(tmp_path / "few", **{"data.limit": "3"})
    many = run(tmp_path / "many", **{"batching.max_tokens": "64"})
    other = run(tmp_path / "other", **{"data.limit": "3", "runtime.seed": "1"})

    def tokens(rows: dict[str, list[dict[str, Any]]]) -> dict[tuple[Any, ...], list[int]]:
        return {
            (r["prompt_id"], r["condition"], r["mode"], r["sample_id"]): r["token_ids"] for r in rows["completions"]
        }

    all_tokens = tokens(many)
    assert tokens(few) == {key: all_tokens[key] for key in tokens(few)}
    assert tokens(other) != tokens(few)
