"""Attention among selected tokens as an operator of torch, with fake kernel, gradient and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_mosa.kernels.naive import rotary_dim
from megatron_mosa.kernels.triton import scattered, specialized
from megatron_mosa.kernels.triton.attention import attend, rotary_table
from megatron_mosa.kernels.triton.attention_backward import attend_backward
from megatron_mosa.kernels.triton.common import optional_contiguous, with_contiguous_rows
from megatron_mosa.kernels.triton.gathered import PAIR, Gating, Rotation, gathered_product
from megatron_mosa.kernels.triton.rows import Rows, rows_of
from megatron_mosa.kernels.triton.weights import weight_gradient


def _rotation(states: Tensor, proj_weight: Tensor, percent: float, base: float, starts: Tensor | None) -> Rotation:
    half = rotary_dim(proj_weight.shape[1], percent) // 2
    return Rotation(*rotary_table(states.shape[1], half, base, states.device), starts)


def launch_attention(
    hidden_states: Tensor,
    router_weight: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    rotary_percent: float,
    rotary_base: float,
    document_starts: Tensor | None,
    restart_rotary: bool,
    is_full: bool,
    addend: Tensor | None,
) -> list[Tensor]:
    """Return the output [B, T, h], and for its gradient: qkv, gated attention, log sums, gates and ``Rows``."""
    states, starts = with_contiguous_rows(hidden_states), optional_contiguous(document_starts)
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, starts if restart_rotary else None)
    addend = None if addend is None else with_contiguous_rows(addend)
    return _attention(states, scores, indices, qkv_weight, proj_weight, rotation, starts, is_full, None, addend)


def _attention(
    states: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    rotation: Rotation,
    starts: Tensor | None,
    is_full: bool,
    small_bytes: int | None,
    addend: Tensor | None = None,
) -> list[Tensor]:
    sequences, _ = scattered.chunks_of(indices.shape, states, small_bytes)
    rows = rows_of(indices.contiguous(), states.shape[1], sequences)
    qkv = specialized.qkv_product(states, rows, qkv_weight, rotation)  # [E, R, 3h']
    gated, log_sums, gates = attend(qkv, rows, scores.contiguous(), starts)
    output = scattered.scattered_product(
        gated, proj_weight, rows, states, is_full=is_full, small_bytes=small_bytes, addend=addend
    )
    return [output, qkv, gated, log_sums, gates, *rows]


def launch_prompt(
    hidden_states: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    rotary_percent: float,
    rotary_base: float,
    small_bytes: int,
) -> tuple[Tensor, Tensor, Rows]:
    """Return output [B, T, h], qkv [E, R, 3h'] and rows of whole sequences, some of whose slots may be empty."""
    states = with_contiguous_rows(hidden_states)
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, None)
    output, qkv, _, _, _, *rows = _attention(
        states, scores, indices, qkv_weight, proj_weight, rotation, None, False, small_bytes
    )
    return output, qkv, Rows(*rows)


fused_attention = torch.library.custom_op("megatron_mosa::fused_attention", mutates_args=())(launch_attention)


@fused_attention.register_fake
def _(
    hidden_states: Tensor,
    router_weight: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *_: object,
) -> list[Tensor]:
    batch, length, _width = hidden_states.shape
    _batch, heads, selected = indices.shape
    rows, size = batch * selected, proj_weight.shape[1]
    return [
        torch.empty_like(hidden_states),
        hidden_states.new_empty((heads, rows, 3 * size)),
        hidden_states.new_empty((heads, rows, size)),
        hidden_states.new_empty((heads, rows), dtype=torch.float32),
        hidden_states.new_empty((heads, rows), dtype=torch.float32),
        indices.new_empty((heads, rows), dtype=torch.int32),
        indices.new_empty((heads, batch + 1), dtype=torch.int32),
        indices.new_empty(batch * length + 1, dtype=torch.int32),
        indices.new_empty(indices.numel(), dtype=torch.int32),
    ]


@torch.library.custom_op("megatron_mosa::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    doutput: Tensor,
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    document_starts: Tensor | None,
    qkv: Tensor,
    gated: Tensor,
    log_sums: Tensor,
    gates: Tensor,
    row_tensors: list[Tensor],
    rotary_percent: float,
    rotary_base: float,
    restart_rotary: bool,
    is_full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the states, the router, W_QKV and W_O."""
    states, doutput = with_contiguous_rows(hidden_states), with_contiguous_rows(doutput)
    rows, starts = Rows(*row_tensors), optional_contiguous(document_starts)
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, starts if restart_rotary else None)
    gating = Gating(gated, gates, torch.empty_like(gates), gated.new_empty((*gates.shape, PAIR)))
    dattended = gathered_product(doutput, rows, proj_weight.transpose(1, 2), gating=gating)  # [E, R, h']
    dqkv = attend_backward(qkv, rows, dattended, log_sums, gating.deltas, starts, rotation)
    del dattended
    pairs = gating.dlogits, router_weight.to(gating.dlogits.dtype).contiguous()
    dx = scattered.scattered_product(dqkv, qkv_weight.transpose(1, 2), rows, states, pairs, is_full)
    # Allocated last, when the products before their sum are no longer in memory.
    drouter, dw_qkv, dw_o = _empty_gradients(router_weight, qkv_weight, proj_weight)
    specialized.qkv_weight_gradient(states, rows, dqkv, dw_qkv, gating.dlogits, drouter)
    weight_gradient(doutput, rows, gated, dw_o.transpose(1, 2))
    return dx, drouter, dw_qkv, dw_o


def _empty_gradients(*weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


@fused_attention_backward.register_fake
def _(
    doutput: Tensor,
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drouter, dw_qkv, dw_o = _empty_gradients(router_weight, qkv_weight, proj_weight)
    return torch.empty_like(hidden_states), drouter, dw_qkv, dw_o


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    states, router, _, _, qkv_weight, proj_weight, percent, base, starts, restarts, is_full, addend = inputs
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for all outputs but the first
    ctx.save_for_backward(states, router, qkv_weight, proj_weight, starts, *output[1:])
    ctx.options = percent, base, restarts, is_full
    ctx.has_addend = addend is not None


def _backward(ctx: Any, doutputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, drouter, dw_qkv, dw_o = fused_attention_backward(doutputs[0], *saved[:9], list(saved[9:]), *ctx.options)
    return dx, drouter, None, None, dw_qkv, dw_o, *(None,) * 5, doutputs[0] if ctx.has_addend else None


fused_attention.register_autograd(_backward, setup_context=_setup_context)


def _flops(width: int, batch: int, heads: int, selected: int, size: int) -> int:
    """Count like the naive path: logits of every query with every key."""
    return batch * heads * (8 * width * size * selected + 4 * size * selected**2)


@register_flop_formula(torch.ops.megatron_mosa.fused_attention)
def _(
    states: tuple[int, ...],
    router_weight: object,
    scores: object,
    indices: tuple[int, ...],
    qkv_weight: object,
    proj_weight: tuple[int, ...],
    *_: object,
    **__: object,
) -> int:
    batch, heads, selected = indices
    return _flops(states[2], batch, heads, selected, proj_weight[1])


@register_flop_formula(torch.ops.megatron_mosa.fused_attention_backward)
def _(
    doutput: object,
    states: tuple[int, ...],
    router_weight: object,
    qkv_weight: object,
    proj_weight: tuple[int, ...],
    starts: object,
    qkv: tuple[int, ...],
    *_: object,
    **__: object,
) -> int:
    batch, heads, capacity = states[0], *qkv[:2]
    return 2 * _flops(states[2], batch, heads, capacity // batch, proj_weight[1])
