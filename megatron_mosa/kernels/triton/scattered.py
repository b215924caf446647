"""Matrix products of the rows of each head, summed over the heads token by token."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, launch, power_of_2, strides
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import Rows, unpack_index

FEWEST_CHUNKS = 4  # of the products of a layer; only one chunk at a time is in memory, until it is summed over heads
SMALL_BYTES = 256 << 20  # products of a layer that need no more memory form one chunk
MOST_BYTES = 1536 << 20  # of a chunk
FEWEST_COLUMNS = 1024  # of a chunk, before it has fewer sequences


@triton.jit(do_not_specialize=["FIRST", "LAST", "B"])
def _scattered_kernel(
    p_values, p_token_indices, p_cu_seqlens, p_pairs, p_pair_weight, p_weight, p_products,
    FIRST, LAST, B, R, K, H, FIRST_COLUMN, CHUNK, stride_e, stride_d, stride_h,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """Multiply rows of the sequences FIRST to LAST - 1 with CHUNK columns of the weights, from FIRST_COLUMN on."""
    i_head = tl.program_id(2)
    begin = tl.load(p_cu_seqlens + i_head * (B + 1) + FIRST)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + LAST) - begin
    if tl.program_id(0) * ROWS >= count:
        return
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row, i_row = i_row < count, begin + i_row
    o_row = i_head.to(tl.int64) * R + i_row
    o_inner = tl.arange(0, WIDTH)
    m_value = m_row[:, None] & (o_inner < D)[None]
    p_value_rows = p_values + o_row[:, None] * (PARTS * D) + o_inner[None]
    b_first = tl.load(p_value_rows, mask=m_value, other=0.0)
    if PARTS == 3:
        b_second = tl.load(p_value_rows + D, mask=m_value, other=0.0)
        b_third = tl.load(p_value_rows + 2 * D, mask=m_value, other=0.0)
    if HAS_PAIRS:
        b_pair = tl.load(p_pairs + o_row * PAIR, mask=m_row, other=0.0).to(tl.float32)
        b_pair += tl.load(p_pairs + o_row * PAIR + 1, mask=m_row, other=0.0).to(tl.float32)
    b_index = tl.load(p_token_indices + o_row, mask=m_row, other=0)
    i_batch, _ = unpack_index(b_index, SHIFT)
    i_slot = i_row - tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch, mask=m_row, other=0)
    i_product = (i_head.to(tl.int64) * (LAST - FIRST) + i_batch - FIRST) * K + i_slot
    p_out_rows = p_products + (i_product * CHUNK)[:, None]
    p_weights = p_weight + i_head.to(tl.int64) * stride_e + o_inner.to(tl.int64)[:, None] * stride_d
    sweep_begin = tl.program_id(1) * (SWEEP * COLUMNS)
    sweep_end = tl.minimum(tl.minimum(CHUNK, H - FIRST_COLUMN), sweep_begin + SWEEP * COLUMNS)
    for start in range(sweep_begin, sweep_end, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)  # within the chunk
        m_column = o_column < sweep_end
        p_w = p_weights + (FIRST_COLUMN + o_column).to(tl.int64)[None] * stride_h
        b_product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if IS_WHOLE:
            b_product = dot(b_first, tl.load(p_w), b_product, INTERPRETED)
            if PARTS == 3:
                b_product = dot(b_second, tl.load(p_w + D * stride_d), b_product, INTERPRETED)
                b_product = dot(b_third, tl.load(p_w + 2 * D * stride_d), b_product, INTERPRETED)
        else:
            mask = (o_inner < D)[:, None] & m_column[None]
            b_product = dot(b_first, tl.load(p_w, mask=mask, other=0.0), b_product, INTERPRETED)
            if PARTS == 3:
                b_product = dot(b_second, tl.load(p_w + D * stride_d, mask=mask, other=0.0), b_product, INTERPRETED)
                b_product = dot(b_third, tl.load(p_w + 2 * D * stride_d, mask=mask, other=0.0), b_product, INTERPRETED)
        if HAS_PAIRS:
            p_pair_row = p_pair_weight + i_head.to(tl.int64) * H + FIRST_COLUMN
            b_w = tl.load(p_pair_row + o_column, mask=m_column, other=0.0)
            b_product += b_pair[:, None] * b_w.to(tl.float32)[None]
        mask = m_row[:, None] & m_column[None]
        tl.store(p_out_rows + o_column[None], b_product.to(p_products.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_rows(
    p_rows, p_entries, p_pairs, p_pair_rows, begin, end, SEQUENCES, R, H, CHUNK, m_column,
    K: tl.constexpr, PAIR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum the next UNROLL rows of a token, up to its last one; all loads are in flight at the same time."""
    i_entry = begin + tl.arange(0, UNROLL)
    m_entry = i_entry < end
    i_entry = tl.load(p_entries + i_entry, mask=m_entry, other=0)
    i_head = (i_entry // K).to(tl.int64)
    i_slot = i_entry % K
    mask = m_entry[:, None] & m_column[None]
    o_row = (i_head * SEQUENCES * K + i_slot) * CHUNK
    b_rows = tl.load(p_rows[None] + o_row[:, None], mask=mask, other=0.0).to(tl.float32)
    if PAIR:
        p_pair = p_pairs + (i_head * R + i_slot) * PAIR
        b_pair = tl.load(p_pair, mask=m_entry, other=0.0).to(tl.float32)
        b_pair += tl.load(p_pair + 1, mask=m_entry, other=0.0).to(tl.float32)
        b_w = tl.load(p_pair_rows[None] + (i_head * H)[:, None], mask=mask, other=0.0)
        b_rows += b_pair[:, None] * b_w.to(tl.float32)
    return tl.sum(b_rows, axis=0)


@triton.jit(do_not_specialize=["FIRST", "SEQUENCES"])
def _combine_kernel(
    p_products, p_offsets, p_entries, p_pairs, p_pair_weight, p_out, FIRST, SEQUENCES, R, T, H, FIRST_COLUMN, CHUNK,
    stride_b, stride_t,
    K: tl.constexpr, PAIR: tl.constexpr, UNROLL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the products of each token of a chunk; if PAIR, all slots are filled, and outer products are added."""
    # The first tokens of all sequences run first: every head may select them, and long sums must not come last.
    i_sequence, i_token = tl.program_id(0) % SEQUENCES, tl.program_id(0) // SEQUENCES  # the sequence within the chunk
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column, i_batch = (o_column < CHUNK) & (FIRST_COLUMN + o_column < H), FIRST + i_sequence
    begin = tl.load(p_offsets + i_batch.to(tl.int64) * T + i_token)
    end = tl.load(p_offsets + i_batch.to(tl.int64) * T + i_token + 1)
    p_rows = p_products + i_sequence.to(tl.int64) * K * CHUNK + o_column
    p_pair_rows = p_pair_weight + FIRST_COLUMN + o_column if PAIR else p_pair_weight
    p_pairs = p_pairs + i_batch.to(tl.int64) * (K * PAIR) if PAIR else p_pairs
    b_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    unrolled_end = begin + (end - begin) // UNROLL * UNROLL
    for start in range(begin, unrolled_end, UNROLL):
        b_sum += _sum_of_rows(
            p_rows, p_entries, p_pairs, p_pair_rows, start, unrolled_end, SEQUENCES, R, H, CHUNK, m_column,
            K, PAIR, UNROLL,
        )  # fmt: skip
    for start in range(unrolled_end, end, 4):
        b_sum += _sum_of_rows(
            p_rows, p_entries, p_pairs, p_pair_rows, start, end, SEQUENCES, R, H, CHUNK, m_column, K, PAIR, 4
        )
    p_out_row = p_out + i_batch.to(tl.int64) * stride_b + i_token.to(tl.int64) * stride_t + FIRST_COLUMN + o_column
    tl.store(p_out_row, b_sum.to(p_out.dtype.element_ty), mask=m_column)


def chunks_of(batch: int, sequence_bytes: int, width: int) -> tuple[int, int]:
    """Return the number of sequences, and of columns of their products, in a chunk.

    Products of at most ``SMALL_BYTES`` form one chunk. Larger ones are split by columns down to ``FEWEST_COLUMNS``,
    because products of more rows are faster, then by sequences, and by columns again if one sequence is too large for a
    chunk. Columns are split at multiples of 128, which allow wide loads, or of fewer in a narrow layer. No chunk has
    more than half of the products, except for an odd column.
    """
    if batch * sequence_bytes <= SMALL_BYTES:
        return batch, width
    allowed = min(MOST_BYTES, batch * sequence_bytes // FEWEST_CHUNKS)
    step = next(step for step in (128, 16, 1) if step == 1 or width >= step * FEWEST_CHUNKS)
    slices = 1
    while batch * sequence_bytes > allowed * slices and width > FEWEST_COLUMNS * slices:
        slices *= 2
    while sequence_bytes > allowed * slices and width > step * slices:
        slices *= 2
    columns = width if slices == 1 else -(-width // (step * slices)) * step
    return max(1, min(batch, allowed * slices // sequence_bytes)), columns


def scattered_product(
    values: Tensor,
    weight: Tensor,
    rows: Rows,
    like: Tensor,
    parts: int = 1,
    pairs: tuple[Tensor, Tensor] | None = None,
    is_full: bool = False,
) -> Tensor:
    """Multiply the rows of each head with its matrix, and sum over the heads at the rows' tokens.

    The products are kept, one chunk at a time and in the type of ``like``, and summed in fp32 in the order of heads.

    Args:
        values: [E, R, parts * d].
        weight: [E, parts * d, h] with any strides.
        rows: the rows of the selection.
        like: [B, T, h]; the result has its shape, type and strides.
        parts: 1 or 3; affects only how d is tiled.
        pairs: [E, R, PAIR], numbers given as the sums of their columns, and [E, h]; their outer products are added.
        is_full: every slot is filled, so that the rows of some sequences are a matrix, which cuBLAS multiplies.

    Returns:
        [B, T, h].
    """
    batch, heads, selected, length = rows.shape
    width, capacity = like.shape[2], rows.token_indices.shape[1]
    sequences, columns = chunks_of(batch, heads * selected * width * values.element_size(), width)
    multiply = _TritonProduct(values, weight, rows, parts, None if is_full else pairs, sequences, columns)
    sum_pairs = pairs if is_full else None  # the kernel of ours adds them to its products
    chosen = tiles.combine(columns, heads * selected // length, sum_pairs is not None)
    output, products = torch.empty_like(like), values.new_empty((heads * sequences * selected, columns))
    for first in range(0, batch, sequences):
        last = min(batch, first + sequences)
        for first_column in range(0, width, columns):
            if is_full:
                part = weight[:, :, first_column : first_column + columns]
                out = products[: heads * (last - first) * selected].view(heads, -1, columns)[:, :, : part.shape[2]]
                torch.bmm(values[:, first * selected : last * selected], part, out=out)
            else:
                multiply(products, first, last, first_column)
            launch(
                _combine_kernel,
                (length * (last - first), triton.cdiv(columns, chosen["COLUMNS"]), 1),
                products, rows.offsets, rows.entries, *(sum_pairs or (None, None)), output, first,
                last - first, capacity, length, width, first_column, columns, *strides(output),
                K=selected, PAIR=PAIR if sum_pairs else 0, **chosen,
            )  # fmt: skip
    return output


class _TritonProduct:
    """Multiplies the rows of a chunk, any number of each head, with some columns of the weights."""

    def __init__(
        self,
        values: Tensor,
        weight: Tensor,
        rows: Rows,
        parts: int,
        pairs: tuple[Tensor, Tensor] | None,
        sequences: int,
        columns: int,
    ) -> None:
        width, size, selected = weight.shape[2], values.shape[2] // parts, rows.shape[2]
        self.tiles = tiles.scattered(values.dtype, values.device, parts, size, sequences * selected)
        self.tensors = values, rows.token_indices, rows.cu_seqlens, *(pairs or (None, None)), weight
        self.rows, self.columns, self.width = rows, columns, width
        self.options = dict(
            D=size, SHIFT=rows.shift, WIDTH=power_of_2(size), INTERPRETED=INTERPRET, HAS_PAIRS=pairs is not None,
            PARTS=parts, PAIR=PAIR, **self.tiles,
            IS_WHOLE=width % columns == columns % self.tiles["COLUMNS"] == 0 and size == power_of_2(size),
        )  # fmt: skip

    def __call__(self, products: Tensor, first: int, last: int, first_column: int) -> None:
        """Write the products of the sequences ``first`` to ``last - 1``."""
        batch, heads, selected, _ = self.rows.shape
        row_tiles = triton.cdiv((last - first) * selected, self.tiles["ROWS"])
        column_tiles = triton.cdiv(self.columns, self.tiles["COLUMNS"] * self.tiles["SWEEP"])
        launch(
            _scattered_kernel, (row_tiles, column_tiles, heads),
            *self.tensors, products, first, last, batch, self.rows.token_indices.shape[1], selected, self.width,
            first_column, self.columns, *self.tensors[-1].stride(), **self.options,
        )  # fmt: skip
