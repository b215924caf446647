"""torchrun copies_bench.py OUT: gather and reduce-scatter of [4096, 4, 2048] by NCCL and by copies, alone and beside matrix products; and in a CUDA graph."""
import json, sys, torch, torch.distributed as dist
from megatron_mosa.parallel.copies import exchange_copies, gather_copies
dist.init_process_group("nccl"); r, n = dist.get_rank(), dist.get_world_size(); torch.cuda.set_device(r)
group = dist.group.WORLD.group_name; C = torch.ops._c10d_functional; torch.manual_seed(r)
shard = torch.randn(4096 // n, 4, 2048, device="cuda", dtype=torch.bfloat16); whole = torch.randn(4096, 4, 2048, device="cuda", dtype=torch.bfloat16)
a, b = (torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16), torch.randn(2048, 5632, device="cuda", dtype=torch.bfloat16))
def nccl_gather(): return C.wait_tensor(C.all_gather_into_tensor(shard, n, group))
def nccl_scatter(): return C.wait_tensor(C.reduce_scatter_tensor(whole, "sum", n, group))
def copy_gather(): return gather_copies(shard, n, group)
@torch.compile
def added(own, received): return (own.float() + received.float().sum(0)).to(own.dtype)
def copy_scatter(): return added(whole.chunk(n)[r], exchange_copies(whole, n, group))
def exchange(): return exchange_copies(whole, n, group)
def products():
    for _ in range(20): torch.mm(a, b)
side = torch.cuda.Stream()
def timed(work, times=20):
    for _ in range(3): work()
    torch.cuda.synchronize(); dist.barrier(); s, e = (torch.cuda.Event(enable_timing=True) for _ in range(2)); s.record()
    for _ in range(times): work()
    e.record(); torch.cuda.synchronize(); return s.elapsed_time(e) / times
def graphed(work, times=10):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3): work()
    torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(times): out = work()
    return g, out
def beside(graph):
    def run():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side): graph.replay()
        products(); torch.cuda.current_stream().wait_stream(side)
    return run
rows = {"products": timed(products, 5)}
for name, work in dict(nccl_gather=nccl_gather, copy_gather=copy_gather, nccl_scatter=nccl_scatter, copy_scatter=copy_scatter, exchange=exchange).items():
    graph, out = graphed(work); graph.replay(); torch.cuda.synchronize()
    rows[name] = {"called": timed(work), "graph": timed(graph.replay, 5) / 10, "ten_beside_20_products": timed(beside(graph), 5)}
    if r == 0: print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
same = torch.equal(nccl_gather(), copy_gather()); error = (nccl_scatter().float() - copy_scatter().float()).abs().max().item()
if r == 0:
    print("20 products", round(rows["products"], 3), "gather equal", same, "scatter differs by", error); json.dump(rows, open(sys.argv[1], "w"))
torch.cuda.synchronize(); dist.barrier(); import os; os._exit(0)
