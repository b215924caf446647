"""The result of ``mosa bench``, in a module that imports no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Measurement:
    """The result of ``mosa bench``, written as JSON."""

    name: str
    """``run.name``."""

    layout: str
    device: str
    versions: dict[str, str]
    acceleration: str
    """What ``train.acceleration`` chose."""

    milliseconds: list[float]
    """Of each measured step, from the call to when the device is done."""

    tokens_per_step: int
    """Of all ranks."""

    flops_per_step: dict[str, float]
    """Of one rank: "executed" is what ``model_flops`` counts, "usual" what ``usual_flops`` counts."""

    peak_flops: float
    parameters: int
    """Of the whole model."""

    allocated_gib: float
    """Peak over all ranks, as ``peak_memory_gib`` counts it."""

    reserved_gib: float
    """Peak over all ranks; 0 on a CPU."""

    seconds_to_build: float
    seconds_of_first_steps: list[float]
    losses: list[float]
    """Of all steps that were not profiled, those before the measured ones included."""

    profile: dict[str, Any] | None = field(default=None)
    """``StepProfile`` of rank 0, if steps were profiled."""

    loop: dict[str, float] | None = field(default=None)
    """``LoopTime``: what a run adds to its steps."""

    grad_norms: list[float] = field(default_factory=list)
    """Of the same steps as ``losses``, before clipping."""

    communication_share: float | None = None
    """``StepProfile.communication_share``, mean over ranks."""

    @property
    def median(self) -> float:
        """Median step time in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return 1000 * self.tokens_per_step / self.median

    def mfu(self, rule: str = "executed") -> float:
        """Model FLOP/s over the peak, by a rule of ``flops_per_step``."""
        return 1000 * self.flops_per_step[rule] / self.median / self.peak_flops
