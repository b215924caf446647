"""The rows of heads: which token each row of a head holds, and which rows each token has."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import cdiv, launch, power_of_2

HEADS = 32  # heads per word of the bitmap
# Block sizes of one program:
SEQUENCES = 16
SLOTS = 256  # at most
TOKENS = 128
ROWS = 512
LISTED_HEADS = 1024  # whose tiles a program lists at once


class Rows(NamedTuple):
    """The filled slots of each head, packed without gaps in the order of sequences and then of positions.

    Their number differs between heads; tensors of rows have R = B * k of them for each head, and what follows a head's
    last row is undefined.
    """

    token_indices: Tensor
    """int32 [E, R]: the token of each row, as b << ``bits_of(T)`` | t."""

    cu_seqlens: Tensor
    """int32 [E, B + 1]: cumulative number of rows over the sequences of each head."""

    offsets: Tensor
    """int32 [B * T + 1]: cumulative number of rows over the tokens of the batch, which delimits their entries."""

    entries: Tensor
    """int32 [B * E * k]: for each token the rows that hold it, as e << ``bits_of(S * k)`` | row, in the order of heads.

    Products of rows are made S sequences at a time; the row is counted from the head's first one in such a chunk.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, E, k and T."""
        heads, batch = self.cu_seqlens.shape[0], self.cu_seqlens.shape[1] - 1
        return batch, heads, self.token_indices.shape[1] // batch, (len(self.offsets) - 1) // batch

    @property
    def shift(self) -> int:
        """``bits_of(T)``, of ``token_indices``."""
        return bits_of(self.shape[3])


def bits_of(length: int) -> int:
    """Return the number of bits of an index below ``length``; shifts then replace divisions in kernels."""
    return max(1, (length - 1).bit_length())


@triton.jit
def unpack_index(b_index, SHIFT):
    """Return sequence and position of a packed token index, or head and row of an entry."""
    i_outer = b_index >> SHIFT
    return i_outer, b_index - (i_outer << SHIFT)


@triton.jit(do_not_specialize=["B"])
def _starts_kernel(p_indices, p_cu_seqlens, B, E, K, T, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Count the filled slots of one head in each sequence, and accumulate over the sequences."""
    i_head = tl.program_id(0)
    p_row = p_cu_seqlens + i_head * (B + 1)
    total = 0
    tl.store(p_row, total)
    for first in range(0, B, SEQUENCES):
        i_batch = first + tl.arange(0, SEQUENCES)
        b_count = tl.zeros((SEQUENCES,), dtype=tl.int32)
        for start in range(0, K, BLOCK):
            i_slot = start + tl.arange(0, BLOCK)
            mask = (i_batch < B)[:, None] & (i_slot < K)[None]
            o_slot = ((i_batch.to(tl.int64) * E + i_head) * K)[:, None] + i_slot[None]
            b_count += tl.sum((tl.load(p_indices + o_slot, mask=mask, other=T) < T).to(tl.int32), axis=1)
        tl.store(p_row + 1 + i_batch, total + tl.cumsum(b_count), mask=i_batch < B)
        total += tl.sum(b_count)


@triton.jit(do_not_specialize=["B"])
def _pack_kernel(
    p_indices, p_cu_seqlens, p_token_indices, p_bitmap, B, E, R, K, T, GROUPS,
    SHIFT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the token indices of one head in one sequence, and set the head's bit in the words of its tokens."""
    i_head, i_batch = tl.program_id(0), tl.program_id(1)
    begin = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch + 1) - begin
    p_slots = p_indices + (i_batch.to(tl.int64) * E + i_head) * K
    p_words = p_bitmap + (i_batch.to(tl.int64) * GROUPS + i_head // HEADS) * T
    for first in range(0, count, BLOCK):
        i_slot = first + tl.arange(0, BLOCK)
        mask = i_slot < count
        i_token = tl.load(p_slots + i_slot, mask=mask, other=0).to(tl.int32)
        tl.store(p_token_indices + i_head.to(tl.int64) * R + begin + i_slot, (i_batch << SHIFT) + i_token, mask=mask)
        b_bit = tl.full((BLOCK,), 1, tl.int32) << (i_head % HEADS)
        tl.atomic_or(p_words + i_token, b_bit, mask=mask, sem="relaxed")  # deterministic in any order


@triton.jit
def _popcount(b_word):
    """Count the set bits of an int32."""
    b_word = b_word.to(tl.uint32, bitcast=True)
    b_word = b_word - ((b_word >> 1) & 0x55555555)
    b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
    b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
    return ((b_word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _count_kernel(p_bitmap, p_before, p_counts, T, GROUPS, TOKENS: tl.constexpr):
    """Count the rows of each token, after a 0: those of all heads, and those before each group of heads."""
    i_batch = tl.program_id(1)
    if (tl.program_id(0) == 0) & (i_batch == 0):
        tl.store(p_counts, 0)
    i_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b_count = tl.zeros((TOKENS,), dtype=tl.int32)
    for i_group in range(GROUPS):
        o_word = (i_batch.to(tl.int64) * GROUPS + i_group) * T + i_token
        tl.store(p_before + o_word, b_count, mask=i_token < T)
        b_count += _popcount(tl.load(p_bitmap + o_word, mask=i_token < T, other=0))
    tl.store(p_counts + 1 + i_batch.to(tl.int64) * T + i_token, b_count, mask=i_token < T)


@triton.jit(do_not_specialize=["SEQUENCES", "ROW_SHIFT", "B"])
def _entries_kernel(
    p_token_indices, p_cu_seqlens, p_bitmap, p_before, p_offsets, p_entries, SEQUENCES, ROW_SHIFT, B, R, T, GROUPS,
    SHIFT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each row of one head to the entries of its token, behind those of the heads before it."""
    i_head = tl.program_id(1)
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < tl.load(p_cu_seqlens + i_head * (B + 1) + B)
    b_index = tl.load(p_token_indices + i_head.to(tl.int64) * R + i_row, mask=m_row, other=0)
    i_batch, i_token = unpack_index(b_index, SHIFT)
    o_word = (i_batch.to(tl.int64) * GROUPS + i_head // HEADS) * T + i_token
    b_lower_heads = (tl.full((BLOCK,), 1, tl.int32) << (i_head % HEADS)) - 1
    b_lower = tl.load(p_bitmap + o_word, mask=m_row, other=0) & b_lower_heads
    o_entry = (
        tl.load(p_offsets + i_batch.to(tl.int64) * T + i_token, mask=m_row, other=0)
        + tl.load(p_before + o_word, mask=m_row, other=0)
        + _popcount(b_lower)
    )
    p_first = p_cu_seqlens + i_head * (B + 1) + i_batch // SEQUENCES * SEQUENCES
    i_row -= tl.load(p_first, mask=m_row, other=0)
    tl.store(p_entries + o_entry, (i_head << ROW_SHIFT) + i_row, mask=m_row)


@triton.jit(do_not_specialize=["SEQUENCES", "B", "TILES"])
def _tiles_kernel(
    p_cu_seqlens, p_tiles, p_number, SEQUENCES, B, E, TILES, ROWS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """List the tiles of a chunk: of each its head, its first row, the same counted from the chunk's first, its rows."""
    first = tl.program_id(0) * SEQUENCES
    last = tl.minimum(first + SEQUENCES, B)
    p_tiles += tl.program_id(0) * 4 * TILES
    number = 0
    for start in range(0, E, HEADS):
        i_head = start + tl.arange(0, HEADS)
        p_row = p_cu_seqlens + i_head * (B + 1)
        b_begin = tl.load(p_row + first, mask=i_head < E, other=0)
        b_rows = tl.load(p_row + last, mask=i_head < E, other=0) - b_begin
        b_tiles = tl.cdiv(b_rows, ROWS)
        p_tile = p_tiles + number + tl.cumsum(b_tiles) - b_tiles
        for i_tile in range(tl.max(b_tiles)):
            mask = i_tile < b_tiles
            tl.store(p_tile + i_tile, i_head, mask=mask)
            tl.store(p_tile + TILES + i_tile, b_begin + i_tile * ROWS, mask=mask)
            tl.store(p_tile + 2 * TILES + i_tile, i_tile * ROWS + tl.zeros_like(i_head), mask=mask)
            tl.store(p_tile + 3 * TILES + i_tile, tl.minimum(b_rows - i_tile * ROWS, ROWS), mask=mask)
        number += tl.sum(b_tiles)
    tl.store(p_number + tl.program_id(0), number)


def rows_of(indices: Tensor, length: int, sequences: int) -> Rows:
    """Build the rows of a selection.

    Args:
        indices: int64 [B, E, k]; empty slots come last and hold T.
        length: T.
        sequences: S, of a chunk in which products of rows are made.

    Raises:
        ValueError: B * E * k, E times S * k, or B times T exceeds int32, S * k and T rounded up to a power of 2.
    """
    batch, heads, selected = indices.shape
    rows, device = batch * selected, indices.device
    shift, row_shift = bits_of(length), bits_of(sequences * selected)
    if max(indices.numel(), heads << row_shift, batch << shift) >= 2**31:
        raise ValueError(
            f"B * E * k = {indices.numel()} selected tokens, E = {heads} heads, B = {batch} sequences of T = {length}; "
            f"expected B * E * k, E * {1 << row_shift} and B * {1 << shift} below {2**31}"
        )
    cu_seqlens = torch.empty((heads, batch + 1), dtype=torch.int32, device=device)
    block = min(power_of_2(selected), SLOTS)
    launch(
        _starts_kernel, (heads,), indices, cu_seqlens, batch, heads, selected, length,
        SEQUENCES=SEQUENCES, BLOCK=block,
    )  # fmt: skip
    groups = cdiv(heads, HEADS)
    token_indices = torch.empty((heads, rows), dtype=torch.int32, device=device)
    bitmap = torch.zeros((batch, groups, length), dtype=torch.int32, device=device)
    launch(
        _pack_kernel, (heads, batch),
        indices, cu_seqlens, token_indices, bitmap, batch, heads, rows, selected, length, groups,
        SHIFT=shift, HEADS=HEADS, BLOCK=block,
        num_warps=max(1, block // 64),
    )  # fmt: skip
    before = torch.empty_like(bitmap)
    counts = torch.empty(batch * length + 1, dtype=torch.int32, device=device)
    tiles = cdiv(length, TOKENS), batch
    launch(_count_kernel, tiles, bitmap, before, counts, length, groups, TOKENS=TOKENS)
    offsets = counts.cumsum(0, dtype=torch.int32)
    entries = torch.empty(indices.numel(), dtype=torch.int32, device=device)
    launch(
        _entries_kernel, (cdiv(rows, ROWS), heads),
        token_indices, cu_seqlens, bitmap, before, offsets, entries, sequences, row_shift, batch, rows, length, groups,
        SHIFT=shift, HEADS=HEADS, BLOCK=ROWS,
    )  # fmt: skip
    return Rows(token_indices, cu_seqlens, offsets, entries)


def tiles_of(rows: Rows, sequences: int, tile_rows: int) -> tuple[Tensor, Tensor, int]:
    """List the tiles of each chunk of sequences, so that the host need not know how many rows there are.

    Returns:
        int32 [chunks, 4, most]: head, first row, the same row counted from the head's first in the chunk, and number of
        rows of each tile; int32 [chunks]: how many tiles there are; and the most there can be.
    """
    batch, heads, selected, _ = rows.shape
    most = heads * cdiv(sequences * selected, tile_rows)
    lists = rows.cu_seqlens.new_empty((cdiv(batch, sequences), 4, most))
    numbers = lists.new_empty(len(lists))
    launch(
        _tiles_kernel, (len(lists),), rows.cu_seqlens, lists, numbers, sequences, batch, heads, most,
        ROWS=tile_rows, HEADS=LISTED_HEADS,
    )  # fmt: skip
    return lists, numbers, most
