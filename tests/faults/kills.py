"""Kills at exact calls, spread over a whole run: what a reader sees after each, and what the run ends with."""

import math
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults.experiment import Whole, kind_of, leftovers, looks, only_run, report, rows_of, run, run_that_ended
from tests.faults.injector import Call, Fault
from tests.faults.lives import Life, Lived, Lives


@dataclass
class Killed:
    """One place, and what became of a run that was killed there."""

    at: int
    action: str
    doing: str = ""
    call: str = ""
    kind: str = ""
    again_at: int | None = None
    """The call of the second life at which it was killed too."""
    is_killed: bool = False
    is_identical: bool = False
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def places(calls: Sequence[Call], num: int, seed: int) -> list[Fault]:
    """`num` kills: one at each sort of call (stage, file, call) as far as they go, the others drawn from all calls."""
    draw = random.Random(seed)
    sorts: dict[tuple[str, str, str], list[Call]] = defaultdict(list)
    for call in calls:
        sorts[call.doing, kind_of(call), call.name].append(call)
    first = [draw.choice(found) for found in sorts.values()]
    draw.shuffle(first)
    left = [c for c in calls if c not in first]
    drawn = first[:num] + draw.sample(left, min(len(left), max(0, num - len(first))))
    draw.shuffle(drawn)
    return [Fault(c.number, "torn" if c.size > 1 and draw.random() < 0.5 else "kill") for c in drawn]


def kill_at(
    lives: Lives, root: Path, fault: Fault, whole: Whole, again_at: int | None = None, store: str = "whole"
) -> Killed:
    """Kill a new run there, look at it, let it go on (killed again at `again_at`), and hold its end against `whole`."""
    start = time.perf_counter()
    found = Killed(fault.at, fault.action, again_at=again_at)
    for share in (1.0, 0.9, 0.7):  # heartbeats and snapshots go by the clock: a life may come to its end in fewer calls
        shutil.rmtree(root, ignore_errors=True)
        command, here = ready(root, replace(fault, at=max(1, int(share * fault.at))), whole)
        lived = lives.live(Life([command], root, here, store=store))
        if lived.exit != 0:
            break
    found.is_killed = lived.exit == -9
    if lived.hit:
        found.doing, found.call, found.kind = lived.hit.doing, lived.hit.name, kind_of(lived.hit)
    if lived.exit not in (-9, 0):
        found.findings.append(f"it ended with {lived.exit}: {last_line(lived)}")
    found.findings += look(lives, root)
    if again_at is not None:
        lives.live(Life([command], root, Fault(again_at, "kill"), store=store))
        found.findings += look(lives, root)
    lived = lives.live(Life([command], root, store=store))
    if lived.exit != 0:
        found.findings.append(f"it does not go on: exit {lived.exit}: {last_line(lived)}")
    ended = judge_end(root, whole)
    found.is_identical = not ended.different
    found.findings += ended.findings + verify(lives, root)
    found.seconds = time.perf_counter() - start
    return found


def ready(root: Path, fault: Fault, whole: Whole) -> tuple[list[str], Fault]:
    """A folder for the run, the command to disturb, and the fault, its number counted from that command's first call."""
    if fault.at <= whole.num_run_calls:
        root.mkdir(parents=True)
        return run(root), fault
    run_that_ended(whole, root)
    return report(root), replace(fault, at=fault.at - whole.num_run_calls)


@dataclass
class End:
    """What a run ended with, against an undisturbed one."""

    different: list[str]
    """Measured tables that are not the same bits."""
    findings: list[str]


def judge_end(root: Path, whole: Whole) -> End:
    """Hold rows, files and folders of a run that has come to its end against the undisturbed run's."""
    paths = only_run(root)
    if paths is None:
        return End(["all"], ["there is no run"])
    try:
        rows = rows_of(paths)
    except Exception as e:
        return End(["all"], [f"its rows cannot be read: {type(e).__name__}: {e}"])
    different = [name for name in whole.rows if rows.get(name) != whole.rows[name]]
    told = [f"other rows in {', '.join(different)}"] if different else []
    return End(different, told + leftovers(root, whole))


def look(lives: Lives, root: Path) -> list[str]:
    """What a reader finds wrong with a run that was killed and is not gone on with."""
    wrong = []
    for command in looks(root):
        lived = lives.live(Life([command], root))
        if any(not said.is_clean for said in lived.said) or lived.exit not in (0, 2):
            wrong.append(f"`{command[0]}` of the killed run: exit {lived.exit}: {last_line(lived)}")
    return wrong


def verify(lives: Lives, root: Path) -> list[str]:
    """What `harness verify` finds wrong with a run that has come to its end."""
    lived = lives.live(Life([looks(root)[-1]], root))
    return [f"`verify` of the ended run: exit {lived.exit}: {last_line(lived)}"] if lived.exit != 0 else []


def last_line(lived: Lived) -> str:
    """The last line of what a life said, numbers and paths left out, so that equal complaints are equal."""
    failed = [line for line in lived.output.splitlines() if "FAIL" in line]
    said = failed or lived.errors.strip().splitlines()
    return plain(said[-1]) if said else "nothing"


def plain(text: str) -> str:
    """A line without what differs from run to run."""
    text = re.sub(r"/\S*/", "", text)
    text = re.sub(r"\d{8}-\d{6}-demo-[0-9a-f]{8}(-\d+)?", "RUN", text)
    text = re.sub(r"\.\d+\.tmp", ".PID.tmp", text)
    text = re.sub(r"\d\d:\d\d:\d\d", "", text)
    return re.sub(r"\b[0-9a-f]{24}\b", "HASH", " ".join(text.split()))[:240]


def kill_often(
    lives: Lives, folder: Path, whole: Whole, faults: Sequence[Fault], seed: int, until: float = math.inf
) -> list[Killed]:
    """Every kill in a run of its own; every fourth is killed once more as it goes on. None begins after `until`."""
    draw = random.Random(seed + 1)
    found = []
    for fault in faults:
        if time.perf_counter() > until:
            break
        again_at = draw.randrange(1, whole.num_run_calls) if draw.random() < 0.25 else None
        root = folder / f"at-{fault.at}-{fault.action}"
        found.append(kill_at(lives, root, fault, whole, again_at))
        if not found[-1].findings:
            shutil.rmtree(root)
    return found


def tables(found: Sequence[Killed]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Title, columns and rows of what is printed."""
    shown = []
    for title, key in (("by stage", "doing"), ("by file", "kind"), ("by call", "call")):
        by: dict[str, list[Killed]] = defaultdict(list)
        for k in found:
            by[getattr(k, key) or "(not reached)"].append(k)
        rows: list[tuple[Any, ...]] = [
            (name, len(ks), sum(k.is_killed for k in ks), sum(k.action == "torn" for k in ks),
             sum(k.again_at is not None for k in ks), sum(k.is_identical for k in ks), sum(bool(k.findings) for k in ks))
            for name, ks in sorted(by.items())
        ]  # fmt: skip
        total = tuple(sum(row[i] for row in rows) for i in range(1, 7))
        columns = (title, "places", "killed", "torn", "killed twice", "identical", "with findings")
        shown.append((f"Kills {title}", columns, [*rows, ("all", *total)]))
    return shown


def grouped(findings: Sequence[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """(how often, finding, where first) of (finding, where) pairs, most frequent first."""
    counts = Counter(text for text, _ in findings)
    where = dict(reversed(findings))
    return [(n, text, where[text]) for text, n in counts.most_common()]


def as_json(found: Sequence[Killed]) -> list[dict[str, Any]]:
    return [asdict(k) for k in found]
