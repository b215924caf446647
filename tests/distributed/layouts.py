"""What tests of several selections share: layouts, and that checkpoints continue exactly and load at any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_mosa.config import Config
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools

MakeConfig = Callable[..., Config]
SMALL_BATCHES = {"train__global_batch_size": 8, "train__micro_batch_size": 2}

CELLS = [  # ZeRO stage, tensor parallel size, sequence parallel, world size, recompute, micro-batch
    (0, 1, False, 1, "none", 2), (1, 1, False, 4, "full", 1), (3, 1, False, 2, "attention", 2),
    (2, 2, False, 2, "none", 4), (1, 2, True, 2, "attention", 4), (3, 2, True, 4, "full", 2),
    (1, 4, True, 4, "none", 2),
]  # fmt: skip


def config_of(cell: tuple, make_config: MakeConfig) -> Config:
    """Return the configuration of one of ``CELLS``, whose fourth entry is the world size."""
    zero, tensor_parallel, sequence_parallel, _, recompute, micro_batch = cell
    return make_config(
        parallel__zero_stage=zero, parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=sequence_parallel, train__micro_batch_size=micro_batch, train__recompute=recompute,
    )  # fmt: skip


def check_resuming(workers: WorkerPools, make_config: MakeConfig, zero: int, precision: str, before: int = 3) -> None:
    """Check that a restart after ``before`` of 4 steps gives bitwise equal losses."""
    config = make_config(parallel__zero_stage=zero, train__precision=precision, **SMALL_BATCHES)
    for straight, resumed in workers(2).run(tasks.losses_after_loading, config, before, 4):
        assert straight == resumed


def check_loading(
    workers: WorkerPools,
    make_config: MakeConfig,
    folder: Path,
    layouts: Sequence[tuple[int, int, int]] = ((1, 1, 4), (2, 3, 4), (4, 2, 4)),
    others: Sequence[int] = (1,),
    **options: object,
) -> None:
    """Check that a checkpoint of each layout loads at another one.

    Args:
        layouts: tensor parallel size, ZeRO stage and world size of each.
        others: which checkpoints each layout loads, as distances in the list.
        options: of all configurations.
    """

    def config(size: int, zero: int, seed: int) -> Config:
        layout = {"parallel__tensor_model_parallel_size": size, "parallel__zero_stage": zero, "run__seed": seed}
        return make_config(**SMALL_BATCHES | layout | options)

    losses = [
        workers(world).run(tasks.save_after_training, config(size, zero, number), folder / str(number))[0]
        for number, (size, zero, world) in enumerate(layouts)
    ]
    for place, (size, zero, world) in enumerate(layouts):
        numbers = [(place + distance) % len(layouts) for distance in others]
        paths = [folder / str(number) for number in numbers]
        for rank in workers(world).run(tasks.load_each, config(size, zero, 99), paths):
            for (unequal, loss), number in zip(rank, numbers, strict=True):
                assert unequal == 0
                assert loss == pytest.approx(losses[number], rel=1e-6)
