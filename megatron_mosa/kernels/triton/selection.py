"""Router scores, and the selection of each head."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import INTERPRET, dot, power_of_2, strides, with_contiguous_rows

SELECT_BLOCK = 16_384  # scores of a head that one program holds at once


@triton.jit
def _scores_kernel(
    states, weight, scores, T, E, H, stride_b, stride_t,
    FP32: tl.constexpr, INTERPRETED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    batch = tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    rows = states + batch.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_t
    logits = tl.zeros((TOKENS, HEADS), dtype=tl.float32)
    for start in range(0, H, COLUMNS):
        inside = start + column < H
        x = tl.load(rows + start + column[None], mask=(token < T)[:, None] & inside[None], other=0.0)
        w = tl.load(
            weight + head.to(tl.int64)[None] * H + (start + column)[:, None],
            mask=(head < E)[None] & inside[:, None],
            other=0.0,
        )
        if FP32:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = dot(x, w, logits, INTERPRETED)
    offsets = (batch.to(tl.int64) * E + head[None]) * T + token[:, None]
    tl.store(scores + offsets, 1.0 / (1.0 + tl.exp(-logits)), mask=(token < T)[:, None] & (head < E)[None])


def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """sigmoid(X w), fp32 [B, E, T], from [B, T, h] and [E, h]; without a gradient of its own."""
    states = with_contiguous_rows(hidden_states.detach())
    weight = router_weight.detach().contiguous()
    batch, length, width = states.shape
    heads = weight.shape[0]
    scores = states.new_empty((batch, heads, length), dtype=torch.float32)
    in_fp32 = states.dtype == torch.float32 or weight.dtype != states.dtype
    grid = (triton.cdiv(length, 128), triton.cdiv(heads, 64), batch)
    _scores_kernel[grid](
        states, weight, scores, length, heads, width, *strides(states),
        FP32=in_fp32, INTERPRETED=INTERPRET, TOKENS=128, HEADS=64, COLUMNS=32 if in_fp32 else 64,
        num_warps=8 if in_fp32 else 4,
    )  # fmt: skip
    return scores


@triton.jit
def _keys(scores, row, token, T, INCLUDE_FIRST: tl.constexpr):
    """Scores as integers of the same order; -1 beyond the sequence. Scores are positive, or NaN, which is largest."""
    key = tl.load(scores + row.to(tl.int64) * T + token, mask=token < T, other=0.0).to(tl.int32, bitcast=True)
    if INCLUDE_FIRST:
        key = tl.where(token == 0, 0x7FFFFFFF, key)
    return tl.where(token < T, key, -1)


@triton.jit
def _reached(key, low, step):
    """How many keys reach low + step, + 2 step and + 3 step: three counts in one number, for one reduction."""
    counts = (key >= low + step).to(tl.int64) + ((key >= low + 2 * step).to(tl.int64) << 21)
    return tl.sum(counts + ((key >= low + 3 * step).to(tl.int64) << 42))


@triton.jit
def _select_kernel(
    scores, indices, T, K, INCLUDE_FIRST: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    key = _keys(scores, row, lane, T, INCLUDE_FIRST)
    # The k-th largest key, bit by bit from the highest, two at a time: the largest value that k keys reach.
    top: tl.constexpr = 1 << 30
    above = 0
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
        above += tl.sum((key >= top).to(tl.int32))
    threshold = tl.where(above >= K, top, 0)
    for place in range(15):
        step = 1 << (28 - 2 * place)
        counts = tl.full((), 0, tl.int64)
        for start in range(0, T, BLOCK):
            if not IS_ONE_BLOCK:
                key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
            counts += _reached(key, threshold, step)
        steps = ((counts & 0x1FFFFF) >= K).to(tl.int32) + (((counts >> 21) & 0x1FFFFF) >= K).to(tl.int32)
        threshold += step * (steps + ((counts >> 42) >= K).to(tl.int32))
    above = 0
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
        above += tl.sum((key > threshold).to(tl.int32))
    ties_left, taken = K - above, 0
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
        ties = (key == threshold).to(tl.int32)
        chosen = (key > threshold) | ((ties == 1) & (tl.cumsum(ties) <= ties_left))  # ties: the earlier ones
        count = chosen.to(tl.int32)
        slot = taken + tl.cumsum(count) - 1
        tl.store(indices + row.to(tl.int64) * K + slot, (start + lane).to(tl.int64), mask=chosen)
        ties_left -= tl.sum(((ties == 1) & chosen).to(tl.int32))
        taken += tl.sum(count)


def select(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    """int64 [B, E, k] in position order, of fp32 scores [B, E, T] above 0; ties go to the earlier token.

    Raises:
        ValueError: T of 2^21 or more.
    """
    batch, heads, length = scores.shape
    if length >= 2**21:
        raise ValueError(f"scores of T = {length} tokens; legal: below {2**21}")
    indices = torch.empty((batch, heads, num_selected), dtype=torch.int64, device=scores.device)
    block = min(power_of_2(length), SELECT_BLOCK)
    _select_kernel[(batch * heads,)](
        scores.contiguous(), indices, length, num_selected, INCLUDE_FIRST=include_first_token,
        IS_ONE_BLOCK=length <= block, BLOCK=block, num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    return indices
