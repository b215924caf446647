"""Matrix products over the rows of each head, with the gather of tokens inside, and the sum over heads."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, strides, tokens_of_rows

PARTIAL_BYTES = 64 << 20  # of the products that wait for their sum over heads


@triton.jit
def _gathered_kernel(
    states, indices, weight, output, R, E, K, T, H, D, stride_b, stride_t, stride_e, stride_h, stride_d,
    INTERPRETED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    batch, token, filled = tokens_of_rows(indices, head, row, row < R, E, K, T)
    x_rows = states + (batch.to(tl.int64) * stride_b + tl.where(filled, token, 0) * stride_t)[:, None]
    columns = weight + head.to(tl.int64) * stride_e + part.to(tl.int64)[None] * stride_d
    inner = tl.arange(0, INNER)
    first = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if PARTS == 3:  # queries, keys and values share the gathered tokens
        second, third = first, first
    for start in range(0, H, INNER):
        inside = start + inner < H
        x = tl.load(x_rows + (start + inner)[None], mask=filled[:, None] & inside[None], other=0.0)
        w_rows = columns + (start + inner).to(tl.int64)[:, None] * stride_h
        there = inside[:, None] & (part < D)[None]
        first = dot(x, tl.load(w_rows, mask=there, other=0.0), first, INTERPRETED)
        if PARTS == 3:
            second = dot(x, tl.load(w_rows + D * stride_d, mask=there, other=0.0), second, INTERPRETED)
            third = dot(x, tl.load(w_rows + 2 * D * stride_d, mask=there, other=0.0), third, INTERPRETED)
    out = output + (head.to(tl.int64) * R + row)[:, None] * (PARTS * D) + part[None]
    there = (row < R)[:, None] & (part < D)[None]
    tl.store(out, first.to(output.dtype.element_ty), mask=there)
    if PARTS == 3:
        tl.store(out + D, second.to(output.dtype.element_ty), mask=there)
        tl.store(out + 2 * D, third.to(output.dtype.element_ty), mask=there)


def gathered_product(states: Tensor, indices: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
    """The selected tokens of each head times its matrix.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        indices: int64 [B, E, k], T in empty slots, whose products are 0.
        weight: [E, h, parts * d] with any strides.
        parts: 1 or 3 (q, k and v).

    Returns:
        [E, B * k, parts * d] in the type of ``states``.
    """
    batch, length, width = states.shape
    _, heads, selected = indices.shape
    rows, size = batch * selected, weight.shape[2] // parts
    output = states.new_empty((heads, rows, parts * size))
    chosen = tiles.gathered(states.dtype, parts, size)
    grid = (triton.cdiv(rows, chosen["ROWS"]), heads, triton.cdiv(size, chosen["COLUMNS"]))
    _gathered_kernel[grid](
        states, indices, weight, output, rows, heads, selected, length, width, size, *strides(states), *weight.stride(),
        INTERPRETED=INTERPRET, PARTS=parts, **chosen,
    )  # fmt: skip
    return output


@triton.jit
def _scattered_kernel(
    values, scale, extra, extra_weight, weight, partial, FIRST_ROW, N, R, H, D, stride_e, stride_d, stride_h,
    INTERPRETED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_EXTRA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the chunk
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    here = row < N
    source = head.to(tl.int64) * R + FIRST_ROW + row
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, INNER):
        inside = start + inner < D
        a = tl.load(values + source[:, None] * D + (start + inner)[None], mask=here[:, None] & inside[None], other=0.0)
        w = tl.load(
            weight + head.to(tl.int64) * stride_e + (start + inner).to(tl.int64)[:, None] * stride_d
            + column.to(tl.int64)[None] * stride_h,
            mask=inside[:, None] & (column < H)[None],
            other=0.0,
        )  # fmt: skip
        product = dot(a, w, product, INTERPRETED)
    if HAS_SCALE:
        product *= tl.load(scale + source, mask=here, other=0.0)[:, None]
    if HAS_EXTRA:
        w = tl.load(extra_weight + head.to(tl.int64) * H + column, mask=column < H, other=0.0).to(tl.float32)
        product += tl.load(extra + source, mask=here, other=0.0)[:, None] * w[None]
    out = partial + (head.to(tl.int64) * N + row)[:, None] * H + column[None]
    tl.store(out, product.to(partial.dtype.element_ty), mask=here[:, None] & (column < H)[None])


@triton.jit
def _combine_kernel(
    partial, offsets, entries, output, FIRST_SEQUENCE, N, K, T, H, stride_b, stride_t,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    of_chunk = tl.program_id(1)  # sequence within the chunk
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    batch = FIRST_SEQUENCE + of_chunk
    begin = tl.load(offsets + batch.to(tl.int64) * T + token)
    end = tl.load(offsets + batch.to(tl.int64) * T + token + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        entry = tl.load(entries + place, mask=place < end, other=0)
        row = (entry // K).to(tl.int64) * N + of_chunk * K + entry % K
        rows = tl.load(
            partial + row[:, None] * H + column[None], mask=(place < end)[:, None] & (column < H)[None], other=0.0
        )
        total += tl.sum(rows.to(tl.float32), axis=0)
    out = output + batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t + column
    tl.store(out, total.to(output.dtype.element_ty), mask=column < H)


def scattered_product(
    values: Tensor,
    weight: Tensor,
    inverse: tuple[Tensor, Tensor],
    like: Tensor,
    selected: int,
    scale: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows of each head times its matrix, added up over the heads at the rows' tokens, in a fixed order.

    The products wait for their sum in the type of ``like``, some sequences at a time; sums are fp32.

    Args:
        values: [E, B * k, d].
        weight: [E, d, h] with any strides.
        inverse: from ``rows_of_tokens``.
        like: [B, T, h], whose shape, type and strides the result has.
        selected: k.
        scale: fp32 [E, B * k], multiplies the products.
        extra: fp32 [E, B * k] and [E, h], whose outer products are added to the products.

    Returns:
        [B, T, h].
    """
    batch, length, width = like.shape
    heads, rows, size = values.shape
    output = torch.empty_like(like)
    sequences = max(1, min(batch, PARTIAL_BYTES // (heads * selected * width * values.element_size())))
    partial = values.new_empty((heads, sequences * selected, width))
    chosen, chosen_sum = tiles.scattered(values.dtype, size), tiles.combine(width)
    for first in range(0, batch, sequences):
        count = min(sequences, batch - first)
        chunk = count * selected
        grid = (triton.cdiv(chunk, chosen["ROWS"]), triton.cdiv(width, chosen["COLUMNS"]), heads)
        _scattered_kernel[grid](
            values, scale, extra[0] if extra else None, extra[1] if extra else None, weight, partial,
            first * selected, chunk, rows, width, size, *weight.stride(),
            INTERPRETED=INTERPRET, HAS_SCALE=scale is not None, HAS_EXTRA=extra is not None, **chosen,
        )  # fmt: skip
        _combine_kernel[(length, count, triton.cdiv(width, chosen_sum["COLUMNS"]))](
            partial, *inverse, output, first, chunk, selected, length, width, *strides(output), **chosen_sum,
        )  # fmt: skip
    return output


@triton.jit
def _weight_gradient_kernel(
    states, indices, values, scale, extra, output, extra_output, R, E, K, T, H, D, stride_b, stride_t,
    stride_e, stride_h, stride_d,
    INTERPRETED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_EXTRA: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # of the states
    part = tl.program_id(2) * INNER + tl.arange(0, INNER)  # of the values
    first = tl.zeros((COLUMNS, INNER), dtype=tl.float32)
    if PARTS == 3:
        second, third = first, first
    if HAS_EXTRA:
        along = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, R, ROWS):
        row = start + tl.arange(0, ROWS)
        batch, token, filled = tokens_of_rows(indices, head, row, row < R, E, K, T)
        x_rows = batch.to(tl.int64) * stride_b + tl.where(filled, token, 0) * stride_t
        x = tl.load(
            states + x_rows[None] + column[:, None], mask=filled[None] & (column < H)[:, None], other=0.0
        )  # [COLUMNS, ROWS]
        source = head.to(tl.int64) * R + row
        there = filled[:, None] & (part < D)[None]
        v = values + source[:, None] * (PARTS * D) + part[None]
        y = tl.load(v, mask=there, other=0.0)
        if HAS_SCALE:
            y = (y.to(tl.float32) * tl.load(scale + source, mask=filled, other=0.0)[:, None]).to(x.dtype)
        first = dot(x, y, first, INTERPRETED)
        if PARTS == 3:
            second = dot(x, tl.load(v + D, mask=there, other=0.0), second, INTERPRETED)
            third = dot(x, tl.load(v + 2 * D, mask=there, other=0.0), third, INTERPRETED)
        if HAS_EXTRA:
            along += tl.sum(x.to(tl.float32) * tl.load(extra + source, mask=filled, other=0.0)[None], axis=1)
    out = output + head.to(tl.int64) * stride_e + column.to(tl.int64)[:, None] * stride_h + part[None] * stride_d
    there = (column < H)[:, None] & (part < D)[None]
    tl.store(out, first.to(output.dtype.element_ty), mask=there)
    if PARTS == 3:
        tl.store(out + D * stride_d, second.to(output.dtype.element_ty), mask=there)
        tl.store(out + 2 * D * stride_d, third.to(output.dtype.element_ty), mask=there)
    if HAS_EXTRA and tl.program_id(2) == 0:
        offsets = head.to(tl.int64) * H + column
        tl.store(extra_output + offsets, along.to(extra_output.dtype.element_ty), mask=column < H)


def weight_gradient(
    states: Tensor,
    indices: Tensor,
    values: Tensor,
    output: Tensor,
    parts: int = 1,
    scale: Tensor | None = None,
    extra: Tensor | None = None,
    extra_output: Tensor | None = None,
) -> None:
    """Write, for each head, the selected tokens transposed times the values of its rows.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        indices: int64 [B, E, k], T in empty slots.
        values: [E, B * k, parts * d].
        output: [E, h, parts * d] with any strides.
        scale: fp32 [E, B * k], multiplies the values.
        extra, extra_output: one more column of values, fp32 [E, B * k], and its result, [E, h].
    """
    batch, length, width = states.shape
    _, heads, selected = indices.shape
    size = values.shape[2] // parts
    chosen = tiles.weight_gradient(states.dtype, parts, size)
    grid = (triton.cdiv(width, chosen["COLUMNS"]), heads, triton.cdiv(size, chosen["INNER"]))
    _weight_gradient_kernel[grid](
        states, indices, values, scale, extra, output, extra_output, batch * selected, heads, selected, length, width,
        size, *strides(states), *output.stride(),
        INTERPRETED=INTERPRET, HAS_SCALE=scale is not None, HAS_EXTRA=extra is not None, PARTS=parts, **chosen,
    )  # fmt: skip
