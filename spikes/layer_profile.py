"""layer_profile.py OUT.json SHAPES: GPU time of each kernel of one layer, forward and backward, by expert choice and by thresholds."""
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from megatron_mosa.attention import mosa_attention
found = []
for n in map(int, sys.argv[2].split(",")):
    shape = SHAPES[n - 1]
    inputs = m.layer_inputs(shape, shape.batch)
    up = torch.randn_like(inputs[0])
    row = {"number": n}
    for name, layer in (("expert", lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton")), ("threshold", m.threshold_layer(shape, inputs))):
        for _ in range(3): torch.autograd.grad(layer(*inputs), inputs, up)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
            for _ in range(5): torch.autograd.grad(layer(*inputs), inputs, up)
            torch.cuda.synchronize()
        times = {}
        for e in p.events():
            if e.device_type == torch.autograd.DeviceType.CUDA:
                key = e.name[:60]
                a = times.setdefault(key, [0, 0]); a[0] += e.time_range.elapsed_us() / 5e3; a[1] += 0.2
        row[name] = times
    found.append(row)
    print(n, {k: round(sum(t for t, _ in row[k].values()), 3) for k in ("expert", "threshold")}, flush=True)
    for key in sorted(set(row["expert"]) | set(row["threshold"]), key=lambda k: -abs(row["threshold"].get(k, (0, 0))[0] - row["expert"].get(k, (0, 0))[0]))[:14]:
        print("   ", key[:50], [(round(row[k].get(key, (0, 0))[0], 3), round(row[k].get(key, (0, 0))[1], 1)) for k in ("expert", "threshold")], flush=True)
    json.dump(found, open(sys.argv[1], "w"), indent=1)
    del inputs, up, layer
    m.release()
