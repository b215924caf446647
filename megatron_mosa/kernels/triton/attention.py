"""Causal attention among the selected tokens of each head, with rotary positions of the original sequence.

Slots are in position order, so that causality is an order of slots: a key is visible if its slot is not behind the
query's, and with documents if its token does not lie before the beginning of the query's document. Queries and keys
come turned by their positions; only their gradients are turned back here.
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
from megatron_mosa.kernels.triton.common import INTERPRET, dot, power_of_2, turned
from megatron_mosa.kernels.triton.gathered import PAIR, Rotation, positions_of
from megatron_mosa.kernels.triton.rows import Rows

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _segment(row_starts, head, batch, B, R):
    """The first row of a head in a sequence, as int64 among the rows of all heads, and how many there are."""
    begin = tl.load(row_starts + head * (B + 1) + batch)
    count = tl.load(row_starts + head * (B + 1) + batch + 1) - begin
    return head.to(tl.int64) * R + begin, count


@triton.jit
def _beginning(documents, place, there, batch, T, HAS_DOCUMENTS: tl.constexpr):
    """The place at which a query's document begins."""
    if HAS_DOCUMENTS:
        return batch * T + tl.load(documents + place, mask=there, other=0).to(tl.int32)
    return tl.zeros_like(place)


@triton.jit
def _load(rows, slot, count, column, STRIDE: tl.constexpr, D: tl.constexpr):
    """A tile of some slots' rows, [BLOCK, WIDTH]."""
    return tl.load(rows + slot[:, None] * STRIDE + column[None], (slot < count)[:, None] & (column < D)[None], 0.0)


@triton.jit
def _forward_kernel(
    qkv, places, row_starts, scores, documents, gated, log_sums, gates, B, E, T, R, SCALE,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = _segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    slot, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    here = slot < count
    place = tl.load(places + row + slot, mask=here, other=0)
    begins = _beginning(documents, place, here, batch, T, HAS_DOCUMENTS)
    rows = qkv + row * (3 * D)
    query = _load(rows, slot, count, column, 3 * D, D)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    result = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key = _load(rows + D, other, count, column, 3 * D, D)
        value = _load(rows + 2 * D, other, count, column, 3 * D, D)
        logits = dot(query, tl.trans(key), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
        visible = slot[:, None] >= other[None]
        if HAS_DOCUMENTS:
            key_place = tl.load(places + row + other, mask=other < count, other=0)
            visible = visible & (key_place[None] >= begins[:, None])
        logits = tl.where(visible, logits * (SCALE * LOG2_E), float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # of queries that have seen nothing yet
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        result = dot(weights.to(value.dtype), value, result * shrink[:, None], INTERPRETED)
        largest = higher
    gate = tl.load(scores + (batch.to(tl.int64) * E + head) * T + place - batch * T, mask=here, other=0.0)
    result *= (gate / total)[:, None]
    out = gated + (row + slot)[:, None] * D + column[None]
    tl.store(out, result.to(gated.dtype.element_ty), mask=here[:, None] & (column < D)[None])
    tl.store(log_sums + row + slot, largest + tl.log2(total), mask=here)
    tl.store(gates + row + slot, gate, mask=here)


@triton.jit
def _load_queries(
    rows, gated, of_gated, gates, log_sums, places, documents, row, slot, count, batch, T,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What a tile of queries brings into the backward pass.

    delta is the gradient of the gate times the gate, which is what both the softmax and the router's logit need.
    """
    column, here = tl.arange(0, WIDTH), slot < count
    place = tl.load(places + row + slot, mask=here, other=0)
    begins = _beginning(documents, place, here, batch, T, HAS_DOCUMENTS)
    query = _load(rows, slot, count, column, 3 * D, D)
    of_result = _load(of_gated + row * D, slot, count, column, D, D).to(tl.float32)
    delta = tl.sum(of_result * _load(gated + row * D, slot, count, column, D, D).to(tl.float32), axis=1)
    gate = tl.load(gates + row + slot, mask=here, other=0.0)
    upstream = (of_result * gate[:, None]).to(query.dtype)
    log_sum = tl.load(log_sums + row + slot, mask=here, other=0.0)
    return place, begins, query, upstream, log_sum, gate, delta


@triton.jit
def _pair_gradients(
    query, key, value, upstream, log_sum, delta, slot, other, begins, key_place, SCALE,
    HAS_DOCUMENTS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights and the gradient of the logits of one tile, queries by keys."""
    logits = dot(query, tl.trans(key), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    visible = slot[:, None] >= other[None]
    if HAS_DOCUMENTS:
        visible = visible & (key_place[None] >= begins[:, None])
    weights = tl.where(visible, tl.exp2(logits * (SCALE * LOG2_E) - log_sum[:, None]), 0.0)
    of_weights = dot(upstream, tl.trans(value), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
    return weights, weights * (of_weights - delta[:, None]) * SCALE


@triton.jit
def _store_queries(
    of_qkv, of_logits, of_query, gate, delta, place, row, slot, count, batch, cos, sin, starts, T,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, RESTARTS: tl.constexpr, INTERPRETED: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries before their rotation, and of the logits of their gates, each as two halves."""
    TYPE: tl.constexpr = of_qkv.dtype.element_ty
    here, column, pair = slot < count, tl.arange(0, WIDTH), tl.arange(0, PAIR)
    position = positions_of(place, here, batch, starts, T, RESTARTS)
    of_query = turned(of_query, position, cos, sin, -1.0, TYPE, HALF, WIDTH, INTERPRETED)
    out = of_qkv + (row + slot)[:, None] * (3 * D) + column[None]
    tl.store(out, of_query.to(TYPE), mask=here[:, None] & (column < D)[None])
    of_logit = delta * (1.0 - gate)
    high = of_logit.to(TYPE)
    low = (of_logit - high.to(tl.float32)).to(TYPE)
    halves = tl.where(pair[None] == 0, high[:, None], tl.where(pair[None] == 1, low[:, None], 0.0))
    tl.store(of_logits + (row + slot)[:, None] * PAIR + pair[None], halves.to(TYPE), mask=here[:, None])


@triton.jit
def _backward_keys_kernel(
    qkv, places, row_starts, documents, starts, cos, sin, gated, of_gated, gates, log_sums, of_qkv, of_logits,
    B, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, IS_ONE_TILE: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = _segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    other, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    there = other < count
    key_place = tl.load(places + row + other, mask=there, other=0)
    rows = qkv + row * (3 * D)
    key = _load(rows + D, other, count, column, 3 * D, D)
    value = _load(rows + 2 * D, other, count, column, 3 * D, D)
    of_key = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    of_value = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        place, begins, query, upstream, log_sum, gate, delta = _load_queries(
            rows, gated, of_gated, gates, log_sums, places, documents, row, slot, count, batch, T,
            D, WIDTH, HAS_DOCUMENTS,
        )  # fmt: skip
        weights, of_pairs = _pair_gradients(
            query, key, value, upstream, log_sum, delta, slot, other, begins, key_place, SCALE,
            HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_value = dot(tl.trans(weights.to(upstream.dtype)), upstream, of_value, INTERPRETED)
        of_pairs = of_pairs.to(query.dtype)
        of_key = dot(tl.trans(of_pairs), query, of_key, INTERPRETED)
        if IS_ONE_TILE:
            of_query = dot(of_pairs, key, tl.zeros((BLOCK, WIDTH), dtype=tl.float32), INTERPRETED)
            _store_queries(
                of_qkv, of_logits, of_query, gate, delta, place, row, slot, count, batch, cos, sin, starts, T,
                D, HALF, WIDTH, RESTARTS, INTERPRETED, PAIR,
            )  # fmt: skip
    position = positions_of(key_place, there, batch, starts, T, RESTARTS)
    of_key = turned(of_key, position, cos, sin, -1.0, qkv.dtype.element_ty, HALF, WIDTH, INTERPRETED)
    out = of_qkv + (row + other)[:, None] * (3 * D) + D + column[None]
    mask = there[:, None] & (column < D)[None]
    tl.store(out, of_key.to(of_qkv.dtype.element_ty), mask=mask)
    tl.store(out + D, of_value.to(of_qkv.dtype.element_ty), mask=mask)


@triton.jit
def _backward_queries_kernel(
    qkv, places, row_starts, documents, starts, cos, sin, gated, of_gated, gates, log_sums, of_qkv, of_logits,
    B, T, R, SCALE,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, RESTARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = _segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    slot, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    rows = qkv + row * (3 * D)
    place, begins, query, upstream, log_sum, gate, delta = _load_queries(
        rows, gated, of_gated, gates, log_sums, places, documents, row, slot, count, batch, T, D, WIDTH, HAS_DOCUMENTS
    )  # fmt: skip
    of_query = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key_place = tl.load(places + row + other, mask=other < count, other=0)
        key = _load(rows + D, other, count, column, 3 * D, D)
        value = _load(rows + 2 * D, other, count, column, 3 * D, D)
        _, of_pairs = _pair_gradients(
            query, key, value, upstream, log_sum, delta, slot, other, begins, key_place, SCALE,
            HAS_DOCUMENTS, INTERPRETED, BLOCK,
        )  # fmt: skip
        of_query = dot(of_pairs.to(key.dtype), key, of_query, INTERPRETED)
    _store_queries(
        of_qkv, of_logits, of_query, gate, delta, place, row, slot, count, batch, cos, sin, starts, T,
        D, HALF, WIDTH, RESTARTS, INTERPRETED, PAIR,
    )  # fmt: skip


def rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to T - 1, fp32 [T, half] each."""
    frequencies = rotary_frequencies(2 * half, base, torch.float32, device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _options(qkv: Tensor, selected: int, documents: Tensor | None) -> tuple[dict, int]:
    size = qkv.shape[2] // 3
    width = power_of_2(size)
    chosen = tiles.attention(qkv.dtype, qkv.device, selected, width)
    return dict(D=size, WIDTH=width, HAS_DOCUMENTS=documents is not None, INTERPRETED=INTERPRET) | chosen, chosen["BLOCK"]


def attend(
    qkv: Tensor, rows: Rows, scores: Tensor, selected: int, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each head, times its gates.

    Args:
        qkv: [E, B * k, 3d], queries and keys turned by their positions.
        rows: of the selection.
        scores: fp32 [B, E, T].
        selected: k.
        documents: int64 [B, T], where each token's document begins; None: one document a sequence.

    Returns:
        [E, B * k, d]; base-2 logarithms of the softmax denominators and gates, fp32 [E, B * k]. What lies behind a
        head's last row is undefined.
    """
    batch, heads, length = scores.shape
    capacity, size = qkv.shape[1], qkv.shape[2] // 3
    gated = qkv.new_empty((heads, capacity, size))
    log_sums, gates = (qkv.new_empty((heads, capacity), dtype=torch.float32) for _ in range(2))
    options, block = _options(qkv, selected, documents)
    _forward_kernel[(triton.cdiv(selected, block), heads, batch)](
        qkv, rows.places, rows.starts, scores, documents, gated, log_sums, gates, batch, heads, length, capacity,
        size**-0.5, **options,
    )  # fmt: skip
    return gated, log_sums, gates


def attend_backward(
    qkv: Tensor,
    rows: Rows,
    saved: tuple[Tensor, Tensor, Tensor],
    of_gated: Tensor,
    selected: int,
    length: int,
    documents: Tensor | None,
    rotation: Rotation,
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k and v before their rotation, [E, B * k, 3d], and of the router's logits, [E, B * k, PAIR].

    The latter are the sums of their columns: in half precision one column would round them.

    Args:
        saved: what ``attend`` returned.
        of_gated: the gradient of the first of these.
        length: T.
    """
    heads, batch = rows.starts.shape[0], rows.starts.shape[1] - 1
    capacity, size = qkv.shape[1], qkv.shape[2] // 3
    gated, log_sums, gates = saved
    of_qkv, of_logits = torch.empty_like(qkv), qkv.new_empty((heads, capacity, PAIR))
    options, block = _options(qkv, selected, documents)
    options |= dict(HALF=rotation.cos.shape[1], RESTARTS=rotation.starts is not None, PAIR=PAIR)
    arguments = (
        qkv, rows.places, rows.starts, documents, rotation.starts, rotation.cos, rotation.sin, gated, of_gated, gates,
        log_sums, of_qkv, of_logits, batch, length, capacity, size**-0.5,
    )  # fmt: skip
    grid = (triton.cdiv(selected, block), heads, batch)
    _backward_keys_kernel[grid](*arguments, IS_ONE_TILE=grid[0] == 1, **options)
    if grid[0] > 1:
        _backward_queries_kernel[grid](*arguments, **options)
    return of_qkv, of_logits
