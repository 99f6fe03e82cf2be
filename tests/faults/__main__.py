"""`python -m tests.faults kills|storage|processes|memory|all`: disturb real runs, print what became of them.

Exit 1 where there is a finding: a run that ended otherwise than an undisturbed one, or said so badly.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tests.faults import injector, kills, memory, processes, storage
from tests.faults.experiment import Whole, kind_of, undisturbed
from tests.faults.kills import grouped
from tests.faults.lives import Lives

_T = TypeVar("_T")
console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)


def main() -> int:
    """Do what the arguments ask; 1 where something was found."""
    args = _arguments()
    why = injector.why_not()
    if why:
        print(f"faults: {why}", file=sys.stderr)
        return 4
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=args.work))
    start, result = time.perf_counter(), {}
    try:
        with Lives(remembers=not args.whole) as lives:
            whole = undisturbed(lives, folder / "whole")
            other = undisturbed(lives, folder / "other", 1, **{"runtime.seed": "1"})
            result["control"] = _control(whole, other)
            for name in _DO if "all" in args.what else args.what:
                result[name] = _DO[name](lives, folder / name, whole, args)
                _write(args.json, result)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    found = sum(len(f) for part in result.values() for row in part.get("rows", ()) for f in [row["findings"]])
    console.print(
        f"{time.perf_counter() - start:.0f} s; {found} findings" + (f"; runs kept in {folder}" if args.keep else "")
    )
    return 1 if found else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("what", nargs="+", choices=(*_DO, "all"))
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="places to kill at (default 200)")
    parser.add_argument("--faults", type=int, default=120, metavar="N", help="calls to let fail (default 120)")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="rounds of starting together (default 1)")
    parser.add_argument("--real", action="store_true", help="also start whole interpreters at once")
    parser.add_argument("--whole", action="store_true", help="measure the certificate anew in every life: slower")
    parser.add_argument("--seed", type=int, default=0, help="which places")
    parser.add_argument(
        "--minutes", type=float, default=1e9, metavar="N", help="start nothing after so long, in each part"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, for kills and storage (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every place and finding there")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs are made (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the runs that had findings")
    return parser.parse_args()


def _control(whole: Whole, other: Whole) -> dict[str, Any]:
    """What an undisturbed run does, and that another seed gives other rows."""
    apart = [name for name in whole.rows if whole.rows[name] != other.rows[name]]
    console.print(
        f"An undisturbed run and its report: {len(whole.calls)} calls that change files, {whole.num_run_calls} of them the "
        f"run's, on {len({kind_of(c) for c in whole.calls})} kinds of files. Another seed differs in {', '.join(apart)}."
    )
    assert apart, "another seed gives the same rows: nothing here would notice a difference"
    return {"calls": len(whole.calls), "run_calls": whole.num_run_calls, "differs_with_seed": apart}


def _kills(lives: Lives, folder: Path, whole: Whole, args: argparse.Namespace) -> dict[str, Any]:
    drawn = kills.places(whole.calls, args.kills, args.seed)

    def some(own: Lives, part: Sequence[injector.Fault], number: int) -> list[kills.Killed]:
        return kills.kill_often(own, folder, whole, part, args.seed + number, time.perf_counter() + 60 * args.minutes)

    found = _spread(lives, drawn, some, args)
    return _told(kills.tables(found), found, lambda k: f"{k.action} at call {k.at} ({k.doing}, {k.kind}, {k.call})")


def _storage(lives: Lives, folder: Path, whole: Whole, args: argparse.Namespace) -> dict[str, Any]:
    drawn = list(enumerate(storage.faults(whole.calls, args.faults, args.seed)))

    def some(own: Lives, part: Sequence[tuple[int, injector.Fault]], number: int) -> list[storage.Refused]:
        return storage.refuse_often(own, folder, whole, part, time.perf_counter() + 60 * args.minutes)

    found = _spread(lives, drawn, some, args)
    return _told(
        storage.tables(found), found, lambda r: f"{r.error} {r.how} at call {r.at} ({r.doing}, {r.kind}, {r.call})"
    )


def _processes(lives: Lives, folder: Path, whole: Whole, args: argparse.Namespace) -> dict[str, Any]:
    found = processes.crowds(lives, folder, whole, args.times, args.real)
    return _told(processes.tables(found), found, lambda c: f"{c.num} at once, {c.state}, {c.num_reads} reads")


def _memory(lives: Lives, folder: Path, whole: Whole, args: argparse.Namespace) -> dict[str, Any]:
    found = memory.cramp_often(lives, folder, whole)
    return _told(memory.tables(found), found, lambda c: f"{c.more_mb} MB of {c.kind}")


_DO = {"kills": _kills, "storage": _storage, "processes": _processes, "memory": _memory}


def _spread(
    lives: Lives, drawn: Sequence[Any], some: Callable[[Lives, Sequence[Any], int], list[_T]], args: argparse.Namespace
) -> list[_T]:
    """The work on `args.jobs` processes that fork."""
    if args.jobs <= 1:
        return some(lives, drawn, 0)

    def one(number: int) -> list[_T]:
        if number == 0:
            return some(lives, drawn[:: args.jobs], number)
        with Lives(remembers=not args.whole) as own:
            return some(own, drawn[number :: args.jobs], number)

    with ThreadPoolExecutor(args.jobs) as pool:
        return [f for part in pool.map(one, range(args.jobs)) for f in part]


def _told(
    tables: Sequence[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]],
    found: Sequence[Any],
    where: Callable[[Any], str],
) -> dict[str, Any]:
    """Print the tables and the findings; both for the JSON file."""
    for title, columns, rows in tables:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table, markup=False)
    findings = grouped([(text, where(f)) for f in found for text in f.findings])
    for times, text, place in findings:
        console.print(f"{times} × {text} [first: {place}]", markup=False)
    return {"tables": [{"title": t, "columns": c, "rows": r} for t, c, r in tables], "findings": findings,
            "rows": [asdict(f) for f in found]}  # fmt: skip


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
