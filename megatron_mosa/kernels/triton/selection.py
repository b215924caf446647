"""Router scores, and the selection of each head."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.naive import HISTOGRAM_LOGITS
from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, multiprocessors, strides, with_contiguous_rows


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
    chosen = tiles.scores(heads, in_fp32)
    grid = (triton.cdiv(length, chosen["TOKENS"]), triton.cdiv(heads, chosen["HEADS"]), batch)
    _scores_kernel[grid](
        states, weight, scores, length, heads, width, *strides(states),
        FP32=in_fp32, INTERPRETED=INTERPRET, **chosen,
    )  # fmt: skip
    return scores


@triton.jit
def _keys(scores, row, token, T, EXCLUDES_FIRST: tl.constexpr):
    """Scores as integers of the same order, -1 for what is not compared; NaN is largest."""
    score = tl.load(scores + row.to(tl.int64) * T + token, mask=token < T, other=0.0)
    key = tl.maximum(tl.where(score == score, score.to(tl.int32, bitcast=True), 0x7F800001), 0)
    return tl.where((token < T) & ((token > 0) | (not EXCLUDES_FIRST)), key, -1)


@triton.jit
def _running_count(chosen, BLOCK: tl.constexpr):
    """How many of a block are chosen up to each place; in rows that few threads share, since shuffles cost most."""
    rows = tl.reshape(chosen.to(tl.int32), (BLOCK // 16, 16))
    each = tl.sum(rows, axis=1)
    before = tl.cumsum(each, axis=0) - each
    return tl.reshape(tl.cumsum(rows, axis=1) + before[:, None], (BLOCK,))


@triton.jit
def _select_kernel(
    scores, indices, T, K, INCLUDES_FIRST: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    key = _keys(scores, row, lane, T, INCLUDES_FIRST)  # held in registers if it is all
    low, high = 0x7FFFFFFF, -1
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            key = _keys(scores, row, start + lane, T, INCLUDES_FIRST)
        low = tl.minimum(low, tl.min(tl.where(key >= 0, key, 0x7FFFFFFF)))
        high = tl.maximum(high, tl.max(key))
    # Bisect for the largest key that enough others reach. low is reached by enough of them, high by too few, until
    # just enough reach low or nothing lies between: then some of the keys that equal low are left out.
    enough, reached = K - INCLUDES_FIRST, T - INCLUDES_FIRST
    high = high + 1
    if enough == 0:
        low, reached = high, 0
    while (reached != enough) & (high - low > 1):
        middle = low + (high - low) // 2
        count = 0
        for start in range(0, T, BLOCK):
            if not IS_ONE_BLOCK:
                key = _keys(scores, row, start + lane, T, INCLUDES_FIRST)
            count += tl.sum((key >= middle).to(tl.int32))
        if count >= enough:
            low, reached = middle, count
        else:
            high = middle
    ties_left = enough
    if reached != enough:
        for start in range(0, T, BLOCK):
            if not IS_ONE_BLOCK:
                key = _keys(scores, row, start + lane, T, INCLUDES_FIRST)
            ties_left -= tl.sum((key > low).to(tl.int32))
    taken = 0
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            key = _keys(scores, row, start + lane, T, INCLUDES_FIRST)
        chosen = key >= low
        if reached != enough:  # ties: the earlier ones
            ties = key == low
            chosen = (key > low) | (ties & (_running_count(ties, BLOCK) <= ties_left))
            ties_left -= tl.sum(ties.to(tl.int32))
        if INCLUDES_FIRST:
            chosen = chosen | (start + lane == 0)
        slot = taken + _running_count(chosen, BLOCK) - 1
        tl.store(indices + row.to(tl.int64) * K + slot, (start + lane).to(tl.int64), mask=chosen)
        taken += tl.sum(chosen.to(tl.int32))


def select(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    """int64 [B, E, k] in position order, of fp32 scores [B, E, T] from 0 on; ties go to the earlier token."""
    batch, heads, length = scores.shape
    indices = torch.empty((batch, heads, num_selected), dtype=torch.int64, device=scores.device)
    chosen = tiles.selection(length)
    _select_kernel[(batch * heads,)](
        scores.contiguous(), indices, length, num_selected, INCLUDES_FIRST=include_first_token,
        IS_ONE_BLOCK=length <= chosen["BLOCK"], **chosen,
    )  # fmt: skip
    return indices


@triton.jit
def _select_above_kernel(
    scores, thresholds, starts, indices, T, E, C, HAS_STARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # b * E + e
    threshold = tl.load(thresholds + row % E)
    taken = 0
    for start in range(0, T, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + row * T + token, mask=token < T, other=0.0)
        first = token == 0
        if HAS_STARTS:
            first = tl.load(starts + row // E * T + token, mask=token < T, other=-1) == token
        chosen = ((score > threshold) | first) & (token < T)
        slot = taken + _running_count(chosen, BLOCK) - 1
        tl.store(indices + row * C + slot, token.to(tl.int64), mask=chosen & (slot < C))
        taken += tl.sum(chosen.to(tl.int32))
    for start in range(0, C, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(indices + row * C + slot, tl.zeros((BLOCK,), tl.int64) + T, mask=(slot >= taken) & (slot < C))


@triton.jit
def _follow_kernel(
    scores, thresholds, starts, indices, counts, T, E, C, FEEDBACK, SHARE,
    HAS_STARTS: tl.constexpr, STORES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Selection with feedback of one head in one sequence: from one taken token to the next, not token by token."""
    row = tl.program_id(0).to(tl.int64)  # b * E + e
    threshold = tl.load(thresholds + row % E)
    base = tl.log(threshold) - tl.log(1.0 - threshold)
    taken, before = 0, 0  # of the sequence; of the document
    for start in range(0, T, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + row * T + token, mask=token < T, other=0.0)
        begin = tl.zeros((BLOCK,), tl.int32)
        if HAS_STARTS:
            begin = tl.load(starts + row // E * T + token, mask=token < T, other=-1).to(tl.int32)
        margin = tl.log(score) - tl.log(1.0 - score) - base + FEEDBACK * SHARE * (token - begin).to(tl.float32)
        margin = tl.where((score == score) & (token < T), margin, float("-inf"))
        first = (token == begin) & (token < T)
        last = start - 1
        while last < start + BLOCK:
            later = token > last
            beginning = tl.min(tl.where(later & first, token, start + BLOCK))
            chosen = later & (margin > FEEDBACK * before)
            last = tl.minimum(tl.min(tl.where(chosen, token, start + BLOCK)), beginning)
            if last < start + BLOCK:
                before = tl.where(last == beginning, 1, before + 1)
                if STORES:
                    tl.store(indices + row * C + taken, last.to(tl.int64), mask=taken < C)
                taken += 1
                if STORES:
                    last = tl.where(taken < C, last, start + BLOCK)
    if STORES:
        for start in range(0, C, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            tl.store(indices + row * C + slot, tl.zeros((BLOCK,), tl.int64) + T, mask=(slot >= taken) & (slot < C))
    else:
        tl.store(counts + row, taken)


def select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int,
    document_starts: Tensor | None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """As ``naive.select_above`` with a capacity, of fp32 scores and thresholds."""
    batch, heads, length = scores.shape
    indices = torch.empty((batch, heads, capacity), dtype=torch.int64, device=scores.device)
    scores, thresholds = scores.contiguous(), thresholds.contiguous()
    starts = None if document_starts is None else document_starts.contiguous()
    if feedback == 0:
        _select_above_kernel[(batch * heads,)](
            scores, thresholds, starts, indices, length, heads, capacity,
            HAS_STARTS=starts is not None, **tiles.select_above(length),
        )  # fmt: skip
    else:
        _follow_kernel[(batch * heads,)](
            scores, thresholds, starts, indices, None, length, heads, capacity, feedback, share,
            HAS_STARTS=starts is not None, STORES=True, **tiles.follow(length),
        )  # fmt: skip
    return indices


def count_followed(
    scores: Tensor, thresholds: Tensor, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    """As ``naive.count_above`` with feedback, int32 [B, E], of fp32 scores and thresholds."""
    batch, heads, length = scores.shape
    counts = torch.empty((batch, heads), dtype=torch.int32, device=scores.device)
    starts = None if document_starts is None else document_starts.contiguous()
    _follow_kernel[(batch * heads,)](
        scores.contiguous(), thresholds.contiguous(), starts, None, counts, length, heads, 0, feedback, share,
        HAS_STARTS=starts is not None, STORES=False, **tiles.follow(length),
    )  # fmt: skip
    return counts


@triton.jit(do_not_specialize=["B"])
def _count_scores_kernel(
    scores, histogram, B, E, T, stride, LOGITS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count the scores of one head in some of the sequences: number p, p + P, ... of them for program p of P."""
    head = tl.program_id(0)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    row = scores + (tl.program_id(1).to(tl.int64) * E + head) * T
    for _ in range(tl.program_id(1), B, tl.num_programs(1)):
        for start in range(0, T, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.load(row + token, mask=token < T, other=0.5)
            score = tl.where(score == score, score, 0.0)
            place = (tl.log(score) - tl.log(1.0 - score) + LOGITS) * (BINS / (2 * LOGITS))
            place = tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(tl.int32)
            counts += tl.histogram(place, BINS, mask=token < T)
        row += stride
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + head.to(tl.int64) * BINS + bins, counts, mask=counts > 0, sem="relaxed")


def count_scores(scores: Tensor, histogram: Tensor) -> None:
    """As ``naive.count_scores``, of fp32 scores; integers add up to the same in any order."""
    batch, heads, length = scores.shape
    programs = max(1, min(batch, 8 * multiprocessors(scores.device) // heads))
    _count_scores_kernel[(heads, programs)](
        scores.contiguous(), histogram, batch, heads, length, programs * heads * length,
        LOGITS=HISTOGRAM_LOGITS, BINS=histogram.shape[1], **tiles.count_scores(length),
    )  # fmt: skip
