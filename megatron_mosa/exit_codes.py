"""Exit codes of ``pretrain_mosa.py``, by which a batch script decides whether to restart a run."""

DONE = 0
"""The run reached its end."""

FAILED = 1
"""Something failed; a restart may succeed."""

USAGE_ERROR = 2
"""The run was requested in a way that cannot work; a restart would fail the same way."""

GAVE_UP = 3
"""The run itself cannot continue, as when losses stay non-finite; a restart would fail the same way."""

STOPPED = 75
"""Stopped early, on a signal or before a time limit; restart to continue. (EX_TEMPFAIL in sysexits.h.)"""

HUNG = 76
"""The watchdog ended a process that made no progress."""

TIME_LIMIT = "the time limit is near"
"""The reason of a stop (75) that another start in the same job would only repeat."""

INTERRUPTED = 130
"""Ended by Ctrl-C (SIGINT) with nothing to save, as shells report it. A run that has begun saves and stops with 75."""

NAMES = {
    DONE: "done",
    FAILED: "failed",
    USAGE_ERROR: "wrong use",
    GAVE_UP: "gave up",
    STOPPED: "stopped",
    HUNG: "hung",
    INTERRUPTED: "interrupted",
}
