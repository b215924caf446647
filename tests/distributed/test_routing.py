"""Routing heads: losses and centroids are the same at every layout, and a restart changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mosa.config import Config
from tests.distributed import tasks, threshold_tasks
from tests.distributed.layouts import CELLS, check_loading, check_resuming, config_of
from tests.distributed.pool import WorkerPools


def make_config(**changes: object) -> Config:
    heads = {"model__num_dense_heads": 0, "mosa__num_heads": 0, "model__num_routing_heads": 4}
    return tasks.tiny_config(**heads | {"model__routing_clusters": 3, "model__routing_decay": 0.8} | changes)


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, make_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of training in one process."""
    found = workers(1).run(threshold_tasks.routing_facts, make_config(parallel__zero_stage=0), seed_checkpoint)[0]
    assert found["margin"] > 1e-7  # of choices among fp32 numbers around 1: rounding changes none
    first, last = found["centroids"][0], found["centroids"][-1]
    assert all((first[name] - last[name]).norm(dim=-1).max() > 0.1 for name in first)
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_and_centroids_do_not_depend_on_the_layout(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, cell: tuple
) -> None:
    config = config_of(cell, make_config)
    for found in workers(cell[3]).run(threshold_tasks.routing_facts, config, seed_checkpoint):
        for name, expected in single["initial"].items():
            assert torch.equal(found["initial"][name], expected), name
        assert found["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert found["validation"] == pytest.approx(single["validation"], rel=1e-5)
        for ours, theirs in zip(found["centroids"], single["centroids"], strict=True):
            assert len(ours) == 2
            for name, expected in theirs.items():
                torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (3, "bf16"), (0, "fp32")])
def test_resuming_from_an_engine_state_is_bitwise_exact(workers: WorkerPools, zero: int, precision: str) -> None:
    check_resuming(workers, make_config, zero, precision)


def test_a_checkpoint_loads_at_any_layout(workers: WorkerPools, tmp_path: Path) -> None:
    check_loading(workers, make_config, tmp_path)


def test_a_step_that_is_not_finite_moves_no_centroid(workers: WorkerPools) -> None:
    config = make_config(train__global_batch_size=8, train__micro_batch_size=2)
    assert workers(2).run(threshold_tasks.nan_step, config) == [(True, True)] * 2


def test_megatron_checkpoints_contain_the_centroids(workers: WorkerPools, tmp_path: Path) -> None:
    sizes = {size: make_config(parallel__tensor_model_parallel_size=size) for size in (1, 2)}
    saved = workers(2).run(tasks.save_megatron_checkpoint, sizes[2], str(tmp_path / "saved"))[0]
    (loaded,) = workers(1).run(tasks.load_megatron_checkpoint, sizes[1], str(tmp_path / "saved"))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=1e-5)
