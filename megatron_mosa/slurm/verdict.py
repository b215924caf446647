"""``python -m megatron_mosa.slurm.verdict RUN EXIT_CODE``: does a run that ended start again?

Prints two lines, ``done``, ``stop REASON`` or ``again SECONDS REASON``, and the run's own exit code, which srun may not
know; keeps ``RUN/slurm.json``. From the environment it takes

    MOSA_ATTEMPT           the attempt that ended
    MOSA_MAX_RETRIES       failures in a row without a newer checkpoint that are followed by another start; default 5
    MOSA_BACKOFF_SECONDS   to wait after the first of them, default 10; it doubles with each, up to ten minutes

No torch: a whole allocation waits for this.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE, GAVE_UP, STOPPED, WRONG_USE
from megatron_mosa.slurm.record import Record, checkpoint_step, outcome

MAX_BACKOFF_SECONDS = 600.0


def judge(record: Record, code: int, reason: str, step: int, *, max_retries: int, backoff: float) -> float:
    """Settle an attempt: note the verdict in ``record``; return the seconds to wait before another start.

    Args:
        step: the newest checkpoint's.
        max_retries: failures in a row without a newer checkpoint that are followed by another start.
        backoff: seconds to wait after the first failure.
    """
    if step > record.step:
        record.failures = 0
    record.step, record.attempt, record.reason = step, None, reason
    if code == DONE:
        record.verdict, record.failures = "done", 0
    elif code in (WRONG_USE, GAVE_UP):
        record.verdict = "stop"
    elif code == STOPPED:
        record.verdict = "again"
    else:
        record.failures += 1
        record.verdict = "again"
        if record.failures > max_retries:
            record.verdict = "stop"
            record.reason = (
                f"{record.failures} failures in a row without a checkpoint after step {step}; last: {reason}"
            )
        return min(backoff * 2 ** (record.failures - 1), MAX_BACKOFF_SECONDS)
    return 0.0


def settle(record: Record, run: Path, code: int, reason: str) -> str:
    """Judge by the environment's limits and the newest checkpoint; return the line for the batch script."""
    max_retries = int(_number("MOSA_MAX_RETRIES", "5"))
    backoff = _number("MOSA_BACKOFF_SECONDS", "10")
    seconds = judge(record, code, reason, checkpoint_step(run), max_retries=max_retries, backoff=backoff)
    record.write(run)
    told = " ".join(record.reason.split())  # the line is one
    return {"done": "done", "stop": f"stop {told}", "again": f"again {seconds:.0f} {told}"}[record.verdict]


def _number(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise UserError(f"{name}={text}: legal: a number, 0 or more; unset it for {default}")
    return number


def main(arguments: list[str]) -> int:
    """Run the program; return its exit code: 0, or 2 for wrong use."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        print("usage: python -m megatron_mosa.slurm.verdict RUN EXIT_CODE", file=sys.stderr)
        return 2
    run = Path(arguments[0])
    try:
        code, reason = outcome(run, os.environ.get("MOSA_ATTEMPT"), int(arguments[1]))
        print(settle(Record.read(run), run, code, reason), code, sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
