"""The command ``mosa doctor``: its options and their checks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.cluster.doctor.options import DoctorOptions
from megatron_mosa.entry import check_output
from megatron_mosa.exit_codes import STOPPED
from megatron_mosa.options import bounds


def doctor(
    run_directory: Annotated[
        Path, typer.Option("--run-directory", metavar="PATH", help="The directory that all nodes will write to.")
    ] = Path("runs"),
    json: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write bad_nodes, all findings and each rank's facts.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            callback=bounds(above=0, most=86_400),
            help="Longest wait for the other ranks in each step.",
        ),
    ] = 120.0,
    minimum_disk: Annotated[
        float,
        typer.Option(
            "--minimum-disk",
            metavar="GIB",
            callback=bounds(0, 1_000_000_000),
            help="Free space required in the run directory.",
        ),
    ] = 10.0,
    slow: Annotated[
        float,
        typer.Option(
            "--slow",
            metavar="FACTOR",
            callback=bounds(above=1, most=1000),
            help="A GPU slower than the job's median by this factor is bad.",
        ),
    ] = 1.5,
) -> None:
    """Check every node of a job before it trains; if some are bad, name them and the fix, and exit with 1.

    Run alone, it checks this machine; under srun, torchrun or DeepSpeed's launcher, all nodes, with one process per
    task. If all nodes are healthy but SIGUSR1 has asked the job to stop in the meantime, it exits with 75.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # whose rank writes the file
        check_output("--json", json)
    from megatron_mosa.cluster.doctor.job import check_job

    notices: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: notices.append(number))
    code = check_job(DoctorOptions(run_directory, json, timeout, minimum_disk, slow))
    signal.signal(signal.SIGUSR1, before)
    if code or notices:
        raise typer.Exit(code or STOPPED)
