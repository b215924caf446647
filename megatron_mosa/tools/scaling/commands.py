"""The commands ``mosa isoflop`` and ``mosa sweep``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import Config, load_config
from megatron_mosa.errors import UserError

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
        int, typer.Option("--dense-heads", metavar="N", help="Dense heads next to the MoSA heads; 0: pure MoSA.")
    ] = 4,
) -> None:
    """Print how many MoSA heads the FLOPs of a dense baseline buy (paper, section 4)."""
    baseline = load_config(config, overrides or [])
    sparsities = parse_sparsities(sparsity)
    from rich.console import Console  # slow to import, like the solver's torch

    from megatron_mosa.tools.scaling.isoflop import solve_isoflop

    models = [solve_isoflop(baseline, rho, dense_heads) for rho in sparsities]
    Console().print(_table(baseline, models, title=f"{baseline.run.name}: MoSA at equal FLOPs"))
    print(
        "FLOPs are of the forward pass of one sequence, without the vocabulary. To train a row, override\n"
        "model.num_dense_heads, mosa.num_heads and mosa.sparsity."
    )


def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml; its dataset is built")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            metavar="tp=N,sp=BOOL,zero=N,micro=N",
            help="A layout to measure; repeatable. Omitted keys are the file's. Default: every useful one.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="Default: one per visible GPU, or 2 on a CPU.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Measured steps.")] = 6,
    warmup: Annotated[int, typer.Option("--warmup", metavar="N", help="Warm-up steps before them.")] = 2,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Default: {run.directory}/{run.name}-sweep.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another sweep's results in DIR.")] = False,
) -> None:
    """Measure layouts (TP, SP, ZeRO, micro-batch) at one global batch from one seed checkpoint, on this machine."""
    settings = load_config(config, overrides or [], checks_batches=False)  # check_layouts does
    for name, value, least in (("processes", processes, 1), ("steps", steps, 1), ("warmup", warmup, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    from megatron_mosa.tools.scaling.layouts import check_layouts, default_layouts, parse_layout

    given = [parse_layout(text, settings) for text in layout or []]
    device, default_processes = _device_and_processes()
    processes = processes or default_processes
    layouts = given or default_layouts(settings, processes)
    check_layouts(settings, layouts, processes)
    from megatron_mosa.tools.scaling.sweep import Request, run_sweep  # slow to import, so mistakes are reported first

    parts = ["mosa", "sweep", str(config), *(overrides or [])]
    parts += [part for text in layout or [] for part in ("--layout", text)]
    parts += ["--processes", str(processes), "--steps", str(steps), "--warmup", str(warmup)]
    output = output or settings.run.path.with_name(f"{settings.run.name}-sweep")
    run_sweep(Request(settings, layouts, processes, warmup, steps, output, shlex.join(parts), device), force=force)


def _device_and_processes() -> tuple[str, int]:
    """Return the device type and the number of ranks, a power of two so that batch sizes divide by it."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
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
        table.add_column(name, justify="right")
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
