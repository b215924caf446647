"""Ends ranks of the same node that are stopped, which no SIGTERM reaches."""

from __future__ import annotations

import subprocess
from contextlib import suppress

_DELAY_SECONDS = 2
"""By then a launcher has noticed that this process has ended, and takes its exit code for that of the run."""

_KILL = 'sleep "$1"; grep -qE "^State:[[:space:]]+T" "/proc/$2/status" && kill -9 "$2"'


def kill_stopped_ranks() -> None:
    """Have the processes killed that were started by the same launcher with the same command line, if they are stopped.

    A rank that was stopped by a signal cannot end by itself. Its launcher would wait for it, torchrun 30 s, before it
    kills it. Call this right before the end of this process, which it outlasts by two seconds.
    """
    import psutil  # loaded by DeepSpeed in a run; not needed before

    def command(process: psutil.Process) -> list[str]:  # DeepSpeed's launcher passes the rank, too
        return [word for word in process.cmdline() if not word.startswith(("--local_rank", "--local-rank"))]

    own = psutil.Process()
    parent = own.parent()
    for other in parent.children() if parent is not None else []:
        with suppress(psutil.Error):
            is_rank = other.pid != own.pid and command(other) == command(own)
            if is_rank and other.status() == psutil.STATUS_STOPPED:
                subprocess.Popen(
                    ["sh", "-c", _KILL, "sh", str(_DELAY_SECONDS), str(other.pid)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
