"""torchrun with the exit codes of its ranks, and without a traceback: ``python -m megatron_mosa.cluster.torchrun``.

torchrun itself exits with 1, after a page about its own frames, when a rank has failed, stopped early or been
interrupted. The ranks have then said why.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_mosa.entry import run
from megatron_mosa.errors import RunError
from megatron_mosa.exit_codes import FAILED, STOPPED
from megatron_mosa.utils import drop_warnings, first_line


def main() -> int:
    """Run torchrun on the command line's arguments; return the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext  # slow to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    drop_warnings("torch")  # they count the signals that torchrun passes on
    codes: list[int | None] = []
    close = SubprocessContext._close

    def close_and_note(context: Any, *arguments: Any, **options: Any) -> None:
        close(context, *arguments, **options)
        codes[:] = [handler.proc.returncode for handler in context.subprocess_handlers.values()]

    SubprocessContext._close = close_and_note  # type: ignore[method-assign]
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else FAILED
    except (ValueError, RuntimeError, OSError) as error:  # of its arguments, or of the meeting of the nodes
        raise RunError(f"torchrun could not start the ranks: {first_line(error)}") from None
    except SignalException as error:
        return STOPPED if set(codes) == {STOPPED} else 128 + error.sigval  # as shells report it
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
