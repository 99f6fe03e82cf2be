"""Files that somebody else wrote, opened only where reading them must end: regular ones, of a size that is known before.

A named pipe would wait for ever, a device such as /dev/zero never ends, and a sparse file of ten gigabytes costs its
author nothing. Knows no format.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def check_regular(path: Path, at_most: int | None = None) -> None:
    """Raises OSError, its `strerror` fit for a message, unless `path` (links followed) is a regular file of that size."""
    try:
        found = path.stat()
    except ValueError as e:  # a NUL or half of a surrogate pair in the name
        raise OSError(errno.EINVAL, f"no name of a file ({e})", str(path)) from e
    _check(found, path, at_most)


def read_regular(path: Path, at_most: int) -> bytes:
    """All bytes of a regular file of at most that many. Raises OSError for anything else, before a byte is read."""
    check_regular(path, at_most)
    # Looked at again once it is open: another file may have taken its place. Not blocking, should that be a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check(os.fstat(file.fileno()), path, at_most)
        content = file.read(at_most + 1)  # what grows while it is read, or says it is empty, as /proc does, ends too
    if len(content) > at_most:
        raise OSError(errno.EFBIG, _too_large(at_most), str(path))
    return content


def read_json_object(path: Path, at_most: int) -> dict[str, Any]:
    """The JSON object in a regular file. Raises OSError as `read_regular`, ValueError for any other content."""
    try:
        content = json.loads(read_regular(path, at_most))
    except RecursionError as e:
        raise ValueError("nested too deep to be read") from e
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")  # noqa: TRY004
    return content


def _check(found: os.stat_result, path: Path, at_most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, f"{kind}, expected a regular file", str(path))
    if at_most is not None and found.st_size > at_most:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes; {_too_large(at_most)}", str(path))


def _too_large(at_most: int) -> str:
    return f"expected at most {at_most:,} bytes"
