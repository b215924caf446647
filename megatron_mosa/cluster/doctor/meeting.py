"""Where the ranks of ``mosa doctor`` meet: at torch's key-value store, before there is any process group.

So who did not come, or says no more, is known by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_mosa.cluster.doctor.node import Finding, node_name, parallel_module
from megatron_mosa.errors import RunError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

GRACE_SECONDS = 5.0  # that others wait longer than rank 0, which ends the wait for all


class Job:
    """The ranks of a job, and what they tell one another; all values are what JSON can hold.

    Raises:
        UserError: no address to meet at.
        RunError: nobody answers there in time.
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

        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdigit():
            raise UserError(
                f"MASTER_ADDR={host or ''} MASTER_PORT={port} do not say where the {self.world_size} ranks meet; "
                "expected a host name and a port; torchrun, srun and deepspeed set them"
            )
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
                problem = f"rank 0 cannot listen at {self.address} ({str(error).splitlines()[0]})"
                fix = "MASTER_ADDR must be rank 0's node and MASTER_PORT free"
            else:
                problem = f"node {node_name()}: rank {self.rank} of {self.world_size} reaches nobody at {self.address}"
                fix = "see that rank 0 was started, that MASTER_ADDR is its node and that no firewall is between"
            raise RunError(f"{problem}; {fix}") from None
        return PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _set(self, key: str, value: Any) -> None:
        if self.store is None:
            self.alone[key] = json.dumps(value)
        else:
            self.store.set(key, json.dumps(value))

    def _get(self, key: str, deadline: float) -> Any:
        """Raises RuntimeError where the key does not come in time, or the store goes away."""
        if self.store is None:
            return json.loads(self.alone[key])
        seconds = deadline - time.monotonic()
        if seconds > 0:
            self.store.wait([key], timedelta(seconds=seconds))
        elif not self.store.check([key]):
            raise RuntimeError
        return json.loads(self.store.get(key))

    def send(self, name: str, value: Any) -> None:
        """Tell rank 0."""
        self._set(f"{name}/{self.rank}", value)

    def collect(self, name: str, deadline: float) -> dict[int, Any]:
        """On rank 0: what the ranks have sent by the deadline (of time.monotonic), by rank."""
        found = {}
        for rank in range(self.world_size):
            with suppress(RuntimeError):
                found[rank] = self._get(f"{name}/{rank}", deadline)
        return found

    def announce(self, name: str, value: Any) -> None:
        """On rank 0: tell all."""
        self._set(name, value)

    def hear(self, name: str, deadline: float) -> Any:
        """What rank 0 announces.

        Raises:
            RunError: rank 0 went away, or says nothing.
        """
        try:
            return self._get(name, deadline + GRACE_SECONDS)
        except RuntimeError:
            raise RunError(
                f"node {node_name()}: rank 0 at {self.address} says no more; see what it printed and whether it runs"
            ) from None

    def leave(self) -> None:
        """Rank 0, which may hold the store, goes last."""
        if self.store is None:
            return
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "true")
            if self.rank == 0:
                self.collect("left", time.monotonic() + GRACE_SECONDS)


def absence(job: Job, here: dict[int, str], timeout: float) -> Finding:
    """That not all ranks came; ``here`` are the nodes of those that did, by rank."""
    missing = [rank for rank in range(job.world_size) if rank not in here]
    names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    nodes = absent_nodes(here)
    what = f"{len(here)} of {job.world_size} ranks came to {job.address} within {timeout:g} s, not rank {names}"
    what += f" (node {', '.join(nodes)})" if nodes else ""
    fix = "see that each task was started, that its torch imports and that it reaches that address, or raise --timeout"
    return Finding("rendezvous", what, fix)


def absent_nodes(here: dict[int, str]) -> list[str]:
    """Nodes of the Slurm step from which nobody came; none known without Slurm."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    try:
        listed = parallel_module("launch").slurm_nodes(nodes)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [node for node in listed if node not in here.values()]
