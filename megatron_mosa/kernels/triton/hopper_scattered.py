"""Products of ragged rows, before they are summed over heads, for Hopper in Gluon.

Such products take as long as writing them does. So programs are persistent: one warp loads rows, another matrices,
by tensor descriptors into rings of stages, and two warp groups, the consumers, take turns, one storing while the other
multiplies. A matrix is loaded once for all rows that a program multiplies with it.

``specialized`` decides who comes here.
"""

# Calls of kernels take more than the kernels' own parameters, and Gluon's values have types that the checker misses.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

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

from megatron_mosa.kernels.triton.common import cdiv, launch, multiprocessors
from megatron_mosa.kernels.triton.gathered import PAIR as PAIR_SIZE
from megatron_mosa.kernels.triton.hopper_parts import barriers, halves
from megatron_mosa.kernels.triton.rows import Rows, tiles_of

BOX_SIZE = 64
BOX = gl.constexpr(BOX_SIZE)  # rows of a consumer's half of a tile, and columns that are summed over in one box
PAIR = gl.constexpr(PAIR_SIZE)  # one more, short step of the sum
TILE_ROWS = 2 * BOX_SIZE
# COLUMNS of a tile; steps of GROUP boxes, and how many of them the rings hold: of rows, for both consumers together,
# and of matrices. By boxes of the dimension that is summed over, and whether pairs are added, which need room.
CUT = {
    (1, False): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=8, WEIGHT_SLOTS=2),
    (2, False): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=8, WEIGHT_SLOTS=3),
    (3, True): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=6, WEIGHT_SLOTS=3),
    (6, True): dict(COLUMNS=128, GROUP=2, VALUE_SLOTS=5, WEIGHT_SLOTS=3),
}
# Registers of a thread; the sums of a consumer take up to 128.
REGISTERS = dict(CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24)


@gluon.jit
def _range(total):
    """Return the first place of this program, and the first one of the next program."""
    i_program, number = gl.program_id(0), gl.num_programs(0)
    return i_program * total // number, (i_program + 1) * total // number


@gluon.jit
def _produce_values(
    values, pairs, boxes, pair_boxes, full, empty, p_tiles, number, COLUMN_TILES, TILES,
    BOXES: gl.constexpr, GROUP: gl.constexpr, SLOTS: gl.constexpr, HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    """Load the boxes of the rows: of 64 rows for the first consumer, then of 64 for the second.

    Pairs come with the last step of their rows. Their ring needs no barriers: a stage is free as soon as the stage of
    that step is, because the ring has at least as many tiles as that of the steps.
    """
    STEPS: gl.constexpr = 2 * BOXES // GROUP  # of a place
    TILE_STEPS: gl.constexpr = BOXES // GROUP
    PAIR_SLOTS: gl.constexpr = (SLOTS + TILE_STEPS - 1) // TILE_STEPS
    begin, end = _range(number * COLUMN_TILES)
    p_next = p_tiles + begin % gl.maximum(number, 1)
    next_head, next_row = gl.load(p_next), gl.load(p_next + TILES)
    for place in range(begin, end):
        i_head, i_row = next_head, next_row
        p_next = p_tiles + (place + 1) % number  # in flight while this tile is loaded
        next_head, next_row = gl.load(p_next), gl.load(p_next + TILES)
        for i in gl.static_range(STEPS):
            step = (place - begin) * STEPS + i
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
            if HAS_PAIRS and i % TILE_STEPS == TILE_STEPS - 1:
                mbarrier.expect(full.index(slot), (GROUP * BOX + PAIR) * BOX * 2)
                coordinates = [i_head, i_row + i // TILE_STEPS * BOX, 0]
                pair_slot = step // TILE_STEPS % PAIR_SLOTS
                tma.async_copy_global_to_shared(pairs, coordinates, full.index(slot), pair_boxes.index(pair_slot))
            else:
                mbarrier.expect(full.index(slot), GROUP * BOX * BOX * 2)
            for j in gl.static_range(GROUP):
                i_box = i * GROUP + j
                coordinates = [i_head, i_row + i_box // BOXES * BOX, i_box % BOXES * BOX]
                tma.async_copy_global_to_shared(values, coordinates, full.index(slot), boxes.index(slot * GROUP + j))


@gluon.jit
def _produce_weight(
    weight, pair_weight, boxes, pair_boxes, full, empty, p_tiles, number, FIRST_COLUMN, COLUMN_TILES,
    BOXES: gl.constexpr, GROUP: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, IS_TRANSPOSED: gl.constexpr,
    HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    """Load the boxes of the matrices, of 64 rows and COLUMNS each, and with the last one what pairs multiply."""
    STEPS: gl.constexpr = BOXES // GROUP
    PAIR_SLOTS: gl.constexpr = (SLOTS + STEPS - 1) // STEPS
    begin, end = _range(number * COLUMN_TILES)
    i_matrix = 0
    next_head = gl.load(p_tiles + begin % gl.maximum(number, 1))
    next_before = -1
    for place in range(begin, end):
        i_head, i_before = next_head, next_before
        p_next = p_tiles + (place + 1) % number
        next_head = gl.load(p_next)
        next_before = gl.load(p_tiles + place % number)
        is_new = (i_head != i_before) | (place % number == 0)
        if is_new:
            i_column = FIRST_COLUMN + place // number * COLUMNS
            for i in gl.static_range(STEPS):
                step = i_matrix * STEPS + i
                slot = step % SLOTS
                mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
                if HAS_PAIRS and i == STEPS - 1:
                    mbarrier.expect(full.index(slot), (GROUP * BOX + PAIR) * COLUMNS * 2)
                    pair_box = pair_boxes.index(i_matrix % PAIR_SLOTS)
                    tma.async_copy_global_to_shared(pair_weight, [i_head, i_column, 0], full.index(slot), pair_box)
                else:
                    mbarrier.expect(full.index(slot), GROUP * BOX * COLUMNS * 2)
                for j in gl.static_range(GROUP):
                    i_inner = (i * GROUP + j) * BOX
                    box, barrier = boxes.index(slot * GROUP + j), full.index(slot)
                    if IS_TRANSPOSED:
                        tma.async_copy_global_to_shared(weight, [i_head, i_column, i_inner], barrier, box)
                    else:
                        tma.async_copy_global_to_shared(weight, [i_head, i_inner, i_column], barrier, box)
        i_matrix = gl.where(is_new, i_matrix + 1, i_matrix)


@gluon.jit
def _store(b, products, staging, i_head, i_row, i_column):
    """Store a tile in two pieces, each as soon as the last one that was staged in its place has been read."""
    HALF: gl.constexpr = b.shape[1] // 2
    pieces = halves(b)
    for i in gl.static_range(2):
        tma.store_wait(1)
        staging.index(i).reshape([BOX, HALF]).store(pieces[i].to(products.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(products, [i_head, i_row, i_column + i * HALF], staging.index(i))


@gluon.jit
def _consume(
    products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging, full_values, empty_values,
    full_weight, empty_weight, turn, p_tiles, number, COLUMN_TILES, TILES,
    CONSUMER: gl.constexpr, BOXES: gl.constexpr, GROUP: gl.constexpr, COLUMNS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
    WEIGHT_SLOTS: gl.constexpr, IS_TRANSPOSED: gl.constexpr, HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of each tile with COLUMNS of the matrix at hand, and store them.

    The consumers take turns with the tensor cores. A matrix's boxes are handed back with the last tile that is
    multiplied by it.
    """
    STEPS: gl.constexpr = BOXES // GROUP
    PAIR_SLOTS: gl.constexpr = (VALUE_SLOTS + STEPS - 1) // STEPS
    PAIR_WEIGHT_SLOTS: gl.constexpr = (WEIGHT_SLOTS + STEPS - 1) // STEPS
    begin, end = _range(number * COLUMN_TILES)
    i_matrix = 0
    p_next = p_tiles + begin % gl.maximum(number, 1)
    next_head, next_product, next_rows = gl.load(p_next), gl.load(p_next + 2 * TILES), gl.load(p_next + 3 * TILES)
    b = gl.zeros([BOX, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    for place in range(begin, end):
        i_turn = place - begin
        i_head, i_product, rows = next_head, next_product, next_rows
        p_next = p_tiles + (place + 1) % number
        next_head, next_product, next_rows = gl.load(p_next), gl.load(p_next + 2 * TILES), gl.load(p_next + 3 * TILES)
        is_last = (next_head != i_head) | (place % number == number - 1)
        mbarrier.wait(turn.index(CONSUMER), (i_turn & 1) ^ (1 - CONSUMER))
        for i in gl.static_range(STEPS):
            step = (i_turn * 2 + CONSUMER) * STEPS + i
            slot = step % VALUE_SLOTS
            weight_step = i_matrix * STEPS + i
            weight_slot = weight_step % WEIGHT_SLOTS
            mbarrier.wait(full_weight.index(weight_slot), weight_step // WEIGHT_SLOTS & 1)
            mbarrier.wait(full_values.index(slot), step // VALUE_SLOTS & 1)
            for j in gl.static_range(GROUP):
                b_values = value_boxes.index(slot * GROUP + j).reshape([BOX, BOX])
                b_box = weight_boxes.index(weight_slot * GROUP + j)
                if IS_TRANSPOSED:
                    b_weight = b_box.reshape([COLUMNS, BOX]).permute((1, 0))
                else:
                    b_weight = b_box.reshape([BOX, COLUMNS])
                b = warpgroup_mma(b_values, b_weight, b, use_acc=i + j > 0, is_async=True)
            if i > 0:
                b = warpgroup_mma_wait(GROUP, deps=[b])
                mbarrier.arrive(empty_values.index((step - 1) % VALUE_SLOTS))
                mbarrier.arrive(empty_weight.index((weight_step - 1) % WEIGHT_SLOTS), pred=is_last)
        if HAS_PAIRS:  # they came with the last step, and are handed back with it
            b_pairs = pair_boxes.index((i_turn * 2 + CONSUMER) % PAIR_SLOTS).reshape([BOX, PAIR])
            b_pair_weight = pair_weight_boxes.index(i_matrix % PAIR_WEIGHT_SLOTS).reshape([COLUMNS, PAIR])
            b = warpgroup_mma(b_pairs, b_pair_weight.permute((1, 0)), b, use_acc=True, is_async=True)
        mbarrier.arrive(turn.index(1 - CONSUMER))  # its products are queued behind these
        b = warpgroup_mma_wait(0, deps=[b])
        mbarrier.arrive(empty_values.index(((i_turn * 2 + CONSUMER) * STEPS + STEPS - 1) % VALUE_SLOTS))
        mbarrier.arrive(empty_weight.index((i_matrix * STEPS + STEPS - 1) % WEIGHT_SLOTS), pred=is_last)
        if rows > CONSUMER * BOX:
            i_column, i_row = place // number * COLUMNS, i_product + CONSUMER * BOX
            _store(b, products, staging, i_head, i_row, i_column)
        i_matrix = gl.where(is_last, i_matrix + 1, i_matrix)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["I_CHUNK", "FIRST_COLUMN", "COLUMN_TILES", "TILES"])
def _ragged_kernel(
    values, weight, products, pairs, pair_weight, p_tiles, p_number, I_CHUNK, FIRST_COLUMN, COLUMN_TILES, TILES,
    BOXES: gl.constexpr, GROUP: gl.constexpr, COLUMNS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
    WEIGHT_SLOTS: gl.constexpr, IS_TRANSPOSED: gl.constexpr, HAS_PAIRS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write values[e, r, :] @ weight[e, :, c], plus pairs[e, r, :] @ pair_weight[e, c, :], of the rows of a chunk.

    A place is a tile of 128 rows by COLUMNS. Places lie in the order of columns and of the list of tiles, in which
    those of a head are neighbours, and each program takes a contiguous range of them.
    """
    TYPE: gl.constexpr = values.dtype
    STEPS: gl.constexpr = BOXES // GROUP
    number = gl.load(p_number + I_CHUNK)
    p_tiles += I_CHUNK * 4 * TILES
    value_boxes = gl.allocate_shared_memory(TYPE, [VALUE_SLOTS * GROUP, 1, BOX, BOX], values.layout)
    FIRST: gl.constexpr = COLUMNS if IS_TRANSPOSED else BOX
    LAST: gl.constexpr = BOX if IS_TRANSPOSED else COLUMNS
    weight_boxes = gl.allocate_shared_memory(TYPE, [WEIGHT_SLOTS * GROUP, 1, FIRST, LAST], weight.layout)
    staging_0 = gl.allocate_shared_memory(TYPE, [2, 1, BOX, COLUMNS // 2], products.layout)
    staging_1 = gl.allocate_shared_memory(TYPE, [2, 1, BOX, COLUMNS // 2], products.layout)
    if HAS_PAIRS:
        PAIR_SLOTS: gl.constexpr = (VALUE_SLOTS + STEPS - 1) // STEPS
        PAIR_WEIGHT_SLOTS: gl.constexpr = (WEIGHT_SLOTS + STEPS - 1) // STEPS
        pair_boxes = gl.allocate_shared_memory(TYPE, [PAIR_SLOTS, 1, BOX, PAIR], pairs.layout)
        pair_weight_boxes = gl.allocate_shared_memory(TYPE, [PAIR_WEIGHT_SLOTS, 1, COLUMNS, PAIR], pair_weight.layout)
    else:
        pair_boxes, pair_weight_boxes = value_boxes, value_boxes  # not used
    full_values = barriers(VALUE_SLOTS, 1)
    empty_values = barriers(VALUE_SLOTS, 1)
    full_weight = barriers(WEIGHT_SLOTS, 1)
    empty_weight = barriers(WEIGHT_SLOTS, 2)
    turn = barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging_0, full_values,
                        empty_values, full_weight, empty_weight, turn, p_tiles, number, COLUMN_TILES, TILES,
                        gl.constexpr(0), BOXES, GROUP, COLUMNS, VALUE_SLOTS, WEIGHT_SLOTS, IS_TRANSPOSED, HAS_PAIRS)),
            (_consume, (products, value_boxes, weight_boxes, pair_boxes, pair_weight_boxes, staging_1, full_values,
                        empty_values, full_weight, empty_weight, turn, p_tiles, number, COLUMN_TILES, TILES,
                        gl.constexpr(1), BOXES, GROUP, COLUMNS, VALUE_SLOTS, WEIGHT_SLOTS, IS_TRANSPOSED, HAS_PAIRS)),
            (_produce_values, (values, pairs, value_boxes, pair_boxes, full_values, empty_values, p_tiles, number,
                               COLUMN_TILES, TILES, BOXES, GROUP, VALUE_SLOTS, HAS_PAIRS)),
            (_produce_weight, (weight, pair_weight, weight_boxes, pair_weight_boxes, full_weight, empty_weight, p_tiles,
                               number, FIRST_COLUMN, COLUMN_TILES, BOXES, GROUP, COLUMNS, WEIGHT_SLOTS,
                               IS_TRANSPOSED, HAS_PAIRS)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


class RaggedProduct:
    """Multiplies the rows of a chunk of sequences; see ``specialized.ragged_product``."""

    def __init__(
        self,
        values: Tensor,
        weight: Tensor,
        rows: Rows,
        pairs: tuple[Tensor, Tensor] | None,
        products: Tensor,
        sequences: int,
    ) -> None:
        heads, capacity, self.columns = products.shape
        inner, self.width = weight.shape[1:]
        cut = CUT[inner // BOX_SIZE, pairs is not None]
        self.tile = cut["COLUMNS"]
        lists, numbers, most = tiles_of(rows, sequences, TILE_ROWS)
        self.grid = (min(multiprocessors(values.device), most * cdiv(self.columns, self.tile)),)
        is_transposed = weight.stride(1) == 1
        matrix_box = [1, self.tile, BOX_SIZE] if is_transposed else [1, BOX_SIZE, self.tile]
        self.before = (
            _described(values, [1, BOX_SIZE, BOX_SIZE]),
            _described(weight.mT if is_transposed else weight, matrix_box),
            _described(products, [1, BOX_SIZE, self.tile // 2]),
            *((None, None) if pairs is None else _described_pairs(*pairs, self.tile)),
            lists,
            numbers,
        )
        self.most = most
        self.options = cut | REGISTERS
        self.options |= dict(BOXES=inner // BOX_SIZE, IS_TRANSPOSED=is_transposed, HAS_PAIRS=pairs is not None)

    def __call__(self, chunk: int, first_column: int) -> None:
        """Write the products of a chunk of sequences."""
        column_tiles = cdiv(min(self.columns, self.width - first_column), self.tile)
        launch(
            _ragged_kernel, self.grid, *self.before, chunk, first_column, column_tiles, self.most, **self.options,
            num_warps=4,
        )  # fmt: skip


def _described(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    """Describe a tensor whose boxes are swizzled by as many bytes as their rows have, 128 at most."""
    layout = gl.NVMMASharedLayout(min(128, 2 * box[-1]), 16, 3)
    return TensorDescriptor.from_tensor(tensor, box, layout)


def _described_pairs(pairs: Tensor, weight: Tensor, columns: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Describe the pairs, and what they are multiplied with: [E, h, 16], the weight for both halves of a number."""
    matrix = weight.new_zeros((*weight.shape, PAIR_SIZE))
    matrix[..., :2] = weight[..., None]
    return _described(pairs, [1, BOX_SIZE, PAIR_SIZE]), _described(matrix, [1, columns, PAIR_SIZE])
