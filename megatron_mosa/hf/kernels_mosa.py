"""One token of every sequence through MoSA heads, in two Triton kernels.

A pair of a sequence and a head is one program, which ends at once if the head does not select the token: the host never
asks how many do. Weights and cached rows are read where they lie.
"""

from __future__ import annotations

import functools
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

INTERPRETED = False  # run on a CPU by Triton's interpreter, if the environment has TRITON_INTERPRET=1: for tests
ROWS = 128  # of the cache, at once
ROUTER_BLOCK = 2048  # input channels of the router at once: most programs do nothing else
WIDTH_BLOCK = 128  # those of q, k and v
WARPS = 4
COLUMNS = 32  # output channels of a program


def usable(states: Tensor) -> bool:
    """Whether the kernels run where the states are; if not, plain PyTorch does the same."""
    return triton is not None and (on_gpu(states.device) if states.is_cuda else INTERPRETED)


@functools.cache
def on_gpu(device: torch.device) -> bool:
    """Whether they run there: an NVIDIA GPU that can bf16, and a C compiler, which Triton needs for its launchers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0) and compiler is not None


def step_in_kernels(
    states: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    thresholds: Tensor,
    tokens: Tokens,
    rows: SelectedRows,
    feedback: float,
    share: float,
) -> Tensor:
    """The sum of the heads at one token of each sequence, which ``rows`` takes in where a head selects it.

    Args:
        states: [B, h].
        weights: of the router [E, h], of queries, keys and values [E, h, 3h'], of the output [E, h', h].
        thresholds: fp32 [E].
        tokens: of T = 1.
        rows: of which ``begin`` was called.
        feedback, share: see ``MosaHeads.above_threshold``; share is 1 / sparsity.

    Returns:
        [B, h].
    """
    router, qkv, proj = (weight.contiguous() for weight in weights)
    states = states.contiguous()
    (batch, width), (heads, size, _) = states.shape, proj.shape
    rows.make_room_for_one(states.new_empty(0, size))
    assert rows.counts is not None and rows.table is not None and rows.totals is not None
    assert rows.keys is not None and rows.values is not None
    cos, sin = (table.contiguous() for table in tokens.rotary)  # [B or 1, 1, n]
    position_stride = tokens.positions.stride(0) if tokens.positions.shape[0] > 1 else 0
    valid_stride = 0 if tokens.valid is None else tokens.valid.stride(0)
    chosen = torch.empty(batch, heads, dtype=torch.int8, device=states.device)
    gated = torch.empty(batch, heads, size, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    power: Any = triton.next_power_of_2  # pyright: ignore[reportOptionalMemberAccess]
    pair_kernel: Any = _pair_kernel
    sum_kernel: Any = _sum_kernel
    with torch.cuda.device_of(states):  # Triton launches on the current device
        pair_kernel[(batch * heads,)](
            states, router, thresholds, qkv, cos, sin, tokens.positions, tokens.valid, rows.counts, rows.table,
            rows.totals, rows.keys, rows.values, chosen, gated, heads, width, size, cos.shape[-1], rows.table.shape[2],
            position_stride, min(position_stride, 1), valid_stride, feedback, share, size**-0.5,
            HAS_VALID=tokens.valid is not None, HAS_FEEDBACK=feedback != 0, SIZE_BLOCK=power(size),
            WIDTH_BLOCK=WIDTH_BLOCK, ROUTER_BLOCK=min(power(width), ROUTER_BLOCK), ROWS=ROWS, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        rows.note(rows.totals)
        sum_kernel[(batch, -(-width // COLUMNS))](
            gated, chosen, proj, output, heads, width, size,
            HEADS_BLOCK=power(heads), SIZE_BLOCK=power(size), COLUMNS=COLUMNS,
        )  # fmt: skip
    return output


if triton is not None:

    @triton.jit
    def _score(state, router, width, ROUTER_BLOCK: tl.constexpr):
        logit = tl.zeros((ROUTER_BLOCK,), dtype=tl.float32)
        for start in range(0, width, ROUTER_BLOCK):
            channel = start + tl.arange(0, ROUTER_BLOCK)
            here = channel < width
            part = tl.load(state + channel, mask=here, other=0.0).to(tl.float32)
            logit += part * tl.load(router + channel, mask=here, other=0.0).to(tl.float32)
        return 1 / (1 + tl.exp(-tl.sum(logit)))

    @triton.jit
    def _project_in(state, qkv, width, size, SIZE_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
        """Query, key and value [SIZE_BLOCK] of a state [h] by weights [h, 3h'], in fp32."""
        channel = tl.arange(0, SIZE_BLOCK)
        query = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        key = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        value = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
        for start in range(0, width, WIDTH_BLOCK):
            source = start + tl.arange(0, WIDTH_BLOCK)
            here = source < width
            part = tl.load(state + source, mask=here, other=0.0).to(tl.float32)[:, None]
            weight = qkv + source[:, None] * (3 * size) + channel
            both = here[:, None] & (channel < size)
            query += tl.sum(part * tl.load(weight, mask=both, other=0.0).to(tl.float32), axis=0)
            key += tl.sum(part * tl.load(weight + size, mask=both, other=0.0).to(tl.float32), axis=0)
            value += tl.sum(part * tl.load(weight + 2 * size, mask=both, other=0.0).to(tl.float32), axis=0)
        return query, key, value

    @triton.jit
    def _rotate(state, cos, sin, rotated, SIZE_BLOCK: tl.constexpr):
        """fp32 [SIZE_BLOCK], of whose first 2 ``rotated`` channels each is turned with the one half of them away."""
        channel = tl.arange(0, SIZE_BLOCK)
        first, turns = channel < rotated, channel < 2 * rotated
        partner = tl.where(first, channel + rotated, tl.where(turns, channel - rotated, channel))
        angle = tl.where(first, channel, partner)
        cosine = tl.load(cos + angle, mask=turns, other=1.0)
        sine = tl.load(sin + angle, mask=turns, other=0.0)
        return state * cosine + tl.gather(state, partner, 0) * tl.where(first, -sine, sine)

    @triton.jit
    def _take_row(count, counts, slot, totals, BLOCK: tl.constexpr):
        """The row of the pool that a head's next token goes into: a new block is taken where the last one is full."""
        block = tl.load(slot)
        if count % BLOCK == 0:
            block = tl.atomic_add(totals, 1)
            tl.store(slot, block)
            tl.atomic_add(totals + 2, -1)
        if count % BLOCK == BLOCK - 1:
            tl.atomic_add(totals + 2, 1)
        tl.atomic_max(totals + 1, count + 1)
        tl.store(counts, count + 1)
        return block * BLOCK + count % BLOCK

    @triton.jit
    def _attend(
        query, key, value, count, slots, keys, values, size, scale,
        SIZE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """fp32 [SIZE_BLOCK]: attention to the token itself, and to ``count`` rows in the cache."""
        channel = tl.arange(0, SIZE_BLOCK)
        largest, total, result = tl.sum(query * key) * scale, 1.0, value
        for start in range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            there = row < count
            blocks = tl.load(slots + row // BLOCK, mask=there, other=0)
            place = ((blocks * BLOCK + row % BLOCK) * size)[:, None] + channel
            both = there[:, None] & (channel < size)
            cached = tl.load(keys + place, mask=both, other=0.0).to(tl.float32)
            logits = tl.where(there, tl.sum(cached * query, axis=1) * scale, float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(logits))
            shrink, shares = tl.exp(before - largest), tl.exp(logits - largest)
            total = total * shrink + tl.sum(shares)
            cached = tl.load(values + place, mask=both, other=0.0).to(tl.float32)
            result = result * shrink + tl.sum(shares[:, None] * cached, axis=0)
        return result / total

    # Not compiled anew when the cache grows.
    @triton.jit(do_not_specialize=["columns", "position_stride", "angle_stride", "valid_stride"])
    def _pair_kernel(
        states, router, thresholds, qkv, cos, sin, positions, valid, counts, table, totals, keys, values, chosen, gated,
        heads, width, size, rotated, columns, position_stride, angle_stride, valid_stride, feedback, share, scale,
        HAS_VALID: tl.constexpr, HAS_FEEDBACK: tl.constexpr, SIZE_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
        ROUTER_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Of one pair: select, project, rotate, cache, attend, gate.

        counts [B, E], table [B, E, columns], totals [3], keys and values [blocks, BLOCK, h'] are changed; chosen
        [B, E] is written, and gated [B, E, h'] where it is 1. Rounds wherever the forward pass of a sequence does.
        """
        pair = tl.program_id(0).to(tl.int64)
        sequence, head = pair // heads, pair % heads
        state = states + sequence * width
        score = _score(state, router + head * width, width, ROUTER_BLOCK)
        threshold = tl.load(thresholds + head)
        count = tl.load(counts + pair)
        position = tl.load(positions + sequence * position_stride)
        if HAS_FEEDBACK:
            margin = tl.log(score / (1 - score)) - tl.log(threshold / (1 - threshold))
            taken = margin + feedback * (position.to(tl.float32) * share) > feedback * count.to(tl.float32)
        else:
            taken = score > threshold
        taken = taken | (position == 0)
        if HAS_VALID:
            taken = taken & (tl.load(valid + sequence * valid_stride) != 0)
        tl.store(chosen + pair, taken.to(tl.int8))
        if taken:
            kind = gated.dtype.element_ty
            channel = tl.arange(0, SIZE_BLOCK)
            inside = channel < size
            query, key, value = _project_in(state, qkv + head * width * 3 * size, width, size, SIZE_BLOCK, WIDTH_BLOCK)
            query, key, value = query.to(kind).to(tl.float32), key.to(kind).to(tl.float32), value.to(kind)
            angles = sequence * angle_stride * rotated
            query = _rotate(query, cos + angles, sin + angles, rotated, SIZE_BLOCK).to(kind).to(tl.float32)
            key = _rotate(key, cos + angles, sin + angles, rotated, SIZE_BLOCK).to(kind)
            slots = table + pair * columns
            row = _take_row(count, counts + pair, slots + count // BLOCK, totals, BLOCK)
            tl.store(keys + row * size + channel, key, mask=inside)
            tl.store(values + row * size + channel, value, mask=inside)
            result = _attend(
                query, key.to(tl.float32), value.to(tl.float32), count, slots, keys, values, size, scale,
                SIZE_BLOCK, ROWS, BLOCK,
            )  # fmt: skip
            result = result.to(kind).to(tl.float32) * score
            tl.store(gated + pair * size + channel, result.to(kind), mask=inside)

    @triton.jit
    def _sum_kernel(
        gated, chosen, proj, output, heads, width, size,
        HEADS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Output channels of one sequence, summed in fp32 over the heads that have chosen the token, in their order."""
        sequence = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        channel = tl.arange(0, SIZE_BLOCK)
        both = (channel < size)[:, None] & (column < width)
        result = tl.zeros((COLUMNS,), dtype=tl.float32)
        every = tl.arange(0, HEADS_BLOCK)
        taken = tl.load(chosen + sequence * heads + every, mask=every < heads, other=0) != 0
        left = tl.where(taken, every, HEADS_BLOCK)
        head = tl.min(left)
        while head < heads:
            state = tl.load(gated + (sequence * heads + head) * size + channel, mask=channel < size, other=0.0)
            place = head.to(tl.int64) * size * width + channel[:, None] * width + column
            weight = tl.load(proj + place, mask=both, other=0.0).to(tl.float32)
            result += tl.sum(state.to(tl.float32)[:, None] * weight, axis=0)
            head = tl.min(tl.where(left > head, left, HEADS_BLOCK))
        tl.store(output + sequence * width + column, result.to(output.dtype.element_ty), mask=column < width)
