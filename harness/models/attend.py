"""The attention function every model here runs with: SDPA, told by a `Layout` what each token may look at; it hands
out the attention weights of chosen query rows (`watch_rows`), which are computed beside SDPA and for those rows alone.

Transformers builds masks per family (causal, sliding, per layer type, as a tensor or a dictionary). A scoring tree or
a grown cache needs masks of its own, so the function asks the active `Layout` instead and the family's plumbing is
bypassed. The function is registered with *both* of transformers' interfaces: registered for attention alone it would
be handed no mask at all, and lose padding and sliding windows without a word.

Soft-capped scores (Gemma 2) and attention sinks (gpt-oss) are computed explicitly: SDPA has no place for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from harness.models.cells import Cells, shared_cells

NAME = "harness"


class Layout:
    """What each query token may look at, by key, and where both stand in their text.

    `allowed` [R, T, S] is the mask before any sliding window; None means plain causal attention over keys in order
    (then T equals S). Windows are cut by position, not by index, so padding and tree nodes do not shift them.
    `blocked` [R, T, S] per layer is what may not be looked at in that layer alone (attention knockout, Geva et al. 2023).
    `cells` says which tokens of the grid [R, T] are computed; without them all are, padding too.
    """

    def __init__(
        self,
        q_positions: Int[Tensor, "R T"],
        k_positions: Int[Tensor, "R S"],
        allowed: Bool[Tensor, "R T S"] | None = None,
        blocked: Mapping[int, Bool[Tensor, "R T S"]] | None = None,
        cells: Cells | None = None,
    ):
        assert allowed is not None or q_positions.shape == k_positions.shape, (
            "plain causal needs as many keys as queries"
        )
        self.q_positions = q_positions
        self.k_positions = k_positions
        self.cells = cells
        self._allowed = allowed
        self._blocked = dict(blocked or {})
        self._masks: dict[int | None, Bool[Tensor, "R 1 T S"]] = {}
        # From the first key on, wherever it stands: a text may be moved to before position 0.
        self._reach = int(q_positions.max() - k_positions.min()) + 1 if q_positions.numel() else 0

    def window_cuts(self, window: int | None) -> bool:
        """Whether a sliding window of this many tokens hides anything from a token here."""
        return window is not None and window < self._reach

    def is_causal(self, window: int | None, layer: int | None = None) -> bool:
        """Whether plain causal attention, without any mask, does the same."""
        return self._allowed is None and not self.window_cuts(window) and layer not in self._blocked

    def mask(self, window: int | None = None, layer: int | None = None) -> Bool[Tensor, "R 1 T S"]:
        """The mask for a layer with this window; built once per window."""
        key = window if self.window_cuts(window) else None
        if key not in self._masks:
            allowed = self._allowed
            if allowed is None:
                rows, length = self.q_positions.shape
                triangle = torch.ones(length, length, dtype=torch.bool, device=self.q_positions.device).tril()
                allowed = triangle.expand(rows, length, length)
            if key is not None:
                distance = self.q_positions[:, :, None] - self.k_positions[:, None, :]
                allowed = allowed & (distance < key)
            self._masks[key] = allowed[:, None]
        if layer in self._blocked:
            return self._masks[key] & ~self._blocked[layer][:, None]
        return self._masks[key]

    def rows(
        self, at: Int[Tensor, "R Q"], window: int | None = None, layer: int | None = None
    ) -> Bool[Tensor, "R Q S"]:
        """The mask of the query tokens `at` alone, without building the whole of it where it is plain causal."""
        if not self.is_causal(None, layer):
            mask = self.mask(window, layer)[:, 0]
            return mask.gather(1, at[:, :, None].expand(-1, -1, mask.shape[2]))
        allowed = torch.arange(self.k_positions.shape[1], device=at.device) <= at[:, :, None]
        if window is not None and self.window_cuts(window):
            distance = self.q_positions.gather(1, at)[:, :, None] - self.k_positions[:, None, :]
            allowed = allowed & (distance < window)
        return allowed


def right_padded(
    texts: Sequence[Sequence[int]], device: torch.device, *, shifts: Sequence[int] | None = None, is_apart: bool = False
) -> tuple[Int[Tensor, "R T"], Layout]:
    """Tokens of several texts as one causal batch: padding stands behind each text, where nothing of it looks.

    Padding is never computed; a beginning that texts have in common is computed once, unless `is_apart`. A text stands as
    many places further on as `shifts` says, by which equal tokens become different ones: texts must be apart then.
    """
    assert shifts is None or is_apart, "texts that stand at different places have nothing in common"
    width = max(map(len, texts))
    tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in texts], dtype=torch.long, device=device)
    positions = torch.arange(width, device=device).expand(len(texts), width)
    if shifts is not None:
        positions = positions + torch.tensor(shifts, device=device)[:, None]
    return tokens, Layout(positions, positions, cells=shared_cells(texts, [0] * len(texts), device, is_apart))


@dataclass(frozen=True)
class _RowTap:
    at: Int[Tensor, "R Q"]
    receive: Callable[[int, Tensor], None]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)
_is_cached: ContextVar[bool] = ContextVar("is_cached", default=False)
_windows_seen: ContextVar[dict[int, int | None] | None] = ContextVar("windows_seen", default=None)
_row_tap: ContextVar[_RowTap | None] = ContextVar("row_tap", default=None)
_is_frozen: ContextVar[bool] = ContextVar("is_frozen", default=False)


@contextmanager
def use(layout: Layout, *, is_cached: bool = False) -> Iterator[Layout]:
    """Forwards inside the block see exactly what `layout` allows, in every layer. `is_cached`: they grow a `GridCache`."""
    token, cached = _layout.set(layout), _is_cached.set(is_cached)
    try:
        yield layout
    finally:
        _layout.reset(token)
        _is_cached.reset(cached)


def active() -> Layout | None:
    """The layout that a forward going on now runs under."""
    return _layout.get()


class GridCache(DynamicCache):
    """Keys and values of every token, a row a text: new ones are laid out in the grid before they are appended.

    It keeps every key: windows are cut by the layout, by position.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values [R, G, S, K] of this layer, the new ones [1, G, N, K] (or [R, G, T, K]) behind the others."""
        layout = _layout.get()
        if layout is not None and layout.cells is not None:
            cells = layout.cells.at(layer_idx)
            key_states, value_states = _spread(cells, key_states), _spread(cells, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Put `how(x)` in place of the keys and the values x [R, G, S, K] of every layer."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keys, layer.values = how(layer.keys), how(layer.values)

    def join(self, other: "GridCache") -> None:
        """Take in the rows of `other`, which has as many slots, behind these."""
        pairs: list[tuple[Any, Any]] = list(zip(self.layers, other.layers, strict=True))
        for mine, new in pairs:
            mine.keys, mine.values = torch.cat([mine.keys, new.keys]), torch.cat([mine.values, new.values])


def _spread(cells: Cells, heads: Float[Tensor, "1 H N K"]) -> Float[Tensor, "R H T K"]:
    return cells.spread(heads.transpose(1, 2)).transpose(1, 2)


@contextmanager
def watch_windows() -> Iterator[dict[int, int | None]]:
    """Collects the sliding window each layer was called with: {layer: window or None}."""
    seen: dict[int, int | None] = {}
    token = _windows_seen.set(seen)
    try:
        yield seen
    finally:
        _windows_seen.reset(token)


@contextmanager
def frozen_patterns() -> Iterator[None]:
    """Gradients of forwards inside the block take attention weights for constants: they flow through values alone."""
    token = _is_frozen.set(True)
    try:
        yield
    finally:
        _is_frozen.reset(token)


@contextmanager
def watch_rows(at: Int[Tensor, "R Q"], receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hands `receive(layer, weights [R, H, Q, S])` the attention weights of the query tokens `at`, in every layer.

    Weights are float32 (float64 of a float64 model); with sinks a row sums to less than 1. Needs an active layout.
    """
    token = _row_tap.set(_RowTap(at, receive))
    try:
        yield
    finally:
        _row_tap.reset(token)


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R H T K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S _"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention output [R, T, H, K] under the active layout, or under `attention_mask` where none is active.

    Where the layout has cells, queries come as one row of tokens and go so; keys too, unless a cache has laid them out.
    """
    layout = _layout.get()
    if _is_frozen.get():
        query, key = query.detach(), key.detach()
    layer: int | None = getattr(module, "layer_idx", None)
    cells = None if layout is None or layout.cells is None else layout.cells.at(layer)
    if cells is not None:
        if not _is_cached.get():  # else the cache has laid them out
            key, value = _spread(cells, key), _spread(cells, value)
        query = _spread(cells, query)
    seen = _windows_seen.get()
    if seen is not None:
        seen[getattr(module, "layer_idx", len(seen))] = sliding_window
    if layout is not None:
        expected = layout.k_positions.shape[1]
        assert key.shape[2] == expected, f"the cache holds {key.shape[2]} keys where the layout has {expected}"
    plain = softcap is None and s_aux is None
    if layout is None:
        mask = attention_mask
    else:
        mask = None if plain and layout.is_causal(sliding_window, layer) else layout.mask(sliding_window, layer)
    tap = _row_tap.get()
    if tap is not None:
        assert layout is not None, "rows are read under a layout"
        assert layer is not None, "an attention module without a layer_idx"
        allowed = layout.rows(tap.at, sliding_window, layer)
        tap.receive(layer, _weights_of_rows(query, key, tap.at, allowed, scaling, softcap, s_aux))
    kwargs.pop("dropout", None)  # measurements are made in eval mode only
    if plain and query.device.type == "cpu" and layout is not None:
        output = _grouped(query, key, value, mask, scaling)
    elif plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    else:
        output = _explicit(query, key, value, mask, scaling, softcap, s_aux)
    return output if cells is None else cells.gather(output), None


def _grouped(
    query: Float[Tensor, "R H T K"],
    key: Float[Tensor, "R G S K"],
    value: Float[Tensor, "R G S V"],
    mask: Tensor | None,
    scaling: float | None,
) -> Float[Tensor, "R T H V"]:
    """SDPA in which the heads that share keys stand as further queries of one head: keys and values are not repeated,
    which on a CPU takes longer than the attention itself."""
    rows, heads, num, width = query.shape
    shared = heads // key.shape[1]
    is_causal = mask is None and num > 1
    if shared > 1:
        query = query.reshape(rows, key.shape[1], shared * num, width)
        if is_causal:
            mask, is_causal = torch.ones(num, num, dtype=torch.bool).tril(), False
        if mask is not None:
            mask = mask.repeat(*[1] * (mask.ndim - 2), shared, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling
    )
    return output.reshape(rows, heads, num, value.shape[3]).transpose(1, 2)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out, softmax in float32, with soft-capping and sinks as transformers' eager attention has them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        length, keys = query.shape[2], key.shape[2]
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    weights = _softmax(scores, mask, softcap, sinks, torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


def _weights_of_rows(
    query: Float[Tensor, "R H T K"],
    key: Float[Tensor, "R G S K"],
    at: Int[Tensor, "R Q"],
    allowed: Bool[Tensor, "R Q S"],
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Float[Tensor, "R H Q S"]:
    """Attention weights of some query tokens. Heads that share keys are multiplied together, so keys are not repeated."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, heads, _, width = query.shape
    groups, num = key.shape[1], at.shape[1]
    chosen = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).to(wide)
    scores = chosen.reshape(rows, groups, heads // groups * num, width) @ key.to(wide).transpose(2, 3)
    scores = scores.reshape(rows, heads, num, key.shape[2]) * (width**-0.5 if scaling is None else scaling)
    return _softmax(scores, allowed[:, None], softcap, sinks, wide)


def _softmax(
    scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "R H T S"]:
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(-1, dtype=dtype)
    column = sinks.reshape(1, -1, 1, 1).to(scores.dtype).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1, dtype=dtype)[..., :-1]


def _mask(*args, **kwargs) -> Tensor | None:
    """The mask transformers asks for: none under a layout, which has its own; SDPA's otherwise."""
    from transformers.masking_utils import sdpa_mask

    return None if _layout.get() is not None else sdpa_mask(*args, **kwargs)


@cache
def registered() -> str:
    """The name of our attention, which transformers knows from now on.

    Not when this module is imported: transformers' interfaces take seconds to import, and a command that loads no model,
    such as one that finds its run finished, need not wait for them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
