"""Router scores, the selection of each head, and where each token's rows lie."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import INTERPRET, dot, power_of_2, strides, with_contiguous_rows

SELECT_BLOCK = 4096  # scores of a head that one program holds at once


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
def _select_kernel(scores, indices, T, K, INCLUDE_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    # The k-th largest key, bit by bit from the highest: the largest value that k keys reach.
    threshold = 0
    for step in range(31):
        candidate = threshold | (1 << (30 - step))
        reached = 0
        for start in range(0, T, BLOCK):
            key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
            reached += tl.sum((key >= candidate).to(tl.int32))
        threshold = tl.where(reached >= K, candidate, threshold)
    above = 0
    for start in range(0, T, BLOCK):
        above += tl.sum((_keys(scores, row, start + lane, T, INCLUDE_FIRST) > threshold).to(tl.int32))
    ties_left, taken = K - above, 0
    for start in range(0, T, BLOCK):
        key = _keys(scores, row, start + lane, T, INCLUDE_FIRST)
        ties = (key == threshold).to(tl.int32)
        chosen = (key > threshold) | ((ties == 1) & (tl.cumsum(ties) <= ties_left))  # ties: the earlier ones
        count = chosen.to(tl.int32)
        slot = taken + tl.cumsum(count) - 1
        tl.store(indices + row.to(tl.int64) * K + slot, (start + lane).to(tl.int64), mask=chosen)
        ties_left -= tl.sum(((ties == 1) & chosen).to(tl.int32))
        taken += tl.sum(count)


def select(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    """int64 [B, E, k] in position order, of fp32 scores [B, E, T] above 0; ties go to the earlier token."""
    batch, heads, length = scores.shape
    indices = torch.empty((batch, heads, num_selected), dtype=torch.int64, device=scores.device)
    block = min(power_of_2(length), SELECT_BLOCK)
    _select_kernel[(batch * heads,)](
        scores.contiguous(), indices, length, num_selected, INCLUDE_FIRST=include_first_token, BLOCK=block,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return indices


@triton.jit
def _slot_kernel(indices, slots, SIZE, K, T, BLOCK: tl.constexpr):
    """Write each slot's number at its token, in a map of [B, E, T]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(indices + place, mask=place < SIZE, other=T)
    slot = (place % K).to(slots.dtype.element_ty)
    tl.store(slots + place // K * T + token, slot, mask=token < T)


@triton.jit
def _inverse_kernel(slots, offsets, entries, E, K, T, FILLS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Count the heads that take a token, into offsets[n + 1]; or, these summed up, write the tokens' entries."""
    batch = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = offsets + batch.to(tl.int64) * T + token
    taken = tl.zeros((TOKENS,), dtype=tl.int32)
    if FILLS:
        taken = tl.load(place, mask=token < T, other=0)
    for start in range(0, E, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < E)[:, None] & (token < T)[None]
        slot = tl.load(slots + (batch.to(tl.int64) * E + head[:, None]) * T + token[None], mask=inside, other=-1)
        has = (slot >= 0).to(tl.int32)  # [HEADS, TOKENS]
        if FILLS:
            entry = taken[None] + tl.cumsum(has, axis=0) - 1
            tl.store(entries + entry, head[:, None] * K + slot, mask=has == 1)
        taken += tl.sum(has, axis=0)
    if not FILLS:
        tl.store(place + 1, taken, mask=token < T)


def rows_of_tokens(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The inverse of the selection, by token and in the order of heads: what sums over heads in a fixed order need.

    Returns:
        offsets int32 [B * T + 1] and entries int32 [B * E * k]: the entries of token n = b * T + t lie from offsets[n]
        on; each is head * k + slot, of sequence b.

    Raises:
        ValueError: B * E * k is beyond int32.
    """
    batch, heads, selected = indices.shape
    if indices.numel() >= 2**31:
        raise ValueError(f"B * E * k = {indices.numel()} selected tokens at once; legal: below {2**31}")
    kind = torch.int16 if selected < 2**15 else torch.int32
    slots = torch.full((batch, heads, length), -1, dtype=kind, device=indices.device)
    size = indices.numel()
    _slot_kernel[(triton.cdiv(size, 1024),)](indices, slots, size, selected, length, BLOCK=1024)
    offsets = torch.zeros(batch * length + 1, dtype=torch.int32, device=indices.device)
    entries = torch.empty(size, dtype=torch.int32, device=indices.device)
    grid = (triton.cdiv(length, 64), batch)
    _inverse_kernel[grid](slots, offsets, entries, heads, selected, length, FILLS=False, HEADS=32, TOKENS=64)
    offsets = offsets.cumsum(0, dtype=torch.int32)
    _inverse_kernel[grid](slots, offsets, entries, heads, selected, length, FILLS=True, HEADS=32, TOKENS=64)
    return offsets, entries
