"""The output layer and its cross entropy, some tokens at a time: logits are never whole in memory, nor any in fp32."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import power_of_2

CHUNK = 4096  # tokens whose logits are in memory at a time
BLOCK = 4096  # of the vocabulary, at most


@triton.jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_weights, p_losses, V, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weighted loss of one token; its logits become their own gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    lane = tl.arange(0, BLOCK)
    target = tl.load(p_targets + i_token)
    weight = tl.load(p_weights + i_token).to(tl.float32)
    # A token that does not count may have a target outside of the vocabulary. Read before anything is overwritten.
    of_target = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        logits = tl.load(p_logits + start + lane, mask=start + lane < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    log_sum = highest + tl.log(total)
    tl.store(p_losses + i_token, (log_sum - of_target) * weight)
    if HAS_GRADIENT:
        for start in range(0, V, BLOCK):
            column = start + lane
            logits = tl.load(p_logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(logits - log_sum) - (column == target).to(tl.float32)
            tl.store(p_logits + column, (gradient * weight).to(p_logits.dtype.element_ty), mask=column < V)


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Weighted sum of the cross entropies of an output layer, fp32 scalar.

    Gradients are made in the forward pass, that of the weight added up in fp32 over all tokens.

    Args:
        hidden_states: [N, h], before the output layer.
        weight: [V, h], in their type: the output layer's, the whole vocabulary.
        targets: int64 [N].
        token_weights: [N], how much each token counts; without a gradient. Targets of tokens that count nothing may be
            outside of the vocabulary.
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
        upstream = upstreams[0].reshape(1)  # a scalar would be rounded to the type of what it multiplies
        # Multiplied in fp32 and rounded, in one pass.
        dx = torch.mul(dx, upstream, out=torch.empty_like(dx))
        return dx, torch.mul(dw, upstream, out=torch.empty_like(dw, dtype=ctx.dtype)), None, None


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
