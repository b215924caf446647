"""A destroyed engine leaves nothing in memory, so that a sweep measures one after the other in the same processes."""

from __future__ import annotations

import pytest

from tests.distributed import memory_tasks, tasks
from tests.distributed.pool import WorkerPools


@pytest.mark.parametrize(
    ("zero_stage", "tensor_parallel", "is_graphed"),
    [(1, 1, True), (1, 2, True), (2, 1, False), (2, 1, True), (3, 1, True)],
)
def test_nothing_is_left_of_an_engine(
    workers: WorkerPools, zero_stage: int, tensor_parallel: int, is_graphed: bool
) -> None:
    config = tasks.tiny_config(
        model__num_layers=1, train__global_batch_size=8, train__precision="bf16", data__vocab_size=tasks.VOCAB_SIZE,
        parallel__zero_stage=zero_stage, parallel__tensor_model_parallel_size=tensor_parallel,
    )  # fmt: skip
    for alive, number in workers(2).run(memory_tasks.left, config, is_graphed):
        assert alive == [] and number > 20
