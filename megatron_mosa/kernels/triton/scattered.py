"""Matrix products of the rows of each head, added up over the heads token by token."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, multiprocessors, power_of_2, strides
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import Rows, bits_of, sequence_and_token

CHUNK_BYTES = 32 << 20  # of the products that wait for their sum over heads, about
RING = 3  # chunks at a time: one is summed, one waits, one is written


@triton.jit
def _products(
    values, places, row_starts, pairs, pair_weight, weight, partial, head, tile, FIRST, LAST, B, R, E, K, T, H,
    FIRST_COLUMN, CHUNK, stride_e, stride_d, stride_h,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    IS_ATOMIC: tl.constexpr, PARTS: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a head's rows in the sequences from FIRST to LAST, times CHUNK columns of its matrix."""
    begin = tl.load(row_starts + head * (B + 1) + FIRST)
    count = tl.load(row_starts + head * (B + 1) + LAST) - begin
    if tile * ROWS < count:
        row = tile * ROWS + tl.arange(0, ROWS)
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
            pair = tl.arange(0, PAIR)
            halves = tl.load(pairs + source[:, None] * PAIR + pair[None], mask=here[:, None], other=0.0)
        batch, token = sequence_and_token(tl.load(places + source, mask=here, other=0), SHIFT)
        if IS_ATOMIC:
            out_rows = partial + ((batch.to(tl.int64) * T + token) * H)[:, None]
        else:
            slot = row - tl.load(row_starts + head * (B + 1) + batch, mask=here, other=0)
            target = ((batch - FIRST).to(tl.int64) * E + head) * K + slot  # as the entries of a token count
            out_rows = partial + (target * CHUNK)[:, None]
        weights = weight + head.to(tl.int64) * stride_e + inner.to(tl.int64)[:, None] * stride_d
        routers = pair_weight + head.to(tl.int64) * H + FIRST_COLUMN if HAS_PAIRS else pair_weight
        for start in range(0, tl.minimum(CHUNK, H - FIRST_COLUMN), COLUMNS):
            column = start + tl.arange(0, COLUMNS)  # of the chunk
            inside = FIRST_COLUMN + column < H
            w_rows = weights + (FIRST_COLUMN + column).to(tl.int64)[None] * stride_h
            product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            if IS_WHOLE:
                product = dot(first, tl.load(w_rows), product, INTERPRETED)
                if PARTS == 3:
                    product = dot(second, tl.load(w_rows + D * stride_d), product, INTERPRETED)
                    product = dot(third, tl.load(w_rows + 2 * D * stride_d), product, INTERPRETED)
            else:
                mask = (inner < D)[:, None] & inside[None]
                product = dot(first, tl.load(w_rows, mask, 0.0), product, INTERPRETED)
                if PARTS == 3:
                    product = dot(second, tl.load(w_rows + D * stride_d, mask, 0.0), product, INTERPRETED)
                    product = dot(third, tl.load(w_rows + 2 * D * stride_d, mask, 0.0), product, INTERPRETED)
            if HAS_PAIRS:
                w = tl.load(routers + column[None] + 0 * pair[:, None], (pair < 2)[:, None] & inside[None], 0.0)
                product = dot(halves, w, product, INTERPRETED)
            if IS_ATOMIC:
                tl.atomic_add(out_rows + column[None], product, here[:, None] & inside[None], sem="relaxed")
            else:
                result = product.to(partial.dtype.element_ty)
                tl.store(out_rows + column[None], result, mask=here[:, None] & inside[None])


@triton.jit
def _sum_of_rows(rows, entries, at, there, column, CHUNK):
    """Of the rows of some tokens' entries [N, TOKENS], all on their way at once: fp32 [TOKENS, COLUMNS]."""
    entry = tl.load(entries + at, mask=there, other=0).to(tl.int64)
    tile = rows + (entry * CHUNK)[:, :, None] + column[None, None]
    # Past the first-level caches: other multiprocessors have just written here.
    loaded = tl.load(tile, mask=there[:, :, None] & (column < CHUNK)[None, None], other=0.0, cache_modifier=".cg")
    return tl.sum(loaded.to(tl.float32), axis=0)


@triton.jit
def _sums(
    partial, offsets, entries, output, first_token, batch, FIRST, B, PER_SEQUENCE, T, H, FIRST_COLUMN, CHUNK,
    stride_b, stride_t,
    TOKENS: tl.constexpr, UNROLL: tl.constexpr, MANY: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the heads, in their order, for some tokens; beyond MANY rows of a token, in larger bites."""
    lane = tl.arange(0, TOKENS)
    token = first_token + lane
    inside = (token < T) & (batch < B)
    place = offsets + batch.to(tl.int64) * T + token
    begin = tl.load(place, mask=inside, other=0)
    end = tl.load(place + 1, mask=inside, other=0)
    longest = tl.max(end - begin)
    rows = partial + (batch - FIRST).to(tl.int64) * PER_SEQUENCE * CHUNK
    for first in range(0, tl.minimum(CHUNK, H - FIRST_COLUMN), SUM_COLUMNS):
        column = first + tl.arange(0, SUM_COLUMNS)
        total = tl.zeros((TOKENS, SUM_COLUMNS), dtype=tl.float32)
        for step in range(0, tl.minimum(longest, MANY), UNROLL):
            at = begin[None] + step + tl.arange(0, UNROLL)[:, None]
            total += _sum_of_rows(rows, entries, at, at < end[None], column, CHUNK)
        if longest > MANY:
            for number in range(TOKENS):
                its_end = tl.sum(tl.where(lane == number, end, 0))
                for start in range(tl.sum(tl.where(lane == number, begin, 0)) + MANY, its_end, MANY):
                    at = start + tl.arange(0, MANY)[:, None]
                    rest = _sum_of_rows(rows, entries, at, at < its_end, column, CHUNK)
                    total += tl.where((lane == number)[:, None], rest, 0.0)
        out = output + batch.to(tl.int64) * stride_b + (token.to(tl.int64) * stride_t)[:, None]
        mask = inside[:, None] & (column < CHUNK)[None] & (FIRST_COLUMN + column < H)[None]
        tl.store(out + FIRST_COLUMN + column[None], total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _wait_for(counter, number):
    """Until that many programs have counted up."""
    reached = tl.atomic_add(counter, 0, sem="acquire")
    while reached < number:
        reached = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _count_up(counter):
    """What this program has written is there for those who wait for the count."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit(do_not_specialize=["B", "SEQUENCES", "CHUNKS", "SLICES"])
def _scattered_kernel(
    values, places, row_starts, pairs, pair_weight, weight, partial, offsets, entries, output, counters,
    B, R, E, K, T, H, SEQUENCES, CHUNKS, SLICES, CHUNK, stride_e, stride_d, stride_h, stride_b, stride_t,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, UNROLL: tl.constexpr, MANY: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs take work by tickets: round by round, the products of one chunk and the sums of the one before.

    A program waits only for work of lower tickets, whose holders wait for lower ones still: none waits for ever,
    however many programs run at a time. Sums read what they add up in a fixed order: tickets change no result.
    """
    products = tl.cdiv(SEQUENCES * K, ROWS) * E
    per_round = products + SEQUENCES * tl.cdiv(T, TOKENS)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while ticket < (CHUNKS + 1) * per_round:
        following = tl.atomic_add(counters, 1, sem="relaxed")  # on its way meanwhile
        item = ticket % per_round
        is_product = item < products
        chunk = ticket // per_round - tl.where(is_product, 0, 1)
        if (chunk >= 0) & (chunk < CHUNKS):
            first, first_column = chunk // SLICES * SEQUENCES, chunk % SLICES * CHUNK
            done, summed = counters + 1 + chunk, counters + 1 + CHUNKS + chunk
            part = partial + (chunk % RING).to(tl.int64) * SEQUENCES * E * K * CHUNK
            if is_product:
                if chunk >= RING:
                    _wait_for(summed - RING, per_round - products)
                tiles_of_head = products // E
                _products(
                    values, places, row_starts, pairs, pair_weight, weight, part, item // tiles_of_head,
                    item % tiles_of_head, first, tl.minimum(first + SEQUENCES, B), B, R, E, K, T, H, first_column,
                    CHUNK, stride_e, stride_d, stride_h, D, SHIFT, IS_WHOLE, INTERPRETED, HAS_PAIRS, False, PARTS,
                    PAIR, WIDTH, ROWS, COLUMNS,
                )  # fmt: skip
                _count_up(done)
            else:
                _wait_for(done, products)
                # First tokens first: all heads may take them, and their long sums must not come last.
                item -= products
                _sums(
                    part, offsets, entries, output, item // SEQUENCES * TOKENS, first + item % SEQUENCES, first, B,
                    E * K, T, H, first_column, CHUNK, stride_b, stride_t, TOKENS, UNROLL, MANY, SUM_COLUMNS,
                )  # fmt: skip
                _count_up(summed)
        ticket = following


@triton.jit(do_not_specialize=["B"])
def _atomic_kernel(
    values, places, row_starts, pairs, pair_weight, weight, sums, B, R, E, K, T, H, stride_e, stride_d, stride_h,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _products(
        values, places, row_starts, pairs, pair_weight, weight, sums, tl.program_id(1), tl.program_id(0), 0, B, B, R,
        E, K, T, H, 0, H, stride_e, stride_d, stride_h, D, SHIFT, IS_WHOLE, INTERPRETED, HAS_PAIRS, True, PARTS, PAIR,
        WIDTH, ROWS, COLUMNS,
    )  # fmt: skip


def chunk_of(batch: int, sequence_bytes: int, width: int) -> tuple[int, int]:
    """How many sequences, and how many columns of them, are a chunk of about CHUNK_BYTES; columns by the 256."""
    if sequence_bytes <= CHUNK_BYTES:
        return min(batch, CHUNK_BYTES // sequence_bytes), width
    return 1, min(width, max(256, width * CHUNK_BYTES // sequence_bytes // 256 * 256))


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
    chosen = tiles.scattered(values.dtype, values.device, parts, size, selected)
    inputs = (values, rows.places, rows.starts, *(pairs or (None, None)), weight)
    sizes = (batch, capacity, heads, selected, length, width)
    options = dict(
        D=size, SHIFT=bits_of(length), WIDTH=power_of_2(size), INTERPRETED=INTERPRET, HAS_PAIRS=pairs is not None,
        PARTS=parts, PAIR=PAIR, IS_WHOLE=width % chosen["COLUMNS"] == 0 and size == power_of_2(size),
    )  # fmt: skip
    if not deterministic:
        sums = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        grid = (triton.cdiv(capacity, chosen["ROWS"]), heads)
        _atomic_kernel[grid](*inputs, sums, *sizes, *weight.stride(), **options, **chosen)
        return torch.empty_like(like).copy_(sums)
    output = torch.empty_like(like)
    sequences, columns = chunk_of(batch, heads * selected * width * values.element_size(), width)
    slices = triton.cdiv(width, columns)
    chunks = triton.cdiv(batch, sequences) * slices
    partial = values.new_empty(min(RING, chunks) * sequences * heads * selected * columns)
    counters = torch.zeros(1 + 2 * chunks, dtype=torch.int32, device=like.device)
    sums_by = tiles.sums(values.dtype, columns, chosen["num_warps"])
    _scattered_kernel[(tiles.PROGRAMS_EACH * multiprocessors(like.device),)](
        *inputs, partial, rows.offsets, rows.entries, output, counters, *sizes, sequences, chunks, slices, columns,
        *weight.stride(), *strides(output), RING=RING, **options, **chosen, **sums_by,
    )  # fmt: skip
    return output
