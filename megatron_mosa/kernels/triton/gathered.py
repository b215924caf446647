"""Matrix products over the rows of each head, with the gather of tokens inside."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
def _tile(rows, place, inside, there, IS_WHOLE: tl.constexpr):
    """A tile of a matrix, of some rows and columns."""
    if IS_WHOLE:
        return tl.load(rows + place[None])
    return tl.load(rows + place[None], mask=inside[:, None] & there[None], other=0.0)


@triton.jit(do_not_specialize=["B", "GROUP"])
def _gathered_kernel(
    states, places, row_starts, weight, output, cos, sin, starts, B, R, E, T, H, GROUP, stride_b, stride_t,
    stride_e, stride_h, stride_d,
    D: tl.constexpr, HALF: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, FIRST_PART: tl.constexpr, TURNED: tl.constexpr, ALL_PARTS: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
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
        half = tl.max_contiguous(tl.multiple_of(half, VECTOR), VECTOR)
        turning = tl.zeros((ROWS, 2 * HALVES), dtype=tl.float32)
    if WIDTH > 0:
        other = tl.arange(0, WIDTH)
        in_other = tl.where(other < REST, other % REST_WIDTH < D - 2 * HALF, other - REST < D)
        turned_rest = other // REST_WIDTH * D + 2 * HALF + other % REST_WIDTH
        other = tl.where(other < REST, turned_rest, TURNED * D + other - REST)
        other = tl.max_contiguous(tl.multiple_of(other, VECTOR), VECTOR)  # what the compiler cannot see in it
        others = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, H, INNER):
        inside = start + inner < H
        if IS_WHOLE:
            x = tl.load(x_rows + (start + inner)[None])
        else:
            x = tl.load(x_rows + (start + inner)[None], mask=inside[None], other=0.0)
        w_rows = weights + (start + inner).to(tl.int64)[:, None] * stride_h
        if HALVES > 0:
            turning = dot(x, _tile(w_rows, half * stride_d, inside, in_half, IS_WHOLE), turning, INTERPRETED)
        if WIDTH > 0:
            others = dot(x, _tile(w_rows, other * stride_d, inside, in_other, IS_WHOLE), others, INTERPRETED)
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
        tl.store(out + other[None], others.to(TYPE), mask=here[:, None] & in_other[None])


def _widths(parts: int, turned_parts: int, size: int, half: int) -> dict[str, int]:
    """Columns of the tiles of a program that takes ``parts``, of which the first ``turned_parts`` turn."""
    rest = size - 2 * half
    half_width, rest_width = power_of_2(half), power_of_2(rest)
    others = turned_parts * rest_width * (rest > 0) + power_of_2(size) * (parts - turned_parts)
    return dict(
        TURNED=turned_parts, HALF_WIDTH=half_width, REST_WIDTH=rest_width, WIDTH=power_of_2(others) if others else 0
    )


def gathered_product(states: Tensor, rows: Rows, weight: Tensor, rotation: Rotation | None = None) -> Tensor:
    """The selected tokens of each head times its matrix.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: of the selection.
        weight: [E, h, d] with any strides; with a rotation [E, h, 3d], for queries, keys and values.
        rotation: turns queries and keys.

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
        chosen = tiles.gathered(states.dtype, states.device, columns, heads * capacity // processors)
        number = triton.cdiv(capacity, chosen["ROWS"])
        tile_bytes = length * width * states.element_size() * chosen["ROWS"] * batch // capacity
        group = tiles.group(number, tile_bytes, weight.numel() * weight.element_size() // len(programs))
        _gathered_kernel[(number * heads,)](
            states, rows.places, rows.starts, weight, output, cos, sin, starts, batch, capacity, heads, length, width,
            group, *strides(states), *weight.stride(),
            D=size, HALF=half, RESTARTS=starts is not None, SHIFT=bits_of(length), INTERPRETED=INTERPRET,
            IS_WHOLE=width % chosen["INNER"] == 0 and columns == parts * size // len(programs),
            FIRST_PART=first, ALL_PARTS=parts, VECTOR=math.gcd(16, half, size), **widths, **chosen,
        )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["B"])
def _weight_gradient_kernel(
    states, places, row_starts, values, pairs, output, pair_output, B, R, H, stride_b, stride_t,
    stride_s, stride_e, stride_h, stride_d, pair_stride_s,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, split, part = tl.program_id(1), tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # of the states
    first = tl.arange(0, WIDTH if PARTS == 1 else 2 * WIDTH)  # of the values: one part, or two in one tile
    in_first, first = first % WIDTH < D, (part + first // WIDTH) * D + first % WIDTH
    of_first = tl.zeros((COLUMNS, WIDTH if PARTS == 1 else 2 * WIDTH), dtype=tl.float32)
    if PARTS == 3:
        last = tl.arange(0, WIDTH)
        in_last, last = last < D, 2 * D + last
        of_last = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    if HAS_PAIRS:
        along = tl.zeros((COLUMNS, PAIR), dtype=tl.float32)
    count = tl.load(row_starts + head * (B + 1) + B)
    share = tl.cdiv(tl.cdiv(count, ROWS), SPLITS) * ROWS
    lane, pair = tl.arange(0, ROWS), tl.arange(0, PAIR)
    its_places = places + head.to(tl.int64) * R + lane
    # Places come an iteration ahead: the gather then has all stages of the pipeline to itself.
    following = tl.load(its_places + split * share, mask=split * share + lane < count, other=0)
    for start in range(split * share, tl.minimum(count, (split + 1) * share), ROWS):
        source, here = head.to(tl.int64) * R + start, start + lane < count  # offsets beyond source stay the same
        place = following
        following = tl.load(its_places + start + ROWS, mask=start + ROWS + lane < count, other=0)
        x_rows = rows_at(states, place, stride_b, stride_t, SHIFT)
        if IS_WHOLE:
            x = tl.load(x_rows + column[None])
        else:
            x = tl.load(x_rows + column[None], mask=(column < H)[None], other=0.0)  # [ROWS, COLUMNS]
        v_rows = values + source * (ALL_PARTS * D) + lane[:, None] * (ALL_PARTS * D)
        of_first = dot(tl.trans(x), _tile(v_rows, first, here, in_first, False), of_first, INTERPRETED)
        if PARTS == 3:
            of_last = dot(tl.trans(x), _tile(v_rows, last, here, in_last, False), of_last, INTERPRETED)
        if HAS_PAIRS:
            p_rows = pairs + source * PAIR + lane[:, None] * PAIR + pair[None]
            along = dot(tl.trans(x), tl.load(p_rows, mask=here[:, None], other=0.0), along, INTERPRETED)
    out = output + split * stride_s + head.to(tl.int64) * stride_e + column.to(tl.int64)[:, None] * stride_h
    TYPE: tl.constexpr = output.dtype.element_ty
    inside = (column < H)[:, None]
    tl.store(out + first[None] * stride_d, of_first.to(TYPE), mask=inside & in_first[None])
    if PARTS == 3:
        tl.store(out + last[None] * stride_d, of_last.to(TYPE), mask=inside & in_last[None])
    if HAS_PAIRS and part == 0:
        offsets = split * pair_stride_s + head.to(tl.int64) * H + column
        tl.store(pair_output + offsets, tl.sum(along, axis=1).to(pair_output.dtype.element_ty), mask=column < H)


def weight_gradient(
    states: Tensor,
    rows: Rows,
    values: Tensor,
    output: Tensor,
    parts: int = 1,
    pairs: Tensor | None = None,
    pair_output: Tensor | None = None,
) -> None:
    """Write, for each head, the selected tokens transposed times the values of its rows.

    Few heads give few programs: their rows are then split, and the parts added up in fp32.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: of the selection.
        values: [E, B * k, parts * d].
        output: [E, h, parts * d] with any strides.
        pairs, pair_output: one more column of values, [E, B * k, PAIR] whose columns are added up, and its result,
            [E, h].
    """
    batch, length, width = states.shape
    heads, capacity = rows.places.shape
    size = values.shape[2] // parts
    at_once = parts if size <= 128 else 1  # all of them, if the registers hold them
    chosen = tiles.weight_gradient(states.dtype, states.device, at_once, size)
    number = triton.cdiv(width, chosen["COLUMNS"])
    programs = number * heads * parts // at_once
    splits = max(1, min(2 * multiprocessors(states.device) // programs, capacity // 512))
    outputs, pair_outputs = output[None], pair_output if pair_output is None else pair_output[None]
    if splits > 1:
        outputs = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
        pair_outputs = None if pair_output is None else outputs.new_empty((splits, *pair_output.shape))
    _weight_gradient_kernel[(number, heads, splits * parts // at_once)](
        states, rows.places, rows.starts, values, pairs, outputs, pair_outputs, batch, capacity, width,
        *strides(states), *outputs.stride(), 0 if pair_outputs is None else pair_outputs.stride(0),
        D=size, SHIFT=bits_of(length), IS_WHOLE=width % chosen["COLUMNS"] == 0, INTERPRETED=INTERPRET,
        HAS_PAIRS=pairs is not None, PARTS=at_once, ALL_PARTS=parts, SPLITS=splits, PAIR=PAIR, **chosen,
    )  # fmt: skip
    if splits > 1:
        output.copy_(outputs.sum(0))
        if pair_output is not None and pair_outputs is not None:
            pair_output.copy_(pair_outputs.sum(0))
