"""The kernels as operators of torch, with fake kernels, gradients and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_mosa.kernels.naive import rotary_dim
from megatron_mosa.kernels.triton import selection
from megatron_mosa.kernels.triton.attention import attend, rotary_table
from megatron_mosa.kernels.triton.attention_backward import attend_backward
from megatron_mosa.kernels.triton.common import with_contiguous_rows
from megatron_mosa.kernels.triton.gathered import PAIR, Gating, Rotation, gathered_product
from megatron_mosa.kernels.triton.rows import Rows, rows_of
from megatron_mosa.kernels.triton.scattered import scattered_product
from megatron_mosa.kernels.triton.weights import weight_gradient


@torch.library.custom_op("megatron_mosa::fused_router_scores", mutates_args=())
def fused_router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """sigmoid(X w), fp32 [B, E, T]; ``fused_attention`` returns the router's gradient."""
    return selection.router_scores(hidden_states, router_weight)


@fused_router_scores.register_fake
def _(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    shape = (hidden_states.shape[0], router_weight.shape[0], hidden_states.shape[1])
    return hidden_states.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("megatron_mosa::fused_select_tokens", mutates_args=())
def fused_select_tokens(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    """As ``naive.select_tokens`` of whole sequences, for fp32 scores from 0 on."""
    return selection.select(scores, num_selected, include_first_token)


@fused_select_tokens.register_fake
def _(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_selected), dtype=torch.int64)


@torch.library.custom_op("megatron_mosa::fused_select_above", mutates_args=())
def fused_select_above(
    scores: Tensor, thresholds: Tensor, capacity: int, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    """As ``naive.select_above`` with a capacity, for fp32 scores."""
    return selection.select_above(scores, thresholds, capacity, document_starts, feedback, share)


@fused_select_above.register_fake
def _(
    scores: Tensor, thresholds: Tensor, capacity: int, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], capacity), dtype=torch.int64)


@torch.library.custom_op("megatron_mosa::fused_count_scores", mutates_args=("histogram",))
def fused_count_scores(scores: Tensor, histogram: Tensor) -> None:
    """As ``naive.count_scores``, for fp32 scores."""
    selection.count_scores(scores, histogram)


def _rotation(states: Tensor, proj_weight: Tensor, percent: float, base: float, documents: Tensor | None) -> Rotation:
    half = rotary_dim(proj_weight.shape[1], percent) // 2
    return Rotation(*rotary_table(states.shape[1], half, base, states.device), documents)


@torch.library.custom_op("megatron_mosa::fused_attention", mutates_args=())
def fused_attention(
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
    deterministic: bool,
) -> list[Tensor]:
    """The output, [B, T, h], and what its gradient needs: q, k and v, gated attention, log sums, gates, rows."""
    states, scores = with_contiguous_rows(hidden_states), scores.contiguous()
    selected, length = indices.shape[2], states.shape[1]
    documents = None if document_starts is None else document_starts.contiguous()
    rows = rows_of(indices.contiguous(), length)
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, documents if restart_rotary else None)
    qkv = gathered_product(states, rows, qkv_weight, rotation)  # [E, B * k, 3h']
    gated, log_sums, gates = attend(qkv, rows, scores, selected, documents)
    output = scattered_product(gated, proj_weight, rows, states, selected, deterministic=deterministic)
    return [output, qkv, gated, log_sums, gates, *rows]


@fused_attention.register_fake
def _(
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
    deterministic: bool,
) -> list[Tensor]:
    batch, length, _ = hidden_states.shape
    _, heads, selected = indices.shape
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
    of_output: Tensor,
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    document_starts: Tensor | None,
    qkv: Tensor,
    gated: Tensor,
    log_sums: Tensor,
    gates: Tensor,
    rows: list[Tensor],
    selected: int,
    rotary_percent: float,
    rotary_base: float,
    restart_rotary: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the states, the router, W_QKV and W_O."""
    states, of_output = with_contiguous_rows(hidden_states), with_contiguous_rows(of_output)
    length, of = states.shape[1], Rows(*rows)
    documents = None if document_starts is None else document_starts.contiguous()
    rotation = _rotation(states, proj_weight, rotary_percent, rotary_base, documents if restart_rotary else None)
    gating = Gating(gated, gates, torch.empty_like(gates), gated.new_empty((*gates.shape, PAIR)))
    upstreams = gathered_product(of_output, of, proj_weight.transpose(1, 2), gating=gating)  # [E, B * k, h']
    of_qkv = attend_backward(qkv, of, upstreams, log_sums, gating.deltas, selected, length, documents, rotation)
    del upstreams
    of_logits = gating.of_logits
    of_states = scattered_product(
        of_qkv,
        qkv_weight.transpose(1, 2),
        of,
        states,
        selected,
        parts=3,
        pairs=(of_logits, router_weight.to(of_logits.dtype).contiguous()),
        deterministic=deterministic,
    )
    # The weights' come last, since by now no products wait in memory for their sum.
    of_router, of_qkv_weight, of_proj_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        for weight in (router_weight, qkv_weight, proj_weight)
    )
    weight_gradient(states, of, of_qkv, of_qkv_weight, parts=3, pairs=of_logits, pair_output=of_router)
    weight_gradient(of_output, of, gated, of_proj_weight.transpose(1, 2))
    return of_states, of_router, of_qkv_weight, of_proj_weight


@fused_attention_backward.register_fake
def _(
    of_output: Tensor,
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_router, of_qkv_weight, of_proj_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        for weight in (router_weight, qkv_weight, proj_weight)
    )
    return torch.empty_like(hidden_states), of_router, of_qkv_weight, of_proj_weight


def _keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    states, router, _, indices, qkv_weight, proj_weight, percent, base, documents, restarts, deterministic = inputs
    ctx.set_materialize_grads(False)  # or autograd makes zeros for all outputs but the first
    ctx.save_for_backward(states, router, qkv_weight, proj_weight, documents, *output[1:])
    ctx.options = indices.shape[2], percent, base, restarts, deterministic


def _backward(ctx: Any, of_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    of_states, of_router, of_qkv, of_proj = fused_attention_backward(
        of_outputs[0], *saved[:9], list(saved[9:]), *ctx.options
    )
    return of_states, of_router, None, None, of_qkv, of_proj, None, None, None, None, None


fused_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.megatron_mosa.fused_router_scores)
def _(states: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * states[0] * states[1] * states[2] * weight[0]


@register_flop_formula(torch.ops.megatron_mosa.fused_attention)
def _attention_flops(
    states: tuple[int, ...], router: object, scores: object, indices: tuple[int, ...], *_: Any, **__: object
) -> int:
    """As the naive path is counted: every query with every key."""
    batch, heads, selected = indices
    size = _[1][1]
    return batch * heads * (8 * states[2] * size * selected + 4 * size * selected**2)


@register_flop_formula(torch.ops.megatron_mosa.fused_attention_backward)
def _(
    of_output: object,
    states: tuple[int, ...],
    router: object,
    qkv_weight: object,
    proj_weight: tuple[int, ...],
    documents: object,
    qkv: tuple[int, ...],
    *rest: Any,
    **__: object,
) -> int:
    heads, rows, _ = qkv
    selected = rest[4]
    return 2 * _attention_flops(states, router, None, (rows // selected, heads, selected), qkv_weight, proj_weight)
