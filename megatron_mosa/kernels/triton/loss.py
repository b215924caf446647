"""The output layer and its cross entropy, some tokens at a time: logits are never whole in memory, nor any in fp32."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from megatron_mosa.kernels.triton.common import power_of_2

CHUNK = 4096  # tokens whose logits are in memory at a time
BLOCK = 4096  # of the vocabulary, at most


@triton.jit
def _log_sum(p_logits, V, BLOCK: tl.constexpr):
    """The logarithm of the sum of a token's exponentiated logits."""
    lane = tl.arange(0, BLOCK)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        logits = tl.load(p_logits + start + lane, mask=start + lane < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    return highest + tl.log(total)


@triton.jit
def _to_gradient(p_logits, target, weight, log_sum, V, BLOCK: tl.constexpr):
    """A token's logits become their own gradient."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        column = start + lane
        logits = tl.load(p_logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(logits - log_sum) - (column == target).to(tl.float32)
        tl.store(p_logits + column, (gradient * weight).to(p_logits.dtype.element_ty), mask=column < V)


@triton.jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_weights, p_losses, V, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weighted loss of one token; its logits become their own gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    target = tl.load(p_targets + i_token)
    weight = tl.load(p_weights + i_token).to(tl.float32)
    # A token that does not count may have a target outside of the vocabulary. Read before anything is overwritten.
    of_target = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    log_sum = _log_sum(p_logits, V, BLOCK)
    tl.store(p_losses + i_token, (log_sum - of_target) * weight)
    if HAS_GRADIENT:
        _to_gradient(p_logits, target, weight, log_sum, V, BLOCK)


@triton.jit
def _partial_kernel(p_logits, p_targets, p_partial, N, V, V_BEGIN, BLOCK: tl.constexpr):
    """One token, a part of the vocabulary: the logarithm of the sum, and the logit of the target or 0, to [2, N]."""
    i_token = tl.program_id(0).to(tl.int64)
    p_logits += i_token * V
    target = tl.load(p_targets + i_token) - V_BEGIN
    of_target = tl.load(p_logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    tl.store(p_partial + i_token, _log_sum(p_logits, V, BLOCK))
    tl.store(p_partial + N + i_token, of_target)


@triton.jit
def _gradient_kernel(p_logits, p_targets, p_weights, p_log_sums, V, V_BEGIN, BLOCK: tl.constexpr):
    """Logits of one token and a part of the vocabulary become their own gradient."""
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
    """Weighted sum of the cross entropies of an output layer, fp32 scalar.

    Gradients are computed in the forward pass, that of the weight accumulated in fp32 over all tokens.

    Args:
        hidden_states: [N, h], before the output layer.
        weight: [V / ranks, h], in their type: this rank's part of the output layer, in the order of ranks.
        targets: int64 [N].
        token_weights: [N], how much each token counts; without a gradient. Targets of tokens that count nothing may be
            outside of the vocabulary.
        group: the ranks that split the vocabulary; None: this rank has all of it. The loss is the same on all of them.
            Each contributes a part of the gradient of hidden_states, to be summed by the caller.
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
            of_tokens = targets[chunk], token_weights[chunk], losses[chunk]
            if is_split:
                _split_cross_entropy(logits, *of_tokens, group, has_gradient)
            else:
                _cross_entropy_kernel[(len(states),)](
                    logits, *of_tokens, len(weight), HAS_GRADIENT=has_gradient, **_block(len(weight))
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
        upstream = upstreams[0].reshape(1)  # a scalar would be rounded to the type of what it multiplies
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
    """Write the losses [n] of logits [n, V / ranks], which become their own gradient; one collective."""
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
