"""MoSA in Triton: the functions of ``naive`` without gathered inputs and unsummed outputs in memory."""

from __future__ import annotations

from torch import Tensor

from megatron_mosa.kernels import naive
from megatron_mosa.kernels.documents import Documents
from megatron_mosa.kernels.triton.elementwise import accumulate, fused_swiglu
from megatron_mosa.kernels.triton.loss import linear_cross_entropy
from megatron_mosa.kernels.triton.ops import fused_attention
from megatron_mosa.kernels.triton.rotary import fused_split_heads
from megatron_mosa.kernels.triton.selection import (
    count_with_feedback,
    fused_count_scores,
    fused_router_scores,
    fused_select_above,
    fused_select_tokens,
)

NAME = "triton"
__all__ = [
    "NAME", "accumulate", "count_above", "count_scores", "linear_cross_entropy", "router_scores", "select_above",
    "select_tokens", "selected_attention", "split_heads", "swiglu",
]  # fmt: skip
select_above = fused_select_above
swiglu = fused_swiglu


def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Compute ``naive.router_scores`` without gradients: ``selected_attention`` returns those of the router."""
    return fused_router_scores(hidden_states.detach(), router_weight.detach())


def select_tokens(
    scores: Tensor,
    num_selected: int,
    include_first_token: bool = False,
    document_starts: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    """Compute ``naive.select_tokens``, by itself if tokens or first tokens are selected per document."""
    if quotas is not None or (document_starts is not None and include_first_token):
        return naive.select_tokens(scores, num_selected, include_first_token, document_starts, quotas)
    return fused_select_tokens(scores, num_selected, include_first_token)


def count_above(
    scores: Tensor,
    thresholds: Tensor,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """Compute ``naive.count_above``, by itself if there is no feedback."""
    if feedback == 0:
        return naive.count_above(scores, thresholds, document_starts)
    return count_with_feedback(scores, thresholds, document_starts, feedback, share)


def count_scores(scores: Tensor, histogram: Tensor) -> None:
    """Compute ``naive.count_scores``."""
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
    is_full: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """Compute ``naive.selected_attention``; gradients of the gates flow to ``router_weight`` and ``hidden_states``."""
    del slots  # no k x k matrix is stored in any case
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
        is_full,
        addend,
    )[0]


def split_heads(
    qkv: Tensor, rotary_percent: float, rotary_base: float, document_starts: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``naive.split_heads``."""
    query, key, value = fused_split_heads(
        qkv, rotary_percent, rotary_base, document_starts, stride
    )  # [T, B, H | G, h']
    return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
