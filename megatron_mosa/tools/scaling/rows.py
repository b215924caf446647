"""Rows of a sweep's tables: results of cells, compared with the reference and with the fewest processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_mosa.errors import UserError
from megatron_mosa.tools.bench.measurement import Measurement, read_measurement
from megatron_mosa.tools.bench.profile import COLLECTIVES
from megatron_mosa.tools.bench.report import time_by_kind
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.tools.scaling.layouts import SweepLayout

NOT_PERFORMANCE = "functional, not performance"


@dataclass(frozen=True)
class Row:
    """One row of the tables; values that a cell without a result lacks are None."""

    label: str
    processes: int
    tp: int
    sp: bool
    zero: int
    micro: int
    global_batch: int
    status: str
    """"ok", "reference", "failed", "too large" (predicted, not run) or "missing" (not measured yet)."""

    tokens_per_second_per_rank: float | None = None
    strong_efficiency: float | None = None
    """Tokens/s per rank over those of the fewest processes, at the sweep's global batch."""

    weak_efficiency: float | None = None
    """The same, at the sweep's number of samples per process."""

    mfu: float | None = None
    step_seconds: float | None = None
    peak_memory_gib: float | None = None
    reserved_memory_gib: float | None = None
    communication_share: float | None = None
    exposed_communication_share: float | None = None
    """Part of it, on rank 0, during which the GPU did nothing else; None on a CPU."""

    loss_deviation: float | None = None
    grad_norm_deviation: float | None = None
    overlap: bool = True
    """See ``SweepLayout``."""

    wall_seconds: float | None = None
    """Of the whole cell, from building to the profile."""

    acceleration: str = ""
    reason: str = ""
    device: str = ""
    fp32: bool = False
    """The reference was computed in fp32, by request."""

    kinds: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a step of rank 0 by kind of work; see ``time_by_kind``."""

    @property
    def cell(self) -> Cell:
        """The cell of this row."""
        layout = SweepLayout(self.tp, self.sp, self.zero, self.micro, self.overlap)
        return Cell(layout, self.processes, self.global_batch, self.fp32)

    @property
    def is_measured(self) -> bool:
        return self.tokens_per_second_per_rank is not None

    @property
    def line(self) -> str:
        """The row as one line for the terminal."""
        if not self.is_measured:
            return f"{self.cell}: {self.status}: {self.reason}"
        text = f"{self.cell}: {self.tokens_per_second_per_rank:,.0f} tokens/s per rank"
        if self.communication_share is not None:
            text += f", {100 * self.communication_share:.0f} % communication"
        return text


@dataclass(frozen=True)
class Sweep:
    """What the report of a sweep says: its settings and one row per cell."""

    name: str
    """Of the model."""

    sequence_length: int
    global_batch: int
    """Of strong scaling, in samples."""

    weak: int | None
    """Samples per process of weak scaling, if it was measured."""

    precision: str
    rows: list[Row]
    device: str
    """"cpu" or "cuda"."""

    command: str
    versions: dict[str, str]
    random_tokens: bool = False
    beside: tuple[tuple[Path, Sweep], ...] = ()
    """Sweeps of other cards to compare with, and their directories."""

    @property
    def cards(self) -> str:
        """The names of the devices."""
        return ", ".join(sorted({row.device for row in self.rows if row.device})) or self.device

    @property
    def is_mixed(self) -> bool:
        """Whether jobs ran on cards of several kinds, whose numbers cannot be compared."""
        return len({row.device for row in self.rows if row.device}) > 1


def make_rows(
    results: Sequence[tuple[Cell, dict[str, Any]]], global_batch: int, weak: int | None, reference: Cell | None
) -> list[Row]:
    """Return a row per cell, the reference first, with deviations and efficiencies.

    Args:
        results: a cell with the fields of ``Measurement``, or with a ``status`` and a ``reason``.
        global_batch: of strong scaling.
        weak: samples per process of weak scaling.
        reference: the cell to compare with, if it is among them; otherwise, and at other global batches, it is the
            first one with the fewest processes.
    """
    measured = {cell: result for cell, result in results if "reason" not in result}
    first = reference if reference in measured else _smallest(measured, global_batch)
    rows = []
    for cell, result in results:
        row = _row(cell, result)
        # Results at another batch are of other data: they have references of their own.
        expected = first if cell.global_batch == global_batch else _smallest(measured, cell.global_batch)
        if cell in measured and expected is not None and (cell == first or cell != expected):
            row = replace(
                row,
                loss_deviation=_deviation("losses", cell, result, measured[expected]),
                grad_norm_deviation=_deviation("grad_norms", cell, result, measured[expected]),
            )
        rows.append(replace(row, label="reference", status="reference") if cell == first else row)
    rows.sort(key=lambda row: row.status != "reference")
    strong = _efficiency(rows, lambda row: row.global_batch == global_batch)
    weakly = _efficiency(rows, lambda row: weak is not None and row.global_batch == weak * row.processes)
    return [replace(row, strong_efficiency=strong.get(row.cell), weak_efficiency=weakly.get(row.cell)) for row in rows]


def _smallest(measured: dict[Cell, dict[str, Any]], batch: int) -> Cell | None:
    at_batch = [cell for cell in measured if cell.global_batch == batch and not cell.fp32]
    return min(at_batch, key=lambda cell: cell.processes, default=None)


def _row(cell: Cell, result: dict[str, Any]) -> Row:
    known: dict[str, Any] = {"label": str(cell.layout), "processes": cell.processes, "global_batch": cell.global_batch}
    known |= {key: getattr(cell.layout, key) for key in ("tp", "sp", "zero", "micro", "overlap")} | {"fp32": cell.fp32}
    if "reason" in result:
        return Row(**known, status=result.get("status", "failed"), reason=result["reason"])
    found = measurement(result)
    profile = found.profile or {}
    return Row(
        **known,
        status="ok",
        tokens_per_second_per_rank=found.tokens_per_second / cell.processes,
        mfu=None if found.device == "cpu" else found.mfu(),
        step_seconds=found.median / 1000,
        peak_memory_gib=found.allocated_gib,
        reserved_memory_gib=found.reserved_gib or None,
        communication_share=found.communication_share,
        exposed_communication_share=profile["exposed"] / profile["wall"] if found.device != "cpu" and profile else None,
        wall_seconds=result.get("wall_seconds"),
        acceleration=found.acceleration,
        device=found.device,
        kinds=_kinds(found),
    )


def _kinds(found: Measurement) -> dict[str, float]:
    if found.device != "cpu" or found.profile is None:
        return time_by_kind(found)
    # The profiler slows computation down: what it tells are shares.
    share = found.profile["communicating"] / found.profile["wall"]
    return {"computation": (1 - share) * found.median, COLLECTIVES: share * found.median}


def measurement(result: dict[str, Any]) -> Measurement:
    """Return the measurement in a cell's result.

    Raises:
        UserError: it is incomplete.
    """
    try:
        return read_measurement(result)
    except ValueError as error:
        name = Cell.from_dict(result["cell"]).name
        raise UserError(f"layouts/{name}.json is damaged: {error}; remove it to measure the layout again") from None


def _efficiency(rows: Sequence[Row], belongs: Callable[[Row], bool]) -> dict[Cell, float]:
    """Return tokens/s per rank as a share of the best of those with the fewest processes, on the same card."""
    shares = {}
    for device in {row.device for row in rows}:
        speeds = {
            row.cell: row.tokens_per_second_per_rank
            for row in rows
            if row.device == device and row.tokens_per_second_per_rank and belongs(row) and not row.fp32
        }
        fewest = min((cell.processes for cell in speeds), default=0)
        base = max((speed for cell, speed in speeds.items() if cell.processes == fewest), default=1.0)
        shares |= {cell: speed / base for cell, speed in speeds.items()}
    return shares


def _deviation(name: str, cell: Cell, result: dict[str, Any], expected: dict[str, Any]) -> float:
    values, theirs = result.get(name, []), expected.get(name, [])
    if len(values) != len(theirs):  # the steps of a sweep are the same for all cells
        raise UserError(
            f"layouts/{cell.name}.json is damaged: it has {len(values)} {name}, the reference has {len(theirs)}; "
            "remove it to measure the layout again"
        )
    return deviation(values, theirs)


def deviation(values: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference over all steps."""
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, expected, strict=True)), default=0.0)
