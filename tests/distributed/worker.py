"""A rank of a ``WorkerPool``: calls the functions that come over the socket in the place of its standard input."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from multiprocessing.connection import Connection

import torch

import megatron_mosa.train  # noqa: F401  # a task is measured, not its imports


def main() -> None:
    """Serve until the pool closes."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)
    if torch.cuda.is_available() and int(os.environ["WORLD_SIZE"]) > 1:
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
    os._exit(0)  # without the time that threads of groups take to end
