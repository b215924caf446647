"""Matrix products of the rows of each head, added up over the heads token by token."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, Repeated, dot, power_of_2, strides
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import Rows, bits_of, sequence_and_token

FEWEST_CHUNKS = 4  # of the products of a layer; one at a time is in memory, waiting for its sum over heads
SMALL_BYTES = 256 << 20  # of all products of a layer: so few are one chunk
MOST_BYTES = 1536 << 20  # of a chunk


@triton.jit(do_not_specialize=["FIRST", "LAST", "B"])
def _scattered_kernel(
    values, places, row_starts, pairs, pair_weight, weight, partial,
    FIRST, LAST, B, R, E, K, T, H, FIRST_COLUMN, CHUNK, stride_e, stride_d, stride_h,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    IS_ATOMIC: tl.constexpr, PARTS: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2)
    begin = tl.load(row_starts + head * (B + 1) + FIRST)
    count = tl.load(row_starts + head * (B + 1) + LAST) - begin
    if tl.program_id(0) * ROWS >= count:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here, row = row < count, begin + row
    source = head.to(tl.int64) * R + row
    inner = tl.arange(0, WIDTH)
    a_mask = here[:, None] & (inner < D)[None]
    a_rows = values + source[:, None] * (PARTS * D) + inner[None]
    first = tl.load(a_rows, mask=a_mask, other=0.0)
    if PARTS == 3:
        second = tl.load(a_rows + D, mask=a_mask, other=0.0)
        third = tl.load(a_rows + 2 * D, mask=a_mask, other=0.0)
    if HAS_PAIRS:
        scale = tl.load(pairs + source * PAIR, mask=here, other=0.0).to(tl.float32)
        scale += tl.load(pairs + source * PAIR + 1, mask=here, other=0.0).to(tl.float32)
    place = tl.load(places + source, mask=here, other=0)
    batch, token = sequence_and_token(place, SHIFT)
    if IS_ATOMIC:
        out_rows = partial + ((batch.to(tl.int64) * T + token) * H)[:, None]
    else:
        slot = row - tl.load(row_starts + head * (B + 1) + batch, mask=here, other=0)
        target = ((batch - FIRST).to(tl.int64) * E + head) * K + slot  # as the entries of a token count
        out_rows = partial + (target * CHUNK)[:, None]
    weights = weight + head.to(tl.int64) * stride_e + inner.to(tl.int64)[:, None] * stride_d
    sweep_from = tl.program_id(1) * (SWEEP * COLUMNS)
    last_column = tl.minimum(tl.minimum(CHUNK, H - FIRST_COLUMN), sweep_from + SWEEP * COLUMNS)
    for start in range(sweep_from, last_column, COLUMNS):
        column = start + tl.arange(0, COLUMNS)  # of the chunk
        inside = column < last_column
        w_rows = weights + (FIRST_COLUMN + column).to(tl.int64)[None] * stride_h
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if IS_WHOLE:
            product = dot(first, tl.load(w_rows), product, INTERPRETED)
            if PARTS == 3:
                product = dot(second, tl.load(w_rows + D * stride_d), product, INTERPRETED)
                product = dot(third, tl.load(w_rows + 2 * D * stride_d), product, INTERPRETED)
        else:
            mask = (inner < D)[:, None] & inside[None]
            product = dot(first, tl.load(w_rows, mask=mask, other=0.0), product, INTERPRETED)
            if PARTS == 3:
                product = dot(second, tl.load(w_rows + D * stride_d, mask=mask, other=0.0), product, INTERPRETED)
                product = dot(third, tl.load(w_rows + 2 * D * stride_d, mask=mask, other=0.0), product, INTERPRETED)
        if HAS_PAIRS:
            router = pair_weight + head.to(tl.int64) * H + FIRST_COLUMN
            w = tl.load(router + column, mask=inside, other=0.0)
            product += scale[:, None] * w.to(tl.float32)[None]
        mask = here[:, None] & inside[None]
        if IS_ATOMIC:
            tl.atomic_add(out_rows + column[None], product, mask=mask, sem="relaxed")
        else:
            tl.store(out_rows + column[None], product.to(partial.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_rows(rows, entries, begin, end, CHUNK, inside, UNROLL: tl.constexpr):
    """Of the next UNROLL rows of a token, up to its end, all on their way at once."""
    place = begin + tl.arange(0, UNROLL)
    entry = tl.load(entries + place, mask=place < end, other=0).to(tl.int64)
    tile = tl.load(rows[None] + (entry * CHUNK)[:, None], mask=(place < end)[:, None] & inside[None], other=0.0)
    return tl.sum(tile.to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["FIRST", "SEQUENCES"])
def _combine_kernel(
    partial, offsets, entries, output, FIRST, SEQUENCES, PER_SEQUENCE, T, H, FIRST_COLUMN, CHUNK, stride_b, stride_t,
    UNROLL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # First tokens first: every head may take them, and their long sums must not come last.
    of_chunk, token = tl.program_id(0) % SEQUENCES, tl.program_id(0) // SEQUENCES  # the sequence within the chunk
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, batch = (column < CHUNK) & (FIRST_COLUMN + column < H), FIRST + of_chunk
    begin = tl.load(offsets + batch.to(tl.int64) * T + token)
    end = tl.load(offsets + batch.to(tl.int64) * T + token + 1)
    rows = partial + of_chunk.to(tl.int64) * PER_SEQUENCE * CHUNK + column
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    many = begin + (end - begin) // UNROLL * UNROLL
    for start in range(begin, many, UNROLL):
        total += _sum_of_rows(rows, entries, start, many, CHUNK, inside, UNROLL)
    for start in range(many, end, 4):
        total += _sum_of_rows(rows, entries, start, end, CHUNK, inside, 4)
    out = output + batch.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t + FIRST_COLUMN + column
    tl.store(out, total.to(output.dtype.element_ty), mask=inside)


def chunks_of(batch: int, sequence_bytes: int, width: int) -> tuple[int, int]:
    """How many sequences, and how many columns of them, are a chunk: what waits for its sum at a time.

    Up to ``SMALL_BYTES`` that is everything. Beyond, columns are cut where one sequence is too much for a chunk, to
    multiples of 128 that let kernels read many bytes at once, or of fewer in a narrow layer: no chunk is more than half
    of a layer, but for an odd column.
    """
    if batch * sequence_bytes <= SMALL_BYTES:
        return batch, width
    allowed = min(MOST_BYTES, batch * sequence_bytes // FEWEST_CHUNKS)
    step = next(step for step in (128, 16, 1) if step == 1 or width >= step * FEWEST_CHUNKS)
    slices = 1
    while sequence_bytes > allowed * slices and width > step * slices:
        slices *= 2
    return max(1, allowed // sequence_bytes), width if slices == 1 else -(-width // (step * slices)) * step


def scattered_product(
    values: Tensor,
    weight: Tensor,
    rows: Rows,
    like: Tensor,
    selected: int,
    parts: int = 1,
    pairs: tuple[Tensor, Tensor] | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Rows of each head times its matrix, added up over the heads at the rows' tokens.

    Args:
        values: [E, B * k, parts * d].
        weight: [E, parts * d, h] with any strides.
        rows: of the selection.
        like: [B, T, h], whose shape, type and strides the result has.
        selected: k.
        parts: 1 or 3, which only says how d is tiled.
        pairs: [E, B * k, PAIR], numbers as the sums of their columns, and [E, h]: their outer products are added.
        deterministic: the products wait for their sum, a chunk at a time, in the type of ``like``, and are summed in
            fp32 in the order of heads; otherwise fp32 atomics add them in any order.

    Returns:
        [B, T, h].
    """
    batch, length, width = like.shape
    heads, capacity = rows.places.shape
    size = values.shape[2] // parts
    sequences, columns = chunks_of(batch, heads * selected * width * values.element_size(), width)
    chosen = tiles.scattered(values.dtype, values.device, parts, size, sequences * selected)
    options = dict(
        D=size, SHIFT=bits_of(length), WIDTH=power_of_2(size), INTERPRETED=INTERPRET, HAS_PAIRS=pairs is not None,
        PARTS=parts, PAIR=PAIR, IS_ATOMIC=not deterministic,
        IS_WHOLE=width % columns == columns % chosen["COLUMNS"] == 0 and size == power_of_2(size), **chosen,
    )  # fmt: skip

    product, total = Repeated(_scattered_kernel), Repeated(_combine_kernel)

    def multiply(into: Tensor, columns: int, first: int, last: int, first_column: int) -> None:
        row_tiles = triton.cdiv((last - first) * selected, chosen["ROWS"])
        product(
            (row_tiles, triton.cdiv(columns, chosen["COLUMNS"] * chosen["SWEEP"]), heads),
            values, rows.places, rows.starts, *(pairs or (None, None)), weight, into, first, last,
            batch, capacity, heads, selected, length, width, first_column, columns, *weight.stride(), **options,
        )  # fmt: skip

    if not deterministic:
        sums = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        multiply(sums, width, 0, batch, 0)
        return torch.empty_like(like).copy_(sums)
    output, of_sum = torch.empty_like(like), tiles.combine(columns, heads * selected // length)

    def combine(products: Tensor, first: int, last: int, first_column: int) -> None:
        total(
            (length * (last - first), triton.cdiv(columns, of_sum["COLUMNS"]), 1),
            products, rows.offsets, rows.entries, output, first, last - first, heads * selected, length, width,
            first_column, columns, *strides(output), **of_sum,
        )  # fmt: skip

    products = values.new_empty(sequences * heads * selected * columns)
    for first in range(0, batch, sequences):
        for first_column in range(0, width, columns):
            multiply(products, columns, first, min(batch, first + sequences), first_column)
            combine(products, first, min(batch, first + sequences), first_column)
    return output
