"""Tile sizes, warps and pipeline stages of each kernel: what ``benchmarks/tune.py`` varies."""

from __future__ import annotations

import torch

from megatron_mosa.kernels.triton.common import power_of_2, shared_memory

Tiles = dict[str, int]


def gathered(dtype: torch.dtype, parts: int, size: int) -> Tiles:
    """Rows of a head by columns of its matrix; INNER is along the width of the states."""
    if dtype == torch.float32:
        return dict(ROWS=64, COLUMNS=min(power_of_2(size), 32), INNER=32, num_warps=4, num_stages=3)
    columns = min(power_of_2(size), 64 if parts == 3 else 128)
    return dict(ROWS=128, COLUMNS=columns, INNER=64, num_warps=8, num_stages=3)


def scattered(dtype: torch.dtype, size: int) -> Tiles:
    """Rows of a head by columns of the output; INNER is along the width of a head."""
    if dtype == torch.float32:
        return dict(ROWS=64, COLUMNS=64, INNER=min(power_of_2(size), 32), num_warps=4, num_stages=2)
    return dict(ROWS=128, COLUMNS=128, INNER=min(power_of_2(size), 64), num_warps=8, num_stages=2)


def combine(width: int) -> Tiles:
    """Partial products of one token at a time by columns of the output."""
    return dict(ENTRIES=4, COLUMNS=min(power_of_2(width), 1024), num_warps=4)


def weight_gradient(dtype: torch.dtype, parts: int, size: int) -> Tiles:
    """COLUMNS of the states by INNER of the values; ROWS is along the rows of a head."""
    if dtype == torch.float32:
        return dict(ROWS=32, COLUMNS=64, INNER=min(power_of_2(size), 32), num_warps=4, num_stages=3)
    inner = min(power_of_2(size), 64 if parts == 3 else 128)
    return dict(ROWS=64, COLUMNS=128, INNER=inner, num_warps=8, num_stages=3)


def attention(dtype: torch.dtype, device: torch.device, selected: int, width: int) -> Tiles:
    """Queries by as many keys; ``width`` is the head's, rounded up to a power of 2."""
    block, size = min(power_of_2(selected), 64), torch.empty((), dtype=dtype).element_size()
    while block > 16 and 13.1 * block * width * size > shared_memory(device):  # what the backward pass takes
        block //= 2
    return dict(BLOCK=block, num_warps=4 if block * width <= 64 * 64 else 8, num_stages=2)
