"""Router scores, and the selection of each head."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_mosa.kernels.naive import HISTOGRAM_LOGITS
from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import (
    INTERPRET,
    cdiv,
    dot,
    launch,
    multiprocessors,
    optional_contiguous,
    strides,
    with_contiguous_rows,
)


@triton.jit
def _scores_kernel(
    p_x, p_weight, p_scores, T, E, H, stride_b, stride_t,
    FP32: tl.constexpr, INTERPRETED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i_head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i_batch = tl.program_id(2)
    o_column = tl.arange(0, COLUMNS)
    p_x_rows = p_x + i_batch.to(tl.int64) * stride_b + i_token.to(tl.int64)[:, None] * stride_t
    b_logits = tl.zeros((TOKENS, HEADS), dtype=tl.float32)
    for start in range(0, H, COLUMNS):
        m_column = start + o_column < H
        b_x = tl.load(p_x_rows + start + o_column[None], mask=(i_token < T)[:, None] & m_column[None], other=0.0)
        b_w = tl.load(
            p_weight + i_head.to(tl.int64)[None] * H + (start + o_column)[:, None],
            mask=(i_head < E)[None] & m_column[:, None],
            other=0.0,
        )
        if FP32:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_logits = dot(b_x, b_w, b_logits, INTERPRETED)
    o_scores = (i_batch.to(tl.int64) * E + i_head[None]) * T + i_token[:, None]
    tl.store(p_scores + o_scores, 1.0 / (1.0 + tl.exp(-b_logits)), mask=(i_token < T)[:, None] & (i_head < E)[None])


def launch_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Compute sigmoid(X w), fp32 [B, E, T], from [B, T, h] and [E, h]; ``fused_attention`` returns the gradient."""
    states, weight = with_contiguous_rows(hidden_states), router_weight.contiguous()
    batch, length, width = states.shape
    heads = weight.shape[0]
    scores = states.new_empty((batch, heads, length), dtype=torch.float32)
    in_fp32 = states.dtype == torch.float32 or weight.dtype != states.dtype
    chosen = tiles.scores(heads, in_fp32)
    grid = (cdiv(length, chosen["TOKENS"]), cdiv(heads, chosen["HEADS"]), batch)
    launch(
        _scores_kernel, grid,
        states, weight, scores, length, heads, width, *strides(states),
        FP32=in_fp32, INTERPRETED=INTERPRET, **chosen,
    )  # fmt: skip
    return scores


fused_router_scores = torch.library.custom_op("megatron_mosa::fused_router_scores", mutates_args=())(launch_scores)


@fused_router_scores.register_fake
def _(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    shape = (hidden_states.shape[0], router_weight.shape[0], hidden_states.shape[1])
    return hidden_states.new_empty(shape, dtype=torch.float32)


@register_flop_formula(torch.ops.megatron_mosa.fused_router_scores)
def _(states: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * states[0] * states[1] * states[2] * weight[0]


@triton.jit
def _load_keys(p_scores, i_row, i_token, T, EXCLUDES_FIRST: tl.constexpr):
    """Load scores as integers in the same order; NaN is the largest, and -1 marks tokens that are not compared."""
    b_score = tl.load(p_scores + i_row.to(tl.int64) * T + i_token, mask=i_token < T, other=0.0)
    b_key = tl.maximum(tl.where(b_score == b_score, b_score.to(tl.int32, bitcast=True), 0x7F800001), 0)
    return tl.where((i_token < T) & ((i_token > 0) | (not EXCLUDES_FIRST)), b_key, -1)


@triton.jit
def _inclusive_count(m_selected, BLOCK: tl.constexpr):
    """Count the selected tokens of a block up to each one, in rows of 16, because shuffles between threads are slow."""
    b_rows = tl.reshape(m_selected.to(tl.int32), (BLOCK // 16, 16))
    b_sums = tl.sum(b_rows, axis=1)
    b_before = tl.cumsum(b_sums, axis=0) - b_sums
    return tl.reshape(tl.cumsum(b_rows, axis=1) + b_before[:, None], (BLOCK,))


@triton.jit
def _select_kernel(
    p_scores, p_indices, T, K, INCLUDES_FIRST: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0)
    o_token = tl.arange(0, BLOCK)
    b_key = _load_keys(p_scores, i_row, o_token, T, INCLUDES_FIRST)  # stays in registers if there is one block
    low, high = 0x7FFFFFFF, -1
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            b_key = _load_keys(p_scores, i_row, start + o_token, T, INCLUDES_FIRST)
        low = tl.minimum(low, tl.min(tl.where(b_key >= 0, b_key, 0x7FFFFFFF)))
        high = tl.maximum(high, tl.max(b_key))
    # Search for the largest key that at least ``target`` keys reach. Enough keys reach low, and too few reach high. It
    # ends when exactly ``target`` keys reach low, or no integer lies between: then ties at low must be broken.
    # The next key to try is where a straight line between the numbers that reach low and high crosses the target; if
    # the same end moves twice, the other end's number counts half (the Illinois method). Every fourth is the middle.
    target, reached = K - INCLUDES_FIRST, T - INCLUDES_FIRST
    high = high + 1
    if target == 0:
        low, reached = high, 0
    above, below = tl.cast(reached - target, tl.float32), tl.cast(target, tl.float32)
    moved, step = 0, 0
    while (reached != target) & (high - low > 1):
        middle = low + (high - low) // 2
        if step % 4 != 3:
            share = (high - low).to(tl.float32) * (above / (above + below))
            middle = tl.minimum(tl.maximum(low + share.to(tl.int32), low + 1), high - 1)
        step += 1
        count = 0
        for start in range(0, T, BLOCK):
            if not IS_ONE_BLOCK:
                b_key = _load_keys(p_scores, i_row, start + o_token, T, INCLUDES_FIRST)
            count += tl.sum((b_key >= middle).to(tl.int32))
        if count >= target:
            low, reached = middle, count
            above, below = tl.cast(count - target, tl.float32), below * tl.where(moved == 1, 0.5, 1.0)
            moved = 1
        else:
            high = middle
            above, below = above * tl.where(moved == 2, 0.5, 1.0), tl.cast(target - count, tl.float32)
            moved = 2
    ties_left = target
    if reached != target:
        for start in range(0, T, BLOCK):
            if not IS_ONE_BLOCK:
                b_key = _load_keys(p_scores, i_row, start + o_token, T, INCLUDES_FIRST)
            ties_left -= tl.sum((b_key > low).to(tl.int32))
    num_selected = 0
    for start in range(0, T, BLOCK):
        if not IS_ONE_BLOCK:
            b_key = _load_keys(p_scores, i_row, start + o_token, T, INCLUDES_FIRST)
        m_selected = b_key >= low
        if reached != target:  # of equal keys, select the earlier ones
            m_tie = b_key == low
            m_selected = (b_key > low) | (m_tie & (_inclusive_count(m_tie, BLOCK) <= ties_left))
            ties_left -= tl.sum(m_tie.to(tl.int32))
        if INCLUDES_FIRST:
            m_selected = m_selected | (start + o_token == 0)
        i_slot = num_selected + _inclusive_count(m_selected, BLOCK) - 1
        tl.store(p_indices + i_row.to(tl.int64) * K + i_slot, (start + o_token).to(tl.int64), mask=m_selected)
        num_selected += tl.sum(m_selected.to(tl.int32))


@torch.library.custom_op("megatron_mosa::fused_select_tokens", mutates_args=())
def fused_select_tokens(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    """Compute ``naive.select_tokens`` of whole sequences, from fp32 scores that are not negative."""
    batch, heads, length = scores.shape
    indices = torch.empty((batch, heads, num_selected), dtype=torch.int64, device=scores.device)
    chosen = tiles.selection(length)
    launch(
        _select_kernel, (batch * heads,),
        scores.contiguous(), indices, length, num_selected, INCLUDES_FIRST=include_first_token,
        IS_ONE_BLOCK=length <= chosen["BLOCK"], **chosen,
    )  # fmt: skip
    return indices


@fused_select_tokens.register_fake
def _(scores: Tensor, num_selected: int, include_first_token: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_selected), dtype=torch.int64)


@triton.jit
def _fill_empty_slots(p_indices, num_selected, T, C, BLOCK: tl.constexpr):
    """Store T in the slots of one head and sequence from ``num_selected`` on."""
    for start in range(num_selected, C, BLOCK):
        i_slot = start + tl.arange(0, BLOCK)
        tl.store(p_indices + i_slot, tl.zeros((BLOCK,), tl.int64) + T, mask=i_slot < C)


@triton.jit
def _select_above_kernel(
    p_scores, p_thresholds, p_starts, p_indices, p_counts, T, E, C,
    HAS_STARTS: tl.constexpr, STORES: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select for one head in one sequence. STORES: write indices, up to C of them; COUNTS: write how many there are."""
    i_row = tl.program_id(0).to(tl.int64)  # b * E + e
    threshold = tl.load(p_thresholds + i_row % E)
    num_selected = 0
    for start in range(0, T, BLOCK):
        i_token = start + tl.arange(0, BLOCK)
        b_score = tl.load(p_scores + i_row * T + i_token, mask=i_token < T, other=0.0)
        m_first = i_token == 0
        if HAS_STARTS:
            m_first = tl.load(p_starts + i_row // E * T + i_token, mask=i_token < T, other=-1) == i_token
        m_selected = ((b_score > threshold) | m_first) & (i_token < T)
        if STORES:
            i_slot = num_selected + _inclusive_count(m_selected, BLOCK) - 1
            tl.store(p_indices + i_row * C + i_slot, i_token.to(tl.int64), mask=m_selected & (i_slot < C))
        num_selected += tl.sum(m_selected.to(tl.int32))
    if STORES:
        _fill_empty_slots(p_indices + i_row * C, num_selected, T, C, BLOCK)
    if COUNTS:
        tl.store(p_counts + i_row, num_selected)


@triton.jit
def _load_margins(p_scores, p_starts, i_token, T, threshold_logit, FEEDBACK, SHARE, HAS_STARTS: tl.constexpr):
    """Return by how much scores exceed the threshold, in logits, before any token is selected, and which are first."""
    b_score = tl.load(p_scores + i_token, mask=i_token < T, other=0.0)
    b_start = tl.zeros_like(i_token)
    if HAS_STARTS:
        b_start = tl.load(p_starts + i_token, mask=i_token < T, other=-1).to(tl.int32)
    b_margin = tl.log(b_score) - tl.log(1.0 - b_score) - threshold_logit
    b_margin = b_margin + FEEDBACK * SHARE * (i_token - b_start).to(tl.float32)
    b_margin = tl.where((b_score == b_score) & (i_token < T), b_margin, float("-inf"))
    return b_margin, (i_token == b_start) & (i_token < T)


@triton.jit
def _follow_kernel(
    p_scores, p_thresholds, p_starts, p_indices, p_counts, T, E, C, FEEDBACK, SHARE,
    HAS_STARTS: tl.constexpr, STORES: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select with feedback for one head in one sequence, stepping from one selected token to the next.

    STORES: write indices, up to C of them; COUNTS: write how many tokens are selected.
    """
    i_row = tl.program_id(0).to(tl.int64)  # b * E + e
    threshold = tl.load(p_thresholds + i_row % E)
    threshold_logit = tl.log(threshold) - tl.log(1.0 - threshold)
    p_row, p_start_row = p_scores + i_row * T, p_scores
    if HAS_STARTS:
        p_start_row = p_starts + i_row // E * T
    num_selected, in_document = 0, 0  # selected so far in the sequence, and in the current document
    i_token = tl.arange(0, BLOCK)
    next_margin, next_first = _load_margins(
        p_row, p_start_row, i_token, T, threshold_logit, FEEDBACK, SHARE, HAS_STARTS
    )
    for start in range(0, T, BLOCK):
        i_token, b_margin, m_first = start + tl.arange(0, BLOCK), next_margin, next_first
        next_margin, next_first = _load_margins(  # while these are compared
            p_row, p_start_row, i_token + BLOCK, T, threshold_logit, FEEDBACK, SHARE, HAS_STARTS
        )
        # The smallest key says which token is next, and whether it is the first of a document.
        b_key, end = 2 * i_token + 1 - m_first.to(tl.int32), 2 * (start + BLOCK)
        key = tl.min(tl.where(m_first | (b_margin > FEEDBACK * in_document), b_key, end))
        while key < end:
            in_document = tl.where(key % 2 == 0, 1, in_document + 1)
            if STORES:
                tl.store(p_indices + i_row * C + num_selected, (key // 2).to(tl.int64), mask=num_selected < C)
            num_selected += 1
            m_next = (b_key > key) & (m_first | (b_margin > FEEDBACK * in_document))
            key = tl.min(tl.where(m_next, b_key, end))
    if STORES:
        _fill_empty_slots(p_indices + i_row * C, num_selected, T, C, BLOCK)
    if COUNTS:
        tl.store(p_counts + i_row, num_selected)


def launch_select_above(
    scores: Tensor,
    thresholds: Tensor,
    capacity: int,
    document_starts: Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> Tensor:
    """Compute ``naive.select_above`` from fp32 scores and thresholds."""
    indices = torch.empty((*scores.shape[:2], capacity), dtype=torch.int64, device=scores.device)
    _launch_above(scores, thresholds, document_starts, indices, None, feedback, share)
    return indices


fused_select_above = torch.library.custom_op("megatron_mosa::fused_select_above", mutates_args=())(launch_select_above)


@fused_select_above.register_fake
def _(scores: Tensor, thresholds: Tensor, capacity: int, *_: object) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], capacity), dtype=torch.int64)


def count_with_feedback(
    scores: Tensor, thresholds: Tensor, document_starts: Tensor | None, feedback: float, share: float
) -> Tensor:
    """Compute ``naive.count_above`` with feedback, int32 [B, E]; unlike the others, torch.compile can trace this."""
    batch, heads, length = scores.shape
    counts = torch.empty((batch, heads), dtype=torch.int32, device=scores.device)
    starts = optional_contiguous(document_starts)
    _follow_kernel[(batch * heads,)](
        scores.contiguous(), thresholds.contiguous(), starts, None, counts, length, heads, 0, feedback, share,
        HAS_STARTS=starts is not None, STORES=False, COUNTS=True, **tiles.follow(length),
    )  # fmt: skip
    return counts


def launch_count_above(scores: Tensor, thresholds: Tensor, feedback: float, share: float) -> Tensor:
    """Compute ``naive.count_above``, int32 [B, E], from fp32 scores and thresholds."""
    counts = torch.empty(scores.shape[:2], dtype=torch.int32, device=scores.device)
    _launch_above(scores, thresholds, None, None, counts, feedback, share)
    return counts


def launch_select_and_count(
    scores: Tensor, thresholds: Tensor, capacity: int, feedback: float, share: float
) -> tuple[Tensor, Tensor]:
    """Compute ``launch_select_above``, and how many tokens it would select without a capacity, int32 [B, E]."""
    indices = torch.empty((*scores.shape[:2], capacity), dtype=torch.int64, device=scores.device)
    counts = torch.empty(scores.shape[:2], dtype=torch.int32, device=scores.device)
    _launch_above(scores, thresholds, None, indices, counts, feedback, share)
    return indices, counts


def _launch_above(
    scores: Tensor,
    thresholds: Tensor,
    document_starts: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    feedback: float,
    share: float,
) -> None:
    batch, heads, length = scores.shape
    tensors = scores.contiguous(), thresholds.contiguous(), optional_contiguous(document_starts), indices, counts
    sizes = length, heads, 0 if indices is None else indices.shape[2]
    options = dict(HAS_STARTS=document_starts is not None, STORES=indices is not None, COUNTS=counts is not None)
    if feedback == 0:
        launch(_select_above_kernel, (batch * heads,), *tensors, *sizes, **options, **tiles.select_above(length))
    else:
        numbers = feedback, share
        launch(_follow_kernel, (batch * heads,), *tensors, *sizes, *numbers, **options, **tiles.follow(length))


@triton.jit(do_not_specialize=["B"])
def _count_scores_kernel(
    p_scores, p_histogram, B, E, T, stride, LOGITS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count the scores of one head; of P programs, program p counts sequences p, p + P, and so on."""
    i_head = tl.program_id(0)
    b_counts = tl.zeros((BINS,), dtype=tl.int32)
    p_row = p_scores + (tl.program_id(1).to(tl.int64) * E + i_head) * T
    for _ in range(tl.program_id(1), B, tl.num_programs(1)):
        for start in range(0, T, BLOCK):
            i_token = start + tl.arange(0, BLOCK)
            b_score = tl.load(p_row + i_token, mask=i_token < T, other=0.5)
            b_score = tl.where(b_score == b_score, b_score, 0.0)
            i_bin = (tl.log(b_score) - tl.log(1.0 - b_score) + LOGITS) * (BINS / (2 * LOGITS))
            i_bin = tl.minimum(tl.maximum(i_bin, 0.0), BINS - 1.0).to(tl.int32)
            b_counts += tl.histogram(i_bin, BINS, mask=i_token < T)
        p_row += stride
    o_bin = tl.arange(0, BINS)
    tl.atomic_add(p_histogram + i_head.to(tl.int64) * BINS + o_bin, b_counts, mask=b_counts > 0, sem="relaxed")


@torch.library.custom_op("megatron_mosa::fused_count_scores", mutates_args=("histogram",))
def fused_count_scores(scores: Tensor, histogram: Tensor) -> None:
    """Compute ``naive.count_scores`` from fp32 scores; adding integers, atomics are deterministic in any order."""
    batch, heads, length = scores.shape
    programs = max(1, min(batch, 8 * multiprocessors(scores.device) // heads))
    launch(
        _count_scores_kernel, (heads, programs),
        scores.contiguous(), histogram, batch, heads, length, programs * heads * length,
        LOGITS=HISTOGRAM_LOGITS, BINS=histogram.shape[1], **tiles.count_scores(length),
    )  # fmt: skip
