"""The command ``mosa submit``: checks a configuration and submits it as a Slurm job."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.config import check_plan, load_config, origins
from megatron_mosa.errors import UserError

_MOST = {"nodes": 100_000, "tasks-per-node": 1024, "chain": 1000, "gpus-per-node": 1024, "cpus-per-task": 4096}
_NAME, _NODES = r"\w[\w.:@+-]*", r"\w[\w.-]*(\[[\d,-]+\][\w.-]*)*"
_PATTERNS = {
    "time": (r"\d{1,8}(:\d\d){0,2}|\d{1,5}-\d\d?(:\d\d){0,2}|UNLIMITED|INFINITE", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS"),
    "partition": (rf"{_NAME}(,{_NAME})*", "names of partitions, with commas between them"),
    "account": (_NAME, "the name of an account"),
    "qos": (rf"{_NAME}(,{_NAME})*", "the name of a quality of service"),
    "exclude": (rf"{_NODES}(,{_NODES})*", "names of nodes, as in n3,n[5-7]"),
}
"""What Slurm would accept, as a regular expression and in words."""

_MEMORY = (r"\d+([KMGT]B?)?", "a number of megabytes, or one with K, M, G or T, as in 64G")
_OTHER_PATTERNS = _PATTERNS | {
    "time-min": _PATTERNS["time"],
    "nodelist": _PATTERNS["exclude"],
    "signal": (r"([BR]{1,2}:)?(\d+|[A-Z][A-Z0-9]*)(@\d+)?", "[B:]SIGNAL[@SECONDS], as in USR1@600"),
} | dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu", "tmp"), _MEMORY)  # fmt: skip
"""The same for values of other options that --sbatch-argument passes on."""

_LETTERS = {
    "t": "time",
    "p": "partition",
    "A": "account",
    "q": "qos",
    "x": "exclude",
    "w": "nodelist",
    "N": "nodes",
    "n": "ntasks",
    "J": "job-name",
    "D": "chdir",
    "o": "output",
    "a": "array",
    "c": "cpus-per-task",
}
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
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml; its dataset is built")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="Number of nodes.")] = 1,
    tasks_per_node: Annotated[
        int | None,
        typer.Option("--tasks-per-node", metavar="M", help="Processes per node. Default: --gpus-per-node, or 1."),
    ] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="T", help="Time limit, as in 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="P")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="A")] = None,
    qos: Annotated[str | None, typer.Option("--qos", metavar="Q")] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", metavar="G")] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", metavar="C")] = None,
    exclude: Annotated[str | None, typer.Option("--exclude", metavar="NODES", help="Nodes to exclude.")] = None,
    sbatch_argument: Annotated[
        list[str] | None,
        typer.Option("--sbatch-argument", metavar="--X=Y", help="Any other option of sbatch; repeatable."),
    ] = None,
    chain: Annotated[
        int, typer.Option("--chain", metavar="N", help="Submit N jobs that run in turn, for clusters without requeue.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job script and the command, but write and submit nothing.")
    ] = False,
) -> None:
    """Check a configuration and its layout, and submit the run as a Slurm job that restarts until it is done."""
    settings = load_config(config, overrides or [], checks_batches=False)
    check_plan(settings, origins(config, overrides or []))
    counts = {"nodes": nodes, "tasks-per-node": tasks_per_node, "chain": chain}
    for name, value in (counts | {"gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task}).items():
        if value is not None and not 1 <= value <= _MOST[name]:
            raise UserError(f"--{name} must be between 1 and {_MOST[name]}, got {value}")
    named = {"time": time, "partition": partition, "account": account, "qos": qos, "exclude": exclude}
    for name, value in named.items():
        pattern, example = _PATTERNS[name]
        if value is not None and not (re.fullmatch(pattern, value, re.ASCII) and _ascend(value)):
            raise UserError(f"--{name} must be {example}, got {value!r}")
    named |= {"gpus-per-node": gpus_per_node, "cpus-per-task": cpus_per_task}
    for option in sbatch_argument or []:
        check_sbatch_option(option)
    options = [f"--{name}={value}" for name, value in named.items() if value is not None] + (sbatch_argument or [])
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
    print(f"watch:  mosa status {submission.run} --watch;  squeue -j {','.join(jobs)}")
    print(f"cancel: scancel {' '.join(jobs)}")


def check_sbatch_option(option: str) -> None:
    """Check an option for an #SBATCH line, in which Slurm splits words and reads quotes as a shell does.

    Raises:
        UserError: it is not one option, Slurm would refuse its value, or it contradicts what has been checked.
    """
    match = re.fullmatch(r"--([A-Za-z][A-Za-z0-9-]*)(?:=(.*))?|-([A-Za-z])=?(.*)", option, re.ASCII)
    if match is None or not option.isprintable():
        raise UserError(f"--sbatch-argument={option!r} is not an option of sbatch; give one such as --mem=0")
    if bad := sorted(set(re.findall(r"[\s\"'\\\\#]", option))):
        raise UserError(
            f"--sbatch-argument={option!r} contains {bad[0]!r}, with which Slurm would not read it as one option; "
            "leave it out"
        )
    name, value = match[1] or _LETTERS.get(match[3], match[3]), (match[2] if match[1] else match[4]) or ""
    if name in _OURS:
        raise UserError(f"--sbatch-argument={option} would override what mosa submit has checked; {_OURS[name]}")
    pattern, example = _OTHER_PATTERNS.get(name, (".*", ""))
    if not (re.fullmatch(pattern, value, re.ASCII) and (name not in ("exclude", "nodelist") or _ascend(value))):
        raise UserError(f"--sbatch-argument={option}: --{name} must be {example}, got {value!r}")


def _ascend(value: str) -> bool:
    """Return whether all ranges in brackets, as in n[1-4], ascend; there need not be any."""
    ranges = (part.split("-") for inside in re.findall(r"\[([^\]]*)\]", value) for part in inside.split(","))
    return all(all(numbers) and len(numbers) <= 2 and int(numbers[0]) <= int(numbers[-1]) for numbers in ranges)
