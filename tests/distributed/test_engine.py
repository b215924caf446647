"""The DeepSpeed engine against a plain PyTorch loop, in fp32 and bf16, with accumulation and clipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import loss_tasks, tasks
from tests.distributed.pool import WorkerPools

STEPS = 5


@pytest.fixture(scope="module")
def plain(workers: WorkerPools) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the plain loop on batches of 8."""
    config = tasks.tiny_config(train__global_batch_size=8, train__micro_batch_size=8)
    losses, norms = workers(1).run(tasks.plain_losses, config, STEPS)[0]
    assert min(norms) > config.optimizer.gradient_clipping  # gradients are clipped
    return losses, norms


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_every_zero_stage_gives_the_losses_of_a_plain_loop(
    workers: WorkerPools, plain: tuple, world: int, zero: int
) -> None:
    # two micro-batches per rank, to test both accumulation and the mean over data-parallel ranks
    config = tasks.tiny_config(
        parallel__zero_stage=zero, train__global_batch_size=8, train__micro_batch_size=4 // world
    )
    losses, norms = workers(world).run(tasks.engine_losses, config, STEPS)[0]
    assert losses == pytest.approx(plain[0], rel=2e-5)
    assert norms == pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_loss_is_the_mean_over_all_counted_tokens(workers: WorkerPools, world: int, zero: int) -> None:
    """The loss does not depend on how many tokens count in each micro-batch and on each rank."""
    options: dict = dict(train__global_batch_size=4, train__micro_batch_size=1)
    loss, expected = workers(1).run(loss_tasks.plain_step, tasks.tiny_config(**options))[0]
    config = tasks.tiny_config(parallel__zero_stage=zero, **options)
    result, gradients, state = workers(world).run(loss_tasks.engine_step, config)[0]
    assert result.loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-5) and norm > config.optimizer.gradient_clipping
    for name, gradient in expected.items():
        clipped = gradient * config.optimizer.gradient_clipping / norm
        for key, moment in (("exp_avg", 0.3 * clipped), ("exp_avg_sq", 0.4 * clipped.square())):  # betas 0.7, 0.6
            torch.testing.assert_close(state[f"{key}.{name}"], moment, rtol=1e-3, atol=1e-7, msg=f"{key}.{name}")


# ZeRO-1 accumulates before it reduces in bf16, with one more rounding of up to 2^-8. Accumulation in bf16 has errors of
# 6e-3.
@pytest.mark.parametrize(("zero", "tolerance"), [(1, 4e-3), (2, 1e-6), (3, 1e-6)])
def test_gradients_in_bf16_are_accumulated_in_fp32(workers: WorkerPools, zero: int, tolerance: float) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        train__precision="bf16",
        train__global_batch_size=16,
        train__micro_batch_size=1,
        mosa__num_heads=0,
    )
    _, expected = workers(1).run(loss_tasks.plain_step, config)[0]
    _, gradients, _ = workers(1).run(loss_tasks.engine_step, config)[0]
    errors = [((gradients[name] - exact).norm() / exact.norm()).item() for name, exact in expected.items()]
    assert max(errors) < tolerance


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_without_counted_tokens_is_skipped_and_flagged(workers: WorkerPools, zero: int) -> None:
    config = tasks.tiny_config(parallel__zero_stage=zero, train__global_batch_size=8, train__micro_batch_size=2)
    for empty, unchanged, after in workers(2).run(loss_tasks.empty_step, config):
        assert empty.is_empty and not empty.is_finite
        assert unchanged
        assert after.is_finite and not after.is_empty


@pytest.mark.parametrize("world", [1, 2])
def test_validation_is_the_mean_over_all_samples(workers: WorkerPools, world: int) -> None:
    """The number of samples does not divide into full batches."""
    config = tasks.tiny_config(train__micro_batch_size=2)
    expected = workers(1).run(loss_tasks.plain_validation_loss, config, 5)[0]
    assert workers(world).run(loss_tasks.validation_loss, config, 5) == [pytest.approx(expected, rel=1e-6)] * world


# test_parity has all layouts and stages without accumulation
@pytest.mark.parametrize(("world", "tensor_parallel", "zero"), [(2, 2, 1), (2, 1, 2), (4, 4, 3), (4, 2, 1), (4, 2, 3)])
def test_bf16_follows_fp32(workers: WorkerPools, plain: tuple, world: int, tensor_parallel: int, zero: int) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=True,
        train__global_batch_size=8,
        train__micro_batch_size=2,
        train__precision="bf16",
    )
    losses, norms = workers(world).run(tasks.engine_losses, config, STEPS)[0]
    assert losses == pytest.approx(plain[0], rel=5e-3)
    assert norms == pytest.approx(plain[1], rel=5e-2)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_optimizer_state_changes_nothing(workers: WorkerPools, plain: tuple, zero: int) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__offload_optimizer=True,
        train__global_batch_size=8,
        train__micro_batch_size=2,
    )
    losses, norms = workers(2).run(tasks.engine_losses, config, STEPS)[0]
    assert losses == pytest.approx(plain[0], rel=2e-5)
    assert norms == pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_resuming_from_an_engine_state_is_bitwise_exact(workers: WorkerPools, zero: int, precision: str) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        train__precision=precision,
        train__global_batch_size=8,
        train__micro_batch_size=2,
    )
    for straight, resumed in workers(2).run(tasks.losses_after_loading, config, 3, 3):
        assert straight == resumed


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_initial_weights_come_with_new_moments(workers: WorkerPools, zero: int, tmp_path: Path) -> None:
    config = tasks.tiny_config(parallel__zero_stage=zero, train__micro_batch_size=2)
    workers(2).run(tasks.save_after_training, config, tmp_path / "trained")
    for facts in workers(2).run(tasks.start_from_weights, config, tmp_path / "trained"):
        assert facts == dict.fromkeys(facts, True)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_state_can_be_saved_and_loaded(workers: WorkerPools, zero: int) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__offload_optimizer=True,
        train__global_batch_size=8,
        train__micro_batch_size=2,
    )
    for straight, resumed in workers(2).run(tasks.losses_after_loading, config, 3, 3):
        assert straight == resumed


@pytest.mark.parametrize(
    ("zero", "precision", "tensor_parallel"),
    [
        *((zero, "fp32", 1) for zero in (0, 1, 2, 3)),
        *((zero, "bf16", 1) for zero in (1, 2, 3)),
        *((0, "fp32", 2), (1, "bf16", 2), (3, "fp32", 2)),
    ],
)
def test_a_non_finite_step_on_one_rank_is_skipped_on_all(
    workers: WorkerPools, zero: int, precision: str, tensor_parallel: int
) -> None:
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__tensor_model_parallel_size=tensor_parallel,
        train__precision=precision,
        train__global_batch_size=8,
        train__micro_batch_size=2,
    )
    for facts in workers(2).run(tasks.nan_step, config):
        assert facts["unchanged"]
        assert not facts["norm_is_finite"]
        assert facts["optimizer_step"] == 1
        assert 3 < facts["next_loss"] < 5


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_an_optimizer_with_the_interface_of_apex(workers: WorkerPools, plain: tuple, zero: int) -> None:
    options: dict = dict(parallel__zero_stage=zero, train__global_batch_size=8, train__micro_batch_size=2)
    names = workers(2).run(tasks.with_fake_apex, tasks.optimizer_name, tasks.tiny_config(**options))
    assert names == ["FakeFusedAdam" if zero else "ClippingFakeFusedAdam"] * 2
    for changes in (
        dict(train__apex="never"),
        dict(parallel__zero_stage=3),
        dict(parallel__offload_optimizer=zero > 0),
    ):
        config = tasks.tiny_config(**options | changes)
        is_torchs = "AdamW" in workers(2).run(tasks.with_fake_apex, tasks.optimizer_name, config)[0]
        assert is_torchs or changes == dict(parallel__offload_optimizer=False)
    run = workers(2).run(tasks.with_fake_apex, tasks.engine_losses, tasks.tiny_config(**options), STEPS)
    assert run[0][0] == pytest.approx(plain[0], rel=2e-5)
    assert run[0][1] == pytest.approx(plain[1], rel=1e-3)
    loaded = workers(2).run(tasks.with_fake_apex, tasks.losses_after_loading, tasks.tiny_config(**options), 3, 3)
    for straight, resumed in loaded:
        assert straight == resumed
