"""Starts runs by forking a process that has imported everything, so that many starts take seconds, not minutes.

Reads a JSON line for each run: the arguments of pretrain_mosa.py, how many processes, their environment, and the files
for what they print. Answers with their process ids, and with their exit codes when all have ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import megatron_mosa.train  # noqa: F401
import pretrain_mosa
from megatron_mosa.entry import run


def begin(job: dict, rank: int) -> int:
    """Start one process of a run; returns its id."""
    if child := os.fork():
        return child
    os.environ.update(job["environment"], RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{job['processes']}")
    for stream, file in enumerate(job["printed"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["pretrain_mosa.py", *job["arguments"]]
    code = 1
    try:
        code = run(pretrain_mosa.main)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def end(children: list[int]) -> list[int]:
    """Wait for all; where one fails the others are asked to stop, as torchrun does."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in children if codes[child] else ():
            if other not in codes:
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in children]


def main() -> None:
    """Serve until the input ends."""
    gc.freeze()  # runs share these pages for good
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        children = [begin(job, rank) for rank in range(job["processes"])]
        print(*children, flush=True)
        print(*end(children), flush=True)


if __name__ == "__main__":
    main()
