"""What this installation and machine are, for the manifest and the doctor. Reads no secrets: no environment is dumped."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME")


def code() -> dict[str, Any]:
    """Version, git commit and dirty flag of the code that runs; the image's labels where there is no repository."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": importlib.metadata.version("harness") if _installed("harness") else "not installed",
        "git_commit": commit or os.environ.get("HARNESS_IMAGE_REVISION"),
        "git_dirty": bool(status) if commit else None,
    }


def tree_diff() -> str:
    """The uncommitted changes of the code, or nothing."""
    return _git("diff", "HEAD") or ""


def packages() -> dict[str, str]:
    """Name and version of every installed distribution."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def lock_sha256(data_folder: Path) -> str | None:
    """Hash of requirements.lock, which stands beside the code, or beside the data folder where the code is installed."""
    for lock in (ROOT / "requirements.lock", data_folder.parent / "requirements.lock"):
        if lock.exists():
            return hashlib.sha256(lock.read_bytes()).hexdigest()
    return None


def machine() -> dict[str, Any]:
    """OS, processor, memory, GPUs, drivers and torch's build."""
    return {
        "hostname": platform.node(),
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "container": _container(),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ} or None,
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}"}  # fmt: skip


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    return next(iter(_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()), None)


def _container() -> dict[str, str] | None:
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    digest = os.environ.get("HARNESS_IMAGE_DIGEST")
    return {"image_digest": digest or "unknown"} if inside or digest else None


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


def _git(*args: str) -> str | None:
    """Output of git in the code's own repository; None where the code is in none."""
    if not (ROOT / ".git").exists():
        return None
    return _run("git", "-C", str(ROOT), *args) or None


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
