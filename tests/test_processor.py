"""What a process may use of the CPU, from files as the kernel writes them, and what the doctor makes of measured speeds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.commands.doctor import told_of_half, told_of_threads
from harness.models import processor
from harness.models.processor import Cores, cores, gflops, half_instructions


def machine(folder: Path, siblings: list[str], own: str = "0::/\n", **files: str) -> dict[str, Path]:
    """A /sys and a /proc with these hyperthreads and control groups (path -> text)."""
    for n, told in enumerate(siblings):
        (folder / f"cpus/cpu{n}/topology").mkdir(parents=True)
        (folder / f"cpus/cpu{n}/topology/thread_siblings_list").write_text(told + "\n")
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / "groups" / name.replace("__", "/").replace("_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return {"cpus": folder / "cpus", "cgroups": folder / "groups", "own": folder / "own"}


def test_two_hyperthreads_are_one_core_and_only_those_this_process_may_use_count(tmp_path: Path) -> None:
    files = machine(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert cores([0, 1, 2, 3], **files) == Cores(2, None)
    assert cores([1, 3], **files) == Cores(1, None)
    assert cores([0, 7], **files) == Cores(2, None)  # a CPU of which the kernel says nothing is a core of its own


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu_max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu_max": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a__cpu_max": "150000 100000", "a__b__cpu_max": "max 100000"}, 1.5),  # the tightest above it
        ("0::/a/b\n", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "50000 100000"}, 0.5),
        ("0::/../x\n", {"cpu_max": "100000 100000"}, 1.0),
    ],
)
def test_the_limit_of_control_groups_is_the_tightest_on_the_way_up(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    assert cores([0, 1], **machine(tmp_path, ["0", "1"], own, **files)).quota == quota


def test_control_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    files = machine(tmp_path, ["0", "1", "2", "3"], "3:cpu,cpuacct:/job\n2:memory:/else\n0::/\n")
    for name, quota in (("cpu", "-1"), ("cpu/job", "250000")):
        (tmp_path / "groups" / name).mkdir(parents=True)
        (tmp_path / "groups" / name / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "groups" / name / "cpu.cfs_period_us").write_text("100000\n")
    found = cores(range(4), **files)
    assert found == Cores(4, 2.5)
    assert found.usable == 2


@pytest.mark.parametrize(
    ("found", "usable"), [(Cores(4, None), 4), (Cores(4, 8.0), 4), (Cores(4, 2.9), 2), (Cores(4, 0.3), 1)]
)
def test_usable_threads_are_whole_cores_and_at_least_one(found: Cores, usable: int) -> None:
    assert found.usable == usable


def test_this_process_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores().usable >= 1
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: {0})
    assert cores().allowed == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", ["AVX512-BF16", "AMX"]),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", []),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", ["BF16"]),
        ("", []),
    ],
)
def test_instructions_for_bfloat16_are_read_from_what_the_cpu_says(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert half_instructions(tmp_path / "cpuinfo") == names
    assert half_instructions(tmp_path / "none") == []


def test_speed_is_operations_by_the_best_of_three_products() -> None:
    def clock(times: list[float]) -> Iterator[float]:
        yield from times

    now = clock([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])  # 4, 2 and 8 seconds
    # 8³ multiplications and as many additions in 2 seconds.
    assert gflops(torch.bfloat16, lambda: next(now), side=8) == pytest.approx(2 * 8**3 / 2 / 1e9)
    assert gflops(torch.float32, side=8, where=torch.device("cpu")) > 0


def test_the_doctor_says_how_many_threads_there_should_be() -> None:
    fine = told_of_threads(4, Cores(4, None))
    assert fine == "torch computes with 4; this process may use 4 cores"
    few = told_of_threads(1, Cores(4, None))
    assert "`--runtime.threads 4`" in few
    assert "idle" in few
    many = told_of_threads(16, Cores(16, 2.0))
    assert "`--runtime.threads 2`" in many
    assert "wait" in many
    assert "allows the time of 2" in many


def test_the_doctor_recommends_the_dtype_that_was_measured_to_be_faster() -> None:
    told = told_of_half(120.0, 360.0, ["AVX512-BF16"], "auto")
    assert "float32 120 GFLOP/s, bfloat16 360 (the CPU has AVX512-BF16)" in told
    assert "`--model.dtype bfloat16` multiplies 3.0 times as fast" in told
    assert "certificate" in told
    assert "--model" not in told_of_half(120.0, 360.0, ["AMX"], "bfloat16")  # it is asked for already
    assert "--model" not in told_of_half(120.0, 150.0, ["AMX"], "auto")  # 1.25 times: not worth it
    slow = told_of_half(120.0, 6.0, [], "auto")
    assert "`--model.dtype float32` multiplies 20.0 times as fast" in slow
    assert "names no instructions" in slow
    assert "--model" not in told_of_half(120.0, 6.0, [], "float32")
