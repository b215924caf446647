"""``python -m megatron_mosa.cluster.slurm.begin PROCESSES CONFIG [section.key=value ...]``: may an attempt begin?

Prints two lines, the run directory and ``go``, ``done`` or ``stop REASON``, and notes the attempt (MOSA_ATTEMPT) in
``slurm.json``. An attempt before it that nobody judged, because its node died, is judged now. ``done`` and ``stop`` end
the rest of a chain (MOSA_CHAIN) of jobs; a job that a person submits after a ``stop`` gets a fresh count of failures.
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


def begin(config: Config) -> tuple[Path, str]:
    """The run directory, and ``go``, ``done`` or ``stop REASON``."""
    run = Path(config.run.directory) / config.run.name
    record = Record.read(run)
    chain = os.environ.get("MOSA_CHAIN")
    if record.attempt is not None:
        line = settle_attempt(record, run, *outcome(run, record.attempt, None))
        if record.verdict == "stop":
            return run, line
    steps = min(config.train.steps, config.train.stop_after_step or config.train.steps)
    if record.verdict == "done" and checkpoint_step(run) >= steps:  # more steps than last time are trained
        return run, "done"
    if record.verdict == "stop":
        if chain is not None and chain == record.chain:
            return run, f"stop as the job before it in this chain ({record.reason}); submit anew to go on"
        record.failures = 0
    record.starts += 1
    record.attempt, record.chain = os.environ.get("MOSA_ATTEMPT"), chain
    record.write(run)
    return run, "go"


def main() -> None:
    """Run the program."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        raise UserError("usage: python -m megatron_mosa.cluster.slurm.begin PROCESSES CONFIG [section.key=value ...]")
    config = load_config(sys.argv[2], sys.argv[3:], checks_batches=False)
    check_world_size(config, int(sys.argv[1]))
    directory, line = begin(config)
    print(directory, line, sep="\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
