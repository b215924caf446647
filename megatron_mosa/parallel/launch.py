"""Rank and world size of this process under torchrun, DeepSpeed's launcher, srun or plain python."""

from __future__ import annotations

import os
import socket
import subprocess

from megatron_mosa.errors import UserError


def launch_environment() -> tuple[int, int, int]:
    """Return the rank, world size and local rank of this process, and set the variables that torch.distributed needs.

    torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE and LOCAL_RANK. Under srun they are derived from Slurm's
    variables: the first node of the job is the master, and the job id determines the port. Plain python has a world
    size of one. MASTER_ADDR and MASTER_PORT are set unless they are already.

    Raises:
        UserError: the launcher's variables are incomplete, or scontrol cannot resolve the job's nodes.
    """
    environment = os.environ
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in names if name not in environment]
        if missing:
            raise UserError(f"RANK is set, but {' and '.join(missing)} not; start with torchrun, srun or deepspeed")
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun, but not in the batch script
        rank, world_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local_rank = int(environment["SLURM_LOCALID"])
        environment.setdefault("MASTER_ADDR", _first_slurm_node())
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    else:
        rank, world_size, local_rank = 0, 1, 0
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    # DeepSpeed reads these under every launcher.
    environment.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    return rank, world_size, local_rank


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
    listed = os.environ["SLURM_JOB_NODELIST"]
    try:
        return slurm_nodes(listed)[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"scontrol cannot resolve SLURM_JOB_NODELIST={listed} ({error}); set MASTER_ADDR") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
