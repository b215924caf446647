"""Real processes that talk over gloo, started once and reused: importing torch and Megatron takes seconds."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch.multiprocessing as multiprocessing

from megatron_mosa.entry import while_loading

TIMEOUT_SECONDS = 240
# A task at another tensor-parallel size makes some twenty groups whose threads (gloo) or memory (NCCL) live as long as
# the process, and every engine makes a few.
MOST_GROUPS = 240


class WorkerPool:
    """``world_size`` processes in one gloo group; ``run`` calls a module-level function on each of them.

    On a GPU one process has NCCL; several share the one card, which NCCL refuses, and so have gloo on CUDA tensors.
    """

    def __init__(self, world_size: int, on_gpu: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.groups = 0
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs, on_gpu))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank; return the results in rank order, or raise with a rank's traceback."""
        for connection in self.connections:
            connection.send((function, args, kwargs))
        results: dict[int, Any] = {}
        while len(results) < len(self.connections):
            waiting = {c: rank for rank, c in enumerate(self.connections) if rank not in results}
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {TIMEOUT_SECONDS} s")
            # Whichever answers first: where one rank fails, the others may wait for it for ever.
            for connection in cast(list[Connection], ready):
                ok, result, self.groups = connection.recv()
                if not ok:
                    self.close()
                    raise AssertionError(f"rank {waiting[connection]} failed:\n{result}")
                results[waiting[connection]] = result
        return [results[rank] for rank in sorted(results)]

    @property
    def is_fit(self) -> bool:
        """Whether every process still serves, and is not worn out."""
        return self.groups < MOST_GROUPS and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the processes that this pool started."""
        for process in self.processes:
            process.terminate()
            process.join(10)


class WorkerPools:
    """``pools(n)`` is a pool of n processes; one that died or is worn out is replaced."""

    def __init__(self, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self.pools: dict[int, WorkerPool] = {}

    def __call__(self, world_size: int) -> WorkerPool:
        pool = self.pools.get(world_size)
        if pool is None or not pool.is_fit:
            if pool is not None:
                pool.close()
            self.pools[world_size] = pool = WorkerPool(world_size, self.on_gpu)
        return pool

    def close(self) -> None:
        """End all processes."""
        for pool in self.pools.values():
            pool.close()


def free_port() -> int:
    """Below those that the kernel gives to connections, one of which could take it before the ranks have met."""
    while True:
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(rank: int, world_size: int, port: int, connection: Connection, on_gpu: bool) -> None:
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on the CPU, also where there are GPUs
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with while_loading():
        import torch

        import megatron_mosa.train  # noqa: F401

    torch.set_num_threads(1)
    if on_gpu and world_size > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    warnings.filterwarnings("ignore")
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args, **kwargs), torch.distributed.get_pg_count()))
        except BaseException:
            connection.send((False, traceback.format_exc(), torch.distributed.get_pg_count()))
