"""Where the GPU's time in a training step goes, from the kernels that torch's profiler records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

OTHER = "elementwise"
KINDS = {
    "optimizer": ("FusedAdam", "fused_adam", "lerp"),  # Inductor names a kernel by what it fuses
    "attention": ("flash", "fmha", "cudnn_generated"),
    "MoSA": (
        "_scores_kernel", "_select", "_starts_kernel", "_pack_kernel", "_count_kernel", "_entries_kernel", "_gathered",
        "_forward_kernel", "_backward_", "_scattered", "_combine", "_weight_gradient", "_follow", "_count_scores",
    ),
    "rotary embedding": ("_rotary_kernel",),
    "cross entropy": ("_cross_entropy_kernel", "_partial_kernel", "_gradient_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitK"),
    "copies": ("Memcpy", "Memset", "copy", "fill", "FillFunctor"),
    "collectives": ("nccl",),
}  # fmt: skip
"""Parts of kernels' names by kind, in this order; all others are elementwise work, norms and reductions."""


class Kernel(NamedTuple):
    """A kernel, copy or memset on the GPU, in nanoseconds."""

    start: int
    end: int
    name: str


@dataclass
class StepProfile:
    """Averages over the profiled steps, in milliseconds."""

    busy: float
    """In which anything ran on the GPU."""

    span: float
    """From the first kernel to the last of all profiled steps, by their number."""

    kinds: dict[str, float] = field(default_factory=dict)
    """Of kernels, by kind; where they overlap the sum is above ``busy``."""

    kernels: int = 0
    host_calls: int = 0
    """Kernel and graph launches, copies and memsets that the host issued."""

    longest: list[tuple[str, float, float]] = field(default_factory=list)
    """Names of the kernels that took longest in all, with milliseconds and number."""


def profile_steps(step: Callable[[], object], steps: int = 3) -> StepProfile:
    """Run a function that takes a step and waits for the device, and profile it; needs a GPU."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    on_device = (event for event in events if "CUDA" in str(event.device_type()))
    kernels = [Kernel(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in on_device]
    issued = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    calls = [e for e in events if e.name().startswith("cu") and any(word in e.name() for word in issued)]
    found = summarize([k for k in kernels if not k.name.startswith(("ProfilerStep", "Optimizer."))], steps)
    found.host_calls = len(calls) // steps
    return found


def summarize(kernels: list[Kernel], steps: int) -> StepProfile:
    """Sum up what ran in a number of steps."""
    kinds, each = dict.fromkeys([*KINDS, OTHER], 0.0), defaultdict[str, list[float]](list)
    for kernel in kernels:
        milliseconds = (kernel.end - kernel.start) / 1e6
        kinds[kind_of(kernel.name)] += milliseconds / steps
        each[kernel.name].append(milliseconds)
    longest = sorted(each.items(), key=lambda item: -sum(item[1]))[:25]
    return StepProfile(
        busy=sum(end - start for start, end in _intervals(kernels)) / 1e6 / steps,
        span=(max(k.end for k in kernels) - min(k.start for k in kernels)) / 1e6 / steps if kernels else 0.0,
        kinds=kinds,
        kernels=len(kernels) // steps,
        longest=[(name, sum(times) / steps, len(times) / steps) for name, times in longest],
    )


def kind_of(name: str) -> str:
    """Tell a kernel's kind from its name."""
    if name.startswith("triton_") and "lerp" not in name:
        return OTHER  # Inductor's names list everything that they fuse
    return next((kind for kind, words in KINDS.items() if any(_has(name, word) for word in words)), OTHER)


def _has(name: str, word: str) -> bool:
    return name.startswith(word) if word.startswith("_") else word in name  # kernels of this project begin with it


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
