"""A rank of a ``WorkerPool``, which calls the functions that it receives over the socket on its standard input."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from multiprocessing.connection import Connection

import torch

import megatron_mosa.train  # noqa: F401  # so that the time of a task does not include imports


def main() -> None:
    """Call functions until the pool closes the connection."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)
    if 0 < torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        torch.distributed.init_process_group("gloo")
    warnings.filterwarnings("ignore")
    while True:
        try:
            function, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without waiting for the threads of process groups
