"""`harness browse`: a run on the terminal, as far as its experiment shows one."""

import sys
from pathlib import Path

from harness.commands.recognise import experiment_of
from harness.errors import RunError
from harness.experiments import registry
from harness.experiments.experiment import Browsed
from harness.files import is_folder
from harness.run import RunPaths, find_run, read_manifest


def command(root: Path, wanted: str) -> int:
    """Show a run until it is left; the exit code. `wanted` is a run of `root` as other commands take it, or a run's folder.

    Raises RunError where there is no such run, where its experiment shows none, and where nobody sees it.
    """
    paths = RunPaths(Path(wanted)) if "/" in wanted and is_folder(Path(wanted)) else find_run(root, wanted)
    manifest = read_manifest(paths)
    experiment = experiment_of(manifest)
    if not isinstance(experiment, Browsed):
        raise RunError(
            f"run {paths.run_id} is of the experiment {experiment.name}, whose runs cannot be browsed; "
            f"those of {', '.join(registry.browsed()) or 'no experiment'} can; see `harness show` and `harness report`"
        )
    # Textual draws on stderr: a pipe behind the command gets nothing, and a file in its place everything.
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise RunError("browse draws on a terminal, and one of stdin, stdout and stderr is none; see `harness show`")
    return experiment.browse(paths)
