"""Time and memory of a function on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """Of one function."""

    milliseconds: float
    """Median over the repetitions, by CUDA events."""

    spread: float
    """(90th - 10th percentile) / median."""

    extra_gib: float
    """Peak memory above what was allocated before."""


def measure(function: Callable[[], object], *, seconds: float = 0.5, warmup: int = 3) -> Measurement:
    """Call ``function`` for about ``seconds``, at least 10 times; results are dropped."""
    for _ in range(warmup):
        function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once = _milliseconds(function, 1)[0]
    extra = torch.cuda.max_memory_allocated() - before
    times = sorted(_milliseconds(function, max(10, min(1000, int(seconds * 1000 / once)))))
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    median = statistics.median(times)
    return Measurement(median, (high - low) / median, extra / 2**30)


def _milliseconds(function: Callable[[], object], repetitions: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
