"""The result of ``mosa bench``, in a module that imports no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from megatron_mosa.utils import known_values, read_record


@dataclass
class StepProfile:
    """Averages over the profiled steps, in milliseconds."""

    busy: float
    """In which anything ran on the GPU; on a CPU the whole step."""

    span: float
    """From the first kernel to the last of all profiled steps, by their number."""

    kinds: dict[str, float] = field(default_factory=dict)
    """Of kernels, by kind; where they overlap the sum is above ``busy``."""

    kernels: int = 0
    host_calls: int = 0
    """Kernel and graph launches, copies and memsets that the host issued."""

    longest: list[tuple[str, float, float]] = field(default_factory=list)
    """Names of the kernels that took longest in all, with milliseconds and number."""

    communicating: float = 0.0
    """In which at least one collective ran, from when this rank joined it; includes waiting for other ranks."""

    exposed: float = 0.0
    """In which collectives ran and nothing else."""

    wall: float = 0.0
    """Of a profiled step by the clock, longer than one without the profiler."""

    @property
    def communication_share(self) -> float:
        """Share of the profiled steps in which at least one collective ran."""
        return self.communicating / self.wall if self.wall else 0.0


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

    model: dict[str, dict[str, Any]] | None = None
    """Sections ``model`` and ``mosa`` of the configuration; None: of an earlier version."""

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


_READ_OF_PROFILE = ("busy", "kinds", "communicating", "exposed", "wall")
"""Values of a profile that are read from files."""


def read_measurement(content: Any) -> Measurement:
    """Return the measurement in a JSON object.

    Raises:
        ValueError: a value is missing, has another type, or is one that nothing can be divided by.
    """
    check_measurement(content)
    return read_record(Measurement, content)


def check_measurement(content: Any) -> None:
    """Check those values of a measurement that a JSON object holds, as far down as they are read.

    Raises:
        ValueError: a value has another type, or is one that nothing can be divided by.
    """
    values = known_values(Measurement, content)
    if "milliseconds" in values and min(values["milliseconds"], default=0) <= 0:
        raise ValueError("milliseconds has no times, or one that is not above 0")
    if missing := {"executed", "usual"}.difference(values.get("flops_per_step", ("executed", "usual"))):
        raise ValueError(f"flops_per_step has no {min(missing)}")
    if values.get("peak_flops", 1) <= 0:
        raise ValueError("peak_flops is not above 0")
    if values.get("profile") is not None:
        profile = known_values(StepProfile, values["profile"])
        if missing := [name for name in _READ_OF_PROFILE if name not in profile]:
            raise ValueError(f"profile has no {missing[0]}")
        if profile["wall"] <= 0:
            raise ValueError("profile: wall is not above 0")
