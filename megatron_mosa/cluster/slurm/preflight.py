"""``python -m megatron_mosa.cluster.slurm.preflight RUN REPORT``: decides what follows a failed check of the nodes.

Reads the report of ``mosa doctor --json`` (its key ``bad_nodes``) and counts the failures of each node in
``RUN/slurm.json``. Prints two lines: the verdict, which counts this as a failed attempt, and the comma-separated nodes
to exclude from the next attempt, which are those that failed twice.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from megatron_mosa.cluster.slurm.record import Record
from megatron_mosa.cluster.slurm.verdict import settle_attempt
from megatron_mosa.entry import run as run_program
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import FAILED
from megatron_mosa.utils import load_json

FAILURES_UNTIL_EXCLUDED = 2


def note_failure(run: Path, report: Path) -> tuple[str, list[str]]:
    """Record a failed preflight; return the line of the verdict and the nodes to exclude."""
    bad: list[str] = []
    with suppress(OSError, ValueError, AttributeError):
        bad = [str(node) for node in load_json(report).get("bad_nodes") or []]
    record = Record.read(run)
    for node in bad:
        record.preflight_failures[node] = record.preflight_failures.get(node, 0) + 1
    reason = f"preflight failed on {', '.join(bad)}" if bad else "preflight failed without naming a node"
    line = settle_attempt(record, run, FAILED, reason)
    return line, [node for node in bad if record.preflight_failures[node] >= FAILURES_UNTIL_EXCLUDED]


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python -m megatron_mosa.cluster.slurm.preflight RUN REPORT")
    line, nodes = note_failure(Path(sys.argv[1]), Path(sys.argv[2]))
    print(line, ",".join(nodes), sep="\n")


if __name__ == "__main__":
    sys.exit(run_program(main))
