"""Clocks, methods that take turns, and the machine's read bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Runs an action and returns the microseconds it took.
Clock = Callable[[Callable[[], Any]], float]


def cpu_clock(action: Callable[[], Any]) -> float:
    """Microseconds of wall time."""
    start = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start) / 1e3


def thread_clock(action: Callable[[], Any]) -> float:
    """Microseconds of CPU time of this thread: with one thread, what a method takes beside other work."""
    start = time.thread_time_ns()
    action()
    return (time.thread_time_ns() - start) / 1e3


def count_page_faults(action: Callable[[], Any]) -> int:
    """Pages of memory that the system had to map while ``action`` ran; 0 where it does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def take_turns(
    one_round: Callable[[int], Mapping[str, float]], rounds: int, least: int, seconds: float
) -> dict[str, list[float]]:
    """Repeat a round in which every method is timed once: A B C, A B C, ...

    Args:
        one_round: given the number of the round, times each method.
        rounds: the most rounds.
        least: rounds that are done whatever they take.
        seconds: once they are over, no further round begins.

    Returns:
        The microseconds of each method, one number for each round.
    """
    times: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        for name, microseconds in one_round(number).items():
            times.setdefault(name, []).append(microseconds)
        if number + 1 >= least and time.perf_counter() > end:
            break
    return times


def read_bandwidth(size: int, repeats: int = 7, device: str = "cpu", clock: Clock = cpu_clock) -> dict[str, float]:
    """How fast a buffer of ``size`` bytes can be read, in GB/s (1e9 bytes), best of ``repeats``, by way of reading.

    No single operation reads at full speed on every machine, so several are tried; the fastest is the bandwidth.
    """
    width = 1 << 12
    buffer = torch.ones(size // 4 // width, width, device=device)
    flat, column = buffer.flatten(), torch.ones(width, device=device)
    row = torch.ones(buffer.shape[0], device=device)
    ways: dict[str, Callable[[], Any]] = {
        "sum": flat.sum,
        "amax": flat.amax,
        "dot": lambda: torch.dot(flat, flat),
        "matrix times vector": lambda: torch.mv(buffer, column),
        "vector times matrix": lambda: torch.mv(buffer.t(), row),
    }
    rates = {}
    for name, way in ways.items():
        way()
        best = min(clock(way) for _ in range(repeats))
        rates[name] = flat.numel() * 4 / best / 1e3
    return rates
