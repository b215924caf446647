"""Compute one token of every sequence in MoSA heads with four Triton kernels.

The first one scores, and the others find on the device which heads select the token, so the host never waits for their
number. If they are few, several programs share the projection of one, and others its stored rows. Weights and cached
rows are read in place.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows_mosa import BLOCK, SelectedRows
from .tokens_mosa import Tokens

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

INTERPRETED = False  # for tests with TRITON_INTERPRET=1: run on a CPU in Triton's interpreter
PROGRAMS = 1024  # with work to do, to aim at: eight for each multiprocessor of a large GPU
MOST_PARTS = 16  # of a head's rows
MOST_SLOTS = 32  # heads of a sequence that have programs of their own; the others share these
ROWS = 64  # rows of the cache per iteration
ROUTER_BLOCK = 2048  # input channels of the router per iteration
WIDTH_BLOCK = 256  # input channels of q, k and v per iteration
COLUMNS = 32  # output channels of q, k and v, or of the layer, per iteration


class Plan(NamedTuple):
    """How a step is divided among programs."""

    sequences: int
    """Of a head, that one program scores."""

    slots: int
    """Heads of a sequence that have programs of their own, if they select its token; further ones share these."""

    columns: int
    """Programs among which the projection of a head is divided."""

    parts: int
    """Programs among which the rows of a head are divided."""

    at_once: int
    """Heads that are summed at a time; more of them hide latency, and leave room for fewer programs."""


def plan(batch: int, heads: int, width: int, size: int, share: float) -> Plan:
    """Return the plan for heads that each select ``share`` of the tokens; others only take longer."""
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    expected = heads * share  # of a sequence
    wanted = max(1, int(PROGRAMS / max(batch * expected, 1)))
    slots = min(power(int(2 * expected) + 2), MOST_SLOTS, power(heads))
    columns, parts = min(-(-3 * size // COLUMNS), wanted), min(MOST_PARTS, power(wanted + 1) // 2)
    sequences = min(4, power(max(1, batch // 8) + 1) // 2)
    most_at_once = max(1, PROGRAMS * COLUMNS // (batch * width))
    at_once = min(slots, power(most_at_once + 1) // 2, max(1, 256 // power(size)))  # 256 x COLUMNS sums in registers
    return Plan(sequences, slots, columns, parts, at_once)


def can_run_kernels(states: Tensor) -> bool:
    """Return whether the kernels run on the states' device; otherwise plain PyTorch computes the same."""
    return triton is not None and (supports_kernels(states.device) if states.is_cuda else INTERPRETED)


@functools.cache
def supports_kernels(device: torch.device) -> bool:
    """Return whether there are an NVIDIA GPU that supports bf16 and a C compiler, which Triton's launchers need."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0) and compiler is not None


@functools.cache
def _prompt_module() -> Any:
    try:
        module = importlib.import_module("megatron_mosa.kernels.prompt")
    except ImportError:
        return None
    return module if hasattr(module, "select_and_count") else None  # earlier versions lack what this one calls


def training_kernels(states: Tensor, head_dim: int) -> Any:
    """Return the module with which megatron_mosa reads prompts, or None if it is not installed or cannot run here."""
    module = _prompt_module()
    return module if module is not None and module.prompt_kernels(states, head_dim) is not None else None


def step_in_kernels(
    states: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    thresholds: Tensor,
    tokens: Tokens,
    rows: SelectedRows,
    feedback: float,
    share: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the sum over heads for one token of each sequence, and add the token to ``rows`` of heads that select it.

    Args:
        states: [B, h].
        weights: router [E, h]; queries, keys and values [E, h, 3h']; output [E, h', h].
        thresholds: fp32 [E].
        tokens: positions, angles and padding with T = 1.
        rows: initialized storage of the layer.
        feedback, share: see ``MosaHeads.chosen``; share is 1 / sparsity.
        residual: [B, h], added to the result, in a step that is captured: ``rows`` has room already, and its totals
            are not copied to the host.

    Returns:
        [B, h].
    """
    router, qkv, proj = (weight.contiguous() for weight in weights)
    states = states.contiguous()
    (batch, width), (heads, size, _) = states.shape, proj.shape
    if residual is None:
        rows.reserve_one(states.new_empty(0, size))
    assert rows.counts is not None and rows.table is not None and rows.totals is not None
    assert rows.keys is not None and rows.values is not None
    cos, sin = (table.contiguous() for table in tokens.rotary)  # [B or 1, 1, n]
    position_stride = tokens.positions.stride(0) if tokens.positions.shape[0] > 1 else 0
    valid_stride = 0 if tokens.valid is None else tokens.valid.stride(0)
    sequences, slots, columns, parts, at_once = plan(batch, heads, width, size, share)
    chosen = torch.empty(batch, heads, dtype=torch.int8, device=states.device)
    scores = torch.empty(batch, heads, dtype=torch.float32, device=states.device)
    listed = torch.empty(batch, heads, dtype=torch.int32, device=states.device)
    projected = torch.empty(batch, heads, 3 * size, dtype=states.dtype, device=states.device)
    sums = torch.empty(batch * heads, parts, size, dtype=torch.float32, device=states.device)
    scales = torch.empty(2, batch * heads, parts, dtype=torch.float32, device=states.device)
    output = torch.empty_like(states)
    score_kernel: Any = _score_kernel
    project_kernel: Any = _project_kernel
    attend_kernel: Any = _attend_kernel
    sum_kernel: Any = _sum_kernel
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    with torch.cuda.device_of(states):  # Triton launches on the current device
        score_kernel[(heads, -(-batch // sequences))](
            states, router, thresholds, tokens.positions, tokens.valid, rows.counts, chosen, scores, batch, heads,
            width, position_stride, valid_stride, feedback, share, HAS_VALID=tokens.valid is not None,
            HAS_FEEDBACK=feedback != 0, SEQUENCES=sequences, ROUTER_BLOCK=min(power(width), ROUTER_BLOCK),
        )  # fmt: skip
        project_kernel[(batch, slots * columns)](
            states, qkv, chosen, projected, heads, width, size, SLOTS=slots, PARTS=columns, HEADS_BLOCK=power(heads),
            WIDTH_BLOCK=min(power(width), WIDTH_BLOCK), COLUMNS=COLUMNS,
        )  # fmt: skip
        attend_kernel[(batch, slots * parts)](
            projected, chosen, listed, cos, sin, rows.counts, rows.table, rows.totals, rows.keys, rows.values, sums,
            scales[0], scales[1], heads, size, cos.shape[-1], rows.table.shape[2], min(len(cos) - 1, 1), size**-0.5,
            SLOTS=slots, PARTS=parts, HEADS_BLOCK=power(heads), SIZE_BLOCK=power(size),
            ROWS=min(ROWS, 8192 // power(size)), BLOCK=BLOCK,
        )  # fmt: skip
        sum_kernel[(batch, -(-width // COLUMNS))](
            sums, scales[0], scales[1], chosen, listed, scores, proj, residual, output, rows.counts, rows.totals,
            heads, width, size, HAS_RESIDUAL=residual is not None, AT_ONCE=at_once, PARTS=parts,
            HEADS_BLOCK=power(heads), SIZE_BLOCK=power(size), COLUMNS=COLUMNS, BLOCK=BLOCK,
        )  # fmt: skip
    if residual is None:
        rows.set_totals(rows.totals)
    return output


if triton is not None:

    @triton.jit(do_not_specialize=["batch", "position_stride", "valid_stride"])
    def _score_kernel(
        p_states, p_router, p_thresholds, p_positions, p_valid, p_counts, p_chosen, p_scores, batch, heads, width,
        position_stride, valid_stride, feedback, share,
        HAS_VALID: tl.constexpr, HAS_FEEDBACK: tl.constexpr, SEQUENCES: tl.constexpr, ROUTER_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Score the tokens of some sequences for one head; write scores [B, E], and chosen [B, E]."""
        i_head = tl.program_id(0)
        i_sequence = tl.program_id(1).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
        m_sequence = i_sequence < batch
        b_products = tl.zeros((SEQUENCES, ROUTER_BLOCK), dtype=tl.float32)
        for start in range(0, width, ROUTER_BLOCK):
            o_channel = start + tl.arange(0, ROUTER_BLOCK)
            m_channel = o_channel < width
            p_state = p_states + i_sequence[:, None] * width + o_channel
            b_state = tl.load(p_state, mask=m_sequence[:, None] & m_channel, other=0.0).to(tl.float32)
            b_router = tl.load(p_router + i_head * width + o_channel, mask=m_channel, other=0.0)
            b_products += b_state * b_router.to(tl.float32)
        score = 1 / (1 + tl.exp(-tl.sum(b_products, axis=1)))
        threshold, i_pair = tl.load(p_thresholds + i_head), i_sequence * heads + i_head
        position = tl.load(p_positions + i_sequence * position_stride, mask=m_sequence, other=0)
        chosen = score > threshold
        if HAS_FEEDBACK:
            margin = tl.log(score / (1 - score)) - tl.log(threshold / (1 - threshold))
            count = tl.load(p_counts + i_pair, mask=m_sequence, other=0).to(tl.float32)
            chosen = margin + feedback * (position.to(tl.float32) * share) > feedback * count
        chosen = chosen | (position == 0)
        if HAS_VALID:
            chosen = chosen & (tl.load(p_valid + i_sequence * valid_stride, mask=m_sequence, other=0) != 0)
        tl.store(p_chosen + i_pair, chosen.to(tl.int8), mask=m_sequence)
        tl.store(p_scores + i_pair, score, mask=m_sequence)

    @triton.jit
    def _numbered(p_chosen, heads, HEADS_BLOCK: tl.constexpr):
        """Return for each head of a sequence its number among those that selected the token, or -1."""
        o_head = tl.arange(0, HEADS_BLOCK)
        is_chosen = tl.load(p_chosen + o_head, mask=o_head < heads, other=0).to(tl.int32)
        return tl.where(is_chosen != 0, tl.cumsum(is_chosen, axis=0) - 1, -1)

    @triton.jit
    def _project_kernel(
        p_states, p_qkv, p_chosen, p_projected, heads, width, size,
        SLOTS: tl.constexpr, PARTS: tl.constexpr, HEADS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Project the token of one sequence to some channels of q, k and v of heads that selected it.

        Of these heads, program i projects for those with the numbers i, i + SLOTS, and so on. Writes [B, E, 3h'].
        """
        i_sequence, o_head = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_BLOCK)
        b_number = _numbered(p_chosen + i_sequence * heads, heads, HEADS_BLOCK)
        for number in range(tl.program_id(1) // PARTS, tl.max(b_number) + 1, SLOTS):
            i_head = tl.sum(tl.where(b_number == number, o_head, 0)).to(tl.int64)
            p_output = p_projected + (i_sequence * heads + i_head) * 3 * size
            for first in range(tl.program_id(1) % PARTS * COLUMNS, 3 * size, PARTS * COLUMNS):
                o_column = first + tl.arange(0, COLUMNS)
                m_column = o_column < 3 * size
                b_products = tl.zeros((WIDTH_BLOCK, COLUMNS), dtype=tl.float32)
                for start in range(0, width, WIDTH_BLOCK):
                    o_input = start + tl.arange(0, WIDTH_BLOCK)
                    m_input = o_input < width
                    b_state = tl.load(p_states + i_sequence * width + o_input, mask=m_input, other=0.0).to(tl.float32)
                    p_weight = p_qkv + (i_head * width + o_input)[:, None] * (3 * size) + o_column
                    b_weight = tl.load(p_weight, mask=m_input[:, None] & m_column, other=0.0)
                    b_products += b_state[:, None] * b_weight.to(tl.float32)
                b_output = tl.sum(b_products, axis=0).to(p_projected.dtype.element_ty)
                tl.store(p_output + o_column, b_output, mask=m_column)

    @triton.jit
    def _rotated(p_state, p_cos, p_sin, size, pairs, SIZE_BLOCK: tl.constexpr):
        """Load a query or key, and rotate its first 2 * ``pairs`` channels in fp32: channel i with i + ``pairs``."""
        o_channel = tl.arange(0, SIZE_BLOCK)
        mask, is_first, is_rotated = o_channel < size, o_channel < pairs, o_channel < 2 * pairs
        o_partner = tl.where(is_first, o_channel + pairs, tl.where(is_rotated, o_channel - pairs, o_channel))
        o_angle = tl.where(is_first, o_channel, o_partner)
        b_state = tl.load(p_state + o_channel, mask=mask, other=0.0).to(tl.float32)
        b_partner = tl.load(p_state + o_partner, mask=mask, other=0.0).to(tl.float32)
        b_cos = tl.load(p_cos + o_angle, mask=is_rotated, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=is_rotated, other=0.0)
        b_rotated = b_state * b_cos + b_partner * tl.where(is_first, -b_sin, b_sin)
        return b_rotated.to(p_state.dtype.element_ty)

    @triton.jit
    def _append(
        p_state, b_key, count, p_slot, p_totals, p_keys, p_values, size, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Store key and value in the row of a head's next token, in a new block if the last one is full; return the
        value."""
        o_channel = tl.arange(0, SIZE_BLOCK)
        mask = o_channel < size
        block = tl.load(p_slot)
        if count % BLOCK == 0:
            block = tl.atomic_add(p_totals, 1)
            tl.store(p_slot, block)
        o_cached = (block * BLOCK + count % BLOCK) * size + o_channel
        b_value = tl.load(p_state + 2 * size + o_channel, mask=mask, other=0.0)
        tl.store(p_keys + o_cached, b_key, mask=mask)
        tl.store(p_values + o_cached, b_value, mask=mask)
        return b_value.to(tl.float32)

    # Without specialization on values that change as the cache grows, which would compile the kernel anew.
    @triton.jit(do_not_specialize=["columns", "angle_stride"])
    def _attend_kernel(
        p_projected, p_chosen, p_listed, p_cos, p_sin, p_counts, p_table, p_totals, p_keys, p_values, p_sums, p_largest,
        p_weights, heads, size, pairs, columns, angle_stride, scale,
        SLOTS: tl.constexpr, PARTS: tl.constexpr, HEADS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Attend to one part of the rows of heads that selected the token; the first part also adds it to them.

        Of the heads in question, program i attends for those with the numbers i, i + SLOTS, and so on. Updates table
        [B, E, columns], totals [3], keys and values [blocks, BLOCK, h']. Writes for each pair of sequence and head and
        each part weighted sums [B E, PARTS, h'], the largest logit and the sum of weights [B E, PARTS]; and the heads
        in question, in order, to listed [B, E].
        """
        i_sequence, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1) % PARTS
        o_head, o_channel = tl.arange(0, HEADS_BLOCK), tl.arange(0, SIZE_BLOCK)
        m_channel = o_channel < size
        b_number = _numbered(p_chosen + i_sequence * heads, heads, HEADS_BLOCK)
        o_angles = i_sequence * angle_stride * pairs
        for number in range(tl.program_id(1) // PARTS, tl.max(b_number) + 1, SLOTS):
            i_head = tl.sum(tl.where(b_number == number, o_head, 0))
            i_pair = i_sequence * heads + i_head
            count = tl.load(p_counts + i_pair)
            p_state, p_slots = p_projected + i_pair * 3 * size, p_table + i_pair * columns
            b_query = _rotated(p_state, p_cos + o_angles, p_sin + o_angles, size, pairs, SIZE_BLOCK).to(tl.float32)
            largest, total, b_sum = float("-inf"), 0.0, tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
            share = tl.cdiv(tl.cdiv(count, PARTS), ROWS) * ROWS
            begin = i_part * share
            for start in range(begin, tl.minimum(begin + share, count), ROWS):
                o_row = start + tl.arange(0, ROWS)
                m_row = o_row < count
                blocks = tl.load(p_slots + o_row // BLOCK, mask=m_row, other=0)
                o_cached = ((blocks * BLOCK + o_row % BLOCK) * size)[:, None] + o_channel
                mask = m_row[:, None] & m_channel
                b_keys = tl.load(p_keys + o_cached, mask=mask, other=0.0).to(tl.float32)
                b_values = tl.load(p_values + o_cached, mask=mask, other=0.0).to(tl.float32)
                logits = tl.where(m_row, tl.sum(b_keys * b_query, axis=1) * scale, float("-inf"))
                before, largest = largest, tl.maximum(largest, tl.max(logits))
                correction, weights = tl.exp(before - largest), tl.exp(logits - largest)
                total = total * correction + tl.sum(weights)
                b_sum = b_sum * correction + tl.sum(weights[:, None] * b_values, axis=0)
            if i_part == 0:
                tl.store(p_listed + i_sequence * heads + number, i_head)
                b_key = _rotated(p_state + size, p_cos + o_angles, p_sin + o_angles, size, pairs, SIZE_BLOCK)
                p_slot = p_slots + count // BLOCK
                b_value = _append(p_state, b_key, count, p_slot, p_totals, p_keys, p_values, size, SIZE_BLOCK, BLOCK)
                logit = tl.sum(b_query * b_key.to(tl.float32)) * scale
                before, largest = largest, tl.maximum(largest, logit)
                correction, weight = tl.exp(before - largest), tl.exp(logit - largest)
                total, b_sum = total * correction + weight, b_sum * correction + weight * b_value
            tl.store(p_largest + i_pair * PARTS + i_part, largest)
            tl.store(p_weights + i_pair * PARTS + i_part, total)
            tl.store(p_sums + (i_pair * PARTS + i_part) * size + o_channel, b_sum, mask=m_channel)

    @triton.jit
    def _count(p_counts, p_totals, is_new, heads, HEADS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
        """Count the tokens that heads of a sequence have selected; see ``SelectedRows.totals``."""
        o_head = tl.arange(0, HEADS_BLOCK)
        b_count = tl.load(p_counts + o_head, mask=is_new, other=1)
        tl.store(p_counts + o_head, b_count + 1, mask=is_new)
        filled = (b_count % BLOCK == BLOCK - 1).to(tl.int64) - (b_count % BLOCK == 0).to(tl.int64)
        tl.atomic_max(p_totals + 1, tl.max(tl.where(is_new, b_count + 1, 0)))
        tl.atomic_add(p_totals + 2, tl.sum(tl.where(is_new, filled, 0)))

    @triton.jit
    def _sum_kernel(
        p_sums, p_largest, p_weights, p_chosen, p_listed, p_scores, p_proj, p_residual, p_output, p_counts, p_totals,
        heads, width, size,
        HAS_RESIDUAL: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
        SIZE_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of each head, gate, and project to output channels of one sequence, summed in fp32.

        Of the heads that selected the token, AT_ONCE are added at a time, and channels only at the end: a sum in every
        iteration would be a barrier in each, and made Triton 3.6.0 spill. Updates counts [B, E] and totals [3]. Rounds
        wherever the forward pass of a whole sequence does.
        """
        i_sequence = tl.program_id(0).to(tl.int64)
        o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        o_head, o_channel, o_part = tl.arange(0, HEADS_BLOCK), tl.arange(0, SIZE_BLOCK), tl.arange(0, PARTS)
        dtype = p_output.dtype.element_ty
        b_chosen = tl.load(p_chosen + i_sequence * heads + o_head, mask=o_head < heads, other=0).to(tl.int32)
        b_output = tl.zeros((COLUMNS,), dtype=tl.float32)
        if HAS_RESIDUAL:
            o_residual = i_sequence * width + o_column
            b_output += tl.load(p_residual + o_residual, mask=o_column < width, other=0.0).to(tl.float32)
        b_products = tl.zeros((AT_ONCE, SIZE_BLOCK, COLUMNS), dtype=tl.float32)
        total = tl.sum(b_chosen)
        for first in range(0, total, AT_ONCE):
            o_number = first + tl.arange(0, AT_ONCE)
            m_number = o_number < total
            b_head = tl.load(p_listed + i_sequence * heads + o_number, mask=m_number, other=0)
            b_pair = i_sequence * heads + b_head  # [AT_ONCE]
            o_parts = b_pair[:, None] * PARTS + o_part  # [AT_ONCE, PARTS]
            b_largest = tl.load(p_largest + o_parts, mask=m_number[:, None], other=0.0)
            b_correction = tl.exp(b_largest - tl.max(b_largest, axis=1)[:, None])
            b_weights = tl.load(p_weights + o_parts, mask=m_number[:, None], other=1.0)
            weight = tl.sum(b_weights * b_correction, axis=1)
            mask = m_number[:, None, None] & (o_channel < size)
            b_sums = tl.load(p_sums + o_parts[:, :, None] * size + o_channel, mask=mask, other=0.0)
            b_state = tl.sum(b_sums * b_correction[:, :, None], axis=1) / weight[:, None]
            b_gate = tl.load(p_scores + b_pair, mask=m_number, other=0.0)
            b_state = (b_state.to(dtype).to(tl.float32) * b_gate[:, None]).to(dtype).to(tl.float32)  # [AT_ONCE, h']
            p_head = p_proj + b_head.to(tl.int64) * size * width
            p_weight = p_head[:, None, None] + (o_channel * width)[:, None] + o_column
            mask = m_number[:, None, None] & (o_channel < size)[:, None] & (o_column < width)
            b_products += b_state[:, :, None] * tl.load(p_weight, mask=mask, other=0.0).to(tl.float32)
        b_output += tl.sum(tl.sum(b_products, axis=1), axis=0)
        tl.store(p_output + i_sequence * width + o_column, b_output.to(dtype), mask=o_column < width)
        if tl.program_id(1) == 0:
            _count(p_counts + i_sequence * heads, p_totals, b_chosen != 0, heads, HEADS_BLOCK, BLOCK)
