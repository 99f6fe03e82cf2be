"""What cannot be used is one line that says what was expected, what was found and what to try; exit 2, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import only_run, query, refused, run_folders
from tests.lda.pairs import checkpoint
from tests.neurons.runs import given_in, prompts_in, run


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return given_in(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"data.prompts": "bundled"}, "expected prompts, found none: give --prompts FILE"),
        ({"neurons.text": "hello"}, "expected a text or a prompt file (--prompts), found both"),
        ({"neurons.layers": "0,4"}, "neurons.layers: expected 0 to 3, found 4"),
        ({"neurons.layers": "x"}, "neurons.layers"),
        ({"neurons.positions": "first"}, "expected all, last or sample:N, found 'first'"),
        ({"neurons.cumulative": "1.5"}, "neurons.cumulative"),
        ({"neurons.cumulative": "-0.1"}, "neurons.cumulative"),
        ({"neurons.metrics": ""}, "expected at least one of dla, act_grad, ig, relp, found none"),
        ({"neurons.metrics": "dla,magic"}, "neurons.metrics"),
        ({"neurons.target": "next_token"}, "needs a token, and 6 of 6 prompts name none (the first: 'p0')"),
        ({"neurons.token": "a"}, "found 'a' with target = top1_logit, which chooses its own"),
        ({"neurons.target": "next_token", "neurons.token": "ab"}, "expected one token, 'ab' is 2: 'a' + 'b'; "),
        ({"neurons.target": "next_token", "neurons.token": "ab"}, "neurons.target = sequence"),
        ({"neurons.target": "next_token", "neurons.token": '\\" Austin\\"'}, "leave out backslashes and inner quotes"),
        ({"neurons.target": "next_token", "neurons.token": "id:999"}, "expected an id up to 256, found 999"),
        ({"neurons.contrast": "ab"}, "neurons.contrast: expected one token"),
        ({"neurons.contrast": "a", "neurons.target": "sequence", "neurons.token": "b"}, "found target = sequence"),
        ({"neurons.write_tokens": "ab"}, "neurons.write_tokens: expected one token"),
        ({"neurons.background": "nowhere.txt"}, "neurons.background: nowhere.txt cannot be read"),
        ({"neurons.functional_tokens": "nowhere.txt"}, "neurons.functional_tokens: nowhere.txt cannot be read"),
        ({"neurons.ablate": "half"}, "neurons.ablate"),
        ({"neurons.dump": "int8"}, "neurons.dump"),
        ({"neurons.pack": "0"}, "neurons.pack"),
        ({"neurons.stages": "peeks"}, "neurons has no stage 'peeks'"),
    ],
)
def test_a_setting_that_cannot_be(more: dict[str, Any], told: str, given: dict[str, Any], tmp_path: Path) -> None:
    assert told in refused(run(tmp_path / "runs", {**given, **more}))
    assert not run_folders(tmp_path / "runs")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"id": "a", "text": "one"}, {"id": "a", "text": "two"}], "'a' is already the id of line 1"),
        ([{"id": "a", "text": " "}], "none of the 1 rows passes the rules (empty_field 1)"),
        ([{"id": "a", "text": 5}], "expected text, found the number 5"),
        ([{"id": "a"}], "missing field 'text'"),
    ],
)
def test_a_prompt_file_that_cannot_be(rows: list[dict], told: str, given: dict[str, Any], tmp_path: Path) -> None:
    path = prompts_in(tmp_path, rows)
    assert told in refused(run(tmp_path / "runs", {**given, "data.prompts": path}))


def test_a_json_list_is_read_with_the_places_of_what_is_wrong(given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    path.write_text(json.dumps([{"probe_id": "a", "text": "one two"}, {"probe_id": "b", "text": ""}]))
    told = run(tmp_path / "runs", {**given, "data.prompts": path}, "--stages", "prompts")
    assert told.code == 0
    assert "row 2: empty_field" in told.err
    assert query(only_run(tmp_path / "runs"), "SELECT prompt_id, text FROM prompts") == [("a", "one two")]
    for content, line in (('{"id": "a"}', "expected a list, found an object"), ("[1]", "row 1: expected a JSON object"),
                          ('[{"id": ', "not valid JSON")):  # fmt: skip
        path.write_text(content)
        assert line in refused(run(tmp_path / "other", {**given, "data.prompts": path}))


def test_a_background_that_is_no_text(given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    for content, told in ((b"", "expected a text a line, found none"), (b"\xff\xfe", "expected UTF-8, found 0xff at byte 0"),
                          (b"a\0b", "found a NUL")):  # fmt: skip
        path.write_bytes(content)
        assert told in refused(run(tmp_path / "runs", {**given, "neurons.background": path}))


def test_prompts_that_cannot_be_measured_fail_alone(given: dict[str, Any], tmp_path: Path) -> None:
    """One without a counted token, one without the position; the others are measured, and exit 1 says so."""
    path = prompts_in(
        tmp_path, [{"id": "short", "text": "a"}, {"id": "two", "text": "ab"}, {"id": "long", "text": "abcdef"}]
    )
    told = run(tmp_path / "runs", {**given, "data.prompts": path, "neurons.target_pos": 3})
    assert told.code == 1
    folder = only_run(tmp_path / "runs")
    failed = dict(query(folder, "SELECT item_key, message FROM events WHERE kind = 'failed_item'"))
    assert "no counted token among its 1" in failed["short"]
    assert "position 3 (neurons.target_pos) is outside of its 2 tokens" in failed["two"]
    assert query(folder, "SELECT prompt_id FROM targets") == [("long",)]
    assert query(folder, "SELECT DISTINCT num_prompts FROM neurons") == [(2,)]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model whose neurons are no numbers where one token (`}`) stands: the sum in its LayerNorm overflows."""
    folder = checkpoint(tmp_path / "broken", "tiny-neox", vocab_size=257)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "embed_in" in n)
    table = weights[name].clone()
    table[ord("}") - 33] = 3e38
    save_file({**weights, name: table}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_activations_that_are_no_numbers_fail_their_prompt_alone(
    broken: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    path = prompts_in(tmp_path, [{"id": "bad", "text": "ab}cd"}, {"id": "good", "text": "abcde"}])
    more = {
        "model.name": broken,
        "data.prompts": path,
        "neurons.sanity.num_prompts": 1,
        "paths.cache": tmp_path / "cache",
    }
    told = run(tmp_path / "runs", {**given, **more}, "--stages", "dump,peaks,influence")
    assert told.code == 1, told.err
    folder = only_run(tmp_path / "runs")
    failed = dict(query(folder, "SELECT stage || ' ' || item_key, message FROM events WHERE kind = 'failed_item'"))
    assert "layer 0, position 2" in failed["dump bad"]
    assert any(key.endswith("bad") for key in failed if key.startswith("targets"))
    assert not any("good" in key for key in failed)
    assert query(folder, "SELECT prompt_id, layer, position FROM left_out WHERE stage = 'partials'") == [("bad", 0, 2)]
    assert query(folder, "SELECT DISTINCT num_prompts FROM neurons") == [(1,)]
    assert query(folder, "SELECT DISTINCT prompt_id FROM influence") == [("good",)]


def test_what_float16_cannot_hold_is_told(given: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "loud", vocab_size=257)
    weights = load_file(folder / "model.safetensors")
    loud = {n: w * 1e8 if "up_proj" in n else w / 1e8 if "down_proj" in n else w for n, w in weights.items()}
    save_file(loud, folder / "model.safetensors", {"format": "pt"})
    assert all(bool(torch.isfinite(w).all()) for w in loud.values())
    more = {"model.name": folder, "neurons.dump": "float16"}
    told = run(tmp_path / "runs", {**given, **more}, "--stages", "dump")
    assert told.code == 1
    assert "neurons.dump = bfloat16 goes further" in told.err


def test_a_mixture_of_experts_is_refused_by_name(given: dict[str, Any], tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.tiny import byte_tokenizer

    config = MixtralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, eos_token_id=256, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    told = run(tmp_path / "runs", {**given, "model.name": tmp_path / "moe"})
    assert told.code == 2, told
    assert "mixtral: a block has no single list of MLP neurons (a mixture of experts has none)" in told.err
