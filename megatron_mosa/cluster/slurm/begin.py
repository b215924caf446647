"""``python -m megatron_mosa.cluster.slurm.begin PROCESSES CONFIG [section.key=value ...]``: may an attempt start?

It prints two lines, the run directory and ``go``, ``done`` or ``stop REASON``, and records the attempt (MOSA_ATTEMPT)
in ``slurm.json``. If the previous attempt has no verdict, because its node died, it gets one first. ``done`` and
``stop`` end all jobs of a chain (MOSA_CHAIN); a job that is submitted anew after a ``stop`` counts failures from zero.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_mosa.cluster.slurm.record import Record, checkpoint_step, outcome
from megatron_mosa.cluster.slurm.verdict import settle_attempt
from megatron_mosa.config import Config, check_world_size, load_config
from megatron_mosa.entry import run as run_program
from megatron_mosa.errors import UserError


def check_restarts(config: Config) -> None:
    """Check that a job may start the run again where it stopped.

    Raises:
        UserError: ``checkpoint.resume`` is "never".
    """
    if config.checkpoint.resume == "never":
        raise UserError(
            "checkpoint.resume=never would end the job when it starts the run again, after a failure or a time limit; "
            "set checkpoint.resume=auto, and give a new run another name (run.name=...)"
        )


def begin(config: Config) -> tuple[Path, str]:
    """Return the run directory, and ``go``, ``done`` or ``stop REASON``."""
    run = config.run.path
    record = Record.read(run)
    chain = os.environ.get("MOSA_CHAIN")
    if record.attempt is not None:
        line = settle_attempt(record, run, *outcome(run, record.attempt, None))
        if record.verdict == "stop":
            return run, line
    steps = min(config.train.steps, config.train.stop_after_step or config.train.steps)
    if record.verdict == "done" and checkpoint_step(run) >= steps:  # unless more steps are configured than last time
        return run, "done"
    if record.verdict == "stop":
        if chain is not None and chain == record.chain:
            return run, f"stop as the previous job of this chain ({record.reason}); submit a new job to continue"
        record.failures = 0
    record.starts += 1
    record.attempt, record.chain = os.environ.get("MOSA_ATTEMPT"), chain
    record.write(run)
    return run, "go"


def main() -> None:
    """Check the configuration, and print the decision."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        raise UserError("usage: python -m megatron_mosa.cluster.slurm.begin PROCESSES CONFIG [section.key=value ...]")
    config = load_config(sys.argv[2], sys.argv[3:], checks_batches=False)
    check_world_size(config, int(sys.argv[1]))
    check_restarts(config)
    directory, line = begin(config)
    print(directory, line, sep="\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
