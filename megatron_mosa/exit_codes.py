"""Exit codes of ``pretrain_mosa.py``: what a batch script needs to know to decide whether to start a run again."""

DONE = 0
"""The run reached its end."""

FAILED = 1
"""Something failed; another start may fare better."""

WRONG_USE = 2
"""The run was asked for in a way that cannot work; another start would meet the same."""

GAVE_UP = 3
"""The run itself cannot go on, as with losses that stay not finite; another start would meet the same."""

STOPPED = 75
"""Stopped early, on a signal or before a time limit; start it again to go on. (EX_TEMPFAIL of sysexits.h.)"""

HUNG = 76
"""The watchdog ended a process that made no progress."""

NAMES = {DONE: "done", FAILED: "failed", WRONG_USE: "wrong use", GAVE_UP: "gave up", STOPPED: "stopped", HUNG: "hung"}
