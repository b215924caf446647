"""``slurm.json`` in the run directory: what the batch script remembers between two starts of a run."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_mosa.exit_codes import FAILED, NAMES
from megatron_mosa.utils import load_json, write_atomically


@dataclass
class Record:
    """State of one run across all its jobs."""

    starts: int = 0
    """Number of attempts begun."""

    failures: int = 0
    """Consecutive failed attempts without a newer checkpoint."""

    step: int = 0
    """Step of the newest checkpoint when the last attempt was judged."""

    attempt: str | None = None
    """The attempt that has begun and has not been judged yet."""

    verdict: str = ""
    """Verdict on the last attempt: done, stop or again."""

    reason: str = ""
    """Reason for that verdict."""

    chain: str | None = None
    """The chain of jobs (MOSA_CHAIN) that the last attempt belonged to."""

    updated: float = 0.0
    """Unix time of the last write."""

    preflight_failures: dict[str, int] = field(default_factory=dict)
    """Number of failed preflights by node."""

    @classmethod
    def read(cls, run: Path) -> Record:
        """Read the record of a run directory; if there is none that can be read, return a new one."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            content = load_json(run / "slurm.json")
            known = {entry.name for entry in fields(cls)}
            return cls(**{name: value for name, value in content.items() if name in known})
        return cls()

    def write(self, run: Path) -> None:
        """Write the record atomically; creates the run directory if it is missing."""
        self.updated = time.time()
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "slurm.json", json.dumps(asdict(self), indent=1) + "\n")


def checkpoint_step(run: Path) -> int:
    """Return the step of the newest published checkpoint, or 0 if there is none.

    It measures progress: steps that no checkpoint holds are lost with the processes.
    """
    names = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def outcome(run: Path, attempt: str | None, srun_code: int | None) -> tuple[int, str]:
    """Return the exit code of an attempt and the reason for it.

    srun reports the highest exit code of its tasks, which may come from a rank that srun itself killed. So the end
    recorded in ``status.json`` takes precedence if this attempt wrote it.

    Args:
        srun_code: exit code of srun; None if nobody saw the attempt end.
    """
    with suppress(OSError, ValueError, TypeError, AttributeError):
        status = load_json(run / "status.json")
        if attempt and status.get("attempt") == attempt and status.get("state") in NAMES.values():
            return int(status.get("exit_code", FAILED)), status.get("reason") or status["state"]
    if srun_code is None:
        return FAILED, "ended without a verdict: a node or the batch script died"
    if srun_code in NAMES:
        return srun_code, NAMES[srun_code]
    return srun_code, f"killed by signal {srun_code - 128}" if srun_code > 128 else f"exit code {srun_code}"
