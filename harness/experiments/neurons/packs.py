"""Statistics of every neuron over a pack of texts, from forwards whose activations are not kept, and how packs are merged.

Per neuron the moments of its activations (Pébay 2008: central, in float64, so that merging loses nothing) and those of its
peaks max|a| over a text, the texts in which it peaks highest, and at which tokens it does. Packs are merged in their order:
no number depends on who made which.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.models.load import LM
from harness.models.neurons import read

_MOST_ENTRIES = 4_000_000
"""Of all layers' token tables of one pack; beyond, each neuron keeps its most frequent tokens and the error is told."""
_KEPT_TOKENS = 16
_AT_ONCE = 1 << 21
"""Numbers that are in float64 at one time."""
_TABLES = ("peak", "next")


@dataclass(frozen=True)
class Text:
    """A text, and which of its tokens are counted."""

    name: str
    tokens: tuple[int, ...]
    counted: tuple[int, ...]


class Bad(NamedTuple):
    """The first activation of a text that is no number."""

    name: str
    layer: int
    position: int


class Moments(NamedTuple):
    """n, the mean, and the sums of the 2nd to 4th powers of what is left without it; float64, a number a neuron."""

    n: int
    mean: Float[np.ndarray, " M"]
    m2: Float[np.ndarray, " M"]
    m3: Float[np.ndarray, " M"]
    m4: Float[np.ndarray, " M"]

    @classmethod
    def of(cls, rows: Float[Tensor, "K M"]) -> "Moments":
        """Those of each column."""
        found = []
        for some in rows.split(
            max(1, _AT_ONCE // max(1, len(rows))), 1
        ):  # float64 of all at once would be most of the memory
            wide = some.double()
            mean = wide.mean(0)
            left = wide - mean
            square = left * left
            found.append(torch.stack([mean, square.sum(0), (square * left).sum(0), (square * square).sum(0)]))
        return cls(len(rows), *torch.cat(found, 1).cpu().numpy())

    def plus(self, b: "Moments") -> "Moments":
        """Those of both together."""
        if not (self.n and b.n):
            return b if not self.n else self
        a, n = self, self.n + b.n
        d = b.mean - a.mean
        m2 = a.m2 + b.m2 + d**2 * a.n * b.n / n
        m3 = a.m3 + b.m3 + d**3 * a.n * b.n * (a.n - b.n) / n**2 + 3 * d * (a.n * b.m2 - b.n * a.m2) / n
        m4 = (
            a.m4 + b.m4 + d**4 * a.n * b.n * (a.n**2 - a.n * b.n + b.n**2) / n**3
            + 6 * d**2 * (a.n**2 * b.m2 + b.n**2 * a.m2) / n**2 + 4 * d * (a.n * b.m3 - b.n * a.m3) / n
        )  # fmt: skip
        return Moments(n, a.mean + d * b.n / n, m2, m3, m4)

    @property
    def sd(self) -> Float[np.ndarray, " M"]:
        """Of the population."""
        return np.sqrt(self.m2 / max(self.n, 1))

    @property
    def kurtosis(self) -> Float[np.ndarray, " M"]:
        """n·M₄/M₂²: 3 of a normal distribution; NaN where nothing varies."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.m2 > 0, self.n * self.m4 / self.m2**2, np.nan)


class Counts(NamedTuple):
    """How often each neuron's peaks stand at each token: entries by neuron, `start` [M + 1] says from where. `error`: no
    token's count is too low by more than this."""

    start: Int[np.ndarray, " M1"]
    token: Int[np.ndarray, " E"]
    times: Int[np.ndarray, " E"]
    error: Int[np.ndarray, " M"]

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "P M"], most: int) -> "Counts":
        """Of a pack's peaks; −1 is no token. At most `most` entries, unless each neuron's most frequent are more."""
        rows = np.sort(np.ascontiguousarray(tokens.T, dtype=np.int32), axis=1)
        is_first = np.ones(rows.shape, dtype=bool)
        is_first[:, 1:] = rows[:, 1:] != rows[:, :-1]
        first = np.flatnonzero(is_first)
        which, total, owner = rows.ravel()[first], np.diff(first, append=rows.size), first // rows.shape[1]
        is_token = which >= 0
        return cls._kept(owner[is_token], which[is_token], total[is_token], len(rows), most)

    @classmethod
    def _kept(cls, owner: np.ndarray, which: np.ndarray, total: np.ndarray, num: int, most: int | None) -> "Counts":
        """Of entries in order of neuron and token."""
        error = np.zeros(num, dtype=np.int64)
        if most is not None and len(which) > most:
            # By count, then by id: the first of each neuron stay.
            order = np.lexsort((which, -total, owner))
            place = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
            dropped = order[place >= _KEPT_TOKENS]
            np.maximum.at(error, owner[dropped], total[dropped])
            kept = np.sort(order[place < _KEPT_TOKENS])
            owner, which, total = owner[kept], which[kept], total[kept]
        start = np.searchsorted(owner, np.arange(num + 1))
        return cls(start, which.astype(np.int32), total.astype(np.int32), error.astype(np.int32))

    @classmethod
    def merged(cls, parts: Sequence["Counts"]) -> "Counts":
        """All counts together."""
        num = len(parts[0].error)
        neuron = np.concatenate([np.repeat(np.arange(num), np.diff(p.start)) for p in parts])
        token = np.concatenate([p.token for p in parts]).astype(np.int64)
        count = np.concatenate([p.times for p in parts])
        pair, where = np.unique(neuron * (1 << 31) + token, return_inverse=True)
        total = np.bincount(where, weights=count, minlength=len(pair)).astype(np.int64)
        found = cls._kept(pair >> 31, pair & ((1 << 31) - 1), total, num, None)
        return found._replace(error=np.sum([p.error for p in parts], axis=0))

    def modes(self) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
        """The most frequent token of each neuron (of equals the smallest id; −1 without any), and how often it is."""
        num = len(self.error)
        owner = np.repeat(np.arange(num), np.diff(self.start))
        order = np.lexsort((self.token, -self.times, owner))
        token, count = np.full(num, -1, dtype=np.int64), np.zeros(num, dtype=np.int64)
        has = np.diff(self.start) > 0
        first = order[self.start[:-1][has]]
        token[has], count[has] = self.token[first], self.times[first]
        return token, count


@dataclass
class Layer:
    """One layer's statistics of a pack, or of several merged. `examples` are (ordinal of the text, position, value) [E, M],
    the highest first; ordinals count all packs' texts. Background packs have neither examples nor tokens."""

    moments: Moments
    num_active: Int[np.ndarray, " M"]
    peaks: Moments
    max_peak: Float[np.ndarray, " M"]
    min_peak: Float[np.ndarray, " M"]
    max_signed: Float[np.ndarray, " M"]
    examples: tuple[Int[np.ndarray, "E M"], Int[np.ndarray, "E M"], Float[np.ndarray, "E M"]] | None = None
    tokens: Mapping[str, Counts] | None = None
    num_functional: Int[np.ndarray, " M"] | None = None

    def plus(self, other: "Layer", top: int) -> "Layer":
        """Both together; texts of `other` come behind, and its token tables are merged elsewhere, all at once."""
        is_larger = other.max_peak > self.max_peak
        examples = None
        if self.examples is not None and other.examples is not None:
            examples = _highest(
                *(np.concatenate([a, b]) for a, b in zip(self.examples, other.examples, strict=True)), top=top
            )
        functional = None
        if self.num_functional is not None and other.num_functional is not None:
            functional = self.num_functional + other.num_functional
        return Layer(
            self.moments.plus(other.moments),
            self.num_active + other.num_active,
            self.peaks.plus(other.peaks),
            np.maximum(self.max_peak, other.max_peak),
            np.minimum(self.min_peak, other.min_peak),
            np.where(is_larger, other.max_signed, self.max_signed),
            examples,
            None,
            functional,
        )


def _highest(
    texts: np.ndarray, positions: np.ndarray, values: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `top` of largest |value| a column; of equals the earlier text."""
    order = np.lexsort((texts, -np.abs(values)), axis=0)[:top]
    return (
        np.take_along_axis(texts, order, 0),
        np.take_along_axis(positions, order, 0),
        np.take_along_axis(values, order, 0),
    )


class Pack(NamedTuple):
    """The statistics of some texts by layer, and which texts are not in them."""

    num_texts: int
    num_tokens: int
    layers: dict[int, Layer]
    bad: list[Bad]


def pack_of(
    lm: LM,
    texts: Sequence[Text],
    layers: Sequence[int],
    most_tokens: int,
    *,
    first: int = 0,
    top: int | None = None,
    functional: frozenset[int] = frozenset(),
) -> Pack:
    """Statistics over `texts`, forwarded so many tokens at a time. `first`: the ordinal of the first of them. `top`: examples
    kept a neuron; None makes no tables of texts and tokens. Texts with an activation that is no number are left out."""
    made = [_Forwarded(lm, some, layers) for some in _some(texts, most_tokens)]
    good: list[_Forwarded] = []
    bad: list[Bad] = []
    for forward in made:
        if not forward.bad():
            good.append(forward)
            continue
        # One text may have another's NaN (0 × NaN): each says its own alone.
        for text in forward.texts:
            alone = _Forwarded(lm, [text], layers)
            own = alone.bad()
            bad += own
            good += [] if own else [alone]
    kept = [text for forward in good for text in forward.texts]
    ordinal = {text.name: first + n for n, text in enumerate(texts)}
    found = {}
    for layer in layers if kept else ():
        moments, active = Moments(0, *[np.zeros(0)] * 4), None
        for forward in good:
            moments = moments.plus(forward.moments[layer])
            active = forward.active[layer] if active is None else active + forward.active[layer]
        # A layer's numbers are let go with it: all of them together are most of what a pack holds.
        signed = torch.cat([forward.signed.pop(layer) for forward in good])
        where = torch.cat([forward.where.pop(layer) for forward in good]).cpu().numpy()
        found[layer] = _layer(moments, active, signed, where, kept, ordinal, len(layers), top, functional)
    return Pack(len(kept), sum(len(t.counted) for t in kept), found, bad)


def _some(texts: Sequence[Text], most_tokens: int) -> Iterator[list[Text]]:
    some: list[Text] = []
    for text in texts:
        if some and sum(len(t.tokens) for t in some) + len(text.tokens) > most_tokens:
            yield some
            some = []
        some.append(text)
    if some:
        yield some


class _Forwarded:
    """What one forward leaves: a number of each kind a neuron and text, and the moments of its tokens together."""

    def __init__(self, lm: LM, texts: Sequence[Text], layers: Sequence[int]):
        self.texts = list(texts)
        self.moments: dict[int, Moments] = {}
        self.active: dict[int, np.ndarray] = {}
        self.signed: dict[int, Tensor] = {}
        self.where: dict[int, Tensor] = {}
        ends = np.cumsum([len(t.counted) for t in texts])
        starts = ends - [len(t.counted) for t in texts]

        def receive(layer: int, rows: Tensor) -> None:
            signed, where = [], []
            for text, start, end in zip(self.texts, starts, ends, strict=True):
                own = rows[start:end]
                at = own.abs().max(0).indices  # of equals the earliest
                signed.append(own.gather(0, at[None])[0])
                where.append(torch.tensor(text.counted, device=rows.device, dtype=torch.int32)[at])
            self.signed[layer], self.where[layer] = torch.stack(signed).float(), torch.stack(where)
            self.moments[layer] = Moments.of(rows)
            self.active[layer] = (rows > 0).sum(0).cpu().numpy()

        read(lm, [t.tokens for t in texts], [t.counted for t in texts], layers, receive)

    def bad(self) -> list[Bad]:
        """The first number that is none of each text that has one: |NaN| and |∞| are never less than another's."""
        found: dict[int, Bad] = {}
        for layer, signed in sorted(self.signed.items()):
            is_bad = ~signed.isfinite()
            for n in is_bad.any(1).nonzero()[:, 0].tolist():
                position = int(self.where[layer][n][is_bad[n]].min())
                found.setdefault(n, Bad(self.texts[n].name, layer, position))
        return [found[n] for n in sorted(found)]


def _layer(
    moments: Moments,
    active: np.ndarray | None,
    signed: Float[Tensor, "P M"],
    where: Int[np.ndarray, "P M"],
    kept: Sequence[Text],
    ordinal: Mapping[str, int],
    num_layers: int,
    top: int | None,
    functional: frozenset[int],
) -> Layer:
    assert active is not None, "some text was kept"
    peaks = signed.abs()
    best = peaks.max(0)
    layer = Layer(
        moments,
        active.astype(np.int64),
        Moments.of(peaks),
        best.values.double().cpu().numpy(),
        peaks.min(0).values.double().cpu().numpy(),
        signed.gather(0, best.indices[None])[0].double().cpu().numpy(),
    )
    if top is None:
        return layer
    values = signed.cpu().numpy().astype(np.float32)
    numbers = np.array([ordinal[t.name] for t in kept], dtype=np.int32)
    layer.examples = _highest(np.broadcast_to(numbers[:, None], values.shape), where, values, top)
    width = max(len(t.tokens) for t in kept)
    ids = np.full((len(kept), width + 1), -1, dtype=np.int64)
    for n, text in enumerate(kept):
        ids[n, : len(text.tokens)] = text.tokens
    at_peak = np.take_along_axis(ids, where.astype(np.int64), 1)
    most = _MOST_ENTRIES // (len(_TABLES) * num_layers)
    layer.tokens = {
        "peak": Counts.of(at_peak, most),
        "next": Counts.of(np.take_along_axis(ids, where.astype(np.int64) + 1, 1), most),
    }
    layer.num_functional = np.isin(at_peak, list(functional)).sum(0).astype(np.int64)
    return layer


# ---- to and from files ----------------------------------------------------------------------------------------------


def arrays_of(pack: Pack) -> dict[str, np.ndarray]:
    """A pack as named arrays, a layer each, for a safetensors file."""
    found: dict[str, np.ndarray] = {"num": np.array([pack.num_texts, pack.num_tokens], dtype=np.int64)}
    for number, layer in pack.layers.items():
        own: dict[str, Any] = {
            **{f"moments.{n}": getattr(layer.moments, n) for n in ("mean", "m2", "m3", "m4")},
            **{f"peaks.{n}": getattr(layer.peaks, n) for n in ("mean", "m2", "m3", "m4")},
            "num_active": layer.num_active,
            "max_peak": layer.max_peak,
            "min_peak": layer.min_peak,
            "max_signed": layer.max_signed,
        }
        if layer.examples is not None and layer.tokens is not None:
            own |= {f"examples.{n}": v for n, v in zip(("text", "position", "value"), layer.examples, strict=True)}
            own["num_functional"] = layer.num_functional
            for table, counts in layer.tokens.items():
                own |= {f"{table}.{n}": v for n, v in counts._asdict().items()}
        found |= {f"{number}.{name}": np.ascontiguousarray(value) for name, value in own.items()}
    return found


class Open(NamedTuple):
    """A pack's file, opened: tensors by name, mapped."""

    tensors: Any

    @property
    def num(self) -> tuple[int, int]:
        """Texts and tokens."""
        texts, tokens = self.tensors.get_tensor("num").tolist()
        return texts, tokens

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors.keys()  # noqa: SIM118

    def layer(self, number: int) -> Layer:
        """One layer's statistics."""

        def get(name: str) -> np.ndarray:
            return self.tensors.get_tensor(f"{number}.{name}")

        texts, tokens = self.num
        moments = (
            Moments(n, *(get(f"{kind}.{m}") for m in ("mean", "m2", "m3", "m4")))
            for kind, n in (("moments", tokens), ("peaks", texts))
        )
        layer = Layer(
            next(moments), get("num_active"), next(moments), get("max_peak"), get("min_peak"), get("max_signed")
        )
        if self.has(f"{number}.num_functional"):
            layer.examples = (get("examples.text"), get("examples.position"), get("examples.value"))
            layer.num_functional = get("num_functional")
            layer.tokens = {table: Counts(*(get(f"{table}.{n}") for n in Counts._fields)) for table in _TABLES}
        return layer


def merged(packs: Sequence[Open], number: int, top: int = 0) -> Layer:
    """One layer of several packs, in their order."""
    found: Layer | None = None
    tables: dict[str, list[Counts]] = {}
    for pack in packs:
        if not pack.num[0]:
            continue
        layer = pack.layer(number)
        for table, counts in (layer.tokens or {}).items():
            tables.setdefault(table, []).append(counts)
        found = layer if found is None else found.plus(layer, top)
    assert found is not None, "some pack has a text"
    found.tokens = {table: Counts.merged(parts) for table, parts in tables.items()} or None
    return found
