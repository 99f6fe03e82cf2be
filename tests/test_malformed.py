"""Malformed and hostile input to the command line: one clear line on stderr, the right exit code, nothing written.

Each case is a row of a table: its name, what is handed in, the exit code, and words that the line must contain. A case
builds what it needs in a folder of its own and gives the arguments. What holds for all of them is in `refused`: exactly
one printable line of bounded length, nothing on stdout, no file made, changed or removed, no planted code run, and an
end in finite time.
"""

import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.models.load import load_codec, shared
from tests.test_cli import ROWS, Told, prompt_file
from tests.tiny import build_model, byte_tokenizer

LIMIT_S = 20
"""Far beyond what any case takes on a busy machine; a case that waits for ever ends here."""
MOST_CHARACTERS = 2_000
Hand = Callable[[Path], list[object]]


class Case(NamedTuple):
    """What is handed in, how the command must end, and what its line must say (a regular expression)."""

    name: str
    hand: Hand
    code: int
    told: str
    environ: Mapping[str, str] = {}


class HungError(BaseException):
    """The command did not come to an end. No Exception: nothing must swallow it."""


@contextmanager
def finite() -> Iterator[None]:
    def hung(*_: object) -> NoReturn:
        raise HungError(f"no end in {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def harness(*args: object) -> Told:
    """One command in this process, its streams encoded as a terminal's are: stdout strictly, stderr with escapes."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    with finite(), redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in args])
    return Told(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of every path below `folder`, links not followed."""
    found = {str(p.relative_to(folder)): p.lstat() for p in folder.rglob("*")}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns if not p_is_folder(s) else 0) for name, s in found.items()}


def p_is_folder(found: os.stat_result) -> bool:
    return found.st_mode & 0o170000 == 0o040000


def refused(told: Told, code: int, words: str) -> str:
    """The one line that a refused command prints, on stderr and nowhere else."""
    assert "Traceback" not in told.err
    assert (told.code, told.out) == (code, ""), told
    assert re.fullmatch(r"harness: [^\n]+\n", told.err), told.err[:3_000]
    line = told.err.removeprefix("harness: ").rstrip("\n")
    assert line.isprintable(), ascii(line[:3_000])
    assert len(line) < MOST_CHARACTERS, f"{len(line)} characters: {line[:300]}"
    assert re.search(words, line), line
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, to be in; prompts and runs are there unless a case says otherwise."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HARNESS_PATHS__RUNS", str(folder / "runs"))
    monkeypatch.setenv("HARNESS_DATA__PROMPTS", str(prompt_file(folder)))
    monkeypatch.setenv("HARNESS_EXPERIMENT__STAGES", "prompts")  # what is let pass by mistake ends soon
    return folder


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    shared.cache_clear()
    load_codec.cache_clear()
    yield
    shared.cache_clear()
    load_codec.cache_clear()


def check(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    args = case.hand(here)
    before = everything(here.parent)
    line = refused(harness(*args), case.code, case.told)
    assert everything(here.parent) == before, "nothing is written"
    assert not (here / "was_run").exists(), "planted code was run"
    return line


def cases(table: list[Case]) -> pytest.MarkDecorator:
    assert len({c.name for c in table}) == len(table), "each case has a name of its own"
    return pytest.mark.parametrize("case", table, ids=lambda c: c.name)


def say(*args: object) -> Hand:
    """These arguments, and nothing built."""
    return lambda _: list(args)


# Arguments


def flag(name: str, *flags: object, told: str, code: int = 2) -> Case:
    """`harness run` with some flags."""
    return Case(name, say("run", *flags), code, told)


LONG = "x" * 1_000_000
DEEP = "[" * 100_000
DIGITS = "9" * 40
NOT_UTF8 = "\udcff\udcfe"  # as the interpreter hands over bytes that are no UTF-8

ARGUMENTS = [
    Case("no command but an empty text", say(""), 2, "invalid choice: ''"),
    Case("a command with a space", say(" run"), 2, "invalid choice: ' run'"),
    Case("a command that is not UTF-8", say(NOT_UTF8), 2, "invalid choice"),
    Case("a command of a million letters", say(LONG), 2, "invalid choice"),
    flag("an empty experiment", "", told="no experiment ''"),
    flag("an experiment behind --", "--", "--limit", told="no experiment '--limit'"),
    flag("an experiment that is not UTF-8", NOT_UTF8, told="no experiment"),
    flag("an experiment of a million letters", LONG, told="no experiment"),
    flag("an experiment with a path", "../gravity", told="no experiment '../gravity'.*did you mean 'gravity'"),
    flag("an experiment with a line end", "gravity\n", told="no experiment"),
    flag("a flag of a million letters", f"--{LONG}", told="no such argument"),
    flag("a flag that is not UTF-8", f"--{NOT_UTF8}", told="no such argument"),
    flag("a flag of two dashes and a space", "-- ", told="no experiment|no such argument"),
    flag("a model of a million letters", "--model", LONG, told="model.name"),
    flag("a model path of five thousand letters", "--model", "/" + "m" * 5_000, told="model.name"),
    flag("a model that is not UTF-8", "--model", NOT_UTF8, told="model.name"),
    flag("a model that is a web address", "--model", "https://example.org/model", told="model.name: no folder"),
    flag("a model above this folder", "--model", "..", told="config.json"),
    flag("a model that is a file", "--model", "prompts.jsonl", told="model.name"),
    flag("a model with dots for a name", "--model", "owner/..", told="model.name"),
    flag("a model with a line end", "--model", "owner/name\n", told="model.name"),
    flag("a random shape without a name", "--model", "random:", told="no shape ''"),
    flag("a random shape with a path", "--model", "random:../../x", told="no shape"),
    flag("a revision of a folder", "--model.revision", "main", told="model.revision"),
    flag("a revision of a random shape", "--model", "random:tiny-llama", "--model.revision", "x", told="model.revision"),
    flag("a revision with a path", "--model", "a/b", "--model.revision", "../../x", told="a/b"),
    flag("a revision with a line end", "--model", "a/b", "--model.revision", "a\nb", told="model.revision|a/b"),
    flag("a dtype of nothing", "--model.dtype", "", told="model.dtype.*'auto'"),
    flag("a dtype that numpy has", "--model.dtype", "float128", told="model.dtype"),
    flag("a switch of nothing", "--experiment.chat", "", told="experiment.chat"),
    flag("a switch of 2", "--experiment.chat", "2", told="experiment.chat"),
    flag("trust in a word", "--model.trust_remote_code", "if-needed", told="model.trust_remote_code"),
    flag("prompts that are not UTF-8", "--prompts", f"{NOT_UTF8}.jsonl", told="data.prompts|no such file"),
    flag("prompts with a name of five thousand letters", "--prompts", "p" * 5_000 + ".jsonl", told="cannot be read|name"),
    flag("prompts of nothing", "--prompts", "", told="a folder, expected a file"),
    flag("prompts that are a list", "--prompts", "a.jsonl,b.csv", told="no such file"),
    flag("settings with a name of five thousand letters", "--config", "c" * 5_000, told="--config"),
    flag("settings of nothing", "--config", "", told="--config"),
    flag("settings that are not UTF-8", "--config", NOT_UTF8, told="--config: no file"),
    flag("runs that are not UTF-8", "--paths.runs", NOT_UTF8, told="paths.runs"),
    flag("runs with a name of five thousand letters", "--paths.runs", "r" * 5_000, told="paths.runs", code=4),
    Case("a list of runs with a name of five thousand letters", say("runs", "--paths.runs", "r" * 5_000), 2, "r{100}"),
    flag("a data folder that is not there", "--paths.data", "/no/such", "--prompts", "bundled", told="no such file"),
    flag("a data folder that is a file", "--paths.data", "prompts.jsonl", told="config.json|no folder"),
    flag("a data folder that is not UTF-8", "--paths.data", NOT_UTF8, told="paths.data"),
    flag("a limit below nothing", "--limit", "-1", told="data.limit"),
    flag("a limit of nothing", "--limit", "", told="data.limit"),
    flag("a limit that is no number", "--limit", "NaN", told="data.limit"),
    flag("a limit without end", "--limit", "inf", told="data.limit"),
    flag("a limit of 1e400", "--limit", "1e400", told="data.limit"),
    flag("a limit of five thousand digits", "--limit", "9" * 5_000, told="data.limit"),
    flag("a limit with a raised two", "--limit", "²", told="data.limit"),
    flag("a limit in Arabic digits", "--limit", "٣", told="data.limit"),
    flag("a limit in base 16", "--limit", "0x10", told="data.limit"),
    flag("a limit with two signs", "--limit", "+-3", told="data.limit"),
    flag("a limit given twice, the last out of range", "--limit", "3", "--limit", "0", told="data.limit"),
    flag("a limit given short and long, the last out of range", "--limit", "3", "--data.limit", "x", told="data.limit"),
    flag("a seed below nothing", "--runtime.seed", "-1", told="runtime.seed"),
    flag("a seed of forty digits", "--runtime.seed", DIGITS, told="runtime.seed"),
    flag("a seed of five thousand digits", "--runtime.seed", "9" * 5_000, told="runtime.seed"),
    flag("a seed with a fraction", "--runtime.seed", "1.5", told="runtime.seed"),
    flag("a temperature of 1e400", "--experiment.temperature", "1e400", told="experiment.temperature"),
    flag("a temperature of 1e-400", "--experiment.temperature", "1e-400", told="experiment.temperature"),
    flag("a temperature of the smallest number", "--experiment.temperature", "5e-324", told="experiment.temperature"),
    flag("a temperature below nothing", "--experiment.temperature", "-1", told="experiment.temperature"),
    flag("a temperature of minus nothing", "--experiment.temperature", "-0.0", told="experiment.temperature"),
    flag("a temperature with a comma", "--experiment.temperature", "0,5", told="experiment.temperature"),
    flag("a mass that is no number", "--experiment.top_p", "nan", told="experiment.top_p"),
    flag("a mass just above 1", "--experiment.top_p", "1.0000001", told="experiment.top_p"),
    flag("samples of forty digits", "--experiment.num_samples", DIGITS, told="experiment.num_samples"),
    flag("ten million samples", "--experiment.num_samples", "10000000", told="experiment.num_samples"),
    flag("new tokens of forty digits", "--experiment.max_new_tokens_greedy", DIGITS, told="max_new_tokens_greedy"),
    flag("a million new tokens", "--experiment.max_new_tokens_samples", "1000000", told="max_new_tokens_samples"),
    flag("a sanity check of no prompts", "--experiment.sanity.num_prompts", "0", told="experiment.sanity.num_prompts"),
    flag("a cap below nothing", "--experiment.stored.max_per_category", "-1", told="experiment.stored.max_per_category"),
    flag("a pressure of nan", "--experiment.patching.min_p0", "nan", told="experiment.patching.min_p0"),
    flag("patching of no prompts", "--experiment.patching.max_prompts", "0", told="experiment.patching.max_prompts"),
    flag("threads of twelve digits", "--runtime.threads", "9" * 12, told="runtime.threads"),
    flag("threads below nothing", "--runtime.threads", "-2", told="runtime.threads"),
    flag("a reserve of 1e308 GB of disk", "--runtime.reserve_disk_gb", "1e308", told="runtime.reserve_disk_gb"),
    flag("a reserve of 1e308 GB of memory", "--batching.reserve_gb", "1e308", told="batching.reserve_gb"),
    flag("a batch of forty digits", "--batching.max_tokens", DIGITS, told="batching.max_tokens"),
    flag("a batch below nothing", "--batching.max_tokens", "-5", told="batching.max_tokens"),
    flag("an executor of nothing", "--runtime.executor", "", told="runtime.executor"),
    flag("a device with a number", "--runtime.device", "cuda:0", told="runtime.device"),
    flag("stages nested without end", "--stages", DEEP, told="experiment.stages"),
    flag("stages with a number too large", "--stages", "[1e400]", told="experiment.stages"),
    flag("stages in a table", "--stages", '{"psem": 1}', told="experiment.stages"),
    flag("stages apart by spaces", "--stages", "psem greedy", told="no stage 'psem greedy'"),
    flag("a stage that is not UTF-8", "--stages", NOT_UTF8, told="experiment.stages"),
    flag("a stage of a million letters", "--stages", LONG, told="no stage"),
    flag("a stage with a terminal's escape", "--stages", "\x1b[31mred", told="experiment.stages"),
    flag("conditions cut short", "--experiment.conditions", '{"a": ', told="experiment.conditions.*JSON"),
    flag("conditions nested without end", "--experiment.conditions", DEEP, told="experiment.conditions"),
    flag("conditions in lists", "--experiment.conditions", '["baseline", ["negative"]]', told="experiment.conditions"),
    flag("conditions of numbers", "--experiment.conditions", '{"a": {"text": 3}}', told="experiment.conditions"),
    flag("conditions of nan", "--experiment.conditions", '{"a": NaN}', told="experiment.conditions"),
    flag("a condition without a name", "--experiment.conditions", '{"": "{question}"}', told="experiment.conditions"),
    flag("a condition given twice", "--experiment.conditions", '{"a": "{question}", "a": "x {question}"}',
         told="experiment.conditions.*twice"),
    flag("a condition named as a path", "--experiment.conditions", '{"../x": "{question}"}', told="experiment.conditions"),
    flag("a condition with a bar", "--experiment.conditions", '{"a|b": "{question}"}', told="experiment.conditions"),
    flag("a condition named by an escape", "--experiment.conditions", '{"\\u001b[31m": "{question}"}',
         told="experiment.conditions"),
    flag("a condition with half a surrogate pair", "--experiment.conditions", '{"a": "\\ud800 {question}"}',
         told="experiment.conditions"),
    flag("samples under a condition that is not run", "--experiment.conditions", "baseline",
         "--experiment.sample_conditions", "negative", told="experiment.sample_conditions.*'negative'"),
    flag("patching under a condition that is not run", "--experiment.conditions", "baseline",
         "--experiment.patching.condition", "negative", told="experiment.patching.condition"),
    flag("going on with nothing", "--resume", "", told="expected a run_id"),
    flag("going on with a folder above", "--resume", "../..", told="run"),
    flag("going on with the latest of none", "--resume", "latest", told="no run in"),
    flag("going on with a run that is not UTF-8", "--resume", NOT_UTF8, told="expected a run_id"),
    Case("a certificate of minus five prompts", say("sanity", "--num-prompts", "-5"), 2, "--num-prompts"),
    Case("a certificate of one and a half prompts", say("sanity", "--num-prompts", "1.5"), 2, "--num-prompts"),
    Case("a certificate of too many digits", say("sanity", "--num-prompts", "9" * 5_000), 2, "--num-prompts"),
    Case("batches that are no number", say("verify", "latest", "--batches", "nan"), 2, "--batches"),
    Case("a sample that is no number", say("verify", "latest", "--sample", "1e3"), 2, "--sample"),
    Case("a bench of a stage of nothing", say("bench", "--stage", ""), 2, "--stage"),
    Case("a port of letters", say("app", "--port", "http"), 2, "--port"),
    Case("a format in capitals", say("export", "latest", "--to", "x", "--format", "CSV"), 2, "--format"),
    Case("a difference of one run", say("diff", "latest"), 2, "run_b"),
    Case("a difference of three runs", say("diff", "a", "b", "c"), 2, "no such argument c"),
]  # fmt: skip


@cases(ARGUMENTS)
def test_arguments(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, here, monkeypatch)
