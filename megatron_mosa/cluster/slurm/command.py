"""The command ``mosa submit``: checks a configuration and submits it as a Slurm job."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.config import check_plan, load_config, origins
from megatron_mosa.errors import UserError
from megatron_mosa.options import bounds
from megatron_mosa.sbatch import MOST_GPUS_PER_NODE, SbatchArguments, check_sbatch_option, check_sbatch_value, value_of

_OURS = {
    "nodes": "use --nodes",
    "ntasks": "use --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node",
    "gpus-per-node": "use --gpus-per-node",
    "cpus-per-task": "use --cpus-per-task",
    "job-name": "use run.name",
    "output": "use run.directory",
    "chdir": "call mosa submit in that directory",
    "array": "a run is one job; use --chain for several in turn",
    "wrap": "leave it out",
}
"""Options of sbatch that mosa submit sets itself, or that contradict its script, and what to do instead."""


def submit(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/first_gpu_run.yaml; its data must exist")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", callback=bounds(1, 100_000), help="Number of nodes.")
    ] = 1,
    tasks_per_node: Annotated[
        int | None,
        typer.Option(
            "--tasks-per-node",
            metavar="M",
            callback=bounds(1, 1024),
            help="Processes per node. Default: --gpus-per-node, or 1.",
        ),
    ] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="T", help="Time limit, as in 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="P")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="A")] = None,
    qos: Annotated[str | None, typer.Option("--qos", metavar="Q")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="G", callback=bounds(1, MOST_GPUS_PER_NODE))
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", metavar="C", callback=bounds(1, 4096))] = None,
    exclude: Annotated[str | None, typer.Option("--exclude", metavar="NODES", help="Nodes to exclude.")] = None,
    sbatch_argument: SbatchArguments = None,
    chain: Annotated[
        int,
        typer.Option(
            "--chain",
            metavar="N",
            callback=bounds(1, 1000),
            help="Submit N jobs that run in turn, for clusters without requeue.",
        ),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job script and the command, but write and submit nothing.")
    ] = False,
) -> None:
    """Check a configuration and its layout, and submit the run as a Slurm job that restarts until it is done."""
    settings = load_config(config, overrides or [], checks_batches=False)
    check_plan(settings, origins(config, overrides or []))
    named = {"time": time, "partition": partition, "account": account, "qos": qos, "exclude": exclude}
    for name, value in named.items():
        check_sbatch_value(name, value)
    named |= {"gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task}
    for option in sbatch_argument or []:
        check_sbatch_option(option, _OURS, is_line=True)
    options = [f"--{name}={value}" for name, value in named.items() if value is not None] + (sbatch_argument or [])
    if tasks_per_node is None and gpus_per_node is None:
        _refuse_gpus_of_unknown_number(sbatch_argument or [])
    from megatron_mosa.cluster.slurm.submit import Request, prepare, require_sbatch

    if not dry_run:
        require_sbatch()

    request = Request(nodes, tasks_per_node or gpus_per_node or 1, tuple(options), chain)
    submission = prepare(settings, request, shlex.join(["mosa", *sys.argv[1:]]))
    if dry_run:
        print(submission.script)
        print(f"# {shlex.join(submission.sbatch())}")
        if chain > 1:
            print(f"# then {chain - 1} more, each after the previous job: --dependency=afterany:JOB")
        return
    jobs = submission.submit()
    print(f"job {', then '.join(jobs)}: {nodes} node(s) x {request.tasks_per_node} task(s)")
    print(f"files:  {submission.folder}")
    print(f"log:    {submission.run}/logs/slurm-{jobs[0]}.out")
    print(f"watch:  mosa status {shlex.quote(str(submission.run))} --watch;  squeue -j {','.join(jobs)}")
    print(f"cancel: scancel {' '.join(jobs)}")


def _refuse_gpus_of_unknown_number(options: list[str]) -> None:
    """Raise a UserError if sbatch would allocate GPUs although nothing says how many tasks a node has."""
    for name in ("gres", "gpus", "gpus-per-socket", "gpus-per-task"):
        value = value_of(name, options)
        if value is not None and (name != "gres" or "gpu" in value):
            raise UserError(
                f"--{name}={value} allocates GPUs, but a node would have one task, which uses one; give "
                "--gpus-per-node, or --tasks-per-node beside it"
            )
