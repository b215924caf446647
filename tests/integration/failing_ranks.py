"""pretrain_mosa.py, with ranks that fail or are killed after the first step: ``RANKS=0,1 ERROR=run``."""

from __future__ import annotations

import os
import signal
import sys

from megatron_mosa.entry import run
from megatron_mosa.errors import RunError, UserError

ERRORS = {
    "run": RunError("the tokens are gone"),
    "user": UserError("data.path=x has gone; restore it"),
    "disk": OSError(28, "No space left on device", "/x/y"),
    "bug": ValueError("a bug"),
}


def main() -> int:
    from megatron_mosa.commands.training import start_training
    from megatron_mosa.train.callbacks.faults import Faults

    def fail(*_: object) -> None:
        if os.environ["RANK"] in os.environ["RANKS"].split(","):
            if (name := os.environ["ERROR"]) == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ERRORS[name]

    Faults.after_step = fail
    return start_training(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run(main))
