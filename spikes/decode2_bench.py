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
    if key["kind"] != "eager" and not warm:
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



import cProfile, pstats
with torch.no_grad():
    models = {kind: build(MosaConfig(**(SMALL | MODELS[kind])), "cuda", torch.bfloat16) for kind in ("dense", "equal FLOPs", "equal perplexity")}
    what = sys.argv[3] if len(sys.argv) > 3 else "prompt,batch"
    warm = False
    if "prompt" in what:
        for kind, model in models.items():
            for context in (8192, 32768):
                tokens = torch.randint(SMALL["vocab_size"], (1, context), device="cuda")
                seconds = [prompt(model, tokens)[1:] for _ in range(9)]
                rows.append({"kind": "prompt", "model": kind, "context": context, "ms": sorted(round(t * 1e3, 2) for t, _ in seconds[3:]), "host_ms": sorted(round(h * 1e3, 2) for _, h in seconds[3:])})
                print(f"{time.time() - began:5.0f} s", name, rows[-1], flush=True)
        for kind in ("dense", "equal FLOPs"):
            tokens = torch.randint(SMALL["vocab_size"], (1, 8192), device="cuda")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                prompt(models[kind], tokens); torch.cuda.synchronize()
            events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            print(name, kind, "prompt 8k: launches", len(events), "busy us", sum(e.time_range.elapsed_us() for e in events))
            watch = cProfile.Profile(); watch.enable()
            for _ in range(3): prompt(models[kind], tokens)
            watch.disable(); print(name, kind, flush=True)
            pstats.Stats(watch).sort_stats("tottime").print_stats(28)
    if "batch" in what:
        for kind, model in models.items():
            for context in (8192, 32768):
                tokens = torch.randint(SMALL["vocab_size"], (1, context), device="cuda")
                cache = prompt(model, tokens)[0]
                model.captures_steps = True
                for way in ("captured", "unbranched"):
                    if way == "unbranched" and (kind == "dense" or not hasattr(heads_mosa, "Branch")): continue
                    branch = getattr(heads_mosa, "Branch", None)
                    if way == "unbranched": heads_mosa.Branch = Unbranched
                    steps(model, cache, 64, 20, 2, {"model": kind, "context": context, "kind": way})
                    if branch: heads_mosa.Branch = branch
                    if rows[-1]["kernels"]: print("   ", rows[-1]["kernels"]["launches"], rows[-1]["kernels"]["busy_us"], [(n[:22], c, t) for n, c, t in rows[-1]["kernels"]["each"] if n.startswith("_")], flush=True)
                del cache; torch.cuda.empty_cache()
        json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(out, "w"))
