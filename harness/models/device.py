"""Which device a run computes on, how much of its memory there is, and torch's process-wide switches."""

import gc

import torch

from harness.errors import EnvironmentFault


def resolve_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises EnvironmentFault when CUDA was asked for and is not there: never a silent CPU run."""
    if wanted == "cuda" and not torch.cuda.is_available():
        why, hint = (
            ("this torch is built without CUDA", "take the GPU image, or a CUDA build of torch")
            if torch.version.cuda is None
            else ("torch sees no GPU", "in a container add `--gpus all`; check `nvidia-smi`")
        )
        raise EnvironmentFault(f"runtime.device=cuda: {why}; {hint}; or take --runtime.device cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def is_gpu_unused(device: str) -> bool:
    """Whether this torch was built for GPUs and computes on the CPU all the same."""
    return device == "cpu" and torch.version.cuda is not None


def set_threads(threads: int | None) -> int:
    """Sets torch's CPU threads where asked; the number in use."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def be_exact() -> dict[str, object]:
    """Full float32 products (no TF32), so that a batch and a single row agree; what was set, for the manifest."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return {
        "matmul_tf32": False,
        "cudnn_tf32": False,
        "cudnn_benchmark": False,
        "sdpa_kernels": [name for name, is_on in kernels.items() if is_on],
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


class CudaMemory:
    """The memory of the current GPU, `reserve_bytes` of it left to others."""

    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError)

    def __init__(self, reserve_bytes: int):
        self._reserve_bytes = reserve_bytes

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        torch.cuda.synchronize()
        # Allocated, not reserved: what the allocator keeps from an earlier batch would hide what this one needed.
        return torch.cuda.max_memory_allocated()

    def capacity_bytes(self) -> int | None:
        """What is free now and what this process already holds, less the reserve."""
        free, _total = torch.cuda.mem_get_info()
        return max(0, free + torch.cuda.memory_reserved() - self._reserve_bytes)

    def work_s(self, wall_s: float, cpu_s: float) -> float:
        """What passed: the work is done elsewhere than in this process."""
        return wall_s
