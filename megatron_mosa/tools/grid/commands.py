"""The commands ``mosa isoflop run``, ``mosa isoflop match`` and ``mosa report``."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import load_config
from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_STEPS, TimeLimit, bounds
from megatron_mosa.sbatch import Account, GpusPerNode, Partition, SbatchArguments, Slurm, sbatch_options

if TYPE_CHECKING:
    from megatron_mosa.tools.grid.grid import Grid
    from megatron_mosa.tools.grid.request import Request

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of mosa isoflop run.")]


def run(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Such as configs/grids/example.yaml.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Default: {run.directory}/{name of the grid}.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            callback=bounds(1, 10_000),
            help="Cells at once. Default: one per visible GPU, or one.",
        ),
    ] = None,
    time_limit: TimeLimit = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Afterwards, measure step and decoding of each model with nothing beside it."),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Only evaluate and measure what is trained.")] = False,
    remove_checkpoints: Annotated[
        bool, typer.Option("--remove-checkpoints", help="Remove those with which nothing is left to be measured.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", callback=bounds(1, MOST_STEPS), help="With --measure: measured steps. Default: 20."
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup", metavar="N", callback=bounds(1, MOST_STEPS), help="With --measure: steps before. Default: 5."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the models and their heads, and stop.")] = False,
    slurm: Slurm = False,
    gpus_per_node: GpusPerNode = None,
    partition: Partition = None,
    account: Account = None,
    sbatch_argument: SbatchArguments = None,
) -> None:
    """Train a grid of models at an equal budget: sizes, corpora, kinds of heads, sparsities, learning rates, seeds."""
    deadline = None if time_limit is None else time.time() + 60 * time_limit - min(60.0, 6 * time_limit)  # to save
    if no_train and slurm:
        raise UserError("--no-train evaluates and measures on this machine; run it without --slurm")
    options = sbatch_options(slurm, gpus_per_node, partition, account, sbatch_argument)
    check_output("--output", output, is_directory=True)
    request = replace(
        _request(grid, output, jobs),
        deadline=deadline,
        trains=not no_train,
        measures=measure,
        removes_checkpoints=remove_checkpoints,
        steps=steps or 20,
        warmup=warmup or 5,
    )
    for option, number in (("--steps", steps), ("--warmup", warmup)):
        if number is not None and not (measure or request.measures_first):
            raise UserError(f"{option}={number} is for what is measured; give --measure, too, or leave it out")
    from megatron_mosa.tools.grid.run import run_grid, table

    if dry_run:
        if request.grid.equal == "step_time":
            raise UserError("--dry-run: equal: step_time is measured, which a dry run does not do; leave it out")
        print(table(request.plan()))
        return
    if slurm:
        if time_limit is not None:
            options.append(f"--time={max(1, round(time_limit))}")
        request = _on_slurm(request, gpus_per_node or 0, partition, options, jobs)
    run_grid(request)


def _request(path: Path, output: Path | None, jobs: int | None) -> Request:
    from megatron_mosa.tools.grid.grid import read_grid
    from megatron_mosa.tools.grid.kinds import KINDS  # slow to import, like the others

    grid = read_grid(path, {name: kind.is_dense for name, kind in KINDS.items()})
    output = output or Path(_run_directory(grid)) / grid.name
    from megatron_mosa.tools.grid.launch import LocalLauncher
    from megatron_mosa.tools.grid.request import Request
    from megatron_mosa.tools.grid.run import cpu_name
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
    local = LocalLauncher(device, grid.processes, jobs or default, gpus)
    return Request(grid, output, local.jobs, local)


def _on_slurm(
    request: Request, gpus_per_node: int, partition: str | None, options: list[str], jobs: int | None
) -> Request:
    """Return the request with cells as jobs, all at once unless ``jobs`` limits them."""
    from megatron_mosa.tools.grid.launch import SlurmLauncher
    from megatron_mosa.tools.scaling.sweep_slurm import check_partition

    grid = request.grid
    if request.measures or request.measures_first:
        what = "--measure" if request.measures else "equal: step_time"
        raise UserError(f"{what} measures on this machine's device; run it without --slurm, within a job of its own")
    if gpus_per_node and grid.processes > gpus_per_node:
        raise UserError(
            f"{grid.path}: processes={grid.processes} do not fit a node of --gpus-per-node={gpus_per_node}; lower it"
        )
    check_partition(partition, gpus_per_node)
    device = f"Slurm, partition {partition}" if partition else "Slurm"
    launcher = SlurmLauncher(request.output.absolute(), grid.processes, gpus_per_node, options, device)
    return replace(request, jobs=jobs or 1000, slurm=launcher, deadline=None)


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
    print(f"Wrote {', '.join(files)} to {target}")


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
