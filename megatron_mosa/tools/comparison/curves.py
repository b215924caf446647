"""The losses of runs over steps, tokens and seconds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_mosa.errors import UserError
from megatron_mosa.metrics import (
    RunTotals,
    causality_suffix,
    load_pyplot,
    read_journal,
    run_totals,
    save_figure,
    timed_lines,
)

if TYPE_CHECKING:
    from rich.table import Table


class Point(NamedTuple):
    """A loss in the course of a run."""

    step: float
    tokens: float
    seconds: float
    """inside steps"""

    loss: float
    """NaN where it was not finite."""

    is_causal: bool


@dataclass(frozen=True)
class RunCurves:
    """Losses of a run."""

    name: str
    totals: RunTotals
    training: list[Point]
    validation: list[Point]

    @property
    def label(self) -> str:
        """The name, and which of the losses are NON-CAUSAL."""
        training, validation = (
            causality_suffix({point.is_causal for point in points}) for points in (self.training, self.validation)
        )
        if training == validation or not self.validation:
            return self.name + training
        both = (("training", training), ("validation", validation))
        return self.name + "".join(f", {kind} {suffix.removeprefix(', ')}" for kind, suffix in both if suffix)

    def at_pace(self, seconds: float) -> RunCurves:
        """Return the same losses as if each step had taken so many seconds."""
        training, validation = (
            [point._replace(seconds=point.step * seconds) for point in points]
            for points in (self.training, self.validation)
        )
        return replace(self, training=training, validation=validation)


def read_run(run: Path) -> RunCurves:
    """Read a run directory.

    Raises:
        UserError: it has no finite loss.
    """
    lines = read_journal(run / "metrics.jsonl")
    if not any(line.get("loss") is not None and line.get("tokens") is not None for line in lines):
        known = sorted(path.parent.name for path in run.parent.glob("*/metrics.jsonl")) if run.parent.is_dir() else []
        hint = f"; runs there: {', '.join(known)}" if known else ""
        raise UserError(f"'{run}' has no metrics.jsonl with finite losses; pass run directories{hint}")
    training, validation, seconds = [], [], 0.0
    for line, _, inside in timed_lines(lines):
        seconds += inside
        for key, points in (("loss", training), ("validation_loss", validation)):
            if line.get("tokens") is not None and key in line:
                loss = math.nan if line[key] is None else line[key]
                points.append(Point(line["step"], line["tokens"], seconds, loss, line.get("causal", True)))
    return RunCurves(os.path.basename(os.path.realpath(run)), run_totals(lines), training, validation)


def table(runs: Sequence[RunCurves]) -> Table:
    """Return one row for each run; the losses are the last ones, each followed by whether it is causal."""
    from rich.table import Table

    drawn = Table(title="Runs side by side", title_justify="left")
    drawn.add_column("run", overflow="fold")
    for name in ("steps", "tokens", "loss", "causal", "val. loss", "causal", "tokens/s", "MFU", "in steps"):
        drawn.add_column(name, justify="right", overflow="fold")
    for run in runs:
        totals = run.totals
        drawn.add_row(
            run.name,
            f"{totals.steps:,}",
            f"{totals.tokens:,}",
            *_cells(run.training),
            *_cells(run.validation),
            f"{totals.tokens_per_second:,.0f}",
            f"{totals.mfu:.1%}",
            totals.duration,
        )
    return drawn


def _cells(points: Sequence[Point]) -> tuple[str, str]:
    """Return the last loss, and whether it is causal."""
    if not points:
        return "", ""
    loss = points[-1].loss
    return "not finite" if math.isnan(loss) else f"{loss:.4f}", "yes" if points[-1].is_causal else "NO"


def plot(runs: Sequence[RunCurves], path: Path) -> None:
    """Draw training losses as lines and validation losses as points, over steps, tokens and seconds.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = load_pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    names = [run.label.replace("$", r"\$") for run in runs]
    for axis, (panel, label) in enumerate(zip(panels, ("steps", "tokens", "seconds in steps"), strict=True)):
        for number, run in enumerate(runs):
            color, dashes = f"C{number}", ("-", "--", ":", "-.")[number // 10 % 4]  # ten colors
            losses = [point.loss for point in run.training]
            panel.plot(
                [point[axis] for point in run.training], losses, dashes, color=color, linewidth=1, label=names[number]
            )
            measured = [point.loss for point in run.validation]
            panel.plot([point[axis] for point in run.validation], measured, "o", color=color, markersize=4)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss, nats per token")
    figure.suptitle("lines: training; points: validation", fontsize="small")
    column = 5 * max(map(len, names)) + 40  # points, of letters of 8 points and a line
    columns = max(1, min(len(runs), int(72 * figure.get_figwidth() // column)))
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=8, ncols=columns)
    save_figure(figure, path, dpi=120)
