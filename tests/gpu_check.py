"""`python -m tests.gpu_check`: what only a GPU can show, in one call under ten minutes; a table, and one JSON file.

Every step is a command in a process of its own, so that one that fails, hangs or is killed is a row and the others are
still made. `--cpu` tries all of it on tiny shapes in about a minute. Exit 1 where a step failed.

The step `memory` takes real memory away: torch may use no more than a few GB of the GPU (on a CPU the process gets a limit
of its own), and the batches of a run are cut for far more. Such a run must split, go on and end with every row.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
FAR_TOO_MANY = "1000000000"
"""Padded tokens a batch: everything at once."""
_CRAMPED = "--cramped"
_KEPT_CHARACTERS = 4_000
"""Of a step's output, its end, in the JSON file."""


@dataclass(frozen=True)
class Step:
    """One command: what follows `python -m harness`, and how its files become a line and numbers.

    `needs` says in a line what it lacks here, or nothing; `cramped_mb`: the memory it gets beyond a start.
    """

    name: str
    arguments: tuple[str, ...]
    read: Callable[[str], tuple[str, dict[str, Any]]]
    """Its output -> the finding and the numbers."""
    lacks: str = ""
    cramped_mb: int | None = None


@dataclass
class Row:
    """What became of one step."""

    step: str
    verdict: str
    """`ok`, `FAIL`, or `skip` with the reason."""
    seconds: float
    finding: str
    command: str = ""
    exit: int | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def steps_of(folder: Path, *, is_cpu: bool, model: str) -> list[Step]:
    """The steps, writing into `folder`. `model` is the real one: a name, a folder or a file."""
    where = "cpu" if is_cpu else "cuda"
    small, large = ("tiny-llama", "tiny-qwen2") if is_cpu else ("qwen2.5-0.5b", "qwen2.5-7b")
    runs = {name: folder / name for name in ("doctor", "memory", "demo", "real")}

    def common(runs: Path, dtype: str = "") -> tuple[str, ...]:
        return ("--runtime.device", where, "--paths.runs", str(runs), *(("--model.dtype", dtype) if dtype else ()))

    def bench(name: str, shape: str, contexts: int) -> Step:
        told = folder / f"{name}.json"
        return Step(name, ("bench", "--shape", shape, "--contexts", str(contexts), "--json", str(told),
                           *common(runs["doctor"], "bfloat16")), lambda _: _of_bench(told))  # fmt: skip

    def run(name: str, *arguments: str) -> Step:
        return Step(name, ("run", *arguments, *common(runs[name])), lambda _: _of_run(runs[name]))

    few = ("--limit", "4") if is_cpu else ()
    # On the CPU the whole vocabulary is drawn from, so that a batch of all samples needs more while a small one is soon done.
    much = ("--limit", "150", "--gravity.top_p", "1", "--gravity.max_new_tokens_samples", "2") if is_cpu else (
        "--limit", "all")  # fmt: skip
    cramped = Step(
        "memory",
        ("run", "--model", f"random:{small}", "--stages", "psem,greedy,samples", "--batching.max_tokens", FAR_TOO_MANY, *much,
         *common(runs["memory"], "" if is_cpu else "bfloat16")),
        lambda _: _of_cramped(runs["memory"]), cramped_mb=900 if is_cpu else 2_048,
    )  # fmt: skip
    real = ("--model", model, "--limit", "2" if is_cpu else "40", "--model.dtype", "float32")
    return [
        Step("doctor", ("doctor", *common(runs["doctor"])), _counted(r"^ok ", "checks are ok")),
        Step(
            "sanity",
            ("sanity", "--num-prompts", "1" if is_cpu else "4", *common(runs["doctor"])),
            _counted(r"│ ok\b", "measurements agree"),
        ),
        cramped,
        run("demo", *few),
        bench("bench-small", small, 2 if is_cpu else 32),
        replace(run("real", *real), lacks=_lacks(model)),
        bench("bench-large", large, 2 if is_cpu else 16),
    ]


def _lacks(model: str) -> str:
    """Why the real model cannot be run here; nothing where it can."""
    from harness.errors import HarnessError
    from harness.experiments.weights import Models
    from tests.gravity import resolve

    os.environ["HF_HUB_OFFLINE"] = "1"  # a check of the machine fetches nothing
    try:
        _ = Models(resolve({"model.name": model}).settings, "cpu").identity
    except HarnessError as e:
        return str(e)
    return ""


def check(
    steps: Sequence[Step],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    show: Callable[[Row], None] = print,
) -> list[Row]:
    """Make every step that can begin before `deadline` on the clock; none is let run past it."""
    rows = []
    for step in steps:
        left = deadline - clock()
        if step.lacks:
            row = Row(step.name, "skip", 0.0, step.lacks)
        elif left <= 0:
            row = Row(step.name, "skip", 0.0, "no time was left; give --minutes")
        else:
            row = _made(step, left, clock)
        show(row)
        rows.append(row)
    return rows


def _made(step: Step, limit_s: float, clock: Callable[[], float]) -> Row:
    start = clock()
    command = [sys.executable, "-m", "harness", *step.arguments]
    if step.cramped_mb is not None:
        command = [sys.executable, "-m", "tests.gpu_check", _CRAMPED, str(step.cramped_mb), *step.arguments]
    row = Row(step.name, "FAIL", 0.0, "", " ".join(["harness", *step.arguments]))
    environ = {**os.environ, "COLUMNS": "160", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=limit_s, check=False,
        )  # fmt: skip
        row.exit, row.output = done.returncode, done.stdout[-_KEPT_CHARACTERS:]
        row.finding = (row.output.strip().splitlines() or ["it said nothing"])[-1]
        if done.returncode == 0:
            row.verdict, (row.finding, row.numbers) = "ok", step.read(done.stdout)
    except subprocess.TimeoutExpired as e:
        told = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else (e.stdout or "")
        row.finding, row.output = f"not done after {limit_s:.0f} s, ended", told[-_KEPT_CHARACTERS:]
    except Exception as e:  # what a step left may be anything; the others are still to be made
        row.verdict, row.finding = "FAIL", f"{type(e).__name__}: {e}"
    row.seconds = clock() - start
    return row


def _counted(pattern: str, what: str) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """How many lines of the output match."""
    return lambda output: (f"{len(re.findall(pattern, output, re.MULTILINE))} {what}", {})


def _of_bench(path: Path) -> tuple[str, dict[str, Any]]:
    found = json.loads(path.read_text("utf-8"))
    fast = {f["stage"]: f for f in reversed(found["figures"])}  # the first way of each stage
    told = ", ".join(f"{stage} {f['of_product']:.0%}" for stage, f in reversed(fast.items()))
    return f"{found['about']['matrix product']}; of it reached: {told}", found


def _of_run(root: Path) -> tuple[str, dict[str, Any]]:
    from harness.run import list_runs

    manifest = list_runs(root)[0].manifest
    assert manifest is not None, "a run that ended well has a manifest"
    seconds = sum(s.seconds or 0.0 for s in manifest.stages.values())
    peak = max(s.peak_bytes or 0 for s in manifest.stages.values())
    told = f"{seconds:.1f} s in batches, {manifest.num_failed} items failed, peak {peak / 1e9:.1f} GB"
    if manifest.sanity:
        told += f", {sum(bool(v.ok) for v in manifest.sanity)} of {len(manifest.sanity)} measurements agree"
    return told, {name: manifest.tree.get(name) for name in ("stages", "num_failed", "sanity", "tables")}


def _of_cramped(root: Path) -> tuple[str, dict[str, Any]]:
    """Raises AssertionError where nothing was split: then nothing was shown."""
    told, numbers = _of_run(root)
    splits = {name: s["splits"] for name, s in numbers["stages"].items() if s["splits"]}
    assert splits, f"expected batches that ran out of memory and were split, found none: {told}"
    assert numbers["num_failed"] == 0, f"expected every item in the end, {numbers['num_failed']} failed"
    return f"split {', '.join(f'{name} {n} times' for name, n in splits.items())}, and went on; {told}", numbers


def cramp(more_mb: int, arguments: Sequence[str]) -> int:
    """A harness command that may use this much more memory than it has after its start; its exit code."""
    from harness import cli

    wanted = more_mb * 2**20
    if arguments[list(arguments).index("--runtime.device") + 1] == "cuda":
        torch.cuda.init()
        torch.cuda.set_per_process_memory_fraction(wanted / torch.cuda.get_device_properties(0).total_memory)
    else:
        import resource

        from harness.commands import launch  # imports take memory too
        from harness.experiments.gravity import contents

        assert launch
        assert contents
        torch.ones(64, 64).matmul(torch.ones(64, 64))  # and so do the threads of the first product
        status = Path("/proc/self/status").read_text()
        now = 1024 * int(re.findall(r"^VmData:\s*(\d+) kB", status, re.MULTILINE)[0])
        resource.setrlimit(resource.RLIMIT_DATA, (now + wanted, now + wanted))
    return cli.main(list(arguments))


def render(rows: Sequence[Row]) -> Table:
    """One row a step."""
    table = Table(title="What this machine can do", title_justify="left")
    for column in ("step", "verdict", "seconds", "finding"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for r in rows:
        table.add_row(r.step, r.verdict, f"{r.seconds:.0f}", r.finding)
    return table


def _about(*, is_cpu: bool) -> dict[str, Any]:
    from harness import environment

    code = environment.code()
    gpu = "" if is_cpu else torch.cuda.get_device_name()
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "cuda": torch.version.cuda, "device": gpu or platform.machine(), "commit": code["git_commit"],
        "uncommitted": code["git_dirty"],
    }  # fmt: skip


def main() -> int:
    """Make the steps; 1 where one failed."""
    if sys.argv[1:2] == [_CRAMPED]:
        return cramp(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="try it on the CPU, on tiny shapes")
    parser.add_argument(
        "--json", type=Path, default=Path("gpu-check.json"), metavar="FILE", help="where to write it all"
    )
    parser.add_argument("--minutes", type=float, default=9.5, metavar="N", help="be done in this time (default 9.5)")
    parser.add_argument("--model", default="smollm2", help="the real model to run, where it is there (default smollm2)")
    parser.add_argument("--step", action="append", metavar="NAME", help="just this one (may be given several times)")
    args = parser.parse_args()
    console = Console(width=160 if not sys.stdout.isatty() else None, highlight=False, markup=False)
    if not args.cpu and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU; check `nvidia-smi`, or try it with --cpu", file=sys.stderr)
        return 4
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        steps = steps_of(Path(folder), is_cpu=args.cpu, model=args.model)
        known = [s.name for s in steps]
        if unknown := set(args.step or ()) - set(known):
            parser.error(f"--step: no step {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        wanted = [s for s in steps if not args.step or s.name in args.step]
        rows = check(
            wanted,
            deadline,
            show=lambda r: console.print(f"{r.verdict:<4} {r.step:<12} {r.seconds:4.0f} s  {r.finding}"),
        )
    console.print(render(rows))
    found = {"about": _about(is_cpu=args.cpu), "steps": [asdict(r) for r in rows]}
    args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")
    console.print(f"everything is in {args.json}")
    return 1 if any(r.verdict == "FAIL" for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
