"""The runs of a folder: all of them, broken ones too, and the one that somebody names."""

from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import RunError
from harness.files import is_folder
from harness.run.differences import shortened
from harness.run.manifest import Manifest, state
from harness.run.manifest_file import read_manifest
from harness.run.paths import RunPaths


class RunEntry(NamedTuple):
    """One folder of runs: its manifest, or why it cannot be read."""

    paths: RunPaths
    manifest: Manifest | None
    problem: str | None

    def facts(self) -> dict[str, Any]:
        """One row of a list of runs; of a broken run its name, `broken` and the reason."""
        told = {
            "run": self.paths.run_id,
            "status": "broken",
            "model": "",
            "prompts": None,
            "stages done": "",
            "failed": None,
            "seconds": None,
            "created": None,
            "reason": self.problem or "",
        }
        if (manifest := self.manifest) is None:
            return told
        return told | {
            "status": state(manifest),
            "model": (manifest.model.name or "").rsplit("/", 1)[-1],
            "prompts": manifest.prompts.used,
            "stages done": ", ".join(manifest.stages) or manifest.kind or "",
            "failed": manifest.num_failed,
            "seconds": manifest.seconds,
            "created": manifest.created,
            "reason": manifest.reason or "",
        }


def list_runs(root: Path) -> list[RunEntry]:
    """Every run under `root`, newest first; a broken one is an entry with its reason."""
    entries = []
    folders = (p for p in root.glob("*") if not p.name.startswith(".") and p.is_dir())
    for folder in sorted(folders, key=lambda p: p.name, reverse=True):
        paths = RunPaths(folder)
        try:
            entries.append(RunEntry(paths, read_manifest(paths), None))
        except RunError as e:
            entries.append(RunEntry(paths, None, str(e)))
    return entries


def find_run(root: Path, wanted: str) -> RunPaths:
    """The run with this id, this unique prefix of one, or the `latest`. Raises RunError when there is no such one."""
    names = [entry.paths.run_id for entry in list_runs(root) if entry.manifest is not None]
    if wanted == "latest":
        if not names:
            raise RunError(f"no run in {root} yet; start one with `harness run`")
        return RunPaths(root / names[0])
    if is_folder(root / wanted) and wanted not in names and wanted not in ("", "."):
        read_manifest(RunPaths(root / wanted))  # says what is wrong with it
    matches = [wanted] if wanted in names else [n for n in names if wanted and n.startswith(wanted)]
    if len(matches) != 1:
        found = (
            f"{len(matches)} runs begin so: {', '.join(matches[:4])}" if matches else f"found none among {len(names)}"
        )
        raise RunError(
            f"expected a run_id in {root}, a unique prefix of one, or `latest`; got {shortened(repr(wanted))}; {found}"
        )
    return RunPaths(root / matches[0])
