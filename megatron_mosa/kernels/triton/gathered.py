"""Matrix products over the rows of each head, gathering tokens on the fly."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import (
    INTERPRET,
    cdiv,
    dot,
    grouped,
    launch,
    multiprocessors,
    power_of_2,
    rotate,
    strides,
)
from megatron_mosa.kernels.triton.rows import Rows, unpack_index

PAIR = 16  # columns that hold a number as the sum of two halves, padded with 0 to the minimum of tensor cores


class Rotation(NamedTuple):
    """Rotary embedding of queries and keys."""

    cos: Tensor
    """fp32 [T, half]; half = 0: no rotation."""

    sin: Tensor
    """fp32 [T, half]."""

    starts: Tensor | None
    """int64 [B, T], where positions are counted from; None: the beginning of the sequence."""


class Gating(NamedTuple):
    """Inputs and further outputs of the product that yields the gradient of attention from that of the output."""

    gated: Tensor
    """[E, R, h'], attention times its gates."""

    gates: Tensor
    """fp32 [E, R]."""

    deltas: Tensor
    """fp32 [E, R], output: the gradient of the gate times the gate, which the gradient of softmax also needs."""

    dlogits: Tensor
    """[E, R, PAIR], output: the gradient of the router's logits as the sum of its columns, because a single number in
    half precision would lose too many digits."""


@triton.jit
def load_positions(b_index, m_row, p_starts, T, RESTARTS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the rotary positions of rows."""
    i_batch, b_position = unpack_index(b_index, SHIFT)
    if RESTARTS:
        b_position -= tl.load(p_starts + i_batch.to(tl.int64) * T + b_position, mask=m_row, other=0).to(tl.int32)
    return b_position


@triton.jit
def token_pointers(p_x, b_index, stride_b, stride_t, SHIFT: tl.constexpr):
    """Return pointers to the tokens of rows, [rows, 1]."""
    i_batch, i_token = unpack_index(b_index, SHIFT)
    return p_x + (i_batch.to(tl.int64) * stride_b + i_token.to(tl.int64) * stride_t)[:, None]


@triton.jit
def masked_tile(p_rows, o_column, m_row, m_column, IS_WHOLE: tl.constexpr):
    """Load a tile of a matrix; IS_WHOLE: without masks."""
    if IS_WHOLE:
        return tl.load(p_rows + o_column[None])
    return tl.load(p_rows + o_column[None], mask=m_row[:, None] & m_column[None], other=0.0)


@triton.jit
def _store_pair(p_pairs, o_row, m_row, b_number, PAIR: tl.constexpr):
    """Store fp32 numbers as sums of two numbers in the type of ``p_pairs``."""
    TYPE: tl.constexpr = p_pairs.dtype.element_ty
    o_pair, b_high = tl.arange(0, PAIR), b_number.to(TYPE)
    b_low = (b_number - b_high.to(tl.float32)).to(TYPE)
    b_pair = tl.where(o_pair[None] == 0, b_high[:, None], tl.where(o_pair[None] == 1, b_low[:, None], 0.0))
    tl.store(p_pairs + o_row[:, None] * PAIR + o_pair[None], b_pair.to(TYPE), mask=m_row[:, None])


@triton.jit(do_not_specialize=["B", "GROUP"])
def _gathered_kernel(
    p_x, p_token_indices, p_cu_seqlens, p_weight, p_out, p_cos, p_sin, p_starts, p_gated, p_gates, p_deltas, p_dlogits,
    B, R, E, T, H, GROUP, stride_b, stride_t,
    stride_e, stride_h, stride_d,
    D: tl.constexpr, HALF: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, FIRST_PART: tl.constexpr, ROTATED: tl.constexpr, ALL_PARTS: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR: tl.constexpr, HAS_GATES: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a head with its matrix, of which ROTATED parts, from FIRST_PART on, are queries or keys.

    The columns that rotate form one tile, first halves before second halves, so that the two columns of a pair are in
    registers of the same thread. The other columns, including those of values, form another tile of WIDTH columns.
    """
    i_head, i_tile = grouped(tl.program_id(0), tl.cdiv(R, ROWS), E, GROUP)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + B)
    if i_tile * ROWS >= count:
        return
    i_row, o_inner = i_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, INNER)
    m_row = i_row < count
    # Past the last row it is gathered again; one token for all heads would be a hot spot of the cache.
    b_index = tl.load(p_token_indices + i_head.to(tl.int64) * R + tl.minimum(i_row, count - 1))
    p_x_rows = token_pointers(p_x, b_index, stride_b, stride_t, SHIFT)
    p_weights = p_weight + i_head.to(tl.int64) * stride_e + FIRST_PART * D * stride_d
    HALVES: tl.constexpr = ROTATED * HALF_WIDTH if HALF > 0 else 0
    REST: tl.constexpr = ROTATED * REST_WIDTH if D > 2 * HALF else 0
    if HALVES > 0:
        o_half = tl.arange(0, 2 * HALVES)
        m_half = o_half % HALF_WIDTH < HALF
        o_half = o_half // HALVES * HALF + o_half % HALVES // HALF_WIDTH * D + o_half % HALF_WIDTH
        o_half = tl.max_contiguous(tl.multiple_of(o_half, VECTOR), VECTOR)  # the compiler cannot derive this
        b_rotated = tl.zeros((ROWS, 2 * HALVES), dtype=tl.float32)
    if WIDTH > 0:
        o_other = tl.arange(0, WIDTH)
        m_other = tl.where(o_other < REST, o_other % REST_WIDTH < D - 2 * HALF, o_other - REST < D)
        o_rest = o_other // REST_WIDTH * D + 2 * HALF + o_other % REST_WIDTH
        o_other = tl.where(o_other < REST, o_rest, ROTATED * D + o_other - REST)
        o_other = tl.max_contiguous(tl.multiple_of(o_other, VECTOR), VECTOR)
        b_others = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, H, INNER):
        m_inner = start + o_inner < H
        if IS_WHOLE:
            b_x = tl.load(p_x_rows + (start + o_inner)[None])
        else:
            b_x = tl.load(p_x_rows + (start + o_inner)[None], mask=m_inner[None], other=0.0)
        p_w_rows = p_weights + (start + o_inner).to(tl.int64)[:, None] * stride_h
        if HALVES > 0:
            b_w = masked_tile(p_w_rows, o_half * stride_d, m_inner, m_half, IS_WHOLE)
            b_rotated = dot(b_x, b_w, b_rotated, INTERPRETED)
        if WIDTH > 0:
            b_w = masked_tile(p_w_rows, o_other * stride_d, m_inner, m_other, IS_WHOLE)
            b_others = dot(b_x, b_w, b_others, INTERPRETED)
    p_out_rows = p_out + (i_head.to(tl.int64) * R + i_row)[:, None] * (ALL_PARTS * D) + FIRST_PART * D
    TYPE: tl.constexpr = p_out.dtype.element_ty
    if HALVES > 0:
        b_position = load_positions(b_index, m_row, p_starts, T, RESTARTS, SHIFT)
        o_half = tl.arange(0, HALVES)
        m_half = o_half % HALF_WIDTH < HALF
        b_first, b_second = tl.split(tl.permute(tl.reshape(b_rotated, (ROWS, 2, HALVES)), (0, 2, 1)))
        b_first, b_second = rotate(b_first, b_second, b_position, o_half % HALF_WIDTH, m_half, p_cos, p_sin, 1.0, HALF)
        p_half = p_out_rows + (o_half // HALF_WIDTH * D + o_half % HALF_WIDTH)[None]
        tl.store(p_half, b_first.to(TYPE), mask=m_row[:, None] & m_half[None])
        tl.store(p_half + HALF, b_second.to(TYPE), mask=m_row[:, None] & m_half[None])
    if WIDTH > 0:
        mask = m_row[:, None] & m_other[None]
        if HAS_GATES:
            o_row = i_head.to(tl.int64) * R + i_row
            b_gate = tl.load(p_gates + o_row, mask=m_row, other=0.0)
            b_gated = tl.load(p_gated + o_row[:, None] * D + o_other[None], mask=mask, other=0.0).to(tl.float32)
            b_delta = tl.sum(b_others * b_gated, axis=1)
            tl.store(p_deltas + o_row, b_delta, mask=m_row)
            _store_pair(p_dlogits, o_row, m_row, b_delta * (1.0 - b_gate), PAIR)
            b_others *= b_gate[:, None]
        tl.store(p_out_rows + o_other[None], b_others.to(TYPE), mask=mask)


def _widths(parts: int, rotated_parts: int, size: int, half: int) -> dict[str, int]:
    """Return the tile widths of a program that computes ``parts``, of which the first ``rotated_parts`` rotate."""
    rest = size - 2 * half
    half_width, rest_width = power_of_2(half), power_of_2(rest)
    others = rotated_parts * rest_width * (rest > 0) + power_of_2(size) * (parts - rotated_parts)
    return dict(
        ROTATED=rotated_parts, HALF_WIDTH=half_width, REST_WIDTH=rest_width, WIDTH=power_of_2(others) if others else 0
    )


def gathered_product(
    states: Tensor, rows: Rows, weight: Tensor, rotation: Rotation | None = None, gating: Gating | None = None
) -> Tensor:
    """Multiply the selected tokens of each head with its matrix.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: the rows of the selection.
        weight: [E, h, d] with any strides; with a rotation [E, h, 3h'], for queries, keys and values.
        rotation: applied to queries and keys.
        gating: if given, products are multiplied by the gates, after they were used for the gates' gradients.

    Returns:
        [E, R, d or 3h'] in the type of ``states``.
    """
    batch, heads, _, length = rows.shape
    width, capacity = states.shape[2], rows.token_indices.shape[1]
    parts = 1 if rotation is None else 3
    size = weight.shape[2] // parts
    cos, sin, starts = rotation or (None, None, None)
    half = 0 if cos is None else cos.shape[1]
    output, processors = states.new_empty((heads, capacity, parts * size)), multiprocessors(states.device)
    programs = [(0, _widths(parts, parts - 1, size, half))]
    if 4 * half + programs[0][1]["WIDTH"] > 384:  # too many columns for the registers: one program per part
        programs = [(part, _widths(1, int(part < 2), size, half)) for part in range(parts)]
    for first, widths in programs:
        columns = 2 * widths["ROTATED"] * widths["HALF_WIDTH"] * (half > 0) + widths["WIDTH"]
        chosen = tiles.gathered(
            states.dtype, states.device, columns, heads * capacity // processors, gating is not None
        )
        number = cdiv(capacity, chosen["ROWS"])
        tile_bytes = length * width * states.element_size() * chosen["ROWS"] * batch // capacity
        group = tiles.group(
            number, tile_bytes, heads * capacity * width * states.element_size(),
            weight.numel() * weight.element_size() // len(programs), tiles.GATHERED_BYTES,
        )  # fmt: skip
        launch(
            _gathered_kernel, (number * heads,),
            states, rows.token_indices, rows.cu_seqlens, weight, output, cos, sin, starts, *(gating or (None,) * 4),
            batch, capacity, heads, length, width, group, *strides(states), *weight.stride(),
            D=size, HALF=half, RESTARTS=starts is not None, SHIFT=rows.shift, INTERPRETED=INTERPRET,
            IS_WHOLE=width % chosen["INNER"] == 0 and columns == parts * size // len(programs),
            FIRST_PART=first, ALL_PARTS=parts, VECTOR=math.gcd(16, half, size), HAS_GATES=gating is not None,
            PAIR=PAIR, **widths, **chosen,
        )  # fmt: skip
    return output
