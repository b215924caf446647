"""A signal or time limit known to one rank stops all ranks after the same step."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mosa.exit_codes import TIME_LIMIT
from tests.distributed import stop_tasks
from tests.distributed.pool import WorkerPools


def test_every_rank_hears_of_a_bug_of_one(workers: WorkerPools) -> None:
    """Whatever it is, the others must not wait for that rank."""
    own, told = "ValueError: a bug", "RunError: rank {} failed: ValueError: a bug"
    assert workers(2).run(stop_tasks.heard, 0) == [[own] * 2, [told.format(0)] * 2]
    assert workers(2).run(stop_tasks.heard, 1) == [[told.format(1)], [own]]


@pytest.mark.parametrize(
    ("reasons", "why"),
    [
        ({0: "SIGUSR1"}, "SIGUSR1"),
        ({1: "SIGTERM"}, "SIGTERM"),
        ({0: "deadline"}, TIME_LIMIT),
        ({0: "SIGINT", 1: "SIGUSR1"}, "SIGINT"),
        ({}, None),
    ],
    ids=str,
)
def test_all_ranks_stop_after_the_same_step(
    workers: WorkerPools, tmp_path: Path, reasons: dict[int, str], why: str | None
) -> None:
    assert workers(2).run(stop_tasks.stopped, tmp_path, reasons) == [(3 if why else 6, why)] * 2
