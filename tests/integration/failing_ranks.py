"""pretrain_mosa.py, with ranks that fail or are killed after the first step: ``RANKS=0,1 ERROR=run``.

``ERROR=shared``: all ranks have the error of rank 0, which then takes four seconds to close its checkpoints.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from megatron_mosa.entry import run
from megatron_mosa.errors import RunError, UserError

ERRORS = {
    "run": RunError("the tokens are gone"),
    "user": UserError("data.path=x has gone; restore it"),
    "disk": OSError(28, "No space left on device", "/x/y"),
    "shared": UserError("data.path=x has gone; restore it"),
    "bug": ValueError("a bug"),
}


def raise_(error: Exception) -> None:
    raise error


def main() -> int:
    from megatron_mosa.checkpoint import CheckpointStore
    from megatron_mosa.commands.training import start_training
    from megatron_mosa.parallel import on_main_rank
    from megatron_mosa.train.callbacks.faults import Faults

    def fail(*_: object) -> None:
        if os.environ["ERROR"] == "shared":
            on_main_rank(lambda: raise_(ERRORS["shared"]))
        if os.environ["RANK"] in os.environ["RANKS"].split(","):
            if (name := os.environ["ERROR"]) == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ERRORS[name]

    Faults.after_step = fail
    if (os.environ["ERROR"], os.environ["RANK"]) == ("shared", "0"):
        CheckpointStore.close = lambda *_: time.sleep(4)
    return start_training(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run(main))
