"""The command ``mosa isoflop``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mosa.config import Config, load_config
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_mosa.scaling.isoflop import IsoflopModel

_PAPER_SPARSITIES = "2,4,8,16,32,64,128,256"  # those of the paper


def isoflop(
    config: Annotated[Path, typer.Argument(help="YAML file of a dense baseline, such as configs/paper/tiny.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that replace the file's")
    ] = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", metavar="RHO,RHO,...", help="Sparsities to solve for.")
    ] = _PAPER_SPARSITIES,
    dense_heads: Annotated[
        int, typer.Option("--dense-heads", metavar="N", help="Dense heads beside the MoSA heads; 0: pure MoSA.")
    ] = 4,
) -> None:
    """Print how many MoSA heads the FLOPs of a dense baseline buy (paper, section 4)."""
    baseline = load_config(config, overrides or [])
    sparsities = parse_sparsities(sparsity)
    from rich.console import Console  # slow to import, like the solver's torch

    from megatron_mosa.scaling.isoflop import solve_isoflop

    models = [solve_isoflop(baseline, rho, dense_heads) for rho in sparsities]
    Console().print(_table(baseline, models, title=f"{baseline.run.name}: MoSA at equal FLOPs"))
    print(
        "FLOPs: forward, one sequence, without the vocabulary. To train a row, override model.num_dense_heads,\n"
        "mosa.num_heads and mosa.sparsity."
    )


def parse_sparsities(text: str) -> list[float]:
    """Read ``2,4,8``.

    Raises:
        UserError: a part that is not a number.
    """
    sparsities = []
    for part in text.split(","):
        try:
            sparsities.append(float(part))
        except ValueError:
            raise UserError(
                f"--sparsity={text}: '{part.strip()}' is not a number; legal: numbers of 1 or more with commas "
                "between them, such as 2,4,8"
            ) from None
    return sparsities


def _table(baseline: Config, models: list[IsoflopModel], title: str) -> Table:
    """The baseline, then one row a sparsity."""
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
