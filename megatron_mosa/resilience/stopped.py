"""Ends ranks of the same node that are stopped, which no SIGTERM reaches."""

from __future__ import annotations

import os
from contextlib import suppress


def kill_stopped_ranks() -> None:
    """Kill the processes that the launcher of this one has started with the same command line, if they are stopped.

    A rank that was stopped (SIGSTOP, a debugger) cannot end by itself. Its launcher would wait for it, torchrun 30 s,
    before it kills it; DeepSpeed's waits forever.
    """
    import psutil  # loaded by DeepSpeed in a run; not needed before

    def command(process: psutil.Process) -> list[str]:  # DeepSpeed's launcher passes the rank, too
        return [word for word in process.cmdline() if not word.startswith(("--local_rank", "--local-rank"))]

    own = psutil.Process()
    parent = own.parent()
    for other in parent.children() if parent is not None else []:
        with suppress(psutil.Error):
            is_rank = other.pid != os.getpid() and command(other) == command(own)
            if is_rank and other.status() == psutil.STATUS_STOPPED:
                other.kill()
