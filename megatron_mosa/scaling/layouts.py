"""Layouts of a sweep: reading them, checking them, and which ones to try where none are given.

Needs the configuration alone, so that a mistake is told before anything slow is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_mosa.config import Config, check_world_size
from megatron_mosa.config.rules import check
from megatron_mosa.errors import UserError, nearest

_EXAMPLE = "--layout tp=2,sp=true,zero=1,micro=4"
_KEYS = ("tp", "sp", "zero", "micro")
_NEIGHBOURS = 3


@dataclass(frozen=True)
class SweepLayout:
    """How one run of a sweep is spread over its processes; everything else is the configuration's."""

    tp: int
    sp: bool
    zero: int
    micro: int

    def __str__(self) -> str:
        return f"tp={self.tp},sp={str(self.sp).lower()},zero={self.zero},micro={self.micro}"

    @property
    def name(self) -> str:
        """For files."""
        return f"tp{self.tp}-{'sp-' if self.sp else ''}zero{self.zero}-micro{self.micro}"

    def apply(self, config: Config) -> Config:
        """The configuration in this layout.

        Raises:
            UserError: a rule of the configuration is broken.
        """
        parallel = replace(
            config.parallel, tensor_model_parallel_size=self.tp, sequence_parallel=self.sp, zero_stage=self.zero
        )
        applied = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=self.micro))
        check(applied)
        return applied


def layout_of(config: Config) -> SweepLayout:
    """The configuration's own layout."""
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size
    # At size 1 sequence parallelism has no effect: one name for what is one layout.
    return SweepLayout(
        size, parallel.sequence_parallel and size > 1, parallel.zero_stage, config.train.micro_batch_size
    )


def parse_layout(text: str, config: Config) -> SweepLayout:
    """Read ``tp=2,sp=true,zero=1,micro=4``; what is not given is the configuration's.

    Raises:
        UserError: an unknown key, a key given twice, a value that is no number or no truth value.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _KEYS:
            hint = nearest(key, _KEYS) if equals else ""
            raise UserError(
                f"--layout {text}: '{part.strip()}' is not KEY=VALUE with a known key{hint}; legal keys: "
                f"{', '.join(_KEYS)}, as in {_EXAMPLE}"
            )
        if key in values:
            raise UserError(f"--layout {text}: {key} is given twice; give it once")
        values[key] = _truth(text, value) if key == "sp" else _number(text, key, value)
    layout = replace(layout_of(config), **values)
    return replace(layout, sp=layout.sp and layout.tp > 1)


def check_layouts(config: Config, layouts: Sequence[SweepLayout], processes: int) -> None:
    """Refuse the first layout that ``processes`` processes cannot run, and one that is given twice.

    Raises:
        UserError: naming the layout, the rule it breaks and the nearest legal layouts.
    """
    seen: set[SweepLayout] = set()
    for layout in layouts:
        objection = _objection(config, layout, processes)
        if objection is not None:
            near = nearest_legal(config, layout, processes)
            fix = "nearest legal: " + " | ".join(map(str, near)) if near else _what_fits(config, processes)
            reason = objection.partition("; ")[0]  # without its own advice, which is not on --layout
            raise UserError(f"--layout {layout}, on {processes} processes: {reason}; {fix}")
        if layout in seen:
            raise UserError(f"--layout {layout} is given twice (sp has no effect at tp=1); give it once")
        seen.add(layout)


def legal_layouts(config: Config, processes: int) -> list[SweepLayout]:
    """Every layout that ``processes`` processes can run, by tp, sp, zero and micro."""
    micros = _divisors(config.train.global_batch_size)
    candidates = [
        SweepLayout(tp, sp, zero, micro)
        for tp in _divisors(processes)
        for sp in ((False, True) if tp > 1 else (False,))
        for zero in range(4)
        for micro in micros
    ]
    return [layout for layout in candidates if _objection(config, layout, processes) is None]


def nearest_legal(config: Config, layout: SweepLayout, processes: int) -> list[SweepLayout]:
    """The legal layouts that differ from ``layout`` in the fewest keys, and in those by the least."""

    def distance(other: SweepLayout) -> tuple[int, float]:
        keys = sum(getattr(layout, key) != getattr(other, key) for key in _KEYS)
        sizes = ((layout.tp, other.tp), (layout.micro, other.micro), (layout.zero + 1, other.zero + 1))
        return keys, sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in sizes)

    return sorted(legal_layouts(config, processes), key=distance)[:_NEIGHBOURS]


def default_layouts(config: Config, processes: int) -> list[SweepLayout]:
    """At every tensor-parallel size each ZeRO stage once, and sequence parallelism on and off under ZeRO-1.

    The micro-batch is the configuration's, or the largest legal one below it. Without data parallelism ZeRO has nothing
    to partition, so only stage 1 is tried.

    Raises:
        UserError: no layout of this configuration fits ``processes``.
    """
    layouts: dict[tuple[int, bool, int], SweepLayout] = {}
    for layout in legal_layouts(config, processes):  # by growing micro-batch
        parallel = processes // layout.tp
        wanted = layout.zero == 1 or (parallel > 1 and layout.sp == (layout.tp > 1))
        if wanted and layout.micro <= config.train.micro_batch_size:
            layouts[layout.tp, layout.sp, layout.zero] = layout
    if not layouts:
        raise UserError(
            f"--processes={processes}: no layout of this configuration fits; tensor parallelism must divide the heads "
            f"({config.model.num_dense_heads} dense, {config.mosa.num_heads} MoSA), and data parallelism "
            f"train.global_batch_size={config.train.global_batch_size}; {_what_fits(config, processes)}"
        )
    return list(layouts.values())


def _what_fits(config: Config, processes: int) -> str:
    """What to change where no layout fits ``processes``: the nearest numbers for which one does."""
    fewer = next((count for count in range(processes - 1, 0, -1) if legal_layouts(config, count)), None)
    batch = max(1, round(config.train.global_batch_size / processes)) * processes  # one sample a rank, or several
    fixes = [f"--processes={fewer}"] if fewer else []
    if legal_layouts(replace(config, train=replace(config.train, global_batch_size=batch)), processes):
        fixes.append(f"train.global_batch_size={batch}")
    return f"set {', or '.join(fixes)}" if fixes else f"no layout is legal on {processes} processes"


def _objection(config: Config, layout: SweepLayout, processes: int) -> str | None:
    """Why ``processes`` processes cannot run a layout."""
    try:
        check_world_size(layout.apply(config), processes)
    except UserError as error:
        return str(error)
    return None


def _number(text: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"--layout {text}: {key}={value} is not a number; legal: whole numbers") from None


def _truth(text: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--layout {text}: sp={value} is not a truth value; legal: true, false")
    return value.lower() == "true"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
