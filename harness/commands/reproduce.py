"""`harness reproduce`: a recorded run measured again from its manifest, in the same batches, and how the two compare."""

from collections.abc import Sequence
from pathlib import Path

from loguru import logger
from rich.text import Text

from harness import log
from harness.commands import diff, launch
from harness.commands.recognise import open_run
from harness.commands.replay import prepare_again
from harness.errors import RunError
from harness.files import is_file
from harness.run import Manifest, RunPaths, find_run, read_manifest, read_manifest_file, state
from harness.run.differences import Difference, environment_differences, shortened, told
from harness.settings import Resolved
from harness.tolerance import TOLERANCE

_WITH_RESULTS = (0, 1)
"""Exit codes of a run that came to its end, failed items or not."""


def command(manifest: Manifest, original: RunPaths | None, resolved: Resolved, *, accept: bool, argv: list[str]) -> int:
    """Repeat the run of `manifest`, whose results are in `original` where there are any. 0 where the results agree.

    They must agree bit for bit where hardware, versions and batches are the same, up to rounding elsewhere. Raises
    RunError where model, data or code are not the recorded ones, unless that is accepted; then it is recorded, and a
    difference of results is no failure.
    """
    plan, changes = prepare_again(manifest, resolved)
    if original is not None:
        open_run(original).close()  # what cannot be compared with is refused before anything is computed
    run_id = manifest.run_id
    if changes and not accept:
        raise RunError(
            f"run {run_id} cannot be reproduced as it was: {told(changes)}. Put what was recorded in its place, "
            "or go on with --anyway, which records these differences"
        )
    if changes:
        logger.warning("not as in run {}: {}", run_id, told(changes))
    if state(manifest) != "finished":
        logger.warning("run {} is not finished: only what it has can be compared", run_id)
    sizes = {name: tuple(stage.sizes) for name, stage in manifest.stages.items()}
    ended = launch.start(plan, resolved, argv=argv, origin=launch.Origin(run_id, tuple(changes), sizes))
    if ended.code not in _WITH_RESULTS:
        return ended.code
    agrees = _compare(manifest, original, ended.paths)
    return ended.code if agrees or changes else 1


def find(root: Path, wanted: str) -> tuple[Manifest, RunPaths | None]:
    """The manifest of a run, or of a manifest's file, and the run's folder where its results are there to compare with."""
    file = Path(wanted)
    if not is_file(file):
        if file.suffix == ".json":
            raise RunError(f"expected a run or the file of a manifest; no file {shortened(repr(wanted))}")
        paths = find_run(root, wanted)
        return read_manifest(paths), paths
    folder = RunPaths(file.resolve().parent)
    manifest = read_manifest_file(file)
    is_its_run = manifest.run_id == folder.run_id and (folder.results.exists() or folder.live.exists())
    return manifest, folder if is_its_run else None


def _compare(was: Manifest, original: RunPaths | None, again: RunPaths) -> bool:
    """Print how the results compare; whether they agree as well as they must."""
    now = read_manifest(again)
    apart = environment_differences(was.tree, now.tree)
    log.print_out(Text(_surroundings_told(apart)))
    if original is None:
        return _compare_hashes(was, now) or bool(apart)
    with open_run(original) as a, open_run(again) as b:
        drifts = diff.compare_results(a, b)
    log.print_out(*diff.render_results(drifts))
    dtype = str(now.model.dtype)
    found = diff.verdict(drifts, dtype, a.schema)
    log.print_out(
        {
            "identical": "Reproduced: bit for bit the same results.",
            "rounding": f"Reproduced up to rounding: within {TOLERANCE[dtype].nats:g} of every measured number, the same tokens, "
            "texts and verdicts." + ("" if apart else " Nothing here explains that the bits are not the same."),
            "apart": "Not reproduced: results differ by more than rounding.",
        }[found]
    )
    return found == "identical" or (found == "rounding" and bool(apart))


def _surroundings_told(apart: Sequence[Difference]) -> str:
    """Whether the same bits can be expected."""
    if not apart:
        return "Hardware, versions, code and batches are those of the recorded run: the bits must be the same."
    return f"Not as in the recorded run, so the last bits may differ: {told(apart)}"


def _compare_hashes(was: Manifest, now: Manifest) -> bool:
    """Where there is the manifest alone it says which tables are the same, and nothing of how far others are apart."""
    recorded, found = was.table_sha256, now.table_sha256
    if not recorded:
        log.print_out(
            "The manifest holds no hashes of its tables and its results are not here: nothing to compare with."
        )
        return True
    other = [name for name, digest in recorded.items() if found.get(name) != digest]
    same = [name for name in recorded if name not in other]
    log.print_out(f"Equal, bit for bit, to what the manifest records: {', '.join(same) or 'no table'}.")
    if other:
        log.print_out(
            f"Not equal: {', '.join(other)}; how far apart needs the recorded run's results, not its manifest alone."
        )
    return not other
