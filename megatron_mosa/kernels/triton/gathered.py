"""Matrix products over the rows of each head, with the gather of tokens inside."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, grouped, multiprocessors, power_of_2, strides, turned
from megatron_mosa.kernels.triton.rows import Rows

PAIR = 16  # columns of a number given as two halves, the least that tensor cores take; the others are 0


class Rotation(NamedTuple):
    """How queries and keys are turned."""

    cos: Tensor
    """fp32 [T, half]; none are turned if half is 0."""

    sin: Tensor
    starts: Tensor | None
    """int64 [B, T]: positions count from here; None: from the beginning of the sequence."""


@triton.jit
def positions_of(place, there, batch, starts, T, RESTARTS: tl.constexpr):
    """What rows are turned by."""
    token = place - batch * T
    if RESTARTS:
        token -= tl.load(starts + place, mask=there, other=0).to(tl.int32)
    return token


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
    D: tl.constexpr, HALF: tl.constexpr, RESTARTS: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
    FIRST_PART: tl.constexpr, TURNED: tl.constexpr, IS_PLAIN: tl.constexpr, ALL_PARTS: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """TURNED parts of the columns, from FIRST_PART on, are queries or keys, and one more if IS_PLAIN is not.

    The first halves of what turns are one tile, and the second another: partners meet in one thread's registers.
    """
    head, tile = grouped(tl.program_id(0), tl.cdiv(R, ROWS), E, GROUP)
    count = tl.load(row_starts + head * (B + 1) + B)
    if tile * ROWS >= count:
        return
    row, inner = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, INNER)
    here = row < count
    place = tl.load(places + head.to(tl.int64) * R + row, mask=here, other=0)
    batch = place // T
    x_rows = states + (batch.to(tl.int64) * stride_b + (place - batch * T).to(tl.int64) * stride_t)[:, None]
    weights = weight + head.to(tl.int64) * stride_e + FIRST_PART * D * stride_d
    HAS_HALVES: tl.constexpr = TURNED > 0 and HALF > 0
    HAS_REST: tl.constexpr = TURNED > 0 and D > 2 * HALF
    if HAS_HALVES:
        half = tl.arange(0, TURNED * HALF_WIDTH)
        half, of_halves, in_half = (
            half % HALF_WIDTH,
            half // HALF_WIDTH * D + half % HALF_WIDTH,
            half % HALF_WIDTH < HALF,
        )
        first = tl.zeros((ROWS, TURNED * HALF_WIDTH), dtype=tl.float32)
        second = first
    if HAS_REST:
        rest = tl.arange(0, TURNED * REST_WIDTH)
        in_rest = rest % REST_WIDTH < D - 2 * HALF
        rest = rest // REST_WIDTH * D + 2 * HALF + rest % REST_WIDTH
        others = tl.zeros((ROWS, TURNED * REST_WIDTH), dtype=tl.float32)
    if IS_PLAIN:
        plain = tl.arange(0, WIDTH)
        in_plain, plain = plain < D, TURNED * D + plain
        values = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, H, INNER):
        inside = start + inner < H
        if IS_WHOLE:
            x = tl.load(x_rows + (start + inner)[None])
        else:
            x = tl.load(x_rows + (start + inner)[None], mask=inside[None], other=0.0)
        w_rows = weights + (start + inner).to(tl.int64)[:, None] * stride_h
        if HAS_HALVES:
            first = dot(x, _tile(w_rows, of_halves * stride_d, inside, in_half, IS_WHOLE), first, INTERPRETED)
            w = _tile(w_rows, (of_halves + HALF) * stride_d, inside, in_half, IS_WHOLE)
            second = dot(x, w, second, INTERPRETED)
        if HAS_REST:
            others = dot(x, _tile(w_rows, rest * stride_d, inside, in_rest, IS_WHOLE), others, INTERPRETED)
        if IS_PLAIN:
            values = dot(x, _tile(w_rows, plain * stride_d, inside, in_plain, IS_WHOLE), values, INTERPRETED)
    out = output + (head.to(tl.int64) * R + row)[:, None] * (ALL_PARTS * D) + FIRST_PART * D
    TYPE: tl.constexpr = output.dtype.element_ty
    if HAS_HALVES:
        position = positions_of(place, here, batch, starts, T, RESTARTS)
        first, second = turned(first, second, position, half, in_half, cos, sin, 1.0, HALF)
        tl.store(out + of_halves[None], first.to(TYPE), mask=here[:, None] & in_half[None])
        tl.store(out + (of_halves + HALF)[None], second.to(TYPE), mask=here[:, None] & in_half[None])
    if HAS_REST:
        tl.store(out + rest[None], others.to(TYPE), mask=here[:, None] & in_rest[None])
    if IS_PLAIN:
        tl.store(out + plain[None], values.to(TYPE), mask=here[:, None] & in_plain[None])


def parts_at_once(parts: int, size: int) -> int:
    """How many of the parts one program takes: all of them up to head dimension 128."""
    return parts if size <= 128 else 1


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
    at_once = parts_at_once(parts, size)
    output = states.new_empty((heads, capacity, parts * size))
    chosen = tiles.gathered(states.dtype, at_once, size)
    number = triton.cdiv(capacity, chosen["ROWS"])
    sequence = length * width * states.element_size()
    group = tiles.group(
        number, sequence * chosen["ROWS"] * batch // capacity, weight.numel() * weight.element_size() * at_once // parts
    )
    cos, sin, starts = rotation or (None, None, None)
    half = 0 if cos is None else cos.shape[1]
    half_width, rest_width = power_of_2(half), power_of_2(size - 2 * half)
    for first in range(0, parts, at_once):
        last = first + at_once
        _gathered_kernel[(number * heads,)](
            states, rows.places, rows.starts, weight, output, cos, sin, starts, batch, capacity, heads, length, width,
            group, *strides(states), *weight.stride(),
            D=size, HALF=half, RESTARTS=starts is not None, INTERPRETED=INTERPRET,
            IS_WHOLE=width % chosen["INNER"] == 0 and size == chosen["WIDTH"]
            and half in (0, half_width) and size - 2 * half in (0, rest_width),
            FIRST_PART=first, TURNED=min(last, parts - 1) - first if parts == 3 else 0, IS_PLAIN=last == parts,
            ALL_PARTS=parts, HALF_WIDTH=half_width, REST_WIDTH=rest_width, **chosen,
        )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["B"])
def _weight_gradient_kernel(
    states, places, row_starts, values, pairs, output, pair_output, B, R, T, H, stride_b, stride_t,
    stride_s, stride_e, stride_h, stride_d, pair_stride_s,
    D: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, split, part = tl.program_id(1), tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # of the states
    inner = tl.arange(0, WIDTH)  # of the values
    count = tl.load(row_starts + head * (B + 1) + B)
    share = tl.cdiv(tl.cdiv(count, ROWS), SPLITS) * ROWS
    first = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    if PARTS == 3:
        second, third = first, first
    if HAS_PAIRS:
        along = tl.zeros((COLUMNS, PAIR), dtype=tl.float32)
    for start in range(split * share, tl.minimum(count, (split + 1) * share), ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < count
        source = head.to(tl.int64) * R + row
        place = tl.load(places + source, mask=there, other=0)
        batch = place // T
        x_rows = states + (batch.to(tl.int64) * stride_b + (place - batch * T).to(tl.int64) * stride_t)[:, None]
        if IS_WHOLE:
            x, mask = tl.load(x_rows + column[None]), there[:, None]
        else:
            x = tl.load(x_rows + column[None], mask=(column < H)[None], other=0.0)  # [ROWS, COLUMNS]
            mask = there[:, None] & (inner < D)[None]
        value = values + source[:, None] * (ALL_PARTS * D) + (part * D + inner)[None]
        first = dot(tl.trans(x), tl.load(value, mask=mask, other=0.0), first, INTERPRETED)
        if PARTS == 3:
            second = dot(tl.trans(x), tl.load(value + D, mask=mask, other=0.0), second, INTERPRETED)
            third = dot(tl.trans(x), tl.load(value + 2 * D, mask=mask, other=0.0), third, INTERPRETED)
        if HAS_PAIRS:
            pair = tl.load(pairs + source[:, None] * PAIR + tl.arange(0, PAIR)[None], mask=there[:, None], other=0.0)
            along = dot(tl.trans(x), pair, along, INTERPRETED)
    out = output + split * stride_s + head.to(tl.int64) * stride_e + column.to(tl.int64)[:, None] * stride_h
    out += (part * D + inner)[None] * stride_d
    mask = (column < H)[:, None] & (inner < D)[None]
    tl.store(out, first.to(output.dtype.element_ty), mask=mask)
    if PARTS == 3:
        tl.store(out + D * stride_d, second.to(output.dtype.element_ty), mask=mask)
        tl.store(out + 2 * D * stride_d, third.to(output.dtype.element_ty), mask=mask)
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
    at_once = parts_at_once(parts, size)
    chosen = tiles.weight_gradient(states.dtype, at_once, size)
    number = triton.cdiv(width, chosen["COLUMNS"])
    programs = number * heads * parts // at_once
    splits = max(1, min(2 * multiprocessors(states.device) // programs, capacity // 512))
    outputs, pair_outputs = output[None], pair_output if pair_output is None else pair_output[None]
    if splits > 1:
        outputs = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
        pair_outputs = None if pair_output is None else outputs.new_empty((splits, *pair_output.shape))
    _weight_gradient_kernel[(number, heads, splits * parts // at_once)](
        states, rows.places, rows.starts, values, pairs, outputs, pair_outputs, batch, capacity, length, width,
        *strides(states), *outputs.stride(), 0 if pair_outputs is None else pair_outputs.stride(0),
        D=size, IS_WHOLE=width % chosen["COLUMNS"] == 0 and size == chosen["WIDTH"], INTERPRETED=INTERPRET,
        HAS_PAIRS=pairs is not None, PARTS=at_once, ALL_PARTS=parts, SPLITS=splits, PAIR=PAIR, **chosen,
    )  # fmt: skip
    if splits > 1:
        output.copy_(outputs.sum(0))
        if pair_output is not None and pair_outputs is not None:
            pair_output.copy_(pair_outputs.sum(0))
