"""What this process may use of the CPU, and how fast torch multiplies matrices with it, or on a GPU.

Measures and reads; decides nothing. Texts for a person are `harness doctor`'s.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

_SIDE = 1024
"""A product of two square matrices of this side is 2.1 GFLOP: about as large as one layer's for a batch, and 20 ms long."""
_GPU_SIDE = 8192
"""1.1 TFLOP: some milliseconds on a GPU, for which a smaller product is over before it has begun."""
_REPEATS = 3
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_HALF_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}  # the last one is Arm's


class Cores(NamedTuple):
    """Physical cores this process may run on, and of how many cores' time a control group lets it have; None: all."""

    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can compute at once without waiting for each other."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


def cores(
    affinity: Iterable[int] | None = None, cpus: Path = _CPUS, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> Cores:
    """The cores of this process; the arguments are for tests. Two hyperthreads are one core: they share its multipliers."""
    if affinity is None:
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_read(cpus / f"cpu{n}" / "topology" / "thread_siblings_list") or str(n) for n in affinity}
    return Cores(len(siblings), _quota(cgroups, own))


def half_instructions(cpuinfo: Path = _CPUINFO) -> list[str]:
    """Names of the instructions for bfloat16 that the CPU has; none where it does not say."""
    flags = set(
        re.findall(r"\w+", next(iter(re.findall(r"^(?:flags|Features)\s*:(.*)$", _read(cpuinfo), re.MULTILINE)), ""))
    )
    return [name for flag, name in _HALF_FLAGS.items() if flag in flags]


def gflops(
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
    side: int | None = None,
    where: str | torch.device = "cpu",
) -> float:
    """10⁹ operations a second in a matrix product there, on a CPU with the threads that torch has now; the best of three."""
    device = torch.device(where)
    side = side or (_SIDE if device.type == "cpu" else _GPU_SIDE)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    torch.mm(one, other)  # the first product chooses its kernel and may pack its weights
    best = float("inf")
    for _ in range(_REPEATS):
        settle(device)
        start = clock()
        torch.mm(one, other)
        settle(device)
        best = min(best, clock() - start)
    return 2 * side**3 / best / 1e9


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quota(cgroups: Path, own: Path) -> float | None:
    """The tightest of the limits on this process's control group and on those above it; versions 2 and 1."""
    paths = [line.split(":", 2) for line in _read(own).splitlines() if line.count(":") >= 2]
    limits = []
    for _, controllers, path in paths:
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        top = cgroups if not controllers else cgroups / "cpu"
        group = top / path.lstrip("/")
        inside = [group, *group.parents]
        limits += map(_limit, inside[: inside.index(top) + 1])
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
