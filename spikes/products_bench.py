"""products_bench.py OUT.json: the products that a MoSA layer writes before it sums over heads, Gluon against cuBLAS.

dX also with the router's part inside the product, as one more short step of the sum over K, and the sum over heads that
follows without it. Runs on one Hopper GPU, for at most 150 s; needs Triton 3.6 and the repository that contains this
folder. Each part is a process with a limit of 60 s, whose lines of JSON are printed as they come; a table follows at
the end.

`products_bench.py OUT.json PART...` runs some parts only, `products_bench.py --hang` a small case under a watchdog that
prints where every role stands.
"""

# Calls of kernels take more than the kernels' own parameters, and Gluon's values have types that the checker misses.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

START, TOTAL_LIMIT, PART_LIMIT = time.time(), float(os.environ.get("PRODUCTS_LIMIT", "150")), float(os.environ.get("PRODUCTS_PART", "60"))
SHARED_BYTES = 232_448

# ---- the kernel ------------------------------------------------------------------------------------------------------

BOX_SIZE = 64
BOX = gl.constexpr(BOX_SIZE)  # rows of a tile, and its columns that are summed over in one step
RUN_SIZE = 32
PAIR_SIZE = 16
PAIR = gl.constexpr(PAIR_SIZE)  # columns of a pair: one more, short step of the sum
RUN = gl.constexpr(RUN_SIZE)  # columns of which a thread has 8 that are neighbours, if it stores them directly


@gluon.jit
def _range(TOTAL):
    """Return the first place of this program, and the first one of the next program."""
    i_program, number = gl.program_id(0), gl.num_programs(0)
    return i_program * TOTAL // number, (i_program + 1) * TOTAL // number


@gluon.jit
def _trace(p_trace, ROLE: gl.constexpr, place, point, TRACED: gl.constexpr):
    """Note where a role stands, for the watchdog."""
    if TRACED:
        gl.store(p_trace + gl.program_id(0) * 4 + ROLE, place * 16 + point)


@gluon.jit
def _unit(unit, E, COLUMN_TILES, HEADS_INNER: gl.constexpr):
    """Return the head and the tile of columns of a matrix."""
    if HEADS_INNER:
        return unit % E, unit // E
    else:
        return unit // COLUMN_TILES, unit % COLUMN_TILES


@gluon.jit
def _produce_values(
    values, pairs, boxes, pair_boxes, full, empty, p_trace, E, PAIRS, COLUMN_TILES, TOTAL,
    KB: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr, HEADS_INNER: gl.constexpr, HAS_PAIRS: gl.constexpr,
    TRACED: gl.constexpr,
):  # fmt: skip
    """Load the boxes of the rows: of 64 rows for the first consumer, then of 64 for the second.

    Pairs of numbers come with the last step of their rows. Their ring needs no barriers: a stage is free as soon as the
    stage of that step is, because the ring has at least as many tiles as that of the steps.
    """
    STEPS: gl.constexpr = 2 * KB // GROUP  # of a place
    TILE_STEPS: gl.constexpr = KB // GROUP
    PAIR_SLOTS: gl.constexpr = (SLOTS + TILE_STEPS - 1) // TILE_STEPS
    begin, end = _range(TOTAL)
    for place in range(begin, end):
        i_head, _ = _unit(place // PAIRS, E, COLUMN_TILES, HEADS_INNER)
        i_row = place % PAIRS * (2 * BOX)
        for i in gl.static_range(STEPS):
            number = (place - begin) * STEPS + i
            slot = number % SLOTS
            _trace(p_trace, 2, place, 1, TRACED)
            mbarrier.wait(empty.index(slot), (number // SLOTS & 1) ^ 1)
            _trace(p_trace, 2, place, 2, TRACED)
            if HAS_PAIRS and i % TILE_STEPS == TILE_STEPS - 1:
                mbarrier.expect(full.index(slot), (GROUP * BOX + PAIR) * BOX * 2)
                coordinates = [i_head, i_row + i // TILE_STEPS * BOX, 0]
                pair_slot = number // TILE_STEPS % PAIR_SLOTS
                tma.async_copy_global_to_shared(pairs, coordinates, full.index(slot), pair_boxes.index(pair_slot))
            else:
                mbarrier.expect(full.index(slot), GROUP * BOX * BOX * 2)
            for j in gl.static_range(GROUP):
                i_box = i * GROUP + j
                coordinates = [i_head, i_row + i_box // KB * BOX, i_box % KB * BOX]
                tma.async_copy_global_to_shared(values, coordinates, full.index(slot), boxes.index(slot * GROUP + j))
    _trace(p_trace, 2, end, 15, TRACED)


@gluon.jit
def _produce_weight(
    weight, pair_weight, boxes, pair_boxes, full, empty, p_trace, E, PAIRS, COLUMN_TILES, TOTAL, HEAD_RUNS,
    KB: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr,
    K_LAST: gl.constexpr, DIRECT: gl.constexpr, HEADS_INNER: gl.constexpr, HAS_PAIRS: gl.constexpr,
    TRACED: gl.constexpr,
):  # fmt: skip
    """Load the boxes of the matrices, of 64 rows and N columns each, and with the last one what pairs multiply."""
    STEPS: gl.constexpr = KB // GROUP
    PAIR_SLOTS: gl.constexpr = (SLOTS + STEPS - 1) // STEPS
    begin, end = _range(TOTAL)
    first = begin // PAIRS
    for unit in range(first, (end - 1) // PAIRS + 1):
        i_head, i_tile = _unit(unit, E, COLUMN_TILES, HEADS_INNER)
        for i in gl.static_range(STEPS):
            number = (unit - first) * STEPS + i
            slot = number % SLOTS
            _trace(p_trace, 3, unit, 1, TRACED)
            mbarrier.wait(empty.index(slot), (number // SLOTS & 1) ^ 1)
            _trace(p_trace, 3, unit, 2, TRACED)
            if HAS_PAIRS and i == STEPS - 1:
                mbarrier.expect(full.index(slot), (GROUP * BOX + PAIR) * N * 2)
                pair_box = pair_boxes.index((unit - first) % PAIR_SLOTS)
                if DIRECT:
                    coordinates = [i_head * HEAD_RUNS + i_tile * (N // RUN), 0, 0, 0, 0]
                    tma.async_copy_global_to_shared(pair_weight, coordinates, full.index(slot), pair_box)
                else:
                    tma.async_copy_global_to_shared(pair_weight, [i_head, i_tile * N, 0], full.index(slot), pair_box)
            else:
                mbarrier.expect(full.index(slot), GROUP * BOX * N * 2)
            for j in gl.static_range(GROUP):
                i_inner = (i * GROUP + j) * BOX
                box, barrier = boxes.index(slot * GROUP + j), full.index(slot)
                if DIRECT:
                    i_run = i_head * HEAD_RUNS + i_tile * (N // RUN)
                    tma.async_copy_global_to_shared(weight, [i_run, 0, 0, 0, i_inner], barrier, box)
                elif K_LAST:
                    tma.async_copy_global_to_shared(weight, [i_head, i_tile * N, i_inner], barrier, box)
                else:
                    tma.async_copy_global_to_shared(weight, [i_head, i_inner, i_tile * N], barrier, box)
    _trace(p_trace, 3, end, 15, TRACED)


@gluon.jit
def _halves(b):
    """Split [rows, columns] into its first and its last columns, in registers."""
    ROWS: gl.constexpr = b.shape[0]
    HALF: gl.constexpr = b.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(b, (ROWS, 2, HALF)), (0, 2, 1)))


@gluon.jit
def _piece(b, NUMBER: gl.constexpr, PIECES: gl.constexpr):
    """Return one of 1, 2 or 4 pieces of the columns."""
    if PIECES == 1:
        return b
    elif PIECES == 2:
        return _halves(b)[NUMBER]
    else:
        return _halves(_halves(b)[NUMBER // 2])[NUMBER % 2]


# Where the sums of a tile of 256 columns are, in the order of the products' columns.
DIRECT_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 256],
    )
)


@gluon.jit
def _store(b, p_tile, stride_r, CACHE: gl.constexpr):
    """Store a tile whose columns stand in the order in which the matrix was loaded, 16 bytes at a time.

    Two neighbouring columns of each of four groups of 8 columns are of the same thread; there stand 8 neighbours.
    """
    ROWS: gl.constexpr = b.shape[0]
    COLUMNS: gl.constexpr = b.shape[1]
    b = gl.permute(gl.reshape(b, (ROWS, COLUMNS // RUN, 4, 4, 2)), (0, 1, 3, 2, 4))
    b = gl.convert_layout(gl.reshape(b, (ROWS, COLUMNS)), DIRECT_LAYOUT, assert_trivial=True)
    i_row = gl.arange(0, ROWS, gl.SliceLayout(1, DIRECT_LAYOUT))
    i_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, DIRECT_LAYOUT))
    gl.store(p_tile + (i_row * stride_r)[:, None] + i_column[None, :], b, cache_modifier=CACHE)


@gluon.jit
def _consume(
    products, p_products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging, full_values, empty_values,
    full_weight, empty_weight, turn, p_trace, E, PAIRS, COLUMN_TILES, TOTAL, ROWS, stride_e, stride_r,
    CONSUMER: gl.constexpr, KB: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, PIECE: gl.constexpr,
    VALUE_SLOTS: gl.constexpr, WEIGHT_SLOTS: gl.constexpr, STORES: gl.constexpr,
    K_LAST: gl.constexpr, DIRECT: gl.constexpr, CACHE: gl.constexpr, HEADS_INNER: gl.constexpr,
    ORDERED: gl.constexpr, HAS_PAIRS: gl.constexpr, TRACED: gl.constexpr,
):  # fmt: skip
    """Multiply every other tile of 64 rows with the N columns at hand, and store it.

    The two consumers take turns with the tensor cores: one stores while the other multiplies.
    """
    PIECES: gl.constexpr = N // PIECE
    STEPS: gl.constexpr = KB // GROUP
    begin, end = _range(TOTAL)
    first = begin // PAIRS
    b = gl.zeros([BOX, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    for place in range(begin, end):
        unit = place // PAIRS
        count = place - begin
        if ORDERED:
            _trace(p_trace, CONSUMER, place, 1, TRACED)
            mbarrier.wait(turn.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))
        for i in gl.static_range(STEPS):
            number = (count * 2 + CONSUMER) * STEPS + i
            slot = number % VALUE_SLOTS
            weight_number = (unit - first) * STEPS + i
            weight_slot = weight_number % WEIGHT_SLOTS
            _trace(p_trace, CONSUMER, place, 2, TRACED)
            mbarrier.wait(full_weight.index(weight_slot), weight_number // WEIGHT_SLOTS & 1)
            _trace(p_trace, CONSUMER, place, 3, TRACED)
            mbarrier.wait(full_values.index(slot), number // VALUE_SLOTS & 1)
            for j in gl.static_range(GROUP):
                b_values = value_boxes.index(slot * GROUP + j).reshape([BOX, BOX])
                b_box = weight_boxes.index(weight_slot * GROUP + j)
                b_weight = b_box.reshape([N, BOX]).permute((1, 0)) if K_LAST else b_box.reshape([BOX, N])
                b = warpgroup_mma(b_values, b_weight, b, use_acc=i + j > 0, is_async=True)
            if i > 0:
                b = warpgroup_mma_wait(GROUP, deps=[b])
                mbarrier.arrive(empty_values.index((number - 1) % VALUE_SLOTS))
                if place % PAIRS == PAIRS - 1:
                    mbarrier.arrive(empty_weight.index((weight_number - 1) % WEIGHT_SLOTS))
        if HAS_PAIRS:  # they came with the last step, and are handed back with it
            PAIR_SLOTS: gl.constexpr = (VALUE_SLOTS + STEPS - 1) // STEPS
            PAIR_WEIGHT_SLOTS: gl.constexpr = (WEIGHT_SLOTS + STEPS - 1) // STEPS
            b_pairs = pair_boxes.index((count * 2 + CONSUMER) % PAIR_SLOTS).reshape([BOX, PAIR])
            b_pair_weight = pair_weight_boxes.index((unit - first) % PAIR_WEIGHT_SLOTS).reshape([N, PAIR])
            b = warpgroup_mma(b_pairs, b_pair_weight.permute((1, 0)), b, use_acc=True, is_async=True)
        if ORDERED:  # what the other consumer multiplies is queued behind the last products of this one
            mbarrier.arrive(turn.index(1 - CONSUMER))
        _trace(p_trace, CONSUMER, place, 4, TRACED)
        b = warpgroup_mma_wait(0, deps=[b])
        last = (count * 2 + CONSUMER) * STEPS + STEPS - 1
        mbarrier.arrive(empty_values.index(last % VALUE_SLOTS))
        if place % PAIRS == PAIRS - 1:
            last_weight = (unit - first) * STEPS + STEPS - 1
            mbarrier.arrive(empty_weight.index(last_weight % WEIGHT_SLOTS))
        i_head, i_tile = _unit(unit, E, COLUMN_TILES, HEADS_INNER)
        i_row = place % PAIRS * (2 * BOX) + CONSUMER * BOX
        if DIRECT:
            _trace(p_trace, CONSUMER, place, 5, TRACED)
            if i_row < ROWS:
                p_tile = p_products + i_head.to(gl.int64) * stride_e + i_tile * N
                _store(b.to(p_products.dtype.element_ty), p_tile + i_row * stride_r, stride_r, CACHE)
        else:
            for i in gl.static_range(PIECES):
                _trace(p_trace, CONSUMER, place, 5 + i, TRACED)
                b_staging = staging.index((count * PIECES + i) % STORES)
                tma.store_wait(STORES - 1)
                b_staging.reshape([BOX, PIECE]).store(_piece(b, i, PIECES).to(products.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(products, [i_head, i_row, i_tile * N + i * PIECE], b_staging)
    if not DIRECT:
        tma.store_wait(0)
    _trace(p_trace, CONSUMER, end, 15, TRACED)


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["E", "PAIRS", "COLUMN_TILES", "TOTAL", "HEAD_RUNS", "ROWS"])
def _products_kernel(
    values, weight, products, pairs, pair_weight, p_products, p_trace,
    E, PAIRS, COLUMN_TILES, TOTAL, HEAD_RUNS, ROWS, stride_e, stride_r,
    KB: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, PIECE: gl.constexpr,
    VALUE_SLOTS: gl.constexpr, WEIGHT_SLOTS: gl.constexpr, STORES: gl.constexpr,
    K_LAST: gl.constexpr, DIRECT: gl.constexpr, CACHE: gl.constexpr, HEADS_INNER: gl.constexpr,
    ORDERED: gl.constexpr, HAS_PAIRS: gl.constexpr, TRACED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write products[e, r, c] = values[e, r, :] @ weight[e, :, c], plus pairs[e, r, :] @ pair_weight[e, c, :].

    A place is a pair of tiles of 64 rows and N columns. Places lie in the order of columns, heads, and rows (or of
    heads, columns, and rows, unless HEADS_INNER), and each program takes a contiguous range of them.

    If DIRECT, products are stored from registers. The columns of the matrix are loaded in another order for that, which
    a descriptor can give only where K is contiguous.
    """
    TYPE: gl.constexpr = values.dtype
    value_boxes = gl.allocate_shared_memory(TYPE, [VALUE_SLOTS * GROUP, 1, BOX, BOX], values.layout)
    if DIRECT:
        weight_boxes = gl.allocate_shared_memory(TYPE, [WEIGHT_SLOTS * GROUP, N // RUN, 4, 4, 2, BOX], weight.layout)
        staging_0, staging_1 = value_boxes, value_boxes  # not used
    else:
        box: gl.constexpr = [WEIGHT_SLOTS * GROUP, 1, N, BOX] if K_LAST else [WEIGHT_SLOTS * GROUP, 1, BOX, N]
        weight_boxes = gl.allocate_shared_memory(TYPE, box, weight.layout)
        staging_0 = gl.allocate_shared_memory(TYPE, [STORES, 1, BOX, PIECE], products.layout)
        staging_1 = gl.allocate_shared_memory(TYPE, [STORES, 1, BOX, PIECE], products.layout)
    if HAS_PAIRS:
        STEPS: gl.constexpr = KB // GROUP
        PAIR_SLOTS: gl.constexpr = (VALUE_SLOTS + STEPS - 1) // STEPS
        PAIR_WEIGHT_SLOTS: gl.constexpr = (WEIGHT_SLOTS + STEPS - 1) // STEPS
        pair_boxes = gl.allocate_shared_memory(TYPE, [PAIR_SLOTS, 1, BOX, PAIR], pairs.layout)
        if DIRECT:
            shape: gl.constexpr = [PAIR_WEIGHT_SLOTS, N // RUN, 4, 4, 2, PAIR]
            pair_weight_boxes = gl.allocate_shared_memory(TYPE, shape, pair_weight.layout)
        else:
            pair_weight_boxes = gl.allocate_shared_memory(TYPE, [PAIR_WEIGHT_SLOTS, 1, N, PAIR], pair_weight.layout)
    else:
        pair_boxes, pair_weight_boxes = value_boxes, value_boxes  # not used
    full_values = _barriers(VALUE_SLOTS, 1)
    empty_values = _barriers(VALUE_SLOTS, 1)
    full_weight = _barriers(WEIGHT_SLOTS, 1)
    empty_weight = _barriers(WEIGHT_SLOTS, 2)
    turn = _barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (products, p_products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging_0,
                        full_values, empty_values, full_weight, empty_weight, turn, p_trace, E, PAIRS, COLUMN_TILES,
                        TOTAL, ROWS, stride_e, stride_r, gl.constexpr(0), KB, GROUP, N, PIECE, VALUE_SLOTS,
                        WEIGHT_SLOTS, STORES, K_LAST, DIRECT, CACHE, HEADS_INNER, ORDERED, HAS_PAIRS, TRACED)),
            (_consume, (products, p_products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging_1,
                        full_values, empty_values, full_weight, empty_weight, turn, p_trace, E, PAIRS, COLUMN_TILES,
                        TOTAL, ROWS, stride_e, stride_r, gl.constexpr(1), KB, GROUP, N, PIECE, VALUE_SLOTS,
                        WEIGHT_SLOTS, STORES, K_LAST, DIRECT, CACHE, HEADS_INNER, ORDERED, HAS_PAIRS, TRACED)),
            (_produce_values, (values, pairs, value_boxes, pair_boxes, full_values, empty_values, p_trace, E, PAIRS,
                               COLUMN_TILES, TOTAL, KB, GROUP, VALUE_SLOTS, HEADS_INNER, HAS_PAIRS, TRACED)),
            (_produce_weight, (weight, pair_weight, weight_boxes, pair_weight_boxes, full_weight, empty_weight, p_trace,
                               E, PAIRS, COLUMN_TILES, TOTAL, HEAD_RUNS, KB, GROUP, N, WEIGHT_SLOTS, K_LAST, DIRECT,
                               HEADS_INNER, HAS_PAIRS, TRACED)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---- end of the kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How the kernel is cut; sizes of rings are in steps of ``group`` boxes of 64 of the dimension summed over."""

    columns: int
    """Of a tile."""

    piece: int
    """Columns that are staged and stored at once."""

    values: int
    """Steps of rows [64, 64 group] in the ring, for both consumers together."""

    weight: int
    """Steps of the matrix [64 group, columns] in the ring."""

    stores: int
    """Pieces that each consumer has room for."""

    group: int = 1
    heads_inner: bool = True
    """Places lie in the order of columns, heads, rows; else of heads, columns, rows."""

    is_ordered: bool = True
    """Consumers take turns with the tensor cores."""

    is_direct: bool = False
    """Products are stored from registers, where K is contiguous; for whole tiles only."""

    cache: str = ""
    """The stores' modifier, if they are direct; .cs: what is stored leaves the second-level cache first."""

    programs: int = 132

    def shared(self, paired_boxes: int = 0) -> int:
        """Return the bytes of shared memory without the barriers; with pairs, if boxes of 64 summed over are given."""
        boxes = (self.values * BOX_SIZE + self.weight * self.columns) * self.group * BOX_SIZE
        if paired_boxes:
            steps = paired_boxes // self.group
            boxes += (-(-self.values // steps) * BOX_SIZE + -(-self.weight // steps) * self.columns) * PAIR_SIZE
        return 2 * (boxes + (0 if self.is_direct else 2 * self.stores * self.piece * BOX_SIZE))

    def check(self, boxes: int, has_pairs: bool) -> None:
        """Raise AssertionError if the kernel would hang, be wrong, or not fit, for so many boxes of 64."""
        steps, rest = divmod(boxes, self.group)
        assert rest == 0 and self.columns // self.piece in (1, 2, 4), self
        assert self.shared(boxes * has_pairs) < SHARED_BYTES - 600, self
        # A step of rows is handed back when the next one is on its way, one of the matrix after its last rows.
        assert self.values >= min(2, steps) and self.weight >= steps, self
        # Without turns a consumer may be a whole ring ahead of the other, and then takes an old phase for a new one,
        # unless each stage belongs to one of them.
        assert self.is_ordered or self.values % (2 * steps) == 0, self


DEFAULTS = {  # by boxes of 64 of the dimension summed over
    1: Options(256, 128, values=8, weight=2, stores=2),
    2: Options(256, 128, values=8, weight=3, stores=2),
    3: Options(256, 128, values=8, weight=3, stores=2),
    6: Options(128, 64, values=4, weight=4, stores=2, group=2),
}
DIRECT = {
    1: Options(256, 64, values=12, weight=4, stores=0, is_direct=True),
    3: Options(256, 64, values=12, weight=4, stores=0, is_direct=True),
    6: Options(256, 64, values=4, weight=6, stores=0, is_direct=True),
}
PAIRED = {  # with pairs, which take room
    3: Options(256, 128, values=6, weight=3, stores=2),
    6: Options(128, 64, values=6, weight=8, stores=2),
}
PAIRED_DIRECT = {
    3: Options(256, 64, values=9, weight=4, stores=0, is_direct=True),
    6: Options(256, 64, values=3, weight=6, stores=0, is_direct=True),
}
PAIRED_VARIANTS = {
    3: {
        "pairs, 16 KB staged": Options(256, 64, values=10, weight=3, stores=2),
        "stored directly, pairs, matrix 3 boxes": Options(256, 64, values=12, weight=3, stores=0, is_direct=True),
    },
    6: {"pairs, steps of 128": Options(128, 64, values=5, weight=3, stores=2, group=2)},
}
HAS_PAIRED_DIRECT = os.environ.get("PRODUCTS_PAIRED_DIRECT") != "0"
HAS_DIRECT = os.environ.get("PRODUCTS_DIRECT") != "0"  # what is stored directly was right
SWIZZLED = gl.NVMMASharedLayout(128, 16, 3)
PAIR_SWIZZLED = gl.NVMMASharedLayout(32, 16, 3)  # rows of 32 bytes


def reordered(matrix: Tensor, runs: int, columns: int, inner: int, box: int) -> TensorDescriptor:
    """Describe [columns, inner] in boxes of ``columns``, as products that are stored directly need it.

    Of each run of 32 columns: pairs of columns that are 2 apart come 8 apart, and those that are 8 apart 2.
    """
    shape, strides = [runs, 4, 4, 2, inner], [RUN_SIZE * inner, 2 * inner, 8 * inner, inner, 1]
    layout = gl.NVMMASharedLayout(2 * box, 16, 5)
    return TensorDescriptor(matrix, shape, strides, [columns // RUN_SIZE, 4, 4, 2, box], layout)


class Product:
    """products[e, r, c] = values[e, r, :] @ weight[e, :, c], in bf16 with fp32 sums.

    Args:
        values: [E, rows, K], K a multiple of 64 and contiguous.
        weight: [E, K, columns]; K or columns contiguous.
        products: [E, rows, columns], columns contiguous; nothing beyond is written.
        options: how the kernel is cut.
        pairs: [E, rows, 16] and [E, columns, 16], whose products are added; both contiguous in their last dimension.
    """

    def __init__(
        self,
        values: Tensor,
        weight: Tensor,
        products: Tensor,
        options: Options | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        heads, rows, inner = values.shape
        columns = weight.shape[2]
        boxes = inner // BOX_SIZE
        o = options or (PAIRED if pairs else DEFAULTS)[boxes]
        o.check(boxes, pairs is not None)
        is_k_last = weight.stride(1) == 1
        matrix = weight.mT if is_k_last else weight
        head_runs = weight.stride(0) // (RUN_SIZE * inner)
        if o.is_direct:
            assert is_k_last and weight.stride(2) == inner and weight.stride(0) % (RUN_SIZE * inner) == 0
            assert columns % o.columns == rows % BOX_SIZE == 0 and o.columns == 256
            runs = (heads - 1) * head_runs + columns // RUN_SIZE
            matrix_descriptor = reordered(matrix, runs, o.columns, inner, BOX_SIZE)
        else:
            block = [1, o.columns, BOX_SIZE] if is_k_last else [1, BOX_SIZE, o.columns]
            matrix_descriptor = TensorDescriptor.from_tensor(matrix, block, SWIZZLED)
        values_descriptor = TensorDescriptor.from_tensor(values, [1, BOX_SIZE, BOX_SIZE], SWIZZLED)
        products_descriptor = TensorDescriptor.from_tensor(products, [1, BOX_SIZE, o.piece], SWIZZLED)
        pair_descriptors = None, None
        if pairs:
            left, right = pairs
            if o.is_direct:
                assert right.stride() == (head_runs * RUN_SIZE * PAIR_SIZE, PAIR_SIZE, 1)
                right_descriptor = reordered(right, runs, o.columns, PAIR_SIZE, PAIR_SIZE)
            else:
                right_descriptor = TensorDescriptor.from_tensor(right, [1, o.columns, PAIR_SIZE], PAIR_SWIZZLED)
            left_descriptor = TensorDescriptor.from_tensor(left, [1, BOX_SIZE, PAIR_SIZE], PAIR_SWIZZLED)
            pair_descriptors = left_descriptor, right_descriptor
        self.tensors = values_descriptor, matrix_descriptor, products_descriptor, *pair_descriptors, products
        row_pairs, tiles = -(-rows // (2 * BOX_SIZE)), -(-columns // o.columns)
        total = heads * row_pairs * tiles
        self.grid = (min(o.programs, total),)
        self.sizes = heads, row_pairs, tiles, total, head_runs, rows, products.stride(0), products.stride(1)
        self.options = dict(
            KB=boxes, GROUP=o.group, N=o.columns, PIECE=o.piece, VALUE_SLOTS=o.values, WEIGHT_SLOTS=o.weight,
            STORES=o.stores, K_LAST=is_k_last, DIRECT=o.is_direct, CACHE=o.cache,
            HEADS_INNER=o.heads_inner, ORDERED=o.is_ordered, HAS_PAIRS=pairs is not None,
            CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24, num_warps=4,
        )  # fmt: skip

    def __call__(self, trace: Tensor | None = None) -> None:
        """Launch; ``trace`` is [programs, 4], int32, for the watchdog."""
        _products_kernel[self.grid](*self.tensors, trace, *self.sizes, TRACED=trace is not None, **self.options)

    def compile(self) -> None:
        """Compile for the same arguments, into Triton's cache."""
        _products_kernel.warmup(*self.tensors, None, *self.sizes, TRACED=False, grid=self.grid, **self.options)


# ---- parts -----------------------------------------------------------------------------------------------------------


def pair_matrix(router: Tensor) -> Tensor:
    """Return [E, h, 16]: the router [E, h] twice, for both halves of a number, and zeros."""
    out = router.new_zeros(*router.shape, PAIR_SIZE)
    out[..., :2] = router[..., None]
    return out


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def case(heads: int, rows: int, columns: int, inner: int, is_k_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, weight and a buffer of NaN: slices of larger tensors, as those of a chunk are."""
    g = torch.Generator("cuda").manual_seed(rows + columns + inner)
    whole = torch.randn(heads, rows + 192, inner, device="cuda", generator=g).bfloat16()
    shape = (heads, columns + 128, inner) if is_k_last else (heads, inner, columns + 128)
    weight = (torch.randn(shape, device="cuda", generator=g) * inner**-0.5).bfloat16()
    weight = weight.mT if is_k_last else weight
    buffer = torch.full((heads, rows + 64, columns + 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    return whole[:, 128 : 128 + rows], weight[:, :, 64 : 64 + columns], buffer


def right(is_k_last: bool, is_direct: bool = False) -> None:
    sizes = (64, 512), (128, 1024), (192, 576), (320, 1024), (512, 512), (512, 1024)
    for boxes, default in (DIRECT if is_direct else DEFAULTS).items():
        inner = boxes * BOX_SIZE
        for rows, columns in sizes:
            if is_direct and columns % default.columns:
                continue
            values, weight, buffer = case(5, rows, columns, inner, is_k_last)
            expected = values.float() @ weight.float()
            results, clean = [], True
            for programs in (132, 132, 3):
                buffer.fill_(float("nan"))
                out = buffer[:, :rows, :columns]
                Product(values, weight, out, replace(default, programs=programs))()
                torch.cuda.synchronize()
                results.append(out.clone())
                clean &= bool(buffer[:, rows:].isnan().all() and buffer[:, :, columns:].isnan().all())
            error = max(float((found.float() - expected).norm() / expected.norm()) for found in results)
            same = all(torch.equal(results[0], found) for found in results)
            # NaN compares false, so that it is never right
            say(name="right", K=inner, k_last=is_k_last, direct=is_direct, rows=rows, columns=columns, error=error,
                same=same, outside_untouched=clean, right=error < 4e-3 and same and clean)  # fmt: skip


def paired_case(heads: int, rows: int, columns: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return pairs [heads, rows, 16], the matrix of 16 rows that they multiply, and the product of both in fp32."""
    g = torch.Generator("cuda").manual_seed(rows * columns)
    whole = torch.zeros(heads, rows + 192, PAIR_SIZE, device="cuda", dtype=torch.bfloat16)
    whole[..., :2] = 4 * torch.randn(heads, rows + 192, 2, device="cuda", generator=g)
    router = torch.randn(heads, columns + 128, device="cuda", generator=g).bfloat16()
    pairs, matrix = whole[:, 128 : 128 + rows], pair_matrix(router)[:, 64 : 64 + columns]
    added = pairs[..., :2].float().sum(2, keepdim=True) * router[:, None, 64 : 64 + columns].float()
    return (pairs, matrix), added


def right_pairs(is_direct: bool) -> None:
    """As ``right``, with pairs that weigh more than the products to which they are added."""
    for boxes, default in (PAIRED_DIRECT if is_direct else PAIRED).items():
        inner = boxes * BOX_SIZE
        for rows, columns in (64, 512), (192, 576), (320, 1024), (512, 1024):
            if is_direct and columns % default.columns:
                continue
            values, weight, buffer = case(5, rows, columns, inner, True)
            pairs, added = paired_case(5, rows, columns)
            expected = values.float() @ weight.float() + added
            results, clean = [], True
            for programs in (132, 132, 3):
                buffer.fill_(float("nan"))
                out = buffer[:, :rows, :columns]
                Product(values, weight, out, replace(default, programs=programs), pairs)()
                torch.cuda.synchronize()
                results.append(out.clone())
                clean &= bool(buffer[:, rows:].isnan().all() and buffer[:, :, columns:].isnan().all())
            error = max(float((found.float() - expected).norm() / expected.norm()) for found in results)
            same = all(torch.equal(results[0], found) for found in results)
            say(name="right", K=inner, pairs=True, direct=is_direct, rows=rows, columns=columns, error=error,
                same=same, outside_untouched=clean, right=error < 4e-3 and same and clean)  # fmt: skip


def chunked(number: int, is_dx: bool) -> tuple[list[tuple[Tensor, Tensor, Tensor]], dict[str, float]]:
    """Return values, weight and products of each chunk, as ``scattered_product`` cuts them, and what all amount to."""
    from benchmarks.shapes import SHAPES
    from megatron_mosa.kernels.triton.scattered import chunks_of

    s = SHAPES[number - 1]
    inner = s.head_dim * (3 if is_dx else 1)
    like = torch.empty(1, 1, s.width, device="cuda", dtype=torch.bfloat16)
    sequences, columns = chunks_of((s.batch, s.heads, s.selected), like)
    rows = s.batch * s.selected
    values = torch.randn(s.heads, rows, inner, device="cuda", dtype=torch.bfloat16)
    shape = (s.heads, s.width, inner) if is_dx else (s.heads, inner, s.width)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * inner**-0.5
    weight = weight.mT if is_dx else weight
    products = values.new_empty(s.heads, sequences * s.selected, columns)
    chunks = []
    for first in range(0, s.batch, sequences):
        last = min(s.batch, first + sequences)
        for first_column in range(0, s.width, columns):
            part = weight[:, :, first_column : first_column + columns]
            out = products[:, : (last - first) * s.selected, : part.shape[2]]
            chunks.append((values[:, first * s.selected : last * s.selected], part, out))
    written = 2 * s.heads * rows * s.width
    loaded = 2 * sum(v.numel() + w.numel() for v, w, _ in chunks)
    return chunks, dict(gb_written=written / 1e9, gb_all=(written + loaded) / 1e9, flops=written * inner)


def timed(name: str, number: int, run: Callable[[], object], sums: dict[str, float], **more: object) -> None:
    from benchmarks.timing import measure

    m = measure(run, seconds=0.16, warmup=2)
    seconds = m.milliseconds / 1e3
    say(name=name, shape=number, ms=m.milliseconds, spread=m.spread, called_ms=m.called_milliseconds,
        tb_written=sums["gb_written"] / 1e3 / seconds, tb_all=sums["gb_all"] / 1e3 / seconds,
        tflops=sums["flops"] / 1e12 / seconds, **more)  # fmt: skip


def bmm(chunks: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for values, weight, out in chunks:
        torch.bmm(values, weight, out=out)


def gluon_of(
    chunks: list[tuple[Tensor, Tensor, Tensor]],
    options: Options | None = None,
    pairs: list[tuple[Tensor, Tensor]] | None = None,
) -> Callable[[], None]:
    sides = pairs or [None] * len(chunks)
    launches = [Product(*chunk, options, side) for chunk, side in zip(chunks, sides, strict=True)]

    def run() -> None:
        for launch in launches:
            launch()

    return run


def differs(chunks: list[tuple[Tensor, Tensor, Tensor]], run: Callable[[], None]) -> float:
    """Return the relative difference between bmm's and our last chunk, of every 13th head."""
    out = chunks[-1][2]
    bmm(chunks[-1:])
    expected = out[::13].float()
    out.fill_(float("nan"))
    run()
    return float((out[::13].float() - expected).norm() / expected.norm())


def times_pairs(*numbers: int) -> None:
    """Time dX with the pairs inside the products, and without them."""
    from benchmarks.shapes import SHAPES

    for number in numbers:
        s = SHAPES[number - 1]
        chunks, sums = chunked(number, True)
        rows = chunks[0][0].stride(0) // chunks[0][0].shape[2]
        pairs = torch.zeros(s.heads, rows, PAIR_SIZE, device="cuda", dtype=torch.bfloat16)
        pairs[..., 0].normal_()
        pairs[..., 1].normal_(std=2**-9)
        router = torch.randn(s.heads, s.width, device="cuda").mul_(s.width**-0.5).bfloat16()
        matrix = pair_matrix(router)
        # Chunks come sequence by sequence, and of each the columns.
        sides, first, first_column = [], 0, 0
        for values, part, _ in chunks:
            last_column = first_column + part.shape[2]
            sides.append((pairs[:, first : first + values.shape[1]], matrix[:, first_column:last_column]))
            first_column = last_column % s.width
            first += 0 if first_column else values.shape[1]
        assert (first, first_column) == (rows, 0)

        boxes = chunks[0][0].shape[2] // BOX_SIZE
        options = {"Gluon": (DEFAULTS[boxes], False), "Gluon, pairs": (PAIRED[boxes], True)}
        if HAS_DIRECT:
            options["Gluon, stored directly"] = DIRECT[boxes], False
        if HAS_PAIRED_DIRECT:
            options["Gluon, stored directly, pairs"] = PAIRED_DIRECT[boxes], True
        others = {f"Gluon, {kind}": (o, True) for kind, o in PAIRED_VARIANTS[boxes].items()}
        options |= {kind: job for kind, job in others.items() if HAS_PAIRED_DIRECT or not job[0].is_direct}
        ours = {kind: gluon_of(chunks, o, sides if has_pairs else None) for kind, (o, has_pairs) in options.items()}

        values, part, out = (tensor[::13].float() for tensor in chunks[-1])
        left, right_side = (tensor[::13].float() for tensor in sides[-1])
        without = values @ part
        expected = without + left @ right_side.mT
        difference = {}
        for kind, run in ours.items():
            chunks[-1][2].fill_(float("nan"))
            run()
            wanted = expected if options[kind][1] else without
            difference[kind] = float((chunks[-1][2][::13].float() - wanted).norm() / wanted.norm())
        del values, part, out, left, right_side, without, expected
        for _ in range(2):
            timed("dX bmm", number, lambda chunks=chunks: bmm(chunks), sums)
            for kind, run in ours.items():
                if kind not in others:
                    timed(f"dX {kind}", number, run, sums, differs=difference[kind])
        for kind, run in ours.items():
            if kind in others:
                timed(f"dX {kind}", number, run, sums, differs=difference[kind], variant=True)
        timed("dX router made a matrix of pairs", number, lambda router=router: pair_matrix(router), sums)
        del chunks, sides, ours, run, pairs, matrix
        torch.cuda.empty_cache()


def sums_over_heads(*numbers: int) -> None:
    """Time the package's sum over heads, with the router's part and without it."""
    from combine_bench import Sum

    from benchmarks.shapes import SHAPES
    from megatron_mosa.kernels.triton import tiles

    for number in numbers:
        for has_pairs in (False, True):
            one = Sum(SHAPES[number - 1], has_pairs)
            ms = one.time(tiles.combine(one.columns, one.each, has_pairs))
            say(name="sum with pairs" if has_pairs else "sum", shape=number, sum_ms=ms)
            del one
            torch.cuda.empty_cache()


def compile_some(first: int, number: int) -> None:
    """Compile every ``number``-th variant that the parts that come later need, from the ``first`` one on."""
    jobs = [(boxes, o, True) for boxes, options in PAIRED_VARIANTS.items() for o in options.values()]
    jobs += [(3, o, False) for o in VARIANTS["dX"].values()] + [(1, o, False) for o in VARIANTS["W_O"].values()]
    jobs += [(6, o, False) for o in WIDE["dX"].values()] + [(2, o, False) for o in WIDE["W_O"].values()]
    known = [*DEFAULTS.items(), *DIRECT.items()]  # those that are compiled to be checked
    for boxes, o, has_pairs in [job for job in jobs if job[:2] not in known][first::number]:
        values, weight, buffer = case(3, 256, 1024, boxes * BOX_SIZE, boxes in (3, 6) or o.is_direct)
        pairs = paired_case(3, 256, 1024)[0] if has_pairs else None
        Product(values, weight, buffer[:, :256, :1024], o, pairs).compile()


def times(*numbers: int) -> None:
    for number in numbers:
        for name in ("W_O", "dX"):
            chunks, sums = chunked(number, name == "dX")
            ours = {"Gluon": gluon_of(chunks)}
            if name == "dX" and HAS_DIRECT:
                ours["Gluon, stored directly"] = gluon_of(chunks, DIRECT[chunks[0][0].shape[2] // BOX_SIZE])
            difference = {kind: differs(chunks, run) for kind, run in ours.items()}

            def fill(chunks: list[tuple[Tensor, Tensor, Tensor]] = chunks) -> None:
                for _, _, out in chunks:
                    out.zero_()

            for _ in range(2):
                timed(f"{name} bmm", number, lambda chunks=chunks: bmm(chunks), sums)
                for kind, run in ours.items():
                    timed(f"{name} {kind}", number, run, sums, differs=difference[kind])
            timed(f"{name} zeros written", number, fill, sums)
            del chunks, ours, run, fill
            torch.cuda.empty_cache()


VARIANTS = {
    "W_O": {
        "as it is": DEFAULTS[1],
        "64 KB staged": replace(DEFAULTS[1], values=4, stores=4),
        "stored whole": replace(DEFAULTS[1], piece=256, stores=1),
        "pieces of 64": replace(DEFAULTS[1], piece=64, stores=4),
        "128 columns": Options(128, 128, values=8, weight=4, stores=2),
        "columns before heads": replace(DEFAULTS[1], heads_inner=False),
        "no turns": replace(DEFAULTS[1], is_ordered=False),
        "stored directly, K contiguous": DIRECT[1],
    },
    "dX": {
        "as it is": DEFAULTS[3],
        "steps of 192": replace(DEFAULTS[3], values=2, weight=1, group=3),
        "3 tiles of rows": Options(256, 64, values=3, weight=1, stores=3, group=3),
        "matrix 4 boxes, 16 KB staged": Options(256, 64, values=8, weight=4, stores=2),
        "128 columns": Options(128, 128, values=9, weight=6, stores=1),
        "columns before heads": replace(DEFAULTS[3], heads_inner=False),
        "no turns": replace(DEFAULTS[3], values=6, is_ordered=False),
        "stored directly": DIRECT[3],
        "stored directly, matrix twice": replace(DIRECT[3], values=4, weight=6),
        "stored directly, .cs": replace(DIRECT[3], cache=".cs"),
    },
}  # fmt: skip
WIDE = {  # of shape 6: 128 and 384
    "W_O": {"as it is": DEFAULTS[2], "steps of 128": Options(256, 128, values=4, weight=1, stores=2, group=2)},
    "dX": {
        "as it is": DEFAULTS[6],
        "steps of 64": Options(128, 128, values=12, weight=6, stores=1),
        "steps of 192": Options(128, 64, values=4, weight=2, stores=2, group=3),
        "columns before heads": replace(DEFAULTS[6], heads_inner=False),
        "stored directly": DIRECT[6],
        "stored directly, .cs": replace(DIRECT[6], cache=".cs"),
    },
}


def variants(number: int) -> None:
    for name, all_options in (WIDE if number == 6 else VARIANTS).items():
        chunks, sums = chunked(number, name == "dX")
        for kind, options in all_options.items():
            if options.is_direct and not HAS_DIRECT:
                continue
            if options.is_direct and name == "W_O":  # as if the layer kept this matrix transposed
                run = gluon_of([(v, w.mT.contiguous().mT, out) for v, w, out in chunks], options)
            else:
                run = gluon_of(chunks, options)
            difference = differs(chunks, run)
            timed(f"{name} {kind}", number, run, sums, differs=difference, variant=True, shared=options.shared())
            del run
        timed(f"{name} bmm", number, lambda chunks=chunks: bmm(chunks), sums, variant=True)
        del chunks
        torch.cuda.empty_cache()


WAITS = {
    0: {1: "its turn", 2: "the matrix", 3: "rows", 4: "its products"} | {5 + i: f"room of piece {i}" for i in range(4)},
    2: {1: "an empty stage of rows", 2: "nothing: copies rows"},
    3: {1: "an empty stage of the matrix", 2: "nothing: copies the matrix"},
}  # fmt: skip
WAITS[1] = WAITS[0]
ROLES = "consumer 0", "consumer 1", "rows", "matrix"


def hang() -> None:
    """Run small cases, and print each second where their roles stand, until they end or 8 s are over."""
    cases = (192, False, 3), (64, False, 3), (384, False, 3), (192, True, 3), (384, True, 3), (192, False, 132)
    paired_cases = (192, False, 3), (384, False, 3), (192, True, 3), (384, True, 3)
    all_cases = [(*one, False) for one in cases] + [(*one, True) for one in paired_cases]
    for inner, is_direct, programs, has_pairs in all_cases:
        say(name="begins", K=inner, direct=is_direct, programs=programs, pairs=has_pairs)
        is_k_last = inner != 64
        values, weight, buffer = case(5, 512, 1024, inner, is_k_last)
        if has_pairs:
            options, pairs = (PAIRED_DIRECT if is_direct else PAIRED), paired_case(5, 512, 1024)[0]
        else:
            options, pairs = (DIRECT if is_direct else DEFAULTS), None
        chosen = replace(options[inner // BOX_SIZE], programs=programs)
        product = Product(values, weight, buffer[:, :512, :1024], chosen, pairs)
        trace = torch.zeros(product.grid[0], 4, device="cuda", dtype=torch.int32)
        seen = torch.zeros(trace.shape, dtype=torch.int32).pin_memory()
        side, end = torch.cuda.Stream(), torch.cuda.Event()
        seen.copy_(trace, non_blocking=True)
        torch.cuda.synchronize()
        product(trace)
        end.record()
        for second in range(9):
            time.sleep(1.0 if second else 0.2)
            with torch.cuda.stream(side):
                seen.copy_(trace, non_blocking=True)
            side.synchronize()
            if end.query():
                say(name="ended", K=inner, direct=is_direct, programs=programs)
                break
            for program in sorted({0, 1, product.grid[0] - 1}):
                for role, word in enumerate(seen[program].tolist()):
                    place, point = divmod(word, 16)
                    waits = "ended" if point == 15 else "waits for " + WAITS[role].get(point, "nothing: not begun")
                    where = dict(program=program, role=ROLES[role], place=place, state=waits)
                    say(name="stands", K=inner, second=second, **where)
        else:
            say(name="hangs", K=inner, direct=is_direct, programs=programs)
            os._exit(3)


PARTS = {
    "right_k_last": lambda: right(True), "right_columns_last": lambda: right(False),
    "right_direct": lambda: right(True, True), "right_pairs": lambda: right_pairs(False),
    "right_pairs_direct": lambda: right_pairs(True),
    "compile0": lambda: compile_some(0, 4), "compile1": lambda: compile_some(1, 4),
    "compile2": lambda: compile_some(2, 4), "compile3": lambda: compile_some(3, 4),
    "times5": lambda: times(5), "times2": lambda: times(2), "variants5": lambda: variants(5),
    "times6": lambda: times(6), "times_pairs52": lambda: times_pairs(5, 2), "sums": lambda: sums_over_heads(5, 6, 2, 1),
    "times_pairs16": lambda: times_pairs(1, 6), "variants2": lambda: variants(2), "times4": lambda: times(4),
    "times13": lambda: times(1, 3), "variants6": lambda: variants(6), "times_pairs34": lambda: times_pairs(3, 4),
    "hang": hang,
}  # fmt: skip
FIRST = [part for part in PARTS if part.startswith(("right", "compile"))]
GROUPS = FIRST, *([part] for part in PARTS if part.startswith(("times", "variants", "sums")))

# ---- the parent ------------------------------------------------------------------------------------------------------


class Running:
    """A part in a process of its own, whose lines are printed and kept as they come."""

    def __init__(self, part: str) -> None:
        self.part, self.lines, self.rest = part, [], []
        environment = os.environ | {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "/tmp/products_bench_cache")}
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--part", part], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith('{"name"'):
                self.lines.append(json.loads(line))
                print(self.part, line, end="", flush=True)
            else:
                self.rest.append(line.rstrip()[:300])

    def wait(self, until: float) -> dict[str, object]:
        """Return what came of it; it is killed at a time."""
        try:
            rc: int | str = self.process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            rc = "ended at its limit"
            print(f"{self.part} was ended at its limit", flush=True)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                rc = "cannot be ended"
        self.reader.join(2)
        tail = [] if rc == 0 else self.rest[-12:]
        print(f"{self.part}: rc {rc} at {time.time() - START:.0f} s", *tail, sep="\n    ", flush=True)
        return dict(rc=rc, lines=self.lines, tail=tail)


def table(found: dict[str, dict]) -> None:
    """Print what was right, and of repeated measurements the faster one."""
    lines = [line for part in found.values() for line in part["lines"]]
    checked = [line for line in lines if line["name"] == "right"]
    wrong = [line for line in checked if not line["right"]]
    worst = max((line["error"] for line in checked), default=0.0)
    print(f"\nright: {len(checked) - len(wrong)} of {len(checked)}; worst error {worst:.1e}")
    for line in wrong:
        print("   WRONG", line)
    print("shape what                                       ms  spread TB/s written    all  TFLOP/s  differs")
    best: dict[tuple, dict] = {}
    for line in lines:
        if "ms" in line:
            key = bool(line.get("variant")), line["shape"], line["name"]
            if key not in best or line["ms"] < best[key]["ms"]:
                best[key] = line
    for (is_variant, shape, name), line in best.items():
        difference = f"{line['differs']:.1e}" if "differs" in line else ""
        speed = f"{line['tb_written']:12.2f} {line['tb_all']:6.2f} {line['tflops']:8.0f}"
        label = "  " * is_variant + name
        print(f"{shape:5} {label:36} {line['ms']:8.3f} {line['spread']:7.3f} {speed} {difference:>8}")
    products = {(shape, name): line["ms"] for (is_variant, shape, name), line in best.items() if not is_variant}
    sums = {(line["shape"], line["name"]): line["sum_ms"] for line in lines if "sum_ms" in line}
    if sums:
        print("shape dX, pairs in the sum: product     sum     all   pairs in the product: product     sum     all")
    for shape in sorted({shape for shape, _ in sums}):
        for inside, today in ("Gluon, pairs", "bmm"), ("Gluon, pairs", "Gluon"), (*["Gluon, stored directly"] * 2,):
            inside = inside if inside.endswith("pairs") else f"{inside}, pairs"
            keys = (shape, f"dX {today}"), (shape, f"dX {inside}")
            both = (shape, "sum with pairs"), (shape, "sum")
            if all(key in products for key in keys) and all(key in sums for key in both):
                a, b, c, d = products[keys[0]], sums[both[0]], products[keys[1]], sums[both[1]]
                print(f"{shape:5} {today:24} {a:9.3f}{b:8.3f}{a + b:8.3f}   {inside:29} {c:6.3f}{d:8.3f}{c + d:8.3f}")
    for part, result in found.items():
        if result["rc"] != 0:
            print(f"{part}: rc {result['rc']}")
    print(f"{time.time() - START:.0f} s", flush=True)


def is_right(found: dict[str, dict], part: str) -> bool:
    """Return False if a part has run and something of it was wrong."""
    result = found.get(part)
    return result is None or (result["rc"] == 0 and all(line["right"] for line in result["lines"]))


def main() -> None:
    if sys.argv[1] == "--part":
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.no_grad():
            PARTS[sys.argv[2]]()
        return
    out, chosen = (None, ["hang"]) if sys.argv[1] == "--hang" else (sys.argv[1], sys.argv[2:])
    found: dict[str, dict] = {}
    for group in [[part] for part in chosen] or GROUPS:
        if not chosen and "pairs" in group[0] and not is_right(found, "right_pairs"):
            print("not right with pairs: without", *group, flush=True)
            continue
        left = START + TOTAL_LIMIT - time.time()
        if left < 8:
            print("no time left for", *group, flush=True)
            continue
        until = time.time() + min(PART_LIMIT, left - 2)
        for running in [Running(part) for part in group]:
            found[running.part] = running.wait(until)
        if out:
            found["options"] = dict(rc=0, lines=[], tail=[], defaults={k: asdict(o) for k, o in DEFAULTS.items()})
            Path(out).write_text(json.dumps(found, indent=1))
        if not is_right(found, "right_direct"):
            os.environ["PRODUCTS_DIRECT"] = "0"
        if not is_right(found, "right_pairs_direct"):
            os.environ["PRODUCTS_PAIRED_DIRECT"] = "0"
        if not chosen and group is FIRST and any(found[part]["rc"] != 0 for part in group[:2]):
            # Times of a kernel that hangs or fails would cost a minute each.
            found["hang"] = Running("hang").wait(time.time() + 40)
            break
    if out:
        Path(out).write_text(json.dumps(found, indent=1))
    table(found)


if __name__ == "__main__":
    main()
