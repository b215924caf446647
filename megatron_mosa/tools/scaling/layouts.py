"""Layouts of a sweep: parsing, validation and defaults.

This module needs only the configuration, so that mistakes are reported before anything slow is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_mosa.config import Config, check, check_world_size, divisible_counts
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.options import MOST_PROCESSES
from megatron_mosa.utils import counted

_EXAMPLE = "--layout tp=2,sp=true,zero=1,micro=4"
_KEYS = ("tp", "sp", "zero", "micro")
_MOST = {"tp": MOST_PROCESSES, "micro": 2**24, "processes": MOST_PROCESSES, "zero": 3}
_OPTIONAL = ("overlap", "processes")
_NEIGHBORS = 3


@dataclass(frozen=True)
class SweepLayout:
    """How one run of a sweep is divided among its processes; everything else is the configuration's."""

    tp: int
    sp: bool
    zero: int
    micro: int
    overlap: bool = True
    """``parallel.tensor_parallel_overlap`` is "auto"; without effect at ``tp=1``, where it is always true."""

    processes: int | None = None
    """The number of processes to run it on, if it was given for one alone."""

    def __str__(self) -> str:
        text = f"tp={self.tp},sp={str(self.sp).lower()},zero={self.zero},micro={self.micro}"
        return text if self.overlap else f"{text},overlap=false"

    @property
    def name(self) -> str:
        """The layout as part of a file name, such as ``tp2-sp-zero1-micro4``."""
        name = f"tp{self.tp}-{'sp-' if self.sp else ''}zero{self.zero}-micro{self.micro}"
        return name if self.overlap else f"{name}-no-overlap"

    def apply(self, config: Config) -> Config:
        """Return the configuration with this layout.

        Raises:
            UserError: the layout breaks a rule of the configuration.
        """
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sp,
            zero_stage=self.zero,
            tensor_parallel_overlap="auto" if self.overlap else "none",
        )
        applied = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=self.micro))
        check(applied)
        return applied


def layout_of(config: Config) -> SweepLayout:
    """Return the configuration's own layout."""
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size
    # At size 1 sequence parallelism and overlap have no effect: give that layout one name.
    return SweepLayout(
        size,
        parallel.sequence_parallel and size > 1,
        parallel.zero_stage,
        config.train.micro_batch_size,
        overlap=parallel.tensor_parallel_overlap == "auto" or size == 1,
    )


def parse_layout(text: str, config: Config) -> SweepLayout:
    """Parse ``tp=2,sp=true,zero=1,micro=4``; omitted keys are the configuration's.

    Raises:
        UserError: an unknown or duplicate key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in (*_KEYS, *_OPTIONAL):
            hint = nearest(key, (*_KEYS, *_OPTIONAL)) if equals else ""
            raise UserError(
                f"--layout {text}: '{part.strip()}' is not KEY=VALUE with a known key{hint}; the keys are "
                f"{', '.join(_KEYS)}, {' and '.join(_OPTIONAL)}, as in {_EXAMPLE}"
            )
        if key in values:
            raise UserError(f"--layout {text}: {key} is given twice; give it once")
        values[key] = _boolean(text, key, value) if key in ("sp", "overlap") else _number(text, key, value)
    layout = replace(layout_of(config), **values)
    return replace(layout, sp=layout.sp and layout.tp > 1, overlap=layout.overlap or layout.tp == 1)


def check_layouts(config: Config, layouts: Sequence[SweepLayout], processes: int) -> None:
    """Check that ``processes`` processes can run each layout, and that none is given twice.

    Raises:
        UserError: names the first bad layout, the rule it breaks and the nearest valid layouts.
    """
    seen: set[SweepLayout] = set()
    for layout in layouts:
        objection = objection_to(config, layout, processes)
        if objection is not None:
            near = nearest_valid_layouts(config, layout, processes)
            fix = "nearest valid layouts: " + " | ".join(map(str, near)) if near else _what_fits(config, processes)
            reason = objection.partition("; ")[0]  # without its own advice, which is not about --layout
            raise UserError(f"--layout {layout} on {counted(processes, 'process')}: {reason}; {fix}")
        if layout in seen:
            raise UserError(f"--layout {layout} is given twice (sp has no effect at tp=1); give it once")
        seen.add(layout)


def valid_layouts(config: Config, processes: int) -> list[SweepLayout]:
    """Return every layout that ``processes`` processes can run, ordered by tp, sp, zero and micro."""
    micros = _divisors(config.train.global_batch_size)
    overlap = config.parallel.tensor_parallel_overlap == "auto"
    candidates = [
        SweepLayout(tp, sp, zero, micro, overlap or tp == 1)
        for tp in _divisors(processes)
        for sp in ((False, True) if tp > 1 else (False,))
        for zero in range(4)
        for micro in micros
    ]
    return [layout for layout in candidates if objection_to(config, layout, processes) is None]


def nearest_valid_layouts(config: Config, layout: SweepLayout, processes: int) -> list[SweepLayout]:
    """Return the valid layouts that differ from ``layout`` in the fewest keys, and by the smallest factors."""

    def distance(other: SweepLayout) -> tuple[int, float]:
        keys = sum(getattr(layout, key) != getattr(other, key) for key in _KEYS)
        sizes = ((layout.tp, other.tp), (layout.micro, other.micro), (layout.zero + 1, other.zero + 1))
        return keys, sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in sizes)

    found = sorted(valid_layouts(config, processes), key=distance)[:_NEIGHBORS]
    return [replace(other, overlap=layout.overlap or other.tp == 1) for other in found]


def default_layouts(config: Config, processes: int) -> list[SweepLayout]:
    """Return each ZeRO stage once per tensor-parallel size, and ZeRO-1 with and without sequence parallelism.

    The micro-batch is the configuration's, or the largest valid one below it. Without data parallelism ZeRO has nothing
    to partition, so only stage 1 is included.

    Raises:
        UserError: no layout of this configuration fits ``processes``.
    """
    layouts: dict[tuple[int, bool, int], SweepLayout] = {}
    for layout in valid_layouts(config, processes):  # micro-batches ascend
        parallel = processes // layout.tp
        wanted = layout.zero == 1 or (parallel > 1 and layout.sp == (layout.tp > 1))
        if wanted and layout.micro <= config.train.micro_batch_size:
            layouts[layout.tp, layout.sp, layout.zero] = layout
    if not layouts:
        heads = ", ".join(f"{key}={count}" for key, count in divisible_counts(config).items() if count)
        raise UserError(
            f"no layout of this configuration fits --processes={processes}: the tensor-parallel size must divide the "
            f"heads ({heads}), and the data-parallel size "
            f"train.global_batch_size={config.train.global_batch_size}; {_what_fits(config, processes)}"
        )
    return list(layouts.values())


def _what_fits(config: Config, processes: int) -> str:
    """Return the advice for when no layout fits ``processes``: the nearest numbers for which one does."""
    heads = math.gcd(*divisible_counts(config).values())
    batches = _divisors(config.train.global_batch_size)
    candidates = {tp * dp for tp in _divisors(heads) for dp in batches if tp * dp < processes}
    fewer = next((count for count in sorted(candidates, reverse=True) if valid_layouts(config, count)), None)
    batch = max(1, round(config.train.global_batch_size / processes)) * processes  # one or more samples per rank
    fixes = [f"--processes={fewer}"] if fewer else []
    if valid_layouts(replace(config, train=replace(config.train, global_batch_size=batch)), processes):
        fixes.append(f"train.global_batch_size={batch}")
    return f"set {', or '.join(fixes)}" if fixes else f"no layout is valid on {counted(processes, 'process')}"


def objection_to(config: Config, layout: SweepLayout, processes: int) -> str | None:
    """Return why ``processes`` processes cannot run a layout, or None if they can."""
    try:
        check_world_size(layout.apply(config), processes)
    except UserError as error:
        return str(error)
    return None


def _number(text: str, key: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise UserError(f"--layout {text}: {key} must be an integer, got {value}") from None
    least = 0 if key == "zero" else 1
    if not least <= number <= _MOST[key]:
        raise UserError(f"--layout {text}: {key} must be at least {least} and at most {_MOST[key]}, got {value}")
    return number


def _boolean(text: str, key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--layout {text}: {key} must be true or false, got {value}")
    return value.lower() == "true"


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
