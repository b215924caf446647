"""The commands ``mosa isoflop run``, ``mosa isoflop match`` and ``mosa report``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import load_config
from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron_mosa.tools.grid.grid import Grid
    from megatron_mosa.tools.grid.run import Request

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of mosa isoflop run.")]


def run(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Such as configs/grids/example.yaml.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Default: {run.directory}/{name of the grid}.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", help="Cells at once. Default: one per visible GPU, or one.")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", metavar="MINUTES", help="Save and stop by then; the same command goes on later."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Afterwards, measure the step of each model with nothing beside it.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="With --measure: measured steps.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", metavar="N", help="With --measure: steps before them.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the models and their heads, and stop.")] = False,
) -> None:
    """Train a grid of models at an equal budget: sizes, corpora, kinds of heads, sparsities, learning rates, seeds."""
    for name, value, least in (("jobs", jobs, 1), ("steps", steps, 1), ("warmup", warmup, 1)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if time_limit is not None and time_limit <= 0:
        raise UserError(f"--time-limit must be above 0, got {time_limit:g}")
    deadline = None if time_limit is None else time.time() + 60 * time_limit - min(60.0, 6 * time_limit)  # to save
    check_output("--output", output, is_directory=True)
    request = _request(grid, output, jobs, deadline, measure, steps, warmup)
    from megatron_mosa.tools.grid.run import run_grid, table

    if dry_run:
        if request.grid.equal == "step_time":
            raise UserError("--dry-run: equal: step_time is measured, which a dry run does not do; leave it out")
        print(table(request.plan()))
        return
    run_grid(request)


def _request(
    path: Path, output: Path | None, jobs: int | None, deadline: float | None, measure: bool, steps: int, warmup: int
) -> Request:
    from megatron_mosa.tools.grid.grid import read_grid
    from megatron_mosa.tools.grid.kinds import KINDS  # slow to import, like the others

    grid = read_grid(path, {name: kind.is_dense for name, kind in KINDS.items()})
    output = output or Path(_run_directory(grid)) / grid.name
    from megatron_mosa.tools.grid.run import Request, cpu_name
    from megatron_mosa.tools.scaling.memory import card

    gpus = _gpus()
    if gpus and len(gpus) < grid.processes:
        raise UserError(
            f"{path}: processes={grid.processes} need as many GPUs, but {len(gpus)} are visible; lower it, or make "
            "more visible (CUDA_VISIBLE_DEVICES)"
        )
    default = max(1, len(gpus) // grid.processes)
    here = card() if gpus else None
    device = here.name if here is not None else "GPU" if gpus else cpu_name()
    return Request(grid, output, jobs or default, gpus, device, deadline, measure, steps, warmup)


def _run_directory(grid: Grid) -> str:
    try:
        return load_config(grid.base, checks_batches=False).run.directory
    except UserError as error:
        raise UserError(f"{grid.path}: base: {error}") from None


def _gpus() -> tuple[str, ...]:
    """Return the identifiers of the visible GPUs, without creating a CUDA context."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(count))) if visible is None else tuple(filter(None, visible.split(",")))[:count]


def report(
    folder: _Folder,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where report.md and its pictures go. Default: DIR.")
    ] = None,
) -> None:
    """Report on a grid: perplexity against sparsity, parameters, step time, memory and cache; losses; seeds."""
    check_output("--output", output, is_directory=True)
    from megatron_mosa.tools.grid.report import write_report
    from megatron_mosa.tools.grid.results import read_results

    rows = read_results(folder)
    target = output or folder
    files = write_report(rows, folder, target)
    print(f"Wrote {', '.join(files[:-1])} and {files[-1]} to {target}")


def match(folder: _Folder) -> None:
    """Print the fewest heads that match the reference's perplexity, with what they cost, beside the paper's table."""
    from megatron_mosa.tools.grid.match import matched, table
    from megatron_mosa.tools.grid.results import read_results

    rows = read_results(folder)
    if not any(row.heads_given for row in rows):
        raise UserError(
            f"{folder} has no member whose numbers of heads are given; add one to the grid, such as heads: "
            "[12, 16, 20], and run it again"
        )
    print("\n".join(table(matched(rows))))
