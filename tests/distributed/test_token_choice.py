"""Token choice: losses and biases are the same at every layout, and a restart changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mosa.config import Config
from tests.distributed import tasks, threshold_tasks
from tests.distributed.layouts import CELLS, check_loading, check_resuming, config_of
from tests.distributed.pool import WorkerPools


def make_config(**changes: object) -> Config:
    options = {"mosa__selection": "token_choice", "mosa__balance_rate": 0.02, "mosa__capacity_factor": 1.5}
    return tasks.tiny_config(**options | changes)


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, make_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of training in one process."""
    found = workers(1).run(threshold_tasks.choice_facts, make_config(parallel__zero_stage=0), seed_checkpoint)[0]
    assert found["margin"] > 1e-6  # rounding must not change a choice
    assert found["dropped"] > 0 and found["largest bias"] > 0.05  # the capacity and the biases had an effect
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_and_biases_do_not_depend_on_the_layout(
    workers: WorkerPools, seed_checkpoint: Path, single: dict, cell: tuple
) -> None:
    config = config_of(cell, make_config)
    for found in workers(cell[3]).run(threshold_tasks.choice_facts, config, seed_checkpoint):
        assert found["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert found["validation"] == pytest.approx(single["validation"], rel=1e-5)
        for ours, theirs in zip(found["biases"], single["biases"], strict=True):
            assert len(ours) == 2
            for name, expected in theirs.items():
                assert torch.equal(ours[name], expected), name


def test_the_mean_score_counts_selected_tokens_not_ranks(workers: WorkerPools, seed_checkpoint: Path) -> None:
    """Ranks select different numbers of tokens."""
    layouts = [(1, 1, False, 1, "none", 4), (1, 2, True, 2, "none", 4)]
    alone, split = (
        workers(cell[3]).run(threshold_tasks.choice_facts, config_of(cell, make_config), seed_checkpoint)[0]["scores"]
        for cell in layouts
    )
    assert len(alone) > 1 and split == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (3, "bf16"), (0, "fp32")])
def test_resuming_from_an_engine_state_is_bitwise_exact(workers: WorkerPools, zero: int, precision: str) -> None:
    check_resuming(workers, make_config, zero, precision)


def test_a_checkpoint_loads_at_any_layout(workers: WorkerPools, tmp_path: Path) -> None:
    check_loading(workers, make_config, tmp_path)
