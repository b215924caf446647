"""``python -m megatron_mosa.cluster.slurm.verdict RUN EXIT_CODE``: decides whether a run that ended starts again.

Prints two lines: ``done``, ``stop REASON``, ``again SECONDS REASON`` or, if this job's time is over, ``requeue SECONDS
REASON``; and the run's own exit code, which srun may not know. Updates ``RUN/slurm.json``. Environment variables:

    MOSA_ATTEMPT           the attempt that ended
    MOSA_MAX_RETRIES       consecutive failures without a newer checkpoint before the run stops for good; default 5
    MOSA_BACKOFF_SECONDS   wait after the first of them, default 10; doubles with each, up to ten minutes

It does not import torch: a whole allocation waits for this program.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_mosa.cluster.slurm.record import Record, checkpoint_step, outcome
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE, GAVE_UP, STOPPED, TIME_LIMIT, USAGE_ERROR
from megatron_mosa.utils import counted

MAX_BACKOFF_SECONDS = 600.0


def judge_attempt(record: Record, code: int, reason: str, step: int, *, max_retries: int, backoff: float) -> float:
    """Judge an attempt: record the verdict in ``record`` and return the seconds to wait before the next start.

    Args:
        step: step of the newest checkpoint.
        max_retries: consecutive failures without a newer checkpoint that are retried.
        backoff: seconds to wait after the first failure.
    """
    has_progressed = step > record.step
    if has_progressed:
        record.failures = 0
    record.step, record.attempt, record.reason = step, None, reason
    if code == DONE:
        record.verdict, record.failures = "done", 0
    elif code in (USAGE_ERROR, GAVE_UP):
        record.verdict = "stop"
    elif code == STOPPED and (reason != TIME_LIMIT or has_progressed):
        record.verdict = "again"
    else:  # failures, and jobs that are too short for a single step
        record.failures += 1
        record.verdict = "again"
        if record.failures > max_retries:
            record.verdict = "stop"
            record.reason = (
                f"{counted(record.failures, 'failure')} in a row without a checkpoint after step {step}; last: {reason}"
            )
        return min(backoff * 2 ** (record.failures - 1), MAX_BACKOFF_SECONDS)
    return 0.0


def settle_attempt(record: Record, run: Path, code: int, reason: str) -> str:
    """Judge an attempt with the limits of the environment; return the line for the batch script."""
    max_retries = int(_number("MOSA_MAX_RETRIES", "5"))
    backoff = _number("MOSA_BACKOFF_SECONDS", "10")
    seconds = judge_attempt(record, code, reason, checkpoint_step(run), max_retries=max_retries, backoff=backoff)
    record.write(run)
    why = " ".join(record.reason.split())  # on one line
    again = "requeue" if reason == TIME_LIMIT else "again"
    return {"done": "done", "stop": f"stop {why}", "again": f"{again} {seconds:.0f} {why}"}[record.verdict]


def _number(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise UserError(f"{name} must be a number of at least 0, got {text}; unset it for the default of {default}")
    return number


def main(arguments: list[str]) -> int:
    """Run the program; return its exit code: 0, or 2 for a usage error."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        print("usage: python -m megatron_mosa.cluster.slurm.verdict RUN EXIT_CODE", file=sys.stderr)
        return 2
    run = Path(arguments[0])
    try:
        code, reason = outcome(run, os.environ.get("MOSA_ATTEMPT"), int(arguments[1]))
        print(settle_attempt(Record.read(run), run, code, reason), code, sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
