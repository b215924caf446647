"""Checkpoints of one layout loaded at another: a few pairs here, all of them by ``make test-matrix``.

python -m tests.distributed.test_layouts      # every ordered pair, a Markdown table of the differences
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
    """A layout."""

    tensor_parallel: int
    zero: int
    data_parallel: int

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel}, ZeRO {self.zero}, DP {self.data_parallel}"

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.tensor_parallel * self.data_parallel

    def config(self, seed: int) -> Config:
        """Of a model of that seed; a gated MLP, since its halves are split apart."""
        return tasks.tiny_config(
            run__seed=seed, model__activation="swiglu", parallel__zero_stage=self.zero,
            parallel__tensor_model_parallel_size=self.tensor_parallel, train__global_batch_size=8,
            train__micro_batch_size=2,
        )  # fmt: skip


Sources = Callable[[int], Container[int]]
FEW = [Cell(1, 3, 2), Cell(2, 1, 2), Cell(4, 2, 1), Cell(1, 1, 4), Cell(2, 3, 1)]
# Every tensor-parallel size with every stage, once to save and once, at another data-parallel size, to load.
SAVED = [*map(Cell._make, [(1, 1, 4), (1, 2, 2), (1, 3, 4), (2, 1, 2), (2, 2, 1), (2, 3, 2), (4, 1, 1), (4, 2, 2)])]
LOADED = [*map(Cell._make, [(1, 1, 2), (1, 2, 4), (1, 3, 2), (2, 1, 4), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 2, 1)])]


def differences(
    workers: WorkerPools, saved: list[Cell], loaded: list[Cell], folder: Path, sources: Sources = lambda _: range(99)
) -> dict:
    """Of each pair: how many tensors are not equal to the last bit, and how far the next loss is away, relatively.

    ``sources`` says which of ``saved``, by number, one of ``loaded`` reads; all of them by default.
    """
    checkpoints, losses = [], []
    for number, cell in enumerate(saved):
        path = folder / str(number)  # another seed for each: what is not loaded shows
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
    # Each is read by the two that come after it, at other tensor-parallel sizes, stages and numbers of ranks.
    others = lambda place: ((place + 1) % len(FEW), (place + 2) % len(FEW))  # noqa: E731
    for pair, (unequal, loss) in differences(workers, FEW, FEW, tmp_path, others).items():
        assert unequal == 0, pair
        assert loss < 1e-6, pair


def test_data_parallel_ranks_share_what_is_saved(workers: WorkerPools) -> None:
    for cell in (Cell(1, 1, 4), Cell(2, 3, 2)):
        shares, (whole, *_) = zip(*workers(cell.world_size).run(tasks.snapshot_sizes, cell.config(0)), strict=True)
        assert sum(shares) == whole * cell.tensor_parallel
        assert max(shares) < 1.2 * whole / cell.data_parallel


def main() -> None:
    """All pairs."""
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
