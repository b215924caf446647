"""When the job will be ended by its scheduler."""

from __future__ import annotations

import os
import subprocess
import time
from datetime import datetime


def job_end() -> float | None:
    """When Slurm will end this job, in Unix time; None: not in a job, no limit, or Slurm does not say.

    Newer Slurm puts it into the environment (SLURM_JOB_END_TIME, in seconds); elsewhere ``squeue`` is asked, once.
    """
    if "SLURM_JOB_END_TIME" in os.environ:
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
    """A partition without a limit is given one in the far past or future."""
    return end if end > time.time() else None
