"""The parts of a decoder: what was found satisfies its identities, and a model that breaks one is refused by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.errors import ModelError
from harness.models import attend
from harness.models.anatomy import Anatomy, close, dissect, first_tensor, record_outputs
from harness.models.load import Codec, assemble
from tests.tiny import FAMILIES, build_model, byte_tokenizer, identity, tiny_lm

# Two more structures: scaled sublayers and divided logits (Granite), parallel sublayers and multiplied logits (Cohere).
SMALL = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}  # fmt: skip
SCALED = {
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
}


def scaled_model(family: str, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SMALL, **SCALED[family])
        model = (
            AutoModelForCausalLM.from_config(config, attn_implementation=attend.registered())
            .eval()
            .requires_grad_(False)
        )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ".layers." in name:
            parameter.mul_(8.0)  # so that the sublayers matter beside the embedding
    return model


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(5))


def tiny_model(family: str) -> PreTrainedModel:
    return scaled_model(family) if family in SCALED else build_model(family)


def run(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def residuals(model: PreTrainedModel, anatomy: Anatomy, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The residual stream before the first block and after each, and both contributions at every layer."""
    parts = {f"out{i}": b for i, b in enumerate(anatomy.blocks)}
    parts |= {f"attention{i}": m for i, m in enumerate(anatomy.attention_out)}
    parts |= {f"mlp{i}": m for i, m in enumerate(anatomy.mlp_out)}
    start: list[Tensor] = []
    handle = anatomy.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: start.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with record_outputs(parts) as outputs:
        run(model, ids)
    handle.remove()
    layers = range(len(anatomy.blocks))
    return (
        [start[0], *(outputs[f"out{i}"] for i in layers)],
        [outputs[f"attention{i}"] for i in layers],
        [outputs[f"mlp{i}"] for i in layers],
    )


# ---- what was found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_the_parts_found_add_up_to_the_model(family: str) -> None:
    """On other tokens than those they were found with, and longer than the tiny sliding windows."""
    model, ids = tiny_model(family), tokens()
    anatomy = dissect(model, tokens(2, 20) + 1, family)
    resid, attention, mlp = residuals(model, anatomy, ids)
    assert len(anatomy.blocks) == model.config.num_hidden_layers == len(mlp)
    for i in range(len(anatomy.blocks)):
        change = anatomy.multiplier * (attention[i] + mlp[i])
        assert torch.allclose(resid[i] + change, resid[i + 1], rtol=0, atol=2e-5 * float(resid[i + 1].abs().max()))
        # Control: neither half alone is the change.
        scale = float(change.abs().max())
        assert float((resid[i] + anatomy.multiplier * mlp[i] - resid[i + 1]).abs().max()) > 0.01 * scale
        assert float((resid[i] + anatomy.multiplier * attention[i] - resid[i + 1]).abs().max()) > 0.01 * scale
    lens = anatomy.to_logits(anatomy.head(anatomy.final_norm(resid[-1])))
    assert torch.allclose(lens, run(model, ids), rtol=0, atol=5e-5)
    # Control: without the norm, or from a layer too early, the lens is another.
    for wrong in (resid[-1], anatomy.final_norm(resid[-2])):
        assert float((anatomy.to_logits(anatomy.head(wrong)) - lens).abs().max()) > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_attention_is_the_part_that_looks_at_other_tokens(family: str) -> None:
    """Which of the two is which: a change of the first token reaches another one's attention, never its MLP alone.

    At the first block the last token's own input is untouched, so only attention can carry the change there.
    """
    model, ids = tiny_model(family), tokens(1, 8)
    anatomy = dissect(model, tokens(), family)
    other = ids.clone()
    other[0, 0] += 1
    _, attention, _ = residuals(model, anatomy, ids)
    _, changed, _ = residuals(model, anatomy, other)
    assert float((attention[0][0, -1] - changed[0][0, -1]).abs().max()) > 1e-6


@pytest.mark.parametrize(("family", "multiplier"), [("granite", 0.22), ("cohere", 1.0), ("tiny-gemma2", 1.0)])
def test_the_multiplier_is_the_families_own(family: str, multiplier: float) -> None:
    assert dissect(tiny_model(family), tokens(), family).multiplier == pytest.approx(multiplier, rel=1e-4)


@pytest.mark.parametrize("family", [*SCALED, "tiny-gemma2", "tiny-gpt2"])
def test_the_whole_model_is_read_through_hidden_and_logits(family: str) -> None:
    model, ids = tiny_model(family), tokens()
    lm = assemble(model, Codec(byte_tokenizer()), identity(family))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    logits = lm.logits(lm.hidden(ids, attend.Layout(positions, positions)))
    assert torch.allclose(logits, run(model, ids), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2", "tiny-olmo2"])
def test_parts_are_found_in_every_precision(family: str, dtype: torch.dtype) -> None:
    model = build_model(family, dtype=dtype)
    lm = assemble(model, Codec(byte_tokenizer()), identity(family, str(dtype).removeprefix("torch.")))
    assert lm.anatomy.multiplier == 1.0
    assert len(lm.anatomy.blocks) == 4


# ---- what is refused ------------------------------------------------------------------------------------------

Breaker = Callable[[PreTrainedModel], None]


def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Make a module return something else, as a family of another structure would."""
    forward = module.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.forward = changed


def secret_head_scale(model: PreTrainedModel) -> None:
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled


def noisy_block(model: PreTrainedModel) -> None:
    after(model.model.layers[1], lambda x: x + torch.randn_like(x))


def twin_lists(model: PreTrainedModel) -> None:
    model.model.twins = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))


def no_head(model: PreTrainedModel) -> None:
    model.get_output_embeddings = lambda: None


def hidden_norm(model: PreTrainedModel) -> None:
    """Something between the final norm and the head that is no module."""
    after(model.model, lambda x: x)
    forward = model.model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    model.model.forward = shifted


ADDS_UP = "breaks 'resid_in + attention + mlp = resid_out'"
LENS = "breaks 'last-layer lens = logits'"
BROKEN: dict[str, tuple[Breaker, str]] = {
    "a block that adds a constant": (lambda m: after(m.model.layers[0], lambda x: x + 0.5), ADDS_UP),
    "a later block that adds a constant": (lambda m: after(m.model.layers[2], lambda x: x + 0.5), ADDS_UP),
    "a block that scales the stream": (lambda m: after(m.model.layers[3], lambda x: x * 1.1), ADDS_UP),
    "a head followed by a secret scale": (secret_head_scale, LENS),
    "a block that is never twice the same": (noisy_block, "breaks 'forward with hooks = forward without'"),
    "two lists as long as the blocks": (twin_lists, "expected one list of 4 equal blocks, found 2"),
    "no head": (no_head, "expected a decoder with an output head"),
    "a shift before the head": (hidden_norm, "expected a final norm between the last block and the head"),
}


@pytest.mark.filterwarnings("ignore")  # transformers may warn of a patched forward; the refusal is what counts
@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_breaks_an_identity_is_refused_by_its_name(name: str) -> None:
    model, (break_it, message) = build_model("tiny-llama"), BROKEN[name]
    dissect(model, tokens(), "mine")  # whole, it passes
    break_it(model)
    with pytest.raises(ModelError) as raised:
        dissect(model, tokens(), "mine")
    assert str(raised.value).startswith("mine: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not hooks_of(model)


class _Biased(nn.Module):
    """A head of its own kind: what it adds is part of it, so nothing is broken."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.linear = linear.weight, linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + 0.1


def test_a_head_that_is_unusual_but_whole_is_accepted() -> None:
    """Control for the refusals: only what is outside the parts found is refused."""
    model = build_model("tiny-llama")
    model.lm_head = _Biased(model.lm_head)
    assert dissect(model, tokens(), "mine").head is model.lm_head


def test_attention_with_a_term_that_is_not_known_is_refused() -> None:
    """A family whose eager attention is not ours: an extra term in it alone."""
    model = build_model("tiny-llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def extra(*args, **kwargs):
        output, weights = forward(*args, **kwargs)
        eager = attention.config._attn_implementation == "eager"
        return (output * 1.1 if eager else output), weights

    attention.forward = extra
    with pytest.raises(ModelError, match="breaks 'harness attention = eager attention'"):
        assemble(model, Codec(byte_tokenizer()), identity("mine"))
    assert model.config._attn_implementation == attend.NAME  # and the model is left as it was


# ---- hooks ----------------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


class _Stop(Exception):
    pass


def test_hooks_are_removed_after_a_recording_even_when_it_fails() -> None:
    model = build_model("tiny-gpt2")
    parts = dict(model.named_modules())
    with record_outputs(parts) as outputs:
        run(model, tokens())
        assert hooks_of(model)
    assert not hooks_of(model)
    assert all(isinstance(o, Tensor) for o in outputs.values())
    with pytest.raises(_Stop), record_outputs(parts):
        raise _Stop
    assert not hooks_of(model)
    # A part that is none: those already hooked are freed.
    with pytest.raises(AttributeError), record_outputs({**parts, "none": None}):  # type: ignore[dict-item]
        pass
    assert not hooks_of(model)


def test_hooks_are_removed_when_a_forward_fails_in_the_middle() -> None:
    model = build_model("tiny-llama")

    def fail(_module, _args) -> None:
        raise _Stop

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(_Stop), record_outputs({"first": model.model.layers[0]}) as outputs:
        run(model, tokens())
    handle.remove()
    assert "first" in outputs
    assert not hooks_of(model)


def test_dissecting_leaves_the_model_as_it_was() -> None:
    model, ids = build_model("tiny-qwen3"), tokens()
    before = run(model, ids)
    dissect(model, ids, "mine")
    assert not hooks_of(model)
    assert torch.equal(run(model, ids), before)


def test_recorded_outputs_come_in_call_order() -> None:
    model = build_model("tiny-llama")
    blocks = {str(i): b for i, b in reversed(list(enumerate(model.model.layers)))}
    with record_outputs(blocks) as outputs:
        run(model, tokens())
    assert list(outputs) == ["0", "1", "2", "3"]


def test_the_first_tensor_of_what_a_module_returned() -> None:
    x = torch.ones(2)
    assert first_tensor(x) is x
    assert first_tensor((x, None)) is x
    assert first_tensor([x]) is x
    assert first_tensor(()) is None
    assert first_tensor({"logits": x}) is None
    assert first_tensor((None, x)) is None


def test_close_is_relative_and_never_true_of_what_is_not_finite() -> None:
    a = torch.tensor([1.0, 1000.0])
    assert close(a, a + torch.tensor([0.1, 0.0]))  # small beside the largest
    assert not close(a, a + torch.tensor([0.0, 1.0]))
    assert not close(a * torch.nan, a * torch.nan)
    assert not close(a, a * torch.nan)
    assert not close(a * torch.inf, a * torch.inf)
    assert close(a * 0, a * 0)


# ---- attention without its mask -------------------------------------------------------------------------------


@contextmanager
def registered(name: str, function: Callable) -> Iterator[None]:
    """A function in AttentionInterface alone, for the time of the block."""
    AttentionInterface.register(name, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(name)


def logits_with(model: PreTrainedModel, implementation: str, ids: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    try:
        return run(model, ids)
    finally:
        model.set_attn_implementation(attend.NAME)


def as_told(
    _module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **_
) -> tuple[Tensor, None]:
    """SDPA with the mask it is handed, and nothing of its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-mistral", "tiny-neox"])
def test_attention_registered_without_its_mask_sees_the_future(family: str) -> None:
    """Why `attend` registers twice: a function known for attention alone is handed no mask, and nobody says so."""
    model, ids = build_model(family), tokens()
    later = ids.clone()
    later[:, -1] += 1
    with registered("alone", as_told):
        assert float((logits_with(model, "alone", ids) - logits_with(model, "eager", ids)).abs().max()) > 0.1
        assert not torch.equal(logits_with(model, "alone", ids)[:, :-1], logits_with(model, "alone", later)[:, :-1])
    assert torch.allclose(logits_with(model, attend.NAME, ids), logits_with(model, "eager", ids), rtol=0, atol=5e-5)
    assert torch.equal(run(model, ids)[:, :-1], run(model, later)[:, :-1])


@pytest.mark.parametrize("family", ["tiny-mistral", "tiny-gemma2", "tiny-gemma3"])
def test_our_attention_registered_alone_loses_the_sliding_window(family: str) -> None:
    """Our function itself under another name: without a mask it is causal, and blind to the window."""
    model, ids = build_model(family), tokens()
    eager = logits_with(model, "eager", ids)
    with registered("alone", attend.attention):
        alone = logits_with(model, "alone", ids)
    assert torch.allclose(alone[:, :16], eager[:, :16], rtol=0, atol=5e-5)  # within the window nothing shows
    assert float((alone[:, 16:] - eager[:, 16:]).abs().max()) > 0.1
    assert torch.allclose(logits_with(model, attend.NAME, ids), eager, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_is_masked_without_a_layout_too(family: str) -> None:
    """Plain Hugging Face calls through our attention (a reader's own, `generate`) get transformers' masks."""
    lm, ids = tiny_lm(family), tokens(1, 20)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    got = lm.model(input_ids=padded, **inputs).logits[:, 4:]
    assert torch.allclose(got, run(lm.model, ids), rtol=0, atol=5e-5)
