"""The command ``mosa pretrain``."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from megatron_mosa.commands.arguments import ConfigPath, Overrides
from megatron_mosa.commands.training import start_training


def pretrain(
    config: ConfigPath,
    overrides: Overrides = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Check the configuration, layout and data, then exit.")
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", metavar="N", help="With --check-only: number of processes; default: 1."),
    ] = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,  # DeepSpeed's
) -> None:
    """Train a model, or go on from its newest checkpoint; the same as pretrain_mosa.py.

    For several processes: torchrun ... -m megatron_mosa pretrain CONFIG, or srun, or DeepSpeed's launcher.
    """
    gc.set_threshold(700, 10, 10)  # Python's default; short commands raise it, and cycles would keep tensors alive
    raise typer.Exit(start_training(config, overrides or [], check_only=check_only, world_size=world_size))
