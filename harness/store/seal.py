"""What a finished run was, kept beside it, so that a later change of any key, row or file can be named.

The seal is a copy of the finished manifest and a digest of every row. It guards against accidents and hand edits, not
against somebody who writes a new seal. Knows no stage and computes no measurement.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import RunError, StoreError
from harness.files import file_sha256, open_regular, read_unlinked, replacing, sha256
from harness.run import MANIFEST_BYTES, RunPaths
from harness.run.differences import ABSENT, Difference, differences
from harness.store.reader import Reader
from harness.store.schema import AlteredStore, Schema
from harness.store.writer import Store, TableSeal

FORMAT = 1
LAST_KEYS = ("ended", "num_failed", "tables", "table_sha256", "sanity")
"""Keys of a manifest that a run writes at its end, after its seal, and takes off before it goes on."""


@dataclass(frozen=True)
class Seal:
    """A run as it was when it finished."""

    manifest: dict[str, Any]
    tables: dict[str, TableSeal]
    row_digests_sha256: str
    duckdb: str
    schema: int


def write(paths: RunPaths, schema: Schema, tables: Mapping[str, TableSeal], manifest: Mapping[str, Any]) -> None:
    """Seal a run whose `tables` were sealed by `Store.seal`, with the manifest that is about to be its last."""
    content = {
        "format": FORMAT,
        "manifest": manifest,
        "tables": {name: asdict(table) for name, table in tables.items()},
        "row_digests_sha256": file_sha256(paths.row_digests),
        "duckdb": Store.LIBRARY,
        "schema": schema.version,
    }
    with replacing(paths.seal) as temporary:
        text = json.dumps({**content, "sha256": _sha256(content)}, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n", "utf-8")


def remove(paths: RunPaths) -> None:
    """Before a run goes on: what was sealed is about to change."""
    paths.seal.unlink(missing_ok=True)
    paths.row_digests.unlink(missing_ok=True)


def read(paths: RunPaths) -> Seal | None:
    """The run's seal; None where it has none. Raises RunError for one that is damaged."""
    try:
        content = json.loads(read_unlinked(paths.seal, 2 * MANIFEST_BYTES))
        claimed = content.pop("sha256")
        if _sha256(content) != claimed:
            raise RunError(f"{paths.seal}: the seal itself was changed: its own sha256 does not fit")
        tables = {name: TableSeal(**{**t, "columns": tuple(t["columns"])}) for name, t in content["tables"].items()}
        return Seal(content["manifest"], tables, content["row_digests_sha256"], content["duckdb"], content["schema"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise RunError(f"{paths.seal}: not readable as a seal: {type(e).__name__}: {e}") from e


def changed_keys(sealed: Seal, paths: RunPaths) -> list[Difference]:
    """Every key of the manifest that is not as it was sealed. Raises RunError where the manifest cannot be read at all."""
    try:
        manifest = json.loads(read_unlinked(paths.manifest, MANIFEST_BYTES), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as e:
        raise RunError(f"{paths.manifest}: not readable as JSON: {e}") from e
    now = manifest if isinstance(manifest, dict) else {"": manifest}
    found = differences(sealed.manifest, now)
    named = {".".join(parts[:n]) for d in found if (parts := d.key.split(".")) for n in range(1, len(parts) + 1)}
    # Leaves by dotted names do not tell 1 from true, a key with a dot from a nested one, or a list's order.
    return found + [
        Difference(key, sealed.manifest.get(key, ABSENT), now.get(key, ABSENT))
        for key in sorted(sealed.manifest.keys() | now.keys())
        if key not in named and _sha256({"": sealed.manifest.get(key)}) != _sha256({"": now.get(key)})
    ]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are each there once: of two, a reader would see the last."""
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def changed_rows(sealed: Seal, paths: RunPaths, store: Path, schema: Schema) -> Iterator[str]:
    """One line for each of the first rows of `store` (the results, or their snapshot) that are not as they were sealed."""
    try:
        digests = open_regular(paths.row_digests)
    except OSError as e:
        yield f"{paths.row_digests.name}: cannot be read: {e.strerror}"
        return
    with digests:
        found = sha256(digests)
        if found != sealed.row_digests_sha256:
            yield f"{paths.row_digests.name}: the seal itself was changed: its sha256 is {found[:12]}…"
            return
        try:
            with Reader(store, schema) as reader:
                for row in reader.broken_rows(digests, sealed.tables):
                    where = f" {_told_key(row.key)}" if row.key else ""
                    yield f"{store.name}: {row.table}{where}: {row.how}"
        except AlteredStore as e:
            yield f"{store.name}: nothing of it is read: {e.problems[0]}"
        except StoreError as e:
            yield str(e)


def _told_key(key: str) -> str:
    try:
        return ", ".join(f"{name}={value}" for name, value in json.loads(key).items())
    except ValueError:  # whoever changed the store changed what makes its keys
        return key


def _sha256(content: Mapping[str, Any]) -> str:
    """Of the content as it reads after a round trip through the file."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False).encode()).hexdigest()
