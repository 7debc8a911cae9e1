"""Clocks of a GPU, kernels of a step by the profiler, and errors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.results import Figures, Results
from benchmarks.gpu.settings import Settings

#: Clock cycles of a millisecond, about, for kernels that only wait.
_CYCLES_PER_MS = 1.7e6
#: What the message of an exception contains after which a process can do nothing more on its GPU.
_FATAL = ("illegal memory access", "misaligned address", "illegal instruction", "device-side", "launch failure")
#: Exit status of a process that left because of such an exception.
LOST = 3


@dataclass
class Timed:
    """Microseconds of a step.

    Attributes:
        eager: a step in a row of steps, with the gaps between launches, as eager code runs it.
        cpu: what the CPU needs to enqueue a step.
        gpu: what the GPU needs for a step if all steps lie in its queue already.
        waits: whether the CPU had to wait for the GPU while it enqueued them.
    """

    eager: float
    cpu: float
    gpu: float
    waits: bool

    def figures(self) -> Figures:
        return {"eager_us": self.eager, "cpu_us": self.cpu, "gpu_us": self.gpu, "cpu_waits": self.waits}


def time_steps(settings: Settings, step: Callable[[int], Any], steps: int) -> Timed:
    """Time ``step(number)``, which is called ``2 * steps`` times with numbers going on."""
    if not settings.cuda:
        begin = time.perf_counter()
        for number in range(2 * steps):
            step(number)
        each = (time.perf_counter() - begin) / (2 * steps) * 1e6
        return Timed(each, each, each, False)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for number in range(steps):
        step(number)
    after.record()
    after.synchronize()
    eager = before.elapsed_time(after) / steps * 1e3
    # While a kernel only waits, the CPU enqueues all steps, which then run without gaps.
    occupy(min(400.0, max(2.0, 3.0 * eager * steps / 1e3)))
    occupied = torch.cuda.Event()
    occupied.record()
    before.record()
    begin = time.perf_counter()
    for number in range(steps, 2 * steps):
        step(number)
    cpu = (time.perf_counter() - begin) / steps * 1e6
    waits = occupied.query()  # that kernel was over before all steps were enqueued
    after.record()
    after.synchronize()
    return Timed(eager, cpu, before.elapsed_time(after) / steps * 1e3, waits)


def occupy(milliseconds: float) -> None:
    """Enqueue a kernel that does nothing for about that long."""
    torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MS))


def sorted_times(action: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds between two CUDA events around ``action``, ascending."""
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        action()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return sorted(times)


def wall_ms(settings: Settings, action: Callable[[], Any]) -> float:
    """Milliseconds of wall time until the GPU has done ``action``."""
    settings.synchronize()
    begin = time.perf_counter()
    action()
    settings.synchronize()
    return (time.perf_counter() - begin) * 1e3


class Kernel(NamedTuple):
    """A kernel or copy of a step: its name, how many of them, and their microseconds in all."""

    name: str
    number: float
    us: float


def kernels_of(settings: Settings, step: Callable[[], Any], times: int = 3) -> list[Kernel]:
    """Kernels and copies of a step by the profiler, those that take longest first; none on a CPU."""
    step()
    if not settings.cuda:
        return []
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith("ProfilerStep"):
            found.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    kernels = [Kernel(name, len(us) / times, sum(us) / times) for name, us in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def add_kernels(results: Results, case: str, kernels: list[Kernel], most: int = 8) -> None:
    """Write and print the kernels of a case that take longest."""
    for kernel in kernels[:most]:
        value = f"{kernel.number:g} x, {kernel.us:.1f} us"
        results.add(case, f"      {kernel.name}: {value}", **{f"kernel {kernel.name}": value})


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    """``|out - exact| / |exact|`` over all elements, in float64."""
    exact = exact.double()
    return ((out.double().to(exact.device) - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def largest(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of an element; equal infinities do not differ."""
    out, exact = out.double().to(exact.device), exact.double()
    return torch.where(out == exact, 0.0, (out - exact).abs()).max().item()


def attempt(settings: Settings, results: Results, case: str, action: Callable[[], Any]) -> None:
    """Run a case; whatever goes wrong is noted and costs only this case, unless the GPU is lost to the process."""
    try:
        action()
    except Exception as error:  # a kernel that does not compile, memory that is not there
        results.fail(case, error)
        leave_if_lost(settings, error)


def leave_if_lost(settings: Settings, error: BaseException) -> None:
    """End the process at once, without waiting for the GPU, if ``error`` has made it useless."""
    text = str(error)
    if settings.cuda and ("CUDA error" in text or any(part in text for part in _FATAL)):
        sys.stdout.flush()
        os._exit(LOST)
