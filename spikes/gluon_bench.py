"""gluon_bench.py OUT.json: Gluon's QKV and dW_QKV against Triton's on one GPU, at most 75 s; run from the repository root.

Each part is a process with a limit, whose lines are kept even if it hangs. `gluon_bench.py OUT.json PART` runs one part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

START, LIMIT = time.time(), 75.0


def say(**line):
    print(json.dumps(line), flush=True)


# ---- parts -----------------------------------------------------------------------------------------------------------


def case(heads, size, dtype, selected=100, length=500, batch=4, width=512):
    """Ragged rows (400, 12, 0, 64 and others), poisoned beyond the counts."""
    import torch

    from megatron_mosa.kernels.triton.rows import rows_of

    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, length, width, device="cuda", generator=g).to(dtype)
    indices = torch.rand(batch, heads, length, device="cuda", generator=g).topk(selected).indices.sort().values
    filled = torch.randint(1, selected + 1, (batch, heads, 1), device="cuda", generator=g)
    filled[:, 0], filled[:, 1], filled[:, 2], filled[:, 3] = selected, 3, 0, 16
    indices = torch.where(torch.arange(selected, device="cuda") < filled, indices, length)
    rows = rows_of(indices, length, batch)
    tokens = []
    for head, count in enumerate(rows.cu_seqlens[:, -1].tolist()):
        rows.token_indices[head, count:] = 2**30
        index = rows.token_indices[head, :count].long()
        tokens.append((index >> rows.shift, index & ((1 << rows.shift) - 1)))
    return x, rows, tokens


def turned(y, position, rotation, size):
    half = rotation.cos.shape[1]
    if half == 0:
        return y
    cos, sin, y = rotation.cos[position], rotation.sin[position], y.clone()
    for c in (0, size):
        a, b = y[:, c : c + half].clone(), y[:, c + half : c + 2 * half].clone()
        y[:, c : c + half], y[:, c + half : c + 2 * half] = a * cos - b * sin, b * cos + a * sin
    return y


def error(found, expected):
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30)) if expected.numel() else 0.0


def table(length, half):
    import torch

    from megatron_mosa.kernels.triton.attention import rotary_table
    from megatron_mosa.kernels.triton.gathered import Rotation

    return Rotation(*rotary_table(length, half, 1e4, torch.device("cuda", 0)), None)


def small_qkv():
    import torch

    from megatron_mosa.kernels.triton import hopper

    for size in (64, 128):
        x, rows, tokens = case(7, size, torch.bfloat16)
        w = (torch.randn(7, 512, 3 * size, device="cuda") * 512**-0.5).bfloat16()
        for half in (0, size // 4):
            rotation, errors, same = table(500, half), [], True
            for programs in (132, 3):
                hopper.multiprocessors = lambda device, programs=programs: programs
                found, again = (hopper.qkv_product(x, rows, w, rotation) for _ in range(2))
                torch.cuda.synchronize()
                same &= all(torch.equal(found[e, : len(t[0])], again[e, : len(t[0])]) for e, t in enumerate(tokens))
                for e, (b, t) in enumerate(tokens):
                    y = turned(x[b, t].float() @ w[e].float(), t, rotation, size)
                    errors += [error(found[e, : len(t), p * size : (p + 1) * size], y[:, p * size : (p + 1) * size]) for p in range(3)]
            say(name=f"qkv h'{size} half {half}", worst=max(errors), same=same, right=max(errors) < 4e-3 and same)


def small_dw():
    import torch

    from megatron_mosa.kernels.triton import hopper

    for size in (64, 128):
        x, rows, tokens = case(7, size, torch.bfloat16)
        d = torch.randn(7, 400, 3 * size, device="cuda").bfloat16()
        pairs = torch.zeros(7, 400, 16, device="cuda", dtype=torch.bfloat16)
        pairs[..., 0], pairs[..., 1] = torch.randn(7, 400, device="cuda"), torch.randn(7, 400, device="cuda") * 0.1
        for e, t in enumerate(tokens):
            d[e, len(t[0]) :], pairs[e, len(t[0]) :] = float("nan"), float("nan")
        for has in (False, True):
            errors, sums_errors, same, last = [], [0.0], True, None
            for programs in (132, 3):
                hopper.multiprocessors = lambda device, programs=programs: programs
                out = torch.full((7, 512, 3 * size), float("nan"), device="cuda", dtype=x.dtype)
                sums = torch.full((7, 512), float("nan"), device="cuda", dtype=x.dtype)
                hopper.qkv_weight_gradient(x, rows, d, out, pairs if has else None, sums if has else None)
                torch.cuda.synchronize()
                same &= last is None or torch.equal(last, out)
                last = out
                for e, (b, t) in enumerate(tokens):
                    xt = x[b, t].float().T
                    y = xt @ d[e, : len(t)].float()
                    errors += [error(out[e, :, p * size : (p + 1) * size], y[:, p * size : (p + 1) * size]) for p in range(3)]
                    if has:
                        sums_errors.append(error(sums[e], (xt @ pairs[e, : len(t)].float()).sum(1)))
            # NaN compares false, so that it is never right
            right = all(v < 4e-3 for v in errors + sums_errors) and same
            say(name=f"dw h'{size} column {has}", worst=max(errors), column=max(sums_errors), same=same, right=right)


def inputs_of(number):
    import torch

    from benchmarks.mosa_layer import layer_inputs
    from benchmarks.shapes import SHAPES
    from megatron_mosa.kernels.triton import selection
    from megatron_mosa.kernels.triton.rows import rows_of

    shape = SHAPES[number - 1]
    x, router, w = (t.detach() for t in layer_inputs(shape, shape.batch)[:3])
    indices = selection.fused_select_tokens(selection.fused_router_scores(x, router), shape.selected, True)
    rows = rows_of(indices, shape.length, shape.batch)
    torch.cuda.synchronize()
    return shape, x, router, w, rows, 2 * shape.batch * shape.heads * shape.selected * shape.width * 3 * shape.head_dim


def timed(name, number, flops, run, **more):
    from benchmarks.timing import measure

    m = measure(run, seconds=0.15)
    say(name=name, shape=number, ms=m.milliseconds, called_ms=m.called_milliseconds, spread=m.spread,
        tflops=flops / m.milliseconds / 1e9, extra_gib=m.extra_gib, **more)  # fmt: skip


def with_group(hopper, group):
    """Launch with another group: the last number before the strides."""
    from megatron_mosa.kernels.triton.common import launch

    def other(kernel, grid, *given, **options):
        launch(kernel, grid, *given[:13], group, *given[14:], **options)

    hopper.launch = launch if group is None else other


def share(a, b):
    """Relative difference of every 97th head."""
    a, b = a[::97].float(), b[::97].float()
    return float((a - b).norm() / b.norm())


def stage_qkv(number):
    from megatron_mosa.kernels.triton import gathered, hopper, tiles

    shape, x, _, w, rows, flops = inputs_of(number)
    capacity = rows.token_indices.shape[1]
    rotation, none = table(shape.length, shape.head_dim // 4), table(shape.length, 0)

    def triton():
        return gathered.gathered_product(x, rows, w, rotation)

    def gluon():
        return hopper.qkv_product(x, rows, w, rotation)

    differs = share(gluon(), triton())
    timed("QKV Triton", number, flops, triton)
    timed("QKV Gluon", number, flops, gluon, differs=differs)
    timed("QKV Gluon without rotation", number, flops, lambda: hopper.qkv_product(x, rows, w, none))
    if number == 5:
        n = -(-capacity // 256)
        group = tiles.group(n, shape.length * shape.width * 512 * shape.batch // capacity,
                            shape.heads * capacity * shape.width * 2, w.numel() * 2, tiles.GATHERED_BYTES)  # fmt: skip
        for other in sorted({max(1, group // 2), min(n, group * 2)} - {group}):
            with_group(hopper, other)
            timed(f"QKV Gluon group {other} not {group}", number, flops, gluon)
        with_group(hopper, None)
    timed("QKV Triton again", number, flops, triton)


def stage_dw(number):
    import torch

    from megatron_mosa.kernels.triton import gathered, hopper, weights

    shape, x, router, w, rows, flops = inputs_of(number)
    capacity = rows.token_indices.shape[1]
    d = torch.randn(shape.heads, capacity, 3 * shape.head_dim, device="cuda", dtype=x.dtype)
    pairs = torch.zeros(shape.heads, capacity, gathered.PAIR, device="cuda", dtype=x.dtype)
    pairs[..., :2].normal_()
    outs, sums = [torch.empty_like(w) for _ in range(2)], [torch.empty_like(router) for _ in range(2)]

    def triton():
        weights.weight_gradient(x, rows, d, outs[0], parts=3, pairs=pairs, pair_output=sums[0])

    def gluon():
        hopper.qkv_weight_gradient(x, rows, d, outs[1], pairs, sums[1])

    triton(), gluon()
    timed("dW Triton", number, flops, triton)
    timed("dW Gluon", number, flops, gluon, differs=share(*outs[::-1]), column_differs=share(*sums[::-1]))
    timed("dW Gluon without the column", number, flops, lambda: hopper.qkv_weight_gradient(x, rows, d, outs[1], None, None))
    if number == 5:
        for other in (1, 2):
            with_group(hopper, other)
            timed(f"dW Gluon group {other}", number, flops, gluon)
        with_group(hopper, None)
    timed("dW Triton again", number, flops, triton)


def stage(run, numbers=(5, 6, 2, 4)):
    import torch

    from benchmarks.mosa_layer import release

    for number in numbers:
        with torch.no_grad():
            run(number)
        release()


def layer(number, only_warms=False):
    import torch

    from benchmarks import mosa_layer as m
    from benchmarks.shapes import SHAPES
    from megatron_mosa.attention import mosa_attention
    from megatron_mosa.kernels.triton import specialized

    shape = SHAPES[number - 1]
    inputs = m.layer_inputs(shape, shape.batch)
    layers = {
        "expert choice": lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton"),
        "thresholds": m.threshold_layer(shape, inputs),
    }
    upstream = torch.randn_like(inputs[0])
    for kind, run in layers.items():
        results = []
        for enabled in (False,) if only_warms else (False, True):
            specialized.ENABLED = enabled
            output = run(*inputs)
            results.append([output[:1].detach().clone(), *(g[:8].clone() for g in torch.autograd.grad(output, inputs, upstream))])
            del output
        if only_warms:
            continue
        differs = [float((a - b).float().norm() / a.float().norm()) for a, b in zip(*results, strict=True)]
        del results
        for name, enabled in (("Triton", False), ("Gluon", True), ("Triton again", False), ("Gluon again", True)):
            specialized.ENABLED = enabled
            found = m.time_layer(run, inputs, 0.25)
            say(name=f"layer {kind} {name}", shape=number, differs=differs, **found)
    torch.cuda.synchronize()


PARTS = {
    "small_qkv": small_qkv, "small_dw": small_dw, "warm5": lambda: layer(5, True), "warm6": lambda: layer(6, True),
    "stage_qkv": lambda: stage(stage_qkv), "stage_dw": lambda: stage(stage_dw), "layer5": lambda: layer(5), "layer6": lambda: layer(6),
}  # fmt: skip

# ---- the parent ------------------------------------------------------------------------------------------------------


def start(out, part):
    log = Path(f"{out}.{part}.txt")
    environment = os.environ | {"MOSA_GLUON": "0", "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "/tmp/gluon_bench_cache")}
    with log.open("w") as file:
        return part, log, subprocess.Popen([sys.executable, __file__, out, part], stdout=file, stderr=subprocess.STDOUT, env=environment)


def wait(running, until, found):
    """Wait for parts until a time, end those that hang, and keep their lines."""
    for part, log, process in running:
        try:
            rc = process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            rc = "ended at its limit"
            process.wait(5)
        text = log.read_text(errors="replace").splitlines()
        lines = [json.loads(line) for line in text if line.startswith('{"name"')]
        found[part] = {"rc": rc, "lines": lines, "tail": [] if rc == 0 else [line[:300] for line in text[-6:]]}
        print(f"{part}: rc {rc} at {time.time() - START:.0f} s", flush=True)
        for line in found[part]["tail"]:
            print("   ", line)
        for line in lines:
            show(line)


def show(line):
    if "both" in line:
        both, forward = line["both"], line["forward"]
        worst = max(line["differs"])
        print(f"  {line['shape']} {line['name']:36} forward {forward['milliseconds']:7.3f} both {both['milliseconds']:7.3f} ms, "
              f"called {both['called_milliseconds']:7.3f}, spread {both['spread']:.3f}, differs {worst:.1e}")  # fmt: skip
    elif "ms" in line:
        more = " ".join(f"{k} {v:.1e}" for k, v in line.items() if "differs" in k)
        print(f"  {line['shape']} {line['name']:36} {line['ms']:7.3f} ms {line['tflops']:5.0f} TFLOP/s, called {line['called_ms']:7.3f}, spread {line['spread']:.3f} {more}")
    else:
        print("  " + " ".join(f"{k} {v:.2e}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))


def main():
    out = sys.argv[1]
    if len(sys.argv) > 2:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        PARTS[sys.argv[2]]()
        return
    found = {}
    last = START + LIMIT
    # The layers' kernels are compiled while the small cases run: their times must not be those of compilers.
    groups = [(["small_qkv", "small_dw", "warm5", "warm6"], 26), (["stage_qkv"], 15), (["stage_dw"], 15), (["layer5"], 14), (["layer6"], 20)]
    for parts, limit in groups:
        if last - time.time() < 4:
            break
        wait([start(out, part) for part in parts], min(last - 1, time.time() + limit), found)
        Path(out).write_text(json.dumps(found, indent=1))
    print(f"{time.time() - START:.0f} s", flush=True)


main()
