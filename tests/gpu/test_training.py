"""Training on a GPU against a plain loop, at every ZeRO stage; resuming; two ranks on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.pool import WorkerPools
from tests.distributed.test_parity import check_equal

CELLS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def accumulating(**changes: object) -> tasks.Config:
    return tasks.tiny_config(train__global_batch_size=8, train__micro_batch_size=2, **changes)


@pytest.fixture(scope="module")
def plain(workers: WorkerPools) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a plain loop on the GPU."""
    config = tasks.tiny_config(train__global_batch_size=8, train__micro_batch_size=8)
    return workers(1).run(tasks.plain_losses, config, 5)[0]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_losses_on_the_gpu_are_those_of_a_plain_loop_in_fp32(
    workers: WorkerPools, plain: tuple, zero: int, precision: str, offload: bool
) -> None:
    config = accumulating(
        train__precision=precision, parallel__zero_stage=zero, parallel__offload_optimizer=offload and zero > 0
    )
    losses, norms = workers(1).run(tasks.engine_losses, config, 5)[0]
    loss_tolerance, norm_tolerance = (2e-5, 1e-3) if precision == "fp32" else (5e-3, 5e-2)
    assert losses == pytest.approx(plain[0], rel=loss_tolerance)
    assert norms == pytest.approx(plain[1], rel=norm_tolerance)


@pytest.mark.parametrize(("zero", "precision"), CELLS)
def test_resuming_on_the_gpu_is_bitwise_the_same(workers: WorkerPools, zero: int, precision: str) -> None:
    config = accumulating(train__precision=precision, parallel__zero_stage=zero)
    straight, resumed = workers(1).run(tasks.losses_after_loading, config, 3, 3)[0]
    assert straight == resumed


@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_recompute_on_the_gpu_changes_nothing(workers: WorkerPools, plain: tuple, recompute: str) -> None:
    losses, norms = workers(1).run(tasks.engine_losses, accumulating(train__recompute=recompute), 5)[0]
    assert losses == pytest.approx(plain[0], rel=2e-5)
    assert norms == pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("heads", ["dense", "hybrid"])
def test_documents_in_bf16_follow_fp32(workers: WorkerPools, heads: str) -> None:
    # bf16 uses torch's variable-length attention, fp32 one call per document
    options: dict = {"model__attend_within_documents": True, "model__num_query_groups": 2}
    options |= {"mosa__num_heads": 0} if heads == "dense" else {"mosa__selection_scope": "document"}
    losses, norms = workers(1).run(tasks.plain_losses, tasks.tiny_config(**options), 5)[0]
    found = workers(1).run(tasks.engine_losses, tasks.tiny_config(train__precision="bf16", **options), 5)[0]
    assert found[0] == pytest.approx(losses, rel=5e-3)
    assert found[1] == pytest.approx(norms, rel=5e-2)


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a model with other weights."""
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of training in one process on the GPU."""
    facts = workers(1).run(tasks.training_facts, tasks.tiny_config(parallel__zero_stage=0), seed_checkpoint)[0]
    assert facts["margin"] > 1e-5
    return facts


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("tensor_parallel", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["dp2", "tp2", "tp2_sp"]
)
def test_two_ranks_on_one_card_train_the_model_of_one(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, zero: int, tensor_parallel: int, sequence_parallel: bool
) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=sequence_parallel,
        train__micro_batch_size=2 * tensor_parallel,
    )
    check_equal(workers(2).run(tasks.training_facts, config, seed_checkpoint)[0], single)
