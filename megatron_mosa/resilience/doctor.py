"""The command ``mosa doctor``."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import STOPPED


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        timeout: longest wait for the other ranks, in seconds, for each step of the preflight.
        minimum_disk: free space that the run directory needs, in GiB.
        slow: a GPU is bad if the job's median is more than this factor faster.
    """

    run_directory: Path
    json: Path | None
    timeout: float
    minimum_disk: float
    slow: float


def doctor(
    run_directory: Annotated[
        Path, typer.Option("--run-directory", metavar="PATH", help="The folder that all nodes shall write to.")
    ] = Path("runs"),
    json: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write all that was found, by rank, and bad_nodes.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Longest wait for the other ranks, in each step.")
    ] = 120.0,
    minimum_disk: Annotated[
        float, typer.Option("--minimum-disk", metavar="GIB", help="Free space that the run directory needs.")
    ] = 10.0,
    slow: Annotated[
        float, typer.Option("--slow", metavar="FACTOR", help="A GPU this much slower than the job's median is bad.")
    ] = 1.5,
) -> None:
    """Look at every node of a job before it trains; exit code 1 names the bad ones and what to do.

    Alone it looks at this machine; under srun, torchrun or DeepSpeed's launcher at all nodes, one process a task. If
    all is well but SIGUSR1 has asked the job to stop meanwhile, the exit code is 75.
    """
    for name, value, legal, is_legal in (
        ("timeout", timeout, "more than 0", timeout > 0),
        ("minimum-disk", minimum_disk, "0 or more", minimum_disk >= 0),
        ("slow", slow, "more than 1", slow > 1),
    ):
        if not is_legal:
            raise UserError(f"--{name}={value:g} is out of range; legal: {legal}")
    from megatron_mosa.resilience.doctor_job import examine_job

    notices: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: notices.append(number))
    code = examine_job(Settings(run_directory, json, timeout, minimum_disk, slow))
    signal.signal(signal.SIGUSR1, before)
    if code or notices:
        raise typer.Exit(code or STOPPED)
