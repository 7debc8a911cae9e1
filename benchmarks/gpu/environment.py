"""Step a: what the machine is, whether everything imports, and the ceilings that the other steps are held against."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measuring import attempt, occupy, sorted_times
from benchmarks.gpu.results import Figures, Results
from benchmarks.gpu.settings import Settings
from hf_kvcache.kernels.dispatch import OPERATIONS, backends, reason_missing
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.utils.environment import package_version, versions

MACHINE, CEILINGS, COSTS = "machine", "ceilings", "costs"


def run(settings: Settings, results: Results) -> None:
    results.add(MACHINE, **machine(settings))
    if not settings.cuda:
        print("no CUDA: a dry run")
        return
    attempt(settings, results, CEILINGS, lambda: results.add(CEILINGS, **ceilings(settings)))
    attempt(settings, results, COSTS, lambda: results.add(COSTS, **costs(settings)))
    for size in (1 << 10, 24 << 10, 60 << 10, 72 << 10, 192 << 10, 1 << 20):
        case = f"upload of {size >> 10} KiB while the GPU is busy for 20 ms"
        attempt(settings, results, case, lambda: results.add(case, **upload(settings, size)))  # noqa: B023


def machine(settings: Settings) -> Figures:
    """Card, driver and versions: what a figure is worth nothing without."""
    found: Figures = {"card": "none (a dry run)", "date": time.strftime("%Y-%m-%d")}
    if settings.cuda:
        properties = torch.cuda.get_device_properties(settings.device)
        found |= {
            "card": properties.name,
            "driver": asked_driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    found |= versions() | {"triton": package_version("triton"), "python": platform.python_version()}
    kinds = {backend: reason_missing(backend, settings.device.type) or "there" for backend in OPERATIONS}
    return found | {f"{backend}_kernels": why for backend, why in kinds.items()} | backends(settings.device)


def asked_driver() -> str | None:
    """The version of the driver, clocks and limits as nvidia-smi gives them; None where it is not to be had."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


def ceilings(settings: Settings) -> Figures:
    """Copy and read bandwidth on random data, and the rate of a product of bfloat16 matrices."""
    size = 2**20 if settings.tiny else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=settings.device)
    target, integers = torch.empty_like(source), source.view(torch.int32)
    copy = 2 * size / sorted_times(lambda: target.copy_(source), 12)[5] / 1e3
    read = size / sorted_times(lambda: integers.sum(dtype=torch.int64), 12)[5] / 1e3
    width = 256 if settings.tiny else 8192
    a, b = (torch.randn(width, width, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * width**3 / sorted_times(lambda: a @ b, 10)[4] / 1e6
    return {"copy_gb_per_s": copy, "read_gb_per_s": read, "bf16_tflops": flops}


def costs(settings: Settings) -> Figures:
    """Microseconds of the CPU for a small torch operation, for a rotation by Triton, and for an upload."""
    x = torch.zeros(64, device=settings.device)
    fmt, y = SideFormat(128, 4, rotation="hadamard"), torch.randn(32, 128, device=settings.device)
    array = np.zeros(3 * 8 * 256, np.int64)

    def mean_us(action: Callable[[], Any], times: int) -> float:
        for _ in range(20):
            action()
        settings.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            action()
        spent = (time.perf_counter() - begin) / times * 1e6
        settings.synchronize()
        return spent

    return {
        "torch_add_us": mean_us(lambda: x.add_(1), 2000),
        "rotate_us": mean_us(lambda: rotate(y, fmt), 2000),
        "upload_48_kib_us": mean_us(lambda: torch.from_numpy(array).to(settings.device, non_blocking=True), 500),
    }


def upload(settings: Settings, size: int) -> Figures:
    """Microseconds until an upload returns while the GPU has other work: does it wait?"""
    array, pinned = np.zeros(size, np.uint8), torch.empty(size, dtype=torch.uint8).pin_memory()
    ways: dict[str, Callable[[], Any]] = {
        "pageable, non_blocking": lambda: torch.from_numpy(array).to(settings.device, non_blocking=True),
        "pageable": lambda: torch.from_numpy(array).to(settings.device),
        "pinned, non_blocking": lambda: pinned.to(settings.device, non_blocking=True),
    }
    found = {}
    for name, action in ways.items():
        action()
        torch.cuda.synchronize()
        occupy(20)
        begin = time.perf_counter()
        action()
        found[f"{name} us"] = (time.perf_counter() - begin) * 1e6
        torch.cuda.synchronize()
    return found
