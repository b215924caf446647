"""The report of a sweep: results.csv, results.md and scaling.png."""

from __future__ import annotations

import csv
import os
import platform
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_mosa.config import Config
from megatron_mosa.tools.scaling.layouts import SweepLayout

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative deviation of a loss from the fp32 reference's, by the precision of the layouts."""

NORM_TOLERANCE = {"fp32": 1e-2, "bf16": 2e-1}
"""The same for the gradient norm, which reveals wrong weights or gradients long before the loss does."""

NOT_PERFORMANCE = "functional, not performance"


@dataclass(frozen=True)
class Row:
    """One row of the tables; values that a failed layout lacks are None."""

    label: str
    processes: int
    tp: int
    sp: bool
    zero: int
    micro: int
    status: str
    """"ok", "failed" or "reference"."""

    tokens_per_second_per_rank: float | None = None
    step_seconds: float | None = None
    peak_memory_gib: float | None = None
    communication_share: float | None = None
    loss_deviation: float | None = None
    grad_norm_deviation: float | None = None
    reason: str = ""
    device: str = ""

    @classmethod
    def of_reference(cls, result: dict[str, Any]) -> Row:
        """Return the row of the reference, whose deviations are 0 by definition."""
        row = cls.of_layout(SweepLayout(**result["layout"]), 1, result, result)
        return replace(row, label="reference", status="reference")

    @classmethod
    def of_layout(cls, layout: SweepLayout, processes: int, result: dict[str, Any], reference: dict[str, Any]) -> Row:
        """Return the row of a layout, compared with the reference.

        Args:
            result: fields of ``Measurement``, or a ``reason`` if the layout failed.
            reference: the same for the reference.
        """
        known: dict[str, Any] = {"label": str(layout), "processes": processes, **asdict(layout)}
        if "reason" in result:
            return cls(**known, status="failed", reason=result["reason"])
        seconds = median(result["step_seconds"])
        return cls(
            **known,
            status="ok",
            tokens_per_second_per_rank=result["tokens_per_step"] / seconds / processes,
            step_seconds=seconds,
            peak_memory_gib=result["peak_memory_gib"],
            communication_share=result["communication_share"],
            loss_deviation=deviation(result["losses"], reference["losses"]),
            grad_norm_deviation=deviation(result["grad_norms"], reference["grad_norms"]),
            device=result["device"],
        )

    @property
    def layout(self) -> SweepLayout:
        """The layout of this row."""
        return SweepLayout(self.tp, self.sp, self.zero, self.micro)

    @property
    def line(self) -> str:
        """The row as one line for the terminal."""
        if self.status == "failed":
            return f"{self.label}: failed: {self.reason}"
        return (
            f"{self.label}: {self.tokens_per_second_per_rank:,.0f} tokens/s per rank, "
            f"{100 * (self.communication_share or 0):.0f} % communication, loss deviation {self.loss_deviation:.1e}"
        )


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its settings and one row per layout."""

    config: Config
    rows: list[Row]
    processes: int
    command: str
    device: str
    versions: dict[str, str]


def deviation(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference over all steps."""
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, expected, strict=True))


def write_report(sweep: Sweep, folder: Path) -> None:
    """Write results.csv, results.md and scaling.png into ``folder``."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(Row)]
        # The note is in every line, because tables get cut up and pasted elsewhere.
        writer = csv.DictWriter(file, [*names, "note"])
        writer.writeheader()
        for row in sweep.rows:
            writer.writerow(asdict(row) | {"note": NOT_PERFORMANCE if sweep.device == "cpu" else ""})
    (folder / "results.md").write_text(markdown(sweep), encoding="utf-8")
    plot(sweep, folder / "scaling.png")


def setting(sweep: Sweep) -> str:
    """Return the devices and backend; on CPUs with a note that the numbers do not measure performance."""
    if sweep.device == "cpu":
        cores = os.cpu_count()
        return f"{sweep.processes} x CPU (gloo); **{NOT_PERFORMANCE}: ranks share {cores} cores**"
    names = {row.device for row in sweep.rows if row.device}
    return f"{sweep.processes} x {', '.join(sorted(names))} (nccl)"


def markdown(sweep: Sweep) -> str:
    """Return the table with everything needed to read it and to reproduce it."""
    train, length = sweep.config.train, sweep.config.data.sequence_length
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    lines = [
        f"# Layouts of {sweep.config.run.name}",
        "",
        f"{setting(sweep)}. Python {platform.python_version()}, {versions}.",
        f"Global batch {train.global_batch_size} x {length} tokens, {train.precision}. Measured by:",
        "",
        f"    {sweep.command}",
        "",
        "| layout | ranks | tokens/s per rank | s/step | peak memory, GiB | communication | loss dev. | norm dev. |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_cells, sweep.rows),
        "",
        "Communication: share of the step during which a collective was running, including waiting for other ranks.",
        *(["Memory: peak resident size of the process since its start."] if sweep.device == "cpu" else []),
        "Deviations of loss and gradient norm: largest relative difference over all steps from one process at TP 1 in "
        f"fp32 (tolerances: loss {TOLERANCE[train.precision]:g}, norm {NORM_TOLERANCE[train.precision]:g}).",
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    name = f"reference: {row.layout}, fp32" if row.status == "reference" else row.label
    if row.status == "failed":
        reason = row.reason.replace("|", "\\|")
        return f"| {name} | {row.processes} | failed: {reason} | | | | | |"
    cells = (
        f"{row.tokens_per_second_per_rank:,.0f}",
        f"{row.step_seconds:.3g}",
        f"{row.peak_memory_gib:.2f}",
        f"{100 * (row.communication_share or 0):.0f} %",
        f"{row.loss_deviation:.1e}",
        f"{row.grad_norm_deviation:.1e}",
    )
    return f"| {name} | {row.processes} | {' | '.join(cells)} |"


def plot(sweep: Sweep, path: Path) -> None:
    """Plot tokens/s per rank and share of communication, one bar per layout; failed layouts have no bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sweep.rows[::-1]  # barh draws upwards
    names = [row.label + (" (failed)" if row.status == "failed" else "") for row in rows]
    figure, (speed, share) = plt.subplots(1, 2, sharey=True, figsize=(10, 1.6 + 0.4 * len(rows)), layout="constrained")
    speed.barh(names, [row.tokens_per_second_per_rank or 0.0 for row in rows])
    speed.set_xlabel("tokens/s per rank")
    share.barh(names, [100 * (row.communication_share or 0.0) for row in rows], color="tab:orange")
    share.set_xlabel("communication, % of the step")
    share.set_xlim(0, 100)
    for axes in (speed, share):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{sweep.config.run.name}: {setting(sweep).replace('*', '')}", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)
