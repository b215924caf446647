"""Causal attention among the selected tokens of each head, with rotary positions of the original sequence.

Slots are in position order, so causality is an order of slots: a key is visible if its slot does not follow the query's
and, with documents, if its token does not precede the query's document. Queries and keys arrive rotated.
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
from megatron_mosa.kernels.triton.common import INTERPRET, cdiv, dot, launch, power_of_2
from megatron_mosa.kernels.triton.rows import Rows, unpack_index

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def row_range(p_cu_seqlens, i_head, i_batch, B, R):
    """Return the first row of a head in a sequence, int64 among the rows of all heads, and the number of rows."""
    begin = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch)
    count = tl.load(p_cu_seqlens + i_head * (B + 1) + i_batch + 1) - begin
    return i_head.to(tl.int64) * R + begin, count


@triton.jit
def document_index(p_starts, b_index, m_row, T, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the packed index of the first token in each query's document."""
    if HAS_DOCUMENTS:
        i_batch, i_token = unpack_index(b_index, SHIFT)
        b_start = tl.load(p_starts + i_batch.to(tl.int64) * T + i_token, mask=m_row, other=0).to(tl.int32)
        return (i_batch << SHIFT) + b_start
    return tl.zeros_like(b_index)


@triton.jit
def load_tile(p_rows, i_slot, count, o_column, STRIDE: tl.constexpr, D: tl.constexpr):
    """Load the rows of some slots, [BLOCK, WIDTH]."""
    mask = (i_slot < count)[:, None] & (o_column < D)[None]
    return tl.load(p_rows + i_slot[:, None] * STRIDE + o_column[None], mask, 0.0)


@triton.jit(do_not_specialize=["B"])
def _forward_kernel(
    p_qkv, p_token_indices, p_cu_seqlens, p_scores, p_starts, p_gated, p_log_sums, p_gates, B, E, T, R, SCALE,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_head, i_batch = tl.program_id(1), tl.program_id(2)
    o_row, count = row_range(p_cu_seqlens, i_head, i_batch, B, R)
    if tl.program_id(0) * BLOCK >= count:
        return
    i_query, o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    m_query = i_query < count
    b_index = tl.load(p_token_indices + o_row + i_query, mask=m_query, other=0)
    b_document = document_index(p_starts, b_index, m_query, T, HAS_DOCUMENTS, SHIFT)
    p_rows = p_qkv + o_row * (3 * D)
    b_q = load_tile(p_rows, i_query, count, o_column, 3 * D, D)
    b_max = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    b_out = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        i_key = start + tl.arange(0, BLOCK)
        b_k = load_tile(p_rows + D, i_key, count, o_column, 3 * D, D)
        b_v = load_tile(p_rows + 2 * D, i_key, count, o_column, 3 * D, D)
        b_logits = dot(b_q, tl.trans(b_k), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), INTERPRETED)
        m_visible = i_query[:, None] >= i_key[None]
        if HAS_DOCUMENTS:
            b_key_index = tl.load(p_token_indices + o_row + i_key, mask=i_key < count, other=0)
            m_visible = m_visible & (b_key_index[None] >= b_document[:, None])
        b_logits = tl.where(m_visible, b_logits * (SCALE * LOG2_E), float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
        b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # for queries without a visible key so far
        b_weights = tl.exp2(b_logits - b_safe_max[:, None])
        b_scale = tl.exp2(b_max - b_safe_max)
        b_sum = b_sum * b_scale + tl.sum(b_weights, axis=1)
        b_out = dot(b_weights.to(b_v.dtype), b_v, b_out * b_scale[:, None], INTERPRETED)
        b_max = b_new_max
    o_score = (i_batch.to(tl.int64) * E + i_head) * T
    b_gate = tl.load(p_scores + o_score + b_index - (i_batch << SHIFT), mask=m_query, other=0.0)
    b_out *= (b_gate / b_sum)[:, None]
    p_out = p_gated + (o_row + i_query)[:, None] * D + o_column[None]
    tl.store(p_out, b_out.to(p_gated.dtype.element_ty), mask=m_query[:, None] & (o_column < D)[None])
    tl.store(p_log_sums + o_row + i_query, b_max + tl.log2(b_sum), mask=m_query)
    tl.store(p_gates + o_row + i_query, b_gate, mask=m_query)


_Table = tuple[Tensor, Tensor]
_Key = tuple[int, int, float, torch.device]
MOST_TABLES = 8
_TABLES: dict[tuple[_Key, int], _Table] = {}  # by stream, too: one could read what another has yet to write
_CAPTURED: dict[_Key, _Table] = {}  # read by CUDA graphs, so never dropped


def rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions 0 to T - 1, fp32 [T, half] each, from a small cache.

    What is captured in a CUDA graph reads the table of a call before the capture, which ``torch.cuda.graph`` waits for.
    Computed in the graph, it would be eight kernels for each layer and direction.
    """
    key = length, half, base, device
    if device.type != "cuda":
        return _rotary_table(*key)
    if torch.cuda.is_current_stream_capturing():
        known = _CAPTURED.get(key) or next((table for (other, _), table in _TABLES.items() if other == key), None)
        if known is None:
            return _rotary_table(*key)  # the graph's own memory
        return _CAPTURED.setdefault(key, known)
    of_stream = key, torch.cuda.current_stream(device).cuda_stream
    table = _TABLES.pop(of_stream, None) or _rotary_table(*key)
    _TABLES[of_stream] = table  # last in order: it was used last
    if len(_TABLES) > MOST_TABLES:
        _TABLES.pop(next(iter(_TABLES)), None)  # autograd's thread may have
    return table


def _rotary_table(length: int, half: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = rotary_frequencies(2 * half, base, torch.float32, device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def launch_options(qkv: Tensor, rows: Rows, starts: Tensor | None, most: int, is_backward: bool = False) -> dict:
    """Return constexprs and launch options of the forward and backward kernels; ``most``: rows of a sequence."""
    size = qkv.shape[2] // 3
    width = power_of_2(size)
    options = dict(D=size, WIDTH=width, HAS_DOCUMENTS=starts is not None, SHIFT=rows.shift, INTERPRETED=INTERPRET)
    return options | tiles.attention(qkv.dtype, qkv.device, most, width, is_backward)


def attend(qkv: Tensor, rows: Rows, scores: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of each head, times its gates.

    Args:
        qkv: [E, R, 3h'], queries and keys rotated by their positions.
        rows: the rows of the selection.
        scores: fp32 [B, E, T].
        starts: int64 [B, T], like ``Documents.starts``; None: each sequence is one document.

    Returns:
        Gated attention [E, R, h'], base-2 logarithms of the softmax denominators, and gates, fp32 [E, R] each.
    """
    batch, heads, selected, length = rows.shape
    capacity, size = qkv.shape[1], qkv.shape[2] // 3
    gated = qkv.new_empty((heads, capacity, size))
    log_sums, gates = (qkv.new_empty((heads, capacity), dtype=torch.float32) for _ in range(2))
    options = launch_options(qkv, rows, starts, selected)
    launch(
        _forward_kernel, (cdiv(selected, options["BLOCK"]), heads, batch),
        qkv, rows.token_indices, rows.cu_seqlens, scores, starts, gated, log_sums, gates, batch, heads, length,
        capacity, size**-0.5, **options,
    )  # fmt: skip
    return gated, log_sums, gates
