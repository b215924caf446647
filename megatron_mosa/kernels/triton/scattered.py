"""Matrix products of the rows of each head, summed over the heads token by token."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import specialized, tiles
from megatron_mosa.kernels.triton.common import (
    INTERPRET,
    TensorDescriptor,
    can_be_described,
    cdiv,
    dot,
    launch,
    multiprocessors,
    strides,
)
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import Rows, bits_of, tiles_of, unpack_index

FEWEST_CHUNKS = 4  # of the products of a layer; only one chunk at a time is in memory, until it is summed over heads
SMALL_BYTES = 256 << 20  # products of a layer that need no more memory form one chunk
MOST_BYTES = 1792 << 20  # of a chunk
FEWEST_COLUMNS = 1024  # of a chunk, before it has fewer sequences
WIDEST_STORE = 128  # columns; a wider tile is stored in halves, which need half as much shared memory


@triton.jit
def _product_tile(
    values, weight, products, p_pairs, p_pair_weight, p_tile, i_column, FIRST_COLUMN, TILES, R, H, CAPACITY, CHUNK,
    stride_e, stride_d, stride_h,
    D: tl.constexpr, IS_DESCRIBED: tl.constexpr, IS_TRANSPOSED: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr, PAIR: tl.constexpr, WIDEST_STORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows of a head, which may end with rows that are not of the chunk, with COLUMNS of its matrix."""
    i_head, i_row, i_product = tl.load(p_tile), tl.load(p_tile + TILES), tl.load(p_tile + 2 * TILES)
    o_row, o_column = i_row + tl.arange(0, ROWS), i_column + tl.arange(0, COLUMNS)
    m_row = o_row < R
    m_column = tl.full((COLUMNS,), True, tl.int1) if IS_WHOLE else (o_column < CHUNK) & (FIRST_COLUMN + o_column < H)
    if not IS_DESCRIBED:
        o_inner = tl.arange(0, INNER)
        p_value_rows = values + (i_head.to(tl.int64) * R + tl.minimum(o_row, R - 1))[:, None] * D
        o_w = FIRST_COLUMN + o_column
        if IS_WHOLE:  # the compiler cannot derive that loads can be wide
            o_w = tl.max_contiguous(tl.multiple_of(o_w, COLUMNS), COLUMNS)
        p_columns = weight + i_head.to(tl.int64) * stride_e + o_w.to(tl.int64)[None] * stride_h
    b_product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, INNER):
        if IS_DESCRIBED:
            b_value = values.load([i_head, i_row, start]).reshape(ROWS, INNER)
            if IS_TRANSPOSED:
                b_w = weight.load([i_head, FIRST_COLUMN + i_column, start]).reshape(COLUMNS, INNER).T
            else:
                b_w = weight.load([i_head, start, FIRST_COLUMN + i_column]).reshape(INNER, COLUMNS)
        else:
            i_inner = start + o_inner
            p_w = p_columns + i_inner.to(tl.int64)[:, None] * stride_d
            if IS_WHOLE:
                b_value, b_w = tl.load(p_value_rows + i_inner[None]), tl.load(p_w)
            else:
                b_value = tl.load(p_value_rows + i_inner[None], mask=(i_inner < D)[None], other=0.0)
                b_w = tl.load(p_w, mask=(i_inner < D)[:, None] & m_column[None], other=0.0)
        b_product = dot(b_value, b_w, b_product, INTERPRETED)
    if HAS_PAIRS:
        p_pair = p_pairs + (i_head.to(tl.int64) * R + o_row) * PAIR
        b_pair = tl.load(p_pair, mask=m_row, other=0.0).to(tl.float32)
        b_pair += tl.load(p_pair + 1, mask=m_row, other=0.0).to(tl.float32)
        p_pair_row = p_pair_weight + i_head.to(tl.int64) * H + FIRST_COLUMN
        b_w = tl.load(p_pair_row + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_product += b_pair[:, None] * b_w[None]
    if not IS_DESCRIBED:
        o_product = i_product + tl.arange(0, ROWS)
        p_out_rows = products + ((i_head.to(tl.int64) * CAPACITY + o_product) * CHUNK)[:, None]
        mask = (o_product < CAPACITY)[:, None] & m_column[None]
        tl.store(p_out_rows + o_column[None], b_product.to(products.dtype.element_ty), mask=mask)
    elif COLUMNS > WIDEST_STORE:
        HALF: tl.constexpr = COLUMNS // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_product, (ROWS, 2, HALF)), (0, 2, 1)))
        b_left, b_right = b_left.to(products.dtype), b_right.to(products.dtype)
        products.store([i_head, i_product, i_column], b_left.reshape(1, ROWS, HALF))
        products.store([i_head, i_product, i_column + HALF], b_right.reshape(1, ROWS, HALF))
    else:
        products.store([i_head, i_product, i_column], b_product.to(products.dtype).reshape(1, ROWS, COLUMNS))


@triton.jit(do_not_specialize=["I_CHUNK", "FIRST_COLUMN", "COLUMN_TILES", "TILES", "R", "CAPACITY"])
def _scattered_kernel(
    values, weight, products, p_pairs, p_pair_weight, p_tiles, p_number, I_CHUNK, FIRST_COLUMN, COLUMN_TILES, TILES,
    R, H, CAPACITY, CHUNK, stride_e, stride_d, stride_h,
    D: tl.constexpr, IS_DESCRIBED: tl.constexpr, IS_TRANSPOSED: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr, PAIR: tl.constexpr, WIDEST_STORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a chunk with CHUNK columns of the weights, from FIRST_COLUMN on.

    Each program takes every n-th tile, so that it loads the next tile while it multiplies the last.
    """
    number = tl.load(p_number + I_CHUNK) * COLUMN_TILES
    p_tiles += I_CHUNK * 4 * TILES
    # Two loops: without descriptors, as before Hopper, flattening was not measured.
    if IS_DESCRIBED:
        for tile in tl.range(tl.program_id(0), number, tl.num_programs(0), flatten=True):
            _product_tile(
                values, weight, products, p_pairs, p_pair_weight, p_tiles + tile // COLUMN_TILES,
                tile % COLUMN_TILES * COLUMNS, FIRST_COLUMN, TILES, R, H, CAPACITY, CHUNK, stride_e, stride_d, stride_h,
                D, IS_DESCRIBED, IS_TRANSPOSED, IS_WHOLE, INTERPRETED, HAS_PAIRS, PAIR, WIDEST_STORE,
                ROWS, COLUMNS, INNER,
            )  # fmt: skip
    else:
        for tile in range(tl.program_id(0), number, tl.num_programs(0)):
            _product_tile(
                values, weight, products, p_pairs, p_pair_weight, p_tiles + tile // COLUMN_TILES,
                tile % COLUMN_TILES * COLUMNS, FIRST_COLUMN, TILES, R, H, CAPACITY, CHUNK, stride_e, stride_d, stride_h,
                D, IS_DESCRIBED, IS_TRANSPOSED, IS_WHOLE, INTERPRETED, HAS_PAIRS, PAIR, WIDEST_STORE,
                ROWS, COLUMNS, INNER,
            )  # fmt: skip


@triton.jit
def _entries_from(p_entries, begin, end, UNROLL: tl.constexpr):
    i_entry = begin + tl.arange(0, UNROLL)
    return tl.load(p_entries + i_entry, mask=i_entry < end, other=0)


@triton.jit(do_not_specialize=["FIRST", "SEQUENCES", "R", "CAPACITY", "SHIFT"])
def _combine_kernel(
    p_products, p_offsets, p_entries, p_pairs, p_pair_weight, p_addend, p_out, FIRST, SEQUENCES, R, CAPACITY, SHIFT,
    T, H, FIRST_COLUMN, CHUNK, stride_b, stride_t, addend_stride_b, addend_stride_t,
    HAS_ADDEND: tl.constexpr, PAIR: tl.constexpr, UNROLL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the products of each token of a chunk to the addend; if PAIR, all slots are filled, and outer products join.

    UNROLL rows are loaded at once, and the entries of the next ones meanwhile: the latency of memory decides how long a
    token takes.
    """
    # The first tokens of all sequences run first: every head may select them, and long sums must not come last.
    i_sequence, i_token = tl.program_id(0) % SEQUENCES, tl.program_id(0) // SEQUENCES  # the sequence within the chunk
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column, i_batch = (o_column < CHUNK) & (FIRST_COLUMN + o_column < H), FIRST + i_sequence
    begin = tl.load(p_offsets + i_batch.to(tl.int64) * T + i_token)
    end = tl.load(p_offsets + i_batch.to(tl.int64) * T + i_token + 1)
    p_products += o_column
    if PAIR:
        p_pair_weight += FIRST_COLUMN + o_column
    if HAS_ADDEND:
        p_addend += i_batch.to(tl.int64) * addend_stride_b + i_token.to(tl.int64) * addend_stride_t + FIRST_COLUMN
        b_sum = tl.load(p_addend + o_column, mask=m_column, other=0.0).to(tl.float32)
    else:
        b_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    b_entry = _entries_from(p_entries, begin, end, UNROLL)
    for start in range(begin, end, UNROLL):
        m_entry = start + tl.arange(0, UNROLL) < end
        mask = m_entry[:, None] & m_column[None]
        i_head, i_row = unpack_index(b_entry, SHIFT)
        i_product = (i_head * CAPACITY + i_row).to(tl.uint32)  # signed, it would need a quarter more registers
        o_product = i_product.to(tl.int64) * CHUNK
        b_rows = tl.load(p_products[None] + o_product[:, None], mask=mask, other=0.0).to(tl.float32)
        b_entry = _entries_from(p_entries, start + UNROLL, end, UNROLL)
        if PAIR:
            i_head = i_head.to(tl.int64)
            p_pair = p_pairs + (i_head * R + i_row) * PAIR
            b_pair = tl.load(p_pair[:, None] + tl.arange(0, 2)[None], mask=m_entry[:, None], other=0.0)
            b_w = tl.load(p_pair_weight[None] + (i_head * H)[:, None], mask=mask, other=0.0)
            b_rows += tl.sum(b_pair.to(tl.float32), axis=1)[:, None] * b_w.to(tl.float32)
        b_sum += tl.sum(b_rows, axis=0)
    p_out_row = p_out + i_batch.to(tl.int64) * stride_b + i_token.to(tl.int64) * stride_t + FIRST_COLUMN + o_column
    tl.store(p_out_row, b_sum.to(p_out.dtype.element_ty), mask=m_column)


def chunks_of(shape: tuple[int, ...], like: Tensor, small_bytes: int | None = None) -> tuple[int, int]:
    """Return the number of sequences, and of columns of their products, in a chunk.

    Products of at most ``small_bytes`` form one chunk. Larger ones are split by columns down to ``FEWEST_COLUMNS``,
    because products of more rows are faster, then by sequences, and by columns again if one sequence is too large for a
    chunk. Columns are split at multiples of 128, which allow wide loads, or of fewer in a narrow layer, and sequences
    evenly. No chunk of more than ``small_bytes`` has more than half of the products, except for an odd column.

    Args:
        shape: B, E and k of the selection.
        like: [B, T, h] of the type of the products.
        small_bytes: chunks of up to so many bytes are not split; None: of up to ``SMALL_BYTES``, if one holds all
            products.
    """
    (batch, heads, selected), width = shape, like.shape[2]
    sequence_bytes = heads * selected * width * like.element_size()
    if batch * sequence_bytes <= (SMALL_BYTES if small_bytes is None else small_bytes):
        return batch, width
    allowed = max(small_bytes or 0, min(MOST_BYTES, batch * sequence_bytes // FEWEST_CHUNKS))
    step = next(step for step in (128, 16, 1) if step == 1 or width >= step * FEWEST_CHUNKS)
    slices = 1
    while batch * sequence_bytes > allowed * slices and width > FEWEST_COLUMNS * slices:
        slices *= 2
    while sequence_bytes > allowed * slices and width > step * slices:
        slices *= 2
    columns = width if slices == 1 else -(-width // (step * slices)) * step
    chunks = cdiv(batch, max(1, min(batch, allowed * width // (sequence_bytes * columns))))
    return cdiv(batch, chunks), columns


def scattered_product(
    values: Tensor,
    weight: Tensor,
    rows: Rows,
    like: Tensor,
    pairs: tuple[Tensor, Tensor] | None = None,
    is_full: bool = False,
    small_bytes: int | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Multiply the rows of each head with its matrix, and sum over the heads at the rows' tokens.

    The products are kept, one chunk at a time and in the type of ``like``, and summed in fp32 in the order of heads.

    Args:
        values: [E, R, d].
        weight: [E, d, h] with any strides.
        rows: the rows of the selection, with entries for the chunks of ``like``.
        like: [B, T, h]; the result has its shape, type and strides.
        pairs: [E, R, PAIR], numbers given as the sums of their columns, and [E, h]; their outer products are added.
        is_full: every slot is filled, so that the rows of some sequences are a matrix, which cuBLAS multiplies.
        small_bytes: see ``chunks_of``, also for the chunks of ``rows``.
        addend: [B, T, h], contiguous in the last dimension; added to the result, before it is rounded.

    Returns:
        [B, T, h].
    """
    (batch, heads, selected, length), width = rows.shape, like.shape[2]
    sequences, columns = chunks_of((batch, heads, selected), like, small_bytes)
    capacity = sequences * selected  # of the products of a head
    products, output = like.new_empty((heads, capacity, columns)), torch.empty_like(like)
    multiply = None
    if not is_full:
        given = values, weight, rows, pairs, products, sequences
        multiply = specialized.ragged_product(*given) or _RaggedProduct(*given)
    sum_pairs = pairs if is_full else None  # the kernel of ours adds them to its products
    chosen = tiles.combine(like.dtype, columns, heads * selected // length, sum_pairs is not None)
    for first in range(0, batch, sequences):
        last = min(batch, first + sequences)
        pairs_of_chunk = (sum_pairs[0][:, first * selected :], sum_pairs[1]) if sum_pairs else (None, None)
        for first_column in range(0, width, columns):
            if multiply is None:
                part = weight[:, :, first_column : first_column + columns]
                out = products[:, : (last - first) * selected, : part.shape[2]]
                torch.bmm(values[:, first * selected : last * selected], part, out=out)
            else:
                multiply(first // sequences, first_column)
            launch(
                _combine_kernel,
                (length * (last - first), cdiv(columns, chosen["COLUMNS"])),
                products, rows.offsets, rows.entries, *pairs_of_chunk, addend, output, first, last - first,
                values.shape[1], capacity, bits_of(capacity), length, width, first_column, columns, *strides(output),
                *strides(output if addend is None else addend),
                HAS_ADDEND=addend is not None, PAIR=PAIR if sum_pairs else 0, **chosen,
            )  # fmt: skip
    return output


class _RaggedProduct:
    """Multiplies the rows of a chunk of sequences, any number of each head, with some columns of the weights."""

    def __init__(
        self,
        values: Tensor,
        weight: Tensor,
        rows: Rows,
        pairs: tuple[Tensor, Tensor] | None,
        products: Tensor,
        sequences: int,
    ) -> None:
        (_, capacity, self.columns), (_, inner, self.width) = products.shape, weight.shape
        is_transposed = weight.stride(2) != 1
        matrix = weight.mT if is_transposed else weight  # contiguous in its last dimension, if in any
        is_described = all(map(can_be_described, (values, matrix, products)))
        chosen = tiles.scattered(values.dtype, values.device, inner, self.width, capacity, is_described)
        programs, self.tile = chosen.pop("PROGRAMS"), chosen["COLUMNS"]
        lists, numbers, row_tiles = tiles_of(rows, sequences, chosen["ROWS"])
        most = row_tiles * cdiv(self.columns, self.tile)
        self.grid = (min(programs * multiprocessors(values.device), most),)
        operands = values, weight, products
        if is_described:
            block = [1, chosen["ROWS"], chosen["INNER"]]
            matrix_block = [1, self.tile, block[2]] if is_transposed else [1, block[2], self.tile]
            out_block = [1, block[1], min(self.tile, WIDEST_STORE)]
            blocks = zip((values, matrix, products), (block, matrix_block, out_block), strict=True)
            operands = [TensorDescriptor.from_tensor(*described) for described in blocks]
        self.before = *operands, *(pairs or (None, None)), lists, numbers
        self.behind = row_tiles, values.shape[1], self.width, capacity, self.columns, *weight.stride()
        is_whole = inner % chosen["INNER"] == self.width % self.columns == self.columns % self.tile == 0
        self.options = dict(
            D=inner, IS_DESCRIBED=is_described, IS_TRANSPOSED=is_transposed, IS_WHOLE=is_whole, INTERPRETED=INTERPRET,
            HAS_PAIRS=pairs is not None, PAIR=PAIR, WIDEST_STORE=WIDEST_STORE, **chosen,
        )  # fmt: skip

    def __call__(self, chunk: int, first_column: int) -> None:
        """Write the products of a chunk of sequences."""
        column_tiles = cdiv(min(self.columns, self.width - first_column), self.tile)
        launch(
            _scattered_kernel, self.grid, *self.before, chunk, first_column, column_tiles, *self.behind, **self.options
        )
