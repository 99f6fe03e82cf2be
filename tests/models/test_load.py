"""Checkpoints saved on the spot: what a name stands for, what is refused, and that nothing is applied in silence."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedModel

from harness.errors import ModelError
from harness.models import plain
from harness.models.decode import Request, Sampling, decode
from harness.models.load import LM, ModelSpec, identify, load, load_codec, shared
from tests.tiny import END, FAMILIES, build_model, byte_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40
HUB_ID = "someone/tiny"


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    shared.cache_clear()
    load_codec.cache_clear()
    yield
    shared.cache_clear()
    load_codec.cache_clear()


def save(
    folder: Path, family: str = "tiny-llama", seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A checkpoint folder as people publish them, and the model in it."""
    model = build_model(family, seed, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, without a network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, source: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """`source` as the hub's client lays it out: blobs named by their sha256, a snapshot of links, a ref."""
    repo = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for file in source.iterdir():
        blob = blobs / sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    if ref:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def logits(lm: LM, ids: range = range(40, 80)) -> torch.Tensor:
    return plain.next_logits(lm, list(ids))


def refusal(spec: ModelSpec) -> str:
    """The one line a model is refused with."""
    with pytest.raises(ModelError) as raised:
        load(spec)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


# ---- where a model comes from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_gives_the_logits_of_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family)
    lm = load(ModelSpec(str(tmp_path)))
    ids = torch.arange(40, 80)[None]
    model.set_attn_implementation("eager")
    assert torch.equal(logits(lm), model(input_ids=ids, use_cache=False).logits[0])
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.identity.revision == "local"
    assert lm.vocabulary.stop_ids == {256}
    assert lm.codec.decode(lm.codec.encode("Grüße", add_special_tokens=False)) == "Grüße"


def test_another_checkpoint_gives_other_logits(tmp_path: Path) -> None:
    """Control: the weights on disk decide."""
    save(tmp_path / "a")
    save(tmp_path / "b", seed=1)
    a, b = (load(ModelSpec(str(tmp_path / n))) for n in "ab")
    assert float((logits(a) - logits(b)).abs().max()) > 0.1


def test_a_hub_id_is_found_in_the_cache_offline_and_resolved_to_its_commit(checkpoint: Path, hub_cache: Path) -> None:
    put_in_cache(hub_cache, checkpoint)
    local = identify(ModelSpec(str(checkpoint)))
    for revision in (None, "main", COMMIT):
        found = identify(ModelSpec(HUB_ID, revision))
        assert found.revision == COMMIT
        assert {**found.fingerprint(), "revision": "local"} == local.fingerprint()  # hashes do not depend on the place
    assert torch.equal(logits(load(ModelSpec(HUB_ID))), logits(load(ModelSpec(str(checkpoint)))))


def test_a_pinned_revision_is_the_one_that_is_loaded(tmp_path: Path, hub_cache: Path) -> None:
    save(tmp_path / "new")
    save(tmp_path / "old", seed=1)
    put_in_cache(hub_cache, tmp_path / "new")
    put_in_cache(hub_cache, tmp_path / "old", OLDER, ref="v1")
    new, old = ModelSpec(HUB_ID), ModelSpec(HUB_ID, OLDER)
    assert identify(ModelSpec(HUB_ID, "v1")) == replace(identify(old), name=HUB_ID)
    assert identify(old).revision == OLDER
    assert identify(old).weights_sha256 != identify(new).weights_sha256
    assert torch.equal(logits(load(old)), logits(load(ModelSpec(str(tmp_path / "old")))))
    assert not torch.equal(logits(load(new)), logits(load(old)))


@pytest.mark.parametrize(
    ("name", "revision"), [(HUB_ID, "no-such"), (HUB_ID, "a" * 40), ("someone/else", None), ("gpt2", None)]
)
def test_what_is_not_in_the_cache_offline_is_one_clear_line(
    name: str, revision: str | None, checkpoint: Path, hub_cache: Path
) -> None:
    put_in_cache(hub_cache, checkpoint)
    message = refusal(ModelSpec(name, revision))
    assert repr(name) in message
    assert "cannot be reached" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder-here", "a b", "a/b/c", ""])
def test_a_name_that_can_be_no_model_is_refused(name: str) -> None:
    message = refusal(ModelSpec(name))
    assert message.startswith("model.name: no folder")
    assert "random:<shape>" in message


def test_a_random_shape_is_the_same_each_time_and_leaves_torchs_random_numbers_alone(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec("random:tiny-qwen2", random_tokenizer=tmp_path)
    torch.manual_seed(3)
    first = load(spec)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(logits(first), logits(load(spec)))
    assert identify(spec) == identify(spec)
    assert identify(spec) != identify(replace(spec, name="random:tiny-qwen3"))
    assert identify(spec).path is None
    assert load_codec(spec, identify(spec)).encode("a", add_special_tokens=False) == [64]


def test_an_unknown_shape_is_refused_with_those_there_are(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    message = refusal(ModelSpec("random:huge", random_tokenizer=tmp_path))
    assert message.startswith("model.name: no shape 'huge'")
    assert "tiny-llama" in message
    for nowhere in (None, tmp_path / "nowhere"):
        assert "needs a tokenizer to borrow" in refusal(ModelSpec("random:tiny-llama", random_tokenizer=nowhere))


# ---- identity -------------------------------------------------------------------------------------------------


def test_a_changed_weight_byte_changes_the_hash_and_another_place_does_not(checkpoint: Path, tmp_path: Path) -> None:
    before = identify(ModelSpec(str(checkpoint)))
    moved = checkpoint.rename(tmp_path / "elsewhere")
    after = identify(ModelSpec(str(moved)))
    assert after.fingerprint() == before.fingerprint()
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = identify(ModelSpec(str(moved)))
    assert changed.weights_sha256 != before.weights_sha256
    assert {**changed.fingerprint(), "weights_sha256": ""} == {**before.fingerprint(), "weights_sha256": ""}


@pytest.mark.parametrize(
    ("file", "key", "part"),
    [("config.json", "rms_norm_eps", "config_sha256"), ("tokenizer_config.json", "extra", "tokenizer_sha256")],
)
def test_each_file_that_decides_results_changes_its_own_part(checkpoint: Path, file: str, key: str, part: str) -> None:
    before = identify(ModelSpec(str(checkpoint))).fingerprint()
    edit_json(checkpoint / file, **{key: 12345.0})
    after = identify(ModelSpec(str(checkpoint))).fingerprint()
    assert {k for k in before if before[k] != after[k]} == {part}


def test_who_wrote_a_config_does_not_change_what_it_is(checkpoint: Path) -> None:
    before = identify(ModelSpec(str(checkpoint)))
    edit_json(checkpoint / "config.json", transformers_version="0.0.1", _name_or_path="/home/someone/else")
    (checkpoint / "README.md").write_text("Not part of the model.")
    assert identify(ModelSpec(str(checkpoint))) == before


def test_sharded_weights_are_hashed_and_loaded_whole(tmp_path: Path) -> None:
    model = build_model("tiny-llama")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    identity = identify(ModelSpec(str(tmp_path)))
    assert sorted(identity.about["weight_files"]) == [s.name for s in shards]
    model.set_attn_implementation("eager")
    want = model(input_ids=torch.arange(40, 80)[None], use_cache=False).logits[0]
    assert torch.equal(logits(load(ModelSpec(str(tmp_path)))), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_auto_is_the_checkpoints_own(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    auto = ModelSpec(str(tmp_path))
    assert identify(auto).dtype == name
    assert load(auto).model.dtype == dtype
    wide = replace(auto, dtype="float32")
    assert load(wide).model.dtype == torch.float32
    assert (identify(wide) == identify(auto)) == (name == "float32")  # a dtype is part of what a model is
    assert identify(wide).weights_sha256 == identify(auto).weights_sha256


def test_a_model_can_be_loaded_in_float64(checkpoint: Path) -> None:
    """What a disagreement in half precision is repeated in."""
    lm = load(ModelSpec(str(checkpoint), dtype="float64"))
    assert lm.model.dtype == torch.float64
    assert torch.allclose(logits(lm).float(), logits(load(ModelSpec(str(checkpoint)))), atol=5e-5)


def test_an_unknown_dtype_is_refused_with_those_there_are(checkpoint: Path) -> None:
    message = refusal(ModelSpec(str(checkpoint), dtype="int8"))
    assert message == "model.dtype: expected one of auto, float32, bfloat16, float16, float64; found 'int8'"


def test_two_models_are_shared_at_once(tmp_path: Path) -> None:
    specs = []
    for seed in range(3):
        save(tmp_path / str(seed), seed=seed)
        specs.append(ModelSpec(str(tmp_path / str(seed))))
    a, b = shared(specs[0]), shared(specs[1])
    assert a is not b
    assert shared(specs[0]) is a
    assert shared(specs[1]) is b
    assert not torch.equal(logits(a), logits(b))
    shared(specs[2])  # control: a third takes the place of the one not used for longest
    assert shared(specs[1]) is b
    assert shared(specs[0]) is not a


# ---- what is refused ------------------------------------------------------------------------------------------


def test_a_folder_without_a_config_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "expected a model's config.json, found none" in refusal(ModelSpec(str(checkpoint)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_a_config_that_cannot_be_used_is_one_line(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert str(checkpoint) in refusal(ModelSpec(str(checkpoint)))


def test_a_checkpoint_without_safetensors_is_refused_and_its_pickle_not_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "found no weight file" in refusal(ModelSpec(str(checkpoint)))
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    message = refusal(ModelSpec(str(checkpoint)))
    assert "expected *.safetensors weights, found only pytorch_model.bin" in message
    assert "convert" in message


def test_a_pickle_beside_safetensors_is_not_read(checkpoint: Path) -> None:
    want = logits(load(ModelSpec(str(checkpoint))))
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert torch.equal(logits(load(ModelSpec(str(checkpoint)))), want)


def test_weights_that_are_cut_off_are_refused(checkpoint: Path) -> None:
    """As an interrupted copy leaves them."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(checkpoint) in refusal(ModelSpec(str(checkpoint)))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    build_model("tiny-llama").save_pretrained(tmp_path, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    assert str(tmp_path) in refusal(ModelSpec(str(tmp_path)))


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_weights_that_are_not_the_models_are_refused(checkpoint: Path, change: str) -> None:
    """Transformers fills what is missing with random numbers and goes on; the measurements would mean nothing."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp" in refusal(ModelSpec(str(checkpoint)))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    without_tokenizer(checkpoint)
    assert "tokenizer" in refusal(ModelSpec(str(checkpoint)))


def test_a_slow_tokenizer_is_refused_because_it_gives_no_offsets(checkpoint: Path) -> None:
    without_tokenizer(checkpoint)
    ByT5Tokenizer().save_pretrained(checkpoint)
    assert "expected a fast tokenizer" in refusal(ModelSpec(str(checkpoint)))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    build_model("tiny-llama", vocab_size=200, eos_token_id=1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    message = refusal(ModelSpec(str(tmp_path)))
    assert "the tokenizer has 257 ids, the model 200" in message


def test_code_in_a_checkpoint_is_not_run_unless_asked(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    (checkpoint / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    edit_json(checkpoint / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    assert str(checkpoint) in refusal(ModelSpec(str(checkpoint)))
    assert not mark.exists()


# ---- nothing inherited in silence -----------------------------------------------------------------------------


def test_a_generation_config_is_recorded_and_never_applied(checkpoint: Path) -> None:
    """Greedy decoding is the plain argmax, whatever the checkpoint's authors would have liked."""
    before = identify(ModelSpec(str(checkpoint)))
    shipped = {"do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1}
    edit_json(checkpoint / "generation_config.json", **shipped)
    spec = ModelSpec(str(checkpoint))
    lm = load(spec)
    assert lm.identity.about["generation_config"].items() >= shipped.items()
    assert identify(spec).fingerprint() == before.fingerprint()
    context, text = tuple(range(60, 90)), list(range(60, 90))
    for _ in range(12):
        text.append(int(logits(lm, text)[-1].argmax()))  # type: ignore[arg-type]
    (done,) = decode([lm], [Request(context)], Sampling(12, stop_at_newline=False))
    assert [*context, *done.token_ids] == text  # type: ignore[union-attr]
    # Control: applied as it was shipped (without its sampling), the text is another.
    applied = GenerationConfig(**{**shipped, "do_sample": False, "temperature": 1.0, "top_k": 50}, max_new_tokens=12)
    ids = torch.tensor([context])
    model: Any = lm.model  # no annotation of transformers says that it generates
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=applied, pad_token_id=0)
    assert theirs[0].tolist() != text


def test_every_declared_end_token_ends_a_text(checkpoint: Path) -> None:
    """The tokenizer's, the config's and the generation config's: an instruct model often names its own in the last."""
    edit_json(checkpoint / "config.json", eos_token_id=[250, 251])
    edit_json(checkpoint / "generation_config.json", eos_token_id=[252, 256])
    lm = load(ModelSpec(str(checkpoint)))
    assert lm.vocabulary.stop_ids == {250, 251, 252, 256}
    edit_json(checkpoint / "generation_config.json", eos_token_id=7)
    assert 7 in load(ModelSpec(str(checkpoint))).vocabulary.stop_ids


def test_end_tokens_decide_results_so_they_are_part_of_the_identity(checkpoint: Path) -> None:
    """Two checkpoints that differ in where a text ends give different completions; they must not share a fingerprint."""
    edit_json(checkpoint / "generation_config.json", eos_token_id=256)
    before = identify(ModelSpec(str(checkpoint)))
    edit_json(checkpoint / "generation_config.json", eos_token_id=[256, 10])
    assert identify(ModelSpec(str(checkpoint))).fingerprint() != before.fingerprint()


# ---- the tokenizer --------------------------------------------------------------------------------------------


def test_a_prompts_offsets_lie_on_its_text(checkpoint: Path) -> None:
    codec = load(ModelSpec(str(checkpoint))).codec
    text = "Question: größe?"
    ids, offsets = codec.context(text)
    assert len(ids) == len(offsets) == len(text.encode())
    assert {text[a:b] for a, b in offsets} == set(text)
    assert codec.decode(ids) == text
    assert codec.decode([*ids, 256]) == text  # what ends a text is not part of it
    assert codec.context(text + END)[0] == [*ids, 256]  # unless the prompt spells it


def test_chat_without_a_template_is_refused(checkpoint: Path) -> None:
    codec = load(ModelSpec(str(checkpoint))).codec
    with pytest.raises(ModelError, match="needs a tokenizer with a chat template"):
        codec.chat("Hello")
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:")
    load_codec.cache_clear()
    codec = load(ModelSpec(str(checkpoint))).codec
    assert codec.chat("Hello") == "<user>Hello:"
    assert codec.decode(codec.chat_context(codec.chat("Hello"))[0]) == "<user>Hello:"
