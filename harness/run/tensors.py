"""Tensors that a run keeps as files, read as what they are: a stranger's.

`open_tensors` for whole ones, `map_matrices` for a look at parts of large ones. Knows no store and no torch.
"""

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from harness.errors import RunError
from harness.files import open_inside

HEADER_BYTES = 1_000_000
"""Longest header that is parsed; a run's own have some hundred bytes."""


@contextmanager
def open_tensors(folder: Path, name: str) -> Iterator[Any]:
    """The safetensors file that a row calls `name`, below `folder`, as `safetensors.safe_open` gives it for numpy.

    Raises RunError, in one line, for a name that leads out of the folder, for anything but a regular file, and for one
    that is no safetensors file or has a header longer than `HEADER_BYTES`.
    """
    try:
        with open_inside(folder, name) as file:
            _check_header(file)
            by_number = Path(f"/proc/self/fd/{file.fileno()}")  # the very file that was looked at
            with safe_open(by_number if by_number.exists() else folder / name, "numpy") as tensors:
                yield tensors
    except (OSError, ValueError, SafetensorError) as e:
        raise RunError(f"{folder / name}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


class Matrix(NamedTuple):
    """A matrix in a file that is mapped into memory: only the pages of what is read are."""

    stored: np.ndarray
    is_bfloat16: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A part of it, as float32."""
        part = self.stored[rows, columns]
        if not self.is_bfloat16:  # numpy has none: it is the upper half of a float32
            return part.astype(np.float32)
        return (part.astype(np.uint32) << 16).view(np.float32)


_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def map_matrices(folder: Path, name: str) -> Mapping[str, Matrix]:
    """The matrices of floats in a safetensors file, by name, mapped into memory for as long as one of them is held.

    Other tensors of the file are passed over. Raises RunError as `open_tensors` does, and for a file that is shorter
    than its header says.
    """
    try:
        with open_inside(folder, name) as file:
            header = _check_header(file)
            begin = file.tell()
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return dict(_matrices(header, whole, begin))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise RunError(f"{folder / name}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def _matrices(header: Mapping[str, Any], whole: mmap.mmap, begin: int) -> Iterator[tuple[str, Matrix]]:
    for name, told in header.items():
        if name == "__metadata__" or told["dtype"] not in _STORED or len(told["shape"]) != 2:
            continue
        dtype, (rows, columns), (start, end) = np.dtype(_STORED[told["dtype"]]), told["shape"], told["data_offsets"]
        if min(rows, columns, start) < 0 or end - start != prod((rows, columns, dtype.itemsize)):
            raise ValueError(f"the header gives {name} a shape that does not fit its bytes")
        if begin + end > len(whole):
            raise ValueError(f"expected at least {begin + end:,} bytes, found {len(whole):,}: the file was cut short")
        stored = np.frombuffer(whole, dtype, rows * columns, begin + start).reshape(rows, columns)
        yield name, Matrix(stored, told["dtype"] == "BF16")


def _check_header(file: BufferedReader) -> Any:
    """The header, as far as it is JSON of a sensible length."""
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"expected a safetensors header of at most {HEADER_BYTES:,} bytes, found {length:,}")
    try:
        return json.loads(file.read(length))
    except RecursionError as e:
        raise ValueError("the header is nested too deep to be read") from e
