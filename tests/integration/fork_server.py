"""Starts runs by forking a process that has imported everything, so that many starts take seconds, not minutes.

Reads a JSON line for each run: the arguments of pretrain_mosa.py and a file for what it prints. Answers with its
process id, and with its exit code when it has ended.
"""

from __future__ import annotations

import json
import os
import sys

import deepspeed  # noqa: F401

from megatron_mosa.config import load_config
from megatron_mosa.train import pretrain


def main() -> None:
    """Serve until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            printed = os.open(job["printed"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            pretrain(load_config(job["config"], job["overrides"]))
            sys.stdout.flush()
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
