"""QKV's gathered product as a persistent, warp-specialised Gluon kernel for Hopper (Triton 3.6), without rotation.

Four producer warps gather the tokens by cp.async and the matrices by TMA into a ring of stages; three consumer warp
groups multiply one box of 64 columns each, transposed: [64 columns, K] times [K, 256 rows].
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(256)
INNER = gl.constexpr(64)
BOX = gl.constexpr(64)  # columns of a consumer


@gluon.jit
def _position(i_program, TILES, E, GROUP, SPLITS: gl.constexpr):
    """Return head, tile and column split."""
    i_split, i_program = i_program % SPLITS, i_program // SPLITS
    i_first = i_program // (GROUP * E) * GROUP
    size = gl.minimum(TILES - i_first, GROUP)
    i_inside = i_program - i_first * E
    return i_inside // size, i_first + i_inside % size, i_split


@gluon.jit
def _column(i_split, PART: gl.constexpr, SPLITS: gl.constexpr):
    """Return the first column of a box: with two splits, queries and half of the values, or keys and the other half."""
    if SPLITS == 1:
        return PART * BOX
    elif PART < 2:
        return i_split * 128 + PART * BOX
    else:
        return 256 + i_split * BOX


@gluon.jit
def _count(p_cu_seqlens, i_head, B):
    return gl.load(p_cu_seqlens + i_head * (B + 1) + B)


@gluon.jit
def _produce(
    p_x, p_token_indices, p_cu_seqlens, w_desc, x_ring, w_ring, offsets, full, empty, B, R, E, TILES, NUMBER, GROUP,
    stride_b, stride_t, H, SHIFT: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    layout: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])
    i_lane = gl.arange(0, ROWS, one)
    o_inner = gl.arange(0, INNER, gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    i_head, i_tile, i_split = _position(gl.program_id(0), TILES, E, GROUP, SPLITS)
    count = _count(p_cu_seqlens, i_head, B)
    b_index = gl.load(p_token_indices + i_head * R + i_tile * ROWS + i_lane, mask=i_tile * ROWS + i_lane < R, other=0)
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        b_index = gl.where(i_tile * ROWS + i_lane < count, b_index, 0)
        i_batch = b_index >> SHIFT
        # Offsets are in shared memory, because 32 registers do not hold them.
        offsets.store((i_batch * stride_b + (b_index - (i_batch << SHIFT)) * stride_t) // 8)
        is_used = i_tile * ROWS < count
        w_row = i_head * H
        first, second, third = _column(i_split, 0, SPLITS), _column(i_split, 1, SPLITS), _column(i_split, 2, SPLITS)
        # The next tile's tokens are on their way while this tile's are gathered.
        i_next = gl.minimum(i_program + gl.num_programs(0), NUMBER - 1)
        i_head, i_tile, i_split = _position(i_next, TILES, E, GROUP, SPLITS)
        count = _count(p_cu_seqlens, i_head, B)
        i_row = i_tile * ROWS + i_lane
        b_index = gl.load(p_token_indices + i_head * R + i_row, mask=i_row < R, other=0)
        if is_used:
            for start in range(0, H, INNER):
                mbarrier.wait(empty.index(stage), phase)
                is_full = full.index(stage)
                mbarrier.expect(is_full, 3 * INNER * BOX * 2)
                tma.async_copy_global_to_shared(w_desc, [w_row + start, first], is_full, w_ring.index(stage * 3))
                tma.async_copy_global_to_shared(w_desc, [w_row + start, second], is_full, w_ring.index(stage * 3 + 1))
                tma.async_copy_global_to_shared(w_desc, [w_row + start, third], is_full, w_ring.index(stage * 3 + 2))
                for i in gl.static_range(ROWS // CHUNK):
                    o_row = offsets.slice(i * CHUNK, CHUNK).load(gl.SliceLayout(1, layout)) * 8  # a multiple, for the compiler
                    p_tile = (p_x + start) + (o_row[:, None] + o_inner[None, :])
                    async_copy.async_copy_global_to_shared(x_ring.index(stage).slice(i * CHUNK, CHUNK), p_tile)
                async_copy.mbarrier_arrive(is_full, increment_count=False)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _halves(b):
    """Split [64, N] along N, in registers."""
    N: gl.constexpr = b.shape[1]
    HALF_N: gl.constexpr = N // 2
    return gl.split(gl.permute(gl.reshape(b, (BOX, 2, HALF_N)), (0, 2, 1)))


@gluon.jit
def _store_rotated(b, i_first, b_index, count, p_rows, p_cos, p_sin, HALF: gl.constexpr, SHIFT: gl.constexpr, COLUMNS: gl.constexpr):
    """Rotate and store [64 columns, 64 rows]; partners are brought into registers of one thread by shared memory."""
    PARTS: gl.constexpr = 32 // HALF
    OTHER: gl.constexpr = 48 - HALF  # the bit of 16 and 32 that is not between partners
    mixed: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0], [HALF, 0], [OTHER, 0]], [[8, 0], [0, 1], [0, 2], [0, 4], [0, 8]],
        [[0, 16], [0, 32]], [], [64, 64],
    )  # fmt: skip
    far: gl.constexpr = [1, 0, 0] if HALF == 16 else [0, 16, 0]
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1, 0], [0, 2, 0], [0, 4, 0], far], [[0, 8, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]],
        [[0, 0, 16], [0, 0, 32]], [], [PARTS, HALF, 64],
    )  # fmt: skip
    inner: gl.constexpr = gl.SliceLayout(0, layout)  # [HALF, 64]
    i_row = gl.arange(0, 64, gl.SliceLayout(0, inner))
    o_half = gl.arange(0, HALF, gl.SliceLayout(1, inner))
    o_part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    b_position = gl.convert_layout(b_index & ((1 << SHIFT) - 1), gl.SliceLayout(0, inner))
    o_angle = (b_position * HALF)[None, :] + o_half[:, None]
    b_cos = gl.load(p_cos + o_angle)
    b_sin = gl.load(p_sin + o_angle)
    b = gl.convert_layout(b, mixed)
    b = gl.permute(gl.reshape(b, (PARTS, 2, HALF, 64)), (0, 2, 3, 1))
    b_first, b_second = gl.split(b)
    b_first = gl.convert_layout(b_first, layout)
    b_second = gl.convert_layout(b_second, layout)
    m_rotates = (o_part == 0)[:, None, None]
    b_cos = gl.where(m_rotates, b_cos[None, :, :], 1.0)
    b_sin = gl.where(m_rotates, b_sin[None, :, :], 0.0)
    o_column = (o_part * 32)[:, None, None] + o_half[:, None][None, :, :]
    p_tile = p_rows + ((i_first + i_row) * COLUMNS)[None, :][None, :, :] + o_column
    mask = (i_first + i_row < count)[None, :][None, :, :]
    TYPE: gl.constexpr = p_rows.dtype.element_ty
    gl.store(p_tile, (b_first * b_cos - b_second * b_sin).to(TYPE), mask=mask)
    gl.store(p_tile + HALF, (b_second * b_cos + b_first * b_sin).to(TYPE), mask=mask)


@gluon.jit
def _consume(
    p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, x_ring, w_ring, full, empty, B, R, E, TILES, NUMBER, GROUP, H,
    PART: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, FENCE: gl.constexpr, WIDTH: gl.constexpr,
    SHIFT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])
    o_column = gl.arange(0, BOX, gl.SliceLayout(1, stored))
    i_lane = gl.arange(0, ROWS, gl.SliceLayout(0, stored))
    COLUMNS: gl.constexpr = 3 * BOX * SPLITS
    # A rotary embedding of the first half of a head's columns: boxes 0 and 1 of heads of 64, box 0 of heads of 128.
    ROTATED: gl.constexpr = HALF > 0 and PART < 3 - SPLITS
    indices: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [2, 16], [1, 4], [0, 1]))
    stage = 0
    phase = 0
    i_head, i_tile, i_split = _position(gl.program_id(0), TILES, E, GROUP, SPLITS)
    next_count = _count(p_cu_seqlens, i_head, B)
    for i_program in range(gl.program_id(0), NUMBER, gl.num_programs(0)):
        i_head, i_tile, i_split = _position(i_program, TILES, E, GROUP, SPLITS)
        count = next_count
        i_next = gl.minimum(i_program + gl.num_programs(0), NUMBER - 1)
        i_head_next, i_tile_next, i_split_next = _position(i_next, TILES, E, GROUP, SPLITS)
        next_count = _count(p_cu_seqlens, i_head_next, B)
        if i_tile * ROWS < count:
            acc = gl.zeros([BOX, ROWS], gl.float32, layout)
            previous = stage
            for start in range(0, H, INNER):
                mbarrier.wait(full.index(stage), phase)
                if FENCE:
                    fence_async_shared()
                b_w = w_ring.index(stage * 3 + PART).permute((1, 0))
                b_x = x_ring.index(stage).permute((1, 0))
                acc = warpgroup_mma(b_w, b_x, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(previous), pred=start > 0)
                previous = stage
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            i_row = i_tile * ROWS
            p_tile = p_out + (i_head * R + i_row).to(gl.int64) * COLUMNS + _column(i_split, PART, SPLITS)
            if ROTATED:
                i_quarter = gl.arange(0, 64, indices)
                p_index = p_token_indices + i_head * R + i_row + i_quarter
                index_0 = gl.load(p_index, mask=i_row + i_quarter < count, other=0)
                index_1 = gl.load(p_index + 64, mask=i_row + 64 + i_quarter < count, other=0)
                index_2 = gl.load(p_index + 128, mask=i_row + 128 + i_quarter < count, other=0)
                index_3 = gl.load(p_index + 192, mask=i_row + 192 + i_quarter < count, other=0)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(previous))
            if ROTATED:
                left, right = _halves(acc)
                b_0, b_1 = _halves(left)
                b_2, b_3 = _halves(right)
                _store_rotated(b_0, 0, index_0, count - i_row, p_tile, p_cos, p_sin, HALF, SHIFT, COLUMNS)
                _store_rotated(b_1, 64, index_1, count - i_row, p_tile, p_cos, p_sin, HALF, SHIFT, COLUMNS)
                _store_rotated(b_2, 128, index_2, count - i_row, p_tile, p_cos, p_sin, HALF, SHIFT, COLUMNS)
                _store_rotated(b_3, 192, index_3, count - i_row, p_tile, p_cos, p_sin, HALF, SHIFT, COLUMNS)
            else:
                b_out = gl.convert_layout(acc.to(p_out.dtype.element_ty), stored)
                mask = (i_lane < count - i_row)[None, :]
                gl.store(p_tile + (i_lane * COLUMNS)[None, :] + o_column[:, None], b_out, mask=mask)


@gluon.jit(do_not_specialize=["B", "GROUP", "TILES", "NUMBER"])
def _kernel(
    p_x, p_token_indices, p_cu_seqlens, w_desc, p_out, p_cos, p_sin, B, R, E, TILES, NUMBER, GROUP, stride_b, stride_t, H,
    SHIFT: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr, FENCE: gl.constexpr, WIDTH: gl.constexpr,
    HALF: gl.constexpr,
    CHUNK: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = p_x.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(TYPE, [STAGES, ROWS, INNER], shared)
    w_ring = gl.allocate_shared_memory(TYPE, [STAGES * 3, INNER, BOX], shared)
    offsets = gl.allocate_shared_memory(gl.int32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)  # the producer's threads, and the bytes of the matrix
        mbarrier.init(empty.index(i), count=3)
    gl.warp_specialize(
        [
            (_consume, (p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, x_ring, w_ring, full, empty, B, R, E,
                        TILES, NUMBER, GROUP, H,
                        gl.constexpr(0), SPLITS, STAGES, FENCE, WIDTH, SHIFT, HALF)),
            (_consume, (p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, x_ring, w_ring, full, empty, B, R, E,
                        TILES, NUMBER, GROUP, H,
                        gl.constexpr(1), SPLITS, STAGES, FENCE, WIDTH, SHIFT, HALF)),
            (_consume, (p_token_indices, p_cu_seqlens, p_out, p_cos, p_sin, x_ring, w_ring, full, empty, B, R, E,
                        TILES, NUMBER, GROUP, H,
                        gl.constexpr(2), SPLITS, STAGES, FENCE, WIDTH, SHIFT, HALF)),
            (_produce, (p_x, p_token_indices, p_cu_seqlens, w_desc, x_ring, w_ring, offsets, full, empty, B, R, E,
                        TILES, NUMBER, GROUP, stride_b, stride_t, H, SHIFT, SPLITS, STAGES, CHUNK)),
        ],
        [4, 4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def product(states, rows, weight, rotation=None, stages=3, fence=True, group=None, processors=None, chunk=256):
    """Return [E, R, 3h'] like ``gathered_product``; h' is 64 or 128, h a multiple of 64, rotary parts half of h'."""
    batch, heads, _, length = rows.shape
    width, capacity = states.shape[2], rows.token_indices.shape[1]
    columns = weight.shape[2]
    splits = columns // 192
    half = 0 if rotation is None else rotation.cos.shape[1]
    assert columns in (192, 384) and width % 64 == 0 and states.numel() < 2**31 and weight.is_contiguous()
    assert states.stride(2) == 1 and half in (0, columns // 12)
    output = states.new_empty((heads, capacity, columns))
    number = triton.cdiv(capacity, 256)
    group = min(number, group or default_group(states, rows, weight))
    tiles = number * heads * splits
    layout = gl.NVMMASharedLayout(128, 16, 2)
    w_desc = TensorDescriptor(weight, [heads * width, columns], [columns, 1], [64, 64], layout)
    processors = processors or torch.cuda.get_device_properties(states.device).multi_processor_count
    cos, sin = (rows.token_indices.view(torch.float32),) * 2 if half == 0 else rotation[:2]
    _kernel[(min(tiles, processors),)](
        states, rows.token_indices, rows.cu_seqlens, w_desc, output, cos, sin, batch, capacity, heads, number, tiles,
        group, states.stride(0), states.stride(1), width, SHIFT=rows.shift, SPLITS=splits, STAGES=stages, FENCE=fence,
        WIDTH=128, HALF=half, CHUNK=chunk, CONSUMER_REGISTERS=160, PRODUCER_REGISTERS=32, num_warps=4,
    )  # fmt: skip
    return output


def default_group(states, rows, weight):
    """Return the group that ``gathered_product`` would choose for tiles of 256 rows."""
    from megatron_mosa.kernels.triton import tiles

    batch, heads, _, length = rows.shape
    width, capacity = states.shape[2], rows.token_indices.shape[1]
    tile_bytes = length * width * 2 * 256 * batch // capacity
    gathered = heads * capacity * width * 2
    return tiles.group(-(-capacity // 256), tile_bytes, gathered, weight.numel() * 2, tiles.GATHERED_BYTES)


def difference(found, expected, rows):
    """Return the relative difference over filled rows, head by head, since the tensors are large."""
    above = below = 0.0
    for head, count in enumerate(rows.cu_seqlens[:, -1].tolist()):
        f, e = found[head, :count].float(), expected[head, :count].float()
        above, below = above + (f - e).square().sum(), below + e.square().sum()
    return float((above / below).sqrt())


def exact(states, rows, weight, heads, rotation=None):
    """Return the products of some heads in fp32, by torch."""
    size, shift, products = weight.shape[2] // 3, rows.shift, {}
    for head in heads:
        index = rows.token_indices[head, : int(rows.cu_seqlens[head, -1])].long()
        position = index & ((1 << shift) - 1)
        y = states[index >> shift, position].float() @ weight[head].float()
        if rotation is not None:
            cos, sin = rotation.cos[position], rotation.sin[position]
            half = cos.shape[1]
            for part in range(2):
                first, second = y[:, part * size :][:, :half].clone(), y[:, part * size + half :][:, :half].clone()
                y[:, part * size : part * size + half] = first * cos - second * sin
                y[:, part * size + half : part * size + 2 * half] = second * cos + first * sin
        products[head] = y
    return products


def worst(found, products):
    """Return the largest relative error of a head."""
    return max(float((found[head, : len(y)].float() - y).norm() / y.norm()) for head, y in products.items())


def table(length, half):
    """Return cosines and sines."""
    from megatron_mosa.kernels.triton import attention
    from megatron_mosa.kernels.triton.gathered import Rotation

    return Rotation(*attention.rotary_table(length, half, 1e4, torch.device("cuda", 0)), None)


def small():
    """Check ragged rows, both widths, rotation, and more tiles than programs; True if all with the fence are right."""
    from megatron_mosa.kernels.triton.rows import rows_of

    right = True
    for size, width, heads in ((64, 256, 5), (128, 128, 7)):
        generator = torch.Generator("cuda").manual_seed(1)
        batch, length, k = 4, 500, 100
        x = torch.randn(batch, length, width, device="cuda", generator=generator).bfloat16()
        w = (torch.randn(heads, width, 3 * size, device="cuda", generator=generator) * width**-0.5).bfloat16()
        indices = torch.rand(batch, heads, length, device="cuda", generator=generator).topk(k).indices.sort().values
        filled = torch.randint(1, k + 1, (batch, heads, 1), device="cuda", generator=generator)
        filled[:, 0] = k  # one full head, one with few rows
        filled[:, 1] = 7
        indices = torch.where(torch.arange(k, device="cuda") < filled, indices, length)
        rows = rows_of(indices, length, batch)
        for rotation, fence in ((None, True), (None, False), (table(length, size // 4), True)):
            products, errors, same = exact(x, rows, w, range(heads), rotation), [], True
            for processors in (132, 3):
                found = product(x, rows, w, rotation, fence=fence, group=1, processors=processors)
                again = product(x, rows, w, rotation, fence=fence, group=2, processors=processors)
                errors.append(worst(found, products))
                same &= all(torch.equal(found[h, : len(y)], again[h, : len(y)]) for h, y in products.items())
            right &= (max(errors) < 5e-3 and same) or not fence
            name = f"small h'{size} fence {fence} rotated {rotation is not None}"
            print(f"{name}: errors {errors[0]:.1e} {errors[1]:.1e}, groups agree: {same}", flush=True)
    return right


def measured(number):
    """Print the table of one shape."""
    from benchmarks.mosa_layer import layer_inputs
    from benchmarks.shapes import SHAPES
    from benchmarks.timing import measure
    from megatron_mosa.kernels.triton import gathered, selection
    from megatron_mosa.kernels.triton.rows import rows_of

    shape = SHAPES[number - 1]
    x, router, w = (t.detach() for t in layer_inputs(shape, shape.batch)[:3])
    rows = rows_of(selection.fused_select_tokens(selection.fused_router_scores(x, router), shape.selected, True), shape.length, shape.batch)
    flops = 2 * shape.batch * shape.heads * shape.selected * shape.width * 3 * shape.head_dim
    rotation = table(shape.length, shape.head_dim // 4)
    none = rotation._replace(cos=rotation.cos[:, :0].contiguous(), sin=rotation.sin[:, :0].contiguous())
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
        return gathered.gathered_product(x, rows, w, rotation)

    line("Triton today, with rotation", today)
    heads, group = (0, shape.heads - 1), default_group(x, rows, w)
    products = {turned: exact(x, rows, w, heads, rotation if turned else None) for turned in (False, True)}
    variants = [dict(), dict(rotation=rotation)]
    variants += [dict(group=other) for other in (group // 2, group * 2) if 1 <= other <= rows.token_indices.shape[1] // 256]
    if number == 5:
        variants += [dict(fence=False), dict(rotation=rotation, fence=False), dict(chunk=64), dict(stages=2)]
    for options in variants:
        options = dict(group=group) | options

        def run(options=options):
            return product(x, rows, w, **options)

        def name(options=options, run=run):
            turned = "rotation" in options
            found, said = run(), " ".join(f"{key} {value}" for key, value in options.items() if key != "rotation")
            differs = difference(found, gathered.gathered_product(x, rows, w, rotation if turned else none), rows)
            error = worst(found, products[turned])
            return f"Gluon {'rotated ' if turned else ''}{said}: err {error:.1e} diff {differs:.1e}"

        try:
            run()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"  {options.keys()}: {type(problem).__name__}: {str(problem)[:300]!r}", flush=True)
            continue
        line(name, run)
    line("Triton today, with rotation, again", today)


def main() -> None:
    """Print the check of a small case, then a table for each shape."""
    faulthandler.dump_traceback_later(25, repeat=True)  # compiling takes 1.3 s: where does it wait?
    signal.alarm(140)  # ends the process even where a kernel hangs
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    try:
        if not small():
            print("small case WRONG: the kernel timed below is wrong", flush=True)
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
