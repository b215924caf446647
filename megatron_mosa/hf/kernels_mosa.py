"""Compute one token of every sequence in MoSA heads with two Triton kernels.

Each pair of a sequence and a head is one program, which exits early if the head does not select the token, so the host
never waits for the number of selected tokens. Weights and cached rows are read in place.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from typing import Any

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
ROWS = 128  # rows of the cache per iteration
ROUTER_BLOCK = 2048  # input channels of the router per iteration; large, since most programs do nothing else
WIDTH_BLOCK = 128  # input channels of q, k and v per iteration
WARPS = 4
COLUMNS = 32  # output channels per program


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
        return importlib.import_module("megatron_mosa.kernels.prompt")
    except ImportError:
        return None


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
    has_room: bool = False,
) -> Tensor:
    """Return the sum over heads for one token of each sequence, and add the token to ``rows`` of heads that select it.

    Args:
        states: [B, h].
        weights: router [E, h]; queries, keys and values [E, h, 3h']; output [E, h', h].
        thresholds: fp32 [E].
        tokens: positions, angles and padding with T = 1.
        rows: initialized storage of the layer.
        feedback, share: see ``MosaHeads.chosen``; share is 1 / sparsity.
        has_room: ``rows`` has room already, and its totals are not copied to the host.

    Returns:
        [B, h].
    """
    router, qkv, proj = (weight.contiguous() for weight in weights)
    states = states.contiguous()
    (batch, width), (heads, size, _) = states.shape, proj.shape
    if not has_room:
        rows.reserve_one(states.new_empty(0, size))
    assert rows.counts is not None and rows.table is not None and rows.totals is not None
    assert rows.keys is not None and rows.values is not None
    cos, sin = (table.contiguous() for table in tokens.rotary)  # [B or 1, 1, n]
    position_stride = tokens.positions.stride(0) if tokens.positions.shape[0] > 1 else 0
    valid_stride = 0 if tokens.valid is None else tokens.valid.stride(0)
    chosen = torch.empty(batch, heads, dtype=torch.int8, device=states.device)
    gated = torch.empty(batch, heads, size, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    pair_kernel: Any = _pair_kernel
    sum_kernel: Any = _sum_kernel
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    with torch.cuda.device_of(states):  # Triton launches on the current device
        pair_kernel[(batch * heads,)](
            states, router, thresholds, qkv, cos, sin, tokens.positions, tokens.valid, rows.counts, rows.table,
            rows.totals, rows.keys, rows.values, chosen, gated, heads, width, size, cos.shape[-1], rows.table.shape[2],
            position_stride, min(position_stride, 1), valid_stride, feedback, share, size**-0.5,
            HAS_VALID=tokens.valid is not None, HAS_FEEDBACK=feedback != 0, SIZE_BLOCK=power(size),
            WIDTH_BLOCK=WIDTH_BLOCK, ROUTER_BLOCK=min(power(width), ROUTER_BLOCK), ROWS=ROWS, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        if not has_room:
            rows.set_totals(rows.totals)
        sum_kernel[(batch, -(-width // COLUMNS))](
            gated, chosen, proj, output, heads, width, size,
            HEADS_BLOCK=power(heads), SIZE_BLOCK=power(size), COLUMNS=COLUMNS,
        )  # fmt: skip
    return output


if triton is not None:

    @triton.jit
    def _score(p_state, p_router, width, ROUTER_BLOCK: tl.constexpr):
        logit = tl.zeros((ROUTER_BLOCK,), dtype=tl.float32)
        for start in range(0, width, ROUTER_BLOCK):
            o_channel = start + tl.arange(0, ROUTER_BLOCK)
            mask = o_channel < width
            b_state = tl.load(p_state + o_channel, mask=mask, other=0.0).to(tl.float32)
            logit += b_state * tl.load(p_router + o_channel, mask=mask, other=0.0).to(tl.float32)
        return 1 / (1 + tl.exp(-tl.sum(logit)))

    @triton.jit
    def _project_in(p_state, p_qkv, width, size, SIZE_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
        """Project a state [h] by weights [h, 3h'] to query, key and value [SIZE_BLOCK] in fp32."""
        o_channel = tl.arange(0, SIZE_BLOCK)
        b_query = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        b_key = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        b_value = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        for start in range(0, width, WIDTH_BLOCK):
            o_input = start + tl.arange(0, WIDTH_BLOCK)
            input_mask = o_input < width
            b_state = tl.load(p_state + o_input, mask=input_mask, other=0.0).to(tl.float32)[:, None]
            p_weight = p_qkv + o_input[:, None] * (3 * size) + o_channel
            mask = input_mask[:, None] & (o_channel < size)
            b_query += tl.sum(b_state * tl.load(p_weight, mask=mask, other=0.0).to(tl.float32), axis=0)
            b_key += tl.sum(b_state * tl.load(p_weight + size, mask=mask, other=0.0).to(tl.float32), axis=0)
            b_value += tl.sum(b_state * tl.load(p_weight + 2 * size, mask=mask, other=0.0).to(tl.float32), axis=0)
        return b_query, b_key, b_value

    @triton.jit
    def _rotate(b_state, p_cos, p_sin, pairs, SIZE_BLOCK: tl.constexpr):
        """Rotate the first 2 * ``pairs`` channels of an fp32 [SIZE_BLOCK]: channel i with channel i + ``pairs``."""
        o_channel = tl.arange(0, SIZE_BLOCK)
        is_first, is_rotated = o_channel < pairs, o_channel < 2 * pairs
        o_partner = tl.where(is_first, o_channel + pairs, tl.where(is_rotated, o_channel - pairs, o_channel))
        o_angle = tl.where(is_first, o_channel, o_partner)
        b_cos = tl.load(p_cos + o_angle, mask=is_rotated, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=is_rotated, other=0.0)
        return b_state * b_cos + tl.gather(b_state, o_partner, 0) * tl.where(is_first, -b_sin, b_sin)

    @triton.jit
    def _allocate_row(count, p_count, p_slot, p_totals, BLOCK: tl.constexpr):
        """Return the pool's row for a head's next token; take a new block if the last one is full."""
        block = tl.load(p_slot)
        if count % BLOCK == 0:
            block = tl.atomic_add(p_totals, 1)
            tl.store(p_slot, block)
            tl.atomic_add(p_totals + 2, -1)
        if count % BLOCK == BLOCK - 1:
            tl.atomic_add(p_totals + 2, 1)
        tl.atomic_max(p_totals + 1, count + 1)
        tl.store(p_count, count + 1)
        return block * BLOCK + count % BLOCK

    @triton.jit
    def _attend(
        b_query, b_key, b_value, count, p_slots, p_keys, p_values, size, scale,
        SIZE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Attend to the token itself and to ``count`` rows of the cache; return fp32 [SIZE_BLOCK]."""
        o_channel = tl.arange(0, SIZE_BLOCK)
        largest, total, b_output = tl.sum(b_query * b_key) * scale, 1.0, b_value
        for start in range(0, count, ROWS):
            o_row = start + tl.arange(0, ROWS)
            row_mask = o_row < count
            blocks = tl.load(p_slots + o_row // BLOCK, mask=row_mask, other=0)
            o_cached = ((blocks * BLOCK + o_row % BLOCK) * size)[:, None] + o_channel
            mask = row_mask[:, None] & (o_channel < size)
            b_keys = tl.load(p_keys + o_cached, mask=mask, other=0.0).to(tl.float32)
            logits = tl.where(row_mask, tl.sum(b_keys * b_query, axis=1) * scale, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(logits))
            correction, weights = tl.exp(before - largest), tl.exp(logits - largest)
            total = total * correction + tl.sum(weights)
            b_values = tl.load(p_values + o_cached, mask=mask, other=0.0).to(tl.float32)
            b_output = b_output * correction + tl.sum(weights[:, None] * b_values, axis=0)
        return b_output / total

    # Without specialization on values that change as the cache grows, which would compile the kernel anew.
    @triton.jit(do_not_specialize=["columns", "position_stride", "angle_stride", "valid_stride"])
    def _pair_kernel(
        p_states, p_router, p_thresholds, p_qkv, p_cos, p_sin, p_positions, p_valid, p_counts, p_table, p_totals,
        p_keys, p_values, p_chosen, p_gated, heads, width, size, pairs, columns, position_stride, angle_stride,
        valid_stride, feedback, share, scale,
        HAS_VALID: tl.constexpr, HAS_FEEDBACK: tl.constexpr, SIZE_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
        ROUTER_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Select, project, rotate, cache, attend and gate, for one pair of a sequence and a head.

        Updates counts [B, E], table [B, E, columns], totals [3], keys and values [blocks, BLOCK, h']. Writes chosen
        [B, E], and gated [B, E, h'] where it is 1. Rounds wherever the forward pass of a whole sequence does.
        """
        i_pair = tl.program_id(0).to(tl.int64)
        i_sequence, i_head = i_pair // heads, i_pair % heads
        p_state = p_states + i_sequence * width
        score = _score(p_state, p_router + i_head * width, width, ROUTER_BLOCK)
        threshold = tl.load(p_thresholds + i_head)
        count = tl.load(p_counts + i_pair)
        position = tl.load(p_positions + i_sequence * position_stride)
        if HAS_FEEDBACK:
            margin = tl.log(score / (1 - score)) - tl.log(threshold / (1 - threshold))
            chosen = margin + feedback * (position.to(tl.float32) * share) > feedback * count.to(tl.float32)
        else:
            chosen = score > threshold
        chosen = chosen | (position == 0)
        if HAS_VALID:
            chosen = chosen & (tl.load(p_valid + i_sequence * valid_stride) != 0)
        tl.store(p_chosen + i_pair, chosen.to(tl.int8))
        if chosen:
            dtype = p_gated.dtype.element_ty
            o_channel = tl.arange(0, SIZE_BLOCK)
            mask = o_channel < size
            p_weight = p_qkv + i_head * width * 3 * size
            b_query, b_key, b_value = _project_in(p_state, p_weight, width, size, SIZE_BLOCK, WIDTH_BLOCK)
            b_query, b_key = b_query.to(dtype).to(tl.float32), b_key.to(dtype).to(tl.float32)
            o_angles = i_sequence * angle_stride * pairs
            b_query = _rotate(b_query, p_cos + o_angles, p_sin + o_angles, pairs, SIZE_BLOCK).to(dtype).to(tl.float32)
            b_key = _rotate(b_key, p_cos + o_angles, p_sin + o_angles, pairs, SIZE_BLOCK).to(dtype)
            b_value = b_value.to(dtype)
            p_slots = p_table + i_pair * columns
            row = _allocate_row(count, p_counts + i_pair, p_slots + count // BLOCK, p_totals, BLOCK)
            tl.store(p_keys + row * size + o_channel, b_key, mask=mask)
            tl.store(p_values + row * size + o_channel, b_value, mask=mask)
            b_output = _attend(
                b_query, b_key.to(tl.float32), b_value.to(tl.float32), count, p_slots, p_keys, p_values, size, scale,
                SIZE_BLOCK, ROWS, BLOCK,
            )  # fmt: skip
            b_output = b_output.to(dtype).to(tl.float32) * score
            tl.store(p_gated + i_pair * size + o_channel, b_output.to(dtype), mask=mask)

    @triton.jit
    def _sum_kernel(
        p_gated, p_chosen, p_proj, p_output, heads, width, size,
        HEADS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Compute output channels of one sequence, summed in fp32 over the heads that selected the token, in order."""
        i_sequence = tl.program_id(0).to(tl.int64)
        o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        o_channel = tl.arange(0, SIZE_BLOCK)
        mask = (o_channel < size)[:, None] & (o_column < width)
        b_output = tl.zeros((COLUMNS,), dtype=tl.float32)
        o_head = tl.arange(0, HEADS_BLOCK)
        chosen = tl.load(p_chosen + i_sequence * heads + o_head, mask=o_head < heads, other=0) != 0
        remaining = tl.where(chosen, o_head, HEADS_BLOCK)
        head = tl.min(remaining)
        while head < heads:
            p_state = p_gated + (i_sequence * heads + head) * size
            b_state = tl.load(p_state + o_channel, mask=o_channel < size, other=0.0)
            o_weight = head.to(tl.int64) * size * width + o_channel[:, None] * width + o_column
            b_weight = tl.load(p_proj + o_weight, mask=mask, other=0.0).to(tl.float32)
            b_output += tl.sum(b_state.to(tl.float32)[:, None] * b_weight, axis=0)
            head = tl.min(tl.where(remaining > head, remaining, HEADS_BLOCK))
        p_row = p_output + i_sequence * width
        tl.store(p_row + o_column, b_output.to(p_output.dtype.element_ty), mask=o_column < width)
