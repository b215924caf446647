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
    def __init__(self, device, *rest):
        super().__init__(torch.device("cpu"), *rest)




import cProfile, pstats, os
from megatron_mosa.hf import kernels_mosa, graph_mosa
with torch.no_grad():
    models = {kind: build(MosaConfig(**(SMALL | MODELS[kind])), "cuda", torch.bfloat16) for kind in ("dense", "equal FLOPs", "equal perplexity")}
    what = sys.argv[3].split(",")
    warm = False
    if "prompt" in what:
        for kind, model in models.items():
            for context in (8192, 32768):
                tokens = torch.randint(SMALL["vocab_size"], (1, context), device="cuda")
                seconds = [prompt(model, tokens)[1:] for _ in range(9)]
                rows.append({"kind": "prompt", "model": kind, "context": context, "ms": sorted(round(t * 1e3, 2) for t, _ in seconds[3:]), "host_ms": sorted(round(h * 1e3, 2) for _, h in seconds[3:])})
                print(f"{time.time() - began:5.0f} s", name, rows[-1], flush=True)
        # the host alone: no wait at the end
        if hasattr(kernels_mosa, "_nothing") or True:
            from importlib import import_module
            try:
                room = import_module("megatron_mosa.hf.room_mosa")
                real = room.Trial.succeeded
                marks = []
                def succeeded(self, *a):
                    marks.append(time.perf_counter()); return real(self, *a)
                room.Trial.succeeded = succeeded
                for kind in ("equal FLOPs", "equal perplexity"):
                    tokens = torch.randint(SMALL["vocab_size"], (1, 8192), device="cuda"); prompt(models[kind], tokens)
                    times = []
                    for _ in range(6):
                        start = now(); marks.clear(); prompt(models[kind], tokens); times.append((round((marks[0] - start) * 1e3, 2), len(marks)))
                    print("HOST until the check", kind, times, flush=True)
                room.Trial.succeeded = real
            except ImportError as e: print(e)
        for kind in ("dense", "equal FLOPs"):
            tokens = torch.randint(SMALL["vocab_size"], (1, 8192), device="cuda"); prompt(models[kind], tokens)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                prompt(models[kind], tokens); torch.cuda.synchronize()
            events = sorted((e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e.time_range.start)
            print(name, kind, "prompt 8k: launches", len(events), "busy us", sum(e.time_range.elapsed_us() for e in events), "span", events[-1].time_range.end - events[0].time_range.start)
            if kind != "dense":
                import collections
                gaps = collections.defaultdict(lambda: [0, 0.0, 0.0])
                for a, b in zip(events, events[1:]):
                    g = gaps[b.name[:50]]; g[0] += 1; g[1] += b.time_range.start - a.time_range.end; g[2] += b.time_range.elapsed_us()
                for n, g in sorted(gaps.items(), key=lambda x: -x[1][1])[:40]: print("    before", n, g[0], "idle us", round(g[1]), "busy", round(g[2]))
            watch = cProfile.Profile(); watch.enable()
            for _ in range(3): prompt(models[kind], tokens)
            watch.disable(); print(name, kind, flush=True)
            pstats.Stats(watch).sort_stats("cumtime").print_stats(70)
    if "variants" in what:
        base = kernels_mosa.plan
        for kind in ("equal FLOPs", "equal perplexity"):
            tokens = torch.randint(SMALL["vocab_size"], (1, 8192), device="cuda")
            prompt(models[kind], tokens); cache = prompt(models[kind], tokens)[0]
            models[kind].captures_steps = True
            for batch, variants in ((64, ((1, 32, 4), (2, 32, 4), (4, 32, 4), (1, 64, 4), (2, 64, 4), (4, 32, 8), (2, 64, 8), (1, 128, 4))), (1, ((8, 32, 8), (4, 32, 8), (8, 16, 8), (4, 32, 4), (4, 16, 4))), (8, ((1, 32, 4), (4, 32, 8), (8, 32, 8), (2, 32, 4)))):
                for at_once, outputs, warps in variants:
                    kernels_mosa.plan = lambda *x: base(*x)._replace(at_once=at_once, outputs=outputs); kernels_mosa.WARPS = warps
                    steps(models[kind], cache, batch, 12, 1, {"model": kind, "context": 8192, "kind": "captured", "variant": (at_once, outputs, warps)})
                    print("   ", [(n[:22], c, t) for n, c, t in rows[-1]["kernels"]["each"] if n.startswith(("_sum", "_attend", "_project"))], flush=True)
            kernels_mosa.plan = base; kernels_mosa.WARPS = 0
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
