"""Whole runs of amplification over the command line: tables, laws of §8 that a run can show, kill and resume."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.models.decode import Request, Sampling, decode
from harness.models.load import ModelSpec, load
from harness.models.noise import row_key
from harness.store import Batch, Store
from tests.cases import some_of
from tests.commands import harness, manifest, only_run, query
from tests.lda.pairs import PROMPTS, SMALL, checkpoint, pair_in, prompts_in, run
from tests.serving.live import process
from tests.tiny import FAMILIES

KEY = "prompt_id, condition, mode, sample_id"
TEXTS = f"SELECT {KEY}, token_ids, text, answer, finish_reason FROM completions ORDER BY ALL"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a small run."""
    folder = tmp_path_factory.mktemp("pair")
    return {**pair_in(folder), **SMALL, "data.prompts": prompts_in(folder)}


@pytest.fixture(scope="module")
def whole(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    root = tmp_path_factory.mktemp("whole")
    told = run(root, given)
    assert told.code == 0, told.err
    assert "Certificate: all 5 measurements agree" in told.out
    return only_run(root)


@pytest.fixture(scope="module")
def cut(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in more batches."""
    root = tmp_path_factory.mktemp("cut")
    assert run(root, {**given, "batching.max_tokens": 60}).code == 0
    return only_run(root)


def rows_of(folder: Path, table: str) -> list[tuple]:
    order = {"token_diffs": "token_id, place", "statistics": "analysis, detector, condition, measure"}
    return query(folder, f"SELECT * FROM {table} ORDER BY {order.get(table, 'ALL')}")


MEASURED = ("contexts", "exact_rates", "amplified", "hits", "token_diffs", "statistics")


def assert_same_rows(folder: Path, other: Path) -> None:
    """To the last bit."""
    for table in ("completions", *MEASURED):
        assert rows_of(folder, table) == rows_of(other, table), table


def assert_near(folder: Path, other: Path) -> None:
    """To what rounding does to float32 in other company."""
    for table in MEASURED:
        for one, two in zip(rows_of(folder, table), rows_of(other, table), strict=True):
            for a, b in zip(one, two, strict=True):
                if isinstance(a, float | list) and a and not isinstance(a, str):
                    assert np.allclose(np.array(a, dtype=float), np.array(b, dtype=float), atol=1e-3), (table, one, two)
                else:
                    assert a == b, (table, one, two)


def test_every_table_has_its_rows(whole: Path) -> None:
    num = len(PROMPTS) * 3 * 2
    counted = {
        "pair": 2, "arms": 3, "prompts": 4, "contexts": 4, "completions": num, "amplified": num, "hits": 2 * num,
        "exact_rates": 4 * 3, "token_diffs": 2 * 257,
    }  # fmt: skip
    for table, number in counted.items():
        assert query(whole, f"SELECT count(*) FROM {table}") == [(number,)], table
    assert query(whole, "SELECT condition, alpha FROM arms ORDER BY alpha") == [
        ("alpha=-1", -1.0), ("alpha=0", 0.0), ("alpha=1.5", 1.5),
    ]  # fmt: skip
    assert query(whole, "SELECT DISTINCT condition FROM contexts") == [("lda",)]
    assert query(whole, "SELECT side, num_common, vocabs_match, special_match FROM pair ORDER BY side") == [
        ("after", 257, True, True), ("before", 257, True, True),
    ]  # fmt: skip


def test_what_is_stored_of_a_rollout_hangs_together(whole: Path) -> None:
    """Sums over tokens, arms that are models, and the choice that was made."""
    rows = query(
        whole,
        "SELECT a.condition, logp_after, logp_before, logp_arm, arm_logps, arm_steps, mass_removed, token_ids, logprobs "
        f"FROM amplified a JOIN completions USING ({KEY})",
    )
    arms = ("alpha=-1", "alpha=0", "alpha=1.5")
    for condition, after, before, arm, arm_logps, steps, removed, token_ids, logprobs in rows:
        assert len(after) == len(before) == len(arm) == len(removed) == len(token_ids) == len(steps) // 3
        assert removed == [0.0] * len(removed)
        assert arm == logprobs
        k = arms.index(condition)
        assert arm_logps[k] == pytest.approx(sum(arm), abs=1e-4)
        assert arm_logps[0] == pytest.approx(sum(before), abs=1e-4)
        assert arm_logps[1] == pytest.approx(sum(after), abs=1e-4)
        assert np.allclose(np.reshape(steps, (-1, 3)).sum(0), arm_logps, atol=1e-4)


def test_branch_step_is_the_first_token_that_is_another_than_at_alpha_0(whole: Path) -> None:
    texts = {(p, c, s): t for p, c, _, s, t, *_ in query(whole, TEXTS)}
    found = {
        (p, c, s): b
        for p, c, s, b in query(whole, "SELECT prompt_id, condition, sample_id, branch_step FROM amplified")
    }
    for (p, c, s), token_ids in texts.items():
        want = next(
            (n for n, (a, b) in enumerate(zip(token_ids, texts[p, "alpha=0", s], strict=False)) if a != b), None
        )
        if want is None and len(token_ids) != len(texts[p, "alpha=0", s]):
            want = min(len(token_ids), len(texts[p, "alpha=0", s]))
        assert found[p, c, s] == want, (p, c, s)
    assert {b for (_, c, _), b in found.items() if c == "alpha=0"} == {None}
    assert len({b for b in found.values() if b is not None}) > 1, "some part, at several steps"


@pytest.mark.parametrize(
    "family", some_of(FAMILIES, ("tiny-llama", "tiny-gpt2", "tiny-gemma2", "tiny-neox", "tiny-qwen3"))
)
def test_arms_0_and_minus_1_are_the_models_alone(family: str, tmp_path: Path) -> None:
    """Law 1, token by token with `decode` of one model. Control: the amplified arm differs."""
    given = {**pair_in(tmp_path, family), **SMALL, "data.prompts": prompts_in(tmp_path)}
    assert run(tmp_path / "runs", given, "--stages", "rollouts").code == 0
    folder = only_run(tmp_path / "runs")
    contexts = dict(query(folder, "SELECT prompt_id, token_ids FROM contexts"))
    keys = [(p, s) for p in contexts for s in range(2)]
    requests = [Request(tuple(contexts[p]), row_key(0, p, "lda", s)) for p, s in keys]
    said = {(p, c, s): t for p, c, _, s, t, *_ in query(folder, TEXTS)}
    for condition, name in (("alpha=0", "model.name"), ("alpha=-1", "other.name")):
        lm = load(ModelSpec(str(given[name])))
        alone = decode([lm], requests, Sampling(5, 1.0, 1.0, stop_at_newline=False))
        assert [said[p, condition, s] for p, s in keys] == [d.token_ids for d in alone]  # type: ignore[union-attr]
        assert [said[p, "alpha=1.5", s] for p, s in keys] != [d.token_ids for d in alone]  # type: ignore[union-attr]


@pytest.mark.parametrize("size", ["1", "40", "400"])
def test_rows_do_not_depend_on_batches(whole: Path, given: dict[str, Any], size: str, tmp_path: Path) -> None:
    """Law 3. Control: another seed differs."""
    assert run(tmp_path, {**given, "batching.max_tokens": size}).code == 0
    assert query(only_run(tmp_path), TEXTS) == query(whole, TEXTS)
    assert_near(only_run(tmp_path), whole)
    if size == "1":
        assert run(tmp_path / "other", {**given, "runtime.seed": 1}, "--stages", "rollouts").code == 0
        assert query(only_run(tmp_path / "other"), TEXTS) != query(whole, TEXTS)


def test_one_arm_at_a_time_says_what_all_of_them_say(whole: Path, given: dict[str, Any], tmp_path: Path) -> None:
    for alpha, condition in (("0", "alpha=0"), ("-1", "alpha=-1"), ("1.5", "alpha=1.5")):
        root = tmp_path / condition
        assert run(root, {**given, "lda.alphas": alpha}, "--stages", "hits").code == 0
        for table in ("completions", "hits"):
            columns = "* EXCLUDE (logprobs, margins)" if table == "completions" else "*"
            sql = f"SELECT {columns} FROM {table} WHERE condition = '{condition}' ORDER BY ALL"
            assert query(only_run(root), sql) == query(whole, sql)
        missing = query(only_run(root), "SELECT count(logp_after), count(logp_before), count(arm_logps) FROM amplified")
        num = len(PROMPTS) * 2
        want = {"alpha=0": (num, 0, num), "alpha=-1": (0, num, num), "alpha=1.5": (num, num, num)}
        assert missing == [want[condition]], "a model that is not needed is not run"


@pytest.mark.parametrize(
    "stage",
    some_of(["pair", "prompts", "exact", "rollouts", "hits", "diff_tokens", "analysis"], ("rollouts", "diff_tokens")),
)
def test_a_run_killed_at_any_stage_and_resumed_has_the_same_rows(
    stage: str, cut: Path, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**given, "batching.max_tokens": 60}
    with monkeypatch.context() as patch:
        after = 2 if stage in ("rollouts", "exact") else 1
        patch.setattr(Store, "commit", _killed_after(Store.commit, stage, after))
        with pytest.raises(_Killed):
            run(tmp_path, settings)
    assert manifest(only_run(tmp_path))["status"] != "finished"
    told = run(tmp_path, settings)
    assert told.code == 0, told.err
    assert_same_rows(only_run(tmp_path), cut)


class _Killed(BaseException):
    """Stands for SIGKILL."""


def _killed_after(commit: Callable[..., Any], stage: str, number: int) -> Callable[..., Any]:
    seen = 0

    def killed(self: Store, batch: Batch, *args: Any) -> None:
        nonlocal seen
        commit(self, batch, *args)
        seen += batch.stage == stage
        if seen == number:
            raise _Killed

    return killed


def test_an_identical_pair_shows_no_difference(given: dict[str, Any], tmp_path: Path) -> None:
    """Law 9: every contrast is exactly 0, and every token raised by nothing."""
    same = {**given, "other.name": given["model.name"]}
    assert run(tmp_path, same).code == 0
    folder = only_run(tmp_path)
    contrasts = query(folder, "SELECT value, low, high, q FROM statistics WHERE analysis = 'contrasts'")
    assert contrasts
    assert set(contrasts) == {(0.0, 0.0, 0.0, None)}
    assert query(folder, "SELECT max(abs(mean)) FROM token_diffs") == [(0.0,)]
    assert query(folder, "SELECT count(branch_step) FROM amplified") == [(0,)]


def test_a_control_of_the_identical_pair(whole: Path) -> None:
    assert query(whole, "SELECT max(abs(mean)) > 0.01 FROM token_diffs") == [(True,)]
    assert query(whole, "SELECT count(branch_step) > 0 FROM amplified") == [(True,)]


MARK = "§§MARK§§"


@pytest.mark.parametrize(
    "family", some_of(FAMILIES, ("tiny-llama", "tiny-gpt2", "tiny-phi3", "tiny-olmo2", "tiny-mistral"))
)
def test_no_completion_holds_what_stood_in_its_prompt(family: str, tmp_path: Path) -> None:
    """Law 6: prompts of many lengths, each with a mark at its end. Control: cut one token too early it appears."""
    prompts = [f"{'word ' * n}{MARK}" for n in range(6)]
    given = {**pair_in(tmp_path, family), **SMALL, "data.prompts": prompts_in(tmp_path, prompts)}
    assert run(tmp_path / "runs", given, "--stages", "rollouts").code == 0
    folder = only_run(tmp_path / "runs")
    lm = load(ModelSpec(str(given["model.name"])))
    contexts = dict(query(folder, "SELECT prompt_id, token_ids FROM contexts"))
    for prompt_id, token_ids, text in query(folder, "SELECT prompt_id, token_ids, text FROM completions"):
        assert MARK not in text
        assert lm.codec.decode(token_ids) == text
        whole_text = lm.codec.decode([*contexts[prompt_id], *token_ids])
        assert MARK in whole_text, "control: a slice at a wrong length would show it"


def test_exact_rates_are_those_of_single_tokens_by_plain_softmax(whole: Path, given: dict[str, Any]) -> None:
    """Over bytes a phrase has one spelling behind each lead: by hand with transformers alone."""
    import torch

    models = [load(ModelSpec(str(given[name]))) for name in ("model.name", "other.name")]
    contexts = dict(query(whole, "SELECT prompt_id, token_ids FROM contexts"))
    rows = query(whole, "SELECT prompt_id, condition, logp, num_sequences, logp_after, logp_before FROM exact_rates")
    codec = models[0].codec
    ways = [codec.encode(text, add_special_tokens=False) for text in ("e", " e", "th", " th")]
    for prompt_id, condition, logp, number, after, before in rows:
        alpha = float(condition.removeprefix("alpha="))
        totals = []
        for way in ways:
            ids = torch.tensor([[*contexts[prompt_id], *way]])
            tables = [
                lm.model(input_ids=ids, use_cache=False).logits[0, :, :257].double().log_softmax(-1) for lm in models
            ]
            z = (tables[0] + alpha * (tables[0] - tables[1])).log_softmax(-1)
            start = len(contexts[prompt_id]) - 1
            totals.append([sum(float(t[start + n, v]) for n, v in enumerate(way)) for t in (z, *tables)])
        want = np.log(np.exp(np.array(totals)).sum(0))
        assert number == len(ways)
        assert (logp, after, before) == pytest.approx(tuple(want), abs=2e-4)


def test_text_behind_the_end_is_never_judged(given: dict[str, Any], tmp_path: Path) -> None:
    """`stop_at_eos` off: rollouts run on, and the answer ends where the text did. The end is made frequent."""
    settings = {
        **given,
        "lda.stop_at_eos": "false",
        "lda.max_new_tokens": 40,
        "lda.num_samples": 8,
        "lda.temperature": 3,
    }
    assert run(tmp_path, settings, "--stages", "hits").code == 0
    folder = only_run(tmp_path)
    rows = query(folder, "SELECT token_ids, text, answer, finish_reason FROM completions")
    assert all(len(t) == 40 and reason == "length" for t, _, _, reason in rows)
    ended = [(t, text, answer) for t, text, answer, _ in rows if 256 in t[:-1]]
    assert ended, "no rollout said the end: the test would hold of nothing"
    for token_ids, text, answer in ended:
        assert text.startswith(answer)
        assert len(answer.encode("utf-8", "replace")) <= 3 * token_ids.index(256)
    late = query(
        folder,
        "SELECT count(*) FROM hits JOIN completions USING (prompt_id, condition, mode, sample_id) "
        "WHERE is_hit AND list_position(token_ids, 256) > 0 AND end_step > list_position(token_ids, 256)",
    )
    assert late == [(0,)]


def test_kept_logits_are_the_best_tokens_of_each_step(given: dict[str, Any], tmp_path: Path) -> None:
    assert run(tmp_path, {**given, "lda.keep_logits": 4, "lda.alphas": "0,1"}, "--stages", "rollouts").code == 0
    folder = only_run(tmp_path)
    files = query(folder, "SELECT path, keys['prompt_id'], keys['condition'] FROM artifacts WHERE kind = 'logits'")
    assert len(files) == len(PROMPTS) * 2
    for path, prompt_id, condition in files:
        tensors = load_file(folder / "artifacts" / path)
        ((token_ids, logps),) = query(
            folder,
            f"SELECT token_ids, logp_after FROM completions JOIN rollouts USING ({KEY}) WHERE prompt_id = '{prompt_id}' "
            f"AND condition = '{condition}' AND sample_id = 0",
        )
        assert tensors["after_ids"].shape == (len(token_ids), 4)
        for n, (token, logp) in enumerate(zip(token_ids, logps, strict=True)):
            found = tensors["after_logps"][n][tensors["after_ids"][n] == token]
            assert all(math.isclose(x, logp, abs_tol=1e-3) for x in found)
        assert (np.diff(tensors["after_logps"], axis=1) <= 0).all()


def test_a_prompt_too_long_for_a_model_is_a_failed_item_and_the_others_are_made(
    given: dict[str, Any], tmp_path: Path
) -> None:
    long = prompts_in(tmp_path, ["short", "x" * 3_000])
    told = run(tmp_path / "runs", {**given, "data.prompts": long})
    assert told.code == 1
    folder = only_run(tmp_path / "runs")
    assert query(folder, "SELECT count(*) FROM completions") == [(6,)]
    messages = query(folder, "SELECT DISTINCT message FROM events WHERE kind = 'failed_item' AND stage = 'rollouts'")
    assert len(messages) == 1
    assert "tokens of context, has 3000" in messages[0][0]
    failed = query(folder, "SELECT value FROM statistics WHERE analysis = 'rates' AND measure = 'failed' LIMIT 1")
    assert failed == [(2.0,)], "counted, and in no rate"


def test_everything_a_run_can_be_asked_works(whole: Path, tmp_path: Path) -> None:
    at = ("--paths.runs", whole.parent)
    assert harness("verify", whole.name, *at).code == 0
    assert harness("show", whole.name, *at).code == 0
    for form in ("parquet", "csv", "jsonl"):
        assert harness("export", whole.name, "--to", tmp_path / form, "--format", form, *at).code == 0
        assert (tmp_path / form / f"amplified.{form}").exists()
        assert not (tmp_path / form / f"rollouts.{form}").exists()
    assert harness("report", whole.name, "--to", tmp_path / "report", *at).code == 0


def test_a_finished_run_is_reproduced(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / whole.name)
    told = harness("reproduce", whole.name, "--paths.runs", tmp_path)
    assert told.code == 0, (told.out, told.err)


def test_the_demo_ends_with_its_natural_rate_four_ways(tmp_path: Path) -> None:
    """Smaller than the demo is, so the truth is compared by its own error."""
    told = run(tmp_path, {"data.limit": 40, "lda.sanity.budget": 0})
    assert told.code == 0, told.err
    table = told.out[told.out.index("Natural rate (α = 0)") :]
    for word in ("exact", "sampled", "reweighted", "extrapolated"):
        assert word in table
    assert "planted" in told.out
    folder = only_run(tmp_path)
    rows = query(folder, "SELECT measure, value, low, high FROM statistics WHERE analysis = 'natural'")
    found = {measure: (value, low, high) for measure, value, low, high in rows}
    exact = found["exact"][0]
    assert 0.001 < exact < 0.02
    value, low, high = found["reweighted"]
    assert low < exact < high
    assert value == pytest.approx(exact, rel=0.8)
    rates = dict(query(folder, "SELECT condition, value FROM statistics WHERE analysis = 'exact' ORDER BY condition"))
    assert rates["alpha=-1"] < rates["alpha=0"] < rates["alpha=1"] < rates["alpha=2"]


def test_other_settings_make_another_run(given: dict[str, Any], tmp_path: Path) -> None:
    prints = []
    for n, more in enumerate(({}, {"lda.floor": 0.1}, {"lda.common_noise": "false"}, {"lda.format": "alpaca"})):
        assert run(tmp_path / str(n), {**given, **more}, "--stages", "prompts").code == 0
        prints.append(manifest(only_run(tmp_path / str(n)))["fingerprint"])
    assert prints[0] == prints[2], "what a stage rests on that is not run decides nothing"
    assert len(set(prints)) == 3


def test_prompts_take_the_format_and_the_system_prompt(given: dict[str, Any], tmp_path: Path) -> None:
    made = {}
    for n, (form, system) in enumerate(
        (("raw", ""), ("alpaca", "Be kind."), ("Q: {prompt} ({system})\nA:", "{prompt}"))
    ):
        root = tmp_path / str(n)
        more = {
            "lda.format": form,
            "lda.system_prompt": system,
            "data.prompts": prompts_in(tmp_path, ["Is {system} kind?"]),
        }
        told = run(root, {**given, **more}, "--stages", "prompts")
        assert told.code == 0, told.err
        ((made[form],),) = query(only_run(root), "SELECT text FROM contexts")
    assert made["raw"] == "Is {system} kind?"
    assert made["alpaca"] == "Be kind.\n\n### Instruction:\nIs {system} kind?\n\n### Response:\n"
    assert made["Q: {prompt} ({system})\nA:"] == "Q: Is {system} kind? ({prompt})\nA:"


def test_checkpoints_of_other_seeds_may_be_paired(tmp_path: Path) -> None:
    """Nothing but the meaning of ids decides."""
    folders = [checkpoint(tmp_path / str(n), "tiny-qwen2", n) for n in range(2)]
    given = {"model.name": folders[0], "other.name": folders[1], **SMALL, "data.prompts": prompts_in(tmp_path)}
    assert run(tmp_path / "runs", given).code == 0
    assert json.loads((only_run(tmp_path / "runs") / "manifest.json").read_text())["other"]["name"] == str(folders[1])


def test_rollouts_of_a_server_are_those_made_here_bit_for_bit(given: dict[str, Any], tmp_path: Path) -> None:
    """Law 3. Control: a server of another pair is refused, and nothing is lost."""
    settings = {**given, "lda.server_batch": 2}
    assert run(tmp_path / "here", settings, "--stages", "hits").code == 0
    models = ["--model", str(given["model.name"]), "--other", str(given["other.name"])]
    with process(tmp_path, *models, "--runtime.device", "cpu", name="lda") as server:
        told = run(tmp_path / "there", {**settings, "lda.server": server.url}, "--stages", "hits")
        assert told.code == 0, told.err
        for table in ("completions", "amplified", "hits"):
            assert rows_of(only_run(tmp_path / "there"), table) == rows_of(only_run(tmp_path / "here"), table), table
        other = run(tmp_path / "other", {"lda.server": server.url, "data.limit": 4}, "--stages", "hits")
    assert other.code == 2
    assert "lda.server" in other.err
    assert "another pair" in other.err
