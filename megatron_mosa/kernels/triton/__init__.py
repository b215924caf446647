"""MoSA in Triton: the functions of ``naive`` without the gathered input and the unscattered output in memory."""

from __future__ import annotations

from torch import Tensor

from megatron_mosa.kernels import naive
from megatron_mosa.kernels.documents import Documents
from megatron_mosa.kernels.triton.elementwise import accumulate, fused_swiglu
from megatron_mosa.kernels.triton.loss import linear_cross_entropy
from megatron_mosa.kernels.triton.ops import (
    fused_attention,
    fused_count_scores,
    fused_router_scores,
    fused_select_above,
    fused_select_tokens,
)
from megatron_mosa.kernels.triton.rotary import fused_split_heads
from megatron_mosa.kernels.triton.selection import count_followed

__all__ = [
    "accumulate", "count_above", "count_scores", "linear_cross_entropy", "router_scores", "select_above",
    "select_tokens", "selected_attention", "split_heads", "swiglu",
]  # fmt: skip


def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """As ``naive.router_scores``, without a gradient: that goes from ``selected_attention`` to the router."""
    return fused_router_scores(hidden_states.detach(), router_weight.detach())


def select_tokens(
    scores: Tensor,
    num_selected: int,
    include_first_token: bool = False,
    document_starts: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    """As ``naive.select_tokens``."""
    if quotas is not None or (document_starts is not None and include_first_token):
        return naive.select_tokens(scores, num_selected, include_first_token, document_starts, quotas)
    return fused_select_tokens(scores, num_selected, include_first_token)


def select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int | None,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """As ``naive.select_above``."""
    if capacity is None:
        capacity = int(count_above(scores, thresholds, document_starts, feedback, share).max())
    return fused_select_above(scores, thresholds, capacity, document_starts, feedback, share)


def count_above(
    scores: Tensor,
    thresholds: Tensor,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """As ``naive.count_above``."""
    if feedback == 0:
        return naive.count_above(scores, thresholds, document_starts)
    return count_followed(scores, thresholds, document_starts, feedback, share)


def count_scores(scores: Tensor, histogram: Tensor) -> None:
    """As ``naive.count_scores``."""
    fused_count_scores(scores.detach(), histogram)


def selected_attention(
    hidden_states: Tensor,
    router_weight: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *,
    rotary_percent: float,
    rotary_base: float,
    document_starts: Tensor | None = None,
    restart_rotary: bool = False,
    slots: Documents | None = None,
    deterministic: bool = True,
) -> Tensor:
    """As ``naive.selected_attention``; the gradient of the gates goes to ``router_weight`` and ``hidden_states``.

    Args:
        deterministic: sum over heads in a fixed order; otherwise by fp32 atomics, slower but in less memory.
    """
    del slots  # no k x k is made in any case
    return fused_attention(
        hidden_states,
        router_weight,
        scores.detach(),
        indices,
        qkv_weight,
        proj_weight,
        rotary_percent,
        rotary_base,
        document_starts,
        restart_rotary,
        deterministic,
    )[0]


def split_heads(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``naive.split_heads``."""
    query, key, value = fused_split_heads(qkv, rotary_percent, rotary_base, document_starts)  # [T, B, H | G, h']
    return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)


def swiglu(gate_up: Tensor) -> Tensor:
    """As ``naive.swiglu``."""
    return fused_swiglu(gate_up)
