"""Every failure the world can cause, one class a kind, each with the exit code it ends a command with.

Knows nothing else of the project. A message says what was expected, what was found, where, and what to try,
in one line: it is printed as it stands, without a traceback.
"""

import difflib
import errno
from collections.abc import Collection

_LONGEST_NAME = 200


class HarnessError(Exception):
    """Bad input or settings: the one line says what to mend."""

    exit_code = 2


class PromptFileError(HarnessError):
    """A prompt file that cannot be read as what it claims to be."""


class SettingsError(HarnessError):
    """A setting, flag, environment variable or settings file that is unknown or out of range."""


class RunError(HarnessError):
    """A run that cannot be found, continued or opened as asked."""


class DamagedManifest(RunError):
    """A manifest with a part that is not of the kind that a manifest has."""


class ModelError(HarnessError):
    """A model or tokenizer that is missing, unsafe to load, or breaks an identity the measurements need."""


class StoreError(HarnessError):
    """A results file of another schema, or one that cannot be opened."""


class Stopped(HarnessError):
    """Stopped early, by a signal or by a person; the same command goes on where it stopped."""

    exit_code = 3


class EnvironmentFault(HarnessError):
    """The machine lacks something: no GPU where one was asked for, a full disk."""

    exit_code = 4


class ItemFailed(HarnessError):
    """One item could not be measured; the run records it and goes on."""

    exit_code = 1


NOT_FINITE = "the model's logits are not finite (NaN or infinity); try a wider model.dtype"


class NotFinite(ItemFailed):
    """A model's logits are NaN or infinite for one item."""


_NO_MEMORY = ("out of memory error", "cannot allocate memory", "can't allocate memory", "bad allocation")
_FAULTS: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("the disk is full", (errno.ENOSPC, errno.EDQUOT), ("no space left", "out of disk", "disk quota exceeded")),
    ("the file system can only be read", (errno.EROFS,), ("read-only file system",)),
    ("the disk fails", (errno.EIO,), ("input/output error", "fsync failed")),
    ("too many files are open", (errno.EMFILE, errno.ENFILE), ("too many open files",)),
    ("memory ran out", (errno.ENOMEM,), _NO_MEMORY),
)
_REMEDY = {
    "memory ran out": "free some, or give a smaller batching.max_tokens",
    "the disk is full": "free some space",
    "too many files are open": "allow more (ulimit -n)",
}


def machine_fault(error: BaseException) -> EnvironmentFault | None:
    """What to raise where an error means that the machine lacks something or fails; None where it means something else.

    The system says it by number, DuckDB in the text of several kinds of error, a failed COMMIT among them.
    """
    text = " ".join(str(error).split())
    for what, numbers, words in _FAULTS:
        said = any(word in text.lower() for word in words) or getattr(error, "errno", None) in numbers
        if said or (what == "memory ran out" and isinstance(error, MemoryError)):
            told = f" ({text[:200]})" if text else ""
            return EnvironmentFault(f"{what}{told}; {_REMEDY.get(what, 'mend that')} and type the same command again")
    return None


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean X?` for a name close to a known one."""
    if len(name) > _LONGEST_NAME:  # close to none, and to find that out takes time that grows with its length
        return ""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
