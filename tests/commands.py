"""Commands of the harness run in this process, as a shell would see them, and what they leave behind."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from harness.cli import main
from harness.run import Manifest

DATA = Path(__file__).resolve().parent.parent / "data"
Row = dict[str, Any]
ROWS: tuple[Row, ...] = (
    {"prompt_id": "milk", "category": "idioms", "question": "Fill the blank: there's no use crying over spilled ____.",
     "target": "milk", "style": "blank_end", "alternatives": ["water", "wine", "juice"]},
    {"prompt_id": "worm", "category": "idioms", "question": "The early bird catches the ____.", "target": "worm"},
    {"prompt_id": "paris", "category": "facts", "question": "What is the capital of France?", "target": "Paris"},
)  # fmt: skip
BAN = "Answer with exactly one English word.\nAvoid words of the kind {category}.\nQuestion: {question}\nAnswer:"
REFRAME = 'Answer with exactly one English word.\nPick any word but "{target}".\nQuestion: {question}\nAnswer:'
SECRET = "hf-not-to-be-told-7f3a"
"""A value of the environment that nothing may repeat."""


class Told(NamedTuple):
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def harness(*args: object) -> Told:
    """One command in this process, as a shell would see it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in args])
    return Told(code, out.getvalue(), err.getvalue())


def saying(told: Mapping[str, Any] | None = None) -> Manifest:
    """A manifest that says this, and the two things that every one says."""
    return Manifest.of({"run_id": "r", "fingerprint": "0", **(told or {})})


def refused(told: Told, code: int = 2) -> str:
    """The one line that a refused command prints, on stderr and nowhere else."""
    assert (told.code, told.out) == (code, ""), told
    assert re.fullmatch(r"harness: [^\n]+\n", told.err), told.err
    assert "Traceback" not in told.err
    return told.err.removeprefix("harness: ").rstrip("\n")


def prompt_file(folder: Path, rows: Sequence[Row] = ROWS, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def run_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*") if p.is_dir())


def only_run(root: Path) -> Path:
    (folder,) = run_folders(root)
    return folder


def query(run: Path, sql: str) -> list[tuple]:
    """Rows of a run's snapshot."""
    with duckdb.connect(":memory:") as con:
        con.execute(f"ATTACH '{run / 'live.duckdb'}' AS run (READ_ONLY); USE run")
        return con.execute(sql).fetchall()


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())
