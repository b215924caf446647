"""Matrix products over the rows of each head, with the gather of tokens inside."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, grouped, multiprocessors, power_of_2, strides, turned
from megatron_mosa.kernels.triton.rows import Rows, bits_of, sequence_and_token

PAIR = 16  # columns of a number given as two halves, the least that tensor cores take; the others are 0


class Rotation(NamedTuple):
    """How queries and keys are turned."""

    cos: Tensor
    """fp32 [T, half]; none are turned if half is 0."""

    sin: Tensor
    starts: Tensor | None
    """int64 [B, T]: positions count from here; None: from the beginning of the sequence."""


class Gating(NamedTuple):
    """What turns the gradient of gated attention into that of attention, and what else comes of it."""

    gated: Tensor
    """[E, B * k, d], attention times its gates."""

    gates: Tensor
    """fp32 [E, B * k]."""

    deltas: Tensor
    """fp32 [E, B * k], written: the gradient of the gate times the gate, which softmax's gradient needs, too."""

    of_logits: Tensor
    """[E, B * k, PAIR], written: gradients of the router's logits, as sums of the columns. In half precision one
    column would round them."""


@triton.jit
def positions_of(place, there, starts, T, RESTARTS: tl.constexpr, SHIFT: tl.constexpr):
    """What rows are turned by."""
    batch, token = sequence_and_token(place, SHIFT)
    if RESTARTS:
        token -= tl.load(starts + batch.to(tl.int64) * T + token, mask=there, other=0).to(tl.int32)
    return token


@triton.jit
def rows_at(states, place, stride_b, stride_t, SHIFT: tl.constexpr):
    """Pointers to the tokens of some rows."""
    batch, token = sequence_and_token(place, SHIFT)
    return states + (batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t)[:, None]


@triton.jit
def masked_tile(rows, column, in_rows, in_columns, IS_WHOLE: tl.constexpr):
    """A tile of a matrix, of some rows and columns."""
    if IS_WHOLE:
        return tl.load(rows + column[None])
    return tl.load(rows + column[None], mask=in_rows[:, None] & in_columns[None], other=0.0)


@triton.jit
def _store_pair(pairs, source, here, number, PAIR: tl.constexpr):
    """Store numbers as two halves each."""
    TYPE: tl.constexpr = pairs.dtype.element_ty
    pair, high = tl.arange(0, PAIR), number.to(TYPE)
    low = (number - high.to(tl.float32)).to(TYPE)
    halves = tl.where(pair[None] == 0, high[:, None], tl.where(pair[None] == 1, low[:, None], 0.0))
    tl.store(pairs + source[:, None] * PAIR + pair[None], halves.to(TYPE), mask=here[:, None])


@triton.jit(do_not_specialize=["B", "GROUP"])
def _gathered_kernel(
    states, places, row_starts, weight, output, cos, sin, starts, gated, gates, deltas, of_logits,
    B, R, E, T, H, GROUP, stride_b, stride_t,
    stride_e, stride_h, stride_d,
    D: tl.constexpr, HALF: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, FIRST_PART: tl.constexpr, TURNED: tl.constexpr, ALL_PARTS: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR: tl.constexpr, HAS_GATES: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """TURNED parts of the columns, from FIRST_PART on, are queries or keys.

    What turns is one tile, whose columns are the first halves and then the second, so that partners meet in one
    thread's registers; the columns that do not turn, and those of the values, are the other tile, of WIDTH columns.
    """
    head, tile = grouped(tl.program_id(0), tl.cdiv(R, ROWS), E, GROUP)
    count = tl.load(row_starts + head * (B + 1) + B)
    if tile * ROWS >= count:
        return
    row, inner = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, INNER)
    here = row < count
    place = tl.load(places + head.to(tl.int64) * R + row, mask=here, other=0)
    x_rows = rows_at(states, place, stride_b, stride_t, SHIFT)
    weights = weight + head.to(tl.int64) * stride_e + FIRST_PART * D * stride_d
    HALVES: tl.constexpr = TURNED * HALF_WIDTH if HALF > 0 else 0
    REST: tl.constexpr = TURNED * REST_WIDTH if D > 2 * HALF else 0
    if HALVES > 0:
        half = tl.arange(0, 2 * HALVES)
        in_half = half % HALF_WIDTH < HALF
        half = half // HALVES * HALF + half % HALVES // HALF_WIDTH * D + half % HALF_WIDTH
        half = tl.max_contiguous(tl.multiple_of(half, VECTOR), VECTOR)  # which the compiler cannot see
        turning = tl.zeros((ROWS, 2 * HALVES), dtype=tl.float32)
    if WIDTH > 0:
        other = tl.arange(0, WIDTH)
        in_other = tl.where(other < REST, other % REST_WIDTH < D - 2 * HALF, other - REST < D)
        turned_rest = other // REST_WIDTH * D + 2 * HALF + other % REST_WIDTH
        other = tl.where(other < REST, turned_rest, TURNED * D + other - REST)
        other = tl.max_contiguous(tl.multiple_of(other, VECTOR), VECTOR)
        others = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, H, INNER):
        inside = start + inner < H
        if IS_WHOLE:
            x = tl.load(x_rows + (start + inner)[None])
        else:
            x = tl.load(x_rows + (start + inner)[None], mask=inside[None], other=0.0)
        w_rows = weights + (start + inner).to(tl.int64)[:, None] * stride_h
        if HALVES > 0:
            turning = dot(x, masked_tile(w_rows, half * stride_d, inside, in_half, IS_WHOLE), turning, INTERPRETED)
        if WIDTH > 0:
            others = dot(x, masked_tile(w_rows, other * stride_d, inside, in_other, IS_WHOLE), others, INTERPRETED)
    out = output + (head.to(tl.int64) * R + row)[:, None] * (ALL_PARTS * D) + FIRST_PART * D
    TYPE: tl.constexpr = output.dtype.element_ty
    if HALVES > 0:
        position = positions_of(place, here, starts, T, RESTARTS, SHIFT)
        half = tl.arange(0, HALVES)
        in_half = half % HALF_WIDTH < HALF
        first, second = tl.split(tl.permute(tl.reshape(turning, (ROWS, 2, HALVES)), (0, 2, 1)))
        first, second = turned(first, second, position, half % HALF_WIDTH, in_half, cos, sin, 1.0, HALF)
        target = out + (half // HALF_WIDTH * D + half % HALF_WIDTH)[None]
        tl.store(target, first.to(TYPE), mask=here[:, None] & in_half[None])
        tl.store(target + HALF, second.to(TYPE), mask=here[:, None] & in_half[None])
    if WIDTH > 0:
        mask = here[:, None] & in_other[None]
        if HAS_GATES:
            source = head.to(tl.int64) * R + row
            gate = tl.load(gates + source, mask=here, other=0.0)
            attended = tl.load(gated + source[:, None] * D + other[None], mask=mask, other=0.0).to(tl.float32)
            delta = tl.sum(others * attended, axis=1)
            tl.store(deltas + source, delta, mask=here)
            _store_pair(of_logits, source, here, delta * (1.0 - gate), PAIR)
            others *= gate[:, None]
        tl.store(out + other[None], others.to(TYPE), mask=mask)


def _widths(parts: int, turned_parts: int, size: int, half: int) -> dict[str, int]:
    """Columns of the tiles of a program that takes ``parts``, of which the first ``turned_parts`` turn."""
    rest = size - 2 * half
    half_width, rest_width = power_of_2(half), power_of_2(rest)
    others = turned_parts * rest_width * (rest > 0) + power_of_2(size) * (parts - turned_parts)
    return dict(
        TURNED=turned_parts, HALF_WIDTH=half_width, REST_WIDTH=rest_width, WIDTH=power_of_2(others) if others else 0
    )


def gathered_product(
    states: Tensor, rows: Rows, weight: Tensor, rotation: Rotation | None = None, gating: Gating | None = None
) -> Tensor:
    """The selected tokens of each head times its matrix.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: of the selection.
        weight: [E, h, d] with any strides; with a rotation [E, h, 3d], for queries, keys and values.
        rotation: turns queries and keys.
        gating: multiplies the products by gates, after their use for the gates' own gradients.

    Returns:
        [E, B * k, d or 3d] in the type of ``states``; what lies behind a head's last row is undefined.
    """
    batch, length, width = states.shape
    heads, capacity = rows.places.shape
    parts = 1 if rotation is None else 3
    size = weight.shape[2] // parts
    cos, sin, starts = rotation or (None, None, None)
    half = 0 if cos is None else cos.shape[1]
    output, processors = states.new_empty((heads, capacity, parts * size)), multiprocessors(states.device)
    programs = [(0, _widths(parts, parts - 1, size, half))]
    if 4 * half + programs[0][1]["WIDTH"] > 384:  # too many for the registers: one part after the other
        programs = [(part, _widths(1, int(part < 2), size, half)) for part in range(parts)]
    for first, widths in programs:
        columns = 2 * widths["TURNED"] * widths["HALF_WIDTH"] * (half > 0) + widths["WIDTH"]
        chosen = tiles.gathered(
            states.dtype, states.device, columns, heads * capacity // processors, gating is not None
        )
        number = triton.cdiv(capacity, chosen["ROWS"])
        tile_bytes = length * width * states.element_size() * chosen["ROWS"] * batch // capacity
        group = tiles.group(number, tile_bytes, weight.numel() * weight.element_size() // len(programs))
        _gathered_kernel[(number * heads,)](
            states, rows.places, rows.starts, weight, output, cos, sin, starts, *(gating or (None,) * 4),
            batch, capacity, heads, length, width, group, *strides(states), *weight.stride(),
            D=size, HALF=half, RESTARTS=starts is not None, SHIFT=bits_of(length), INTERPRETED=INTERPRET,
            IS_WHOLE=width % chosen["INNER"] == 0 and columns == parts * size // len(programs),
            FIRST_PART=first, ALL_PARTS=parts, VECTOR=math.gcd(16, half, size), HAS_GATES=gating is not None,
            PAIR=PAIR, **widths, **chosen,
        )  # fmt: skip
    return output
