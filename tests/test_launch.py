"""Runs as wholes: what decides their results and what must not, and what a kill at any moment leaves behind."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.commands.recognise import open_run
from harness.run import RunPaths
from harness.store import Row
from harness.tolerance import TOLERANCE
from tests.commands import BAN, DATA, ROWS, harness, manifest, only_run, prompt_file, query
from tests.gravity import prepare, resolve

ROOT = DATA.parent
MEASURED = {  # what may not differ at all, and what may by rounding
    "contexts": ("prompt_id, condition, text, token_ids, spans", ""),
    "psem": ("prompt_id, condition, num_sequences, sequences", "p_sem, p_word, paper_p_sem, entropy, logprobs, word_end"),
    "completions": ("prompt_id, condition, mode, sample_id, token_ids, text, answer, finish_reason", "logprobs"),
    "detections": ("prompt_id, condition, mode, sample_id, word_present, word_present_full, format_ok, num_occurrences, "
                   "first_step, char_spans, token_spans", ""),
    "attention": ("prompt_id, condition, step_kind, layer, step", "iar, nf, tmf, pi, iar_token, mean_row"),
    "lens": ("prompt_id, condition, step_kind, layer, step", "p_target, p_emitted, entropy, kl_final"),
    "decomposition": ("prompt_id, condition, step_kind, layer, step", "p_in, p_attn, p_out, attn_contrib, ffn_contrib"),
    "activations": ("prompt_id, condition, layer", "resid_norm"),
    "patching": ("prompt_id, layer, patch, continuation, flipped, num_patched, num_span",
                 "p_sem_original, p_sem_patched, delta_p"),
    "statistics": ("analysis, condition, measured, step_kind, measure, grouping, patch, layer, head, n", "value"),
}  # fmt: skip
KEYS = {"contexts": 2, "psem": 2, "completions": 4, "detections": 4, "attention": 4, "lens": 4, "decomposition": 4,
        "activations": 3, "patching": 3, "statistics": 9}  # fmt: skip


def flat(row: tuple) -> list[float]:
    """All numbers of a row; NULL, which is a span that is not there, as one that no measurement gives."""
    values = [x for value in row for x in (value if isinstance(value, list | tuple) else [value])]
    return [-99.0 if x is None else x for x in values]


def exact_rows(run: Path, table: str) -> list[tuple]:
    """Every column, in the order of the key: two runs that did the same work agree bit for bit."""
    return query(run, f"SELECT * FROM {table} ORDER BY {', '.join(str(i + 1) for i in range(KEYS[table]))}")


def tables(run: Path) -> dict[str, list[tuple]]:
    return {table: exact_rows(run, table) for table in MEASURED}


def compare(a: Path, b: Path, tolerance: float) -> None:
    """Tokens, texts, verdicts and spans are equal; probabilities within the tolerance."""
    for table, (same, near) in MEASURED.items():
        order = ", ".join(str(i + 1) for i in range(KEYS[table]))
        assert query(a, f"SELECT {same} FROM {table} ORDER BY {order}") == query(
            b, f"SELECT {same} FROM {table} ORDER BY {order}"
        )
        if near:
            keys = same.split(", ")[: KEYS[table]]
            sql = f"SELECT {near} FROM {table} ORDER BY {', '.join(keys)}"
            for x, y in zip(query(a, sql), query(b, sql), strict=True):
                assert flat(x) == pytest.approx(flat(y), abs=tolerance, rel=tolerance)


# What must not decide results


@pytest.fixture(scope="module")
def by_budget(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run of five prompts at three batch sizes."""
    runs = {}
    prompts = tmp_path_factory.mktemp("five") / "five.jsonl"
    lines = (DATA / "prompts" / "gravity.jsonl").read_text("utf-8").splitlines(keepends=True)
    prompts.write_text("".join(lines[::220]), "utf-8")
    for budget in (64, 512, 8192):
        root = tmp_path_factory.mktemp(f"budget{budget}")
        told = harness("run", "--prompts", prompts, "--gravity.num_samples", 4, "--paths.runs", root,
                       "--batching.max_tokens", budget, "--gravity.sanity.num_prompts", 1)  # fmt: skip
        assert told.code == 0, told.err
        runs[budget] = only_run(root)
    return runs


def test_batch_size_does_not_decide_results(by_budget: dict[int, Path]) -> None:
    counts = {b: query(run, "SELECT count(*) FROM batches")[0][0] for b, run in by_budget.items()}
    assert counts[64] > counts[512] > counts[8192], "they were cut differently"
    assert len({manifest(run)["fingerprint"] for run in by_budget.values()}) == 1
    for budget in (64, 512):
        compare(by_budget[budget], by_budget[8192], tolerance=1e-5)  # float32 sums in another order
        p = "SELECT p_sem, p_word, paper_p_sem FROM psem ORDER BY prompt_id, condition"
        for x, y in zip(query(by_budget[budget], p), query(by_budget[8192], p), strict=True):
            assert x == pytest.approx(y, abs=TOLERANCE["float32"].prob, rel=0)


def test_the_seed_does_decide_results(by_budget: dict[int, Path], tmp_path: Path) -> None:
    """The control of the test above: the comparison sees another run when it is one, and greedy answers do not change."""
    prompts = manifest(by_budget[512])["prompts"]["path"]
    told = harness(
        "run", "--prompts", prompts, "--gravity.num_samples", 4, "--paths.runs", tmp_path, "--runtime.seed", 1
    )
    assert told.code == 0
    with pytest.raises(AssertionError):
        compare(only_run(tmp_path), by_budget[8192], tolerance=1e-5)
    greedy = "SELECT token_ids FROM completions WHERE mode = 'greedy' ORDER BY prompt_id, condition"
    assert query(only_run(tmp_path), greedy) == query(by_budget[8192], greedy)


def test_a_prompt_measured_alone_gives_what_it_gives_among_others(by_budget: dict[int, Path], tmp_path: Path) -> None:
    whole = by_budget[8192]
    sql = "SELECT prompt_id, category, question, target, style, alternatives FROM prompts ORDER BY prompt_id LIMIT 1"
    row: Row = dict(
        zip(("prompt_id", "category", "question", "target", "style", "alternatives"), query(whole, sql)[0], strict=True)
    )
    told = harness("run", "--prompts", prompt_file(tmp_path, [row]), "--gravity.num_samples", 4,
                   "--paths.runs", tmp_path / "runs")  # fmt: skip
    assert told.code == 0, told.err
    alone = only_run(tmp_path / "runs")
    tokens = "SELECT condition, mode, sample_id, token_ids FROM completions WHERE prompt_id = '{}' ORDER BY 1, 2, 3"
    assert query(alone, tokens.format(row["prompt_id"])) == query(whole, tokens.format(row["prompt_id"]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose model has a chat template, so that every setting can be set; prompts; another data folder."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("data", "elsewhere"):
        shutil.copytree(DATA / "models" / "demo", folder / name / "models" / "demo")
        path = folder / name / "models" / "demo" / "tokenizer_config.json"
        template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    prompt_file(folder)
    prompt_file(folder, ROWS[::-1], "shuffled.jsonl")
    prompt_file(folder, [*ROWS[:2], {**ROWS[2], "question": "Which city is the capital of France?"}], "other.jsonl")
    return folder


def fingerprint(folder: Path, changes: dict[str, str]) -> str:
    flags = {"data.prompts": str(folder / "prompts.jsonl"), "paths.data": str(folder / "data"),
             "gravity.stages": "select,samples,greedy,detect,mechanism,patching,analysis,sanity",
             "gravity.templates": json.dumps({"ban": BAN}),
             "gravity.conditions": "baseline,negative,ban"} | changes  # fmt: skip
    return prepare(resolve({k: v.replace("HERE", str(folder)) for k, v in flags.items()}, None, {})).fingerprint


DECIDES = {
    "model.name": "random:tiny-llama", "model.dtype": "float64", "data.prompts": "HERE/other.jsonl", "data.limit": "2",
    "gravity.conditions": "baseline,negative", "gravity.chat": "true", "gravity.stages": "select,greedy",
    "gravity.num_samples": "3", "gravity.sample_conditions": "negative", "gravity.temperature": "0.5",
    "gravity.top_p": "1", "gravity.max_new_tokens_greedy": "3", "gravity.max_new_tokens_samples": "3",
    "gravity.stop_at_newline": "false", "gravity.select.min_p0": "0.1", "gravity.select.per_bin": "5",
    "gravity.select.max_categories": "1", "runtime.seed": "1", "gravity.stored.prompts": "a",
    "gravity.stored.max_per_category": "3", "gravity.patching.condition": "ban",
    "gravity.patching.min_p0": "0.5", "gravity.patching.max_prompts": "4", "gravity.sanity.num_prompts": "1",
}  # fmt: skip
DECIDES_NOTHING = {
    "batching.max_tokens": "64", "batching.reserve_gb": "1", "runtime.device": "cpu", "runtime.threads": "1",
    "runtime.executor": "inline", "runtime.reserve_disk_gb": "0", "paths.runs": "elsewhere", "paths.hf_home": "cache",
    "paths.cache": "kept",
    "paths.data": "HERE/elsewhere", "data.prompts": "HERE/shuffled.jsonl", "data.limit": "3",
    "gravity.stages": "sanity,analysis,patching,mechanism,detect,samples,select",
    "gravity.sample_conditions": "baseline,negative,ban",
    "gravity.templates": json.dumps({"unused": "{question}", "ban": BAN}), "model.dtype": "float32",
    "gravity.sanity.budget": "unlimited",
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(workplace: Path) -> str:
    """The fingerprint without a change."""
    return fingerprint(workplace, {})


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_results_changes_the_fingerprint(workplace: Path, usual: str, name: str) -> None:
    assert fingerprint(workplace, {name: DECIDES[name]}) != usual


@pytest.mark.parametrize("name", DECIDES_NOTHING)
def test_what_decides_nothing_leaves_the_fingerprint(workplace: Path, usual: str, name: str) -> None:
    assert fingerprint(workplace, {name: DECIDES_NOTHING[name]}) == usual


def test_changed_weights_or_tokenizer_files_change_the_fingerprint(workplace: Path, usual: str, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        data = tmp_path / name
        shutil.copytree(workplace / "data", data)
        path = data / "models" / "demo" / name
        if name == "config.json":
            path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        elif name == "model.safetensors":
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        else:
            path.write_bytes(path.read_bytes() + b" ")
        assert fingerprint(workplace, {"paths.data": str(data)}) != usual, name


def test_every_setting_is_known_to_decide_results_or_not() -> None:
    """A new setting must be put in one of the two tables above (or here, where a local model has no use for it)."""
    from tests.gravity import FIELDS

    of_hub = {"model.revision", "model.trust_remote_code"}
    of_other = {name for name in FIELDS.names if name.startswith("other.")}  # refused: this experiment takes one model
    assert of_other == {f"other.{name}" for name in ("name", "revision", "dtype", "trust_remote_code")}
    assert {*DECIDES, *DECIDES_NOTHING} | of_hub | of_other == set(FIELDS.names)


# What a kill leaves behind


def start(root: Path, *args: object) -> subprocess.Popen[str]:
    """A real `harness run` on one thread."""
    command = [sys.executable, "-m", "harness", "run", "--paths.runs", root, "--runtime.threads", 1, *args]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HARNESS_")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], root: Path, text: str, seconds: float = 300) -> bool:
    """Until the log of a run under `root` says `text`; False when the process ended first."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < end, f"no {text!r} in the log"
        if any(text in log.read_text() for log in root.glob("*/logs/run.log")):
            return True
        time.sleep(0.01)
    return False


SMALL_BATCHES = ("--gravity.sanity.num_prompts", 1, "--limit", 6, "--batching.max_tokens", 64)


@pytest.mark.thorough
def test_a_run_killed_at_random_moments_ends_with_the_rows_of_one_that_was_not(tmp_path: Path) -> None:
    root, kills = tmp_path / "killed", 0
    rng = random.Random(0)
    # The first kill may come before anything is done, on a busy machine; the second not before a stage is.
    for moments in (("(new)",), ("continued", " done: ")):
        process = start(root, *SMALL_BATCHES)
        if all(wait_for(process, root, moment) for moment in moments):
            time.sleep(rng.uniform(0.0, 0.6))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        process.communicate()
    killed = only_run(root)  # never a second run: the same command goes on with the first
    assert kills == 2
    assert manifest(killed)["status"] == "running", "it had no time to say otherwise"
    done = "SELECT stage, status, num_items, num_done FROM stages"
    before = query(killed, "SELECT count(*) FROM batches WHERE status = 'done'")[0][0]
    assert harness("show", "latest", "--paths.runs", root).code == 0
    with open_run(RunPaths(killed)) as reader:  # as it is shown: from a copy, with what was committed and not published
        committed = reader.query("SELECT count(*) AS num FROM batches WHERE status = 'done'")[0]["num"]
    assert committed >= max(before, 1)

    told = harness("run", "--paths.runs", root, *SMALL_BATCHES)
    assert told.code == 0, told.err
    assert "continued" in told.err
    assert only_run(root) == killed
    assert len(manifest(killed)["resumed"]) >= 2
    whole = harness("run", "--paths.runs", tmp_path / "whole", *SMALL_BATCHES)
    assert whole.code == 0, whole.err
    uninterrupted = only_run(tmp_path / "whole")
    assert tables(killed) == tables(uninterrupted)
    assert query(killed, done + " ORDER BY 1") == query(uninterrupted, done + " ORDER BY 1")
    plan = "SELECT stage, batch_id, keys, status FROM batches ORDER BY 1, 2"
    assert query(killed, plan) == query(uninterrupted, plan), "no batch was computed twice"
    assert query(killed, "SELECT count(*) FROM events WHERE kind = 'resume'")[0][0] >= 2


def test_a_running_run_is_left_alone_by_others_and_a_signal_ends_it_with_exit_3_within_10_s(tmp_path: Path) -> None:
    """Ten seconds of its own computing: what it waits for a busy machine is not its fault."""
    args = ("--limit", 120, "--gravity.num_samples", 64, "--batching.max_tokens", 256, "--stages", "psem,samples")
    process = start(tmp_path, *args)
    assert wait_for(process, tmp_path, "psem done")
    told = harness("run", "--paths.runs", tmp_path, *args)
    assert told.code == 2
    assert "is being computed by another process" in told.err
    shown = harness("show", "latest", "--paths.runs", tmp_path)
    assert shown.code == 0, shown.err
    assert "running" in shown.out
    assert process.poll() is None, "neither command stopped it"

    ended, own = resource.getrusage(resource.RUSAGE_CHILDREN), psutil.Process(process.pid).cpu_times()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    whole = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = (whole.ru_utime + whole.ru_stime) - (ended.ru_utime + ended.ru_stime)
    assert used_s - (own.user + own.system) < 10
    assert process.returncode == 3, err
    assert "Traceback" not in err
    run = only_run(tmp_path)
    assert re.search(rf"type the same command again to go on with {run.name}", err)
    found = manifest(run)
    assert found["status"] == "interrupted"
    assert "signal" in found["reason"]
    assert dict(query(run, "SELECT stage, status FROM stages"))["psem"] == "done"
    done, total = query(run, "SELECT num_done, num_items FROM stages WHERE stage = 'samples'")[0]
    assert 0 < done < total, "stopped on the way"
    assert query(run, "SELECT count(*) FROM completions") == [(done,)], "whole batches, published"
    assert "interrupted" in harness("runs", "--paths.runs", tmp_path).out
    other = harness("run", "--paths.runs", tmp_path, *args, "--runtime.seed", 5, "--resume", run.name)
    assert other.code == 2
    assert "seed: was 0, now 5" in other.err
