"""Attention rows handed out beside SDPA: those of the family's own eager attention, under every layout."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.models import attend, plain
from harness.models.attend import Layout, right_padded
from harness.models.load import LM, Codec, assemble
from harness.models.score import tree_batch
from harness.text.words import Tokens, build_trie
from tests.models.test_taps import ALL, TEXTS, lm_of, random_ids
from tests.tiny import FAMILIES, build_model, byte_tokenizer, identity

LONG = TEXTS[0]
ROUNDING = 1e-5
"""Of an attention weight: softmax of float32 scores that were summed in another order."""
WINDOW = 16
WINDOWED = ("tiny-mistral", "tiny-gemma2", "tiny-gemma3")


def straight(rows: int, length: int, start: int = 0) -> Layout:
    positions = torch.arange(start, start + length).expand(rows, length)
    return Layout(positions, positions)


def tapped(lm: LM, tokens: Tensor, layout: Layout, at: Tensor, cache: object = None) -> list[Tensor]:
    """Weights [R, H, Q, S] of each layer, from one forward."""
    rows: list[Tensor] = []

    def receive(layer: int, weights: Tensor) -> None:
        assert layer == len(rows)
        rows.append(weights)

    with torch.inference_mode(), attend.watch_rows(at, receive):
        lm.hidden(tokens, layout, cache)  # type: ignore[arg-type]
    assert len(rows) == len(lm.anatomy.blocks)
    return rows


def of_text(lm: LM, text: Tokens, at: list[int]) -> list[Tensor]:
    return tapped(lm, torch.tensor([text]), straight(1, len(text)), torch.tensor([at]))


def gap(lm: LM, text: Tokens, rows: list[Tensor], row: int, query: int, at: int, keys: slice | None = None) -> float:
    """Greatest difference from eager attention's row of token `at`; `keys` is where the text's own keys stand."""
    want = plain.attention_rows(lm, text, at)
    keys = slice(0, at + 1) if keys is None else keys
    got = np.stack([x[row, :, query, keys].double().numpy() for x in rows])
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max())


# ---- agreement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_row_is_eager_attentions_row_for_every_head(family: str) -> None:
    """Tokens on both sides of the window's edge, the first and the last."""
    lm, at = lm_of(family), [0, 5, WINDOW - 1, WINDOW, 28, 39]
    rows = of_text(lm, LONG, at)
    for query, token in enumerate(at):
        assert gap(lm, LONG, rows, 0, query, token) < ROUNDING
        for layer in rows:
            assert layer.dtype == torch.float32
            assert torch.allclose(layer[0, :, query].sum(-1), torch.ones(layer.shape[1]), atol=ROUNDING, rtol=0)
            assert bool((layer[0, :, query, token + 1 :] == 0).all()), "nothing of the future"
    # Control: heads and layers differ, so that agreement is not that of one row with itself.
    last = torch.stack(rows)[:, 0, :, -1]
    assert float((last - last.roll(1, 0)).abs().max()) > 100 * ROUNDING
    assert float((last - last.roll(1, 1)).abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_bite_where_a_family_has_them_and_nowhere_else(family: str) -> None:
    """Control of the tests here: the text is longer than the window, and layers without one do look further."""
    rows = of_text(lm_of(family), LONG, [39])
    beyond = [float(layer[0, :, 0, : 39 - WINDOW + 1].sum()) for layer in rows]
    wanted = {"tiny-mistral": [True] * 4, "tiny-gemma2": [True, False] * 2, "tiny-gemma3": [True, False] * 2}
    assert [b == 0.0 for b in beyond] == wanted.get(family, [False] * 4)


def _without_cap(weights_of_rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, at, allowed, scaling, _cap, sinks: weights_of_rows(q, k, at, allowed, scaling, None, sinks)


def _without_scaling(weights_of_rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, at, allowed, _scaling, cap, sinks: weights_of_rows(q, k, at, allowed, None, cap, sinks)


def _with_swapped_groups(weights_of_rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, *rest: weights_of_rows(q, k.flip(1), *rest)


def _without_mask(weights_of_rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, at, allowed, *rest: weights_of_rows(q, k, at, torch.ones_like(allowed), *rest)


@pytest.mark.parametrize(
    ("family", "breaker"),
    [("tiny-gemma2", _without_cap), ("granite", _without_scaling), *((f, _with_swapped_groups) for f in FAMILIES),
     *((f, _without_mask) for f in FAMILIES)],
)  # fmt: skip
def test_a_row_read_off_wrongly_is_seen(
    family: str, breaker: Callable[..., Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: without the cap, the scale, the mask, or with the keys of another group, the row is not eager's."""
    lm = lm_of(family)
    whole = gap(lm, LONG, of_text(lm, LONG, [28]), 0, 0, 28)
    monkeypatch.setattr(attend, "_weights_of_rows", breaker(attend._weights_of_rows))
    broken = gap(lm, LONG, of_text(lm, LONG, [28]), 0, 0, 28)
    assert broken > 100 * ROUNDING > 100 * whole


@pytest.mark.parametrize("family", WINDOWED)
def test_a_row_read_off_without_the_window_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, whole = lm_of(family), Layout.rows
    monkeypatch.setattr(Layout, "rows", lambda self, at, _window, layer: whole(self, at, None, layer))
    assert gap(lm, LONG, of_text(lm, LONG, [39]), 0, 0, 39) > 100 * ROUNDING
    assert gap(lm, LONG[:WINDOW], of_text(lm, LONG[:WINDOW], [15]), 0, 0, 15) < ROUNDING  # within it nothing shows


# ---- layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_padding_on_the_right_is_looked_at_by_nobody(family: str) -> None:
    lm = lm_of(family)
    at = torch.tensor([[39, 20], [6, 0], [24, 23]])
    rows = tapped(lm, *right_padded(TEXTS, lm.device), at)
    for row, text in enumerate(TEXTS):
        for query, token in enumerate(at[row].tolist()):
            assert gap(lm, text, rows, row, query, token) < ROUNDING
            assert all(bool((layer[row, :, query, len(text) :] == 0).all()) for layer in rows)


@pytest.mark.parametrize("family", ALL)
def test_padding_on_the_left_moves_the_keys_and_changes_nothing(family: str) -> None:
    lm, pad = lm_of(family), 9
    tokens = torch.tensor([[7] * pad + list(LONG)])
    positions = torch.cat([torch.zeros(pad, dtype=torch.long), torch.arange(len(LONG))])[None]
    allowed = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    allowed[:, pad:, :pad] = False
    rows = tapped(lm, tokens, Layout(positions, positions, allowed), torch.tensor([[pad + 39, pad + 3]]))
    for query, token in enumerate((39, 3)):
        assert gap(lm, LONG, rows, 0, query, token, slice(pad, pad + token + 1)) < ROUNDING
        assert all(bool((layer[0, :, query, :pad] == 0).all()) for layer in rows)


@pytest.mark.parametrize("family", ALL)
def test_rows_behind_a_cache_reach_into_it(family: str) -> None:
    """Query tokens are counted from the first that is forwarded, keys from the first that is cached."""
    lm, cached = lm_of(family), 24
    tails = [LONG[cached:], random_ids(16, 4)]
    tokens = torch.tensor(tails)
    positions = torch.arange(40).expand(2, 40)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()[cached:].expand(2, -1, -1)
    layout = Layout(positions[:, cached:], positions, allowed)
    with torch.inference_mode():
        cache = lm.new_cache()
        lm.hidden(torch.tensor([LONG[:cached]] * 2), straight(2, cached), cache)
    rows = tapped(lm, tokens, layout, torch.tensor([[15, 0], [15, 3]]), cache)
    for row, tail in enumerate(tails):
        text = (*LONG[:cached], *tail)
        for query, token in enumerate((39, 24) if row == 0 else (39, 27)):
            assert gap(lm, text, rows, row, query, token) < ROUNDING


@pytest.mark.parametrize("family", ALL)
def test_rows_of_a_trees_nodes_see_their_ancestors_alone(family: str) -> None:
    """Two contexts with nodes each, a start in common: a node's row is that of the text which ends in it."""
    lm = lm_of(family)
    trie = build_trie([(7, 8, 9), (7, 11), (200, 3)], whole=[(7, 8), (200,)])
    start = random_ids(8, 3)
    contexts = [start + random_ids(12, 1), start + random_ids(4, 2)]
    tokens, layout = tree_batch(contexts, [trie, trie], lm.device)
    assert layout.cells is not None
    assert len(layout.cells) == 8 + 12 + 4 + 2 * len(trie)
    node = {trie.tokens[: n + 1][-1]: n for n in range(len(trie))}
    columns = [20 + node[8], 12 + node[200]]
    rows = tapped(lm, tokens, layout, torch.tensor(columns)[:, None])
    for row, (text, own) in enumerate(
        [
            ((*contexts[0], 7, 8), [*range(20), 20 + node[7], 20 + node[8]]),
            ((*contexts[1], 200), [*range(12), 12 + node[200]]),
        ]
    ):
        want = plain.attention_rows(lm, text, len(text) - 1)
        assert np.abs(np.stack([x[row, :, 0, own].double().numpy() for x in rows]) - want).max() < ROUNDING
        for x in rows:  # and what is not its own has no weight, so the sums are whole
            assert torch.allclose(x[row, :, 0, own].sum(-1), torch.ones(x.shape[1]), atol=ROUNDING)


@pytest.mark.parametrize("family", [f for f in ALL if f != "tiny-gpt2"])
@pytest.mark.parametrize("start", [-30, -24, 100])
def test_a_text_may_stand_anywhere_and_windows_go_with_it(family: str, start: int) -> None:
    """Patching moves a source so that a span stands where the target has it, which may be before position 0.

    What a window cuts depends on the distance of two tokens, not on how far the last one stands from position 0.
    """
    lm = lm_of(family)
    assert lm.anatomy.is_relative
    rows = tapped(lm, torch.tensor([LONG]), straight(1, 40, start), torch.tensor([[39, 20]]))
    # Rotary angles are rounded in float32: an angle of 100 is known to 1e-5.
    assert gap(lm, LONG, rows, 0, 0, 39) < 10 * ROUNDING
    assert gap(lm, LONG, rows, 0, 1, 20) < 10 * ROUNDING


def test_the_mask_a_layer_runs_with_is_the_one_its_rows_are_read_with() -> None:
    """`Layout.rows` has a way of its own where attention is plain causal; it must say what `mask` says."""
    positions = torch.stack([torch.arange(40), torch.arange(40) + 5])
    allowed = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    blocked = {2: torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.2}
    at = torch.tensor([[0, 17, 39], [39, 3, 20]])
    for layout in (Layout(positions, positions), Layout(positions, positions, allowed),
                   Layout(positions, positions, allowed, blocked), Layout(positions, positions, None, blocked)):  # fmt: skip
        for window in (None, WINDOW, 1000):
            for layer in (0, 2):
                mask = layout.mask(window, layer)[:, 0]
                want = torch.stack([mask[r, at[r]] for r in range(2)])
                assert torch.equal(layout.rows(at, window, layer), want)
    assert bool(blocked[2].any() and not allowed.all()), "control"


@pytest.mark.parametrize("family", ALL)
def test_what_is_blocked_in_one_layer_has_no_weight_there_and_the_rest_takes_it_over(family: str) -> None:
    """Softmax over fewer keys: the other weights of that row grow by the same factor. Other layers before it, other
    tokens and other texts do not notice."""
    lm, layer = lm_of(family), 1
    text, hidden = LONG[:20], slice(9, 14)
    tokens = torch.tensor([text, text])
    positions = torch.arange(20).expand(2, 20)
    blocked = torch.zeros(2, 20, 20, dtype=torch.bool)
    blocked[1, 19, hidden] = True
    at = torch.tensor([[19, 18], [19, 18]])
    rows = tapped(lm, tokens, Layout(positions, positions, None, {layer: blocked}), at)
    assert bool((rows[layer][1, :, 0, hidden] == 0).all())
    kept = rows[layer][0, :, 0].clone()
    kept[:, hidden] = 0
    assert torch.allclose(rows[layer][1, :, 0], kept / kept.sum(-1, keepdim=True), atol=ROUNDING)
    assert float(rows[layer][0, :, 0, hidden].sum(-1).max()) > 1e-3, "control: there was something to take over"
    assert torch.equal(rows[0][0], rows[0][1]), "the layer before"
    for n in range(len(rows)):
        assert torch.allclose(rows[n][0, :, 1], rows[n][1, :, 1], atol=ROUNDING), "the token before"
        assert gap(lm, text, rows, 0, 0, 19) < ROUNDING, "the other text"
    after = rows[layer + 1]
    assert float((after[0, :, 0] - after[1, :, 0]).abs().max()) > 2 * ROUNDING, "and later layers do notice"


# ---- the function itself --------------------------------------------------------------------------------------

HEADS, GROUPS, LENGTH, HEAD_WIDTH = 4, 2, 24, 8
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {}, "scaled": {"scaling": 0.9}, "soft-capped": {"softcap": 1.5}, "windowed": {"sliding_window": 6},
    "with sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "all at once": {"scaling": 0.9, "softcap": 1.5, "sliding_window": 6, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}  # fmt: skip


def slow_weights(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
) -> np.ndarray:
    """One number after the other, in float64."""
    q, k = query.double().numpy(), key.double().numpy()
    weights = np.zeros((HEADS, LENGTH, LENGTH))
    for head in range(HEADS):
        for i in range(LENGTH):
            seen = [j for j in range(i + 1) if sliding_window is None or i - j < sliding_window]
            scores = np.array([q[0, head, i] @ k[0, head * GROUPS // HEADS, j] for j in seen])
            scores *= HEAD_WIDTH**-0.5 if scaling is None else scaling
            if softcap is not None:
                scores = np.tanh(scores / softcap) * softcap
            total = np.exp(scores).sum() + (0.0 if s_aux is None else np.exp(float(s_aux[head])))
            weights[head, i, seen] = np.exp(scores) / total
    return weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_softmax_done_by_hand_and_their_product_with_the_values_is_the_output(variant: str) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, HEADS, LENGTH, HEAD_WIDTH, generator=generator)
    key, value = (torch.randn(1, GROUPS, LENGTH, HEAD_WIDTH, generator=generator) for _ in range(2))
    module = nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, HEADS // GROUPS, True  # type: ignore[assignment]
    got: list[Tensor] = []
    with attend.use(straight(1, LENGTH)), attend.watch_rows(torch.arange(LENGTH)[None], lambda _n, w: got.append(w)):
        output, _ = attend.attention(module, query, key, value, None, **VARIANTS[variant])  # type: ignore[arg-type]
    want = slow_weights(query, key, **VARIANTS[variant])  # type: ignore[arg-type]
    assert np.abs(got[0][0].double().numpy() - want).max() < ROUNDING
    mixed = torch.einsum("rhts,rhsk->rthk", got[0], value.repeat_interleave(HEADS // GROUPS, 1))
    assert torch.allclose(output, mixed, atol=1e-5)
    sums = got[0].sum(-1)
    if "s_aux" in VARIANTS[variant]:
        assert float(sums.max()) < 1 - 1e-3, "a sink takes its share"
    else:
        assert torch.allclose(sums, torch.ones_like(sums), atol=ROUNDING)
    if variant != "plain":  # control: each variant is another softmax
        assert np.abs(slow_weights(query, key) - want).max() > 1e-2


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", torch.float32), ("float64", torch.float64)])
def test_rows_are_wide_whatever_the_model_runs_in(dtype: str, wide: torch.dtype) -> None:
    model = build_model("tiny-llama", dtype=getattr(torch, dtype))
    lm = assemble(model, Codec(byte_tokenizer()), identity("other", dtype))
    rows = of_text(lm, LONG, [39])
    assert {x.dtype for x in rows} == {wide}
    # To 1e-6 in bfloat16 too: the sum is taken of float32 weights, not of weights rounded to 3 digits.
    assert all(torch.allclose(x.sum(-1), torch.ones_like(x.sum(-1)), atol=ROUNDING) for x in rows)


# ---- the model is left as it was ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_forward_that_hands_out_rows_gives_the_same_bits(family: str) -> None:
    lm = lm_of(family)
    tokens, layout = right_padded(TEXTS, lm.device)
    with torch.inference_mode():
        before = lm.hidden(tokens, layout)
        with attend.watch_rows(torch.tensor([[39], [6], [24]]), lambda _layer, _weights: None):
            watched = lm.hidden(tokens, layout)
    assert torch.equal(watched, before)


class _Stop(Exception):
    pass


def test_a_tap_is_removed_after_an_exception_and_the_outer_one_is_back_after_the_inner() -> None:
    lm = lm_of("tiny-llama")
    tokens, layout = right_padded(TEXTS, lm.device)
    at = torch.tensor([[39], [6], [24]])
    heard = SimpleNamespace(outer=0, inner=0)

    def outer(_layer: int, _weights: Tensor) -> None:
        heard.outer += 1

    def inner(layer: int, _weights: Tensor) -> None:
        heard.inner += 1
        if layer == 2:
            raise _Stop

    with torch.inference_mode(), attend.watch_rows(at, outer):
        with pytest.raises(_Stop), attend.watch_rows(at, inner):
            lm.hidden(tokens, layout)
        assert (heard.outer, heard.inner) == (0, 3)
        assert attend._layout.get() is None, "nor does the layout stay"
        lm.hidden(tokens, layout)
    assert (heard.outer, heard.inner) == (4, 3)
    assert attend._row_tap.get() is None
    with torch.inference_mode():
        lm.hidden(tokens, layout)
    assert (heard.outer, heard.inner) == (4, 3)


def test_rows_are_not_read_without_a_layout() -> None:
    """Under transformers' own masks, which a row here could not be told."""
    lm = lm_of("tiny-llama")
    with (
        pytest.raises(AssertionError, match="under a layout"),
        attend.watch_rows(torch.tensor([[3]]), lambda _n, _w: None),
    ):
        lm.model(input_ids=torch.tensor([LONG]), use_cache=False)
