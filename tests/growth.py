"""How a run grows with its prompts: `python -m tests.growth 1000 10000 --json growth.json`.

For each number of made-up prompts, with the tiniest random model: one run of prompts, psem, greedy, samples, detect and
analysis in a process of its own, then verify, export and report of it, each a process too. What is told: peak memory of
each, seconds of the run and those outside of its batches, and bytes of its store. Linear is what grows tenfold with ten
times the prompts; memory is to stay under 4 GB at 100,000.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from harness.run import RunPaths, list_runs, read_manifest

ROOT = Path(__file__).parents[1]
STAGES = "prompts,psem,greedy,samples,detect,analysis"
MODEL = "random:tiny-llama"
_TARGETS = [
    "river",
    "stone",
    "garden",
    "window",
    "candle",
    "market",
    "silver",
    "winter",
    "orange",
    "letter",
    "shadow",
    "forest",
    "bridge",
    "morning",
]
_WORDS = [
    "kitchen",
    "ocean",
    "mountain",
    "pencil",
    "thunder",
    "village",
    "basket",
    "mirror",
    "feather",
    "ladder",
    "engine",
    "button",
    "castle",
    "desert",
]
_TOKENS = 4
"""A completion's, so that a day is not spent on the model, which is not what is measured."""


class Ended(NamedTuple):
    """What a command took: seconds, and the most memory that its process had."""

    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Growth:
    """One size: what its run and the commands on it took."""

    num_prompts: int
    run: Ended
    outside_s: float
    """Seconds of the run outside of its batches: listing, planning, storing, the seal, imports."""
    store_bytes: int
    readers: dict[str, Ended]
    stages: dict[str, tuple[int, int, float]]
    """Items, batches and seconds in batches, by stage."""

    def lines(self) -> Iterator[str]:
        n = self.num_prompts
        yield (
            f"{n:,} prompts: run {self.run.seconds:,.1f} s, peak {self.run.peak_mb:,.0f} MB; outside its batches "
            f"{self.outside_s:,.1f} s, {1_000 * self.outside_s / n:.2f} ms a prompt; store {self.store_bytes / 1e6:,.1f} MB, "
            f"{self.store_bytes / n:,.0f} bytes a prompt"
        )
        for name, (items, batches, seconds) in self.stages.items():
            yield f"  {name}: {items:,} items in {batches:,} batches, {seconds:,.1f} s"
        for name, (seconds, peak_mb) in self.readers.items():
            yield f"  {name}: {seconds:,.1f} s, peak {peak_mb:,.0f} MB"


def made_up(num: int) -> Iterator[dict[str, str]]:
    """So many different prompts, the same ones each time."""
    for n in range(num):
        words = [_WORDS[(n // len(_WORDS) ** i) % len(_WORDS)] for i in range(3)]
        yield {
            "category": f"made up {n % 10}",
            "question": f"Fill the blank: number {n}, the {words[0]} and the {words[1]} by the {words[2]} ____.",
            "target": _TARGETS[n % len(_TARGETS)],
            "style": "blank_end",
        }


def measure(num_prompts: int, folder: Path, more: Sequence[str] = ()) -> Growth:
    """Make a run of so many prompts in `folder`, and read it in every way. `more`: further flags of `harness run`."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, runs = folder / "prompts.jsonl", folder / "runs"
    with prompts.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in made_up(num_prompts))
    run = _timed(
        "run", "--data.prompts", prompts, "--model.name", MODEL, "--gravity.stages", STAGES,
        "--gravity.num_samples", 4, "--gravity.max_new_tokens_greedy", _TOKENS,
        "--gravity.max_new_tokens_samples", _TOKENS, "--paths.runs", runs, "--runtime.threads", 1,
        "--runtime.device", "cpu", *more,
    )  # fmt: skip
    paths: RunPaths = list_runs(runs)[0].paths
    manifest = read_manifest(paths)
    stages = {name: (s.num_items or 0, s.num_batches or 0, s.seconds or 0.0) for name, s in manifest.stages.items()}
    at = ("--paths.runs", runs)
    readers = {
        "verify": _timed("verify", paths.run_id, "--batches", 0, *at),
        "export": _timed("export", paths.run_id, "--to", folder / "export", *at),
        "report": _timed("report", paths.run_id, *at),
    }
    inside_s = sum(seconds for _, _, seconds in stages.values())
    return Growth(num_prompts, run, run.seconds - inside_s, paths.results.stat().st_size, readers, stages)


def _timed(*command: object) -> Ended:
    """Run a command of harness to its end. Its exit code is 0, or 1 where items of a random model failed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *map(str, command)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"harness {' '.join(map(str, command))} ended with {process.returncode}")
    return Ended(round(time.perf_counter() - start, 2), used.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="+", help="numbers of prompts")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--folder", type=Path, help="where the runs are made and stay; else they are thrown away")
    given, more = parser.parse_known_args()
    found = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory(prefix="harness-growth-") as aside:
            found.append(measure(size, (given.folder or Path(aside)) / str(size), more))
        print(*found[-1].lines(), sep="\n", flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(g) for g in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
