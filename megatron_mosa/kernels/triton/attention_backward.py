"""The gradients of attention among the selected tokens: of queries, keys and values.

Attention weights are recomputed tile by tile. Queries and keys are loaded as three tiles, the two halves that rotate
together and the columns that do not rotate, so that gradients are rotated back in registers. One kernel loops over
queries for a tile of keys; where one tile holds all slots, it also computes the gradient of the queries. A launch
computes heads and sequences that have LEAST to MOST rows.
"""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.attention import LOG2_E, document_index, launch_options, load_tile, row_range
from megatron_mosa.kernels.triton.common import cdiv, dot, launch, power_of_2, rotate
from megatron_mosa.kernels.triton.gathered import Rotation, load_positions
from megatron_mosa.kernels.triton.rows import Rows


@triton.jit
def _load_parts(
    p_rows, i_slot, count, D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr
):
    """Load queries or keys as three tiles: the two halves that rotate together, and the remaining columns."""
    o_half, o_rest = tl.arange(0, HALF_WIDTH), tl.arange(0, REST_WIDTH)
    p_tile, m_row = p_rows + i_slot[:, None] * (3 * D), (i_slot < count)[:, None]
    b_first, b_second, b_rest = 0.0, 0.0, 0.0
    if HALF > 0:
        b_first = tl.load(p_tile + o_half[None], mask=m_row & (o_half < HALF)[None], other=0.0)
        b_second = tl.load(p_tile + (HALF + o_half)[None], mask=m_row & (o_half < HALF)[None], other=0.0)
    if D > 2 * HALF:
        b_rest = tl.load(p_tile + (2 * HALF + o_rest)[None], mask=m_row & (2 * HALF + o_rest < D)[None], other=0.0)
    return b_first, b_second, b_rest


@triton.jit
def _store_parts(
    p_out, b_first, b_second, b_rest, i_slot, count, b_position, p_cos, p_sin, D: tl.constexpr, HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr,
):  # fmt: skip
    """Rotate the gradient of such tiles back, and store it."""
    o_half, o_rest = tl.arange(0, HALF_WIDTH), tl.arange(0, REST_WIDTH)
    TYPE: tl.constexpr = p_out.dtype.element_ty
    p_tile, m_row = p_out + i_slot[:, None] * (3 * D), (i_slot < count)[:, None]
    if HALF > 0:
        b_first, b_second = rotate(b_first, b_second, b_position, o_half, o_half < HALF, p_cos, p_sin, -1.0, HALF)
        tl.store(p_tile + o_half[None], b_first.to(TYPE), mask=m_row & (o_half < HALF)[None])
        tl.store(p_tile + (HALF + o_half)[None], b_second.to(TYPE), mask=m_row & (o_half < HALF)[None])
    if D > 2 * HALF:
        tl.store(p_tile + (2 * HALF + o_rest)[None], b_rest.to(TYPE), mask=m_row & (2 * HALF + o_rest < D)[None])


@triton.jit
def _zero_parts(
    BLOCK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr
):  # fmt: skip
    b_half, b_rest = 0.0, 0.0
    if HALF > 0:
        b_half = tl.zeros((BLOCK, HALF_WIDTH), dtype=tl.float32)
    if D > 2 * HALF:
        b_rest = tl.zeros((BLOCK, REST_WIDTH), dtype=tl.float32)
    return b_half, b_half, b_rest


@triton.jit
def _add_product(
    b_a, b_first, b_second, b_rest, b_sum_first, b_sum_second, b_sum_rest, D: tl.constexpr, HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return sum + a @ tile for each of the three tiles."""
    if HALF > 0:
        b_sum_first = dot(b_a, b_first, b_sum_first, INTERPRETED)
        b_sum_second = dot(b_a, b_second, b_sum_second, INTERPRETED)
    if D > 2 * HALF:
        b_sum_rest = dot(b_a, b_rest, b_sum_rest, INTERPRETED)
    return b_sum_first, b_sum_second, b_sum_rest


@triton.jit
def _load_query_data(
    p_do, p_log_sums, p_deltas, p_token_indices, p_starts, o_row, i_query, count, T,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Load what the backward pass needs of a tile of queries besides the queries."""
    m_query = i_query < count
    b_index = tl.load(p_token_indices + o_row + i_query, mask=m_query, other=0)
    b_document = document_index(p_starts, b_index, m_query, T, HAS_DOCUMENTS, SHIFT)
    b_do = load_tile(p_do + o_row * D, i_query, count, tl.arange(0, WIDTH), D, D)
    b_log_sum = tl.load(p_log_sums + o_row + i_query, mask=m_query, other=0.0)
    return b_index, b_document, b_do, b_log_sum, tl.load(p_deltas + o_row + i_query, mask=m_query, other=0.0)


@triton.jit
def _logit_gradients(
    b_q_first, b_q_second, b_q_rest, b_k_first, b_k_second, b_k_rest, b_v, b_do, b_log_sum, b_delta, i_query, i_key,
    b_document, b_key_index, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the attention weights and the gradient of the logits of one tile, [queries, keys] each."""
    b_logits = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if HALF > 0:
        b_logits = dot(b_q_first, tl.trans(b_k_first), b_logits, INTERPRETED)
        b_logits = dot(b_q_second, tl.trans(b_k_second), b_logits, INTERPRETED)
    if D > 2 * HALF:
        b_logits = dot(b_q_rest, tl.trans(b_k_rest), b_logits, INTERPRETED)
    m_visible = i_query[:, None] >= i_key[None]
    if HAS_DOCUMENTS:
        m_visible = m_visible & (b_key_index[None] >= b_document[:, None])
    b_p = tl.where(m_visible, tl.exp2(b_logits * (SCALE * LOG2_E) - b_log_sum[:, None]), 0.0)
    b_dp = dot(b_do, tl.trans(b_v), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    return b_p, b_p * (b_dp - b_delta[:, None]) * SCALE


@triton.jit(do_not_specialize=["B", "LEAST", "MOST"])
def _backward_keys_kernel(
    p_qkv, p_token_indices, p_cu_seqlens, p_starts, p_rotary_starts, p_cos, p_sin, p_do, p_log_sums, p_deltas, p_dqkv,
    B, T, R, LEAST, MOST, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    IS_ONE_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_head, i_batch = tl.program_id(1), tl.program_id(2)
    o_row, count = row_range(p_cu_seqlens, i_head, i_batch, B, R)
    if (tl.program_id(0) * BLOCK >= count) | (count < LEAST) | (count > MOST):
        return
    i_key, o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    b_key_index = tl.load(p_token_indices + o_row + i_key, mask=i_key < count, other=0)
    p_rows, p_out = p_qkv + o_row * (3 * D), p_dqkv + o_row * (3 * D)
    b_k_first, b_k_second, b_k_rest = _load_parts(p_rows + D, i_key, count, D, HALF, HALF_WIDTH, REST_WIDTH)
    b_v = load_tile(p_rows + 2 * D, i_key, count, o_column, 3 * D, D)
    b_dk_first, b_dk_second, b_dk_rest = _zero_parts(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
    b_dv = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK, count, BLOCK):
        i_query = start + tl.arange(0, BLOCK)
        b_q_first, b_q_second, b_q_rest = _load_parts(p_rows, i_query, count, D, HALF, HALF_WIDTH, REST_WIDTH)
        b_index, b_document, b_do, b_log_sum, b_delta = _load_query_data(
            p_do, p_log_sums, p_deltas, p_token_indices, p_starts, o_row, i_query, count, T, D, WIDTH, HAS_DOCUMENTS,
            SHIFT,
        )  # fmt: skip
        b_p, b_ds = _logit_gradients(
            b_q_first, b_q_second, b_q_rest, b_k_first, b_k_second, b_k_rest, b_v, b_do, b_log_sum, b_delta, i_query,
            i_key, b_document, b_key_index, SCALE, D, HALF, HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        b_dv = dot(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, INTERPRETED)
        # Transposed before the cast, not after: Triton 3.6 could not pipeline its several products for Blackwell.
        b_ds, b_ds_t = b_ds.to(b_do.dtype), tl.trans(b_ds).to(b_do.dtype)
        b_dk_first, b_dk_second, b_dk_rest = _add_product(
            b_ds_t, b_q_first, b_q_second, b_q_rest, b_dk_first, b_dk_second, b_dk_rest, D, HALF, INTERPRETED
        )
        if IS_ONE_TILE:
            b_position = load_positions(b_index, i_query < count, p_rotary_starts, T, RESTARTS, SHIFT)
            b_dq_first, b_dq_second, b_dq_rest = _zero_parts(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
            b_dq_first, b_dq_second, b_dq_rest = _add_product(
                b_ds, b_k_first, b_k_second, b_k_rest, b_dq_first, b_dq_second, b_dq_rest, D, HALF, INTERPRETED
            )
            _store_parts(
                p_out, b_dq_first, b_dq_second, b_dq_rest, i_query, count, b_position, p_cos, p_sin, D, HALF,
                HALF_WIDTH, REST_WIDTH,
            )  # fmt: skip
    b_position = load_positions(b_key_index, i_key < count, p_rotary_starts, T, RESTARTS, SHIFT)
    _store_parts(
        p_out + D, b_dk_first, b_dk_second, b_dk_rest, i_key, count, b_position, p_cos, p_sin, D, HALF, HALF_WIDTH,
        REST_WIDTH,
    )  # fmt: skip
    p_dv = p_out + 2 * D + i_key[:, None] * (3 * D) + o_column[None]
    tl.store(p_dv, b_dv.to(p_dqkv.dtype.element_ty), mask=(i_key < count)[:, None] & (o_column < D)[None])


@triton.jit(do_not_specialize=["B", "LEAST", "MOST"])
def _backward_queries_kernel(
    p_qkv, p_token_indices, p_cu_seqlens, p_starts, p_rotary_starts, p_cos, p_sin, p_do, p_log_sums, p_deltas, p_dqkv,
    B, T, R, LEAST, MOST, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_head, i_batch = tl.program_id(1), tl.program_id(2)
    o_row, count = row_range(p_cu_seqlens, i_head, i_batch, B, R)
    if (tl.program_id(0) * BLOCK >= count) | (count < LEAST) | (count > MOST):
        return
    i_query, o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    p_rows = p_qkv + o_row * (3 * D)
    b_q_first, b_q_second, b_q_rest = _load_parts(p_rows, i_query, count, D, HALF, HALF_WIDTH, REST_WIDTH)
    b_index, b_document, b_do, b_log_sum, b_delta = _load_query_data(
        p_do, p_log_sums, p_deltas, p_token_indices, p_starts, o_row, i_query, count, T, D, WIDTH, HAS_DOCUMENTS, SHIFT
    )  # fmt: skip
    b_dq_first, b_dq_second, b_dq_rest = _zero_parts(BLOCK, D, HALF, HALF_WIDTH, REST_WIDTH)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        i_key = start + tl.arange(0, BLOCK)
        b_key_index = tl.load(p_token_indices + o_row + i_key, mask=i_key < count, other=0)
        b_k_first, b_k_second, b_k_rest = _load_parts(p_rows + D, i_key, count, D, HALF, HALF_WIDTH, REST_WIDTH)
        b_v = load_tile(p_rows + 2 * D, i_key, count, o_column, 3 * D, D)
        _, b_ds = _logit_gradients(
            b_q_first, b_q_second, b_q_rest, b_k_first, b_k_second, b_k_rest, b_v, b_do, b_log_sum, b_delta, i_query,
            i_key, b_document, b_key_index, SCALE, D, HALF, HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        b_dq_first, b_dq_second, b_dq_rest = _add_product(
            b_ds.to(b_do.dtype), b_k_first, b_k_second, b_k_rest, b_dq_first, b_dq_second, b_dq_rest, D, HALF,
            INTERPRETED,
        )  # fmt: skip
    b_position = load_positions(b_index, i_query < count, p_rotary_starts, T, RESTARTS, SHIFT)
    p_out = p_dqkv + o_row * (3 * D)
    _store_parts(
        p_out, b_dq_first, b_dq_second, b_dq_rest, i_query, count, b_position, p_cos, p_sin, D, HALF, HALF_WIDTH,
        REST_WIDTH,
    )  # fmt: skip


def attend_backward(
    qkv: Tensor,
    rows: Rows,
    dattended: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    starts: Tensor | None,
    rotation: Rotation,
) -> Tensor:
    """Compute the gradient of the unrotated queries, keys and values, [E, R, 3h'].

    Args:
        qkv, rows, starts: as in ``attend``.
        dattended: [E, R, h'], the gradient of attention before its gates.
        log_sums: from ``attend``.
        deltas: fp32 [E, R], sums of ``dattended`` times attention.
        rotation: the rotation that was applied to queries and keys.
    """
    batch, heads, selected, length = rows.shape
    capacity, size = qkv.shape[1], qkv.shape[2] // 3
    dqkv = torch.empty_like(qkv)
    half = rotation.cos.shape[1]
    rotated = dict(
        HALF=half, HALF_WIDTH=power_of_2(half), REST_WIDTH=power_of_2(size - 2 * half),
        RESTARTS=rotation.starts is not None,
    )  # fmt: skip
    few = tiles.few_rows(qkv.dtype, qkv.device, selected, power_of_2(size))
    ranges = ((0, few), (few + 1, selected)) if few else ((0, selected),)
    for least, most in ranges:
        options = launch_options(qkv, rows, starts, most, is_backward=True) | rotated
        arguments = (
            qkv, rows.token_indices, rows.cu_seqlens, starts, rotation.starts, rotation.cos, rotation.sin, dattended,
            log_sums, deltas, dqkv, batch, length, capacity, least, most, size**-0.5,
        )  # fmt: skip
        grid = (cdiv(most, options["BLOCK"]), heads, batch)
        launch(_backward_keys_kernel, grid, *arguments, IS_ONE_TILE=grid[0] == 1, **options)
        if grid[0] > 1:
            launch(_backward_queries_kernel, grid, *arguments, **options)
    return dqkv
