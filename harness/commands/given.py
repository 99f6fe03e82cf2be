"""Which recorded paths this user gave: a run's folder may come from a stranger, whose manifest may name any file.

A run made here carries a mark over the paths it was given, made with a key that never leaves this user's own state
folder. Who has no key, or another one, is asked for the paths.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.files import read_unlinked
from harness.models.fetch import FETCHABLE
from harness.settings import BUNDLED_MODELS, BUNDLED_PROMPTS, PLANTED_MODELS

FLAGS = {"model.name": "--model", "other.name": "--other", "data.prompts": "--prompts"}
"""Settings that may be paths, and the flag that gives each."""
_KEY_BYTES = 32
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def recorded_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of a run's settings (value by dotted name) that are paths on the machine that made it."""
    return {name: str(settings[name]) for name in FLAGS if name in settings and _is_path(name, str(settings[name]))}


def mark(settings: Mapping[str, Any], state: Path) -> str | None:
    """A mark that says that this user gave these paths; None where there are none, or no key can be kept in `state`."""
    paths = recorded_paths(settings)
    key = _key(state, make=True) if paths else None
    return _mark(paths, key) if key else None


def is_own(settings: Mapping[str, Any], given: object, state: Path) -> bool:
    """Whether this user gave the paths in these settings, as the mark `given` says."""
    key = _key(state, make=False)
    if key is None or not isinstance(given, str):
        return False
    return hmac.compare_digest(given.encode(), _mark(recorded_paths(settings), key).encode())


def is_name(model: str) -> bool:
    """Whether a model's setting names one of our own, or none, and neither a path nor one of the hub."""
    ours = model in BUNDLED_MODELS or model in PLANTED_MODELS or model in FETCHABLE
    return not model or ours or model.startswith("random:")


def _is_path(name: str, value: str) -> bool:
    if name == "data.prompts":
        return value != BUNDLED_PROMPTS
    if is_name(value):
        return False
    return (
        value.startswith(".") or value.lower().endswith(".gguf") or not _HUB_ID.fullmatch(value) or Path(value).exists()
    )


def _mark(paths: Mapping[str, str], key: bytes) -> str:
    return hmac.new(key, json.dumps(paths, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _key(state: Path, *, make: bool) -> bytes | None:
    path = state / "key"
    with suppress(OSError):
        if make and not path.exists():
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = path.with_name(f".key.{os.getpid()}.tmp")
            try:
                fresh.touch(mode=0o600)
                fresh.write_bytes(secrets.token_bytes(_KEY_BYTES))
                with suppress(FileExistsError):  # another process has just made one: that is the key
                    os.link(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
        key = read_unlinked(path, _KEY_BYTES)
        return key if len(key) == _KEY_BYTES else None
    return None
