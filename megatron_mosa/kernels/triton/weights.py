"""The gradients of the heads' matrices: selected tokens, transposed, times the values of their rows."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, cdiv, dot, grouped, launch, multiprocessors, strides
from megatron_mosa.kernels.triton.gathered import PAIR, masked_tile, token_pointers
from megatron_mosa.kernels.triton.rows import Rows


@triton.jit(do_not_specialize=["B", "GROUP"])
def _weight_gradient_kernel(
    p_x, p_token_indices, p_cu_seqlens, p_values, p_pairs, p_out, p_pair_out, B, R, E, H, GROUP, stride_b, stride_t,
    stride_s, stride_e, stride_h, stride_d, pair_stride_s,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i_head, i_tile = grouped(tl.program_id(0), tl.cdiv(H, COLUMNS), E, GROUP)
    i_split, i_part = tl.program_id(1) % SPLITS, tl.program_id(1) // SPLITS
    o_column = i_tile * COLUMNS + tl.arange(0, COLUMNS)  # of the states
    o_first = tl.arange(0, WIDTH if PARTS == 1 else 2 * WIDTH)  # of the values: one part, or two in one tile
    m_first, o_first = o_first % WIDTH < D, (i_part + o_first // WIDTH) * D + o_first % WIDTH
    b_first = tl.zeros((COLUMNS, WIDTH if PARTS == 1 else 2 * WIDTH), dtype=tl.float32)
    if PARTS == 3:
        o_last = tl.arange(0, WIDTH)
        m_last, o_last = o_last < D, 2 * D + o_last
        b_last = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    if HAS_PAIRS:
        b_pairs = tl.zeros((COLUMNS, PAIR), dtype=tl.float32)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + B)
    rows_per_split = tl.cdiv(tl.cdiv(count, ROWS), SPLITS) * ROWS
    begin = i_split * rows_per_split
    i_lane, o_pair = tl.arange(0, ROWS), tl.arange(0, PAIR)
    p_indices, i_last = p_token_indices + i_head.to(tl.int64) * R, tl.maximum(count - 1, 0)
    # The last row is gathered again behind it, as by the other kernels.
    # Indices are loaded one iteration ahead, so that the gather has all stages of the pipeline to itself.
    b_next_index = tl.load(p_indices + tl.minimum(begin + i_lane, i_last))
    for start in range(begin, tl.minimum(count, (i_split + 1) * rows_per_split), ROWS):
        o_row, m_row = i_head.to(tl.int64) * R + start, start + i_lane < count  # offsets from o_row stay constant
        b_index = b_next_index
        b_next_index = tl.load(p_indices + tl.minimum(start + ROWS + i_lane, i_last))
        p_x_rows = token_pointers(p_x, b_index, stride_b, stride_t, SHIFT)
        if IS_WHOLE:
            b_x = tl.load(p_x_rows + o_column[None])
        else:
            b_x = tl.load(p_x_rows + o_column[None], mask=(o_column < H)[None], other=0.0)  # [ROWS, COLUMNS]
        p_v_rows = p_values + o_row * (ALL_PARTS * D) + i_lane[:, None] * (ALL_PARTS * D)
        b_first = dot(tl.trans(b_x), masked_tile(p_v_rows, o_first, m_row, m_first, False), b_first, INTERPRETED)
        if PARTS == 3:
            b_last = dot(tl.trans(b_x), masked_tile(p_v_rows, o_last, m_row, m_last, False), b_last, INTERPRETED)
        if HAS_PAIRS:
            p_pair_rows = p_pairs + o_row * PAIR + i_lane[:, None] * PAIR + o_pair[None]
            b_pair = tl.load(p_pair_rows, mask=m_row[:, None], other=0.0)
            b_pairs = dot(tl.trans(b_x), b_pair, b_pairs, INTERPRETED)
    p_out_rows = p_out + i_split * stride_s + i_head.to(tl.int64) * stride_e + o_column.to(tl.int64)[:, None] * stride_h
    TYPE: tl.constexpr = p_out.dtype.element_ty
    m_column = (o_column < H)[:, None]
    tl.store(p_out_rows + o_first[None] * stride_d, b_first.to(TYPE), mask=m_column & m_first[None])
    if PARTS == 3:
        tl.store(p_out_rows + o_last[None] * stride_d, b_last.to(TYPE), mask=m_column & m_last[None])
    if HAS_PAIRS and i_part == 0:
        p_sums = p_pair_out + (i_split * pair_stride_s + i_head.to(tl.int64) * H + o_column)
        tl.store(p_sums, tl.sum(b_pairs, axis=1).to(p_pair_out.dtype.element_ty), mask=o_column < H)


def weight_gradient(
    states: Tensor,
    rows: Rows,
    values: Tensor,
    output: Tensor,
    parts: int = 1,
    pairs: Tensor | None = None,
    pair_output: Tensor | None = None,
) -> None:
    """Compute, for each head, the selected tokens transposed times the values of its rows.

    If there are few heads, and so few programs, the rows of each are split, and the partial results added in fp32.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: the rows of the selection.
        values: [E, R, parts * d].
        output: [E, h, parts * d] with any strides; written.
        pairs: [E, R, PAIR], an additional column of values, given as the sum of these columns.
        pair_output: [E, h], the result for ``pairs``; written.
    """
    batch, heads, _, length = rows.shape
    width, capacity = states.shape[2], rows.token_indices.shape[1]
    size = values.shape[2] // parts
    at_once = parts if size <= 128 else 1  # all parts, if the registers hold their results
    chosen = tiles.weight_gradient(states.dtype, states.device, at_once, size)
    number = cdiv(width, chosen["COLUMNS"])
    programs = number * heads * parts // at_once
    splits = max(1, min(2 * multiprocessors(states.device) // programs, capacity // 512))
    outputs, pair_outputs = output[None], pair_output if pair_output is None else pair_output[None]
    if splits > 1:
        outputs = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
        pair_outputs = None if pair_output is None else outputs.new_empty((splits, *pair_output.shape))
    group = number
    if parts == 1:  # with three, all tiles of a head together are faster or as fast
        size_of = states.element_size()
        tile_bytes, gathered_bytes = batch * length * chosen["COLUMNS"] * size_of, heads * capacity * width * size_of
        group = tiles.group(number, tile_bytes, gathered_bytes, values.numel() * size_of, tiles.SWEPT_BYTES)
    launch(
        _weight_gradient_kernel, (number * heads, splits * parts // at_once),
        states, rows.token_indices, rows.cu_seqlens, values, pairs, outputs, pair_outputs, batch, capacity, heads,
        width, group, *strides(states), *outputs.stride(), 0 if pair_outputs is None else pair_outputs.stride(0),
        D=size, SHIFT=rows.shift, IS_WHOLE=width % chosen["COLUMNS"] == 0, INTERPRETED=INTERPRET,
        HAS_PAIRS=pairs is not None, PARTS=at_once, ALL_PARTS=parts, SPLITS=splits, PAIR=PAIR, **chosen,
    )  # fmt: skip
    if splits > 1:
        output.copy_(outputs.sum(0))
        if pair_output is not None and pair_outputs is not None:
            pair_output.copy_(pair_outputs.sum(0))
