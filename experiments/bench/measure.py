"""Timing side by side: every work takes its turn in every round, so that whatever the machine does reaches all.

CPU time of the process, or the device's own events on a GPU. A round gives each work a block of calls; the order is
reversed every other round. Ratios are of the same round, and their median comes with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def cpu_seconds(work: Work, calls: int) -> float:
    """Process time of one call."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def cuda_seconds(work: Work, calls: int) -> float:
    """Time of one call between two events of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end) / calls


def side_by_side(
    works: Mapping[str, Work], device: str = "cpu", rounds: int = 15, block: float = 0.04, budget: float = 40.0
) -> dict[str, list[float]]:
    """Seconds a call in every round, name by name.

    Args:
        works: what to time.
        device: "cpu" or "cuda".
        rounds: at most so many; at least 3, whatever they take.
        block: seconds a work is called for in a round, one call at least.
        budget: seconds after which no further round begins.
    """
    seconds = cuda_seconds if device == "cuda" else cpu_seconds
    calls = {}
    for name, work in works.items():
        work()
        work()
        calls[name] = max(1, int(block / max(seconds(work, 1), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begun > budget:
            break
        for name in list(works)[:: -1 if turn % 2 else 1]:
            found[name].append(seconds(works[name], calls[name]))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(times: Mapping[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """How many times longer each of the others takes than `ours`, of the same round."""
    return {
        name: spread([theirs / mine for theirs, mine in zip(values, times[ours], strict=True)])
        for name, values in times.items()
        if name != ours
    }
