"""zero_nccl.py: a layer's gather and reduction in bf16: as one group of its 7 matrices, flat, and beside a matrix product."""
import os, torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank); dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
group = dist.group.WORLD
sizes = [2048 * 1536, 512 * 2048, 32 * 2048, 32 * 2048 * 384, 32 * 128 * 2048, 2 * 5632 * 2048, 5632 * 2048]
new = lambda n: torch.empty(n, dtype=torch.bfloat16, device="cuda")
whole, part = [new(n) for n in sizes], [new(n // world) for n in sizes]
flat, flat_part = new(sum(sizes)), new(sum(sizes) // world)
x = torch.randn(16384, 2048, dtype=torch.bfloat16, device="cuda"); w = torch.randn(2048, 11264, dtype=torch.bfloat16, device="cuda")
def gathers():
    with _coalescing_manager(group):
        for a, b in zip(whole, part): dist.all_gather_into_tensor(a, b, group=group)
def gather_flat(): dist.all_gather_into_tensor(flat, flat_part, group=group)
def split(): torch.split_with_sizes_copy(flat.view(world, -1), [n // world for n in sizes], dim=1, out=[a.view(world, -1) for a in whole])
def reductions():
    with _coalescing_manager(group):
        for a, b in zip(part, whole): dist.reduce_scatter_tensor(a, b, group=group)
def reduction_flat(): dist.reduce_scatter_tensor(flat_part, flat, group=group)
def product():
    for _ in range(4): x @ w
def time(run, n=20):
    for _ in range(3): run()
    torch.cuda.synchronize(); dist.barrier(); a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    for _ in range(n): run()
    b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / n
side = torch.cuda.Stream(priority=-1)
def beside(collective):
    def run():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side): collective()
        product(); torch.cuda.current_stream().wait_stream(side)
    return run
rows = {f.__name__: time(f) for f in (gathers, gather_flat, split, reductions, reduction_flat, product)}
rows |= {f"product beside {f.__name__}": time(beside(f)) for f in (gathers, gather_flat, reductions, reduction_flat)}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"): gathers(); reductions()
rows["gathers and reductions in a graph"] = time(graph.replay)
if rank == 0: print(f"{sum(sizes) * 2 / 1e6:.0f} MB, ms: " + ", ".join(f"{k} {v:.3f}" for k, v in rows.items()), flush=True)
torch.cuda.synchronize(); del graph; dist.destroy_process_group()
