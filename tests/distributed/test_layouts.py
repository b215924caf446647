"""Checkpoints of one layout loaded at another: a few pairs here, all pairs by ``make test-matrix``.

``python -m tests.distributed.test_layouts`` prints the differences of all pairs as a Markdown table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

from megatron_mosa.config import Config
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools


class Cell(NamedTuple):
    """A layout: tensor-parallel size, ZeRO stage and data-parallel size."""

    tensor_parallel: int
    zero: int
    data_parallel: int

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel}, ZeRO {self.zero}, DP {self.data_parallel}"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.data_parallel

    def config(self, seed: int) -> Config:
        """Return a model with this seed, with a gated MLP because its halves are split separately."""
        return tasks.tiny_config(
            run__seed=seed, model__activation="swiglu", parallel__zero_stage=self.zero,
            parallel__tensor_model_parallel_size=self.tensor_parallel, train__global_batch_size=8,
            train__micro_batch_size=2,
        )  # fmt: skip


Sources = Callable[[int], Container[int]]
FEW = [Cell(1, 3, 2), Cell(2, 1, 2), Cell(4, 2, 1), Cell(1, 1, 4), Cell(2, 3, 1)]
# Every tensor-parallel size with every stage: once to save, and once to load at another data-parallel size.
SAVED = [*map(Cell._make, [(1, 1, 4), (1, 2, 2), (1, 3, 4), (2, 1, 2), (2, 2, 1), (2, 3, 2), (4, 1, 1), (4, 2, 2)])]
LOADED = [*map(Cell._make, [(1, 1, 2), (1, 2, 4), (1, 3, 2), (2, 1, 4), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 2, 1)])]


def differences(
    workers: WorkerPools, saved: list[Cell], loaded: list[Cell], folder: Path, sources: Sources = lambda _: range(99)
) -> dict:
    """Save at each layout of ``saved`` and load at each of ``loaded``.

    Args:
        sources: maps the number of a layout in ``loaded`` to those in ``saved`` that it reads; all by default.

    Returns:
        For each pair, the number of tensors that are not bitwise equal, and the relative difference of the next loss.
    """
    checkpoints, losses = [], []
    for number, cell in enumerate(saved):
        path = folder / str(number)  # a different seed for each, so that a tensor that is not loaded differs
        losses.append(workers(cell.world_size).run(tasks.save_after_training, cell.config(number), path)[0])
        checkpoints.append(path)
    found = {}
    for place, cell in enumerate(loaded):
        numbers = [number for number in range(len(saved)) if number in sources(place)]
        ranks = workers(cell.world_size).run(tasks.load_each, cell.config(99), [checkpoints[n] for n in numbers])
        for read, number in enumerate(numbers):
            unequal = sum(rank[read][0] for rank in ranks)
            found[saved[number], cell] = unequal, max(abs(rank[read][1] / losses[number] - 1) for rank in ranks)
    return found


def test_a_checkpoint_loads_at_any_layout(workers: WorkerPools, tmp_path: Path) -> None:
    # Each is read by the next two, which have other tensor-parallel sizes, stages and numbers of ranks.
    others = lambda place: ((place + 1) % len(FEW), (place + 2) % len(FEW))  # noqa: E731
    for pair, (unequal, loss) in differences(workers, FEW, FEW, tmp_path, others).items():
        assert unequal == 0, pair
        assert loss < 1e-6, pair


def test_data_parallel_ranks_share_the_work_of_a_save(workers: WorkerPools) -> None:
    for cell in (Cell(1, 1, 4), Cell(2, 3, 2)):
        shares, (whole, *_) = zip(*workers(cell.world_size).run(tasks.snapshot_sizes, cell.config(0)), strict=True)
        assert sum(shares) == whole * cell.tensor_parallel
        assert max(shares) < 1.2 * whole / cell.data_parallel


def main() -> None:
    """Compare all pairs, and print the table."""
    workers = WorkerPools()
    with tempfile.TemporaryDirectory() as folder:
        found = differences(workers, SAVED, LOADED, Path(folder))
    workers.close()
    print("| saved | loaded | tensors that differ | next loss, relative difference |\n| --- | --- | ---: | ---: |")
    for (source, target), (unequal, loss) in found.items():
        print(f"| {source} | {target} | {unequal} | {loss:.1e} |")
    if any(unequal or loss > 1e-6 for unequal, loss in found.values()):
        raise SystemExit("some pairs differ")


if __name__ == "__main__":
    main()
