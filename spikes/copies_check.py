"""Which gradients collectives by copies change, and what mends them: copies_check.py under torchrun, two ranks, from the tree of branch copies.

Every line: a variant, the largest relative error of a gradient against NCCL's in the first and third micro-batch, the parameters that are wrong.
"""
import os, sys
import torch
from torch import distributed as dist
sys.path.insert(0, os.getcwd())
from megatron_mosa.kernels import get_backend
from megatron_mosa.model import build_model, language_model_loss
from megatron_mosa.parallel import copies
from tests.distributed.tasks import VOCAB_SIZE, global_batch, parallel, tiny_config

def config(length=24, width=128, batch=4):
    settings = dict(model__hidden_size=width, model__head_dim=64, model__num_layers=3, train__global_batch_size=batch, train__micro_batch_size=batch,
        data__sequence_length=length, parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True,
        model__activation="swiglu", model__normalization="RMSNorm", model__rotary_percent=1.0)
    return tiny_config(**settings)

def gradients(model, c, device, number):
    out = []
    for step in range(number):
        batch = {k: v.to(device) for k, v in global_batch(c, step).items()}
        model.zero_grad()
        loss, count = language_model_loss(model, **batch)
        (loss / count).backward()
        out.append({"loss": loss.detach().double()} | {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None})
    return out

def make(c, device, copied, overlaps, backend):
    os.environ["MOSA_COPIES"] = "1" if copied else "0"
    torch.manual_seed(c.run.seed)
    model = build_model(c, VOCAB_SIZE).to(device)
    loss = None if device.type == "cuda" else lambda x, w, _, weights, __: (torch.nn.functional.softplus(x @ w.t()) * weights[:, None]).sum()
    model.compile_layers(get_backend("auto", next(model.parameters())), loss, backend, overlaps)
    return model

def report(name, found, right):
    if dist.get_rank() not in (0, 1): return
    lines = []
    for number in (0, len(right) - 1):
        errors = {n: ((found[number][n] - v).norm() / v.norm().clamp(min=1e-30)).item() for n, v in right[number].items()}
        bad = [f"{n.replace('decoder.layers.', '')}:{e:.0e}" for n, e in errors.items() if not e < 1e-4]
        lines.append(f"{max(errors.values()):.1e} {len(bad)}/{len(errors)} {' '.join(bad[:6])}")
    print(f"[{dist.get_rank()}] {name:34s} " + " | ".join(lines), flush=True)

def direct(device, group, rank, number=300, elements=12 * 2 * 128, lanes=2, both=True):
    """Bare operators against NCCL's on two streams."""
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()][:lanes]
    if lanes > 1: copies.use_lane(streams[1], 1)
    wrong = [0, 0]
    pairs = []
    for i in range(number):
        for s in streams:
            with torch.cuda.stream(s):
                x = torch.randn(12, elements // 12, device=device); y = torch.randn(24, elements // 12, device=device)
                pairs.append((s, x, copies.gather_copies(x, 2, group), y, copies.exchange_copies(y, 2, group)))
    torch.cuda.synchronize()
    pg = copies._resolved(group)
    for s, x, g, y, e in pairs:
        want = torch.empty_like(g); dist.all_gather_into_tensor(want, x, group=pg)
        wrong[0] += not torch.equal(want, g)
        every = torch.empty(2, *y.shape, device=device); dist.all_gather_into_tensor(every.view(-1, y.shape[1]), y, group=pg)
        wrong[1] += not torch.equal(every[1 - rank].chunk(2)[rank], e[0])
    print(f"[{rank}] direct lanes {lanes} elements {elements}: wrong gathers {wrong[0]}, exchanges {wrong[1]} of {len(pairs)}", flush=True)

def main():
    cuda = torch.cuda.is_available()
    c = config()
    with parallel(c) as layout:
        device, rank = layout.device, dist.get_rank()
        from megatron_mosa.parallel import tensor_parallel_group
        group = tensor_parallel_group().group_name
        if cuda:
            for lanes, elements in ((1, 3072), (2, 3072), (2, 1 << 20)):
                direct(device, group, rank, lanes=lanes, elements=elements)
        bare = dict(gather=copies.gather_through, exchange=copies.exchange_through, symm=copies.symmetric_memory.empty)
        def synced(f):
            def run(*a):
                torch.cuda.synchronize(); r = f(*a); torch.cuda.synchronize(); return r
            return run
        kept = []
        def keeping(*a, **k):
            kept.append(bare["symm"](*a, **k)); return kept[-1]
        def after(f):
            def run(*a):
                r = f(*a); torch.cuda.synchronize(); return r
            return run
        def before(f):
            def run(*a):
                torch.cuda.synchronize(); return f(*a)
            return run
        for overlaps in (True, False):
            for backend in (None, "inductor"):
                right = gradients(make(c, device, False, overlaps, backend), c, device, 3)
                variants = [("as it is", None)]
                if cuda and backend is None:
                    variants += [("memory kept", "keep"), ("synchronized around", synced), ("synchronized before", before), ("synchronized after", after), ("not deterministic", "free")]
                for name, change in variants:
                    copies.free_buffers(); copies.gather_through, copies.exchange_through, copies.symmetric_memory.empty = bare["gather"], bare["exchange"], bare["symm"]
                    torch.use_deterministic_algorithms(change != "free")
                    if change == "keep": copies.symmetric_memory.empty = keeping
                    elif callable(change): copies.gather_through, copies.exchange_through = change(bare["gather"]), change(bare["exchange"])
                    found = gradients(make(c, device, True, overlaps, backend), c, device, 3)
                    if cuda: torch.cuda.synchronize()
                    report(f"{name}, overlaps {overlaps}, {backend}", found, right)
    if dist.is_initialized(): dist.destroy_process_group()

main()
