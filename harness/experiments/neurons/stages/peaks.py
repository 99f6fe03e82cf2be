"""Stage `peaks`: packs merged in the order of their plan, one row a neuron, held against the background."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from harness.engine import AnyTables, FileHandle, Item, ItemResult, Tables
from harness.errors import RunError
from harness.experiments.neurons.inputs import Inputs, files_of
from harness.experiments.neurons.packs import Layer, Moments, Open, merged
from harness.experiments.neurons.stages.partials import plan_of
from harness.models.load import LM, ModelIdentity, ModelSpec, shared
from harness.models.neurons import circuit_of
from harness.stats import benjamini_hochberg

_LENGTH = 8_192
"""Of an item: a layer is a batch of its own."""
_CONTEXT = ("prompt_id", "condition", "token_ids", "positions", "is_counted")


class Compared(NamedTuple):
    """Peaks of every neuron against the background's, [L, M]; NaN where the background never varies."""

    z: Float[np.ndarray, "L M"]
    p: Float[np.ndarray, "L M"]
    q: Float[np.ndarray, "L M"]


@dataclass(frozen=True)
class Job:
    """A layer's files, and the prompts by ordinal."""

    layer: int
    files: tuple[FileHandle, ...]
    background: tuple[FileHandle, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Peaks:
    """Writes `neurons`."""

    model: ModelSpec
    identity: ModelIdentity
    layers: tuple[int, ...]
    size: int
    top: int
    name = "peaks"
    version = 1
    reads = MappingProxyType({"contexts": _CONTEXT, "artifacts": ("path", "kind", "sha256")})

    @classmethod
    def build(cls, given: Inputs) -> "Peaks":
        return cls(given.model, given.identity, given.layers, given.settings.pack, given.settings.top_examples)

    @property
    def row_bytes(self) -> int:
        return 600 * 2_048

    def params(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "top_examples": self.top}

    def items(self, tables: AnyTables) -> list[Item[int]]:
        made = sorted(r["sha256"] for r in tables["artifacts"] if r["kind"] in ("partials", "background"))
        told = hashlib.sha256(repr(made).encode()).hexdigest()[:16]
        return [Item(f"layer-{n:03d}|{told}", _LENGTH, n) for n in self.layers]

    def most_items(self, num_subjects: int) -> int:
        """For the estimate."""
        return len(self.layers)

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Job]]:
        plan = plan_of(tables.streamed("contexts", _CONTEXT), self.size)
        # Files of packs as they are now: what was made before a failed prompt was retried counts no more.
        current = {f"partials/{key}.safetensors" for key, _, _ in plan}
        names = tuple(name for _, _, members in plan for name in members.prompt_ids)
        found = {kind: files_of(tables, kind) for kind in ("partials", "background")}
        files = tuple(f for f in found["partials"] if f"partials/{f.path.name}" in current)
        if not files:
            raise RunError("none of the packs of prompts was computed; see the stage partials")
        return [replace(i, payload=Job(i.payload, files, tuple(found["background"]), names)) for i in items]

    def setup(self) -> LM:
        return shared(self.model, self.identity)

    def run(self, context: LM, items: Sequence[Item[Job]]) -> list[ItemResult]:
        norms = [o.weight.norm(dim=0).double().cpu().numpy() for o in circuit_of(context).outlets]
        return [
            ItemResult(
                i.key,
                {"neurons": rows_of(i.payload, self.layers, self.top, norms[i.payload.layer])},
                replaces={"neurons": {"layer": i.payload.layer}},
            )
            for i in items
        ]


def rows_of(job: Job, layers: Sequence[int], top: int, norms: Float[np.ndarray, " M"]) -> list[dict[str, Any]]:
    """A layer's rows of `neurons`."""
    with ExitStack() as stack:
        files, background = (
            [Open(stack.enter_context(f.open())) for f in some] for some in (job.files, job.background)
        )
        own = merged(files, job.layer, top)
        other = merged(background, job.layer) if background else None
    compared = _compared(job.files, job.background, tuple(layers)) if other is not None else None
    place = list(layers).index(job.layer)
    return _rows(job, own, other, None if compared is None else [x[place] for x in compared], norms)


@lru_cache(maxsize=2)
def _compared(files: tuple[FileHandle, ...], background: tuple[FileHandle, ...], layers: tuple[int, ...]) -> Compared:
    """Over all layers at once: the share of false discoveries is of all of them."""
    z = []
    with ExitStack() as stack:
        opened = [[Open(stack.enter_context(f.open())) for f in some] for some in (files, background)]
        for layer in layers:
            own, other = (_peaks(some, layer) for some in opened)
            z.append(z_of(own, other))
    scores = np.stack(z)
    p = 2 * ndtr(-np.abs(scores))
    q = np.full_like(p, np.nan)
    known = ~np.isnan(p)
    q[known] = benjamini_hochberg(p[known])
    return Compared(scores, p, q)


def _peaks(packs: Sequence[Open], layer: int) -> Moments:
    found: Moments | None = None
    for pack in packs:
        texts, _ = pack.num
        parts = (pack.tensors.get_tensor(f"{layer}.peaks.{n}") for n in ("mean", "m2", "m3", "m4"))
        moments = Moments(texts, *parts)
        found = moments if found is None else found.plus(moments)
    assert found is not None, "there are packs"
    return found


def z_of(own: Moments, background: Moments) -> Float[np.ndarray, " M"]:
    """(mean peak − the background's) over the standard error of that difference, both with the background's spread.

    The background is a sample too: without its share of the error neurons of the same texts would seem to differ.
    """
    error = background.sd * np.sqrt(1 / own.n + 1 / background.n)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, (own.mean - background.mean) / error, np.nan)


def _rows(
    job: Job, own: Layer, other: Layer | None, compared: Sequence[np.ndarray] | None, norms: Float[np.ndarray, " M"]
) -> list[dict[str, Any]]:
    assert own.tokens is not None, "packs of prompts have them"
    assert own.examples is not None
    assert own.num_functional is not None
    peak, times = own.tokens["peak"].modes()
    following, _ = own.tokens["next"].modes()
    num, size = own.peaks.n, len(norms)
    error = np.maximum(own.tokens["peak"].error, own.tokens["next"].error)
    columns: Mapping[str, np.ndarray] = {
        "mean_peak": own.peaks.mean, "sd_peak": own.peaks.sd, "max_peak": own.max_peak, "min_peak": own.min_peak,
        "max_signed": own.max_signed, "mean": own.moments.mean, "sd": own.moments.sd,
        "share_active": own.num_active / own.moments.n, "kurtosis": own.moments.kurtosis,
        "peak_token_mode": peak, "peak_token_share": times / num,
        "num_peak_tokens": np.diff(own.tokens["peak"].start),
        "num_next_tokens": np.diff(own.tokens["next"].start), "tokens_error": error,
        "share_functional": own.num_functional / num, "out_norm": norms,
    }  # fmt: skip
    if other is not None and compared is not None:
        columns = {
            **columns, "mean_background": other.moments.mean, "peak_background": other.peaks.mean,
            "sd_background": other.peaks.sd,
            **dict(zip(("z_background", "p_background", "q"), compared, strict=True)),
        }  # fmt: skip
    values = {name: _known(column) for name, column in columns.items()}
    values["next_token_mode"] = [None if token < 0 else token for token in following.tolist()]
    texts, positions, signed = (x.T.tolist() for x in own.examples)
    return [
        {
            "layer": job.layer,
            "neuron": n,
            "num_prompts": num,
            "num_tokens": own.moments.n,
            **{name: column[n] for name, column in values.items()},
            "examples": [
                {"prompt_id": job.names[t], "position": p, "value": v}
                for t, p, v in zip(texts[n], positions[n], signed[n], strict=True)
            ],
        }
        for n in range(size)
    ]


def _known(column: np.ndarray) -> list[Any]:
    if column.dtype.kind != "f":
        return column.tolist()
    return [None if v != v else v for v in column.tolist()]
