"""What this installation and machine are, for the manifest and the doctor. Reads no secrets: no environment is dumped."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from email.parser import HeaderParser
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from threadpoolctl import threadpool_info

ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = Path(__file__).resolve().parent
_LABELS = ("revision", "version", "created", "source")
_DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME")


def code(outside: Path | None = None) -> dict[str, Any]:
    """Version, git commit and dirty flag of the code that runs; the image's label where there is no repository.

    `source_sha256` is of the package's own files: equal where the same code runs, cloned, installed or in an image.
    `outside`: the folder of an installed experiment, whose files count with them.
    """
    commit = _git("rev-parse", "HEAD")
    diff = tree_diff()
    return {
        "version": importlib.metadata.version("harness") if _installed("harness") else "not installed",
        "git_commit": commit or os.environ.get("HARNESS_IMAGE_REVISION"),
        "git_dirty": bool(diff) if commit else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        "source_sha256": source_sha256(*([outside] if outside else [])),
    }


def source_sha256(*outside: Path) -> str:
    """One hash of every source file of the package, and of the packages outside of it, by its place in each."""
    told = []
    for package in (_PACKAGE, *outside):
        files = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".j2", ".css"))
        told += [f"{p.relative_to(package).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files]
    return hashlib.sha256("".join(told).encode()).hexdigest()


@lru_cache(maxsize=1)
def tree_diff() -> bytes:
    """The uncommitted changes of the code as a patch, new files of the packages among them; or nothing. Asked once.

    Byte for byte as git gives it, whatever a person's own git settings are: `git apply` takes it again.
    """
    new = _git_bytes("ls-files", "-z", "--others", "--exclude-standard", "--", "harness", "app").split(b"\0")
    changes = [_git_bytes(*_DIFF, "HEAD")]
    changes += [
        _git_bytes(*_DIFF, "--no-index", "--", "/dev/null", os.fsdecode(name), allowed=(0, 1)) for name in new if name
    ]
    return b"".join(changes)


def packages() -> dict[str, str]:
    """Name and version of every installed distribution."""
    told = (_name_and_version(d) for d in importlib.metadata.distributions())
    return dict(sorted((pair for pair in told if pair[0]), key=lambda pair: pair[0].lower()))


def _name_and_version(installed: importlib.metadata.Distribution) -> tuple[str, str]:
    """From the head of its metadata alone: parsing the long descriptions below takes half a second for 130 packages."""
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    head = HeaderParser().parsestr(text.partition("\n\n")[0])
    return head["Name"] or "", head["Version"] or ""


def lock_sha256(data_folder: Path) -> str | None:
    """Hash of requirements.lock, which stands beside the code, or beside the data folder where the code is installed."""
    for lock in (ROOT / "requirements.lock", data_folder.parent / "requirements.lock"):
        if lock.exists():
            return hashlib.sha256(lock.read_bytes()).hexdigest()
    return None


def machine() -> dict[str, Any]:
    """OS, processor, memory, GPUs, drivers and torch's build."""
    import torch  # here: what is installed is asked for where torch is not needed

    return {
        "hostname": platform.node(),
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(),
        "cpu_cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "gpus": [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
        "container": _container(),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ} or None,
    }


def accelerators() -> tuple[list[str], str | None]:
    """The GPUs' device files, and which of them a process may see: known without torch."""
    return sorted(map(str, Path("/dev").glob("nvidia*"))), os.environ.get("CUDA_VISIBLE_DEVICES")


def _blas() -> list[str]:
    """Which kernels NumPy's linear algebra chose for this CPU: they decide the last bits of a fit."""
    found = (lib for lib in threadpool_info() if lib["user_api"] == "blas")
    return sorted({f"{lib['internal_api']} {lib.get('architecture')}, {lib['num_threads']} threads" for lib in found})


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _driver() -> str | None:
    return next(iter(_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()), None)


def _container() -> dict[str, Any] | None:
    """The image's labels, and its digest and SBOM where `docker run` handed them in: an image cannot know its own."""
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    labels = {name: os.environ.get(f"HARNESS_IMAGE_{name.upper()}") for name in _LABELS}
    digest = os.environ.get("HARNESS_IMAGE_DIGEST")
    if not (inside or digest):
        return None
    return {
        "image_digest": digest or "unknown",
        "sbom_sha256": os.environ.get("HARNESS_IMAGE_SBOM_SHA256"),
        "labels": {name: value for name, value in labels.items() if value},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git(*args: str, allowed: tuple[int, ...] = (0,)) -> str | None:
    """Output of git in the code's own repository; None where the code is in none, or git gives another exit code."""
    return _git_bytes(*args, allowed=allowed).decode(errors="replace").strip("\n") or None


def _git_bytes(*args: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    return _run_bytes("git", "-C", str(ROOT), *args, allowed=allowed) if (ROOT / ".git").exists() else b""


def _run(*command: str) -> str:
    return _run_bytes(*command).decode(errors="replace").strip("\n")


def _run_bytes(*command: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    try:
        ended = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return b""
    return ended.stdout if ended.returncode in allowed else b""
