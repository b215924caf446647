"""Collectives by copies through memory that all ranks reach, with threads as ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from megatron_mosa.parallel.copies import exchange_through, gather_through


class Memory:
    """A rank's view of the memory of all ranks, with the interface of torch's symmetric memory."""

    def __init__(self, rank: int, all_memory: list[Tensor], barrier: Barrier) -> None:
        self.rank, self._all, self.barrier = rank, all_memory, barrier.wait

    def get_buffer(self, rank: int, sizes: torch.Size, dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        return self._all[rank].view(dtype)[storage_offset : storage_offset + sizes.numel()].view(sizes)


def on_ranks(size: int, run: Callable[[Memory], Tensor], times: int = 1) -> list[Tensor]:
    memory, barrier = [torch.zeros(4096, dtype=torch.uint8) for _ in range(size)], Barrier(size, timeout=20)
    ranks = [Memory(rank, memory, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        for _ in range(times):  # what an earlier collective left does no harm
            found = list(threads.map(run, ranks))
    return found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_gather_and_reduce_scatter(size: int) -> None:
    wholes = torch.randn(size, 2 * size, 3, dtype=torch.float64)

    def gather(memory: Memory) -> Tensor:
        output = torch.empty(2 * size, 3, dtype=torch.float64)
        gather_through(memory, wholes[0].chunk(size)[memory.rank], output.chunk(size))
        return output

    def reduce_scatter(memory: Memory) -> Tensor:
        slices = wholes[memory.rank].chunk(size)
        received = torch.empty(size - 1, 2, 3, dtype=torch.float64)
        exchange_through(memory, slices, received)
        return slices[memory.rank] + received.sum(0)

    assert all(torch.equal(output, wholes[0]) for output in on_ranks(size, gather, times=3))
    torch.testing.assert_close(torch.cat(on_ranks(size, reduce_scatter, times=3)), wholes.sum(0))
