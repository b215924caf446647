"""torchrun with the exit codes of its ranks, and without a traceback: ``python -m megatron_mosa.cluster.torchrun``.

torchrun itself exits with 1, after a page about its own frames, when a rank has failed, stopped early or been
interrupted. The ranks have then said why.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from megatron_mosa.entry import run
from megatron_mosa.errors import RunError
from megatron_mosa.exit_codes import FAILED, STOPPED
from megatron_mosa.utils import drop_warnings, first_line


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; return the exit code of the run.

    Raises:
        RunError: it could not start the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext  # slow to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    drop_warnings("torch")  # they count the signals that torchrun passes on
    logging.getLogger(SubprocessContext.__module__).addFilter(_says_more_than_the_rank)
    codes: list[int | None] = []
    close = SubprocessContext._close

    def close_and_note(context: Any, *arguments: Any, **options: Any) -> None:
        close(context, *arguments, **options)
        codes[:] = [handler.proc.returncode for handler in context.subprocess_handlers.values()]

    SubprocessContext._close = close_and_note  # type: ignore[method-assign]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        _keep_ignoring_sighup()
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else FAILED
    except (ValueError, RuntimeError, OSError) as error:  # of its arguments, or of the meeting of the nodes
        raise RunError(f"torchrun could not start the ranks: {first_line(error)}") from None
    except SignalException as error:
        return STOPPED if set(codes) == {STOPPED} else 128 + error.sigval  # as shells report it
    return 0


def _keep_ignoring_sighup() -> None:
    """Have torchrun go on when the terminal is closed, as under nohup; it would end the ranks."""
    from torch.distributed.elastic.multiprocessing import api

    terminate = api._terminate_process_handler

    def terminate_unless_sighup(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            terminate(number, frame)

    api._terminate_process_handler = terminate_unless_sighup


def _says_more_than_the_rank(record: logging.LogRecord) -> bool:
    """Return whether a line of torchrun is worth reading: it is not if a rank has ended with an error of its own."""
    code = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not ("exitcode" in str(record.msg) and isinstance(code, int) and code > 0)  # below 0: ended by a signal


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
