"""Keys and values of a prompt, copied from the rows of heads to the blocks of a decoder's cache."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import cdiv, launch, power_of_2

BLOCKS = 4  # of the cache, per program
PAIRS = 1024  # sequences and heads per iteration


@triton.jit(do_not_specialize=["NUMBER"])
def _layout_kernel(p_counts, p_long, p_first, p_totals, NUMBER, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Give consecutive blocks to all pairs of sequence and head, from block 1 on; a single program."""
    ends, largest, full = tl.full((), 1, tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, NUMBER, PAIRS):
        i_pair = start + tl.arange(0, PAIRS)
        mask = i_pair < NUMBER
        b_count = tl.load(p_counts + i_pair, mask=mask, other=0).to(tl.int64)
        b_blocks = (b_count + BLOCK - 1) // BLOCK
        tl.store(p_long + i_pair, b_count, mask=mask)
        tl.store(p_first + i_pair, ends + tl.cumsum(b_blocks, axis=0) - b_blocks, mask=mask)
        ends += tl.sum(b_blocks)
        largest = tl.maximum(largest, tl.max(b_count))
        full += tl.sum((mask & (b_count % BLOCK == 0)).to(tl.int64))
    tl.store(p_totals, ends)
    tl.store(p_totals + 1, largest)
    tl.store(p_totals + 2, full)


def lay_out(counts: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give consecutive blocks of a cache to all sequences and heads.

    Args:
        counts: integers [B, E], contiguous: number of rows.
        block: rows per block.

    Returns:
        The same counts, int64; int64 [B, E], the first block of each; int64 [3], the number of blocks and the one
        before the first, the largest count, and how many counts fill their blocks.
    """
    long, first = torch.empty(2, *counts.shape, dtype=torch.int64, device=counts.device)
    totals = torch.empty(3, dtype=torch.int64, device=counts.device)
    with torch.cuda.device_of(counts):  # Triton launches on the current device
        launch(_layout_kernel, (1,), counts, long, first, totals, counts.numel(), PAIRS=PAIRS, BLOCK=block)
    return long, first, totals


@triton.jit(do_not_specialize=["B", "R", "TABLE", "POOL"])
def _cache_kernel(
    p_qkv, p_cu_seqlens, p_first, p_table, p_keys, p_values, B, E, R, TABLE, POOL,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy some rows of one head in one sequence, those whose blocks exist, and write the numbers of their blocks."""
    i_pair, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_batch, i_head = i_pair // E, i_pair % E
    begin = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch + 1) - begin
    first = tl.load(p_first + i_pair)
    i_block, o_column = i_part * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    i_row = i_part * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK)
    m_row = (i_row < count) & (first + i_row // BLOCK < POOL)
    mask = m_row[:, None] & (o_column < D)[None]
    p_rows = p_qkv + (i_head * R + begin + i_row)[:, None] * (3 * D) + o_column[None]
    o_rows = (first * BLOCK + i_row)[:, None] * D + o_column[None]
    tl.store(p_keys + o_rows, tl.load(p_rows + D, mask=mask, other=0.0), mask=mask)
    tl.store(p_values + o_rows, tl.load(p_rows + 2 * D, mask=mask, other=0.0), mask=mask)
    tl.store(p_table + i_pair * TABLE + i_block, first + i_block, mask=i_block * BLOCK < count)


def store_rows(qkv: Tensor, cu_seqlens: Tensor, first: Tensor, table: Tensor, keys: Tensor, values: Tensor) -> None:
    """Copy keys and values of each head and sequence to consecutive blocks, and number these in the table.

    Args:
        qkv: [E, R, 3h'], rows of each head.
        cu_seqlens: int32 [E, B + 1], as in ``Rows``.
        first: int64 [B, E], the first block of each.
        table: int64 [B, E, n], with room for the numbers of all blocks.
        keys, values: [blocks, rows per block, h'] in the dtype of ``qkv``; the rows per block are a power of 2. Rows of
            blocks beyond these are not stored.
    """
    (batch, heads), (_, block, size) = first.shape, keys.shape
    rows = qkv.shape[1]
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        launch(
            _cache_kernel, (batch * heads, cdiv(rows // batch, BLOCKS * block)),
            qkv, cu_seqlens, first, table, keys, values, batch, heads, rows, table.shape[2],
            len(keys),
            D=size, WIDTH=power_of_2(size), BLOCKS=BLOCKS, BLOCK=block,
        )  # fmt: skip
