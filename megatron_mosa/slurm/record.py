"""``slurm.json`` of a run directory: what the batch script must remember from one start of a run to the next."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_mosa.exit_codes import FAILED, NAMES
from megatron_mosa.utils.files import write_atomically


@dataclass
class Record:
    """Of one run, over all its jobs."""

    starts: int = 0
    """Attempts begun."""

    failures: int = 0
    """Failed attempts in a row without a newer checkpoint."""

    step: int = 0
    """The newest checkpoint's, when the last attempt was judged."""

    attempt: str | None = None
    """The one that has begun and was not judged yet."""

    verdict: str = ""
    """On the last attempt: done, stop or again."""

    reason: str = ""
    """Of that verdict."""

    chain: str | None = None
    """The chain of jobs (MOSA_CHAIN) that the last attempt belonged to."""

    updated: float = 0.0
    """Unix time."""

    preflight_failures: dict[str, int] = field(default_factory=dict)
    """Node -> how often it failed the check before training."""

    @classmethod
    def read(cls, run: Path) -> Record:
        """That of a run directory; a fresh one if there is none that can be read."""
        with suppress(OSError, ValueError, TypeError):
            content = json.loads((run / "slurm.json").read_text(encoding="utf-8"))
            known = {entry.name for entry in fields(cls)}
            return cls(**{name: value for name, value in content.items() if name in known})
        return cls()

    def write(self, run: Path) -> None:
        """Replace that of a run directory, in one piece."""
        self.updated = time.time()
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "slurm.json", json.dumps(asdict(self), indent=1) + "\n")


def checkpoint_step(run: Path) -> int:
    """Step of the newest published checkpoint; 0: there is none.

    Progress is counted by it: steps that no checkpoint holds are lost with the processes.
    """
    names = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def outcome(run: Path, attempt: str | None, srun_code: int | None) -> tuple[int, str]:
    """Exit code of an attempt and the reason for it.

    srun tells the highest exit code of its tasks, which may be that of a rank that it killed itself. So what the run
    wrote of its end in ``status.json`` counts, if this attempt wrote it.

    Args:
        srun_code: None: nobody saw it end.
    """
    with suppress(OSError, ValueError):
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
        if attempt and status.get("attempt") == attempt and status.get("state") in NAMES.values():
            return int(status.get("exit_code", FAILED)), status.get("reason") or status["state"]
    if srun_code is None:
        return FAILED, "ended without a verdict: a node or the batch script died"
    if srun_code in NAMES:
        return srun_code, NAMES[srun_code]
    return srun_code, f"killed by signal {srun_code - 128}" if srun_code > 128 else f"exit code {srun_code}"
