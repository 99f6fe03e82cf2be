"""Tensors that a run keeps as files, read as what they are: a stranger's.

Knows no store and no torch.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

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


def _check_header(file: BufferedReader) -> None:
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"expected a safetensors header of at most {HEADER_BYTES:,} bytes, found {length:,}")
    json.loads(file.read(length))  # the rest of its form is for safetensors to check
