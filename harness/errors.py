"""Every failure the world can cause, one class a kind, each with the exit code it ends a command with.

Knows nothing else of the project. A message says what was expected, what was found, where, and what to try,
in one line: it is printed as it stands, without a traceback.
"""

import errno


class HarnessError(Exception):
    """Bad input or settings: the one line says what to mend."""

    exit_code = 2


class PromptFileError(HarnessError):
    """A prompt file that cannot be read as what it claims to be."""


class SettingsError(HarnessError):
    """A setting, flag, environment variable or settings file that is unknown or out of range."""


class RunError(HarnessError):
    """A run that cannot be found, continued or opened as asked."""


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


def disk_full(error: BaseException) -> EnvironmentFault | None:
    """What to raise where an error means a full disk; None where it means something else.

    The system says it by number, DuckDB in the text of several kinds of error, a failed COMMIT among them.
    """
    text = " ".join(str(error).split())
    said = any(words in text.lower() for words in ("no space left", "out of disk"))
    if not said and getattr(error, "errno", None) != errno.ENOSPC:
        return None
    return EnvironmentFault(f"the disk is full ({text}); free some space and type the same command again")
