"""host_profile.py: what the host does in a layer of shape 1, forward and backward, without a graph."""
import cProfile, pstats, time
import torch
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from megatron_mosa.attention import mosa_attention
shape = SHAPES[0]
inputs = m.layer_inputs(shape, shape.batch)
up = torch.randn_like(inputs[0])
def step():
    out = mosa_attention(*inputs, num_selected=shape.selected, backend="triton")
    torch.autograd.grad(out, inputs, up)
for _ in range(20): step()
torch.cuda.synchronize()
for n in (1, 1, 1, 5, 20):  # the host alone while the device sleeps; then as called
    torch.cuda._sleep(int(2e9 * 0.02 * n)); t = time.perf_counter()
    for _ in range(n): step()
    host = time.perf_counter() - t; torch.cuda.synchronize()
    print(f"{n}: host {host / n * 1e3:.2f} ms a call", flush=True)
torch.cuda.synchronize(); t = time.perf_counter()
for _ in range(50): step()
torch.cuda.synchronize(); print(f"called {(time.perf_counter() - t) / 50 * 1e3:.2f} ms")
from torch.profiler import ProfilerActivity, profile
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
    for _ in range(5): step()
    torch.cuda.synchronize()
names = [e for e in p.key_averages() if "Launch" in e.key or "cuda" in e.key.lower()]
for e in sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total)[:32]:
    print(f"{e.self_cpu_time_total / 5:9.1f} us {e.count / 5:6.1f}  {e.key[:90]}")
c = cProfile.Profile()
torch.cuda._sleep(int(2e9 * 0.5)); c.enable()
for _ in range(30): step()
c.disable(); torch.cuda.synchronize()
pstats.Stats(c).sort_stats("tottime").print_stats(40)
