"""Tile sizes, warps and pipeline stages of each kernel: what ``benchmarks/tune.py`` varies.

Chosen by measurement on an H200 (docs/kernels.md); on cards with less shared memory stages and tiles shrink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mosa.kernels.triton.common import power_of_2, shared_memory

Tiles = dict[str, int]
L2_BYTES = 24 << 20  # of the states that all heads gather from at a time: half of Hopper's cache


def group(tiles: int, tile_bytes: int, weight_bytes: int) -> int:
    """How many tiles of rows all heads take before the next: what lets device memory be read least.

    Args:
        tiles: of one head.
        tile_bytes: of the states among which the tokens of a tile lie.
        weight_bytes: of the matrices of all heads, read once for each group.
    """
    if weight_bytes <= L2_BYTES:
        return 1
    return max(1, min(tiles, L2_BYTES // max(1, tile_bytes)))


def _fitted(chosen: Tiles, device: torch.device, taken: Callable[[Tiles], int], shrinks: str, least: int) -> Tiles:
    """With fewer stages, then smaller tiles, until the bytes that are taken fit the card's shared memory."""
    while taken(chosen) > 0.9 * shared_memory(device) and (chosen["num_stages"] > 2 or chosen[shrinks] > least):
        if chosen["num_stages"] > 2:
            chosen["num_stages"] -= 1
        else:
            chosen[shrinks] //= 2
    return chosen


def selection(length: int) -> Tiles:
    """Scores of a head that one program holds at once; all of them up to the largest block."""
    block = min(power_of_2(length), 16_384)
    return dict(BLOCK=block, num_warps=max(1, min(16, block // 1024)), maxnreg=96)  # as many programs as hide the loads


def gathered(dtype: torch.dtype, device: torch.device, columns: int, rows_each: int, gates: bool) -> Tiles:
    """Rows of a head by all columns of its matrix; INNER is along the width of the states.

    ``rows_each`` is how many rows there are for each multiprocessor; with ``gates`` the products meet as many numbers
    again.
    """
    chosen = dict(ROWS=256, INNER=64, num_warps=8, num_stages=4 if columns <= 64 else 3)
    if dtype == torch.float32:
        chosen = dict(ROWS=32, INNER=32, num_warps=4, num_stages=2)
    elif columns > 192:  # as many as the registers hold the products of
        chosen |= dict(ROWS=128) | (dict(INNER=32, num_stages=4) if columns > 256 else {})
    elif gates and columns <= 64:
        chosen |= dict(ROWS=128)
    while chosen["ROWS"] > max(64, rows_each):
        chosen["ROWS"] //= 2

    def taken(tiles: Tiles) -> int:
        return tiles["num_stages"] * tiles["INNER"] * (tiles["ROWS"] + columns) * dtype.itemsize

    return _fitted(chosen, device, taken, "ROWS", 32)


def scattered(dtype: torch.dtype, device: torch.device, parts: int, size: int, rows: int) -> Tiles:
    """Rows of a head by columns of the output, SWEEP tiles of them on the same rows, of which a chunk has ``rows``."""
    chosen = dict(ROWS=128, COLUMNS=64, SWEEP=16, num_warps=8, num_stages=2)
    inner = parts * power_of_2(size) * dtype.itemsize
    if dtype == torch.float32:
        chosen |= dict(ROWS=32, COLUMNS=32, num_warps=4)
    elif rows <= 64 or 128 * inner > shared_memory(device) // 2:
        chosen |= dict(ROWS=64, num_warps=4, num_stages=3)

    def taken(tiles: Tiles) -> int:
        return inner * (tiles["ROWS"] + tiles["num_stages"] * tiles["COLUMNS"]) + tiles["ROWS"] * tiles["COLUMNS"] * 4

    return _fitted(chosen, device, taken, "COLUMNS", 16)


def combine(width: int, each: int) -> Tiles:
    """UNROLL partial products of one token, which has about ``each``, at a time by columns of the output."""
    columns = min(power_of_2(width), 1024)
    return dict(UNROLL=32 if each >= 32 else 16, COLUMNS=columns, num_warps=max(1, columns // 256))


def weight_gradient(dtype: torch.dtype, device: torch.device, parts: int, size: int) -> Tiles:
    """COLUMNS of the states by WIDTH of the values; ROWS is along the rows of a head."""
    width = power_of_2(size)
    columns = 128 if parts * width <= 384 else 64
    warps = 4 if parts * width <= 192 else 8
    chosen = dict(ROWS=64, COLUMNS=columns, WIDTH=width, num_warps=warps, num_stages=3)
    if dtype == torch.float32:
        chosen = dict(ROWS=32, COLUMNS=32, WIDTH=width, num_warps=4, num_stages=2)
    elif parts == 3 and warps == 4:
        chosen |= dict(ROWS=32, num_stages=4)

    def taken(tiles: Tiles) -> int:
        return tiles["num_stages"] * tiles["ROWS"] * (tiles["COLUMNS"] + parts * width + 16) * dtype.itemsize

    return _fitted(chosen, device, taken, "ROWS", 16)


def attention(dtype: torch.dtype, device: torch.device, selected: int, width: int, is_backward: bool) -> Tiles:
    """Queries by as many keys; ``width`` is the head's, rounded up to a power of 2."""
    block = min(power_of_2(selected), 64 if dtype.itemsize < 4 else 32)
    while block > 16 and 13.1 * block * width * dtype.itemsize > shared_memory(device):  # what the backward pass takes
        block //= 2
    chosen = dict(BLOCK=block, num_warps=4 if block * width <= 64 * 128 else 8, num_stages=1)
    if not is_backward and dtype.itemsize < 4 and selected <= block and width <= 64:
        chosen |= dict(maxnreg=128)  # nothing to prefetch, so that more programs are what hides the loads
    if is_backward and dtype.itemsize < 4 and selected > block:
        chosen |= dict(num_stages=2)
    return chosen
