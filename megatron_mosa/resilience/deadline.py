"""The time at which Slurm will end the current job."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from datetime import datetime


def job_end() -> float | None:
    """Return the Unix time at which Slurm will end this job; None outside a job, without a limit or if it is unknown.

    Recent versions of Slurm set SLURM_JOB_END_TIME (in seconds); otherwise ``squeue`` is called once.
    """
    if "SLURM_JOB_END_TIME" in os.environ:
        with suppress(ValueError):
            return _future(float(os.environ["SLURM_JOB_END_TIME"]))
    if "SLURM_JOB_ID" not in os.environ:
        return None
    command = ["squeue", "--noheader", "--format=%e", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True
        ).stdout.split()
        return _future(datetime.fromisoformat(answer[0]).timestamp())  # local time, as squeue prints it
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # "N/A", "NONE": no limit


def _future(end: float) -> float | None:
    """Discard an end in the past: Slurm gives a partition without a limit one far in the past or future."""
    return end if end > time.time() else None
