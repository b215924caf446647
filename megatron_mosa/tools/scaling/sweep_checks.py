"""Whether a sweep has measured everything, and whether all layouts train the same model."""

from __future__ import annotations

from megatron_mosa.errors import RunError
from megatron_mosa.tools.scaling.rows import Sweep

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative deviation of a loss from the reference's, by the precision of the layouts."""

NORM_TOLERANCE = {"fp32": 1e-2, "bf16": 2e-1}
"""The same for the gradient norm, which reveals wrong weights or gradients long before the loss does."""


def refuse_unfinished(sweep: Sweep) -> None:
    """Raise a RunError if a cell has no result, or none was measured."""
    if not any(row.is_measured for row in sweep.rows):
        row = next((row for row in sweep.rows if row.status == "failed"), sweep.rows[0])
        raise RunError(f"no layout could be measured; {row.line}")
    if missing := [str(row.cell) for row in sweep.rows if row.status == "missing"]:
        raise RunError(f"not measured: {', '.join(missing)}; run the same command again to measure what is missing")


def refuse_deviations(sweep: Sweep) -> None:
    """Raise a RunError if losses or gradient norms of a layout deviate from the reference's beyond the tolerance."""
    for what, name, tolerance in (
        ("losses", "loss_deviation", TOLERANCE[sweep.precision]),
        ("gradient norms", "grad_norm_deviation", NORM_TOLERANCE[sweep.precision]),
    ):
        found = {row.cell: getattr(row, name) for row in sweep.rows}
        wrong = [f"{cell} ({value:.1e})" for cell, value in found.items() if value is not None and value > tolerance]
        if wrong:
            raise RunError(
                f"{what} deviate from the reference by more than {tolerance:g} ({sweep.precision}): {', '.join(wrong)}"
            )
