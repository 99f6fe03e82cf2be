"""Noise that belongs to the item: pinned values, and the laws that make it noise."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch import Tensor

from harness.models import noise
from harness.models.noise import gumbel, row_key, uniform

MASK = (1 << 64) - 1
PINNED_KEYS = (-1844622111005418162, -3955915885218110356)
PINNED_UNIFORM = [0.9302874638535357, 0.8138721652232379, 0.6659929923207122,
                  0.05816240739533701, 0.12238356505251174, 0.24891237029622942]  # fmt: skip
PINNED_GUMBEL = 2.6274618621430896
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(x: int) -> int:
    """The finaliser of SplitMix64 as its authors wrote it, on Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def invert(x: int) -> int:
    """The number that `splitmix64` turns into `x`."""

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits + 1):
            result = value ^ (result >> bits)
        return result

    x = (unshift(x, 31) * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
    x = (unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
    return unshift(x, 30)


def signed(x: int) -> int:
    return (x & MASK) - (1 << 64) if x & (1 << 63) else x & MASK


def plain_uniform(key: int, step: int, token: int) -> float:
    """`noise.RULE`, read by eye."""
    at_step = splitmix64((key + step * GAMMA) & MASK)
    return (splitmix64((at_step + (token + 1) * GAMMA) & MASK)) / 2**64


def many(rows: int, tokens: int, step: int = 0) -> Tensor:
    keys = torch.tensor([row_key(0, "prompt", "baseline", i) for i in range(rows)])
    return uniform(keys, step, torch.arange(tokens).expand(rows, -1))


# ---- pinned ---------------------------------------------------------------------------------------------------


def test_the_mixing_function_is_splitmix64() -> None:
    """The first outputs of the published generator for the seeds 0 and 1234567."""
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, outputs in published.items():
        states = torch.tensor([signed(seed + (n + 1) * GAMMA) for n in range(3)])
        assert [x & MASK for x in noise._mix(states).tolist()] == outputs


def test_keys_and_values_are_pinned() -> None:
    """A change of these changes every sample ever drawn: it needs a new version of the stage and of `noise.RULE`."""
    assert (row_key(0, "facts_paris_1", "baseline", 0), row_key(7, "idioms_größe", "negative", 15)) == PINNED_KEYS
    got = uniform(torch.tensor([0, 1, -1]), 3, torch.tensor([[0, 1], [2, 3], [4, 150_000]]))
    assert got.dtype == torch.float64
    assert got.flatten().tolist() == pytest.approx(PINNED_UNIFORM, rel=0, abs=1e-15)
    assert gumbel(torch.tensor([0]), 3, torch.tensor([[0]])).item() == pytest.approx(PINNED_GUMBEL, abs=1e-12)


def test_a_row_key_is_the_first_64_bits_of_its_items_hash() -> None:
    digest = hashlib.blake2b(json.dumps([3, "é", "c", 2], ensure_ascii=False).encode(), digest_size=8).digest()
    assert row_key(3, "é", "c", 2) == int.from_bytes(digest, "little", signed=True)
    assert "blake2b-64(json [seed, prompt_id, condition, sample_id])" in noise.RULE


int64 = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None)
@given(int64, st.integers(0, 10_000), st.integers(0, 1 << 18))
def test_values_follow_the_rule_that_the_manifest_states(key: int, step: int, token: int) -> None:
    got = uniform(torch.tensor([key]), step, torch.tensor([[token]])).item()
    assert got == pytest.approx(plain_uniform(key, step, token), rel=0, abs=2**-52)


# ---- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 9])
def test_values_are_uniform_over_rows_and_over_tokens(step: int) -> None:
    values = many(300, 300, step)
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    fine = (values * 1e6 % 1).flatten()  # the low digits as well
    assert kstest(fine.numpy(), "uniform").pvalue > 1e-3
    assert (
        kstest(gumbel(torch.arange(300), step, torch.arange(300).expand(300, -1)).flatten(), "gumbel_r").pvalue > 1e-3
    )
    # Control: the test sees a distribution that is off by a twentieth.
    assert kstest((values.flatten() ** 1.05).numpy(), "uniform").pvalue < 1e-9


def test_neighbours_are_independent() -> None:
    """Pairs (token, next token), (row, next row), (step, next step) fill a grid evenly; consecutive keys too."""
    values, later = many(400, 400), many(400, 400, step=1)
    rows = uniform(torch.arange(400), 0, torch.arange(400).expand(400, -1))
    pairs = [(values[:, :-1], values[:, 1:]), (values[:-1], values[1:]), (values, later), (rows[:-1], rows[1:])]
    for a, b in pairs:
        assert chisquare(_grid(a, b)).pvalue > 1e-3
    # Control: a pair that depends on each other a little.
    assert chisquare(_grid(values, (values * 0.1 + later * 0.9))).pvalue < 1e-9


def _grid(a: Tensor, b: Tensor) -> list[int]:
    cell = (a.flatten() * 16).long() * 16 + (b.flatten() * 16).long()
    return torch.bincount(cell, minlength=256).tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(int64, min_size=1, max_size=6), st.integers(0, 50), st.permutations(range(7)))
def test_a_value_depends_on_its_key_step_and_token_alone(keys: list[int], step: int, tokens: list[int]) -> None:
    """Not on the rows beside it, nor on where in the vocabulary's order its token stands."""
    together = uniform(torch.tensor(keys), step, torch.tensor(tokens).expand(len(keys), -1))
    for i, key in enumerate(keys):
        for j, token in enumerate(tokens):
            assert together[i, j] == uniform(torch.tensor([key]), step, torch.tensor([[token]])).item()


def test_another_key_step_or_token_gives_another_value() -> None:
    values = torch.stack([many(50, 50, step) for step in range(5)])
    assert values.unique().numel() == values.numel()


# The greatest and the least 64 bits the mixing can give, and the greatest that differ in the bits that are kept.
@pytest.mark.parametrize("bits", [0, 1, MASK, MASK - (1 << 11), 1 << 63, (1 << 63) - 1])
@pytest.mark.parametrize(("step", "token"), [(0, 0), (4, 151_000)])
def test_values_lie_strictly_between_zero_and_one_even_at_the_ends(bits: int, step: int, token: int) -> None:
    """At 0 or 1 the Gumbel noise is infinite: that token would be drawn whatever its probability."""
    at_step = (invert(bits) - (token + 1) * GAMMA) & MASK
    key = signed(invert(at_step) - step * GAMMA)
    assert plain_uniform(key, step, token) == bits / 2**64  # the key does give these bits
    value = uniform(torch.tensor([key]), step, torch.tensor([[token]])).item()
    assert 0 < value < 1
    assert torch.isfinite(gumbel(torch.tensor([key]), step, torch.tensor([[token]]))).all()


# ---- keys -----------------------------------------------------------------------------------------------------

awkward = st.text(st.sampled_from('a|,"\\[] \n0é\N{COMBINING ACUTE ACCENT}'), max_size=6)
parts = st.tuples(st.integers(0, 12), awkward, awkward, st.integers(0, 12))


@settings(deadline=None, max_examples=300)
@given(parts, parts)
def test_different_items_have_different_keys(a: tuple, b: tuple) -> None:
    assert (row_key(*a) == row_key(*b)) == (a == b)


def test_delimiters_inside_a_name_cannot_make_two_items_one() -> None:
    """Names as a careless join would confuse them: each pair below is one text under some separator."""
    items = [
        (0, "a|b", "c", 1), (0, "a", "b|c", 1), (0, "a,b", "c", 1), (0, "a", "b,c", 1), (0, 'a", "b', "c", 1),
        (0, "a", 'b", "c', 1), (1, "1", "1", 11), (11, "1", "1", 1), (1, "11", "1", 1), (1, "1", "11", 1),
        (0, "a\\", "b", 1), (0, "a", "\\b", 1), (0, "é", "b", 1), (0, "e\N{COMBINING ACUTE ACCENT}", "b", 1),
    ]  # fmt: skip
    assert len({row_key(*item) for item in items}) == len(items)
    # Control: joined by one of these, some are the same.
    for separator in ("", "|", ",", '", "'):
        assert len({separator.join(map(str, item)) for item in items}) < len(items)


def test_keys_fit_int64_and_do_not_collide_in_a_large_run() -> None:
    keys = [row_key(0, f"p{p}", c, s) for p in range(500) for c in ("baseline", "negative") for s in range(16)]
    assert torch.tensor(keys).dtype == torch.int64
    assert len(set(keys)) == len(keys)
