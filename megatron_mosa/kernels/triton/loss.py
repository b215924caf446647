"""The output layer and its cross entropy in chunks of tokens: neither all logits nor any fp32 logits are in memory."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import power_of_2

CHUNK = 4096  # tokens whose logits are in memory at the same time
BLOCK = 4096  # maximum number of logits that a program loads at once


@triton.jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_weights, p_losses, V, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the weighted loss of one token; its logits are replaced by their gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    o_lane = tl.arange(0, BLOCK)
    target = tl.load(p_targets + i_token)
    weight = tl.load(p_weights + i_token).to(tl.float32)
    # The target of a token with weight 0 may be out of range. Read before the logits are overwritten.
    target_logit = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    maximum, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        b_logits = tl.load(p_logits + start + o_lane, mask=start + o_lane < V, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(maximum, tl.max(b_logits, axis=0))
        total = total * tl.exp(maximum - new_max) + tl.sum(tl.exp(b_logits - new_max), axis=0)
        maximum = new_max
    log_sum = maximum + tl.log(total)
    tl.store(p_losses + i_token, (log_sum - target_logit) * weight)
    if HAS_GRADIENT:
        for start in range(0, V, BLOCK):
            i_column = start + o_lane
            b_logits = tl.load(p_logits + i_column, mask=i_column < V, other=-float("inf")).to(tl.float32)
            b_gradient = tl.exp(b_logits - log_sum) - (i_column == target).to(tl.float32)
            tl.store(p_logits + i_column, (b_gradient * weight).to(p_logits.dtype.element_ty), mask=i_column < V)


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Compute ``naive.linear_cross_entropy``, with the weight in the type of the states, as an fp32 scalar.

    The forward pass also computes the gradients; that of the weight is accumulated in fp32 over all tokens.
    """
    return _LinearCrossEntropy.apply(hidden_states, weight, targets, token_weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
        has_gradient = any(ctx.needs_input_grad[:2])
        number, vocabulary = len(hidden_states), len(weight)
        hidden_states, targets, token_weights = (t.contiguous() for t in (hidden_states, targets, token_weights))
        losses = torch.empty(number, dtype=torch.float32, device=weight.device)
        buffer = hidden_states.new_empty((min(CHUNK, number), vocabulary))
        dx = torch.empty_like(hidden_states) if has_gradient else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if has_gradient else None
        block = min(BLOCK, power_of_2(vocabulary))
        for chunk in (slice(start, start + CHUNK) for start in range(0, number, CHUNK)):
            states = hidden_states[chunk]
            logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
            _cross_entropy_kernel[(len(states),)](
                logits, targets[chunk], token_weights[chunk], losses[chunk], vocabulary,
                HAS_GRADIENT=has_gradient, BLOCK=block, num_warps=max(4, block // 512),
            )  # fmt: skip
            if dx is not None and dw is not None:
                torch.mm(logits, weight, out=dx[chunk])
                _accumulate(dw, logits.t(), states)
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        upstream = upstreams[0].reshape(1)  # a scalar would be rounded to the type of the other factor
        # Multiplied in fp32 and rounded, in one pass.
        dx = torch.mul(dx, upstream, out=torch.empty_like(dx))
        return dx, torch.mul(dw, upstream, out=torch.empty_like(dw, dtype=ctx.dtype)), None, None


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
