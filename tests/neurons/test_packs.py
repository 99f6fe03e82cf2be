"""Statistics over packs are numpy's on all rows, whatever the packs, their order of arrival, and the size of forwards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import stats

from harness.experiments.neurons import packs
from harness.experiments.neurons.packs import Counts, Layer, Moments, Open, Text, arrays_of, merged, pack_of
from harness.models.neurons import read
from tests.tiny import tiny_lm

LAYERS = range(4)


def texts(seed: int = 0, num: int = 40) -> list[Text]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, num)
    return [
        Text(f"p{n:03d}", tuple(rng.integers(0, 256, k).tolist()), tuple(range(1, k)))
        for n, k in enumerate(lengths.tolist())
    ]


def in_packs(some: Sequence[Text], size: int, most_tokens: int, folder: Path) -> dict[int, Layer]:
    opened = []
    for k in range(0, len(some), size):
        pack = pack_of(
            tiny_lm("tiny-qwen3"),
            some[k : k + size],
            LAYERS,
            most_tokens,
            first=k,
            top=5,
            functional=frozenset(range(90)),
        )
        path = folder / f"{size}-{most_tokens}-{k:03d}.safetensors"
        save_file(arrays_of(pack), path)
        opened.append(Open(safe_open(path, "numpy")))
    return {n: merged(opened, n, 5) for n in LAYERS}


def test_they_are_numpys_on_the_same_rows(tmp_path: Path) -> None:
    """Law 2, to 1e-12. Control: counting the skipped token changes them."""
    some = texts()
    found = in_packs(some, len(some), 10**6, tmp_path)
    rows: dict[int, np.ndarray] = {}
    counted = [t.counted for t in some]
    read(
        tiny_lm("tiny-qwen3"),
        [t.tokens for t in some],
        counted,
        LAYERS,
        lambda n, r: rows.__setitem__(n, r.double().numpy()),
    )
    ends = np.cumsum([len(c) for c in counted])[:-1]
    for layer, own in found.items():
        a = rows[layer]
        by_text = np.split(a, ends)
        peaks = np.stack([np.abs(x).max(0) for x in by_text])
        for want, got in (
            (a.mean(0), own.moments.mean), (a.std(0), own.moments.sd), (peaks.mean(0), own.peaks.mean),
            (peaks.std(0), own.peaks.sd), (peaks.max(0), own.max_peak), (peaks.min(0), own.min_peak),
            (stats.kurtosis(a, fisher=False), own.moments.kurtosis),
        ):  # fmt: skip
            assert np.allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
        assert (own.num_active == (a > 0).sum(0)).all()
        where = np.stack([np.abs(x).argmax(0) for x in by_text])
        assert own.num_functional is not None
        tokens = np.array([[some[p].tokens[1 + where[p, n]] for n in range(a.shape[1])] for p in range(len(some))])
        assert (own.num_functional == (tokens < 90).sum(0)).all()
    whole = [Text(t.name, t.tokens, tuple(range(len(t.tokens)))) for t in some]
    assert not np.allclose(in_packs(whole, 40, 10**6, tmp_path)[1].moments.mean, found[1].moments.mean, atol=1e-3)


@pytest.mark.parametrize(("size", "most_tokens"), [(1, 50), (7, 200), (39, 33)])
def test_neither_packs_nor_forwards_decide_them(size: int, most_tokens: int, tmp_path: Path) -> None:
    some = texts(1)
    whole, cut = (in_packs(some, k, n, tmp_path) for k, n in ((len(some), 10**6), (size, most_tokens)))
    for layer in LAYERS:
        a, b = whole[layer], cut[layer]
        scale = np.abs(a.moments.mean).max()
        for name in ("mean", "sd"):
            assert np.allclose(getattr(a.moments, name), getattr(b.moments, name), atol=1e-5 * scale)
            assert np.allclose(getattr(a.peaks, name), getattr(b.peaks, name), atol=1e-5 * scale)
        assert a.examples is not None
        assert b.examples is not None
        assert (a.examples[0] == b.examples[0]).all()
        assert a.tokens is not None
        assert b.tokens is not None
        for table in ("peak", "next"):
            assert all((x == y).all() for x, y in zip(a.tokens[table], b.tokens[table], strict=True))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6), min_size=1, max_size=6),
    st.floats(-1e5, 1e5),
)
def test_moments_merge_exactly(parts: list[list[float]], offset: float) -> None:
    arrays = [np.array(p)[:, None] + offset for p in parts]
    found = Moments(0, *[np.zeros(0)] * 4)
    for part in arrays:
        found = found.plus(Moments.of(torch.from_numpy(part)))
    whole = np.concatenate(arrays)
    size = max(1.0, float(np.abs(whole).max()))
    assert found.n == len(whole)
    assert found.mean == pytest.approx(whole.mean(0), abs=1e-12 * size)
    left = whole - whole.mean(0)
    for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
        want = float((left**power).sum())
        assert float(getattr(found, name)[0]) == pytest.approx(want, rel=1e-9, abs=1e-10 * size**power * len(whole))


def test_equal_peaks_are_told_by_the_earlier_text_and_position() -> None:
    """Two texts that are the same: the first in the plan is the example, and the earliest of equal peaks its place."""
    tokens = (5, 9, 9, 5, 9)
    some = [Text(name, tokens, tuple(range(1, 5))) for name in ("a", "b", "c")]
    layer = pack_of(tiny_lm(), some, LAYERS, 10**6, top=2).layers[0]
    assert layer.examples is not None
    ordinals, positions, values = layer.examples
    assert (ordinals[0] == 0).all()
    assert (ordinals[1] == 1).all()
    assert (positions[0] == positions[1]).all()
    assert (values[0] == values[1]).all()


def counted(counts: Counts, n: int) -> dict[int, int]:
    """Tokens of one neuron, and how often it peaks at them."""
    own = slice(counts.start[n], counts.start[n + 1])
    return dict(zip(counts.token[own].tolist(), counts.times[own].tolist(), strict=True))


def test_a_table_that_does_not_fit_says_by_how_much_it_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, (300, 4)).clip(1, 500)
    exact = Counts.of(tokens, 10**6)
    assert not exact.error.any()
    monkeypatch.setattr(packs, "_KEPT_TOKENS", 10)
    cut = Counts.of(tokens, 20)
    for n in range(4):
        ids, counts = np.unique(tokens[:, n], return_counts=True)
        own, kept = (counted(c, n) for c in (exact, cut))
        assert own == dict(zip(ids, counts, strict=True))
        assert len(kept) == 10
        assert all(own[t] == c for t, c in kept.items())
        assert max(c for t, c in own.items() if t not in kept) == cut.error[n] <= min(kept.values())
    assert (exact.modes()[0] == cut.modes()[0]).all()
    halves = Counts.merged([Counts.of(tokens[:150], 20), Counts.of(tokens[150:], 20)])
    mode, times = halves.modes()
    true = exact.modes()[1]
    assert (mode == exact.modes()[0]).all()
    assert ((times <= true) & (true <= times + halves.error)).all()


def test_memory_of_a_pack_does_not_grow_with_the_number_of_prompts() -> None:
    """Bytes of the file a neuron: of 40 texts and of 400."""
    sizes = []
    for num in (40, 400):
        pack = pack_of(tiny_lm(), texts(2, num), LAYERS, 10**6, top=20)
        with tempfile.TemporaryDirectory() as folder:
            save_file(arrays_of(pack), f"{folder}/p")
            sizes.append(Path(f"{folder}/p").stat().st_size / (4 * 128))
    assert sizes[1] < 6 * sizes[0], sizes
