"""decode_bench.py NAME OUT.json [warm]: times the tree that PYTHONPATH names; prompts and steps of the three models."""
import copy, json, sys, time
import torch
from benchmarks.decode import MODELS, SMALL, build
from megatron_mosa.hf import heads_mosa
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import CACHE

name, out, warm = sys.argv[1], sys.argv[2], sys.argv[3:] == ["warm"]
N, rows, began = 24, [], time.time()
print(name, heads_mosa.__file__, flush=True)


def now():
    torch.cuda.synchronize()
    return time.perf_counter()


def prompt(model, tokens):
    cache, start = model.new_cache(), now()
    model(tokens, logits_to_keep=1, **{CACHE: cache})
    host = time.perf_counter() - start
    return cache, now() - start, host


def steps(model, cache, batch, warmup, repeats, key):
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    tokens = torch.randint(SMALL["vocab_size"], (batch, warmup + repeats * N + 4), device="cuda")
    at = 0

    def take(number):
        nonlocal at
        for _ in range(number):
            model(tokens[:, at : at + 1], **{CACHE: cache})
            at += 1

    take(warmup)
    times = []
    for _ in range(repeats):
        start = now()
        take(N)
        times.append((now() - start) / N * 1e3)
    start = time.perf_counter()
    take(1)
    host = (time.perf_counter() - start) * 1e3
    kernels = None
    if batch == 1 and key["kind"] != "eager" and not warm:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            take(2)
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        sums = {}
        for e in events:
            count, total = sums.get(e.name[:60], (0, 0.0))
            sums[e.name[:60]] = count + 1, total + e.time_range.elapsed_us()
        kernels = {"launches": len(events) / 2, "busy_us": sum(t for _, t in sums.values()) / 2}
        kernels["each"] = sorted(((k, c / 2, round(t / 2, 1)) for k, (c, t) in sums.items()), key=lambda x: -x[2])[:22]
    rows.append(key | {"batch": batch, "ms": sorted(times), "host_ms": host, "kernels": kernels})
    print(f"{time.time() - began:5.0f} s", name, key, batch, [round(t, 3) for t in times], round(host, 3), flush=True)


class Unbranched(getattr(heads_mosa, "Branch", object)):
    def __init__(self, device):
        super().__init__(torch.device("cpu"))


with torch.no_grad():
    for kind in ("dense", "equal FLOPs", "equal perplexity"):
        model = build(MosaConfig(**(SMALL | MODELS[kind])), "cuda", torch.bfloat16)
        for context in (8192, 32768):
            tokens = torch.randint(SMALL["vocab_size"], (1, context), device="cuda")
            seconds = []
            for _ in range(2 if warm else 6):
                cache, took, host = prompt(model, tokens)
                seconds.append((took, host))
            rows.append({"kind": "prompt", "model": kind, "context": context, "ms": [round(t * 1e3, 2) for t, _ in seconds[1:]], "host_ms": [round(h * 1e3, 2) for _, h in seconds[1:]]})
            print(f"{time.time() - began:5.0f} s", name, rows[-1], flush=True)
            key = {"model": kind, "context": context}
            for batch in (1, 64):
                if warm and batch * context > 64 * 8192:
                    continue
                model.captures_steps = True
                steps(model, cache, batch, 3 if warm else 20, 0 if warm else 3, key | {"kind": "captured"})
            if kind != "dense" and hasattr(heads_mosa, "Branch") and not warm:
                branch, heads_mosa.Branch = heads_mosa.Branch, Unbranched
                steps(model, cache, 1, 20, 3, key | {"kind": "unbranched"})
                heads_mosa.Branch = branch
            if context == 8192 and not warm:
                model.captures_steps = False
                steps(model, cache, 1, 4, 1, key | {"kind": "eager"})
            torch.cuda.empty_cache()
        del model, cache
        json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(out, "w"))
