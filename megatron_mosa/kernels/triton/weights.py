"""The gradients of the heads' matrices: selected tokens, transposed, times the values of their rows."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton import tiles
from megatron_mosa.kernels.triton.common import INTERPRET, dot, multiprocessors, strides
from megatron_mosa.kernels.triton.gathered import PAIR, masked_tile, rows_at
from megatron_mosa.kernels.triton.rows import Rows, bits_of


@triton.jit(do_not_specialize=["B"])
def _weight_gradient_kernel(
    states, places, row_starts, values, pairs, output, pair_output, B, R, H, stride_b, stride_t,
    stride_s, stride_e, stride_h, stride_d, pair_stride_s,
    D: tl.constexpr, SHIFT: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, HAS_PAIRS: tl.constexpr,
    PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, SPLITS: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, split, part = tl.program_id(1), tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # of the states
    first = tl.arange(0, WIDTH if PARTS == 1 else 2 * WIDTH)  # of the values: one part, or two in one tile
    in_first, first = first % WIDTH < D, (part + first // WIDTH) * D + first % WIDTH
    of_first = tl.zeros((COLUMNS, WIDTH if PARTS == 1 else 2 * WIDTH), dtype=tl.float32)
    if PARTS == 3:
        last = tl.arange(0, WIDTH)
        in_last, last = last < D, 2 * D + last
        of_last = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    if HAS_PAIRS:
        along = tl.zeros((COLUMNS, PAIR), dtype=tl.float32)
    count = tl.load(row_starts + head * (B + 1) + B)
    share = tl.cdiv(tl.cdiv(count, ROWS), SPLITS) * ROWS
    lane, pair = tl.arange(0, ROWS), tl.arange(0, PAIR)
    its_places = places + head.to(tl.int64) * R + lane
    # Places come an iteration ahead: the gather then has all stages of the pipeline to itself.
    following = tl.load(its_places + split * share, mask=split * share + lane < count, other=0)
    for start in range(split * share, tl.minimum(count, (split + 1) * share), ROWS):
        source, here = head.to(tl.int64) * R + start, start + lane < count  # offsets beyond source stay the same
        place = following
        following = tl.load(its_places + start + ROWS, mask=start + ROWS + lane < count, other=0)
        x_rows = rows_at(states, place, stride_b, stride_t, SHIFT)
        if IS_WHOLE:
            x = tl.load(x_rows + column[None])
        else:
            x = tl.load(x_rows + column[None], mask=(column < H)[None], other=0.0)  # [ROWS, COLUMNS]
        v_rows = values + source * (ALL_PARTS * D) + lane[:, None] * (ALL_PARTS * D)
        of_first = dot(tl.trans(x), masked_tile(v_rows, first, here, in_first, False), of_first, INTERPRETED)
        if PARTS == 3:
            of_last = dot(tl.trans(x), masked_tile(v_rows, last, here, in_last, False), of_last, INTERPRETED)
        if HAS_PAIRS:
            p_rows = pairs + source * PAIR + lane[:, None] * PAIR + pair[None]
            along = dot(tl.trans(x), tl.load(p_rows, mask=here[:, None], other=0.0), along, INTERPRETED)
    out = output + split * stride_s + head.to(tl.int64) * stride_e + column.to(tl.int64)[:, None] * stride_h
    TYPE: tl.constexpr = output.dtype.element_ty
    inside = (column < H)[:, None]
    tl.store(out + first[None] * stride_d, of_first.to(TYPE), mask=inside & in_first[None])
    if PARTS == 3:
        tl.store(out + last[None] * stride_d, of_last.to(TYPE), mask=inside & in_last[None])
    if HAS_PAIRS and part == 0:
        offsets = split * pair_stride_s + head.to(tl.int64) * H + column
        tl.store(pair_output + offsets, tl.sum(along, axis=1).to(pair_output.dtype.element_ty), mask=column < H)


def weight_gradient(
    states: Tensor,
    rows: Rows,
    values: Tensor,
    output: Tensor,
    parts: int = 1,
    pairs: Tensor | None = None,
    pair_output: Tensor | None = None,
) -> None:
    """Write, for each head, the selected tokens transposed times the values of its rows.

    Few heads give few programs: their rows are then split, and the parts added up in fp32.

    Args:
        states: [B, T, h], contiguous in the last dimension.
        rows: of the selection.
        values: [E, B * k, parts * d].
        output: [E, h, parts * d] with any strides.
        pairs, pair_output: one more column of values, [E, B * k, PAIR] whose columns are added up, and its result,
            [E, h].
    """
    batch, length, width = states.shape
    heads, capacity = rows.places.shape
    size = values.shape[2] // parts
    at_once = parts if size <= 128 else 1  # all of them, if the registers hold them
    chosen = tiles.weight_gradient(states.dtype, states.device, at_once, size)
    number = triton.cdiv(width, chosen["COLUMNS"])
    programs = number * heads * parts // at_once
    splits = max(1, min(2 * multiprocessors(states.device) // programs, capacity // 512))
    outputs, pair_outputs = output[None], pair_output if pair_output is None else pair_output[None]
    if splits > 1:
        outputs = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
        pair_outputs = None if pair_output is None else outputs.new_empty((splits, *pair_output.shape))
    _weight_gradient_kernel[(number, heads, splits * parts // at_once)](
        states, rows.places, rows.starts, values, pairs, outputs, pair_outputs, batch, capacity, width,
        *strides(states), *outputs.stride(), 0 if pair_outputs is None else pair_outputs.stride(0),
        D=size, SHIFT=bits_of(length), IS_WHOLE=width % chosen["COLUMNS"] == 0, INTERPRETED=INTERPRET,
        HAS_PAIRS=pairs is not None, PARTS=at_once, ALL_PARTS=parts, SPLITS=splits, PAIR=PAIR, **chosen,
    )  # fmt: skip
    if splits > 1:
        output.copy_(outputs.sum(0))
        if pair_output is not None and pair_outputs is not None:
            pair_output.copy_(pair_outputs.sum(0))
