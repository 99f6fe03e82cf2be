"""Every failure the world can cause, one class a kind, each with the exit code it ends a command with.

Knows nothing else of the project. A message says what was expected, what was found, where, and what to try,
in one line: it is printed as it stands, without a traceback.
"""


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


class CheckFailed(HarnessError):
    """Everything ran, and a check did not hold: a failed item, a disagreement."""

    exit_code = 1


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
