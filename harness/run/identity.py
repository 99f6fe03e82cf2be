"""What makes two runs the same: the fingerprint of all that decides results, and the run_id made of it."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

FORMAT = 1
"""Version of what the fingerprint hashes."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 of everything that decides results, whatever the order it was given in."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def new_run_id(slug: str, digest: str, now: datetime) -> str:
    """UTC time + slug + first hex of the fingerprint; ids sort by time."""
    clean = "".join(c if c.isalnum() else "-" for c in slug.lower()).strip("-")[:24].strip("-")
    return f"{now:%Y%m%d-%H%M%S}-{clean or 'run'}-{digest[:8]}"
