"""What runs beside computation under ZeRO-2 and 3, in the order that streams and events give on a GPU."""

from __future__ import annotations

import pytest

from tests.distributed import ordering_tasks, tasks
from tests.distributed.pool import WorkerPools


def small(stage: int, **changes: object) -> tasks.Config:
    return tasks.tiny_config(
        train__global_batch_size=4, train__micro_batch_size=2, parallel__zero_stage=stage,
        **{"model__num_layers": 4} | changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {}),
        (3, {}),
        (3, {"model__num_layers": 1, "model__tie_embeddings": True}),
        (3, {"model__num_layers": 3, "train__recompute": "full"}),
    ],
)
def test_every_two_uses_of_the_same_memory_are_ordered(workers: WorkerPools, stage: int, changes: dict) -> None:
    assert workers(1).run(ordering_tasks.faults, small(stage, **changes), 2) == [[]]


@pytest.mark.parametrize("method", ["_wait_for", "_wait_for_reduction"])
def test_a_missing_wait_is_seen(workers: WorkerPools, method: str) -> None:
    (found,) = workers(1).run(ordering_tasks.faults, small(3), 1, without=method)
    assert found
