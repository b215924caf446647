"""Time and memory of a function on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CLOCK = 2e9  # Hz, approximately that of current GPUs


def require_gpu() -> None:
    """Exit with a line unless torch finds a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU; these measurements need one")


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one function."""

    milliseconds: float
    """GPU time: the median over the repetitions, by CUDA events, with all launches of a call queued beforehand."""

    spread: float
    """(90th - 10th percentile) / median."""

    called_milliseconds: float
    """Median time of consecutive calls, in which launching may take longer than the kernels."""

    extra_gib: float
    """Peak memory beyond what was allocated before."""


def measure(function: Callable[[], object], *, seconds: float = 0.5, warmup: int = 3) -> Measurement:
    """Call ``function`` for about ``seconds``, at least 10 times, and drop its results."""
    for _ in range(warmup):
        function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once = _milliseconds(function, 1)[0]
    extra = torch.cuda.max_memory_allocated() - before
    repetitions = max(10, min(500, int(seconds * 1000 / once / 2)))
    called = statistics.median(_milliseconds(function, repetitions))
    times = sorted(_milliseconds(function, repetitions, _launch_cycles(function)))
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    median = statistics.median(times)
    return Measurement(median, (high - low) / median, called, extra / 2**30)


def _launch_cycles(function: Callable[[], object]) -> int:
    """Return 1.5 times the GPU cycles that the host takes to launch one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return int(1.5 * seconds * CLOCK)


def _milliseconds(function: Callable[[], object], repetitions: int, wait_cycles: int = 0) -> list[float]:
    """Return the time of each repetition, which the GPU starts only after all launches are queued."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in events:
        if wait_cycles:
            torch.cuda._sleep(wait_cycles)  # torch has no public function for this
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
