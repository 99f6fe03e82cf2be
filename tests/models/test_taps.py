"""Reading and replacing activations: what is captured is what the model computed, and nothing stays behind."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.models import attend
from harness.models.anatomy import record_outputs
from harness.models.attend import right_padded
from harness.models.load import LM, Codec, assemble
from harness.models.taps import Captured, Edit, capture, patch
from harness.text.words import Tokens
from tests.models.test_anatomy import SCALED, tiny_model
from tests.tiny import FAMILIES, build_model, byte_tokenizer, identity

ALL = (*FAMILIES, *SCALED)
SHARPNESS = {"granite": 100.0, "cohere": 200.0}
"""Added to the final norm where a family scales its logits down; the tiny shapes have theirs already."""
ROUNDING = 2e-5
"""Of the residual stream, relative to its largest entry: a sum of three in float32."""
TEXTS = tuple(tuple(np.random.default_rng(n).integers(1, 256, n).tolist()) for n in (40, 7, 25))
"""The first is longer than the tiny sliding windows (16)."""


def random_ids(length: int, seed: int) -> Tokens:
    return tuple(np.random.default_rng([seed, length]).integers(1, 256, length).tolist())


@cache
def lm_of(family: str) -> LM:
    """A sharp model whose final norm has uneven weights; shared between tests, so never change it.

    With even weights a norm applied to its own output changes nothing, and a test could not see that it was.
    """
    lm = assemble(tiny_model(family), Codec(byte_tokenizer()), identity(family))
    generator = torch.Generator().manual_seed(11)
    for parameter in lm.anatomy.final_norm.parameters():
        uneven = 0.3 + 1.4 * torch.rand(parameter.shape, generator=generator)
        parameter.copy_((parameter + SHARPNESS.get(family, 0.0)) * uneven)
    return lm


def batch_of(lm: LM, texts: tuple[Tokens, ...] = TEXTS) -> tuple[Tensor, attend.Layout]:
    """As a grid, padding computed too, so that modules' outputs can be read by row and column."""
    tokens, layout = right_padded(texts, lm.device)
    return tokens, attend.Layout(layout.q_positions, layout.k_positions)


def forward(lm: LM, texts: tuple[Tokens, ...] = TEXTS) -> Tensor:
    with torch.inference_mode():
        return lm.hidden(*batch_of(lm, texts))


AT = torch.tensor([[39, 3], [6, 6], [0, 24]])
"""Two query tokens in each of `TEXTS`: not the same in any two of them, one asked for twice."""


def captured(lm: LM, at: Tensor = AT, num_neurons: int = 10) -> Captured:
    with torch.inference_mode(), capture(lm.anatomy, at, num_neurons) as found:
        lm.hidden(*batch_of(lm))
    return found


def every_hook(lm: LM) -> set[tuple[str, str, int]]:
    """Hooks of all kinds on all modules. Transformers leaves some of its own where maps were once asked for."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {(name, kind, key) for name, m in lm.model.named_modules() for kind in kinds for key in getattr(m, kind)}


def largest_gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative to the greatest magnitude of `a`, layer by layer."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


# ---- capture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_what_the_parts_add_is_the_change_of_the_residual_stream(family: str) -> None:
    found = captured(lm_of(family))
    layers = range(len(found.attention))
    after = found.resid[1:]
    assert len(found.resid) == len(layers) + 1
    assert largest_gap(after, [found.resid[n] + found.attention[n] + found.mlp[n] for n in layers]) < ROUNDING
    # Control: one part alone, or one layer's part in the place of another's, does not add up.
    assert largest_gap(after, [found.resid[n] + found.mlp[n] for n in layers]) > 100 * ROUNDING
    assert largest_gap(after, [found.resid[n] + found.attention[n] for n in layers]) > 100 * ROUNDING
    assert largest_gap(after, [found.resid[n] + found.attention[n - 1] + found.mlp[n] for n in layers]) > 100 * ROUNDING


def test_without_the_familys_multiplier_the_parts_do_not_add_up() -> None:
    """Control: Granite scales what its parts give, so the parts' own outputs are not what is added."""
    lm = lm_of("granite")
    assert lm.anatomy.multiplier == pytest.approx(0.22, rel=1e-4)
    found = captured(lm)
    raw = [(a + m) / lm.anatomy.multiplier for a, m in zip(found.attention, found.mlp, strict=True)]
    assert largest_gap(found.resid[1:], [found.resid[n] + raw[n] for n in range(len(raw))]) > 0.1


@pytest.mark.parametrize("family", ALL)
def test_the_tokens_asked_for_are_picked_out_of_what_the_modules_gave(family: str) -> None:
    lm = lm_of(family)
    found = captured(lm)
    a = lm.anatomy
    parts = {f"{kind} {n}": m for kind, modules in (("block", a.blocks), ("attention", a.attention_out),
                                                    ("mlp", a.mlp_out)) for n, m in enumerate(modules)}  # fmt: skip
    with torch.inference_mode(), record_outputs(parts) as outputs:
        lm.hidden(*batch_of(lm))
    for n in range(len(a.blocks)):
        for row, columns in enumerate(AT.tolist()):
            for q, column in enumerate(columns):
                assert torch.equal(found.resid[n + 1][row, q], outputs[f"block {n}"][row, column])
                assert torch.equal(found.attention[n][row, q], outputs[f"attention {n}"][row, column] * a.multiplier)
                assert torch.equal(found.mlp[n][row, q], outputs[f"mlp {n}"][row, column] * a.multiplier)
        assert torch.allclose(found.resid_norm[n], outputs[f"block {n}"].norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(found.resid[2][1, 0], found.resid[2][1, 1]), "asked for twice, given twice"
    assert not torch.equal(found.resid[2][0, 0], found.resid[2][0, 1]), "and two tokens are two things"


@pytest.mark.parametrize("family", ALL)
def test_the_first_residual_is_what_enters_and_the_last_gives_the_models_own_logits(family: str) -> None:
    lm, at = lm_of(family), torch.tensor([[39], [6], [24]])
    found, hidden = captured(lm, at), forward(lm)
    want = hidden[torch.arange(3), at[:, 0]]
    assert torch.equal(lm.anatomy.final_norm(found.resid[-1][:, 0]), want)
    # Control: normed twice, which is what Hugging Face's own last hidden state would come to.
    assert not torch.allclose(lm.anatomy.final_norm(want), want, rtol=1e-2)
    one_token = torch.tensor([[TEXTS[0][0]]])  # nothing but the token itself enters the first block
    with torch.inference_mode(), capture(lm.anatomy, torch.tensor([[0]])) as alone:
        lm.hidden(one_token, attend.Layout(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)))
    first = captured(lm, torch.zeros(3, 1, dtype=torch.long))
    assert torch.allclose(first.resid[0][0, 0], alone.resid[0][0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ALL)
def test_the_top_neurons_are_the_largest_inputs_of_the_down_projection_with_their_signs(family: str) -> None:
    lm = lm_of(family)
    assert lm.anatomy.neurons is not None
    inputs: dict[int, Tensor] = {}

    def keep(n: int) -> Callable[[nn.Module, tuple], None]:
        return lambda _module, args: inputs.update({n: args[0]})

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in enumerate(lm.anatomy.neurons)]
    found = captured(lm)
    for handle in handles:
        handle.remove()
    signs = set()
    for n, values in inputs.items():
        for row, columns in enumerate(AT.tolist()):
            for q, column in enumerate(columns):
                mine = values[row, column].numpy()
                ids, got = found.top_neurons[n][row, q].numpy(), found.top_values[n][row, q].numpy()
                assert len(set(ids.tolist())) == 10
                assert np.array_equal(got, mine[ids]), "each value is its neuron's"
                assert np.array_equal(np.abs(got), np.sort(np.abs(mine))[::-1][:10]), "and no other is larger"
                signs |= set(np.sign(got).tolist())
    is_gated = family not in ("tiny-gpt2", "tiny-neox")  # a GELU alone is hardly ever below zero
    assert signs == ({1.0, -1.0} if is_gated else {1.0})


def test_no_neurons_are_listed_where_none_are_asked_for() -> None:
    found = captured(lm_of("tiny-llama"), num_neurons=0)
    assert found.top_neurons == found.top_values == []
    assert len(found.resid) == 5


def test_more_neurons_than_there_are_gives_all_of_them() -> None:
    found = captured(lm_of("tiny-llama"), num_neurons=10_000)
    assert found.top_neurons[0].shape == (3, 2, 128)


def test_norms_of_a_half_precision_model_are_taken_in_float32() -> None:
    """A sum of 64 squares in bfloat16 would be off by a percent."""
    lm = assemble(
        build_model("tiny-llama", dtype=torch.bfloat16), Codec(byte_tokenizer()), identity("half", "bfloat16")
    )
    found = captured(lm)
    with torch.inference_mode(), record_outputs({"block": lm.anatomy.blocks[-1]}) as outputs:
        lm.hidden(*batch_of(lm))
    assert found.resid[-1].dtype == torch.bfloat16
    assert found.resid_norm[-1].dtype == torch.float32
    assert torch.allclose(found.resid_norm[-1].double(), outputs["block"].double().norm(dim=-1), rtol=1e-5)


# ---- patch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("part", ["blocks", "attention_out", "mlp_out"])
def test_an_edit_changes_its_rows_and_column_and_nothing_else(family: str, part: str) -> None:
    """Rows of a batch are independent and attention is causal, so what the edit cannot reach keeps every bit."""
    lm = lm_of(family)
    module = getattr(lm.anatomy, part)[1]
    value = torch.full((1, 64), 0.5)
    with torch.inference_mode(), record_outputs({"it": module}) as outputs:
        plain = lm.hidden(*batch_of(lm))
        before = outputs["it"]
        with patch([Edit(module, torch.tensor([0]), 30, value)]), record_outputs({"it": module}) as outputs_after:
            edited = lm.hidden(*batch_of(lm))
    changed = outputs_after["it"]  # recorded behind the edit: its hook was registered later
    assert torch.equal(changed[0, 30], value[0])
    assert torch.equal(changed[0, :30], before[0, :30])
    assert torch.equal(changed[0, 31:], before[0, 31:])
    assert torch.equal(changed[1:], before[1:])
    assert not torch.allclose(edited[0, 30], plain[0, 30], atol=1e-2), "and the model goes on with it"
    assert torch.equal(edited[0, :30], plain[0, :30])
    assert torch.equal(edited[1:], plain[1:])


def test_edits_of_one_module_in_several_rows_all_hold() -> None:
    lm = lm_of("tiny-qwen3")
    module = lm.anatomy.blocks[2]
    values = torch.arange(3 * 64.0).reshape(3, 64)
    edits = [Edit(module, torch.tensor([1, 2]), 4, values[:2]), Edit(module, torch.tensor([0]), 4, values[2:])]
    with torch.inference_mode(), patch(edits), record_outputs({"it": module}) as outputs:
        lm.hidden(*batch_of(lm))
    assert torch.equal(outputs["it"][[1, 2, 0], 4], values)


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2"])
def test_an_edit_never_writes_into_what_the_module_returned(family: str) -> None:
    """GPT-2's attention returns a tuple: its other members, and the tensor itself, are left as they were."""
    lm = lm_of(family)
    module = lm.anatomy.attention_out[1]
    seen: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]
        copies.append(seen[-1].clone())

    handle = module.register_forward_hook(keep)
    with torch.inference_mode(), patch([Edit(module, torch.tensor([0]), 3, torch.zeros(1, 64))]):
        lm.hidden(*batch_of(lm))
    handle.remove()
    assert torch.equal(seen[0], copies[0])
    assert seen[0][0, 3].abs().max() > 0, "the edit would have put zeros there"


def test_an_edit_takes_the_dtype_of_what_it_replaces() -> None:
    lm = lm_of("tiny-llama")
    module = lm.anatomy.mlp_out[0]
    edit = Edit(module, torch.tensor([0]), 0, torch.ones(1, 64, dtype=torch.float64))
    with torch.inference_mode(), patch([edit]), record_outputs({"it": module}) as outputs:
        lm.hidden(*batch_of(lm))
    assert outputs["it"].dtype == torch.float32


# ---- the model is left as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_forward_that_is_watched_gives_the_same_bits(family: str) -> None:
    lm = lm_of(family)
    before = forward(lm)
    with torch.inference_mode(), capture(lm.anatomy, AT, 10, lambda _layer, _weights: None):
        watched = lm.hidden(*batch_of(lm))
    assert torch.equal(watched, before)
    with patch([]):
        assert torch.equal(forward(lm), before)


class _Stop(Exception):
    pass


def _stop_where(is_watched: bool) -> None:
    """The exception, where there is something to be left behind."""
    assert is_watched
    raise _Stop


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_and_taps_are_gone_after_an_exception(family: str) -> None:
    """Raised in the block, and in the middle of a forward, by what is called back."""
    lm = lm_of(family)
    before, hooks = forward(lm), every_hook(lm)
    edit = Edit(lm.anatomy.blocks[0], torch.tensor([0]), 0, torch.zeros(1, 64))

    def stop(_layer: int, _weights: Tensor) -> None:
        raise _Stop

    with pytest.raises(_Stop), capture(lm.anatomy, AT, 10, lambda _layer, _weights: None), patch([edit]):
        _stop_where(every_hook(lm) > hooks and attend._row_tap.get() is not None)
    with pytest.raises(_Stop), torch.inference_mode(), capture(lm.anatomy, AT, 10, stop), patch([edit]):
        lm.hidden(*batch_of(lm))
    assert every_hook(lm) == hooks
    assert attend._row_tap.get() is None
    assert attend._layout.get() is None
    assert torch.equal(forward(lm), before)


def test_hooks_registered_before_one_that_cannot_be_are_removed() -> None:
    lm = lm_of("tiny-llama")
    hooks = every_hook(lm)
    whole = Edit(lm.anatomy.blocks[0], torch.tensor([0]), 0, torch.zeros(1, 64))
    broken = Edit(lm.anatomy.blocks[1], torch.tensor([0]), 0, torch.zeros(1, 64))
    object.__setattr__(broken, "module", None)
    with pytest.raises(AttributeError), patch([whole, broken]):
        pass
    assert every_hook(lm) == hooks


def test_an_edit_that_does_not_fit_fails_the_forward_and_leaves_nothing() -> None:
    lm = lm_of("tiny-llama")
    before, hooks = forward(lm), every_hook(lm)
    with (
        pytest.raises(IndexError),
        torch.inference_mode(),
        patch([Edit(lm.anatomy.blocks[0], torch.tensor([7]), 0, torch.zeros(1, 64))]),
    ):
        lm.hidden(*batch_of(lm))
    assert every_hook(lm) == hooks
    assert torch.equal(forward(lm), before)
