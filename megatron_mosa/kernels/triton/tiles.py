"""Tile sizes, warps and pipeline stages of each kernel, which ``benchmarks/tune.py`` varies.

Chosen by measurement on an H200 (docs/kernels.md); GPUs with less shared memory use fewer stages and smaller tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from megatron_mosa.kernels.triton.common import power_of_2, shared_memory

Tiles = dict[str, int]
GATHERED_BYTES = 24 << 20  # of states that stay in the L2 cache while all heads gather from them: half of Hopper's
SWEPT_BYTES = 48 << 20  # of states where all heads go through the sequences in step


@functools.lru_cache
def group(tiles: int, tile_bytes: int, gathered_bytes: int, repeated_bytes: int, cache_bytes: int) -> int:
    """Return how many tiles of every head run before the next tiles, so that device memory is read least.

    What stands beside the states is read once per group. Of what the heads gather, a share is found in the cache, which
    falls with the size of the states that a group needs. All tiles of a head run together unless that reads clearly
    more.

    Args:
        tiles: number of tiles of one head.
        tile_bytes: size of the states that contain what the heads gather for one tile.
        gathered_bytes: what all heads gather for all tiles.
        repeated_bytes: size of the other operand, of all heads.
        cache_bytes: of the states that stay in the L2 cache.
    """

    def bytes_read(size: int) -> float:
        misses = 1 - cache_bytes / max(1, size * tile_bytes)
        states = max(tiles * tile_bytes, gathered_bytes * misses)
        repeats = 1 if repeated_bytes + size * tile_bytes <= cache_bytes else -(-tiles // size)
        return states + repeated_bytes * repeats

    best = min((1 << power for power in range(tiles.bit_length())), key=bytes_read)
    return best if bytes_read(best) < 0.82 * bytes_read(tiles) else tiles


def _fitted(chosen: Tiles, limit: float, shared_bytes: Callable[[Tiles], int], shrinks: str, minimum: int) -> Tiles:
    """Reduce the number of stages, then the tile size ``shrinks``, until the tiles fit into ``limit`` bytes."""
    while shared_bytes(chosen) > limit and (chosen["num_stages"] > 2 or chosen[shrinks] > minimum):
        if chosen["num_stages"] > 2:
            chosen["num_stages"] -= 1
        else:
            chosen[shrinks] //= 2
    return chosen


def scores(heads: int, in_fp32: bool) -> Tiles:
    """Tiles of TOKENS by HEADS; COLUMNS is along the width of the states."""
    if in_fp32:
        return dict(TOKENS=128, HEADS=64, COLUMNS=32, num_warps=8)
    # Few tiles of heads, because each reads all states.
    return dict(TOKENS=128, HEADS=64 if heads <= 64 else 128, COLUMNS=64, num_warps=4 if heads <= 64 else 8)


def selection(length: int) -> Tiles:
    """BLOCK: scores of a head that a program holds at once, all of them if possible."""
    block = min(power_of_2(length), 16_384)
    # Just enough registers to hold the scores, so that many programs hide each other's latency.
    return dict(BLOCK=block, num_warps=max(1, min(16, block // 1024)), maxnreg=96 if block < 8192 else 128)


def select_above(length: int) -> Tiles:
    """BLOCK: scores of a head that a program compares at once."""
    block = min(power_of_2(length), 2048)
    return dict(BLOCK=block, num_warps=max(1, block // 512))


def follow(length: int) -> Tiles:
    """BLOCK: scores of a head among which a program, one warp, searches for the next selected token."""
    return dict(BLOCK=min(power_of_2(length), 64), num_warps=1)


def count_scores(length: int) -> Tiles:
    """BLOCK: scores of a head that a program counts at once."""
    block = min(power_of_2(length), 1024)
    return dict(BLOCK=block, num_warps=max(1, block // 256))


def gathered(dtype: torch.dtype, device: torch.device, columns: int, rows_each: int, gates: bool) -> Tiles:
    """Tiles of ROWS of a head by all columns of its matrix; INNER is along the width of the states.

    Args:
        columns: number of columns of a tile.
        rows_each: number of rows per multiprocessor.
        gates: whether the products are multiplied by gates, which needs as many registers again.
    """
    chosen = dict(ROWS=256, INNER=64, num_warps=8, num_stages=4 if columns <= 64 else 3)
    if dtype == torch.float32:
        chosen = dict(ROWS=32, INNER=32, num_warps=4, num_stages=2)
    elif columns > 192:  # the maximum whose products fit into registers
        chosen |= dict(ROWS=128) | (dict(INNER=32, num_stages=4) if columns > 256 else {})
    elif gates and columns <= 64:
        chosen |= dict(ROWS=128)
    while chosen["ROWS"] > max(64, rows_each):
        chosen["ROWS"] //= 2

    def shared_bytes(tiles: Tiles) -> int:
        return tiles["num_stages"] * tiles["INNER"] * (tiles["ROWS"] + columns) * dtype.itemsize

    return _fitted(chosen, 0.9 * shared_memory(device), shared_bytes, "ROWS", 32)


def scattered(dtype: torch.dtype, device: torch.device, inner: int, width: int, rows: int, is_described: bool) -> Tiles:
    """Tiles of ROWS of a head by COLUMNS of the output, PROGRAMS of them at a time on a multiprocessor.

    Args:
        inner: size of the dimension that is summed over, along which a tile is INNER.
        width: number of columns of the output.
        rows: number of rows of a head in a chunk, at most.
        is_described: whether tiles are moved by descriptors.
    """
    chosen = dict(ROWS=128, COLUMNS=128, INNER=64, PROGRAMS=1, num_warps=8, num_stages=4 if is_described else 3)
    if dtype == torch.float32:
        chosen |= dict(ROWS=32, COLUMNS=32, INNER=32, PROGRAMS=8, num_warps=4, num_stages=2)
    elif rows <= 64:
        chosen |= dict(ROWS=64, PROGRAMS=2, num_warps=4, num_stages=3)
    elif is_described and inner > 128:  # enough to multiply while the products of the last tile are stored
        chosen |= dict(COLUMNS=256, num_stages=3)
    elif is_described and inner <= 64:  # one step a tile, whose entry in the list is loaded in stages, too
        chosen |= dict(num_stages=6)
    elif not is_described and (inner % 64 or width % 128):  # masks, too, need registers
        chosen |= dict(COLUMNS=64)
    if inner % 64:  # tiles of 64 would be empty in part
        chosen |= dict(INNER=32)
    chosen["COLUMNS"] = min(chosen["COLUMNS"], power_of_2(width))

    def shared_bytes(tiles: Tiles) -> int:
        stages = tiles["num_stages"] * tiles["INNER"] * (tiles["ROWS"] + tiles["COLUMNS"])
        return tiles["PROGRAMS"] * dtype.itemsize * (stages + tiles["ROWS"] * min(tiles["COLUMNS"], 128))

    return _fitted(chosen, shared_memory(device), shared_bytes, "COLUMNS", 16)


def combine(dtype: torch.dtype, width: int, each: int, has_pairs: bool) -> Tiles:
    """UNROLL: products of a token, which has about ``each``, that are loaded at once; COLUMNS of the output.

    ``maxnreg`` is no less than the kernel needs: without it, the compiler saves registers and loads few rows at once.
    """
    columns, unroll = min(power_of_2(width), 1024), 4 if each < 8 else 8
    if has_pairs:  # each product needs a row of the router, too
        chosen = dict(UNROLL=unroll, maxnreg=96 if unroll == 4 else 128)
    else:
        chosen = dict(UNROLL=16, maxnreg=128) if each >= 16 else dict(UNROLL=unroll, maxnreg=80)
    if dtype == torch.float32:
        chosen["UNROLL"] //= 2
    return chosen | dict(COLUMNS=columns, num_warps=max(1, columns // 256))


def weight_gradient(dtype: torch.dtype, device: torch.device, parts: int, size: int) -> Tiles:
    """Tiles of COLUMNS of the states by WIDTH of the values; ROWS is along the rows of a head."""
    width = power_of_2(size)
    columns = 128 if parts * width <= 384 else 64
    warps = 4 if parts * width <= 192 else 8
    chosen = dict(ROWS=64, COLUMNS=columns, WIDTH=width, num_warps=warps, num_stages=3)
    if dtype == torch.float32:
        chosen = dict(ROWS=32, COLUMNS=32, WIDTH=width, num_warps=4, num_stages=2)
    elif parts == 3 and warps == 4:
        chosen |= dict(ROWS=32, num_stages=4)

    def shared_bytes(tiles: Tiles) -> int:
        return tiles["num_stages"] * tiles["ROWS"] * (tiles["COLUMNS"] + parts * width + 16) * dtype.itemsize

    return _fitted(chosen, 0.9 * shared_memory(device), shared_bytes, "ROWS", 16)


def attention(dtype: torch.dtype, device: torch.device, selected: int, width: int, is_backward: bool) -> Tiles:
    """Tiles of BLOCK queries by BLOCK keys; ``width`` is that of a head, rounded up to a power of 2."""
    # A tile of 64, or in backward a second one, would be mostly empty; measured with 32, 40 and 80.
    prefers_16 = 64 < selected <= 96 if is_backward else selected <= 48
    if dtype.itemsize < 4 and width <= 64 and prefers_16:
        return dict(BLOCK=16, num_warps=2 if is_backward else 1, num_stages=2)
    block = min(power_of_2(selected), 64 if dtype.itemsize < 4 else 32)
    while block > 16 and 13.1 * block * width * dtype.itemsize > shared_memory(device):  # the need of the backward pass
        block //= 2
    warps = 2 if block <= 32 and width <= 64 else 4 if block * width <= 64 * 128 else 8
    chosen = dict(BLOCK=block, num_warps=warps, num_stages=1)
    if not is_backward and dtype.itemsize < 4 and block == 64 and width <= 64:
        chosen |= dict(maxnreg=128)  # so that more programs run at the same time
    if is_backward and dtype.itemsize < 4 and selected > block:
        chosen |= dict(num_stages=2)
    return chosen


def few_rows(dtype: torch.dtype, device: torch.device, selected: int, width: int) -> int:
    """Return how many rows of a sequence attention's backward pass computes in one tile, where others have more; or 0.

    With thresholds about half of the sequences have a few rows more than fill a tile, which costs a second kernel.
    """
    few = 32 if 32 < selected <= 48 else 64 if 64 < selected <= 96 else 0
    is_faster = few > 0 and dtype.itemsize < 4 and width <= 64
    return few if is_faster and attention(dtype, device, few, width, True)["BLOCK"] == few else 0
