"""Attention among selected tokens as an operator of torch, with fake kernel, gradient and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_mosa.kernels.naive import rotary_dim
from megatron_mosa.kernels.triton import scattered
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
    totals: list[Tensor],
) -> list[Tensor]:
    """Return the output [B, T, h], and for its gradient: qkv, gated attention, log sums, gates and ``Rows``.

    ``totals`` are ``GradientTotals`` for the backward pass, or empty.
    """
    states, starts = with_contiguous_rows(hidden_states), optional_contiguous(document_starts)
    sequences, _ = scattered.chunks_of(indices.shape, states)
    rows = rows_of(indices.contiguous(), states.shape[1], sequences)
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, starts if restart_rotary else None)
    qkv = gathered_product(states, rows, qkv_weight, rotation)  # [E, R, 3h']
    gated, log_sums, gates = attend(qkv, rows, scores.contiguous(), starts)
    output = scattered.scattered_product(gated, proj_weight, rows, states, is_full=is_full)
    return [output, qkv, gated, log_sums, gates, *rows]


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


def _gradients(
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
    *totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the states, the router, W_QKV and W_O; of the two last the totals, if there are any."""
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
    dw_qkv, dw_o, replaces = totals or (*_empty_gradients(qkv_weight, proj_weight), None)
    drouter = _empty_gradients(router_weight)[0]
    weight_gradient(states, rows, dqkv, dw_qkv, 3, gating.dlogits, drouter, replaces)
    weight_gradient(doutput, rows, gated, dw_o.transpose(1, 2), replaces=replaces)
    return dx, drouter, dw_qkv, dw_o


_BACKWARD = (
    "Tensor doutput, Tensor hidden_states, Tensor router_weight, Tensor qkv_weight, Tensor proj_weight, "
    "Tensor? document_starts, Tensor qkv, Tensor gated, Tensor log_sums, Tensor gates, Tensor[] row_tensors, "
    "float rotary_percent, float rotary_base, bool restart_rotary, bool is_full"
)


@torch.library.custom_op(
    "megatron_mosa::fused_attention_backward",
    mutates_args=(),
    schema=f"({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def fused_attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the states, the router, W_QKV and W_O."""
    return _gradients(*arguments)


@torch.library.custom_op(
    "megatron_mosa::fused_attention_backward_to_totals",
    mutates_args=("qkv_total", "proj_total"),
    schema=f"({_BACKWARD}, Tensor(a!) qkv_total, Tensor(b!) proj_total, Tensor replaces) -> (Tensor, Tensor)",
)
def fused_attention_backward_to_totals(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states and the router, and add those of W_QKV and W_O to ``GradientTotals``."""
    return _gradients(*arguments)[:2]


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


@fused_attention_backward_to_totals.register_fake
def _(doutput: Tensor, hidden_states: Tensor, router_weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), _empty_gradients(router_weight)[0]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    states, router, _, _, qkv_weight, proj_weight, percent, base, starts, restarts, is_full, totals = inputs
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for all outputs but the first
    ctx.save_for_backward(states, router, qkv_weight, proj_weight, starts, *output[1:], *totals)
    ctx.options = percent, base, restarts, is_full


def _backward(ctx: Any, doutputs: list[Tensor]) -> tuple[Tensor | list[None] | None, ...]:
    saved, end = ctx.saved_tensors, 9 + len(Rows._fields)
    arguments, totals = (doutputs[0], *saved[:9], list(saved[9:end]), *ctx.options), saved[end:]
    if totals:
        dx, drouter = fused_attention_backward_to_totals(*arguments, *totals)
        dw_qkv, dw_o = None, None
    else:
        dx, drouter, dw_qkv, dw_o = fused_attention_backward(*arguments)
    return dx, drouter, None, None, dw_qkv, dw_o, *[None] * 5, [None] * len(totals)


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


@register_flop_formula(
    [torch.ops.megatron_mosa.fused_attention_backward, torch.ops.megatron_mosa.fused_attention_backward_to_totals]
)
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
