"""Communication of ``mosa doctor``'s ranks through torch's key-value store, without a process group.

This way ranks that do not join, or stop responding, can be named.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_mosa.cluster.doctor.node import Finding, node_name
from megatron_mosa.errors import RunError
from megatron_mosa.parallel import slurm_nodes
from megatron_mosa.utils import first_line

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE_SECONDS = 5.0
"""How much longer than rank 0 the other ranks wait for it, because it announces the end of each wait."""


class Job:
    """The ranks of a job, which exchange JSON values.

    Args:
        deadline: when to stop waiting for the store, by time.monotonic.

    Raises:
        RunError: the store cannot be opened or reached in time.
    """

    def __init__(self, rank: int, world_size: int, deadline: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.address = "this process"
        self.store: Store | None = None
        self.alone: dict[str, str] = {}
        if world_size > 1:
            self.store = self._open(deadline)

    def _open(self, deadline: float) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]  # checked by launch_environment
        self.address = f"{host}:{port}"
        # torchrun's agent may have opened the store already.
        opens_it = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = TCPStore(
                host,
                int(port),
                is_master=opens_it,
                timeout=timedelta(seconds=max(deadline - time.monotonic(), 1)),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            if opens_it:
                problem = f"rank 0 cannot listen at {self.address} ({first_line(error)})"
                fix = "MASTER_ADDR must be rank 0's node and MASTER_PORT free"
            else:
                problem = f"node {node_name()}: rank {self.rank} of {self.world_size} cannot reach {self.address}"
                fix = "check that rank 0 was started, MASTER_ADDR is its node and no firewall blocks the connection"
            raise RunError(f"{problem}; {fix}") from None
        return PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _set(self, key: str, value: Any) -> None:
        if self.store is None:
            self.alone[key] = json.dumps(value)
        else:
            self.store.set(key, json.dumps(value))

    def _get(self, key: str, deadline: float) -> Any:
        """Return the value of a key; raise RuntimeError if it is not set in time or the store is gone."""
        if self.store is None:
            return json.loads(self.alone[key])
        seconds = deadline - time.monotonic()
        if seconds > 0:
            self.store.wait([key], timedelta(seconds=seconds))
        elif not self.store.check([key]):
            raise RuntimeError
        return json.loads(self.store.get(key))

    def send(self, name: str, value: Any) -> None:
        """Send a value to rank 0."""
        self._set(f"{name}/{self.rank}", value)

    def collect(self, name: str, deadline: float) -> dict[int, Any]:
        """Return, on rank 0, the values that ranks have sent by the deadline, by rank."""
        found = {}
        for rank in range(self.world_size):
            with suppress(RuntimeError):
                found[rank] = self._get(f"{name}/{rank}", deadline)
        return found

    def announce(self, name: str, value: Any) -> None:
        """Send a value from rank 0 to all ranks."""
        self._set(name, value)

    def hear(self, name: str, deadline: float) -> Any:
        """Return the value that rank 0 announces.

        Raises:
            RunError: rank 0 does not respond.
        """
        try:
            return self._get(name, deadline + GRACE_SECONDS)
        except RuntimeError:
            raise RunError(
                f"node {node_name()}: lost contact with rank 0 at {self.address}; check its output and whether it runs"
            ) from None

    def leave(self) -> None:
        """End the communication; rank 0, which may host the store, waits for the others."""
        if self.store is None:
            return
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "true")
            if self.rank == 0:
                self.collect("left", time.monotonic() + GRACE_SECONDS)


def absence(job: Job, here: dict[int, str], timeout: float) -> Finding:
    """Return the finding that not all ranks joined; ``here`` maps the ranks that did to their nodes."""
    missing = [rank for rank in range(job.world_size) if rank not in here]
    names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    nodes = absent_nodes(here)
    what = f"{len(here)} of {job.world_size} ranks joined at {job.address} within {timeout:g} s, missing rank {names}"
    what += f" (node {', '.join(nodes)})" if nodes else ""
    fix = "check that each task was started, can import torch and can reach this address, or raise --timeout"
    return Finding("rendezvous", what, fix)


def absent_nodes(here: dict[int, str]) -> list[str]:
    """Return the nodes of the Slurm step of which no rank joined; empty without Slurm."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    try:
        listed = slurm_nodes(nodes)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [node for node in listed if node not in here.values()]
