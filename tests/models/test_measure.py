"""Numbers read off activations, against scipy and against sums done by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.models.measure import EPSILON, SPANS, LensRows, attention_ratios, lens_rows, span_masses, target_mass

ROWS, SIZE = 6, 50
ROUNDING = 2e-6
"""Sums of fifty float32 terms, in nats."""


def log_probs(seed: int, sharpness: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(ROWS, SIZE, generator=generator)).log_softmax(-1).to(dtype)


def lens(log_p: Tensor, final: Tensor, top_k: int = 5) -> LensRows:
    """Statistics with the tokens 3 and 4 as the target, and row n emitting token n."""
    targets = torch.tensor([[3, 4]]).expand(len(log_p), 2)
    return lens_rows(log_p, final, targets, torch.ones_like(targets, dtype=torch.bool), torch.arange(len(log_p)), top_k)


# ---- lens -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.0, 8.0))
def test_entropy_and_kl_are_scipys(seed: int, final_seed: int, sharpness: float) -> None:
    log_p, final = log_probs(seed, sharpness), log_probs(final_seed)
    got = lens(log_p, final)
    p, p_final = log_p.double().exp().numpy(), final.double().exp().numpy()
    assert np.allclose(got.entropy, scipy.stats.entropy(p, axis=1), atol=ROUNDING, rtol=ROUNDING)
    assert np.allclose(got.kl_final, scipy.stats.entropy(p_final, p, axis=1), atol=ROUNDING, rtol=2 * ROUNDING)


def test_kl_is_of_the_final_distribution_to_the_lens_and_not_the_other_way() -> None:
    """Control of the direction, and nats rather than bits: (1/2, 1/2) against (1/4, 3/4)."""
    final, log_p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    one = torch.zeros(1, 1, dtype=torch.long)
    got = lens_rows(log_p, final, one, one == 0, torch.tensor([1]))
    assert float(got.kl_final) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), abs=1e-6)
    assert float(got.kl_final) != pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5), abs=1e-2)
    assert float(got.entropy) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75), abs=1e-6)
    assert float(got.p_target) == pytest.approx(0.25)
    assert float(got.p_emitted) == pytest.approx(0.75)


def test_kl_of_a_distribution_to_itself_is_zero_to_the_last_bit_and_never_negative() -> None:
    log_p = log_probs(1)
    assert torch.equal(lens(log_p, log_p).kl_final, torch.zeros(ROWS, dtype=torch.float64))
    nudged = (log_p + 1e-7 * torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    assert bool((lens(nudged, log_p).kl_final >= 0).all())  # rounding alone would give both signs
    raw = (log_p.exp() * (log_p - nudged)).sum(-1)
    assert float(raw.min()) < 0 < float(raw.max())


def test_a_token_without_probability_adds_nothing_where_a_product_would_be_nan() -> None:
    logits = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2))
    logits[:, 10:20] = -torch.inf
    log_p = logits.log_softmax(-1)
    got = lens(log_p, log_p)
    assert bool(torch.isnan(log_p.exp() * log_p).any()), "control: 0 × -inf"
    assert np.allclose(got.entropy, scipy.stats.entropy(log_p.double().exp().numpy(), axis=1), atol=ROUNDING)
    assert got.kl_final.tolist() == [0.0, 0.0]
    flat = torch.full((2, SIZE), -np.log(SIZE))
    assert torch.isinf(lens(log_p, flat).kl_final).all(), (
        "a lens that rules out what the model says is infinitely wrong"
    )


@pytest.mark.parametrize("top_k", [1, 5, SIZE, 1000])
def test_the_top_tokens_are_the_most_probable_in_their_order(top_k: int) -> None:
    log_p = log_probs(3)
    got = lens(log_p, log_p, top_k)
    p = log_p.exp().numpy()
    order = np.argsort(-p, axis=1)[:, : min(top_k, SIZE)]
    assert got.top_ids.tolist() == order.tolist()
    assert np.allclose(got.top_probs, np.take_along_axis(p, order, 1), rtol=1e-6)


def test_probabilities_are_summed_in_float64() -> None:
    got = lens(log_probs(4), log_probs(5))
    for values in (got.p_target, got.p_emitted, got.entropy, got.kl_final, got.top_probs):
        assert values.dtype == torch.float64
    exact = lens(log_probs(4, dtype=torch.float64), log_probs(5, dtype=torch.float64))
    assert np.allclose(got.p_target, exact.p_target, rtol=1e-6)


def test_each_row_has_its_own_targets_and_padding_is_not_counted() -> None:
    log_p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]).log()
    targets = torch.tensor([[1, 3, 2], [2, 0, 0]])
    is_target = torch.tensor([[True, True, True], [True, False, False]])
    assert target_mass(log_p, targets, is_target).tolist() == pytest.approx([0.9, 0.2])
    # Control: with its padding counted the second row has token 0 twice too.
    assert target_mass(log_p, targets, torch.ones_like(is_target)).tolist() == pytest.approx([0.9, 1.0])
    assert target_mass(log_p, targets, torch.zeros_like(is_target)).tolist() == [0.0, 0.0]


def test_a_row_emits_its_own_token() -> None:
    log_p = log_probs(6)
    want = log_p.double().exp()[torch.arange(ROWS), torch.arange(ROWS)]
    assert np.allclose(lens(log_p, log_p).p_emitted, want)


# ---- spans ----------------------------------------------------------------------------------------------------


def test_span_masses_are_sums_over_each_rows_own_spans() -> None:
    weights = torch.arange(2 * 3 * 2 * 5.0).reshape(2, 3, 2, 5)
    spans = torch.zeros(2, 4, 5, dtype=torch.bool)
    spans[0, 0, 1:4] = spans[0, 1, 0] = spans[1, 0, 4:] = spans[1, 3, :] = True
    got = span_masses(weights, spans)
    assert got.shape == (2, 3, 2, 4)
    for head in range(3):
        for query in range(2):
            first, second = weights[0, head, query].tolist(), weights[1, head, query].tolist()
            assert got[0, head, query].tolist() == [sum(first[1:4]), first[0], 0, 0]
            assert got[1, head, query].tolist() == [second[4], 0, 0, sum(second)]


# ---- ratios ---------------------------------------------------------------------------------------------------

MASSES = np.array([[0.4, 0.1, 0.2, 0.4]])  # one head, of SPANS: instruction, negation, mention, question
LENGTHS = (10, 2, 1, 5)


def ratios(lengths: Sequence[int | None] = LENGTHS, masses: np.ndarray = MASSES) -> dict[str, np.ndarray | None]:
    return dict(attention_ratios(masses, lengths))


def test_attention_ratios_are_what_a_pencil_gives() -> None:
    assert SPANS == ("instruction", "negation", "mention", "question")
    want = {
        "iar": 0.5, "nf": 0.25, "tmf": 0.5, "pi": 0.25,
        # Per token .04, .05, .2 and .08.
        "iar_token": 1 / 3, "nf_token": 1.25, "tmf_token": 5.0, "pi_token": 3.75,
    }  # fmt: skip
    found = ratios()
    assert set(found) == set(want)
    assert {k: v.item() for k, v in found.items() if v is not None} == pytest.approx(want, abs=1e-6)


def test_spans_of_one_token_have_the_same_ratios_per_token() -> None:
    found = ratios((1, 1, 1, 1))
    for name in ("iar", "nf", "tmf", "pi"):
        assert found[name] == found[f"{name}_token"]


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("instruction", {"iar", "nf", "tmf", "pi"}),
        ("negation", {"nf", "pi"}),
        ("mention", {"tmf", "pi"}),
        ("question", {"iar"}),
    ],
)
def test_a_ratio_without_its_span_does_not_exist_and_the_others_keep_their_values(missing: str, gone: set[str]) -> None:
    at = SPANS.index(missing)
    masses = MASSES.copy()
    masses[:, at] = 0.0  # what the sum over no tokens is: a ratio of it would be 0, and say something it does not know
    found, whole = ratios([None if i == at else n for i, n in enumerate(LENGTHS)], masses), ratios()
    for name, value in found.items():
        if name.removesuffix("_token") in gone:
            assert value is None
        else:
            assert value is not None
            assert value.tolist() == whole[name].tolist()  # type: ignore[union-attr]


def test_no_span_at_all_leaves_no_ratio() -> None:
    assert set(ratios([None] * 4, np.zeros((1, 4))).values()) == {None}


def test_ratios_keep_the_shape_of_layers_and_heads() -> None:
    masses = np.random.default_rng(0).random((3, 2, 4)).astype(np.float32)
    found = ratios(LENGTHS, masses)
    for name, value in found.items():
        assert value is not None
        assert value.shape == (3, 2)
        one = ratios(LENGTHS, masses[2])[name]
        assert one is not None
        assert value[2].tolist() == one.tolist()


def test_no_attention_on_a_span_is_a_ratio_of_zero_and_not_a_division_by_zero() -> None:
    found = ratios(masses=np.zeros((1, 4)))
    assert {v.item() for v in found.values() if v is not None} == {0.0}
    tiny = ratios(masses=np.array([[0.0, EPSILON, 0.0, 0.0]]))
    assert tiny["nf"] is not None
    assert float(tiny["nf"][0]) == pytest.approx(1.0), "the epsilon of the paper's ratios"
