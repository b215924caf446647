"""Pools of processes that communicate over gloo, started once and reused."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from tests.loaded import loaded_python

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240


class WorkerPool:
    """``world_size`` processes in one gloo group; ``run`` calls a module-level function on each of them.

    On GPUs they use NCCL, or gloo where several share a GPU, which NCCL does not support.
    """

    def __init__(self, world_size: int, on_gpu: bool = False) -> None:
        # CUDA does not survive a fork
        command = [sys.executable if on_gpu else loaded_python(), "-m", "tests.distributed.worker"]
        world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if not on_gpu:
            world["CUDA_VISIBLE_DEVICES"] = ""  # gloo on the CPU, also where there are GPUs
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(world_size):
            ours, theirs = socket.socketpair()
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with theirs:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs))
            self.connections.append(Connection(ours.detach()))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank; return the results in rank order, or raise with a rank's traceback."""
        task = pickle.dumps((function, args, kwargs))  # ``Connection.send`` would share tensors' memory
        for connection in self.connections:
            connection.send_bytes(task)
        results: dict[int, Any] = {}
        while len(results) < len(self.connections):
            waiting = {c: rank for rank, c in enumerate(self.connections) if rank not in results}
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not respond within {TIMEOUT_SECONDS} s")
            # Whichever responds first: if one rank fails, the others may wait for it forever.
            for connection in cast(list[Connection], ready):
                try:
                    ok, result = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    ok, result = False, "its process ended"
                if not ok:
                    self.close()
                    raise AssertionError(f"rank {waiting[connection]} failed:\n{result}")
                results[waiting[connection]] = result
        return [results[rank] for rank in sorted(results)]

    @property
    def is_alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        """End the processes that this pool started."""
        for process in self.processes:
            process.kill()
            process.wait()


class WorkerPools:
    """Pools by size: ``pools(n)`` returns a pool of n processes, and replaces it if a process has died."""

    def __init__(self, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self.pools: dict[int, WorkerPool] = {}

    def __call__(self, world_size: int) -> WorkerPool:
        pool = self.pools.get(world_size)
        if pool is None or not pool.is_alive:
            if pool is not None:
                pool.close()
            self.pools[world_size] = pool = WorkerPool(world_size, self.on_gpu)
        return pool

    def close(self) -> None:
        """End the processes of all pools."""
        for pool in self.pools.values():
            pool.close()


_given_ports = set[int]()


def free_port() -> int:
    """Return a free port that neither the kernel nor launch/slurm/pretrain.sbatch would choose; another one each time.

    It is below the kernel's ephemeral ports, so that no outgoing connection takes it before the ranks have joined.
    """
    while True:
        port = random.SystemRandom().randint(30_000, 32_700)
        if port in _given_ports:  # once in so many tests, two jobs of one test would meet
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_ports.add(port)
            return port
