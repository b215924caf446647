"""Options of sbatch: those of the commands that submit jobs, and what Slurm would accept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.errors import UserError
from megatron_mosa.options import bounds

MOST_GPUS_PER_NODE = 1024
_MOST_NODES = 65_536  # MAX_SLURM_NODES
_MOST_DIGITS = 18  # of a number in a range, which may begin with zeros
_NAME, _NODES = r"\w[\w.:@+-]*", r"\w[\w.-]*(\[[\d,-]+\][\w.-]*)*"
_PATTERNS = {
    "time": (r"\d{1,8}(:\d\d){0,2}|\d{1,5}-\d\d?(:\d\d){0,2}|UNLIMITED|INFINITE", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS"),
    "partition": (rf"{_NAME}(,{_NAME})*", "names of partitions, with commas between them"),
    "account": (_NAME, "the name of an account"),
    "qos": (rf"{_NAME}(,{_NAME})*", "the name of a quality of service"),
    "exclude": (rf"{_NODES}(,{_NODES})*", f"names of nodes, as in n3,n[5-7], at most {_MOST_NODES:,}"),
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
    "G": "gpus",
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

Slurm = Annotated[bool, typer.Option("--slurm", help="Submit Slurm jobs, wait for them and collect the results.")]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node", metavar="G", callback=bounds(0, MOST_GPUS_PER_NODE), help="With --slurm; 0: use CPUs."
    ),
]
Partition = Annotated[str | None, typer.Option("--partition", metavar="P", help="With --slurm.")]
Account = Annotated[str | None, typer.Option("--account", metavar="A", help="With --slurm.")]
SbatchArguments = Annotated[
    list[str] | None,
    typer.Option("--sbatch-argument", metavar="--X=Y", help="Any other option of sbatch; repeatable."),
]
_TAKEN = {
    "nodes": "it follows from the number of processes",
    "ntasks": "it follows from the number of processes",
    "ntasks-per-node": "it follows from the number of processes",
    "gpus-per-node": "use --gpus-per-node",
    "partition": "use --partition",
    "account": "use --account",
    "job-name": "leave it out",
    "output": "use --output",
    "chdir": "call the command in that directory",
    "array": "leave it out",
    "wrap": "leave it out",
}
"""Options of sbatch that ``mosa sweep`` and ``mosa isoflop run`` set themselves, and what to do instead."""


def sbatch_options(
    slurm: bool, gpus_per_node: int | None, partition: str | None, account: str | None, others: list[str] | None
) -> list[str]:
    """Check the options above, which need --slurm, and return those that sbatch takes as they are.

    Raises:
        UserError: one is given without --slurm, --slurm without --gpus-per-node, or Slurm would refuse one.
    """
    if slurm and gpus_per_node is None:
        raise UserError("--slurm needs --gpus-per-node: the GPUs of a node, or 0 to measure on CPUs")
    if not slurm and (gpus_per_node is not None or partition or account or others):
        raise UserError(
            "--gpus-per-node, --partition, --account and --sbatch-argument need --slurm; give it, or leave them out to "
            "use this machine"
        )
    named = {"partition": partition, "account": account}
    for name, value in named.items():
        check_sbatch_value(name, value)
    for option in others or []:
        check_sbatch_option(option, _TAKEN)
    return [f"--{name}={value}" for name, value in named.items() if value is not None] + (others or [])


def check_sbatch_value(name: str, value: str | None) -> None:
    """Check the value of --time, --partition, --account, --qos or --exclude; None: it is not given.

    Raises:
        UserError: Slurm would refuse it.
    """
    pattern, example = _PATTERNS[name]
    if value is not None and not (re.fullmatch(pattern, value, re.ASCII) and _are_nodes(value)):
        raise UserError(f"--{name} must be {example}, got {value!r}")


def check_sbatch_option(option: str, taken: Mapping[str, str], *, is_line: bool = False) -> None:
    """Check what --sbatch-argument passes on to sbatch.

    Args:
        taken: options that the command sets itself, and what to do instead.
        is_line: it becomes an #SBATCH line, in which Slurm splits words and reads quotes as a shell does.

    Raises:
        UserError: it is not one option, Slurm would refuse its value, or it is one of ``taken``.
    """
    parsed = _parse(option)
    if parsed is None or not option.isprintable():
        raise UserError(f"--sbatch-argument={option!r} is not an option of sbatch; give one such as --mem=0")
    if is_line and (bad := unfit_for_a_line(option)):
        raise UserError(
            f"--sbatch-argument={option!r} contains {bad!r}, with which Slurm would not read it as one option; "
            "leave it out"
        )
    name, value = parsed
    if name in taken:
        raise UserError(f"--sbatch-argument={option} would override what this command sets; {taken[name]}")
    pattern, example = _OTHER_PATTERNS.get(name, (".*", ""))
    if not (re.fullmatch(pattern, value, re.ASCII) and (name not in ("exclude", "nodelist") or _are_nodes(value))):
        raise UserError(f"--sbatch-argument={option}: --{name} must be {example}, got {value!r}")


def value_of(name: str, options: Sequence[str]) -> str | None:
    """Return the value of an option, of which Slurm takes the last, or None."""
    parsed = [_parse(option) for option in options]
    return next((found[1] for found in reversed(parsed) if found is not None and found[0] == name), None)


def _parse(option: str) -> tuple[str, str] | None:
    """Return the long name and the value of an option of sbatch; None: it is not one."""
    match = re.fullmatch(r"--([A-Za-z][A-Za-z0-9-]*)(?:=(.*))?|-([A-Za-z])=?(.*)", option, re.ASCII)
    if match is None:
        return None
    return match[1] or _LETTERS.get(match[3], match[3]), (match[2] if match[1] else match[4]) or ""


def seconds_of(time: str) -> float:
    """Return the seconds of a time limit that ``check_sbatch_value`` takes; infinity for none, which 0 means, too."""
    if not time[0].isdigit():
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or math.inf


def unfit_for_a_line(text: str) -> str | None:
    """Return a character of ``text`` that it must not contain in an #SBATCH line, or None.

    Slurm splits words and reads quotes and comments there as a shell does.
    """
    return next((sign for sign in text if sign in "\"'\\#" or sign.isspace() or not sign.isprintable()), None)


def as_pattern(path: Path) -> str:
    """Return a path for --output, in which Slurm replaces what follows a percent sign."""
    return str(path).replace("%", "%%")


def _are_nodes(value: str) -> bool:
    """Return whether all ranges in brackets, as in n[1-4], ascend, and name no more nodes than Slurm would take.

    There need not be any ranges.
    """
    nodes = 0
    for name in re.sub(r"\[[^\]]*\]", lambda inside: inside[0].replace(",", ";"), value).split(","):
        named = 1
        for inside in re.findall(r"\[([^\]]*)\]", name):
            ranges = [part.split("-") for part in inside.split(";")]
            if not all(all(ends) and len(ends) <= 2 and max(map(len, ends)) <= _MOST_DIGITS for ends in ranges):
                return False
            sizes = [int(ends[-1]) - int(ends[0]) + 1 for ends in ranges]
            if min(sizes) < 1:
                return False
            named *= sum(sizes)
        nodes += named
    return nodes <= _MOST_NODES
