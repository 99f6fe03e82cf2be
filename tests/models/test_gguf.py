"""GGUF files written on the spot, against the same weights and tokenizer loaded from safetensors; and files that lie."""

import json
import os
import re
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness.cli import main
from harness.errors import EnvironmentFault, ModelError
from harness.models import gguf as ours
from harness.models import plain
from harness.models.load import Codec, ModelSpec, identify, load, load_codec, shared
from tests.commands import harness, only_run, prompt_file, query, refused
from tests.commands import manifest as manifest_of
from tests.tiny import END, build_model

WHY_NOT = "needs the extra: pip install 'harness[gguf]'"
library = pytest.importorskip("gguf", reason=WHY_NOT, exc_type=ImportError)
pytest.importorskip("accelerate", reason=WHY_NOT, exc_type=ImportError)

TEXT = "Answer with exactly one English word. Do not use the word milk.\nQuestion: In 2024, is 13  37 a prime?\nAnswer:"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}<assistant>"
Kind = library.GGMLQuantizationType


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    shared.cache_clear()
    load_codec.cache_clear()
    yield
    shared.cache_clear()
    load_codec.cache_clear()


def bpe(*, digits_apart: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, those of digits and of spaces among them, and one token that ends a text."""
    before: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits_apart:
        before.insert(0, pre_tokenizers.Digits(individual_digits=True))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEXT, "13 137 2024 20", "  13   "] * 20, trainer)
    trained.pre_tokenizer = pre_tokenizers.Sequence(before)
    trained.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END, clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE
    return made


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight in llama.cpp's order: halves of a head's rotation beside each other, not apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "gpt-2",
    more: Callable[[Any], object] = lambda writer: None,
    without: tuple[str, ...] = (),
) -> Path:
    """A Llama-shaped model as llama.cpp's converter writes it; matrices in `kind`, the rest in float32."""
    config, tokenizer = model.config, tokenizer or bpe()
    writer = library.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)  # type: ignore[arg-type]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t == END else 1 for t in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    more(writer)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        value = weight.float().numpy()
        if (part := stem.rsplit(".", 1)[-1]) in heads:
            value = permuted(value, heads[part])
        called = f"{names.get_name(stem)}.{suffix}"
        if called in without:
            continue
        if value.ndim == 2 and kind != "F32":
            writer.add_tensor(called, library.quants.quantize(value, Kind[kind]), raw_dtype=Kind[kind])
        else:
            writer.add_tensor(called, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model with its matrices rounded to blocks and back, written out with the library alone."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if weight.ndim == 2 and kind != "F32":
            part = name.rsplit(".", 2)[-2]
            # a block lies in a row, and the converter moves whole rows: rounding knows nothing of the order
            assert part in heads or weight.shape[1] % 32 == 0
            back = library.quants.dequantize(library.quants.quantize(weight.numpy(), Kind[kind]), Kind[kind])
            weight.copy_(torch.from_numpy(back))
    return model


@pytest.fixture
def tiny() -> PreTrainedModel:
    return build_model("tiny-llama", vocab_size=304, eos_token_id=300)  # as the tokenizer has it


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "Q4_0"])
def test_a_gguf_file_gives_the_logits_of_the_same_weights_from_safetensors(
    tiny: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    file = write(tmp_path / "tiny.gguf", tiny, kind)
    before = plain_logits(tiny)
    folder = tmp_path / "folder"
    rounded(tiny, kind).save_pretrained(folder)
    bpe().save_pretrained(folder)
    packed, whole = load(ModelSpec(str(file))), load(ModelSpec(str(folder)))
    ids = whole.codec.context(TEXT)[0]
    assert packed.codec.context(TEXT) == whole.codec.context(TEXT)
    assert packed.vocabulary.stop_ids == whole.vocabulary.stop_ids
    assert torch.equal(plain.next_logits(packed, ids), plain.next_logits(whole, ids))
    assert packed.model.dtype == torch.float32
    if kind != "F32":  # control: rounding is seen
        assert not torch.allclose(plain_logits(tiny), before)
    types = {kind: 30, "F32": 9} if kind != "F32" else {"F32": 39}
    assert packed.identity.about["tensor_types"] == types
    assert packed.identity.about["dequantised_from"] == ([kind] if kind.startswith("Q") else [])
    told = packed.identity.about["dequantised"]
    assert (kind in told and "float32" in told) if kind.startswith("Q") else told is None


def plain_logits(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return model(input_ids=torch.arange(40, 80)[None], use_cache=False).logits[0]


def test_a_row_in_the_other_order_gives_other_logits(tiny: PreTrainedModel, tmp_path: Path) -> None:
    """Control: the converter's order of rows is undone, and would be seen if it were not."""
    right = load(ModelSpec(str(write(tmp_path / "right.gguf", tiny))))
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = tiny.get_parameter(name)
    weight.copy_(torch.from_numpy(permuted(weight.numpy().copy(), 2)))
    wrong = load(ModelSpec(str(write(tmp_path / "wrong.gguf", tiny))))
    assert not torch.allclose(plain.next_logits(right, [40, 41, 42, 43]), plain.next_logits(wrong, [40, 41, 42, 43]))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_weights_are_dequantised_to_the_dtype_that_is_asked_for(
    tiny: PreTrainedModel, tmp_path: Path, dtype: str
) -> None:
    lm = load(ModelSpec(str(write(tmp_path / "tiny.gguf", tiny, "Q8_0")), dtype=dtype))
    assert {p.dtype for p in lm.model.parameters()} == {getattr(torch, dtype)}
    assert lm.identity.dtype == dtype
    want = library.quants.dequantize(
        library.quants.quantize(tiny.get_parameter("lm_head.weight").numpy(), Kind.Q8_0), Kind.Q8_0
    )
    assert torch.equal(lm.model.get_parameter("lm_head.weight"), torch.from_numpy(want).to(getattr(torch, dtype)))


def test_what_is_taken_from_the_header_is_what_transformers_reads_itself(tiny: PreTrainedModel, tmp_path: Path) -> None:
    """The file is parsed once here, and by transformers' slow reader three times: configuration, tokenizer and weights are
    the same."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = write(tmp_path / "tiny.gguf", tiny, "Q4_1")
    where: dict[str, Any] = {"pretrained_model_name_or_path": tmp_path, "gguf_file": str(file)}
    config = AutoConfig.from_pretrained(**where)
    lm = load(ModelSpec(str(file)))
    values = AutoConfig.for_model(**ours.config_values(ours.read_header(file))).to_dict()
    assert {**values, "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    theirs = model.state_dict()
    assert theirs.keys() == lm.model.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in lm.model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    assert tokenizer.get_vocab() == lm.codec.tokenizer.get_vocab()
    assert tokenizer(TEXT)["input_ids"] == lm.codec.context(TEXT)[0]


def test_the_file_is_parsed_once_and_its_tensor_names_are_made_once(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"header": 0, "names": 0, "slow reader": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return real(*args)

        return call

    monkeypatch.setattr(ours._Bytes, "header", counted("header", ours._Bytes.header))
    monkeypatch.setattr(library, "get_tensor_name_map", counted("names", library.get_tensor_name_map))
    monkeypatch.setattr(library, "GGUFReader", counted("slow reader", library.GGUFReader))
    spec = ModelSpec(str(write(tmp_path / "tiny.gguf", tiny)))
    counts.update(names=0)  # the writer's
    identity = identify(spec)
    load_codec(spec, identity)
    load(spec, identity)
    assert counts == {"header": 1, "names": 1, "slow reader": 0}


@pytest.mark.parametrize(("pre", "apart"), [("smollm", True), ("gpt-2", False)])
def test_text_is_split_as_the_file_says(tiny: PreTrainedModel, tmp_path: Path, pre: str, apart: bool) -> None:
    """SmolLM's vocabulary was learned with every digit alone; transformers' own reader splits all as GPT-2 does."""
    spec = ModelSpec(str(write(tmp_path / "tiny.gguf", tiny, pre=pre)))
    codec = load_codec(spec, identify(spec))
    want, other = (Codec(bpe(digits_apart=d)) for d in (apart, not apart))
    assert codec.context(TEXT) == want.context(TEXT)
    assert codec.context(TEXT) != other.context(TEXT)
    assert codec.decode(codec.encode("Grüße 1999", add_special_tokens=False)) == "Grüße 1999"


def test_the_chat_template_of_the_file_is_used(tiny: PreTrainedModel, tmp_path: Path) -> None:
    spec = ModelSpec(str(write(tmp_path / "tiny.gguf", tiny)))
    assert load_codec(spec, identify(spec)).chat("Hi") == "<user>Hi<|end|><assistant>"


def test_ids_that_end_a_turn_end_an_answer(tiny: PreTrainedModel, tmp_path: Path) -> None:
    file = write(
        tmp_path / "tiny.gguf",
        tiny,
        more=lambda w: (w.add_eot_token_id(7), w.add_uint32("tokenizer.ggml.eom_token_id", 9)),
    )
    end = bpe().convert_tokens_to_ids(END)
    assert isinstance(end, int)
    assert load(ModelSpec(str(file))).vocabulary.stop_ids == {end, 7, 9}
    assert (
        identify(ModelSpec(str(file))).config_sha256
        != identify(ModelSpec(str(write(tmp_path / "b.gguf", tiny)))).config_sha256
    )


def test_the_files_hash_is_the_identity_and_its_place_is_not(tiny: PreTrainedModel, tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", tiny)
    before = identify(ModelSpec(str(file)))
    moved = file.rename(tmp_path / "other.GGUF")
    assert identify(ModelSpec(str(moved))).fingerprint() == before.fingerprint()
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    after = identify(ModelSpec(str(moved)))
    assert after.weights_sha256 != before.weights_sha256
    assert after.tokenizer_sha256 != before.tokenizer_sha256
    assert after.config_sha256 == before.config_sha256
    assert before.weights_sha256 == before.about["weight_files"]["tiny.gguf"]["sha256"]


def test_a_file_that_is_not_the_one_that_was_to_be_there_is_refused(tiny: PreTrainedModel, tmp_path: Path) -> None:
    file = str(write(tmp_path / "tiny.gguf", tiny))
    identify(ModelSpec(file, sha256=identify(ModelSpec(file)).weights_sha256))
    with pytest.raises(ModelError, match=r"is damaged.*harness fetch"):
        identify(ModelSpec(file, sha256="0" * 64))


def test_a_file_of_the_same_name_in_the_working_folder_is_not_taken_for_it(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers looks for the bare name there first."""
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "tiny.gguf", build_model("tiny-llama", seed=1, vocab_size=304))
    wanted = write(tmp_path / "tiny.gguf", tiny)
    monkeypatch.chdir(tmp_path / "here")
    got = load(ModelSpec("../tiny.gguf")).model.get_parameter("lm_head.weight")
    assert torch.equal(got, tiny.get_parameter("lm_head.weight"))
    assert torch.equal(load(ModelSpec(str(wanted))).model.get_parameter("lm_head.weight"), got)


@pytest.mark.thorough
def test_a_run_on_a_gguf_file_says_what_it_measured_and_can_be_measured_again(
    tiny: PreTrainedModel, tmp_path: Path
) -> None:
    file = write(tmp_path / "tiny.gguf", tiny, "Q4_1")
    root = tmp_path / "runs"
    told = harness(
        "run", "--model", file, "--prompts", prompt_file(tmp_path), "--paths.runs", root, "--stages", "psem,greedy"
    )
    assert told.code == 0, told.err
    run = only_run(root)
    kept = manifest_of(run)["model"]
    assert run.name.split("-")[2] == "tiny"
    assert kept["tensor_types"] == {"Q4_1": 30, "F32": 9}
    assert "Q4_1" in kept["dequantised"]
    assert query(run, "SELECT count(*) FROM psem") == [(6,)]
    assert harness("verify", "latest", "--paths.runs", root).code == 0
    told = harness("reproduce", "latest", "--paths.runs", root)
    assert told.code == 0, told.err


# ---- what is refused


def refusal(path: Path, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as raised:
        load(ModelSpec(str(path), revision))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return str(raised.value)


SETTINGS: dict[str, tuple[Callable[[Any], object], str]] = {
    "scaled rotations": (lambda w: w.add_float32("llama.rope.scaling.factor", 8.0), "rope.scaling.factor = 8.0"),
    "rotations scaled by a rule": (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "rope.scaling.type"),
    "a window": (lambda w: w.add_uint32("llama.attention.sliding_window", 16), "attention.sliding_window = 16"),
    "heads of another width": (lambda w: w.add_uint32("llama.attention.key_length", 32), "attention.key_length = 32"),
    "a tensor without a place": (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
    "one of several parts": (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    "an adapter": (lambda w: w.add_string("general.type", "adapter"), "'adapter'"),
    "an end that is no token": (lambda w: w.add_eot_token_id(2**31), "eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_transformers_would_leave_aside_is_refused_by_its_name(
    tiny: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    more, told = SETTINGS[kind]
    assert told in refusal(write(tmp_path / "tiny.gguf", tiny, more=more))


def test_settings_that_say_what_the_configuration_says_are_no_reason(tiny: PreTrainedModel, tmp_path: Path) -> None:
    def more(writer: Any) -> None:
        writer.add_uint32("llama.attention.key_length", 16)
        writer.add_uint32("llama.attention.value_length", 16)
        writer.add_string("llama.rope.scaling.type", "none")

    identify(ModelSpec(str(write(tmp_path / "tiny.gguf", tiny, more=more))))


def test_an_unknown_way_to_split_text_is_refused_by_its_name(tiny: PreTrainedModel, tmp_path: Path) -> None:
    assert "'deepseek-llm'" in refusal(write(tmp_path / "tiny.gguf", tiny, pre="deepseek-llm"))


def test_a_missing_weight_is_refused_by_its_name(tiny: PreTrainedModel, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "tiny.gguf", tiny, without=("blk.2.ffn_up.weight",)))
    assert "model.layers.2.mlp.up_proj.weight" in message


def test_an_architecture_that_transformers_cannot_map_is_refused_by_its_name(tmp_path: Path) -> None:
    writer = library.GGUFWriter(tmp_path / "x.gguf", "rwkv7")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'rwkv7'" in refusal(tmp_path / "x.gguf")


def test_a_revision_is_refused(tiny: PreTrainedModel, tmp_path: Path) -> None:
    assert "only what is on the hub has revisions" in refusal(write(tmp_path / "tiny.gguf", tiny), "main")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, settings: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + body


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")
ARRAY = text("tokenizer.ggml.tokens") + struct.pack("<I", 9)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends at byte 0|empty"),
    "the letters alone": (b"GGUF", "ends at byte 4"),
    "other letters": (b"GGML" + bytes(100), "expected the letters GGUF"),
    "text": (b"Once upon a time there was a model.", "expected the letters GGUF"),
    "a version of long ago": (header(0, 0, version=1), "version 2 or 3, found 1"),
    "the other end first": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "settings without end": (header(0, 2**63), "expected at most"),
    "tensors without end": (header(2**63, 0), "expected at most"),
    "more settings than there are": (header(0, 90_000, LLAMA), "middle of its header"),
    "more tensors than there are": (header(90_000, 1, LLAMA), "middle of its header"),
    "a name longer than the file": (header(0, 1, struct.pack("<Q", 10**6)), "middle of its header"),
    "a name longer than any file": (header(0, 1, struct.pack("<Q", 2**63)), "expected at most"),
    "a setting twice": (header(0, 2, LLAMA + LLAMA), "there twice"),
    "a setting of no known type": (header(0, 1, text("a") + struct.pack("<I", 99)), "unknown type 99"),
    "tokens without end": (header(0, 1, ARRAY + struct.pack("<IQ", 8, 2**62)), "more than 4,000,000"),
    "numbers without end": (header(0, 1, ARRAY + struct.pack("<IQ", 10, 3_999_999)), "middle of its header"),
    "arrays of arrays": (header(0, 1, ARRAY + struct.pack("<IQ", 9, 1) * 1000), "expected numbers or texts"),
    "no architecture": (header(0, 1, text("a") + struct.pack("<II", 4, 1)), "names no architecture"),
    "an architecture that is a number": (header(0, 1, text("general.architecture") + struct.pack("<II", 4, 1)), "names no arch"),
    "a name that is no text": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "not a whole GGUF file"),
    "a tensor of five dimensions": (header(1, 1, LLAMA + tensor("a", 1, 1, 1, 1, 1)), "5 dimensions"),
    "a tensor of four billion dimensions": (header(1, 1, LLAMA + text("a") + struct.pack("<I", 2**32 - 1)), "dimensions"),
    "a tensor of no known type": (header(1, 1, LLAMA + tensor("a", 32, kind=12345)), "unknown type 12345"),
    "a tensor of nothing": (header(1, 1, LLAMA + tensor("a", 0)), "cannot be"),
    "a part of a block": (header(1, 1, LLAMA + tensor("a", 33, kind=3)), "cannot be"),
    "a tensor larger than the file": (header(1, 1, LLAMA + tensor("a", 2**40, 2**20)), "would end at byte"),
    "a tensor outside of the file": (header(1, 1, LLAMA + tensor("a", 8, offset=2**40)), "would end at byte"),
    "a tensor at the last number": (header(1, 1, LLAMA + tensor("a", 8, offset=2**64 - 1)), "would end at byte"),
    "two tensors in one place": (header(2, 1, LLAMA + tensor("a", 8) + tensor("b", 8)) + bytes(200), "overlap"),
    "two tensors of one name": (header(2, 1, LLAMA + tensor("a", 8) + tensor("a", 8, offset=32)) + bytes(200), "same name"),
    "an alignment of nothing": (
        header(1, 2, LLAMA + text("general.alignment") + struct.pack("<II", 4, 0) + tensor("a", 8)), "general.alignment"),
    "an alignment without end": (
        header(1, 2, LLAMA + text("general.alignment") + struct.pack("<II", 4, 2**31) + tensor("a", 8)), "general.alignment"),
    "no settings of the architecture": (header(1, 1, LLAMA + tensor("a", 8)) + bytes(100), "."),
    "layers without end": (
        header(1, 2, LLAMA + text("llama.block_count") + struct.pack("<II", 4, 2**31) + tensor("a", 8)) + bytes(100),
        "num_hidden_layers"),
    "more layers than weights": (
        header(1, 2, LLAMA + text("llama.block_count") + struct.pack("<II", 4, 9_000) + tensor("a", 8)) + bytes(100), "9,000"),
    "a width without end": (
        header(1, 2, LLAMA + text("llama.embedding_length") + struct.pack("<II", 4, 2**31) + tensor("a", 8)) + bytes(100), "."),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies_is_one_line_and_nothing_it_claims_is_allocated(tmp_path: Path, kind: str) -> None:
    content, told = LIES[kind]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    identify(ModelSpec("random:tiny-llama", random_tokenizer=DEMO))  # what is imported once is no part of it
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(told, message), message
    assert peak < 100_000_000, f"{peak:,} bytes"


DEMO = Path(__file__).resolve().parents[2] / "data" / "models" / "demo"


def test_a_file_cut_anywhere_is_one_line(tiny: PreTrainedModel, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", tiny).read_bytes()
    path = tmp_path / "x.gguf"
    for length in [*range(1, len(whole), len(whole) // 40), len(whole) - 40_000]:
        path.write_bytes(whole[:length])
        refusal(path)


def test_any_byte_changed_in_the_header_is_a_model_or_one_line(tiny: PreTrainedModel, tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "whole.gguf", tiny).read_bytes())
    path = tmp_path / "x.gguf"
    for place in range(0, 12_000, 97):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        with suppress(ModelError):  # and nothing else
            identity = identify(ModelSpec(str(path)))
            load_codec(ModelSpec(str(path)), identity)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: None, "No such file"), "a folder": (Path.mkdir, "config.json"), "a pipe": (os.mkfifo, "pipe"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "device"), "a link to itself": (lambda p: p.symlink_to(p), "links"),
    "an empty file": (Path.touch, "ends at byte 0|empty"),
    "ten gigabytes of nothing": (lambda p: (p.touch(), os.truncate(p, 10**10)), "expected the letters GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_one_line_and_exit_2(tmp_path: Path, kind: str) -> None:
    make, told = SPECIAL[kind]
    make(tmp_path / "x.gguf")
    line = refused(harness("run", "--model", tmp_path / "x.gguf", "--paths.runs", tmp_path / "runs"))
    assert re.search(told, line), line
    assert not (tmp_path / "runs").exists()


def test_one_of_several_parts_is_refused_by_its_name(tiny: PreTrainedModel, tmp_path: Path) -> None:
    assert "several parts" in refusal(write(tmp_path / "tiny-00001-of-00003.gguf", tiny))


def test_without_the_packages_one_line_says_what_to_install(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "tiny.gguf", tiny)
    real = ours.importlib.util.find_spec
    monkeypatch.setattr(
        ours, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda n: None if n == "gguf" else real(n)))
    )
    line = refused(harness("run", "--model", file, "--paths.runs", tmp_path / "runs"), code=4)
    assert line.endswith("needs the package gguf: pip install 'harness[gguf]'")
    with pytest.raises(EnvironmentFault):
        identify(ModelSpec(str(file)))
    assert main(["runs", "--paths.runs", str(tmp_path)]) == 0
    assert "harness.cli" in sys.modules
