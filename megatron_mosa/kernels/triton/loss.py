"""The output layer and its cross entropy in chunks of tokens: neither all logits nor any fp32 logits are in memory."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from megatron_mosa.kernels.triton.common import power_of_2

CHUNK = 4096  # tokens whose logits are in memory at the same time
BLOCK = 4096  # maximum number of logits that a program loads at once


@triton.jit
def _log_sum(p_logits, V, BLOCK: tl.constexpr):
    """Return the logarithm of the sum of a token's exponentiated logits."""
    o_lane = tl.arange(0, BLOCK)
    maximum, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        b_logits = tl.load(p_logits + start + o_lane, mask=start + o_lane < V, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(maximum, tl.max(b_logits, axis=0))
        total = total * tl.exp(maximum - new_max) + tl.sum(tl.exp(b_logits - new_max), axis=0)
        maximum = new_max
    return maximum + tl.log(total)


@triton.jit
def _to_gradient(p_logits, target, weight, log_sum, V, BLOCK: tl.constexpr):
    """Replace the logits of a token by their gradient."""
    o_lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        i_column = start + o_lane
        b_logits = tl.load(p_logits + i_column, mask=i_column < V, other=-float("inf")).to(tl.float32)
        b_gradient = tl.exp(b_logits - log_sum) - (i_column == target).to(tl.float32)
        tl.store(p_logits + i_column, (b_gradient * weight).to(p_logits.dtype.element_ty), mask=i_column < V)


@triton.jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_weights, p_losses, V, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the weighted loss of one token; its logits are replaced by their gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    target = tl.load(p_targets + i_token)
    weight = tl.load(p_weights + i_token).to(tl.float32)
    # The target of a token with weight 0 may be out of range. Read before the logits are overwritten.
    target_logit = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    log_sum = _log_sum(p_logits, V, BLOCK)
    tl.store(p_losses + i_token, (log_sum - target_logit) * weight)
    if HAS_GRADIENT:
        _to_gradient(p_logits, target, weight, log_sum, V, BLOCK)


@triton.jit
def _partial_kernel(p_logits, p_targets, p_partial, N, V, V_BEGIN, BLOCK: tl.constexpr):
    """Write the log sum of a token over a part of the vocabulary, and the target's logit or 0, to p_partial [2, N]."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    target = tl.load(p_targets + i_token) - V_BEGIN
    target_logit = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    tl.store(p_partial + i_token, _log_sum(p_logits, V, BLOCK))
    tl.store(p_partial + N + i_token, target_logit)


@triton.jit
def _gradient_kernel(p_logits, p_targets, p_weights, p_log_sums, V, V_BEGIN, BLOCK: tl.constexpr):
    """Replace the logits of a token and a part of the vocabulary by their gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_token) - V_BEGIN
    weight = tl.load(p_weights + i_token).to(tl.float32)
    _to_gradient(p_logits + i_token * V, target, weight, tl.load(p_log_sums + i_token), V, BLOCK)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Compute the weighted sum of the cross entropies of an output layer, an fp32 scalar.

    The forward pass also computes the gradients; that of the weight is accumulated in fp32 over all tokens.

    Args:
        hidden_states: [N, h], the input of the output layer.
        weight: [V / ranks, h], in the type of the states: this rank's part of the output layer, in the order of ranks.
        targets: int64 [N]; may be out of range where the token weight is 0.
        token_weights: [N], the weight of each token's loss; no gradient flows to it.
        group: the ranks that split the vocabulary; None: this rank has all of it. The loss is the same on all ranks;
            the gradients of hidden_states are parts, which the caller must sum over the ranks.
    """
    return _LinearCrossEntropy.apply(hidden_states, weight, targets, token_weights, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        group: distributed.ProcessGroup | None,
    ) -> Tensor:
        has_gradient = any(ctx.needs_input_grad[:2])
        number = len(hidden_states)
        hidden_states, targets, token_weights = (t.contiguous() for t in (hidden_states, targets, token_weights))
        losses = torch.empty(number, dtype=torch.float32, device=weight.device)
        buffer = hidden_states.new_empty((min(CHUNK, number), len(weight)))
        dx = torch.empty_like(hidden_states) if has_gradient else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if has_gradient else None
        is_split = group is not None and group.size() > 1
        for chunk in (slice(start, start + CHUNK) for start in range(0, number, CHUNK)):
            states = hidden_states[chunk]
            logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
            token_data = targets[chunk], token_weights[chunk], losses[chunk]
            if is_split:
                _split_cross_entropy(logits, *token_data, group, has_gradient)
            else:
                _cross_entropy_kernel[(len(states),)](
                    logits, *token_data, len(weight), HAS_GRADIENT=has_gradient, **_block(len(weight))
                )
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
        return dx, torch.mul(dw, upstream, out=torch.empty_like(dw, dtype=ctx.dtype)), None, None, None


def _split_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    losses: Tensor,
    group: distributed.ProcessGroup,
    has_gradient: bool,
) -> None:
    """Write the losses [n] of logits [n, V / ranks], which are replaced by their gradient; one collective."""
    number, part = logits.shape
    begin = group.rank() * part
    partial = torch.empty((2, number), dtype=torch.float32, device=logits.device)
    _partial_kernel[(number,)](logits, targets, partial, number, part, begin, **_block(part))
    gathered = partial.new_empty((2 * group.size(), number))
    distributed.all_gather_into_tensor(gathered, partial, group=group)
    log_sums = gathered[::2].logsumexp(dim=0)
    torch.mul(log_sums - gathered[1::2].sum(dim=0), token_weights, out=losses)
    if has_gradient:
        _gradient_kernel[(number,)](logits, targets, token_weights, log_sums, part, begin, **_block(part))


def _block(vocabulary: int) -> dict[str, int]:
    block = min(BLOCK, power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(4, block // 512)}


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
