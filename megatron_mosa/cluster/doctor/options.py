"""The options of ``mosa doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DoctorOptions:
    """Options of ``mosa doctor``.

    Attributes:
        timeout: longest wait for the other ranks in each step of the preflight, in seconds.
        minimum_disk: free space required in the run directory, in GiB.
        slow: a GPU is bad if the job's median is faster by more than this factor.
    """

    run_directory: Path
    json: Path | None
    timeout: float
    minimum_disk: float
    slow: float
