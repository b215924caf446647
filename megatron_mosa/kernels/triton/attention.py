"""Causal attention among the selected tokens of each head, with rotary positions of the original sequence.

Slots are in position order, so that causality is an order of slots: a key is visible if its slot is not behind the
query's, and with documents if its token does not lie before the beginning of the query's document. Queries and keys
come turned by their positions.
"""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.naive import rotary_frequencies
from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, power_of_2
from megatron_mosa.kernels.triton.rows import Rows, bits_of, sequence_and_token

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def segment(row_starts, head, batch, B, R):
    """The first row of a head in a sequence, as int64 among the rows of all heads, and how many there are."""
    begin = tl.load(row_starts + head * (B + 1) + batch)
    count = tl.load(row_starts + head * (B + 1) + batch + 1) - begin
    return head.to(tl.int64) * R + begin, count


@triton.jit
def beginning_of(documents, place, there, T, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr):
    """The place at which a query's document begins."""
    if HAS_DOCUMENTS:
        batch, token = sequence_and_token(place, SHIFT)
        start = tl.load(documents + batch.to(tl.int64) * T + token, mask=there, other=0).to(tl.int32)
        return (batch << SHIFT) + start
    return tl.zeros_like(place)


@triton.jit
def load_tile(rows, slot, count, column, STRIDE: tl.constexpr, D: tl.constexpr):
    """A tile of some slots' rows, [BLOCK, WIDTH]."""
    return tl.load(rows + slot[:, None] * STRIDE + column[None], (slot < count)[:, None] & (column < D)[None], 0.0)


@triton.jit(do_not_specialize=["B"])
def _forward_kernel(
    qkv, places, row_starts, scores, documents, gated, log_sums, gates, B, E, T, R, SCALE,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    row, count = segment(row_starts, head, batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    slot, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    here = slot < count
    place = tl.load(places + row + slot, mask=here, other=0)
    begins = beginning_of(documents, place, here, T, HAS_DOCUMENTS, SHIFT)
    rows = qkv + row * (3 * D)
    query = load_tile(rows, slot, count, column, 3 * D, D)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    result = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        other = first + tl.arange(0, BLOCK)
        key = load_tile(rows + D, other, count, column, 3 * D, D)
        value = load_tile(rows + 2 * D, other, count, column, 3 * D, D)
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
    gate = tl.load(scores + (batch.to(tl.int64) * E + head) * T + place - (batch << SHIFT), mask=here, other=0.0)
    result *= (gate / total)[:, None]
    out = gated + (row + slot)[:, None] * D + column[None]
    tl.store(out, result.to(gated.dtype.element_ty), mask=here[:, None] & (column < D)[None])
    tl.store(log_sums + row + slot, largest + tl.log2(total), mask=here)
    tl.store(gates + row + slot, gate, mask=here)


def rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to T - 1, fp32 [T, half] each; the last few are kept.

    Each stream has its own, or one could read what another has yet to write. What a CUDA graph records is its own, too.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _rotary_table(length, half, base, device)
    return _kept_rotary_table(length, half, base, device, torch.cuda.current_stream(device).cuda_stream)


def _rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = rotary_frequencies(2 * half, base, torch.float32, device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=8)
def _kept_rotary_table(length: int, half: int, base: float, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    return _rotary_table(length, half, base, device)


def launch_options(
    qkv: Tensor, selected: int, length: int, documents: Tensor | None, is_backward: bool = False
) -> tuple[dict, int]:
    """What either direction is compiled with, and how many slots a tile has."""
    size = qkv.shape[2] // 3
    width = power_of_2(size)
    chosen = tiles.attention(qkv.dtype, qkv.device, selected, width, is_backward)
    options = dict(
        D=size, WIDTH=width, HAS_DOCUMENTS=documents is not None, SHIFT=bits_of(length), INTERPRETED=INTERPRET
    )
    return options | chosen, chosen["BLOCK"]


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
    options, block = launch_options(qkv, selected, length, documents)
    _forward_kernel[(triton.cdiv(selected, block), heads, batch)](
        qkv, rows.places, rows.starts, scores, documents, gated, log_sums, gates, batch, heads, length, capacity,
        size**-0.5, **options,
    )  # fmt: skip
    return gated, log_sums, gates
