"""One token of every sequence in heads that store all tokens, or a window, with lengths that the device knows.

One Triton kernel rotates and stores, and two attend: the rows of a sequence and group of heads are divided among
several programs, whose results the second one joins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

ROWS = 64  # rows per iteration
PROGRAMS = 264  # to aim at: two for each multiprocessor of a large GPU
MOST_PARTS = 64
QUERIES = 16  # per group of heads at least, the minimum of a matrix product


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor],
    row: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotate queries and keys, and store keys and values.

    Args:
        query: [B, H h'].
        key, value: [B, G h'].
        rotary: cosines and sines, fp32 [B or 1, 1, n].
        row: long [B] or [1], the row of each sequence to store in.
        keys, values: [B, G, rows, h'], contiguous, in the dtype of the others.

    Returns:
        Rotated queries, [B, H, h'].
    """
    batch, groups, stored, size = keys.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cos, sin = (table.contiguous() for table in rotary)
    heads = query.shape[1] // size
    output = query.new_empty(batch, heads, size)
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    rotate_kernel: Any = _rotate_kernel
    with torch.cuda.device_of(query):  # Triton launches on the current device
        rotate_kernel[(batch, heads + groups)](
            query, key, value, cos, sin, row, output, keys, values, heads, groups, stored, size, cos.shape[-1],
            min(len(cos) - 1, 1), min(len(row) - 1, 1), SIZE_BLOCK=power(size), num_warps=1,
        )  # fmt: skip
    return output


def attend_to_rows(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, valid: Tensor | None) -> Tensor:
    """Attend to the first rows of each sequence.

    Args:
        query: [B, H, h'].
        keys, values: [B, G, rows, h'], contiguous.
        lengths: long [B] or [1]: number of rows to attend to, at least 1.
        valid: bool [B, rows], False in rows to leave out, which the last one must not be; None: none.

    Returns:
        [B, H, h'].
    """
    (batch, heads, size), (groups, stored) = query.shape, keys.shape[1:3]
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    parts = max(1, min(MOST_PARTS, power(PROGRAMS // (batch * groups))))
    queries = max(QUERIES, power(heads // groups))
    sums = torch.empty(batch * groups, parts, queries, size, dtype=torch.float32, device=query.device)
    scales = torch.empty(2, batch * groups, parts, queries, dtype=torch.float32, device=query.device)
    output = torch.empty_like(query)
    part_kernel: Any = _part_kernel
    join_kernel: Any = _join_kernel
    with torch.cuda.device_of(query):  # Triton launches on the current device
        part_kernel[(batch * groups, parts)](
            query, keys, values, lengths, valid, sums, scales[0], scales[1], groups, heads // groups, stored,
            min(len(lengths) - 1, 1), size, size**-0.5, 0 if valid is None else valid.stride(0),
            HAS_VALID=valid is not None, PARTS=parts, QUERIES=queries, SIZE_BLOCK=max(16, power(size)), ROWS=ROWS,
        )  # fmt: skip
        join_kernel[(batch * groups,)](
            sums, scales[0], scales[1], output, heads // groups, size,
            PARTS=parts, QUERIES=queries, SIZE_BLOCK=max(16, power(size)),
        )  # fmt: skip
    return output


if triton is not None:

    @triton.jit
    def _rotated(p_state, o_channel, m_channel, p_cos, p_sin, pairs):
        """Load a head's state, and rotate its first 2 * ``pairs`` channels in fp32: channel i with i + ``pairs``."""
        is_first, is_rotated = o_channel < pairs, o_channel < 2 * pairs
        o_partner = tl.where(is_first, o_channel + pairs, tl.where(is_rotated, o_channel - pairs, o_channel))
        o_angle = tl.where(is_first, o_channel, o_partner)
        b_state = tl.load(p_state + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        b_partner = tl.load(p_state + o_partner, mask=m_channel, other=0.0).to(tl.float32)
        b_cos = tl.load(p_cos + o_angle, mask=is_rotated, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=is_rotated, other=0.0)
        return b_state * b_cos + b_partner * tl.where(is_first, -b_sin, b_sin)

    @triton.jit(do_not_specialize=["stored", "angle_stride", "row_stride"])
    def _rotate_kernel(
        p_query, p_key, p_value, p_cos, p_sin, p_row, p_output, p_keys, p_values, heads, groups, stored, size, pairs,
        angle_stride, row_stride, SIZE_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Rotate one query of a sequence, or rotate and store one of its keys, with its value."""
        i_sequence, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        o_channel = tl.arange(0, SIZE_BLOCK)
        m_channel = o_channel < size
        o_angles = i_sequence * angle_stride * pairs
        p_cos += o_angles
        p_sin += o_angles
        if i_head < heads:
            o_query = (i_sequence * heads + i_head) * size
            b_query = _rotated(p_query + o_query, o_channel, m_channel, p_cos, p_sin, pairs)
            tl.store(p_output + o_query + o_channel, b_query.to(p_output.dtype.element_ty), mask=m_channel)
        else:
            i_group = i_sequence * groups + i_head - heads
            row = tl.load(p_row + i_sequence * row_stride)
            o_cached = (i_group * stored + row) * size + o_channel
            b_key = _rotated(p_key + i_group * size, o_channel, m_channel, p_cos, p_sin, pairs)
            b_value = tl.load(p_value + i_group * size + o_channel, mask=m_channel, other=0.0)
            tl.store(p_keys + o_cached, b_key.to(p_keys.dtype.element_ty), mask=m_channel)
            tl.store(p_values + o_cached, b_value, mask=m_channel)

    @triton.jit(do_not_specialize=["stored", "length_stride", "valid_stride"])
    def _part_kernel(
        p_query, p_keys, p_values, p_lengths, p_valid, p_sums, p_largest, p_totals, groups, queries, stored,
        length_stride, size, scale, valid_stride,
        HAS_VALID: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, SIZE_BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        """Attend to one part of the rows; write weighted sums, largest logits, and sums of weights."""
        i_group, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i_sequence = i_group // groups
        length = tl.load(p_lengths + i_sequence * length_stride)
        share = tl.cdiv(tl.cdiv(length, PARTS), ROWS) * ROWS
        begin = i_part * share
        o_query, o_channel = tl.arange(0, QUERIES), tl.arange(0, SIZE_BLOCK)
        m_query, m_channel = o_query < queries, o_channel < size
        p_rows = (i_group * queries + o_query)[:, None] * size + o_channel[None]
        b_query = tl.load(p_query + p_rows, mask=m_query[:, None] & m_channel[None], other=0.0)
        largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES,), dtype=tl.float32)
        b_sum = tl.zeros((QUERIES, SIZE_BLOCK), dtype=tl.float32)
        for start in range(begin, tl.minimum(begin + share, length), ROWS):
            o_row = start + tl.arange(0, ROWS)
            visible = o_row < length
            if HAS_VALID:
                visible = visible & (tl.load(p_valid + i_sequence * valid_stride + o_row, mask=visible, other=0) != 0)
            o_cached = (i_group * stored + o_row)[:, None] * size + o_channel[None]
            mask = visible[:, None] & m_channel[None]
            b_keys = tl.load(p_keys + o_cached, mask=mask, other=0.0)
            b_values = tl.load(p_values + o_cached, mask=mask, other=0.0)
            logits = tl.dot(b_query, tl.trans(b_keys), input_precision="ieee") * scale
            logits = tl.where(visible[None], logits, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(logits, axis=1))
            safe = tl.where(largest == float("-inf"), 0.0, largest)  # so far all rows were left out
            weights, correction = tl.exp(logits - safe[:, None]), tl.exp(before - safe)
            total = total * correction + tl.sum(weights, axis=1)
            b_sum = b_sum * correction[:, None]
            b_sum += tl.dot(weights.to(b_values.dtype), b_values, input_precision="ieee")
        o_part = (i_group * PARTS + i_part) * QUERIES + o_query
        tl.store(p_largest + o_part, largest)
        tl.store(p_totals + o_part, total)
        tl.store(p_sums + o_part[:, None] * size + o_channel[None], b_sum, mask=m_channel[None])

    @triton.jit
    def _join_kernel(
        p_sums, p_largest, p_totals, p_output, queries, size,
        PARTS: tl.constexpr, QUERIES: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one sequence and group of heads, in order."""
        i_group = tl.program_id(0).to(tl.int64)
        o_query, o_channel = tl.arange(0, QUERIES), tl.arange(0, SIZE_BLOCK)
        m_query, m_channel = o_query < queries, o_channel < size
        largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
        for i_part in range(PARTS):
            o_part = (i_group * PARTS + i_part) * QUERIES + o_query
            largest = tl.maximum(largest, tl.load(p_largest + o_part))
        total = tl.zeros((QUERIES,), dtype=tl.float32)
        b_sum = tl.zeros((QUERIES, SIZE_BLOCK), dtype=tl.float32)
        for i_part in range(PARTS):
            o_part = (i_group * PARTS + i_part) * QUERIES + o_query
            correction = tl.exp(tl.load(p_largest + o_part) - largest)
            total += tl.load(p_totals + o_part) * correction
            p_part = p_sums + o_part[:, None] * size + o_channel[None]
            b_sum += tl.load(p_part, mask=m_channel[None], other=0.0) * correction[:, None]
        p_rows = p_output + (i_group * queries + o_query)[:, None] * size + o_channel[None]
        b_output = (b_sum / total[:, None]).to(p_output.dtype.element_ty)
        tl.store(p_rows, b_output, mask=m_query[:, None] & m_channel[None])
