"""The steps that CUDA graphs are captured of, on the CPU: their gradients, reduction, clipping and skipping."""

from __future__ import annotations

import pytest

from tests.distributed import graphed_tasks, tasks
from tests.distributed.pool import WorkerPools


def accumulating(ranks: int) -> tasks.Config:
    return tasks.tiny_config(
        train__global_batch_size=8, train__micro_batch_size=4 // ranks, train__precision="bf16",
        model__tie_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_norms_and_moments_are_those_of_deepspeeds_steps(workers: WorkerPools, ranks: int) -> None:
    graphed, plain = (
        workers(ranks).run(graphed_tasks.steps, accumulating(ranks), 5, is_graphed)[0] for is_graphed in (True, False)
    )
    assert graphed["losses"] == pytest.approx(plain["losses"], rel=3e-3)
    assert graphed["norms"] == pytest.approx(plain["norms"], rel=3e-2)
    assert graphed["moments"] == pytest.approx(plain["moments"], rel=0.2)


def test_a_non_finite_step_on_one_rank_is_skipped_on_all(workers: WorkerPools) -> None:
    for facts in workers(2).run(graphed_tasks.around_a_poisoned_step, accumulating(2)):
        assert facts == {"is finite": False, "is unchanged": True, "counted steps": 0, "then is finite": True}
