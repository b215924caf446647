"""Causal attention among the selected tokens of each head, with rotary positions of the original sequence.

Slots are in position order, so that causality is an order of slots: a key is visible if its slot is not behind the
query's, and with documents if its token does not lie before the beginning of the query's document.
"""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.naive import rotary_frequencies
from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, power_of_2

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _rotated(rows, position, there, cos, sin, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BACK):
    """Rows of queries or keys turned by their positions; BACK = -1 turns gradients back, BACK = 1 is forward."""
    column = tl.arange(0, WIDTH)
    x = tl.load(rows + column[None], mask=there[:, None] & (column < D)[None], other=0.0)
    if HALF == 0:
        return x
    is_first, turns = column < HALF, there[:, None] & (column < 2 * HALF)[None]
    partner = tl.where(is_first, column + HALF, column - HALF)
    y = tl.load(rows + partner[None], mask=turns, other=0.0).to(tl.float32)
    angle = position[:, None] * HALF + tl.where(is_first, column, column - HALF)[None]
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0) * BACK
    return (x.to(tl.float32) * c + y * tl.where(is_first[None], -s, s)).to(x.dtype)


@triton.jit
def _tokens(indices, starts, row, batch, there, T, HAS_STARTS: tl.constexpr, RESTARTS: tl.constexpr):
    """Token, beginning of its document and rotary position of some slots; empty slots have token T."""
    token = tl.load(indices + row, mask=there, other=T)
    if HAS_STARTS:
        start = tl.load(starts + batch.to(tl.int64) * T + token, mask=token < T, other=T)
        if RESTARTS:
            return token, start, tl.where(token < T, token - start, 0)
        return token, start, tl.where(token < T, token, 0)
    return token, tl.zeros_like(token), tl.where(token < T, token, 0)


@triton.jit
def _forward_kernel(
    qkv, indices, scores, starts, cos, sin, attended, log_sums, gates, E, K, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, RESTARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    slots = indices + (batch.to(tl.int64) * E + head) * K
    row = head.to(tl.int64) * R + batch * K
    token, start, position = _tokens(slots, starts, slot, batch, slot < K, T, HAS_STARTS, RESTARTS)
    filled = token < T
    query = _rotated(qkv + (row + slot)[:, None] * (3 * D), position, filled, cos, sin, D, HALF, WIDTH, 1.0)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    result = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key_token, _, key_position = _tokens(slots, starts, other, batch, other < K, T, HAS_STARTS, RESTARTS)
        there = key_token < T
        keys = qkv + (row + other)[:, None] * (3 * D) + D
        key = _rotated(keys, key_position, there, cos, sin, D, HALF, WIDTH, 1.0)
        value = tl.load(keys + D + column[None], mask=there[:, None] & (column < D)[None], other=0.0)
        logits = dot(query, tl.trans(key), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
        visible = slot[:, None] >= other[None]
        if HAS_STARTS:
            visible = visible & (key_token[None] >= start[:, None])
        logits = tl.where(visible, logits * (SCALE * LOG2_E), float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # of queries that have seen nothing yet
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        result = dot(weights.to(value.dtype), value, result * shrink[:, None], INTERPRETED)
        largest = higher
    total = tl.where(filled, total, 1.0)
    largest = tl.where(filled, largest, 0.0)
    here = slot < K
    out = attended + (row + slot)[:, None] * D + column[None]
    result = tl.where(filled[:, None], result / total[:, None], 0.0)
    tl.store(out, result.to(attended.dtype.element_ty), mask=here[:, None] & (column < D)[None])
    tl.store(log_sums + row + slot, largest + tl.log2(total), mask=here)
    gate = tl.load(scores + (batch.to(tl.int64) * E + head) * T + token, mask=filled, other=0.0)
    tl.store(gates + row + slot, gate, mask=here)


@triton.jit
def _pair_gradients(
    query, key, value, upstream, log_sum, delta, slot, other, start, key_token, SCALE,
    HAS_STARTS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights and the gradient of the logits of one tile, queries by keys."""
    logits = dot(query, tl.trans(key), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    visible = slot[:, None] >= other[None]
    if HAS_STARTS:
        visible = visible & (key_token[None] >= start[:, None])
    weights = tl.where(visible, tl.exp2(logits * (SCALE * LOG2_E) - log_sum[:, None]), 0.0)
    of_weights = dot(upstream, tl.trans(value), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    return weights, weights * (of_weights - delta[:, None]) * SCALE


@triton.jit
def _store_turned_back(
    out, gradient, position, there, cos, sin, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store the gradient of queries or keys before their rotation; partners meet through the memory of ``out``."""
    column = tl.arange(0, WIDTH)
    mask = there[:, None] & (column < D)[None]
    tl.store(out + column[None], gradient.to(out.dtype.element_ty), mask=mask)
    if HALF > 0:
        tl.debug_barrier()
        turned = _rotated(out, position, there, cos, sin, D, HALF, WIDTH, -1.0)
        tl.debug_barrier()
        tl.store(out + column[None], turned, mask=mask)


@triton.jit
def _load_queries(
    qkv, attended, of_gated, gates, log_sums, slots, starts, cos, sin, row, slot, batch, K, T,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, RESTARTS: tl.constexpr,
):  # fmt: skip
    """What a tile of queries brings into the backward pass; the gradient of its gates besides."""
    column = tl.arange(0, WIDTH)
    token, start, position = _tokens(slots, starts, slot, batch, slot < K, T, HAS_STARTS, RESTARTS)
    filled = token < T
    query = _rotated(qkv + (row + slot)[:, None] * (3 * D), position, filled, cos, sin, D, HALF, WIDTH, 1.0)
    offsets, mask = (row + slot)[:, None] * D + column[None], filled[:, None] & (column < D)[None]
    of_result = tl.load(of_gated + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gates + row + slot, mask=filled, other=0.0)
    of_gate = tl.sum(of_result * tl.load(attended + offsets, mask=mask, other=0.0).to(tl.float32), axis=1)
    upstream = (of_result * gate[:, None]).to(query.dtype)
    log_sum = tl.load(log_sums + row + slot, mask=filled, other=0.0)
    return start, position, filled, query, upstream, log_sum, gate, of_gate


@triton.jit
def _backward_keys_kernel(
    qkv, indices, starts, cos, sin, attended, of_gated, gates, log_sums, of_qkv, of_logits, E, K, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, RESTARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    other = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    slots = indices + (batch.to(tl.int64) * E + head) * K
    row = head.to(tl.int64) * R + batch * K
    key_token, _, key_position = _tokens(slots, starts, other, batch, other < K, T, HAS_STARTS, RESTARTS)
    there = key_token < T
    keys = (row + other)[:, None] * (3 * D) + D
    key = _rotated(qkv + keys, key_position, there, cos, sin, D, HALF, WIDTH, 1.0)
    value = tl.load(qkv + keys + D + column[None], mask=there[:, None] & (column < D)[None], other=0.0)
    of_key = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    of_value = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK, K, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        start, position, filled, query, upstream, log_sum, gate, of_gate = _load_queries(
            qkv, attended, of_gated, gates, log_sums, slots, starts, cos, sin, row, slot, batch, K, T,
            D, HALF, WIDTH, HAS_STARTS, RESTARTS,
        )  # fmt: skip
        weights, of_pairs = _pair_gradients(
            query, key, value, upstream, log_sum, of_gate * gate, slot, other, start, key_token, SCALE,
            HAS_STARTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_value = dot(tl.trans(weights).to(upstream.dtype), upstream, of_value, INTERPRETED)
        of_key = dot(tl.trans(of_pairs).to(query.dtype), query, of_key, INTERPRETED)
        if ONE_TILE:
            of_query = dot(of_pairs.to(key.dtype), key, tl.zeros((BLOCK, WIDTH), dtype=tl.float32), INTERPRETED)
            out = of_qkv + (row + slot)[:, None] * (3 * D)
            _store_turned_back(out, of_query, position, slot < K, cos, sin, D, HALF, WIDTH)
            tl.store(of_logits + row + slot, of_gate * gate * (1.0 - gate), mask=slot < K)
    _store_turned_back(of_qkv + keys, of_key, key_position, other < K, cos, sin, D, HALF, WIDTH)
    values = of_qkv + keys + D + column[None]
    tl.store(values, of_value.to(of_qkv.dtype.element_ty), mask=(other < K)[:, None] & (column < D)[None])


@triton.jit
def _backward_queries_kernel(
    qkv, indices, starts, cos, sin, attended, of_gated, gates, log_sums, of_qkv, of_logits, E, K, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, RESTARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    slots = indices + (batch.to(tl.int64) * E + head) * K
    row = head.to(tl.int64) * R + batch * K
    start, position, filled, query, upstream, log_sum, gate, of_gate = _load_queries(
        qkv, attended, of_gated, gates, log_sums, slots, starts, cos, sin, row, slot, batch, K, T,
        D, HALF, WIDTH, HAS_STARTS, RESTARTS,
    )  # fmt: skip
    of_query = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key_token, _, key_position = _tokens(slots, starts, other, batch, other < K, T, HAS_STARTS, RESTARTS)
        there = key_token < T
        keys = qkv + (row + other)[:, None] * (3 * D) + D
        key = _rotated(keys, key_position, there, cos, sin, D, HALF, WIDTH, 1.0)
        value = tl.load(keys + D + column[None], mask=there[:, None] & (column < D)[None], other=0.0)
        _, of_pairs = _pair_gradients(
            query, key, value, upstream, log_sum, of_gate * gate, slot, other, start, key_token, SCALE,
            HAS_STARTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_query = dot(of_pairs.to(key.dtype), key, of_query, INTERPRETED)
    out = of_qkv + (row + slot)[:, None] * (3 * D)
    _store_turned_back(out, of_query, position, slot < K, cos, sin, D, HALF, WIDTH)
    tl.store(of_logits + row + slot, of_gate * gate * (1.0 - gate), mask=slot < K)


def rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to T - 1, fp32 [T, half] each."""
    frequencies = rotary_frequencies(2 * half, base, torch.float32, device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _options(qkv: Tensor, indices: Tensor, half: int, starts: Tensor | None, restarts: bool) -> tuple[dict, int]:
    size = qkv.shape[2] // 3
    width = power_of_2(size)
    chosen = tiles.attention(qkv.dtype, qkv.device, indices.shape[2], width)
    options = dict(
        D=size, HALF=half, WIDTH=width, HAS_STARTS=starts is not None, RESTARTS=restarts, INTERPRETED=INTERPRET
    )
    return options | chosen, chosen["BLOCK"]


def attend(
    qkv: Tensor, indices: Tensor, scores: Tensor, tables: tuple[Tensor, Tensor], starts: Tensor | None, restarts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each head before its gate.

    Args:
        qkv: [E, B * k, 3d].
        indices: int64 [B, E, k], T in empty slots.
        scores: fp32 [B, E, T].
        tables: of ``rotary_table``.
        starts: int64 [B, T], where each token's document begins; None: one document a sequence.
        restarts: count positions from there.

    Returns:
        [E, B * k, d]; base-2 logarithms of the softmax denominators and gates, fp32 [E, B * k].
    """
    batch, heads, selected = indices.shape
    rows, size = qkv.shape[1], qkv.shape[2] // 3
    attended = qkv.new_empty((heads, rows, size))
    log_sums, gates = (qkv.new_empty((heads, rows), dtype=torch.float32) for _ in range(2))
    options, block = _options(qkv, indices, tables[0].shape[1], starts, restarts)
    _forward_kernel[(triton.cdiv(selected, block), heads, batch)](
        qkv, indices, scores, starts, *tables, attended, log_sums, gates, heads, selected, scores.shape[2], rows,
        size**-0.5, **options,
    )  # fmt: skip
    return attended, log_sums, gates


def attend_backward(
    qkv: Tensor,
    indices: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    of_gated: Tensor,
    tables: tuple[Tensor, Tensor],
    starts: Tensor | None,
    restarts: bool,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v, [E, B * k, 3d], and of the router's logits, fp32 [E, B * k].

    Args:
        saved: what ``attend`` returned.
        of_gated: the gradient of the gated result, [E, B * k, d].
        length: T.
    """
    batch, heads, selected = indices.shape
    rows, size = qkv.shape[1], qkv.shape[2] // 3
    attended, log_sums, gates = saved
    of_qkv, of_logits = torch.empty_like(qkv), torch.empty_like(gates)
    options, block = _options(qkv, indices, tables[0].shape[1], starts, restarts)
    arguments = (
        qkv, indices, starts, *tables, attended, of_gated, gates, log_sums, of_qkv, of_logits, heads, selected, length,
        rows, size**-0.5,
    )  # fmt: skip
    grid = (triton.cdiv(selected, block), heads, batch)
    _backward_keys_kernel[grid](*arguments, ONE_TILE=grid[0] == 1, **options)
    if grid[0] > 1:
        _backward_queries_kernel[grid](*arguments, **options)
    return of_qkv, of_logits
