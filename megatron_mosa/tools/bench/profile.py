"""Where the time of a training step goes, from what torch's profiler records: kernels, or on a CPU collectives."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from megatron_mosa.tools.bench.measurement import StepProfile

OTHER = "elementwise"
COLLECTIVES = "collectives"
KINDS = {
    "optimizer": ("FusedAdam", "fused_adam", "lerp"),  # Inductor names a kernel by what it fuses
    "attention": ("flash", "fmha", "cudnn_generated"),
    "MoSA": (
        "_scores_kernel", "_select", "_starts_kernel", "_pack_kernel", "_count_kernel", "_entries_kernel", "_gathered",
        "_forward_kernel", "_backward_", "_tiles_kernel", "_scattered", "_combine", "_weight_gradient", "_follow",
        "_count_scores", "_qkv_", "_ragged_kernel", "_layout_kernel", "_cache_kernel",
    ),
    "rotary embedding": ("_rotary_kernel",),
    "cross entropy": ("_cross_entropy_kernel", "_partial_kernel", "_gradient_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitK"),
    "copies": ("Memcpy", "Memset", "copy", "fill", "FillFunctor"),
    COLLECTIVES: ("nccl", "gloo:"),
}  # fmt: skip
"""Parts of kernels' names by kind, in this order; all others are elementwise work, norms and reductions."""
ANNOTATIONS = ("ProfilerStep", "Optimizer.", "nccl:")
"""Beginnings of names that the profiler writes on the GPU's timeline beside kernels, which have names of their own."""


class Kernel(NamedTuple):
    """A kernel, copy or memset on the GPU, in nanoseconds."""

    start: int
    end: int
    name: str


def profile_steps(step: Callable[[], object], steps: int = 3, warmup: int = 2, on_gpu: bool = True) -> StepProfile:
    """Run a function that takes a step and waits for the device, and profile it.

    Args:
        step: the function; every rank must profile, so that none waits for one that the profiler slows down.
        steps: to profile.
        warmup: steps before them.
        on_gpu: False: tell only gloo's collectives from all the rest, "computation".
    """
    for _ in range(warmup):
        step()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wall = 1000 * (time.perf_counter() - begin) / steps
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    if not on_gpu:
        collectives = (event for event in events if event.name().startswith("gloo:"))
        found = summarize([Kernel(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in collectives], steps)
        found.kinds = {"computation": wall - found.communicating, COLLECTIVES: found.communicating}
        found.busy = found.wall = wall
        return found
    on_device = (event for event in events if "CUDA" in str(event.device_type()))
    kernels = [Kernel(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in on_device]
    issued = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    calls = [e for e in events if e.name().startswith("cu") and any(word in e.name() for word in issued)]
    found = summarize(kernels, steps)
    found.host_calls = len(calls) // steps
    found.wall = wall
    return found


def summarize(kernels: list[Kernel], steps: int) -> StepProfile:
    """Sum up what ran in a number of steps."""
    kernels = [kernel for kernel in kernels if not kernel.name.startswith(ANNOTATIONS)]
    kinds, each = dict.fromkeys([*KINDS, OTHER], 0.0), defaultdict[str, list[float]](list)
    for kernel in kernels:
        milliseconds = (kernel.end - kernel.start) / 1e6
        kinds[kind_of(kernel.name)] += milliseconds / steps
        each[kernel.name].append(milliseconds)
    longest = sorted(each.items(), key=lambda item: -sum(item[1]))[:25]
    collectives = [kernel for kernel in kernels if kind_of(kernel.name) == COLLECTIVES]
    others = [kernel for kernel in kernels if kind_of(kernel.name) != COLLECTIVES]
    busy = _milliseconds(kernels) / steps
    return StepProfile(
        busy=busy,
        span=(max(k.end for k in kernels) - min(k.start for k in kernels)) / 1e6 / steps if kernels else 0.0,
        kinds=kinds,
        kernels=len(kernels) // steps,
        longest=[(name, sum(times) / steps, len(times) / steps) for name, times in longest],
        communicating=_milliseconds(collectives) / steps,
        exposed=busy - _milliseconds(others) / steps,
    )


def kind_of(name: str) -> str:
    """Tell a kernel's kind from its name."""
    if name.startswith("triton_") and "lerp" not in name:
        return OTHER  # Inductor's names list everything that they fuse
    return next((kind for kind, words in KINDS.items() if any(_has(name, word) for word in words)), OTHER)


def _has(name: str, word: str) -> bool:
    return name.startswith(word) if word.startswith("_") else word in name  # kernels of this project begin with it


def _milliseconds(kernels: list[Kernel]) -> float:
    """Return how long at least one of them ran."""
    return sum(end - start for start, end in _intervals(kernels)) / 1e6


def _intervals(kernels: list[Kernel]) -> Iterator[tuple[int, int]]:
    """Yield the times in which anything ran, without overlap."""
    start = end = None
    for kernel in sorted(kernels):
        if end is None or kernel.start > end:
            if start is not None and end is not None:
                yield start, end
            start, end = kernel.start, kernel.end
        else:
            end = max(end, kernel.end)
    if start is not None and end is not None:
        yield start, end
