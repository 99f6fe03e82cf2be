"""The command line: arguments to settings, settings to one function, errors to one line and an exit code."""

import argparse
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.errors import (
    EnvironmentFault,
    HarnessError,
    ModelError,
    RunError,
    SettingsError,
    Stopped,
    machine_fault,
    nearest,
)
from harness.experiments import registry
from harness.settings import COMMANDS, Fields, PathSettings, Resolved
from harness.terminal import plain

if TYPE_CHECKING:
    from harness.run import Manifest  # `harness --help` answers before what a run is has been read

_LINE = 1_500
"""Characters of an error that are printed: it may quote what was handed in."""

# Modules that import torch are imported where they are used: `harness runs` should answer at once.


class _Parser(argparse.ArgumentParser):
    """Argparse with this project's manners: one line, exit 2, the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            known = [o for a in self._actions for o in a.option_strings]
            message = f"no such argument {flag}{nearest(flag.split('=')[0], known)}"
        raise SettingsError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    given = _joined(list(sys.argv[1:] if argv is None else argv))
    try:
        with _interruptible():
            code = _act(given)
    except HarnessError as e:
        _say(str(e))
        return e.exit_code
    except (_Interrupted, KeyboardInterrupt):
        _say("stopped; nothing is lost, type the same command again")
        return Stopped.exit_code
    except BrokenPipeError:  # `harness --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if (fault := machine_fault(e)) is None:
            raise
        _say(str(fault))
        return fault.exit_code
    return code


def _joined(given: Sequence[str]) -> list[str]:
    """`--lda.alphas -1,0,2` as `--lda.alphas=-1,0,2`: argparse takes a value that begins with a minus for a flag, unless it is
    one number and nothing else."""
    words: list[str] = []
    for word in given:
        before = words[-1] if words else ""
        if _NEGATIVE.match(word) and before.startswith("--") and "=" not in before and before not in _SWITCHES:
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


_NEGATIVE = re.compile(r"-\.?\d")


class _Interrupted(BaseException):
    """A signal asks for an end. Not KeyboardInterrupt: where a library that is being imported runs Python of its own, Python
    remembers that one, and at its exit kills the process that has long dealt with it."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Signals that ask for an end give one with exit 3, wherever they come. In a container this is process 1, which the
    kernel would let ignore a signal it does not handle."""

    def interrupt(*_: object) -> NoReturn:
        raise _Interrupted

    old = {}
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                old[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _act(given: list[str]) -> int:
    parser = _parser(given)
    args, rest = parser.parse_known_args(given)
    if rest:
        (args.parser if hasattr(args, "parser") else parser).error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(args, "act"):
        parser.print_help()
        return 0
    args.argv = ["harness", *given]
    code = args.act(args)
    return _unless_lost(code) if args.act in _PRINTERS else code


def _unless_lost(code: int) -> int:
    """The exit code of a command that is there to print: that of the machine where it could not. That nobody read on
    (`harness runs | head`) is no failure."""
    from harness import log

    lost = log.lost_output()
    if lost is None or isinstance(lost, BrokenPipeError) or code:
        return code
    _say(f"nothing more could be printed: {lost.strerror or lost}")
    return EnvironmentFault.exit_code


def _say(text: str) -> None:
    """One line on stderr, whatever is in the text, and whether or not there is a stderr."""
    line = plain(" ".join(text.split()))
    with suppress(OSError):
        print(f"harness: {line[:_LINE]}{'…' if len(line) > _LINE else ''}", file=sys.stderr)


def _parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for these arguments: what of them names an experiment decides which settings there are."""
    parser = _Parser(prog="harness", allow_abbrev=False)
    parser.description = "Reproducible, resumable interpretability experiments on language models."
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    asked = given[0] if given and not given[0].startswith("-") else ""

    def command(
        name: str,
        act: Callable[[argparse.Namespace], int],
        text: str,
        *,
        is_of_one: bool = False,
        is_again: bool = False,
        default: str | None = registry.DEFAULT,
    ) -> argparse.ArgumentParser:
        """`is_of_one`: the command is about one experiment, which its arguments may name, or else the `default`; `is_again`:
        about that of a run."""
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(act=act, parser=sub)
        sub.add_argument("--verbose", action="store_true", help="show debug lines")
        if is_of_one:
            told = f" (default: {default})" if default else ""
            told = f"which experiment: {', '.join(registry.names())}{told}"
            sub.add_argument("experiment", nargs="?", default=default, help=told)
        if name == asked:  # nobody sees the settings of the others
            named = _named(given, is_of_one, default)
            sub.set_defaults(settings_of=named, section=name if name in COMMANDS else None)
            _add_settings(sub, registry.fields(named, name if name in COMMANDS else None))
            if is_again and named is None:
                sub.add_argument(
                    "--stages", dest=f"set:{_STAGES}", metavar="VALUE", help="stages, in place of the run's"
                )
        return sub

    run = command("run", _run, "run an experiment, or go on with one that was stopped", is_of_one=True)
    run.add_argument(
        "--resume",
        default="auto",
        metavar="auto|new|RUN",
        help="auto (default): go on with the unfinished run of the same settings; new: start one; or a run to go on with",
    )
    run.add_argument("--retry-failed", action="store_true", help="try again just the items that failed")
    run.add_argument("--dry-run", action="store_true", help="say what a new run would take, stage by stage, and stop")
    fetch = command("fetch", _fetch, "download a real model into the cache, once; then --model NAME needs no network")
    fetch.add_argument("name", nargs="?", help="which model; see --list")
    fetch.add_argument("--list", action="store_true", help="what can be fetched: name, what it is, licence, sizes")
    command("runs", _runs, "list the runs")
    show = command("show", _show, "one run: manifest, progress, warnings, headline results")
    show.add_argument("run", help="a run_id, a unique prefix of one, or latest")
    browse = command("browse", _browse, "look at a run on the terminal, while it goes on too")
    browse.add_argument("run", help="a run_id, a unique prefix of one, latest, or a run's folder")
    export = command("export", _export, "write every table of a run")
    export.add_argument("run", help="a run_id, a unique prefix of one, or latest")
    export.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write to")
    export.add_argument("--format", choices=("parquet", "csv", "jsonl"), default="parquet")
    export.add_argument(
        "--safe",
        action="store_true",
        help="with csv: an apostrophe before text that a spreadsheet would take for a formula",
    )
    verify = command(
        "verify",
        _verify,
        "whether a run is still what it was, and gives the same numbers again; exit 1 where not",
        is_again=True,
    )
    verify.add_argument("run", help="a run_id, a unique prefix of one, or latest")
    verify.add_argument(
        "--batches", type=int, default=1, metavar="N", help="batches of each stage to measure again (default 1)"
    )
    verify.add_argument("--sample", type=int, metavar="SEED", help="which batches (default: other ones each time)")
    reproduce = command(
        "reproduce",
        _reproduce,
        "a new run from a run's manifest, in the same batches; then how the results compare",
        is_again=True,
    )
    reproduce.add_argument("run", help="a run_id, a unique prefix of one, latest, or the file of a manifest")
    reproduce.add_argument(
        "--anyway", action="store_true", help="go on where model, data or code differ, and record it"
    )
    diff = command("diff", _diff, "how two runs differ: manifests first, then results")
    diff.add_argument("run_a", help="a run_id, a unique prefix of one, or latest")
    diff.add_argument("run_b", help="the other run")
    diff.add_argument("--exit-code", action="store_true", help="exit 1 where a measured value differs")
    report = command("report", _report, "one self-contained HTML page of a run, and its figures as PNG and SVG")
    report.add_argument("run", help="a run_id, a unique prefix of one, or latest")
    report.add_argument("--to", type=Path, metavar="DIR", help="folder to write to (default: the run's own, report/)")
    command("doctor", _doctor, "check this machine: GPU, memory, disk, folders, model, a tiny forward", is_of_one=True)
    command(
        "serve",
        _serve,
        "an experiment's service over HTTP, for as long as it is not stopped",
        is_of_one=True,
        default=None,
    )
    app = command("app", _app, "the review app, in the browser")
    app.add_argument("--port", type=int, default=8501, help="port (default 8501)")
    app.add_argument("--address", help="address to listen on (default: this machine only; in the image all)")
    sanity = command(
        "sanity",
        _sanity,
        "every measurement of the fast path against a plain reference; exit 1 on disagreement",
        is_of_one=True,
    )
    sanity.add_argument(
        "--num-prompts", type=int, default=4, metavar="N", help="subjects to compare, such as prompts (default 4)"
    )
    sanity.add_argument(
        "--full", action="store_true", help="everything, however long it takes (default: what fits in a minute)"
    )
    bench = command(
        "bench", _bench, "fast path against naive path and other libraries, same items, one process", is_of_one=True
    )
    bench.add_argument("--stage", metavar="CASE", action="append", help="what to time (default: all)")
    bench.add_argument(
        "--shape", help="a model shape with random weights, in place of --model (with neither: llama-40m)"
    )
    bench.add_argument("--contexts", type=int, default=32, metavar="N", help="contexts to time (default 32)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    bench.add_argument(
        "--tokens", action="store_true", help="instead: what a whole experiment forwards, against the least possible"
    )
    return parser


_SWITCHES = (
    "--verbose",
    "--retry-failed",
    "--dry-run",
    "--list",
    "--safe",
    "--anyway",
    "--exit-code",
    "--full",
    "--tokens",
    "--help",
    "-h",
)
"""Flags without a value: the word behind any other one belongs to it."""


def _named(given: Sequence[str], is_of_one: bool, default: str | None = registry.DEFAULT) -> str | None:
    """The experiment whose settings the arguments may hold: the one that is named; else of a command about one its default,
    and of another that of the flags (such as `--toy.unit`), None where no flag is an experiment's."""
    known = registry.names()
    words, is_value = [], False
    for word in given[1:]:
        if not is_value and not word.startswith("-"):
            words.append(word)
        is_value = not is_value and word.startswith("--") and "=" not in word and word not in _SWITCHES
    if is_of_one:
        return next((w for w in words if w in known), words[0] if words else default)
    sections = (registry.current(w.removeprefix("--").partition(".")[0]) for w in given if w.startswith("--"))
    return next((s for s in sections if s in known), None)


def _add_settings(parser: argparse.ArgumentParser, fields: Fields) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings file")
    group = parser.add_argument_group(
        "settings", "each is also a variable HARNESS_<SECTION>__<FIELD> and a key of the settings file"
    )
    short = {name: flag for flag, name in fields.short_flags.items()}
    for name in fields.names:
        flags = [f"--{short[name]}"] if name in short else []
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if fields.is_switch(name) else {}
        told = fields.describe(name).replace("%", "%%")
        group.add_argument(*flags, f"--{name}", dest=f"set:{name}", metavar="VALUE", help=told, **alone)
    for old, section in fields.former.items():
        for rest in (n.removeprefix(f"{section}.") for n in fields.names if n.startswith(f"{section}.")):
            group.add_argument(f"--{old}.{rest}", dest=f"set:{old}.{rest}", help=argparse.SUPPRESS)


_STAGES = "stages"
"""The setting `--stages` before it is known whose stages they are."""


def _flags(args: argparse.Namespace, experiment: str | None) -> dict[str, str]:
    """Settings given as flags, for a command about this experiment, or none."""
    found = {k.removeprefix("set:"): v for k, v in vars(args).items() if k.startswith("set:") and v is not None}
    if (stages := found.pop(_STAGES, None)) is not None and experiment is not None:
        found[f"{experiment}.{_STAGES}"] = stages
    return found


def _resolved(args: argparse.Namespace) -> Resolved:
    resolved = registry.resolve(
        _flags(args, args.settings_of), args.config, experiment=args.settings_of, command=args.section
    )
    if resolved.settings.paths.hf_home is not None:  # read by huggingface_hub when it is first imported
        os.environ["HF_HOME"] = str(resolved.settings.paths.hf_home)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # cuBLAS gives the same bits again only so (docs.nvidia.com/cuda/cublas, "Results reproducibility"); read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from harness import log

    log.to_console(args.verbose)
    _say_notes(resolved)
    return resolved


def _say_notes(resolved: Resolved) -> None:
    from loguru import logger

    for line in resolved.notes:
        logger.info("{}", line)


def _run(args: argparse.Namespace) -> int:
    resolved = _resolved(args)
    experiment = registry.get(args.experiment)
    from harness.commands import asked, show

    told = asked.hash_of(resolved, experiment)  # first: of files that change while they are read, the older state
    if told is not None and args.resume == "auto" and not args.retry_failed and not args.dry_run:
        found = asked.finished_run(resolved.settings.paths.runs, told)
        if found is not None:
            return show.print_finished(experiment, found)
    from harness.commands import launch

    plan = launch.prepare(resolved, experiment)
    if args.dry_run:
        return launch.say_estimate(plan, resolved.settings)
    return launch.start(plan, resolved, args.resume, args.retry_failed, args.argv, asked_sha256=told).code


def _fetch(args: argparse.Namespace) -> int:
    paths = _resolved(args).settings.paths
    from harness import log
    from harness.models.fetch import FETCHABLE, fetch, listing

    if args.list:
        log.print_out(listing())
        return 0
    if args.name is None:
        raise ModelError(f"expected the name of a model to fetch ({', '.join(FETCHABLE)}); see `harness fetch --list`")
    log.print_out(str(fetch(args.name, paths.cache_folder)))
    log.print_out(f"Next: harness run --model {args.name} --limit 20")
    return 0


def _runs(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import show

    show.print_runs(root)
    return 0


def _show(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import show

    show.print_run(root, args.run)
    return 0


def _browse(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import browse

    return browse.command(root, args.run)


def _export(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import export

    export.export(root, args.run, args.to, args.format, is_safe=args.safe)
    return 0


def _again(args: argparse.Namespace, manifest: "Manifest") -> Resolved:
    """The settings that a recorded run had, under those that this command gives."""
    from harness.commands.recognise import experiment_of
    from harness.commands.replay import settings_of

    recorded = settings_of(manifest, PathSettings().state_folder)
    experiment, by = experiment_of(manifest).name, f"run {manifest.run_id}"
    flags = _flags(args, experiment)
    resolved = registry.resolve(flags, args.config, recorded=recorded, recorded_by=by, experiment=experiment)
    _say_notes(resolved)
    return resolved


def _verify(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    if args.batches < 0:
        raise RunError(f"--batches: expected 0 or more, found {args.batches}")
    from harness.commands import verify

    seed = secrets.randbelow(10_000) if args.sample is None else args.sample
    return verify.command(root, args.run, partial(_again, args), args.batches, seed)


def _reproduce(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import reproduce

    manifest, original = reproduce.find(root, args.run)
    return reproduce.command(manifest, original, _again(args, manifest), accept=args.anyway, argv=args.argv)


def _diff(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness.commands import diff
    from harness.run import find_run

    return diff.command(find_run(root, args.run_a), find_run(root, args.run_b), ends_in_1=args.exit_code)


def _report(args: argparse.Namespace) -> int:
    root = _resolved(args).settings.paths.runs
    from harness import log
    from harness.commands import report
    from harness.run import find_run

    log.print_out(f"report written to {report.write(find_run(root, args.run), args.to)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    resolved = _resolved(args)
    from harness.commands import doctor, findings

    shown = findings.print_checks(doctor.examine(resolved, registry.get(args.experiment)))
    return 0 if all(c.verdict == "ok" for c in shown) else EnvironmentFault.exit_code


def _serve(args: argparse.Namespace) -> int:
    if args.experiment is None:
        raise SettingsError(
            f"expected the name of an experiment to serve ({', '.join(registry.served()) or 'none can be'}): harness serve NAME"
        )
    experiment = registry.get(args.experiment)
    from harness.experiments.experiment import Served

    if not isinstance(experiment, Served):
        raise SettingsError(
            f"experiment {args.experiment} cannot be served; these can: {', '.join(registry.served()) or 'none'}"
        )
    resolved = _resolved(args)
    from harness.commands import serve

    serve.leave(serve.command(resolved, experiment, args.experiment, args.argv))


def _app(args: argparse.Namespace) -> int:
    settings = _resolved(args).settings
    root = Path(__file__).resolve().parent.parent
    found = next((f for f in (root / "app", settings.paths.data_folder.parent / "app") if f.is_dir()), None)
    if found is None:
        raise EnvironmentFault("the app's files are not beside this installation; run it from a clone, or in the image")
    os.environ["OUTPUT_ROOT"] = str(settings.paths.runs)
    command = [sys.executable, "-m", "streamlit", "run", str(found), "--server.port", str(args.port)]
    command += ["--server.headless", "true", "--browser.gatherUsageStats", "false", "--client.toolbarMode", "minimal"]
    if args.address:
        command += ["--server.address", args.address]
    else:
        os.environ.setdefault("STREAMLIT_SERVER_ADDRESS", "127.0.0.1")  # the image says otherwise
    os.execv(sys.executable, command)


def _sanity(args: argparse.Namespace) -> int:
    resolved = _resolved(args)
    if args.num_prompts < 1:
        raise RunError(f"--num-prompts: expected at least 1, found {args.num_prompts}")
    from harness.commands import sanity

    return sanity.command(resolved, registry.get(args.experiment), args.num_prompts, is_full=args.full)


_PRINTERS = (_fetch, _runs, _show, _diff)


def _bench(args: argparse.Namespace) -> int:
    resolved = _resolved(args)
    if args.contexts < 1:
        raise RunError(f"--contexts: expected at least 1, found {args.contexts}")
    from harness.commands import bench

    return bench.command(
        resolved,
        registry.get(args.experiment),
        args.shape,
        ("tokens",) if args.tokens else tuple(args.stage or ()),
        args.contexts,
        args.json,
    )
