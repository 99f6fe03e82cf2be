"""Random numbers that belong to the item: a stateless generator keyed by (root seed, prompt, condition, sample, step).

The value for a token depends on nothing else, so the same text comes out for any batch size, order, resume or number
of workers. Integer arithmetic is exact, so CPU and GPU give the same bits. The mixing function is SplitMix64's
(Steele, Lea & Flood 2014), a counter-based generator: output n of a stream is a hash of key + n·γ.
"""

import hashlib
import json

import torch
from jaxtyping import Float, Int
from torch import Tensor

RULE = (
    "key = blake2b-64(json [seed, prompt_id, condition, sample_id]); at step t and token v: "
    "u = splitmix64(splitmix64(key + t*gamma) + (v+1)*gamma) / 2^64; token = argmax(logits/T - ln(-ln u))"
)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def row_key(seed: int, prompt_id: str, condition: str, sample_id: int) -> int:
    """The noise key of one completion, an int64."""
    text = json.dumps([seed, prompt_id, condition, sample_id], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _shift_right(x: Int[Tensor, "*n"], bits: int) -> Int[Tensor, "*n"]:
    """Logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def uniform(
    keys: Int[Tensor, " R"], step: int | Int[Tensor, " R"], token_ids: Int[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """Float64 in the open interval (0, 1), one for each row and token at this step, or at each row's own."""
    # An int64 product wraps as arithmetic modulo 2^64 does, which Python's own integers have to be told.
    offset = step * _GAMMA if isinstance(step, Tensor) else _signed(step * 0x9E3779B97F4A7C15 % (1 << 64))
    at_step = _mix(keys + offset)
    bits = _shift_right(_mix(at_step[:, None] + (token_ids + 1) * _GAMMA), 12)
    return (bits.double() + 0.5) * 2.0**-52


def gumbel(
    keys: Int[Tensor, " R"], step: int | Int[Tensor, " R"], token_ids: Int[Tensor, "R V"]
) -> Float[Tensor, "R V"]:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits)."""
    return -torch.log(-torch.log(uniform(keys, step, token_ids)))
