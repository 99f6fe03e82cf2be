"""A real instruct model, end to end, against plain transformers: 30 layers, grouped heads, a vocabulary of 49,152, a chat
template and a tokenizer's real merges, which tiny models do not have.

What is measured goes through `harness run`; what it is held against is written out here with transformers alone, which
reads the same file by its own slow way. The model is fetched once into this user's own cache.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from harness.errors import EnvironmentFault
from harness.models.fetch import fetch, path_of
from harness.models.load import load_codec, shared
from harness.settings import PathSettings
from tests.commands import harness, manifest, only_run, prompt_file, query

pytestmark = [pytest.mark.thorough]  # a minute and a half on two cores
REL = 1e-4  # float32 over 30 layers; batches of other sizes add up in another order
PROMPTS = (
    {
        "prompt_id": "milk",
        "category": "idioms",
        "question": "There's no use crying over spilled ____.",
        "target": "milk",
    },
    {"prompt_id": "paris", "category": "facts", "question": "What is the capital of France?", "target": "Paris"},
)
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def file() -> Path:
    why = "needs the extra: pip install 'harness[gguf]'"
    pytest.importorskip("gguf", reason=why, exc_type=ImportError)
    pytest.importorskip("accelerate", reason=why, exc_type=ImportError)
    cache = PathSettings().cache_folder
    try:
        return fetch("smollm2", cache)
    except EnvironmentFault as e:
        pytest.skip(f"the model cannot be had: {e}")


class Plain(NamedTuple):
    """The model and its tokenizer as transformers alone gives them."""

    model: Any
    tokenizer: Any

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """ln P of every next token after every token, [T, V], in float64."""
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)

    def of(self, context: Sequence[int], answer: Sequence[int]) -> list[float]:
        """ln P of each token of an answer."""
        log_p = self.logprobs([*context, *answer])
        return [float(log_p[len(context) - 1 + i, token]) for i, token in enumerate(answer)]

    def spellings(self, word: str) -> set[tuple[int, ...]]:
        """Every way to write the word, with what may follow it, none the start of another."""
        forms = [a + b + c for a in ("", " ") for b in (word, word.lower(), word.capitalize(), word.upper())
                 for c in ("", ".", ",", "!", "?", " ")]  # fmt: skip
        all_of_them = {tuple(self.tokenizer(f)["input_ids"]) for f in forms}
        return {s for s in all_of_them if not any(s[:n] in all_of_them for n in range(1, len(s)))}

    def p_sem(self, context: Sequence[int], word: str) -> float:
        """The sum over all spellings of their probability, a forward each."""
        return math.fsum(math.exp(sum(self.of(context, s))) for s in self.spellings(word))


@pytest.fixture(scope="module")
def plain(file: Path) -> Plain:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": str(file)}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    return Plain(model.requires_grad_(False), AutoTokenizer.from_pretrained(**where))


class Ran(NamedTuple):
    """A finished run of every stage that measures (the certificate is what this file does by itself)."""

    run: Path

    def rows(self, sql: str) -> list[dict[str, Any]]:
        names = [n for (n,) in query(self.run, f"SELECT column_name FROM (DESCRIBE {sql})")]
        return [dict(zip(names, row, strict=True)) for row in query(self.run, sql)]

    def contexts(self) -> dict[tuple[str, str], list[int]]:
        return {(r["prompt_id"], r["condition"]): r["token_ids"] for r in self.rows("SELECT * FROM contexts")}


TARGETS: dict[str, str] = {p["prompt_id"]: p["target"] for p in PROMPTS}


@pytest.fixture(scope="module")
def ran(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("real")
    shared.cache_clear()
    load_codec.cache_clear()
    told = harness(
        "run", "--model", "smollm2", "--prompts", prompt_file(folder, PROMPTS), "--paths.runs", folder / "runs",
        "--stages", "prompts,psem,greedy,samples,detect,mechanism,patching,analysis",
        "--gravity.num_samples", 3, "--gravity.patching.max_prompts", 1,
    )  # fmt: skip
    assert told.code == 0, told.err
    yield Ran(only_run(folder / "runs"))
    shared.cache_clear()


def test_the_run_says_which_model_it_measured(ran: Ran, file: Path) -> None:
    kept = manifest(ran.run)
    assert ran.run.name.split("-")[2] == "smollm2"
    assert (kept["status"], kept["planted"], kept["num_failed"]) == ("finished", False, 0)
    assert kept["model"]["tensor_types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert kept["model"]["num_parameters"] == 134_515_008
    assert "Q4_1" in kept["model"]["dequantised"]
    assert kept["model"]["path"] == str(file) == str(path_of("smollm2", PathSettings().cache_folder))


def test_contexts_are_what_the_tokenizer_makes_of_their_texts(ran: Ran, plain: Plain) -> None:
    rows = ran.rows("SELECT * FROM contexts")
    assert len(rows) == 4
    for row in rows:
        assert row["token_ids"] == plain.tokenizer(row["text"])["input_ids"]


def test_p_sem_is_the_sum_of_plain_forwards(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    for row in ran.rows("SELECT * FROM psem"):
        context, word = contexts[row["prompt_id"], row["condition"]], TARGETS[row["prompt_id"]]
        assert {tuple(s) for s in row["sequences"]} == plain.spellings(word)
        assert row["p_sem"] == pytest.approx(plain.p_sem(context, word), rel=REL)
        log_p = plain.logprobs(context)[-1]
        assert row["top_ids"] == log_p.topk(len(row["top_ids"])).indices.tolist()
        assert row["entropy"] == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=REL)
        # control: one token fewer is another number
        assert row["p_sem"] != pytest.approx(plain.p_sem(context[:-1], word), rel=0.01)


def test_greedy_answers_are_the_likeliest_tokens(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    rows = ran.rows("SELECT * FROM completions WHERE mode = 'greedy'")
    assert len(rows) == 4
    for row in rows:
        ids = list(contexts[row["prompt_id"], row["condition"]])
        for token, logprob in zip(row["token_ids"], row["logprobs"], strict=True):
            log_p = plain.logprobs(ids)[-1]
            assert token == int(log_p.argmax())
            assert logprob == pytest.approx(float(log_p[token]), abs=1e-4)
            ids.append(token)
        assert row["token_ids"][-1] == plain.tokenizer.eos_token_id or "\n" in plain.tokenizer.decode(row["token_ids"][-1:]) or (
            len(row["token_ids"]) == 8)  # fmt: skip


def test_samples_have_the_models_own_probabilities(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    rows = ran.rows("SELECT * FROM completions WHERE mode = 'sample'")
    assert len(rows) == 12
    assert len({tuple(r["token_ids"]) for r in rows}) > 4, "samples differ"
    for row in rows:
        want = plain.of(contexts[row["prompt_id"], row["condition"]], row["token_ids"])
        assert row["logprobs"] == pytest.approx(want, abs=1e-4)


def test_attention_rows_and_residuals_are_what_transformers_returns(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    kept = ran.rows("SELECT * FROM artifacts")
    assert {r["kind"] for r in kept} == {"attention", "resid"}
    for row in kept:
        ids = contexts[row["prompt_id"], row["condition"]]
        found = load_file(ran.run / "artifacts" / row["path"])["first"]
        with torch.inference_mode():
            out = plain.model(input_ids=torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        if row["kind"] == "attention":
            want = torch.stack([layer[0, :, -1] for layer in out.attentions])
            assert want.shape == (30, 9, len(ids))
            assert torch.allclose(found.float(), want, atol=1e-5)
            assert not torch.allclose(found.float(), want.roll(1, dims=1), atol=1e-3), "control: heads in another order"
        else:
            want = torch.stack(
                [state[0, -1] for state in out.hidden_states[:-1]]
            )  # the last one is behind the final norm
            assert torch.allclose(found[:30].float(), want, rtol=1e-3, atol=1e-3)


def test_attention_of_a_layer_is_averaged_over_heads(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    for row in ran.rows("SELECT * FROM attention WHERE step_kind = 'first' AND layer IN (0, 13, 29)"):
        with torch.inference_mode():
            ids = torch.tensor([contexts[row["prompt_id"], row["condition"]]])
            maps = plain.model(input_ids=ids, output_attentions=True).attentions
        want = maps[row["layer"]][0, :, -1].mean(0)
        assert row["mean_row"] == pytest.approx(want.tolist(), abs=1e-5)


def test_the_lens_is_the_final_norm_and_head_on_every_layer(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    for (prompt_id, condition), ids in contexts.items():
        with torch.inference_mode():
            states = plain.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            final = plain.model.lm_head(states[-1][0, -1]).double().log_softmax(-1)
            layers = [
                plain.model.lm_head(plain.model.model.norm(s[0, -1])).double().log_softmax(-1) for s in states[1:-1]
            ]
        starts = sorted({s[0] for s in plain.spellings(TARGETS[prompt_id])})
        rows = ran.rows(
            f"SELECT * FROM lens WHERE prompt_id = '{prompt_id}' AND condition = '{condition}' AND step_kind = 'first' "
            "ORDER BY layer"
        )
        assert len(rows) == 30
        for row, log_p in zip(rows, [*layers, final], strict=True):
            assert row["p_target"] == pytest.approx(float(log_p[starts].exp().sum()), rel=1e-3, abs=1e-9)
            assert row["entropy"] == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-3)
            assert row["kl_final"] == pytest.approx(float((final.exp() * (final - log_p)).sum()), rel=1e-3, abs=1e-4)


@contextmanager
def last_token_from(plain: Plain, layer: int, source: Sequence[int], at: int) -> Iterator[None]:
    """The output of a layer at token `at` is what it was at the last token of `source`."""
    with torch.inference_mode():
        states = plain.model(input_ids=torch.tensor([list(source)]), output_hidden_states=True).hidden_states

    def put(_module: Any, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, at] = states[layer + 1][0, -1]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = plain.model.model.layers[layer].register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def test_a_patched_residual_gives_the_p_sem_of_a_hooked_model(ran: Ran, plain: Plain) -> None:
    contexts = ran.contexts()
    rows = ran.rows("SELECT * FROM patching WHERE patch = 'resid' AND layer IN (3, 14)")
    assert {r["layer"] for r in rows} == {3, 14}
    for row in rows:
        word = TARGETS[row["prompt_id"]]
        source, target = contexts[row["prompt_id"], "baseline"], contexts[row["prompt_id"], "negative"]
        with last_token_from(plain, row["layer"], source, len(target) - 1):
            assert row["p_sem_patched"] == pytest.approx(plain.p_sem(target, word), rel=REL)
        assert row["p_sem_original"] == pytest.approx(plain.p_sem(target, word), rel=REL)
        with last_token_from(plain, row["layer"] + 1, source, len(target) - 1):  # control: one layer late
            assert row["p_sem_patched"] != pytest.approx(plain.p_sem(target, word), rel=0.01)


def test_a_chat_is_written_as_the_models_own_template_does(ran: Ran, plain: Plain, tmp_path: Path) -> None:
    told = harness("run", "--model", "smollm2", "--prompts", prompt_file(tmp_path, PROMPTS), "--paths.runs", tmp_path / "runs",
                   "--stages", "prompts", "--gravity.chat", "true")  # fmt: skip
    assert told.code == 0, told.err
    raw = {(r["prompt_id"], r["condition"]): r["text"] for r in ran.rows("SELECT * FROM contexts")}
    rows = Ran(only_run(tmp_path / "runs")).rows("SELECT * FROM contexts")
    assert len(rows) == 4
    for row in rows:
        message = [{"role": "user", "content": raw[row["prompt_id"], row["condition"]]}]
        want = plain.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert row["text"] == want == CHAT.format(message[0]["content"])
        assert row["token_ids"] == plain.tokenizer(want, add_special_tokens=False)["input_ids"]
        assert plain.tokenizer.convert_ids_to_tokens(row["token_ids"][0]) == "<|im_start|>"


def test_the_run_comes_out_again_and_another_revision_is_refused(ran: Ran) -> None:
    root = ran.run.parent
    told = harness("verify", "latest", "--paths.runs", root)
    assert told.code == 0, told.out + told.err
    told = harness("run", "--model", "smollm2", "--model.revision", "main", "--paths.runs", root)
    assert (told.code, "revision" in told.err) == (2, True)
