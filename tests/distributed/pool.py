"""Real processes that talk over gloo, started once and reused: importing torch and Megatron takes seconds."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as multiprocessing

TIMEOUT_SECONDS = 240


class WorkerPool:
    """``world_size`` processes in one gloo group; ``run`` calls a module-level function on each of them."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank; return the results in rank order, or raise with a rank's traceback."""
        for connection in self.connections:
            connection.send((function, args, kwargs))
        results = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_SECONDS} s")
            ok, result = connection.recv()
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{result}")
            results.append(result)
        return results

    @property
    def is_alive(self) -> bool:
        """Whether every process still serves."""
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the processes that this pool started."""
        for process in self.processes:
            process.terminate()
            process.join(10)


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
