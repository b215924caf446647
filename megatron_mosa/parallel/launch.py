"""Rank and world size of this process under torchrun, DeepSpeed's launcher, srun or plain python."""

from __future__ import annotations

import os
import socket
import subprocess

from megatron_mosa.errors import UserError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def job_port(job: int, start: int = 0) -> int:
    """Return a port for the ranks of a Slurm job to meet at; the scripts in launch/ use the same rule.

    Args:
        start: number of earlier starts in the job, whose ports may still be in use.
    """
    return 20000 + (job + 100 * start) % 10000


def launch_environment() -> tuple[int, int, int]:
    """Return the rank, world size and local rank of this process, and set the variables that torch.distributed needs.

    torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE and LOCAL_RANK. Under srun they are derived from Slurm's
    variables: the first node of the job is the master, and the job id determines the port. Plain python has a world
    size of one. MASTER_ADDR and MASTER_PORT are set unless they are already.

    Raises:
        UserError: a variable of the launcher is missing, no number or out of range, or scontrol cannot resolve the
            job's nodes.
    """
    environment = os.environ
    if "RANK" in environment or "LOCAL_RANK" in environment or _number("WORLD_SIZE", default=1, least=1) > 1:
        given = [name for name in _LAUNCHER if name in environment]
        if missing := [name for name in _LAUNCHER if name not in environment]:
            verb = "is" if len(given) == 1 else "are"
            raise UserError(
                f"{' and '.join(given)} {verb} set, but {' and '.join(missing)} not; start with torchrun, srun or "
                "deepspeed, or set none of them for one process"
            )
        world_size = _number("WORLD_SIZE", least=1)
        rank, local_rank = (_number(name, most=world_size - 1, reason="WORLD_SIZE") for name in ("RANK", "LOCAL_RANK"))
    elif _number("SLURM_STEP_NUM_TASKS", default=1, least=1) > 1:  # set by srun, but not in the batch script
        world_size = _number("SLURM_STEP_NUM_TASKS")
        rank, local_rank = (
            _number(name, most=world_size - 1, reason="SLURM_STEP_NUM_TASKS")
            for name in ("SLURM_PROCID", "SLURM_LOCALID")
        )
        environment.setdefault("MASTER_PORT", str(job_port(_number("SLURM_JOB_ID"))))
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_slurm_node()
    else:
        rank, world_size, local_rank = 0, 1, 0
    if world_size == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    if not environment.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR must be the address of rank 0's node for {world_size} processes, but is not set")
    if any(character.isspace() or not character.isprintable() for character in environment["MASTER_ADDR"]):
        raise UserError(
            f"MASTER_ADDR in the environment must be a name or address, got {environment['MASTER_ADDR']!r}; the "
            "launcher sets it"
        )
    _number("MASTER_PORT", least=1, most=65535)
    _number("LOCAL_WORLD_SIZE", default=1, least=1)
    # DeepSpeed reads these under every launcher.
    environment.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    return rank, world_size, local_rank


def _number(name: str, *, default: int | None = None, least: int = 0, most: int | None = None, reason: str = "") -> int:
    """Return a number in the environment; ``reason``: the variable that sets the bound ``most``."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is not None and text.isascii() and text.isdecimal() and len(text) < 20:
        number = int(text)
        if number >= least and (most is None or number <= most):
            return number
    bounds = f"at least {least}" if most is None else f"between {least} and {most}"
    because = f" ({reason}={most + 1})" if reason and most is not None else ""
    found = "but it is not set" if text is None else f"got {text!r}"
    raise UserError(
        f"{name} in the environment must be a whole number {bounds}{because}, {found}; the launcher sets it"
    )


def slurm_nodes(listed: str) -> list[str]:
    """Return the names in Slurm's notation of a list of nodes, such as ``n[3-5]``.

    Raises:
        OSError: scontrol is not installed.
        subprocess.CalledProcessError: scontrol cannot parse the list.
    """
    command = ["scontrol", "show", "hostnames", listed]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    return done.stdout.split()


def _first_slurm_node() -> str:
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        return slurm_nodes(listed)[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"scontrol cannot resolve SLURM_JOB_NODELIST={listed} ({error}); set MASTER_ADDR") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
