"""The commands ``mosa isoflop`` and ``mosa sweep``."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import Config, load_config
from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_HEADS, MOST_PROCESSES, MOST_STEPS, TimeLimit, bounds
from megatron_mosa.sbatch import Account, GpusPerNode, Partition, SbatchArguments, Slurm, sbatch_options
from megatron_mosa.utils import table_console

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_mosa.tools.scaling.isoflop import IsoflopModel

_PAPER_SPARSITIES = "2,4,8,16,32,64,128,256"  # as in the paper


def isoflop(
    config: Annotated[Path, typer.Argument(help="YAML file of a dense baseline, such as configs/paper/tiny.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", metavar="RHO,RHO,...", help="Sparsities to solve for.")
    ] = _PAPER_SPARSITIES,
    dense_heads: Annotated[
        int,
        typer.Option(
            "--dense-heads",
            metavar="N",
            callback=bounds(0, MOST_HEADS),
            help="Dense heads next to the MoSA heads; 0: pure MoSA.",
        ),
    ] = 4,
) -> None:
    """Print how many MoSA heads the FLOPs of a dense baseline buy (paper, section 4).

    mosa isoflop run GRID.yaml trains a grid of models at an equal budget, and mosa isoflop match DIR finds the fewest
    heads that match the baseline's perplexity: each has a --help of its own.
    """
    baseline = load_config(config, overrides or [])
    sparsities = parse_sparsities(sparsity)
    from megatron_mosa.tools.scaling.isoflop import solve_isoflop

    models = [solve_isoflop(baseline, rho, dense_heads) for rho in sparsities]
    table_console().print(_table(baseline, models, title=f"{baseline.run.name}: MoSA at equal FLOPs"))
    print(
        "FLOPs are of the forward pass of one sequence, without the vocabulary. To train a row, override\n"
        "model.num_dense_heads, mosa.num_heads and mosa.sparsity."
    )


def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            metavar="tp=N,sp=BOOL,zero=N,micro=N,overlap=BOOL,processes=N",
            help="A layout, by any of these, the others as in CONFIG; repeatable. Default: every useful one.",
        ),
    ] = None,
    processes: Annotated[
        str | None,
        typer.Option("--processes", metavar="N,N,...", help="Default: one per visible GPU, or 2 on a CPU."),
    ] = None,
    weak: Annotated[
        int | None,
        typer.Option(
            "--weak",
            metavar="N",
            callback=bounds(1, 2**24),
            help="Also measure weak scaling, at N samples a step and process.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", callback=bounds(1, MOST_STEPS), help="Measured steps.")
    ] = 6,
    warmup: Annotated[
        int, typer.Option("--warmup", metavar="N", callback=bounds(0, MOST_STEPS), help="Warm-up steps before them.")
    ] = 2,
    reference: Annotated[
        str, typer.Option("--reference", metavar="training|fp32", help="Precision of what losses are compared with.")
    ] = "training",
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="Measure on random tokens; no dataset is needed.")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            metavar="GIB",
            callback=bounds(above=0, most=1_000_000),
            help="Memory of a device, to predict what fits. Default: this one's.",
        ),
    ] = None,
    time_limit: TimeLimit = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Default: {run.directory}/{run.name}-sweep.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", metavar="DIR", help="Another card's sweep to compare with; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another sweep's results in DIR.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be measured, and stop.")] = False,
    slurm: Slurm = False,
    gpus_per_node: GpusPerNode = None,
    partition: Partition = None,
    account: Account = None,
    sbatch_argument: SbatchArguments = None,
    job_per_layout: Annotated[
        bool, typer.Option("--job-per-layout", help="With --slurm: a job per layout, all at once.")
    ] = False,
) -> None:
    """Measure layouts (TP, SP, ZeRO, micro-batch) and process counts from the same weights, on the same data."""
    settings = load_config(config, overrides or [], checks_batches=False)  # plan_cells does
    if reference not in ("training", "fp32"):
        raise UserError(f"--reference must be training or fp32, got {reference}")
    deadline = None if time_limit is None else time.time() + 60 * time_limit
    counts = parse_counts(processes) if processes is not None else []
    options = sbatch_options(slurm, gpus_per_node, partition, account, sbatch_argument)
    check_output("--output", output, is_directory=True)
    if job_per_layout and not slurm:
        raise UserError("--job-per-layout needs --slurm; give it, or leave both out to measure on this machine")
    from megatron_mosa.tools.scaling.cells import plan_cells
    from megatron_mosa.tools.scaling.layouts import parse_layout

    given = [parse_layout(text, settings) for text in layout or []]
    own = sorted({one.processes for one in given if one.processes})
    if slurm:
        device, default = "cuda" if gpus_per_node else "cpu", gpus_per_node or 2
    else:
        device, default = _device_and_processes()
    counts = counts or ([] if own and all(one.processes for one in given) else [default])
    if device == "cuda" and not slurm and (most := max([*counts, *own])) > _gpus():
        raise UserError(f"{most} processes need {most} GPUs, but {_gpus()} are visible; use fewer, or --slurm")
    cells = plan_cells(settings, given, counts, weak)
    from megatron_mosa.tools.scaling.sweep import plan, run_sweep  # slow to import, so mistakes come first
    from megatron_mosa.tools.scaling.sweep_request import Request

    flags = ["--reference", "fp32"] * (reference == "fp32") + ["--random-tokens"] * random_tokens
    output = output or settings.run.path.with_name(f"{settings.run.name}-sweep")
    _check_beside(beside or [], output)
    request = Request(
        settings,
        cells,
        warmup,
        steps,
        output,
        _command(config, overrides, layout, counts, {"steps": steps, "warmup": warmup, "weak": weak}, flags),
        device,
        weak=weak,
        fp32_reference=reference == "fp32",
        random_tokens=random_tokens,
        memory_gib=memory,
        deadline=deadline,
        elsewhere=slurm,
        session_per_cell=job_per_layout,
        beside=tuple(beside or []),
    )
    if dry_run:
        for cell, needed, objection in plan(request):
            print(f"{cell}, batch {cell.global_batch}: {objection or f'at least {needed:.1f} GiB on each rank'}")
        return
    from megatron_mosa.tools.scaling.sweep_slurm import SlurmRun, check_partition, refuse_running_jobs

    if force:
        refuse_running_jobs(output)
    if not slurm:
        run_sweep(request, force=force)
        return
    check_partition(partition, gpus_per_node or 0)
    if time_limit is not None:
        options.append(f"--time={max(1, round(time_limit))}")
    run_sweep(request, SlurmRun(output.absolute(), gpus_per_node or 0, tuple(options)), force=force)


def _check_beside(folders: list[Path], output: Path) -> None:
    seen = {os.path.realpath(output)}
    for folder in folders:
        if (path := os.path.realpath(folder)) in seen:
            raise UserError(f"--beside={folder} is --output itself or given twice; give other sweeps, each once")
        seen.add(path)


def _command(
    config: Path,
    overrides: list[str] | None,
    layouts: list[str] | None,
    counts: list[int],
    numbers: dict[str, int | None],
    flags: list[str],
) -> str:
    """Return the command that measures the same, for the report."""
    parts = ["mosa", "sweep", str(config), *(overrides or [])]
    parts += [part for text in layouts or [] for part in ("--layout", text)]
    if counts:
        parts += ["--processes", ",".join(map(str, counts))]
    parts += [part for name, value in numbers.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join([*parts, *flags])


def parse_counts(text: str) -> list[int]:
    """Parse numbers of processes such as ``1,2,4``.

    Raises:
        UserError: a part that is not an integer of at least 1, or is given twice.
    """
    counts = []
    for part in text.split(","):
        try:
            count = int(part)
        except ValueError:
            raise UserError(
                f"--processes={text}: '{part.strip()}' is not an integer; give such as 4, or 1,2,4"
            ) from None
        if not 1 <= count <= MOST_PROCESSES:
            raise UserError(f"--processes must be at least 1 and at most {MOST_PROCESSES}, got {count}")
        if count in counts:
            raise UserError(f"--processes={text}: {count} is given twice; give it once")
        counts.append(count)
    return sorted(counts)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device_and_processes() -> tuple[str, int]:
    """Return the device type and the default number of ranks, a power of two so that batch sizes divide by it."""
    gpus = _gpus()
    return ("cuda", 2 ** (gpus.bit_length() - 1)) if gpus else ("cpu", 2)


def parse_sparsities(text: str) -> list[float]:
    """Parse comma-separated sparsities such as ``2,4,8``.

    Raises:
        UserError: a part that is not a number.
    """
    sparsities = []
    for part in text.split(","):
        try:
            sparsities.append(float(part))
        except ValueError:
            raise UserError(
                f"--sparsity={text}: '{part.strip()}' is not a number; give comma-separated numbers of at least 1, "
                "such as 2,4,8"
            ) from None
    return sparsities


def _table(baseline: Config, models: list[IsoflopModel], title: str) -> Table:
    """Return the table: the baseline, then one row per sparsity."""
    from rich.table import Table

    from megatron_mosa.model import paper_flops, parameter_count

    table = Table(title=title)
    for name in ("sparsity", "k", "dense heads", "MoSA heads", "GFLOP", "share", "parameters"):
        table.add_column(name, justify="right", overflow="fold")
    parameters = parameter_count(baseline, baseline.data.vocab_size)
    flops = f"{paper_flops(baseline) / 1e9:.2f}"
    table.add_row("dense", "", str(baseline.model.num_dense_heads), "0", flops, "100.00 %", f"{parameters / 1e6:.1f} M")
    for model in models:
        table.add_row(
            f"{model.config.mosa.sparsity:g}",
            str(model.num_selected),
            str(model.config.model.num_dense_heads),
            str(model.num_mosa_heads),
            f"{model.flops / 1e9:.2f}",
            f"{100 * model.share:.2f} %",
            f"{model.parameters / 1e6:.1f} M",
        )
    return table
