"""What cannot be used is one line that says what was expected, what was found and what to try; exit 2, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.commands import refused, run_folders
from tests.lda.pairs import PROMPTS, SMALL, checkpoint, pair_in, prompts_in, run
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    return {**pair_in(folder), **SMALL, "data.prompts": prompts_in(folder)}


def detector(**told: Any) -> dict[str, Any]:
    return {"lda.detectors": json.dumps({"d": told})}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lda.alphas": "0,one"}, "lda.alphas"),
        ({"lda.alphas": "0,nan"}, "lda.alphas"),
        ({"lda.alphas": "1e400"}, "lda.alphas"),
        ({"lda.alphas": ""}, "expected at least one arm, found none"),
        ({"lda.alphas": "0,1,1.0"}, "expected each arm once, found 1 twice"),
        ({"lda.alphas": "0,-0"}, "expected each arm once, found 0 twice"),
        ({"lda.floor": "1"}, "lda.floor"),
        ({"lda.floor": "-0.1"}, "lda.floor"),
        ({"lda.top_p": "0"}, "lda.top_p"),
        ({"lda.temperature": "-1"}, "lda.temperature"),
        ({"lda.max_new_tokens": "0"}, "lda.max_new_tokens"),
        ({"lda.format": "chat"}, "needs a tokenizer with a chat template"),
        ({"lda.format": "poem"}, "expected raw, chat, alpaca, or a template of your own with {prompt} in it once"),
        ({"lda.format": "{prompt} {prompt}"}, "with {prompt} in it once"),
        ({"lda.system_prompt": "Be kind."}, "the format 'raw' has no place for it"),
        ({"lda.system_prompt": "Be kind.", "lda.format": "Q {prompt}"}, "has no place for it"),
        (detector(), "expected any_of (phrases) or regex (a pattern), found neither"),
        (detector(any_of=["a"], regex="b"), "found both"),
        (detector(any_of=[" "]), "expected phrases and patterns that are not empty"),
        (detector(regex="a("), "lda.detectors.d: 'a(' is no pattern of RE2: missing ): a("),
        (detector(regex="(a)(?=b)"), "invalid perl operator: (?="),
        (detector(regex="a*"), "fires in the empty text"),
        (detector(any_of=["a"], at_start=["\ufffd"]), "no sequence of tokens begins with"),
        ({"lda.detectors": '{"a|b": {"any_of": ["a"]}}'}, "expected names of detectors"),
        ({"lda.detectors": '{"a": {"any": ["a"]}}'}, "lda.detectors"),
        ({"lda.min_chars": "1000"}, f"none of the {len(PROMPTS)} rows passes the rules (too_short {len(PROMPTS)})"),
        ({"lda.max_chars": "2"}, "too_long"),
        ({"lda.natural_rate": "required", "lda.top_p": "0.9"}, "natural_rate: it cannot be had with top_p 0.9"),
        ({"lda.natural_rate": "required", "lda.floor": "0.1"}, "natural_rate: it cannot be had with floor 0.1"),
        ({"lda.natural_rate": "required", "lda.temperature": "0.7"}, "natural_rate: it cannot be had with temperature 0.7"),
        ({"lda.steges": "x"}, "no such argument --lda.steges"),
        ({"other.name": ""}, "name the second one with --other"),
        ({"other.name": "no/such/folder"}, "no/such/folder"),
        ({"data.prompts": "no.jsonl"}, "no.jsonl"),
    ],
)  # fmt: skip
def test_one_line_and_exit_2(more: dict[str, Any], told: str, given: dict[str, Any], tmp_path: Path) -> None:
    line = refused(run(tmp_path, {**given, **more}))
    assert told in line, line
    assert run_folders(tmp_path) == []


def test_the_same_input_without_the_fault_is_taken(given: dict[str, Any], tmp_path: Path) -> None:
    """The control of all of the above."""
    assert run(tmp_path, {**given, "lda.format": "Q {prompt}"}, "--stages", "prompts").code == 0


def test_a_model_alone_is_told_that_two_are_compared(given: dict[str, Any], tmp_path: Path) -> None:
    line = refused(run(tmp_path, {"model.name": given["model.name"]}))
    assert line == "experiment lda compares two models: name the second one with --other"


def test_models_that_are_no_pair_are_refused_with_the_first_ids_that_differ(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """Law 8: as many ids, and other meanings."""
    other = checkpoint(tmp_path / "other", vocab_size=257)
    told = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocab = told["model"]["vocab"]
    a, b = [token for token, n in vocab.items() if n in (65, 66)]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)), eos_token="<|end|>")
    swapped.save_pretrained(other)
    line = refused(run(tmp_path / "runs", {**given, "other.name": other}))
    assert "expected ids that mean the same token in both, found 2 of 257 that do not (65: " in line
    assert "take two checkpoints of one model" in line


def test_rows_that_are_refused_are_counted_and_the_others_are_used(given: dict[str, Any], tmp_path: Path) -> None:
    prompts = ["one two", "ONE  two", "", "x", {"question": "as gravity has it", "prompt_id": "q", "category": "c"}]
    rows = [p if isinstance(p, dict) else {"question": p} for p in prompts]
    path = prompts_in(tmp_path, rows)
    told = run(tmp_path / "runs", {**given, "data.prompts": path, "lda.min_chars": 2}, "--stages", "prompts")
    assert told.code == 0
    (folder,) = run_folders(tmp_path / "runs")
    facts = json.loads((folder / "manifest.json").read_text())["prompts"]
    assert (facts["read"], facts["used"]) == (2, 2)
    assert facts["rejected"] == {"duplicate": 1, "empty_field": 1, "too_short": 1}
    assert "3 rows rejected" in told.err
