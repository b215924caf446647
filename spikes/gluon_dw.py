"""dW_QKV as a persistent, warp-specialised Gluon kernel for Hopper (Triton 3.6): full rows only, no router's column.

Four producer warps gather 64 tokens by 256 columns by cp.async, and the gradients of their queries, keys and values by
TMA; three consumer warp groups compute one box of 64 columns of the gradient each, transposed: [64, rows] x [rows, 256].
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
import triton
from gluon_qkv import BOX, _column, _position
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WIDE = gl.constexpr(256)  # columns of the states of a tile
DEEP = gl.constexpr(64)  # rows of a step


@gluon.jit
def _produce(
    p_x, p_token_indices, v_desc, x_ring, v_ring, offsets, full, empty, R, E, TILES, NUMBER, GROUP,
    stride_b, stride_t, SHIFT: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    layout: gl.constexpr = gl.BlockedLayout([4, 8], [1, 32], [4, 1], [1, 0])
    CHUNK: gl.constexpr = 64
    i_lane = gl.arange(0, DEEP, one)
    o_inner = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    i_head, i_tile, i_split = _position(gl.program_id(0), TILES, E, GROUP, SPLITS)
    b_index = gl.load(p_token_indices + i_head * R + i_lane)
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        i_head, i_tile, i_split = _position(i_program, TILES, E, GROUP, SPLITS)
        i_next = gl.minimum(i_program + gl.num_programs(0), NUMBER - 1)
        i_head_next, i_tile_next, i_split_next = _position(i_next, TILES, E, GROUP, SPLITS)
        v_row = i_head * R
        first, second, third = _column(i_split, 0, SPLITS), _column(i_split, 1, SPLITS), _column(i_split, 2, SPLITS)
        p_x_tile = p_x + i_tile * WIDE
        for start in range(0, R, DEEP):
            i_batch = b_index >> SHIFT
            slot = offsets.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            slot.store((i_batch * stride_b + (b_index - (i_batch << SHIFT)) * stride_t) // 8)
            # The next step's tokens, of the next tile after the last step.
            o_next = gl.where(start + DEEP < R, i_head * R + start + DEEP, i_head_next * R)
            b_index = gl.load(p_token_indices + o_next + i_lane)
            is_full = full.index(stage)
            mbarrier.expect(is_full, 3 * DEEP * BOX * 2)
            tma.async_copy_global_to_shared(v_desc, [v_row + start, first], is_full, v_ring.index(stage * 3))
            tma.async_copy_global_to_shared(v_desc, [v_row + start, second], is_full, v_ring.index(stage * 3 + 1))
            tma.async_copy_global_to_shared(v_desc, [v_row + start, third], is_full, v_ring.index(stage * 3 + 2))
            for i in gl.static_range(DEEP // CHUNK):
                o_row = slot.slice(i * CHUNK, CHUNK).load(gl.SliceLayout(1, layout)) * 8  # a multiple, for the compiler
                p_tile = p_x_tile + (o_row[:, None] + o_inner[None, :])
                async_copy.async_copy_global_to_shared(x_ring.index(stage).slice(i * CHUNK, CHUNK), p_tile)
            async_copy.mbarrier_arrive(is_full, increment_count=False)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consume(
    p_out, x_ring, v_ring, full, empty, R, E, TILES, NUMBER, GROUP, H,
    PART: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])
    o_column = gl.arange(0, BOX, gl.SliceLayout(1, stored))
    i_lane = gl.arange(0, WIDE, gl.SliceLayout(0, stored))
    COLUMNS: gl.constexpr = 3 * BOX * SPLITS
    stage = 0
    phase = 0
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        i_head, i_tile, i_split = _position(i_program, TILES, E, GROUP, SPLITS)
        acc = gl.zeros([BOX, WIDE], gl.float32, layout)
        previous = stage
        for start in range(0, R, DEEP):
            mbarrier.wait(full.index(stage), phase)
            if FENCE:
                fence_async_shared()
            acc = warpgroup_mma(v_ring.index(stage * 3 + PART).permute((1, 0)), x_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(previous), pred=start > 0)
            previous = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(previous))
        p_tile = p_out + (i_head * H + i_tile * WIDE).to(gl.int64) * COLUMNS + _column(i_split, PART, SPLITS)
        b_out = gl.convert_layout(acc.to(p_out.dtype.element_ty), stored)
        gl.store(p_tile + (i_lane * COLUMNS)[None, :] + o_column[:, None], b_out)


@gluon.jit(do_not_specialize=["GROUP", "TILES", "NUMBER"])
def _kernel(
    p_x, p_token_indices, v_desc, p_out, R, E, TILES, NUMBER, GROUP, stride_b, stride_t, H,
    SHIFT: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, FENCE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = p_x.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(TYPE, [STAGES, DEEP, WIDE], shared)
    v_ring = gl.allocate_shared_memory(TYPE, [STAGES * 3, DEEP, BOX], shared)
    offsets = gl.allocate_shared_memory(gl.int32, [STAGES, DEEP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=3)
    gl.warp_specialize(
        [
            (_consume, (p_out, x_ring, v_ring, full, empty, R, E, TILES, NUMBER, GROUP, H,
                        gl.constexpr(0), SPLITS, STAGES, FENCE)),
            (_consume, (p_out, x_ring, v_ring, full, empty, R, E, TILES, NUMBER, GROUP, H,
                        gl.constexpr(1), SPLITS, STAGES, FENCE)),
            (_consume, (p_out, x_ring, v_ring, full, empty, R, E, TILES, NUMBER, GROUP, H,
                        gl.constexpr(2), SPLITS, STAGES, FENCE)),
            (_produce, (p_x, p_token_indices, v_desc, x_ring, v_ring, offsets, full, empty, R, E, TILES, NUMBER,
                        GROUP, stride_b, stride_t, SHIFT, SPLITS, STAGES)),
        ],
        [4, 4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def gradient(states, rows, values, output, stages=3, fence=True, group=None, processors=None):
    """Write what ``weight_gradient`` with three parts does; R a multiple of 64, all slots filled, h one of 256."""
    heads, width, columns = output.shape
    capacity = rows.token_indices.shape[1]
    splits, number = columns // 192, width // 256
    assert columns in (192, 384) and width % 256 == 0 and capacity % 64 == 0 and states.numel() < 2**31
    assert output.is_contiguous() and values.is_contiguous() and states.stride(2) == 1
    tiles = number * heads * splits
    v_desc = TensorDescriptor(
        values, [heads * capacity, columns], [columns, 1], [64, 64], gl.NVMMASharedLayout(128, 16, 2)
    )
    processors = processors or torch.cuda.get_device_properties(states.device).multi_processor_count
    _kernel[(min(tiles, processors),)](
        states, rows.token_indices, v_desc, output, capacity, heads, number, tiles, min(number, group or number),
        states.stride(0), states.stride(1), width, SHIFT=rows.shift, SPLITS=splits, STAGES=stages, FENCE=fence,
        CONSUMER_REGISTERS=160, PRODUCER_REGISTERS=32, num_warps=4,
    )  # fmt: skip
    return output


def exact(states, rows, values, heads):
    """Return the gradients of some heads in fp32, by torch."""
    shift, found = rows.shift, {}
    for head in heads:
        index = rows.token_indices[head].long()
        x = states[index >> shift, index & ((1 << shift) - 1)].float()
        found[head] = x.T @ values[head].float()
    return found


def worst(found, gradients):
    """Return the largest relative error of a head."""
    return max(float((found[head].float() - y).norm() / y.norm()) for head, y in gradients.items())


def small():
    """Check both widths, and more tiles than programs."""
    from megatron_mosa.kernels.triton.rows import rows_of

    for size, heads in ((64, 5), (128, 7)):
        generator = torch.Generator("cuda").manual_seed(1)
        batch, length, k, width = 4, 500, 96, 512
        x = torch.randn(batch, length, width, device="cuda", generator=generator).bfloat16()
        values = torch.randn(heads, batch * k, 3 * size, device="cuda", generator=generator).bfloat16()
        indices = torch.rand(batch, heads, length, device="cuda", generator=generator).topk(k).indices.sort().values
        rows = rows_of(indices, length, batch)
        out = torch.empty(heads, width, 3 * size, device="cuda", dtype=x.dtype)
        for fence in (True, False):
            errors = [
                worst(gradient(x, rows, values, out.zero_(), fence=fence, group=group, processors=processors),
                      exact(x, rows, values, range(heads)))
                for group, processors in ((1, 132), (2, 3))
            ]  # fmt: skip
            said = "right" if max(errors) < 5e-3 else "WRONG"
            print(f"small h'{size} fence {fence}: errors {errors[0]:.1e} {errors[1]:.1e}: {said}", flush=True)


def measured(number):
    """Print the table of one shape."""
    from benchmarks.mosa_layer import layer_inputs
    from benchmarks.shapes import SHAPES
    from benchmarks.timing import measure
    from megatron_mosa.kernels.triton import selection, weights
    from megatron_mosa.kernels.triton.gathered import PAIR
    from megatron_mosa.kernels.triton.rows import rows_of

    shape = SHAPES[number - 1]
    x, router, w = (t.detach() for t in layer_inputs(shape, shape.batch)[:3])
    rows = rows_of(selection.fused_select_tokens(selection.fused_router_scores(x, router), shape.selected, True), shape.length, shape.batch)
    flops = 2 * shape.batch * shape.heads * shape.selected * shape.width * 3 * shape.head_dim
    capacity = rows.token_indices.shape[1]
    values = torch.randn(shape.heads, capacity, 3 * shape.head_dim, device="cuda", dtype=x.dtype)
    pairs = torch.randn(shape.heads, capacity, PAIR, device="cuda", dtype=x.dtype)
    out, pair_out = torch.empty_like(w), torch.empty_like(router)
    print(f"shape {number}: {shape}: {flops / 1e12:.2f} TFLOP", flush=True)

    def line(name, run):
        try:
            said = name() if callable(name) else name
            m = measure(run, seconds=0.3)
            rate = flops / m.milliseconds / 1e9
            print(f"  {said:62} {m.milliseconds:7.3f} ms {rate:5.0f} TFLOP/s  spread {m.spread:.3f}", flush=True)
        except Exception as problem:
            print(f"  {type(problem).__name__}: {str(problem)[:300]!r}", flush=True)

    def today():
        weights.weight_gradient(x, rows, values, out, parts=3, pairs=pairs, pair_output=pair_out)

    def plain():
        weights.weight_gradient(x, rows, values, out, parts=3)

    gradients = exact(x, rows, values, (0, shape.heads - 1))
    line("Triton today, with the router's column", today)
    line("Triton today, without", plain)
    for options in (dict(), dict(group=1), *([dict(fence=False), dict(stages=2)] if number == 5 else [])):

        def run(options=options):
            return gradient(x, rows, values, out, **options)

        def name(options=options, run=run):
            return f"Gluon {options}: err {worst(run(), gradients):.1e}"

        line(name, run)
    line("Triton today, without, again", plain)


def main() -> None:
    """Print the check of a small case, then a table for each shape."""
    signal.alarm(120)  # ends the process even where a kernel hangs
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    try:
        small()
    except Exception as problem:
        print(f"small: {type(problem).__name__}: {str(problem)[:400]!r}", flush=True)
    for number in map(int, (sys.argv[1] if len(sys.argv) > 1 else "5,2,6").split(",")):
        try:
            with torch.no_grad():
                measured(number)
        except Exception as problem:
            print(f"shape {number}: {type(problem).__name__}: {str(problem)[:300]!r}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
