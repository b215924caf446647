"""kern2_spike.py SHAPES: per-kernel times, sums with other tiles, the pair term as a dense product, following by lanes."""
import sys, time, collections, traceback
import torch
from unittest import mock
from benchmarks import tune, mosa_layer as m
from benchmarks.shapes import SHAPES
from benchmarks.timing import measure
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels.triton import tiles, scattered, selection
import megatron_mosa
print(megatron_mosa.__file__, torch.cuda.get_device_name())

def profile(f, n=5):
    for _ in range(3): f()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(n): f()
        torch.cuda.synchronize()
    c = collections.Counter()
    k = collections.Counter()
    for e in p.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            c[e.name[:60]] += e.device_time / 1000 / n; k[e.name[:60]] += 1 / n
    return [(f"{v:.3f}", round(k[q]), q) for q, v in c.most_common(26) if v > 0.004], sum(c.values())

def t(f, seconds=0.25):
    try: return measure(f, seconds=seconds).milliseconds
    except Exception as e: return repr(e)[:60]

class Custom:  # 1b_mosa
    pass
shapes = {i + 1: s for i, s in enumerate(SHAPES)}
from benchmarks.shapes import Shape
shapes[7] = Shape(4, 4096, 2048, 128, 16, 32)
for n in map(int, sys.argv[1].split(",")):
    shape = shapes[n]; begin = time.time()
    print("== shape", n, shape)
    st = tune.stages(shape)
    for name in ("dX", "out"):
        rows, total = profile(st[name]); print(name, f"{total:.3f}", rows[:4])
    base = tiles.combine
    ref = st["dX"]()
    for columns in (64, 128, 256, 512, 1024):
        for cache in ("", ".cg"):
            for warps in ((1,) if columns < 512 else (columns // 256,)):
                with mock.patch.object(tiles, "combine", lambda *a: base(*a) | dict(COLUMNS=columns, num_warps=warps, CACHE=cache)):
                    a = t(st["dX"])
                    same = bool((st["dX"]() == ref).all()) if not isinstance(a, str) else None
                    b = t(st["out"]) if columns >= 256 else None
                print("dX", columns, cache or "-", a, "same", same, "out", b, flush=True)
    print("followed:", t(st["followed"]), end=" ")
    for lanes, warps in ((32, 1), (64, 2), (64, 1), (128, 1)):
        with mock.patch.object(tiles, "follow", lambda: dict(LANES=lanes, num_warps=warps)):
            print((lanes, warps), t(st["followed"]), end=" ")
    print("ragged dX", t(st["ragged dX"]), f"{time.time()-begin:.0f} s")
    del st; m.release()
    if n in (7, 2, 5):
        inputs = m.layer_inputs(shape, shape.batch)
        up = torch.randn_like(inputs[0])
        for name, layer in (("expert", lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton")), ("threshold", m.threshold_layer(shape, inputs))):
            rows, total = profile(lambda: torch.autograd.grad(layer(*inputs), inputs, up), 3)
            print(name, f"{total:.2f}"); [print("   ", *r) for r in rows]
        del inputs, up; m.release()
