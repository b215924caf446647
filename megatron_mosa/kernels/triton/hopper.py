"""QKV's product and the gradient of its matrices for Hopper in Gluon: persistent programs with specialised warps.

One warp group, the producer, gathers tokens and loads three boxes of 64 columns of the other operand into a ring of
stages. Two warp groups, the consumers, multiply the boxes, transposed, with half of the tokens' tile each. All that is
loaded comes by cp.async, so that rows can be masked and the columns of a box can lie in any order.

Gluon is part of Triton, from 3.6 on with what this file needs; ``specialized`` decides who comes here.
"""

# Calls of kernels take more than the kernels' own parameters, and Gluon's values have types that the checker misses.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import cdiv, launch, multiprocessors, strides
from megatron_mosa.kernels.triton.gathered import PAIR as PAIR_COLUMNS
from megatron_mosa.kernels.triton.gathered import Rotation
from megatron_mosa.kernels.triton.hopper_parts import barriers, halves
from megatron_mosa.kernels.triton.rows import Rows

TILE_SIZE = 256
TILE = gl.constexpr(TILE_SIZE)  # of gathered tokens: rows for the product, columns of the states for the gradient
PART = gl.constexpr(128)  # of the tile, for each of the two consumers
STEP = gl.constexpr(64)  # along the dimension that is summed over
BOX = gl.constexpr(64)  # columns
STAGES = gl.constexpr(3)
PAIR = gl.constexpr(PAIR_COLUMNS)
USED_PAIR = gl.constexpr(8)  # the other columns of pairs are 0, and more sums would not fit into the registers
# Registers of a thread, 504 for the three warp groups together; the sums of a consumer alone take 192.
REGISTERS = dict(CONSUMER_REGISTERS=232, PRODUCER_REGISTERS=40)


@gluon.jit
def _position(i_program, TILES, E, GROUP, SPLITS: gl.constexpr):
    """Return head, tile and split of a tile's number; like ``common.grouped``."""
    i_split, i_program = i_program % SPLITS, i_program // SPLITS
    i_first = i_program // (GROUP * E) * GROUP
    size = gl.minimum(TILES - i_first, GROUP)
    i_inside = i_program - i_first * E
    return i_inside // size, i_first + i_inside % size, i_split


@gluon.jit
def _count(p_cu_seqlens, i_head, B):
    return gl.load(p_cu_seqlens + i_head * (B + 1) + B)


@gluon.jit
def _box_column(i_split, NUMBER: gl.constexpr, SPLITS: gl.constexpr):
    """Return the first column of a box: of q, k and v; if they are split, of q or k and of half of v."""
    if SPLITS == 1:
        return NUMBER * BOX
    elif NUMBER < 2:
        return i_split * (2 * BOX) + NUMBER * BOX
    else:
        return 4 * BOX + i_split * BOX


@gluon.jit
def _ordered(i_place, HALF: gl.constexpr):
    """Return the column that stands at each place of a box.

    Columns that rotate with each other, HALF apart, stand 8 apart, which are registers of the same thread.
    """
    if HALF == 0:
        return i_place
    else:  # in groups of 8 columns, so that the compiler sees that these are contiguous
        APART: gl.constexpr = HALF // 8
        i_group = i_place // 8
        return (i_group + (i_group % 2 - i_group // APART % 2) * (APART - 1)) * 8 + i_place % 8


@gluon.jit
def _load_boxes(p_rows, ring, stage, i_split, left, SPLITS: gl.constexpr, HALF: gl.constexpr, MASKED: gl.constexpr):
    """Load 64 rows of the three boxes; rows from ``left`` on are zero if MASKED.

    If HALF, the first box has columns that rotate, and without splits the second one, too.
    """
    layout: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = 3 * BOX * SPLITS
    i_row = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    i_column = gl.arange(0, BOX, gl.SliceLayout(0, layout))
    for number in gl.static_range(3):
        o_column = _ordered(i_column, HALF if number < 3 - SPLITS else 0)
        p_box = p_rows + _box_column(i_split, number, SPLITS) + ((i_row * COLUMNS)[:, None] + o_column[None, :])
        if MASKED:
            mask = (i_row < left)[:, None]
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + number), p_box, mask=mask)
        else:
            async_copy.async_copy_global_to_shared(ring.index(stage * 3 + number), p_box)


@gluon.jit
def _after(stage, phase):
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _arrive_before(empty, stage, is_used):
    """Hand back the stage before ``stage``."""
    # A variable for the stage before would begin as an alias of another, which Triton 3.6 does not carry.
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=is_used)


@gluon.jit
def _multiply(
    steps, stage, phase, boxes, tokens, pairs, full, empty,
    CONSUMER: gl.constexpr, TOKENS_FIRST: gl.constexpr, HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    """Return the sums of boxes, transposed, times this consumer's part of the tokens, three of [64, 128] in fp32; the
    sums of the tokens' part, transposed, times the pairs, [128, 8]; and the next stage and its phase.

    A stage is handed back when the products of the next one are on their way.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    b_0 = gl.zeros([BOX, PART], gl.float32, layout)
    b_1 = gl.zeros([BOX, PART], gl.float32, layout)
    b_2 = gl.zeros([BOX, PART], gl.float32, layout)
    b_pairs = gl.zeros([PART, USED_PAIR], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
    for i_step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()  # cp.async writes by the generic proxy; tensor cores read by another
        b_tokens = tokens.index(stage * 2 + CONSUMER)
        b_right = b_tokens.permute((1, 0)) if TOKENS_FIRST else b_tokens
        b_0 = warpgroup_mma(boxes.index(stage * 3).permute((1, 0)), b_right, b_0, is_async=True)
        b_1 = warpgroup_mma(boxes.index(stage * 3 + 1).permute((1, 0)), b_right, b_1, is_async=True)
        b_2 = warpgroup_mma(boxes.index(stage * 3 + 2).permute((1, 0)), b_right, b_2, is_async=True)
        if HAS_PAIRS:
            for number in gl.static_range(STEP // 16):
                b_rows = b_tokens.slice(number * 16, 16).permute((1, 0))
                b_pair = pairs.index(stage).slice(number * 16, 16)
                b_pairs = warpgroup_mma(b_rows, b_pair, b_pairs, is_async=True)
            b_0, b_1, b_2, b_pairs = warpgroup_mma_wait(3 + STEP // 16, deps=[b_0, b_1, b_2, b_pairs])
        else:
            b_0, b_1, b_2 = warpgroup_mma_wait(3, deps=[b_0, b_1, b_2])
        _arrive_before(empty, stage, i_step > 0)
        stage, phase = _after(stage, phase)
    if HAS_PAIRS:
        b_0, b_1, b_2, b_pairs = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2, b_pairs])
    else:
        b_0, b_1, b_2 = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2])
    _arrive_before(empty, stage, steps > 0)
    return b_0, b_1, b_2, b_pairs, stage, phase


@gluon.jit
def _store(b, p_rows, left, SPLITS: gl.constexpr, HALF: gl.constexpr):
    """Store sums of a box [64 columns, rows], the first ``left`` rows."""
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])  # warps keep their columns
    COLUMNS: gl.constexpr = 3 * BOX * SPLITS
    ROWS: gl.constexpr = b.shape[1]
    i_row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    o_column = _ordered(gl.arange(0, BOX, gl.SliceLayout(1, layout)), HALF)
    p_box = p_rows + (i_row * COLUMNS)[None, :] + o_column[:, None]
    gl.store(p_box, gl.convert_layout(b.to(p_rows.dtype.element_ty), layout), mask=(i_row < left)[None, :])


# What ``_rotated`` makes of the sums of 32 rows, without moving data: [4, 8, 32], of which the first is the warp.
ROTATED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 8], [0, 0, 16]],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [4, 8, 32],
    )
)


@gluon.jit
def _positions(p_indices, left, SHIFT: gl.constexpr):
    """Return the positions of 32 rows."""
    i_row = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, ROTATED)))
    return gl.load(p_indices + i_row, mask=i_row < left, other=0) & ((1 << SHIFT) - 1)


@gluon.jit
def _angles(b_position, p_cos, p_sin, HALF: gl.constexpr):
    """Return cosines and sines of 32 rows as ``_rotated`` needs them: [4, 8, 32], of 8 columns each."""
    i_warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, ROTATED)))
    i_eighth = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, ROTATED)))
    o_column = _ordered(i_warp * 16, HALF)[:, None, None] + i_eighth[None, :, None]
    o_angle = (b_position * HALF)[None, None, :] + o_column
    if 2 * HALF == BOX:
        return gl.load(p_cos + o_angle), gl.load(p_sin + o_angle)
    else:  # the other columns of the box do not rotate
        mask = o_column < HALF
        return gl.load(p_cos + o_angle, mask=mask, other=1.0), gl.load(p_sin + o_angle, mask=mask, other=0.0)


@gluon.jit
def _rotated(b, b_cos, b_sin):
    """Rotate the sums of a box [64 columns, 32 rows]."""
    b_first, b_second = gl.split(gl.permute(gl.reshape(b, (4, 2, 8, 32)), (0, 2, 3, 1)))
    b_first = gl.convert_layout(b_first, ROTATED, assert_trivial=True)
    b_second = gl.convert_layout(b_second, ROTATED, assert_trivial=True)
    b = gl.join(b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin)
    return gl.reshape(gl.permute(b, (0, 3, 1, 2)), (BOX, 32))


@gluon.jit
def _give(slot, given, taken, slot_phase, i_ticket):
    """Hand the ticket of the next tile to the consumers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(taken, slot_phase ^ 1)
    slot.store(gl.full([1], i_ticket, gl.int32, layout))
    mbarrier.arrive(given)


@gluon.jit
def _take(slot, given, taken, slot_phase):
    """Return the ticket of the next tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(given, slot_phase)
    i_ticket = gl.max(slot.load(layout), axis=0)  # of one element: a scalar
    mbarrier.arrive(taken)
    return i_ticket


@gluon.jit
def _load_tokens(p_token_indices, i_head, i_tile, i_lane, R):
    """Return the tokens of a tile, and its first one; not all are of rows."""
    p_tile = p_token_indices + i_head * R + i_tile * TILE
    return gl.load(p_tile + i_lane, mask=i_tile * TILE + i_lane < R, other=0), gl.load(p_tile)


@gluon.jit
def _produce_qkv(
    p_x, p_token_indices, p_cu_seqlens, p_weight, p_counter, tokens, boxes, offsets, full, empty, slot, given, taken,
    B, R, E, H, TILES, NUMBER, GROUP, stride_b, stride_t,
    SPLITS: gl.constexpr, HALF: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """Gather tiles of tokens. A program draws its next ticket, the number of a tile, when it begins one.

    Some tiles have no rows, so that every n-th tile would be more work for some programs than for others.
    """
    layout: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])
    i_lane = gl.arange(0, TILE, gl.BlockedLayout([1], [32], [4], [0]))
    o_inner = gl.arange(0, STEP, gl.SliceLayout(0, layout))
    stage, phase, slot_phase, i_ticket = 0, 1, 0, gl.program_id(0)
    i_head, i_tile, i_split = _position(i_ticket, TILES, E, GROUP, SPLITS)
    count = _count(p_cu_seqlens, i_head, B)
    b_index, i_first = _load_tokens(p_token_indices, i_head, i_tile, i_lane, R)
    while i_ticket < NUMBER:
        # Past the last row, the tile's first one again; one token for all heads would be a hot spot of the cache.
        b_index = gl.where(i_tile * TILE + i_lane < count, b_index, i_first)
        i_batch = b_index >> SHIFT
        # In shared memory, because there are not enough registers; divided, so that the compiler sees multiples of 8.
        offsets.store((i_batch * stride_b + (b_index - (i_batch << SHIFT)) * stride_t) // 8)
        is_used = i_tile * TILE < count
        if is_used:
            _give(slot, given, taken, slot_phase, i_ticket)
            slot_phase ^= 1
        p_rows = p_weight + (i_head * H).to(gl.int64) * (3 * BOX * SPLITS)
        i_box = i_split
        # The tokens of the next tile are on their way while those of this one are gathered.
        i_ticket = gl.num_programs(0) + gl.atomic_add(p_counter, 1, sem="relaxed")
        i_head, i_tile, i_split = _position(gl.minimum(i_ticket, NUMBER - 1), TILES, E, GROUP, SPLITS)
        count = _count(p_cu_seqlens, i_head, B)
        b_index, i_first = _load_tokens(p_token_indices, i_head, i_tile, i_lane, R)
        if is_used:
            for start in range(0, H, STEP):
                mbarrier.wait(empty.index(stage), phase)
                _load_boxes(p_rows + start * (3 * BOX * SPLITS), boxes, stage, i_box, 0, SPLITS, HALF, False)
                for number in gl.static_range(2):
                    o_row = offsets.slice(number * PART, PART).load(gl.SliceLayout(1, layout)) * 8
                    p_tokens = (p_x + start) + (o_row[:, None] + o_inner[None, :])
                    async_copy.async_copy_global_to_shared(tokens.index(stage * 2 + number), p_tokens)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                stage, phase = _after(stage, phase)
    _give(slot, given, taken, slot_phase, NUMBER)


@gluon.jit
def _consume_qkv(
    p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, tokens, boxes, full, empty, slot, given, taken,
    B, R, E, H, TILES, NUMBER, GROUP,
    CONSUMER: gl.constexpr, SPLITS: gl.constexpr, HALF: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    stage, phase, slot_phase = 0, 0, 0
    i_ticket = _take(slot, given, taken, slot_phase)
    while i_ticket < NUMBER:
        i_head, i_tile, i_split = _position(i_ticket, TILES, E, GROUP, SPLITS)
        i_row = i_tile * TILE + CONSUMER * PART
        left = _count(p_cu_seqlens, i_head, B) - i_row
        b_0, b_1, b_2, _, stage, phase = _multiply(
            H // STEP, stage, phase, boxes, tokens, tokens, full, empty, CONSUMER, True, False
        )
        p_rows = p_out + (i_head * R + i_row).to(gl.int64) * (3 * BOX * SPLITS)
        _store(b_2, p_rows + _box_column(i_split, 2, SPLITS), left, SPLITS, 0)
        if HALF == 0 or SPLITS == 2:
            _store(b_1, p_rows + _box_column(i_split, 1, SPLITS), left, SPLITS, 0)
        if HALF == 0:
            _store(b_0, p_rows + _box_column(i_split, 0, SPLITS), left, SPLITS, 0)
        else:  # a piece's angles are loaded while the one before is stored
            p_indices = p_token_indices + i_head * R + i_row
            b_cos, b_sin = _angles(_positions(p_indices, left, SHIFT), p_cos, p_sin, HALF)
            b_position = _positions(p_indices + 32, left - 32, SHIFT)
            for number in gl.static_range(PART // 32):
                if number < 3:
                    b_next_cos, b_next_sin = _angles(b_position, p_cos, p_sin, HALF)
                if number < 2:
                    first = (number + 2) * 32
                    b_position = _positions(p_indices + first, left - first, SHIFT)
                p_piece = p_rows + number * 32 * 3 * BOX * SPLITS
                b = _rotated(halves(halves(b_0)[number // 2])[number % 2], b_cos, b_sin)
                _store(b, p_piece + _box_column(i_split, 0, SPLITS), left - number * 32, SPLITS, HALF)
                if SPLITS == 1:
                    b = _rotated(halves(halves(b_1)[number // 2])[number % 2], b_cos, b_sin)
                    _store(b, p_piece + _box_column(i_split, 1, SPLITS), left - number * 32, SPLITS, HALF)
                b_cos, b_sin = b_next_cos, b_next_sin
        slot_phase ^= 1
        i_ticket = _take(slot, given, taken, slot_phase)


@gluon.jit(do_not_specialize=["B", "R", "E", "H", "TILES", "NUMBER", "GROUP"])
def _qkv_kernel(
    p_x, p_token_indices, p_cu_seqlens, p_weight, p_out, p_cos, p_sin, p_counter,
    B, R, E, H, TILES, NUMBER, GROUP, stride_b, stride_t,
    SPLITS: gl.constexpr, HALF: gl.constexpr, SHIFT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute tiles of 256 rows by 192 columns: all of q, k and v, or SPLITS tiles of half of them."""
    TYPE: gl.constexpr = p_x.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tokens = gl.allocate_shared_memory(TYPE, [STAGES * 2, PART, STEP], shared)
    boxes = gl.allocate_shared_memory(TYPE, [STAGES * 3, STEP, BOX], shared)
    offsets = gl.allocate_shared_memory(gl.int32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # for a ticket
    full, empty = barriers(STAGES, 128), barriers(STAGES, 2)  # the producer's threads; the consumers
    given, taken = barriers(1, 1).index(0), barriers(1, 2).index(0)
    gl.warp_specialize(
        [
            (_consume_qkv, (p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, tokens, boxes, full, empty, slot,
                            given, taken, B, R, E, H, TILES, NUMBER, GROUP, gl.constexpr(0), SPLITS, HALF, SHIFT)),
            (_consume_qkv, (p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, tokens, boxes, full, empty, slot,
                            given, taken, B, R, E, H, TILES, NUMBER, GROUP, gl.constexpr(1), SPLITS, HALF, SHIFT)),
            (_produce_qkv, (p_x, p_token_indices, p_cu_seqlens, p_weight, p_counter, tokens, boxes, offsets, full,
                            empty, slot, given, taken, B, R, E, H, TILES, NUMBER, GROUP, stride_b, stride_t,
                            SPLITS, HALF, SHIFT)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _produce_gradient(
    p_x, p_token_indices, p_cu_seqlens, p_values, p_pairs, tokens, boxes, pairs, full, empty,
    B, R, E, TILES, NUMBER, GROUP, stride_b, stride_t,
    SPLITS: gl.constexpr, SHIFT: gl.constexpr, HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([4, 8], [2, 16], [4, 1], [1, 0])
    pair_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    i_lane = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    o_inner = gl.arange(0, PART, gl.SliceLayout(0, layout))
    i_pair = gl.arange(0, STEP, gl.SliceLayout(1, pair_layout))
    o_pair = (i_pair * PAIR)[:, None] + gl.arange(0, USED_PAIR, gl.SliceLayout(0, pair_layout))[None, :]
    stage, phase = 0, 1
    next_count = _count(p_cu_seqlens, _position(gl.program_id(0), TILES, E, GROUP, SPLITS)[0], B)
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        i_head, i_tile, i_split = _position(i_program, TILES, E, GROUP, SPLITS)
        count = next_count
        p_indices = p_token_indices + i_head * R + i_lane
        b_index = gl.load(p_indices, mask=i_lane < count, other=0)
        p_x_tile = p_x + i_tile * TILE
        # The next tile's number of rows is on its way while this one is gathered.
        i_next = gl.minimum(i_program + gl.num_programs(0), NUMBER - 1)
        next_count = _count(p_cu_seqlens, _position(i_next, TILES, E, GROUP, SPLITS)[0], B)
        for start in range(0, count, STEP):
            left = count - start
            mbarrier.wait(empty.index(stage), phase)
            # What follows a head's last row may be NaN.
            o_step = (i_head * R + start).to(gl.int64)
            _load_boxes(p_values + o_step * (3 * BOX * SPLITS), boxes, stage, i_split, left, SPLITS, 0, True)
            if HAS_PAIRS:
                p_pair = p_pairs + o_step * PAIR + o_pair
                async_copy.async_copy_global_to_shared(pairs.index(stage), p_pair, mask=(i_pair < left)[:, None])
            i_batch = b_index >> SHIFT
            o_row = (i_batch * stride_b + (b_index - (i_batch << SHIFT)) * stride_t) // 8 * 8  # seen as a multiple
            for number in gl.static_range(2):
                p_tokens = (p_x_tile + number * PART) + (o_row[:, None] + o_inner[None, :])
                async_copy.async_copy_global_to_shared(tokens.index(stage * 2 + number), p_tokens)
            b_index = gl.load(p_indices + (start + STEP), mask=i_lane < left - STEP, other=0)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage, phase = _after(stage, phase)


@gluon.jit
def _consume_gradient(
    p_cu_seqlens, p_out, p_pair_out, tokens, boxes, pairs, full, empty, B, E, H, TILES, NUMBER, GROUP,
    CONSUMER: gl.constexpr, SPLITS: gl.constexpr, HAS_PAIRS: gl.constexpr,
):  # fmt: skip
    stage, phase = 0, 0
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        i_head, i_tile, i_split = _position(i_program, TILES, E, GROUP, SPLITS)
        steps = gl.cdiv(_count(p_cu_seqlens, i_head, B), STEP)
        o_row = i_head * H + i_tile * TILE + CONSUMER * PART
        # With two splits each yields the pairs of the columns of one consumer.
        if HAS_PAIRS and (SPLITS == 1 or i_split == CONSUMER):
            b_0, b_1, b_2, b_pairs, stage, phase = _multiply(
                steps, stage, phase, boxes, tokens, pairs, full, empty, CONSUMER, False, True
            )
            b_sum = gl.sum(b_pairs, axis=1)
            i_row = gl.arange(0, PART, b_sum.type.layout)
            gl.store(p_pair_out + o_row + i_row, b_sum.to(p_pair_out.dtype.element_ty))
        else:
            b_0, b_1, b_2, _, stage, phase = _multiply(
                steps, stage, phase, boxes, tokens, pairs, full, empty, CONSUMER, False, False
            )
        p_rows = p_out + o_row.to(gl.int64) * (3 * BOX * SPLITS)
        _store(b_0, p_rows + _box_column(i_split, 0, SPLITS), PART, SPLITS, 0)
        _store(b_1, p_rows + _box_column(i_split, 1, SPLITS), PART, SPLITS, 0)
        _store(b_2, p_rows + _box_column(i_split, 2, SPLITS), PART, SPLITS, 0)


@gluon.jit(do_not_specialize=["B", "R", "E", "H", "TILES", "NUMBER", "GROUP"])
def _qkv_gradient_kernel(
    p_x, p_token_indices, p_cu_seqlens, p_values, p_pairs, p_out, p_pair_out,
    B, R, E, H, TILES, NUMBER, GROUP, stride_b, stride_t,
    SPLITS: gl.constexpr, SHIFT: gl.constexpr, HAS_PAIRS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute tiles of 256 columns of the states by 192 columns of the values."""
    TYPE: gl.constexpr = p_x.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tokens = gl.allocate_shared_memory(TYPE, [STAGES * 2, STEP, PART], shared)
    boxes = gl.allocate_shared_memory(TYPE, [STAGES * 3, STEP, BOX], shared)
    pairs = gl.allocate_shared_memory(TYPE, [STAGES, STEP, USED_PAIR], gl.NVMMASharedLayout(0, 16, 2))
    full, empty = barriers(STAGES, 128), barriers(STAGES, 2)  # the producer's threads; the consumers
    gl.warp_specialize(
        [
            (_consume_gradient, (p_cu_seqlens, p_out, p_pair_out, tokens, boxes, pairs, full, empty,
                                 B, E, H, TILES, NUMBER, GROUP, gl.constexpr(0), SPLITS, HAS_PAIRS)),
            (_consume_gradient, (p_cu_seqlens, p_out, p_pair_out, tokens, boxes, pairs, full, empty,
                                 B, E, H, TILES, NUMBER, GROUP, gl.constexpr(1), SPLITS, HAS_PAIRS)),
            (_produce_gradient, (p_x, p_token_indices, p_cu_seqlens, p_values, p_pairs, tokens, boxes, pairs, full,
                                 empty, B, R, E, TILES, NUMBER, GROUP, stride_b, stride_t, SPLITS, SHIFT, HAS_PAIRS)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def qkv_product(states: Tensor, rows: Rows, weight: Tensor, rotation: Rotation) -> Tensor:
    """Compute what ``gathered_product`` does for queries, keys and values; see ``specialized`` for what it takes."""
    batch, heads, _, length = rows.shape
    width, capacity, columns = states.shape[2], rows.token_indices.shape[1], weight.shape[2]
    splits, number = columns // 192, cdiv(capacity, TILE_SIZE)
    output = states.new_empty((heads, capacity, columns))
    size_of = states.element_size()
    group = tiles.group(
        number, length * width * size_of * TILE_SIZE * batch // capacity, heads * capacity * width * size_of,
        weight.numel() * size_of, tiles.GATHERED_BYTES,
    )  # fmt: skip
    programs, counter = number * heads * splits, torch.zeros(1, dtype=torch.int32, device=states.device)
    launch(
        _qkv_kernel, (min(programs, multiprocessors(states.device)),),
        states, rows.token_indices, rows.cu_seqlens, weight, output, rotation.cos, rotation.sin, counter,
        batch, capacity, heads, width, number, programs, group, *strides(states),
        SPLITS=splits, HALF=rotation.cos.shape[1], SHIFT=rows.shift, **REGISTERS, num_warps=4,
    )  # fmt: skip
    return output


def qkv_weight_gradient(
    states: Tensor, rows: Rows, values: Tensor, output: Tensor, pairs: Tensor | None, pair_output: Tensor | None
) -> None:
    """Compute what ``weight_gradient`` does for queries, keys and values; see ``specialized`` for what it takes."""
    batch, heads, _, _ = rows.shape
    width, capacity, columns = states.shape[2], rows.token_indices.shape[1], values.shape[2]
    splits, number = columns // 192, width // TILE_SIZE
    programs = number * heads * splits
    launch(
        _qkv_gradient_kernel, (min(programs, multiprocessors(states.device)),),
        states, rows.token_indices, rows.cu_seqlens, values, pairs, output, pair_output,
        batch, capacity, heads, width, number, programs, number, *strides(states),
        SPLITS=splits, SHIFT=rows.shift, HAS_PAIRS=pairs is not None, **REGISTERS, num_warps=4,
    )  # fmt: skip
