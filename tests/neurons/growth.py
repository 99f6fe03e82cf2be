"""Memory of statistics at 240,000 neurons: `python -m tests.neurons.growth --packs 4 --merged 40`.

Packs of 256 prompts of made-up activations through the real accumulators, written as the stage writes them; then as many
packs merged as 10,000 prompts have. No model: what is measured is what statistics hold.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from harness.experiments.neurons import packs
from harness.experiments.neurons.packs import Open, Text, arrays_of, merged, pack_of


def main() -> None:
    """Print the peak memory after each pack, and of merging."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--neurons", type=int, default=9_216)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--merged", type=int, default=40)
    args = parser.parse_args()
    layers, size = range(args.layers), args.neurons
    print(f"{args.layers * size:,} neurons, packs of {args.prompts} prompts; at the start {_rss()} MB")
    with tempfile.TemporaryDirectory() as folder, patch.object(packs, "read", _made_up(size)):
        first = Path(folder) / "0.safetensors"
        for n in range(args.packs):
            start = time.perf_counter()
            rng = np.random.default_rng(n)
            texts = [
                Text(f"p{n}-{k}", tuple(rng.integers(0, 50_000, 12).tolist()), tuple(range(1, 12)))
                for k in range(args.prompts)
            ]
            pack = pack_of(None, texts, layers, 1_024, first=n * args.prompts, top=20)  # type: ignore[arg-type]
            save_file(arrays_of(pack), Path(folder) / f"{n}.safetensors")
            del pack
            print(f"pack {n + 1}: {time.perf_counter() - start:.0f} s, peak {_peak()} MB, file "
                  f"{first.stat().st_size / (args.layers * size):.0f} bytes a neuron")  # fmt: skip
        for n in range(args.packs, args.merged):
            shutil.copy(Path(folder) / f"{n % args.packs}.safetensors", Path(folder) / f"{n}.safetensors")
        start = time.perf_counter()
        with ExitStack() as stack:
            opened = [
                Open(stack.enter_context(safe_open(Path(folder) / f"{n}.safetensors", "numpy")))
                for n in range(args.merged)
            ]
            merged(opened, 0, 20)
            print(f"one layer of {args.merged} packs ({args.merged * args.prompts:,} prompts) merged in "
                  f"{time.perf_counter() - start:.1f} s; its own memory {_own()} MB, peak {_peak()} MB")  # fmt: skip


def _made_up(size: int) -> Callable[..., None]:
    def read(
        _lm: object, texts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], layers: Sequence[int],
        receive: Callable[[int, torch.Tensor], None],
    ) -> None:  # fmt: skip
        num = sum(map(len, positions))
        for layer in layers:
            receive(layer, torch.randn(num, size))

    return read


def _rss() -> int:
    return psutil.Process().memory_info().rss // 2**20


def _own() -> int:
    """Without mapped files, which the system takes back when it needs to."""
    found = psutil.Process().memory_full_info()
    return (
        (found.uss - getattr(found, "shared", 0)) // 2**20
        if found.uss > getattr(found, "shared", 0)
        else found.uss // 2**20
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
