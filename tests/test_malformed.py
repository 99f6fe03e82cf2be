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
import pickle
import re
import shutil
import signal
import socket
import struct
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
from tests.commands import Told, prompt_file
from tests.tiny import build_model, byte_tokenizer

LIMIT_S = 300
"""Far beyond what any case takes on a busy machine; a case that waits for ever ends here."""
MOST_CHARACTERS = 2_000
Hand = Callable[[Path], list[object]]


class Case(NamedTuple):
    """What is handed in, how the command must end, and what its line must say (a regular expression)."""

    name: str
    hand: Hand
    code: int
    told: str
    environ: Mapping[str, str | None] = {}


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
    monkeypatch.setenv("HARNESS_GRAVITY__STAGES", "prompts")  # what is let pass by mistake ends soon
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
        if value is None:
            monkeypatch.delenv(name)
        else:
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


LONG = "x" * 100_000
DEEP = "[" * 100_000
DIGITS = "9" * 40
NOT_UTF8 = "\udcff\udcfe"  # as the interpreter hands over bytes that are no UTF-8

ARGUMENTS = [
    Case("no command but an empty text", say(""), 2, "invalid choice: ''"),
    Case("a command with a space", say(" run"), 2, "invalid choice: ' run'"),
    Case("a command that is not UTF-8", say(NOT_UTF8), 2, "invalid choice"),
    Case("a command of a hundred thousand letters", say(LONG), 2, "invalid choice"),
    flag("an empty experiment", "", told="no experiment ''"),
    flag("an experiment behind --", "--", "--limit", told="no experiment '--limit'"),
    flag("an experiment that is not UTF-8", NOT_UTF8, told="no experiment"),
    flag("an experiment of a hundred thousand letters", LONG, told="no experiment"),
    flag("an experiment with a path", "../gravity", told="no experiment '../gravity'.*did you mean 'gravity'"),
    flag("an experiment with a line end", "gravity\n", told="no experiment"),
    flag("a flag of a hundred thousand letters", f"--{LONG}", told="no such argument"),
    flag("a flag that is not UTF-8", f"--{NOT_UTF8}", told="no such argument"),
    flag("a flag of two dashes and a space", "-- ", told="no experiment|no such argument"),
    flag("a model of a hundred thousand letters", "--model", LONG, told="model.name"),
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
    flag("a switch of nothing", "--gravity.chat", "", told="gravity.chat"),
    flag("a switch of 2", "--gravity.chat", "2", told="gravity.chat"),
    flag("trust in a word", "--model.trust_remote_code", "if-needed", told="model.trust_remote_code"),
    flag("prompts that are not UTF-8", "--prompts", f"{NOT_UTF8}.jsonl", told="data.prompts|no such file"),
    flag("prompts with a name of five thousand letters", "--prompts", "p" * 5_000 + ".jsonl", told="cannot be read|name"),
    flag("prompts of nothing", "--prompts", "", told="a folder, expected a file"),
    flag("prompts that are a list", "--prompts", "a.jsonl,b.csv", told="no such file"),
    flag("settings with a name of five thousand letters", "--config", "c" * 5_000, told="--config"),
    flag("settings of nothing", "--config", "", told="--config"),
    flag("settings that are not UTF-8", "--config", NOT_UTF8, told="--config: no file"),
    flag("runs that are not UTF-8", "--paths.runs", NOT_UTF8, told="paths.runs"),
    flag("runs with a name of five thousand letters", "--paths.runs", "r" * 5_000, told="paths.runs"),
    Case("a list of runs with a name of five thousand letters", say("runs", "--paths.runs", "r" * 5_000), 2, "paths.runs"),
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
    flag("a temperature of 1e400", "--gravity.temperature", "1e400", told="gravity.temperature"),
    flag("a temperature of 1e-400", "--gravity.temperature", "1e-400", told="gravity.temperature"),
    flag("a temperature of the smallest number", "--gravity.temperature", "5e-324", told="gravity.temperature"),
    flag("a temperature below nothing", "--gravity.temperature", "-1", told="gravity.temperature"),
    flag("a temperature of minus nothing", "--gravity.temperature", "-0.0", told="gravity.temperature"),
    flag("a temperature with a comma", "--gravity.temperature", "0,5", told="gravity.temperature"),
    flag("a mass that is no number", "--gravity.top_p", "nan", told="gravity.top_p"),
    flag("a mass just above 1", "--gravity.top_p", "1.0000001", told="gravity.top_p"),
    flag("samples of forty digits", "--gravity.num_samples", DIGITS, told="gravity.num_samples"),
    flag("ten million samples", "--gravity.num_samples", "10000000", told="gravity.num_samples"),
    flag("new tokens of forty digits", "--gravity.max_new_tokens_greedy", DIGITS, told="max_new_tokens_greedy"),
    flag("a million new tokens", "--gravity.max_new_tokens_samples", "1000000", told="max_new_tokens_samples"),
    flag("a sanity check of no prompts", "--gravity.sanity.num_prompts", "0", told="gravity.sanity.num_prompts"),
    flag("a cap below nothing", "--gravity.stored.max_per_category", "-1", told="gravity.stored.max_per_category"),
    flag("a pressure of nan", "--gravity.patching.min_p0", "nan", told="gravity.patching.min_p0"),
    flag("patching of no prompts", "--gravity.patching.max_prompts", "0", told="gravity.patching.max_prompts"),
    flag("threads of twelve digits", "--runtime.threads", "9" * 12, told="runtime.threads"),
    flag("threads below nothing", "--runtime.threads", "-2", told="runtime.threads"),
    flag("a reserve of 1e308 GB of disk", "--runtime.reserve_disk_gb", "1e308", told="runtime.reserve_disk_gb"),
    flag("a reserve of 1e308 GB of memory", "--batching.reserve_gb", "1e308", told="batching.reserve_gb"),
    flag("a batch of forty digits", "--batching.max_tokens", DIGITS, told="batching.max_tokens"),
    flag("a batch below nothing", "--batching.max_tokens", "-5", told="batching.max_tokens"),
    flag("an executor of nothing", "--runtime.executor", "", told="runtime.executor"),
    flag("a device with a number", "--runtime.device", "cuda:0", told="runtime.device"),
    flag("stages nested without end", "--stages", DEEP, told="gravity.stages"),
    flag("stages with a number too large", "--stages", "[1e400]", told="gravity.stages"),
    flag("stages in a table", "--stages", '{"psem": 1}', told="gravity.stages"),
    flag("stages apart by spaces", "--stages", "psem greedy", told="no stage 'psem greedy'"),
    flag("a stage that is not UTF-8", "--stages", NOT_UTF8, told="gravity.stages"),
    flag("a stage of a hundred thousand letters", "--stages", LONG, told="no stage"),
    flag("a stage with a terminal's escape", "--stages", "\x1b[31mred", told="gravity.stages"),
    flag("conditions cut short", "--gravity.conditions", '{"a": ', told="gravity.conditions.*JSON"),
    flag("conditions nested without end", "--gravity.conditions", DEEP, told="gravity.conditions"),
    flag("conditions in lists", "--gravity.conditions", '["baseline", ["negative"]]', told="gravity.conditions"),
    flag("conditions of numbers", "--gravity.conditions", '{"a": {"text": 3}}', told="gravity.conditions"),
    flag("conditions of nan", "--gravity.conditions", '{"a": NaN}', told="gravity.conditions"),
    flag("a condition without a name", "--gravity.conditions", '{"": "{question}"}', told="gravity.conditions"),
    flag("a condition given twice", "--gravity.conditions", '{"a": "{question}", "a": "x {question}"}',
         told="gravity.conditions.*twice"),
    flag("a condition named as a path", "--gravity.conditions", '{"../x": "{question}"}', told="gravity.conditions"),
    flag("a condition with a bar", "--gravity.conditions", '{"a|b": "{question}"}', told="gravity.conditions"),
    flag("a condition named by an escape", "--gravity.conditions", '{"\\u001b[31m": "{question}"}',
         told="gravity.conditions"),
    flag("a condition with half a surrogate pair", "--gravity.conditions", '{"a": "\\ud800 {question}"}',
         told="gravity.conditions"),
    flag("samples under a condition that is not run", "--gravity.conditions", "baseline",
         "--gravity.sample_conditions", "negative", told="gravity.sample_conditions.*'negative'"),
    flag("patching under a condition that is not run", "--gravity.conditions", "baseline",
         "--gravity.patching.condition", "negative", told="gravity.patching.condition"),
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


# Settings files


def toml(name: str, content: str | bytes, told: str, without: str | None = None) -> Case:
    """`harness run --config` with a file of this content."""

    def hand(here: Path) -> list[object]:
        path = here / "settings.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["run", "--config", path]

    return Case(name, hand, 2, told, {without: None} if without else {})  # a variable would be stronger than the file


def put(name: str, make: Callable[[Path], object], option: str, told: str, *more: object, code: int = 2) -> Case:
    """`harness run` with a path that `make` makes of something that is no file to read, or a bad one."""
    suffix = {"--config": ".toml", "--prompts": ".jsonl"}[option]

    def hand(here: Path) -> list[object]:
        path = here / f"given{suffix}"
        make(path)
        return ["run", option, path, *more]

    return Case(name, hand, code, told)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def sparse(path: Path, size: int = 10_000_000_000) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a named pipe": (os.mkfifo, "pipe|no such file"),
    "a folder": (Path.mkdir, "older"),
    "a socket": (socket_at, "socket|no such file"),
    "a link to /dev/zero": (link_to("/dev/zero"), "device|no such file"),
    "a link to /dev/stdin": (link_to("/dev/stdin"), "device|pipe|empty|no such file|at most|regular"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "symbolic links|no such file|no file"),
    "a link to nothing": (link_to("/no/such/file"), "no such file|no file"),
    "a file that cannot be read": (link_to("/proc/self/mem"), "rror"),
    "a file of ten gigabytes of nothing": (sparse, "at most"),
}
TEMPLATE = "[gravity.conditions]\nx = {}\n"

SETTINGS_FILES = [
    *(put(f"settings that are {name}", make, "--config", f"--config.*({told})") for name, (make, told) in KINDS.items()),
    toml("settings in JSON", '{"model": {"name": "demo"}}', "not a TOML file"),
    toml("settings in YAML", "model:\n  name: demo\n", "not a TOML file"),
    toml("settings of NULs", b"\0" * 100, "not a TOML file"),
    toml("settings in UTF-16", "[model]\n".encode("utf-16"), "not a TOML file"),
    toml("settings in Latin-1", b"[model]\nname = 'm\xe9'\n", "not a TOML file.*0xe9"),
    toml("settings that are a compressed file", gzip.compress(b"[model]\n"), "not a TOML file"),
    toml("settings nested without end", "[model]\nname = " + DEEP, "not a TOML file"),
    toml("settings of a table in a table in a table", "[" + ".".join("a" * 5_000) + "]\nb = 1\n", "no such setting|not a TOML"),
    toml("settings with a number of five thousand digits", "[runtime]\nseed = " + "9" * 5_000, "not a TOML file"),
    toml("settings with a section twice", "[model]\n[model]\n", "not a TOML file.*twice"),
    toml("settings with a key twice behind a mark", b"\xef\xbb\xbf[model]\nname='a'\nname='b'\n", "not a TOML file.*line 3"),
    toml("settings with a table over a value", "[model]\nname = 'a'\n[model.name]\nx = 1\n", "not a TOML file"),
    toml("settings cut short", "[model]\nname = 'de", "not a TOML file"),
    toml("settings with a list of tables", "[[model]]\nname = 'demo'\n", "expected tables such as .model."),
    toml("settings with a section of text", "model = 'demo'\n", "expected tables such as .model."),
    toml("a section without a name", "['']\na = 1\n", "no such setting"),
    toml("an unknown section", "[modle]\nname = 'demo'\n", "modle.name.*did you mean 'model.name'"),
    toml("an unknown key in a section of a section", "[gravity.select]\nmin_p = 1\n", "did you mean .*select.min_p0"),
    toml("an unknown key far below a plain setting", "[model.name.deep]\nx = 1\n", "model.name"),
    toml("a dotted key in quotes", '["gravity.select"]\nmin_p9 = 1\n', "no such setting"),
    toml("a key of a thousand letters", f"[model]\n{'k' * 1_000} = 1\n", "no such setting"),
    toml("a key with an escape", '[model]\n"\\u001b[31m" = 1\n', "no such setting"),
    toml("a name of a model that is a number", "[model]\nname = 3\n", "model.name.*string.*found 3"),
    toml("a name of a model that is a list", "[model]\nname = ['demo']\n", "model.name"),
    toml("a name of a model with a NUL", '[model]\nname = "a\\u0000b"\n', "model.name.*NUL"),
    toml("trust that is a number", "[model]\ntrust_remote_code = 2\n", "model.trust_remote_code"),
    toml("a dtype that is a truth value", "[model]\ndtype = true\n", "model.dtype"),
    toml("prompts that are a table", "[data.prompts]\na = 1\n", "data.prompts", "HARNESS_DATA__PROMPTS"),
    toml("a limit that is a truth value", "[data]\nlimit = true\n", "data.limit.*found True"),
    toml("a limit that is a fraction", "[data]\nlimit = 2.5\n", "data.limit"),
    toml("a limit that is a date", "[data]\nlimit = 1979-05-27\n", "data.limit"),
    toml("samples that are a truth value", "[gravity]\nnum_samples = true\n", "gravity.num_samples.*found True"),
    toml("a temperature that is inf", "[gravity]\ntemperature = inf\n", "gravity.temperature"),
    toml("a mass that is a truth value", "[gravity]\ntop_p = true\n", "gravity.top_p.*found True"),
    toml("stages that are numbers", "[gravity]\nstages = [1, 2]\n", "gravity.stages",
         "HARNESS_GRAVITY__STAGES"),
    toml("a section that is a number", "[gravity]\nselect = 3\n", "gravity.select"),
    toml("a batch that is a truth value", "[batching]\nmax_tokens = true\n", "batching.max_tokens.*found True"),
    toml("a reserve that is text", "[batching]\nreserve_gb = 'much'\n", "batching.reserve_gb"),
    toml("a seed that is a truth value", "[runtime]\nseed = true\n", "runtime.seed.*found True"),
    toml("a seed that is a table", "[runtime.seed]\nroot = 1\n", "runtime.seed"),
    toml("runs that are a number", "[paths]\nruns = 3\n", "paths.runs", "HARNESS_PATHS__RUNS"),
    toml("runs with a NUL", '[paths]\ndata = "a\\u0000b"\n', "paths.data.*NUL"),
    toml("conditions that are a number", "[gravity]\nconditions = 3\n", "gravity.conditions"),
    toml("a condition that is a list", TEMPLATE.format("['{question}']"), "gravity.conditions"),
    toml("a condition that is a truth value", TEMPLATE.format("true"), "gravity.conditions"),
    toml("a condition of a condition", "[gravity.conditions.x.y]\ntext = '{question}'\n", "gravity.conditions"),
    toml("a condition without a text", "[gravity.conditions.x]\nnegation = 'no'\n", "gravity.conditions"),
    toml("a condition with a line end for a name", '[gravity.conditions]\n"a\\nb" = "{question}"\n', "gravity.conditions"),
    toml("a template of nothing", TEMPLATE.format("''"), "question. once"),
    toml("a template that looks inside", TEMPLATE.format("'{question.__class__}'"), "found '{question.__class__}'"),
    toml("a template that looks inside a target", TEMPLATE.format("'{question} {target.__init__.__globals__}'"), "__globals__"),
    toml("a template with an index", TEMPLATE.format("'{question} {target[0]}'"), "alone in braces"),
    toml("a template with a conversion", TEMPLATE.format("'{question!r}'"), "alone in braces"),
    toml("a template with a width", TEMPLATE.format("'{question:>1000000000}'"), "alone in braces"),
    toml("a template with a number", TEMPLATE.format("'{0} {question}'"), "no field .0."),
    toml("a template with nothing in braces", TEMPLATE.format("'{}'"), "question. once"),
    toml("a template with a brace left open", TEMPLATE.format("'{question'"), "alone in braces"),
    toml("a template with a space in braces", TEMPLATE.format("'{ question }'"), "alone in braces"),
    toml("a template with percent signs", TEMPLATE.format("'%(question)s'"), "question. once"),
    toml("a negation of nothing", "[gravity.conditions.x]\ntext = '{question}'\nnegation = ''\n", "negation"),
]  # fmt: skip


@cases(SETTINGS_FILES)
def test_settings_files(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, here, monkeypatch)


# Environment variables


def variable(name: str, value: str, told: str, *command: object, code: int = 2) -> Case:
    return Case(f"{name}={value[:20]!a}", say(*(command or ("run",))), code, told, {name: value})


VARIABLES = [
    variable("HARNESS_", "1", "HARNESS_: no such setting"),
    variable("HARNESS___", "1", "HARNESS___: no such setting"),
    variable("HARNESS_MODEL", "demo", "HARNESS_MODEL: no such setting"),
    variable("HARNESS_MODEL__NAME__DEEP", "x", "HARNESS_MODEL__NAME__DEEP: no such setting"),
    variable("HARNESS_Model__Nam", "x", "no such setting"),
    variable("HARNESS_MODEL__NAME", "", "model.name: no folder ''"),
    variable("HARNESS_MODEL__NAME", NOT_UTF8, "model.name.*UTF-8"),
    variable("HARNESS_MODEL__TRUST_REMOTE_CODE", "sure", "model.trust_remote_code"),
    variable("HARNESS_RUNTIME__SEED", "", "runtime.seed.*env: HARNESS_RUNTIME__SEED"),
    variable("HARNESS_RUNTIME__SEED", "1e3", "runtime.seed"),
    variable("HARNESS_GRAVITY__CONDITIONS__X", "no field", "question. once"),
    variable("HARNESS_GRAVITY__CONDITIONS____TEXT", "{question}", "gravity.conditions"),
    variable("HARNESS_GRAVITY__TEMPLATES", "[]", "gravity.templates"),
    variable("HARNESS_GRAVITY__TOP_P", LONG, "gravity.top_p"),
    variable("HARNESS_DATA__LIMIT", "٣", "data.limit.*env: HARNESS_DATA__LIMIT", "runs"),
    variable("MODEL_PATH", "/no/such/model", "no folder '/no/such/model'"),
    variable("HF_HOME", "h" * 300, "paths.hf_home.*env: HF_HOME", "runs"),
]


@cases(VARIABLES)
def test_environment_variables(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, here, monkeypatch)


def test_aliases_of_nothing_are_not_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL_PATH", "DATA_ROOT", "OUTPUT_ROOT", "HF_HOME"):
        monkeypatch.setenv(name, "")
    assert harness("runs").code == 0


# Prompt files

HEADER = b"category,question,target\n"
GOOD = {"category": "a", "question": "b", "target": "cd"}


def prompts(name: str, content: bytes | Callable[[], bytes], told: str, suffix: str = ".jsonl") -> Case:
    """`harness run --prompts` with a file of this content."""

    def hand(here: Path) -> list[object]:
        path = here / f"given{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content())
        return ["run", "--prompts", path]

    return Case(name, hand, 2, told)


def line(**fields: object) -> bytes:
    return json.dumps({**GOOD, **fields}).encode() + b"\n"


def parquet(columns: dict[str, Any] | None = None, **more: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({**{k: [v] for k, v in GOOD.items()}, **(columns or {}), **more}), out, store_schema=False)
    return out.getvalue()


def lying_footer(length: int) -> bytes:
    """A whole file whose footer says that it is that long."""
    return parquet()[:-8] + struct.pack("<I", length) + b"PAR1"


def bomb(num_rows: int, word: str) -> bytes:
    """A few thousand bytes that are unpacked to num_rows times the word."""
    columns = {name: pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), [word]) for name in GOOD}
    return parquet(columns)


PROMPT_FILES = [
    *(put(f"prompts that are {name}", make, "--prompts", told) for name, (make, told) in KINDS.items()),
    prompts("prompts of only a mark in CSV", b"\xef\xbb\xbf", "no row|empty", ".csv"),
    prompts("prompts compressed under a plain name", gzip.compress(line() * 100)[:-9], "UTF-8"),
    prompts("prompts that are a picture", b"\x89PNG\r\n\x1a\n" + bytes(100), "UTF-8"),
    prompts("prompts of NULs alone", bytes(10_000), "NUL"),
    prompts("prompts in objects without end", b'{"a":' * 50_000, "line 1.*cannot be read|not valid JSON"),
    prompts("prompts nested in a field", line(question=[[["a"]]]), "field 'question': expected text, found a list"),
    prompts("prompts with a number out of range", b'{"category": "a", "question": 1e999, "target": "cd"}\n', "the number inf"),
    prompts("prompts with NaN for a target", b'{"category": "a", "question": "b", "target": NaN}\n', "number nan"),
    prompts("prompts with a field of a megabyte", line(question="word " * 200_000), "1,000,000 characters, expected at most"),
    prompts("prompts with a target of a megabyte", line(target="w" * 1_000_000), "1,000,000 characters, expected at most"),
    prompts("prompts with an id of a megabyte", line(prompt_id="w" * 1_000_000), "1,000,000 characters, expected at most"),
    prompts("prompts with one line of a megabyte that is no JSON", b"x" * 1_000_000, "not valid JSON"),
    prompts("prompts with a target of zero-width letters", line(target="\u200b\u200b"), "target_not_alphabetic"),
    prompts("prompts with a target turned around", line(target="\u202ecd"), "target_not_alphabetic"),
    prompts("prompts with an escape for a target", line(target="\x1b[31m"), "target_not_alphabetic"),
    prompts("prompts with an escape for a field", b'{"\\u001b[2J": 1}\n', "missing field"),
    prompts("prompts with half a surrogate pair in an id", b'{"prompt_id": "\\udfff", ' + line()[1:], "surrogate"),
    prompts("prompts with an id of nothing but a NUL", line(prompt_id="\0"), "a NUL"),
    prompts("prompts with a raw line end in a text", b'{"category": "a\nb"}', "line 1"),
    prompts("prompts with ids that differ in spaces alone", line(prompt_id="a") + line(prompt_id=" a ", question="e"), "already"),
    prompts("prompts with comments", b"// prompts\n" + line(), "line 1.*not valid JSON"),
    prompts("prompts with single quotes", str(GOOD).encode() + b"\n", "not valid JSON"),
    prompts("prompts with ten megabytes in a CSV cell", HEADER + b"a," + b"b" * 10_000_000 + b",cd\n", "field larger", ".csv"),
    prompts("prompts with quotes unbalanced in CSV", HEADER + b'a,"b"",cd\n', "close every quote", ".csv"),
    prompts("prompts with a quote inside a cell in CSV", HEADER + b'a,"b" or c,cd\n', "not valid CSV", ".csv"),
    prompts("prompts with a formula in CSV", HEADER + b'a,b,"=HYPERLINK(1)"\n', "target_not_alphabetic", ".csv"),
    prompts("prompts that call a program in CSV", HEADER + b"a,b,=cmd|' /C calc'!A0\n", "target_not_alphabetic", ".csv"),
    prompts("prompts of a hundred thousand columns", b"a," * 100_000 + b"\n", "missing column|occurs twice", ".csv"),
    prompts("prompts apart by tabs", HEADER.replace(b",", b"\t"), "put commas", ".csv"),
    prompts("prompts with old line ends in JSON", line().replace(b"\n", b"\r") * 2, "line 1"),
    prompts("Parquet cut in the middle", lambda: parquet()[:200], "not a whole Parquet file", ".parquet"),
    prompts("Parquet with a footer of four gigabytes", lambda: lying_footer(2**32 - 1), "not a whole Parquet file", ".parquet"),
    prompts("Parquet with a footer of nothing", lambda: lying_footer(0), "not a whole Parquet file", ".parquet"),
    prompts("Parquet with a footer elsewhere", lambda: lying_footer(7), "not a whole Parquet file", ".parquet"),
    prompts("Parquet that is encrypted", lambda: parquet()[:-4] + b"PARE", "not a whole Parquet file", ".parquet"),
    prompts("Parquet with nested columns", lambda: parquet(question=[{"text": "b"}]), "column of text, found struct", ".parquet"),
    prompts("Parquet with lists of lists", lambda: parquet(alternatives=[[["a"]]]), "column of text, found list", ".parquet"),
    prompts("Parquet with a map", lambda: parquet(target=pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))),
            "column of text, found map", ".parquet"),
    prompts("Parquet with times", lambda: parquet(category=pa.array([2**62], pa.timestamp("ns"))), "found timestamp", ".parquet"),
    prompts("Parquet with truth values", lambda: parquet(target=[True]), "found bool", ".parquet"),
    prompts("Parquet of no columns", lambda: _no_columns(), "missing column", ".parquet"),
    prompts("Parquet that is unpacked to gigabytes", lambda: bomb(5_000, "w" * 1_000_000), "once it is unpacked", ".parquet"),
    prompts("Parquet of too many rows", lambda: bomb(6_000_000, "w"), "6,000,000 rows, expected at most", ".parquet"),
]  # fmt: skip


def _no_columns() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({}), out)
    return out.getvalue()


@cases(PROMPT_FILES)
def test_prompt_files(case: Case, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, here, monkeypatch)


# Model folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model; cases change a copy."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model("tiny-llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


Change = Callable[[Path], object]


def model(name: str, change: Change, told: str, *more: object, code: int = 2) -> Case:
    """`harness sanity --model` with a copy of the checkpoint that `change` has been at."""

    def hand(here: Path) -> list[object]:
        folder = here / "model"
        change(folder)
        return ["sanity", "--num-prompts", 1, "--model", folder, *more]

    return Case(name, hand, code, told)


def edit(file: str = "config.json", **values: object) -> Change:
    """Set keys of one of its JSON files."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))

    return change


def write(file: str, content: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def become(file: str, make: Change) -> Change:
    """A file that is something else."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return change


def header(tensors: Mapping[str, object], data: bytes = b"", length: int | None = None) -> Change:
    """A safetensors file of this header, which may say another length than it has."""
    text = json.dumps(tensors).encode()
    number = struct.pack("<Q", len(text) if length is None else length)
    return write("model.safetensors", number + text + data)


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def weights(change_weights: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change_weights(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def poison(value: float) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        found["model.layers.1.mlp.up_proj.weight"][0, 0] = value

    return weights(change)


def as_integers(found: dict[str, torch.Tensor]) -> None:
    for name in found:
        found[name] = found[name].to(torch.int8)


EVIL = "open('was_run', 'w').close()\n"


def code_for(auto_class: str, file: str = "config.json", **more: object) -> Change:
    """Code that leaves a mark where it is run."""

    def change(folder: Path) -> None:
        write("evil.py", EVIL)(folder)
        edit(file, auto_map={auto_class: "evil.Evil"}, **more)(folder)

    return change


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (EVIL,)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickled_by_name(folder: Path) -> None:
    (folder / "other.bin").write_bytes(pickle.dumps(Bomb()))
    edit(transformers_weights="other.bin")(folder)


def sharded(shards: Mapping[str, object], keep: bool = False) -> Change:
    """An index that names these files, and no whole file."""

    def change(folder: Path) -> None:
        whole = folder / "model.safetensors"
        shutil.copy(whole, folder.parent / "outside.safetensors")
        whole.rename(folder / "model-1.safetensors")
        if keep:
            shutil.copy(folder / "model-1.safetensors", whole)
        write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": shards}))(folder)

    return change


def adapter(folder: Path) -> None:
    write("adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"}))(folder)


def gaps(folder: Path) -> None:
    """As many ids as before, and one of them far beyond the embedding."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    name = max(found["model"]["vocab"], key=lambda n: found["model"]["vocab"][n])
    found["model"]["vocab"][name] = 1_000_000
    path.write_text(json.dumps(found))


def huge_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"] |= {f"w{i}": 1_000 + i for i in range(200_000)}
    path.write_text(json.dumps(found))


CHAT = ("--gravity.chat", "true")
NEST = '{"a":' * 50_000
ANY_CONFIG = "config.json"

MODEL_FOLDERS = [
    *(model(f"a config that is {kind}", become("config.json", make), told) for kind, make, told in [
        ("a named pipe", os.mkfifo, "config.json: cannot be.*pipe"), ("a folder", Path.mkdir, "config.json.*folder"),
        ("a link to /dev/zero", link_to("/dev/zero"), "config.json.*device"),
        ("a link to /etc/passwd", link_to("/etc/passwd"), "config.json"),
        ("a link to itself", link_to("config.json"), "config.json"),
        ("ten gigabytes of nothing", sparse, "config.json.*at most"),
    ]),
    model("a config of nothing", write("config.json", ""), "config.json"),
    model("a config that is a list", write("config.json", "[1]"), "config.json.*expected a JSON object, found list"),
    model("a config that is a text", write("config.json", '"llama"'), "expected a JSON object, found str"),
    model("a config nested without end", write("config.json", NEST), "config.json.*nested"),
    model("a config that is not UTF-8", write("config.json", b'{"model_type": "\xff"}'), "config.json"),
    model("a config with five thousand digits", write("config.json", '{"hidden_size": ' + "9" * 5_000 + "}"), "config.json"),
    model("a config of no model type", write("config.json", '{"hidden_size": 8}'), "config.json.*model_type"),
    model("a config of an unknown model type", edit(model_type="no-such-model"), "config.json.*no-such-model"),
    model("a config whose model type is a path", edit(model_type="../../x"), "config.json"),
    model("a config whose model type is a number", edit(model_type=3), "config.json"),
    model("a config whose model type is a list", edit(model_type=["llama"]), "config.json"),
    model("a config of an encoder", edit(model_type="bert"), "model"),
    model("a hidden size of 10**12", edit(hidden_size=10**12), "hidden_size|numbers in one weight|config.json"),
    model("a hidden size of 10**400", edit(hidden_size=10**400), "hidden_size"),
    model("a hidden size below nothing", edit(hidden_size=-64), "hidden_size.*found -64"),
    model("a hidden size of text", edit(hidden_size="64 or so"), "config.json"),
    model("a hidden size of nothing", edit(hidden_size=0), "model"),
    model("a hidden size that is a list", edit(hidden_size=[64]), "config.json|model"),
    model("a hidden size that is null", edit(hidden_size=None), "config.json|model"),
    model("a hidden size of another model", edit(hidden_size=65_536), "numbers in one weight"),
    model("a billion layers", edit(num_hidden_layers=10**9), "num_hidden_layers.*1000000000"),
    model("nine thousand layers", edit(num_hidden_layers=9_000), "9,000 layers"),
    model("layers below nothing", edit(num_hidden_layers=-1), "num_hidden_layers.*found -1"),
    model("layers of text", edit(num_hidden_layers="two"), "config.json"),
    model("no layers", edit(num_hidden_layers=0), "model"),
    model("no heads", edit(num_attention_heads=0), "config.json|model"),
    model("a billion heads", edit(num_attention_heads=10**9), "num_attention_heads"),
    model("three heads for two keys", edit(num_attention_heads=3, num_key_value_heads=2), "model"),
    model("a vocabulary of 10**11", edit(vocab_size=10**11), "numbers in one weight|vocab_size"),
    model("an inner size of 10**11", edit(intermediate_size=10**11), "numbers in one weight|intermediate_size"),
    model("a norm of text", edit(rms_norm_eps="tiny"), "config.json|model"),
    model("an activation that is no function", edit(hidden_act="__import__('os')"), "model"),
    model("a rope of text", edit(rope_parameters="yarn"), "config.json|model"),
    model("a rope of an unknown kind", edit(rope_parameters={"rope_type": "no-such", "rope_theta": 1e4}), "config.json|model"),
    model("a dtype of text", edit(dtype="float12"), "config.json|model"),
    model("a dtype of whole numbers", edit(dtype="int8"), "model.dtype|config.json"),
    model("an end of text that is text", edit(eos_token_id="</s>"), "config.json|eos_token_id"),
    model("an end of text in lists of lists", edit(eos_token_id=[[1]]), "config.json|eos_token_id"),
    model("an end of text below nothing", edit(eos_token_id=-5), "eos_token_id"),
    model("quantised weights", edit(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised"),
    model("code for the config", code_for("AutoConfig", model_type="evil"), "model"),
    model("code for the model", code_for("AutoModelForCausalLM", model_type="evil"), "model"),
    model("code for the tokenizer", code_for("AutoTokenizer", "tokenizer_config.json", tokenizer_class="Evil"), "model"),
    model("weights that are a pickle", pickled, "only pytorch_model.bin"),
    model("weights that are a pickle named by the config", pickled_by_name, "other.bin"),
    model("weights outside, named by the config", edit(transformers_weights="../outside.safetensors"), "outside.safetensors"),
    *(model(f"weights that are {kind}", become("model.safetensors", make), told) for kind, make, told in [
        ("a named pipe", os.mkfifo, "model.safetensors.*pipe"), ("a folder", Path.mkdir, "model.safetensors.*folder"),
        ("a link to /dev/zero", link_to("/dev/zero"), "model.safetensors.*device"),
        ("a link to /etc/passwd", link_to("/etc/passwd"), "not a whole safetensors file"),
        ("a link to nothing", link_to("/no/such"), "model.safetensors.*No such file"),
        ("a gigabyte of nothing", lambda path: sparse(path, 10**9), "not a whole safetensors file"),
    ]),
    model("weights of nothing", write("model.safetensors", b""), "not a whole safetensors file"),
    model("weights of four bytes", write("model.safetensors", b"\x08\0\0\0"), "not a whole safetensors file"),
    model("a header of 2**63 bytes", header({}, length=2**63), "not a whole safetensors file"),
    model("a header longer than the file", header({}, length=10_000), "not a whole safetensors file"),
    model("a header that is no JSON", write("model.safetensors", struct.pack("<Q", 4) + b"{{{{"), "not a whole safetensors file"),
    model("a header nested without end", write("model.safetensors", struct.pack("<Q", len(NEST)) + NEST.encode()),
          "not a whole safetensors file"),
    model("a header of no weights", header({}), "numbers in one weight|layers"),
    model("weights that overlap", header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "not a whole"),
    model("weights below nothing", header({"a": tensor([2], -8, 0)}, bytes(8)), "not a whole safetensors file"),
    model("a shape below nothing", header({"a": tensor([-2], 0, 8)}, bytes(8)), "not a whole safetensors file"),
    model("a shape of 2**62 by 2**62", header({"a": tensor([2**62, 2**62], 0, 8)}, bytes(8)), "not a whole safetensors file"),
    model("a shape beyond its bytes", header({"a": tensor([10**9], 0, 8)}, bytes(8)), "not a whole safetensors file"),
    model("a dtype that is none", header({"a": tensor([2], 0, 8, "F33")}, bytes(8)), "not a whole safetensors file"),
    model("weights of whole numbers", weights(as_integers), "model"),
    model("weights with NaN", poison(float("nan")), "up_proj.weight holds NaN or infinity"),
    model("weights with infinity", poison(float("inf")), "up_proj.weight holds NaN or infinity"),
    model("an index that leads outside", sharded({"lm_head.weight": "../outside.safetensors"}), "outside.safetensors"),
    model("an index with a whole path", sharded({"lm_head.weight": "/etc/passwd"}), "/etc/passwd"),
    model("an index of a pickle", sharded({"lm_head.weight": "evil.bin"}), "evil.bin"),
    model("an index of numbers", sharded({"lm_head.weight": 3}), "index.json"),
    model("an index of a shard that is missing", sharded({"lm_head.weight": "model-2.safetensors"}), "model-2.*missing"),
    model("an index of nothing", sharded({}), "model"),
    model("an index that is a list", lambda f: (sharded({})(f), write("model.safetensors.index.json", "[]")(f)), "index.json"),
    model("an adapter of another model", adapter, "an adapter of 'someone/else'"),
    model("an adapter that is a named pipe", become("adapter_config.json", os.mkfifo), "adapter_config.json.*pipe"),
    model("a tokenizer that is a named pipe", become("tokenizer.json", os.mkfifo), "tokenizer.json.*pipe"),
    model("a tokenizer that is no JSON", write("tokenizer.json", "{oops"), "tokenizer"),
    model("a tokenizer that is a list", write("tokenizer.json", "[]"), "tokenizer"),
    model("a tokenizer of nothing", write("tokenizer.json", ""), "tokenizer"),
    model("a tokenizer nested without end", write("tokenizer.json", NEST), "tokenizer"),
    model("a tokenizer of an unknown kind", edit("tokenizer.json", model={"type": "Evil", "vocab": {}}), "tokenizer"),
    model("a tokenizer without a vocabulary",
          edit("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), "tokenizer"),
    model("a tokenizer with an id beyond the model", gaps, "the tokenizer gives the id 1000000"),
    model("a tokenizer of two hundred thousand words", huge_vocabulary, "the tokenizer has 200\\d\\d\\d ids"),
    model("a tokenizer's settings that are no JSON", write("tokenizer_config.json", "{"), "tokenizer_config.json"),
    model("a tokenizer's settings that are a list", write("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    model("a tokenizer's settings nested without end", write("tokenizer_config.json", NEST), "tokenizer_config.json.*nested"),
    model("generation settings that are no JSON", write("generation_config.json", "{"), "generation_config.json"),
    model("generation settings that are a list", write("generation_config.json", "[3]"), "generation_config.json"),
    model("generation settings that are a named pipe", become("generation_config.json", os.mkfifo), "pipe"),
    model("generation settings that end with text", edit("generation_config.json", eos_token_id="x"), "eos_token_id"),
    *(model(f"a chat template that {kind}", write("chat_template.jinja", text), "chat template", *CHAT) for kind, text in [
        ("is no template", "{% for %}"), ("is cut short", "{{ messages"),
        ("leaves its sandbox", "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
                               "{{ cycler.__init__.__globals__['os'].system('touch was_run') }}"),
        ("never ends", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        ("counts to a billion", "{% for a in range(1000000000) %}{% endfor %}"),
        ("calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        ("refuses", "{{ raise_exception('no') }}"), ("divides by nothing", "{{ 1 / 0 }}"),
        ("reads a file", "{% include '/etc/passwd' %}"),
        ("asks for what is not there", "{{ messages[7].content.x }}"),
        ("makes a text of 10**15 letters", "{{ 'a' * 1000000000000000 }}"),
        ("raises to a power of a power", "{{ 9 ** 9 ** 9 ** 9 }}"),
    ]),
    model("a chat template that is a number", edit("tokenizer_config.json", chat_template=3), "chat template|tokenizer", *CHAT),
    model("a chat template that is a named pipe", become("chat_template.jinja", os.mkfifo), "chat_template.jinja.*pipe", *CHAT),
]  # fmt: skip


@cases(MODEL_FOLDERS)
def test_model_folders(case: Case, here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(checkpoint, here / "model")
    check(case, here, monkeypatch)
    assert not (here / "model" / "was_run").exists()


def test_the_model_that_those_cases_change_is_measured_as_it_is(here: Path, checkpoint: Path) -> None:
    """The control: without a change it is let pass."""
    told = harness("run", "--model", checkpoint, "--stages", "prompts")
    assert told.code == 0, told.err


# Runs, their names and their manifests


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two small stages; cases change a copy."""
    folder = tmp_path_factory.mktemp("finished")
    told = harness(
        "run", "--prompts", prompt_file(folder), "--paths.runs", folder / "runs", "--stages", "greedy,detect"
    )
    assert told.code == 0, told.err
    (run,) = (folder / "runs").iterdir()
    return run


def runs(name: str, told: str, *args: object, change: Change = lambda _: None, code: int = 2) -> Case:
    """A command on a folder of runs, after `change` has been at the one run in it. RUN and RUNS stand for their paths."""

    def hand(here: Path) -> list[object]:
        change(here / "runs" / "one")
        paths = {"RUN": here / "runs" / "one", "RUNS": here / "runs"}
        return [paths.get(str(a), a) for a in args]

    return Case(name, hand, code, told)


def no_runs(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def a_file_of_runs(folder: Path) -> None:
    no_runs(folder)
    folder.parent.write_text("")


def set_keys(**values: object) -> Change:
    """Set keys of the manifest, dots for what is nested."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        tree = json.loads(path.read_text())
        for name, value in values.items():
            tree[name] = value
        path.write_text(json.dumps(tree))

    return change


COMMANDS = ("show", "export", "report", "verify", "reproduce")


def told_to(command: str, run: object = "one") -> list[object]:
    more = {"export": ["--to", "out"], "report": ["--to", "out"], "verify": ["--batches", 0]}
    return [command, run, *more.get(command, [])]


NO_RUN = "expected a run|no run|expected a manifest|is no run"
RUNS = [
    *(runs(f"{command} of {name}", NO_RUN, *told_to(command, wanted)) for command in COMMANDS for name, wanted in [
        ("the folder above", "../.."), ("a whole path", "/etc"), ("nothing", ""), ("a slash", "/"),
        ("a path into a run", "one/logs"), ("a name that is not UTF-8", NOT_UTF8),
    ]),
    *(runs(f"{command} of the latest of no folder", "no run", *told_to(command, "latest"), change=no_runs)
      for command in COMMANDS),
    *(runs(f"{command} of the latest in a file", "no run|folder", *told_to(command, "latest"), change=a_file_of_runs)
      for command in COMMANDS),
    runs("show of a dot", NO_RUN, "show", "."), runs("show of two dots", NO_RUN, "show", ".."),
    runs("show of a star", NO_RUN, "show", "*"), runs("show of a space", NO_RUN, "show", " "),
    runs("show of a name of a hundred thousand letters", NO_RUN, "show", LONG),
    runs("show of a name with an escape", NO_RUN, "show", "\x1b[31mred"),
    runs("show of a way around", NO_RUN, "show", "one/../one"),
    runs("show of a whole path of a run", NO_RUN, "show", "RUN"),
    runs("going on with a way around", NO_RUN, "run", "--resume", "one/../one"),
    runs("a difference with a path", NO_RUN, "diff", "one", "../../etc"),
    runs("reproducing a file that is no manifest", "expected a manifest|JSON", "reproduce", "prompts.jsonl"),
    *(runs(f"show of a manifest that is {name}", "manifest", "show", "one", change=write("manifest.json", text))
      for name, text in [
        ("a list", "[]"), ("a text", '"run"'), ("null", "null"), ("not UTF-8", b'{"run_id": "\xff"}'),
        ("nested without end", NEST), ("a number of five thousand digits", "9" * 5_000),
        ("without a fingerprint", '{"run_id": "one"}'), ("compressed", gzip.compress(b"{}")),
    ]),
    runs("show of a manifest of a hundred megabytes of nothing", "manifest", "show", "one",
         change=become("manifest.json", lambda p: sparse(p, 10**8))),
    *(runs(f"reproducing settings with {name}", told, "reproduce", "one", change=set_keys(settings={key: {"value": value}}))
      for name, key, value, told in [
        ("a seed of text", "runtime.seed", "x", "runtime.seed"),
        ("a seed of forty digits", "runtime.seed", 10**40, "runtime.seed"),
        ("a million samples", "gravity.num_samples", 10**6, "num_samples"),
        ("a template that looks inside", "gravity.conditions", {"x": "{question.__class__}"}, "alone in braces"),
        ("prompts at /dev/zero", "data.prompts", "/dev/zero", "which this user did not give"),
        ("prompts that are a list", "data.prompts", ["a"], "data.prompts"),
        ("a model with a NUL", "model.name", "a\0b", "model.name"),
        ("an unknown name", "model.nam", "x", "model.nam"), ("no name", "", "x", "setting"),
    ]),
    *(runs(f"going on with a run whose {key} is {value!r}", told, "run", "--resume", "one", change=set_keys(**{key: value}))
      for key, value, told in [
        ("fingerprint", 3, "is damaged: fingerprint"), ("fingerprint", None, "is damaged: fingerprint"),
        ("fingerprint", ["a"], "is damaged: fingerprint"), ("fingerprint", {"a": 1}, "is damaged: fingerprint"),
    ]),
    runs("going on with hostile parts", "cannot be continued|damaged|manifest", "run", "--resume", "one",
         change=set_keys(fingerprint="0", fingerprint_parts=[1, 2], argv=3)),
]  # fmt: skip


def put_in_place(here: Path, run: Path) -> Path:
    return Path(shutil.copytree(run, here / "runs" / "one"))


@cases(RUNS)
def test_runs(case: Case, here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HARNESS_DATA__PROMPTS", "HARNESS_GRAVITY__STAGES"):  # they would be stronger than what is recorded
        monkeypatch.delenv(name)
    set_keys(run_id="one")(put_in_place(here, finished))
    check(case, here, monkeypatch)


KEYS = ("run_id", "created", "experiment", "parent", "status", "heartbeat", "reason", "argv", "settings", "code", "packages",
        "machine", "device", "threads", "numerics", "model", "planted", "prompts", "stages", "num_failed", "tables",
        "table_sha256", "sanity", "seconds", "resumed", "fingerprint_parts", "recorded_sizes", "warnings", "ended")  # fmt: skip
OF_ANOTHER_KIND: tuple[object, ...] = (3, "\x1b[31m[/x]", [[1]], {"": {"": None}}, None)


@pytest.mark.parametrize(
    ("command", "which"),
    # What reads all rows takes a second: of it the quick tests try one value a key, another one each key.
    [("runs", "all"), ("show", "all"), *((command, "one") for command in ("export", "diff", "verify")),
     *(pytest.param(command, "all", marks=pytest.mark.thorough) for command in ("export", "diff", "verify"))],
)  # fmt: skip
@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_a_manifest_that_is_of_another_kind_is_shown_or_refused_and_never_a_traceback(
    key: str, command: str, which: str, here: Path, finished: Path
) -> None:
    """No seal, as a run that was made elsewhere may have none."""
    first = KEYS.index(key) % len(OF_ANOTHER_KIND)
    values = OF_ANOTHER_KIND if which == "all" else OF_ANOTHER_KIND[first : first + 1]
    run = put_in_place(here, finished)
    (run / "seal.json").unlink()
    shutil.copytree(finished, here / "runs" / "two")
    args = {"runs": ["runs"], "diff": ["diff", "one", "two"]}.get(command, told_to(command))
    for value in values:
        set_keys(**{"run_id": "one", key: value})(run)
        told = harness(*args)
        assert "Traceback" not in told.err
        assert told.code in (0, 1, 2), told
        if told.code == 2:
            refused(told, 2, "")
