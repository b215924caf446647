"""The gradients of attention among the selected tokens: of queries, keys and values.

Weights are computed once more, tile by tile. What turns and what does not are separate tiles, so that gradients are
turned back in registers. One kernel goes over the keys and, where one tile holds all slots, does the queries too.
"""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.attention import LOG2_E, beginning_of, launch_options, load_tile, segment
from megatron_mosa.kernels.triton.common import dot, power_of_2, turned
from megatron_mosa.kernels.triton.gathered import Rotation, positions_of
from megatron_mosa.kernels.triton.rows import Rows


@triton.jit
def _load_turned(
    rows, slot, count, D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr
):
    """A tile of queries or keys in three: the halves that turn together, and the columns that do not turn."""
    half, rest = tl.arange(0, HALF_WIDTH), tl.arange(0, REST_WIDTH)
    tile, here = rows + slot[:, None] * (3 * D), (slot < count)[:, None]
    first, second, others = 0.0, 0.0, 0.0
    if HALF > 0:
        first = tl.load(tile + half[None], mask=here & (half < HALF)[None], other=0.0)
        second = tl.load(tile + (HALF + half)[None], mask=here & (half < HALF)[None], other=0.0)
    if D > 2 * HALF:
        others = tl.load(tile + (2 * HALF + rest)[None], mask=here & (2 * HALF + rest < D)[None], other=0.0)
    return first, second, others


@triton.jit
def _store_turned_back(
    out, first, second, others, slot, count, position, cos, sin, D: tl.constexpr, HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of such a tile before its rotation."""
    half, rest = tl.arange(0, HALF_WIDTH), tl.arange(0, REST_WIDTH)
    TYPE: tl.constexpr = out.dtype.element_ty
    tile, here = out + slot[:, None] * (3 * D), (slot < count)[:, None]
    if HALF > 0:
        first, second = turned(first, second, position, half, half < HALF, cos, sin, -1.0, HALF)
        tl.store(tile + half[None], first.to(TYPE), mask=here & (half < HALF)[None])
        tl.store(tile + (HALF + half)[None], second.to(TYPE), mask=here & (half < HALF)[None])
    if D > 2 * HALF:
        tl.store(tile + (2 * HALF + rest)[None], others.to(TYPE), mask=here & (2 * HALF + rest < D)[None])


@triton.jit
def _zeros(
    BLOCK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr
):  # fmt: skip
    """Gradients of such a tile, to begin with."""
    half, rest = 0.0, 0.0
    if HALF > 0:
        half = tl.zeros((BLOCK, HALF_WIDTH), dtype=tl.float32)
    if D > 2 * HALF:
        rest = tl.zeros((BLOCK, REST_WIDTH), dtype=tl.float32)
    return half, half, rest


@triton.jit
def _add_product(
    a, first, second, others, of_first, of_second, of_others, D: tl.constexpr, HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """a times a tile in three, added to gradients in three."""
    if HALF > 0:
        of_first, of_second = dot(a, first, of_first, INTERPRETED), dot(a, second, of_second, INTERPRETED)
    if D > 2 * HALF:
        of_others = dot(a, others, of_others, INTERPRETED)
    return of_first, of_second, of_others


@triton.jit
def _load_queries(
    upstreams, log_sums, deltas, places, documents, row, slot, count, T,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What a tile of queries brings into the backward pass, besides themselves."""
    here = slot < count
    place = tl.load(places + row + slot, mask=here, other=0)
    begins = beginning_of(documents, place, here, T, HAS_DOCUMENTS, SHIFT)
    upstream = load_tile(upstreams + row * D, slot, count, tl.arange(0, WIDTH), D, D)
    log_sum = tl.load(log_sums + row + slot, mask=here, other=0.0)
    return place, begins, upstream, log_sum, tl.load(deltas + row + slot, mask=here, other=0.0)


@triton.jit
def _pair_gradients(
    q_first, q_second, q_others, k_first, k_second, k_others, value, upstream, log_sum, delta, slot, other, begins,
    key_place, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights and the gradient of the logits of one tile, queries by keys."""
    logits = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if HALF > 0:
        logits = dot(q_first, tl.trans(k_first), logits, INTERPRETED)
        logits = dot(q_second, tl.trans(k_second), logits, INTERPRETED)
    if D > 2 * HALF:
        logits = dot(q_others, tl.trans(k_others), logits, INTERPRETED)
    visible = slot[:, None] >= other[None]
    if HAS_DOCUMENTS:
        visible = visible & (key_place[None] >= begins[:, None])
    weights = tl.where(visible, tl.exp2(logits * (SCALE * LOG2_E) - log_sum[:, None]), 0.0)
    of_weights = dot(upstream, tl.trans(value), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    return weights, weights * (of_weights - delta[:, None]) * SCALE


@triton.jit(do_not_specialize=["B"])
def _backward_keys_kernel(
    qkv, places, row_starts, documents, starts, cos, sin, upstreams, log_sums, deltas, of_qkv, B, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    IS_ONE_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    other, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    key_place = tl.load(places + row + other, mask=other < count, other=0)
    rows, out = qkv + row * (3 * D), of_qkv + row * (3 * D)
    k_first, k_second, k_others = _load_turned(rows + D, other, count, D, HALF, HALF_WIDTH, REST_WIDTH)
    value = load_tile(rows + 2 * D, other, count, column, 3 * D, D)
    of_first, of_second, of_others = _zeros(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
    of_value = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for begin in range(tl.program_id(0) * BLOCK, count, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        q_first, q_second, q_others = _load_turned(rows, slot, count, D, HALF, HALF_WIDTH, REST_WIDTH)
        place, begins, upstream, log_sum, delta = _load_queries(
            upstreams, log_sums, deltas, places, documents, row, slot, count, T, D, WIDTH, HAS_DOCUMENTS, SHIFT
        )  # fmt: skip
        weights, of_pairs = _pair_gradients(
            q_first, q_second, q_others, k_first, k_second, k_others, value, upstream, log_sum, delta, slot, other,
            begins, key_place, SCALE, D, HALF, HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_value = dot(tl.trans(weights.to(upstream.dtype)), upstream, of_value, INTERPRETED)
        of_pairs = of_pairs.to(upstream.dtype)
        of_first, of_second, of_others = _add_product(
            tl.trans(of_pairs), q_first, q_second, q_others, of_first, of_second, of_others, D, HALF, INTERPRETED
        )
        if IS_ONE_TILE:
            position = positions_of(place, slot < count, starts, T, RESTARTS, SHIFT)
            first, second, others = _zeros(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
            first, second, others = _add_product(
                of_pairs, k_first, k_second, k_others, first, second, others, D, HALF, INTERPRETED
            )
            _store_turned_back(
                out, first, second, others, slot, count, position, cos, sin, D, HALF, HALF_WIDTH, REST_WIDTH
            )
    position = positions_of(key_place, other < count, starts, T, RESTARTS, SHIFT)
    _store_turned_back(
        out + D, of_first, of_second, of_others, other, count, position, cos, sin, D, HALF, HALF_WIDTH, REST_WIDTH
    )
    values = out + 2 * D + other[:, None] * (3 * D) + column[None]
    tl.store(values, of_value.to(of_qkv.dtype.element_ty), mask=(other < count)[:, None] & (column < D)[None])


@triton.jit(do_not_specialize=["B"])
def _backward_queries_kernel(
    qkv, places, row_starts, documents, starts, cos, sin, upstreams, log_sums, deltas, of_qkv, B, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    slot, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    rows = qkv + row * (3 * D)
    q_first, q_second, q_others = _load_turned(rows, slot, count, D, HALF, HALF_WIDTH, REST_WIDTH)
    place, begins, upstream, log_sum, delta = _load_queries(
        upstreams, log_sums, deltas, places, documents, row, slot, count, T, D, WIDTH, HAS_DOCUMENTS, SHIFT
    )  # fmt: skip
    of_first, of_second, of_others = _zeros(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
    for begin in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        key_place = tl.load(places + row + other, mask=other < count, other=0)
        k_first, k_second, k_others = _load_turned(rows + D, other, count, D, HALF, HALF_WIDTH, REST_WIDTH)
        value = load_tile(rows + 2 * D, other, count, column, 3 * D, D)
        _, of_pairs = _pair_gradients(
            q_first, q_second, q_others, k_first, k_second, k_others, value, upstream, log_sum, delta, slot, other,
            begins, key_place, SCALE, D, HALF, HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_first, of_second, of_others = _add_product(
            of_pairs.to(upstream.dtype), k_first, k_second, k_others, of_first, of_second, of_others, D, HALF,
            INTERPRETED,
        )  # fmt: skip
    position = positions_of(place, slot < count, starts, T, RESTARTS, SHIFT)
    out = of_qkv + row * (3 * D)
    _store_turned_back(
        out, of_first, of_second, of_others, slot, count, position, cos, sin, D, HALF, HALF_WIDTH, REST_WIDTH
    )


def attend_backward(
    qkv: Tensor,
    rows: Rows,
    upstreams: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    selected: int,
    length: int,
    documents: Tensor | None,
    rotation: Rotation,
) -> Tensor:
    """Gradients of q, k and v before their rotation, [E, B * k, 3d].

    Args:
        upstreams: the gradient of attention before its gates, [E, B * k, d].
        log_sums: from ``attend``.
        deltas: fp32 [E, B * k], sums of ``upstreams`` times attention.
        length: T.
    """
    heads, batch = rows.starts.shape[0], rows.starts.shape[1] - 1
    capacity, size = qkv.shape[1], qkv.shape[2] // 3
    of_qkv = torch.empty_like(qkv)
    options, block = launch_options(qkv, selected, length, documents, is_backward=True)
    half = rotation.cos.shape[1]
    options |= dict(HALF=half, HALF_WIDTH=power_of_2(half), REST_WIDTH=power_of_2(size - 2 * half))
    options |= dict(RESTARTS=rotation.starts is not None)
    arguments = (
        qkv, rows.places, rows.starts, documents, rotation.starts, rotation.cos, rotation.sin, upstreams, log_sums,
        deltas, of_qkv, batch, length, capacity, size**-0.5,
    )  # fmt: skip
    grid = (triton.cdiv(selected, block), heads, batch)
    _backward_keys_kernel[grid](*arguments, IS_ONE_TILE=grid[0] == 1, **options)
    if grid[0] > 1:
        _backward_queries_kernel[grid](*arguments, **options)
    return of_qkv
