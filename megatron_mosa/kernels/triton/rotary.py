"""Dense heads' packed projection to queries, keys and values: one pass forward, one pass back, no transposed copies."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.naive import rotary_dim
from megatron_mosa.kernels.triton.attention import rotary_table
from megatron_mosa.kernels.triton.common import power_of_2, with_contiguous_rows

ROWS = 4  # tokens of one program: 16 % faster than with 32 at 2048 x 8 tokens of 16 heads of 128 (H200)


@triton.jit
def _rotary_kernel(
    p_qkv, p_q, p_k, p_v, p_cos, p_sin, p_starts, N, B, T, G, Q,
    stride_qt, stride_qb, stride_qh, stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh,
    HALF: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Rows of p_qkv, [T * B, G, Q + 2, D], to queries, keys and values; BACKWARD: their gradients to those of the rows.

    Gradients are rotated back, by the negative angle.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, WIDTH)
    i_token, i_batch = i_row // B, i_row % B
    is_row, is_column = i_row < N, i_column < D
    mask = is_row[:, None] & is_column[None]
    position = i_token
    if HAS_STARTS:
        position -= tl.load(p_starts + i_batch.to(tl.int64) * T + i_token, mask=is_row, other=0).to(tl.int32)
    # Column c < HALF has its partner HALF columns on, and the next HALF columns theirs before them.
    is_rotated = i_column < 2 * HALF
    o_angle = position[:, None] * HALF + tl.where(i_column < HALF, i_column, i_column - HALF)[None]
    cos = tl.load(p_cos + o_angle, mask=is_row[:, None] & is_rotated[None], other=1.0)
    sin = tl.load(p_sin + o_angle, mask=is_row[:, None] & is_rotated[None], other=0.0)
    sin = tl.where(((i_column < HALF) != BACKWARD)[None], -sin, sin)
    o_partner = tl.where(is_rotated, tl.where(i_column < HALF, HALF, -HALF), 0)[None]
    o_row = i_row.to(tl.int64)[:, None] * (G * (Q + 2) * D) + i_column[None]
    o_token, o_batch = i_token.to(tl.int64)[:, None], i_batch.to(tl.int64)[:, None]
    o_q = o_token * stride_qt + o_batch * stride_qb + i_column[None]
    o_k = o_token * stride_kt + o_batch * stride_kb + i_column[None]
    o_v = o_token * stride_vt + o_batch * stride_vb + i_column[None]
    for i_group in range(G):
        for i_part in range(Q + 1):  # the group's queries, and its key
            packed = p_qkv + o_row + (i_group * (Q + 2) + i_part) * D
            if i_part < Q:
                split = p_q + o_q + (i_group * Q + i_part) * stride_qh
            else:
                split = p_k + o_k + i_group * stride_kh
            if BACKWARD:
                source, target = split, packed
            else:
                source, target = packed, split
            states = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            partners = tl.load(source + o_partner, mask=mask, other=0.0).to(tl.float32)
            tl.store(target, (states * cos + partners * sin).to(target.dtype.element_ty), mask=mask)
        packed = p_qkv + o_row + (i_group * (Q + 2) + Q + 1) * D
        value = p_v + o_v + i_group * stride_vh
        if BACKWARD:
            tl.store(packed, tl.load(value, mask=mask, other=0.0), mask=mask)
        else:
            tl.store(value, tl.load(packed, mask=mask, other=0.0), mask=mask)


def _launch(
    qkv: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    percent: float,
    base: float,
    starts: Tensor | None,
    backward: bool,
) -> None:
    length, batch, groups, slots, size = qkv.shape
    half = rotary_dim(size, percent) // 2
    width = power_of_2(size)
    _rotary_kernel[(triton.cdiv(length * batch, ROWS),)](
        qkv, *parts, *rotary_table(length, half, base, qkv.device), starts, length * batch, batch, length, groups,
        slots - 2, *(stride for part in parts for stride in part.stride()[:3]),
        HALF=half, D=size, WIDTH=width, ROWS=ROWS, BACKWARD=backward, HAS_STARTS=starts is not None,
    )  # fmt: skip


@torch.library.custom_op("megatron_mosa::fused_split_heads", mutates_args=())
def fused_split_heads(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, B, H, h'], keys and values [T, B, G, h'], of [T, B, G, H / G + 2, h']."""
    qkv = qkv.contiguous()
    length, batch, groups, slots, size = qkv.shape
    query = qkv.new_empty((length, batch, groups * (slots - 2), size))
    key, value = (qkv.new_empty((length, batch, groups, size)) for _ in range(2))
    starts = None if document_starts is None else document_starts.contiguous()
    _launch(qkv, (query, key, value), rotary_percent, rotary_base, starts, backward=False)
    return query, key, value


@fused_split_heads.register_fake
def _(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, groups, slots, size = qkv.shape
    key, value = (qkv.new_empty((length, batch, groups, size)) for _ in range(2))
    return qkv.new_empty((length, batch, groups * (slots - 2), size)), key, value


@torch.library.custom_op("megatron_mosa::fused_split_heads_backward", mutates_args=())
def fused_split_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None
) -> Tensor:
    """The gradient of the packed projection, whole, from those of its parts (of any strides)."""
    parts = with_contiguous_rows(dq), with_contiguous_rows(dk), with_contiguous_rows(dv)
    length, batch, groups, size = dk.shape
    dqkv = dk.new_empty((length, batch, groups, dq.shape[2] // groups + 2, size))
    starts = None if document_starts is None else document_starts.contiguous()
    _launch(dqkv, parts, rotary_percent, rotary_base, starts, backward=True)
    return dqkv


@fused_split_heads_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, *_: object) -> Tensor:
    length, batch, groups, size = dk.shape
    return dk.new_empty((length, batch, groups, dq.shape[2] // groups + 2, size))


def _keep(ctx: Any, inputs: tuple, output: object) -> None:
    _, *ctx.rotation, starts = inputs
    ctx.save_for_backward(starts)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return fused_split_heads_backward(dq, dk, dv, *ctx.rotation, *ctx.saved_tensors), None, None, None


fused_split_heads.register_autograd(_backward, setup_context=_keep)
