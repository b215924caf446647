"""Selection by thresholds: training is the same at every layout, and a restart changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mosa.config import Config
from tests.distributed import tasks, threshold_tasks
from tests.distributed.layouts import check_loading, check_resuming
from tests.distributed.pool import WorkerPools

WARMUP = 2


def make_config(**changes: object) -> Config:
    options = {"mosa__selection": "threshold", "mosa__threshold_warmup_steps": WARMUP, "run__seed": 5}
    options |= {"mosa__load_feedback": 0.0, "mosa__capacity_factor": 2.0}
    return tasks.tiny_config(**options | changes)


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, make_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of training in one process."""
    found = workers(1).run(threshold_tasks.facts, make_config(parallel__zero_stage=0), seed_checkpoint)[0]
    assert found["margin"] > 1e-6  # rounding must not change a selection
    assert found["capacities"] == {6, 12}  # k during warm-up, twice as many slots afterwards
    return found


def check_equal(found: dict, single: dict) -> None:
    assert found["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert found["validation"] == pytest.approx(single["validation"], rel=1e-5)
    for step, (ours, theirs) in enumerate(zip(found["thresholds"], single["thresholds"], strict=True)):
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5, msg=f"{name} after step {step}")
            if name.endswith("updates"):
                assert (expected == step + 1).all()


CELLS = [  # ZeRO stage, tensor parallel size, sequence parallel, world size, recompute
    (0, 1, False, 4, "none"), (1, 1, False, 4, "full"), (3, 1, False, 2, "full"), (2, 2, False, 2, "none"),
    (1, 2, True, 2, "attention"), (3, 2, True, 4, "attention"), (1, 4, True, 4, "none"), (0, 4, False, 4, "full"),
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_thresholds_and_losses_do_not_depend_on_the_layout(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, cell: tuple
) -> None:
    zero, tensor_parallel, sequence_parallel, world, recompute = cell
    config = make_config(
        parallel__zero_stage=zero, parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=sequence_parallel, train__micro_batch_size=4 * tensor_parallel // world,
        train__recompute=recompute,
    )  # fmt: skip
    for found in workers(world).run(threshold_tasks.facts, config, seed_checkpoint):
        check_equal(found, single)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_all_micro_batches_of_a_step_count(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, micro_batch: int
) -> None:
    config = make_config(train__micro_batch_size=micro_batch)
    check_equal(workers(1).run(threshold_tasks.facts, config, seed_checkpoint)[0], single)


@pytest.mark.parametrize("zero", [1, 3])
def test_thresholds_of_a_bf16_model_are_fp32(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, zero: int
) -> None:
    config = make_config(parallel__zero_stage=zero, train__precision="bf16", train__micro_batch_size=2)
    found = workers(2).run(threshold_tasks.facts, config, seed_checkpoint)[0]
    assert found["types"] == {"torch.float32"}
    for name, expected in single["thresholds"][0].items():
        torch.testing.assert_close(found["thresholds"][0][name], expected, rtol=0, atol=0.02)
    assert found["losses"] == pytest.approx(single["losses"], rel=1e-2)


def test_equal_scores_give_bitwise_equal_thresholds(workers: WorkerPools) -> None:
    generator = torch.Generator().manual_seed(3)
    drift = torch.arange(6).view(6, 1, 1, 1) / 3
    scores = (torch.randn(6, 8, 8, 24, generator=generator) * 2 + drift).sigmoid()
    one = workers(1).run(threshold_tasks.thresholds_of_scores, make_config(), scores)[0]
    assert any((thresholds > 0.5).any() for thresholds in one.values())
    for world, tensor_parallel in ((4, 1), (2, 1), (2, 2), (4, 2)):
        config = make_config(parallel__tensor_model_parallel_size=tensor_parallel, train__micro_batch_size=1)
        for found in workers(world).run(threshold_tasks.thresholds_of_scores, config, scores):
            assert all(torch.equal(found[name], one[name]) for name in one)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_non_finite_step_keeps_all_thresholds(workers: WorkerPools, zero: int) -> None:
    config = make_config(parallel__zero_stage=zero, train__global_batch_size=8, train__micro_batch_size=2)
    assert workers(2).run(threshold_tasks.nan_step, config) == [(True, True)] * 2


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("before", [1, 3])  # during and after the warm-up
def test_resuming_from_an_engine_state_is_bitwise_exact(
    workers: WorkerPools, zero: int, precision: str, before: int
) -> None:
    check_resuming(workers, make_config, zero, precision, before)


def test_a_checkpoint_loads_at_any_layout(workers: WorkerPools, tmp_path: Path) -> None:
    layouts = [(1, 1, 4), (2, 3, 4), (4, 2, 4), (1, 0, 1)]
    check_loading(workers, make_config, tmp_path, layouts, others=(1, 2), mosa__threshold_warmup_steps=1)
