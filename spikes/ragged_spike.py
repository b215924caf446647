"""ragged_spike.py [tiles]: thresholds before (.spike/ragged_before) and after (.spike/ragged_after); one GPU, at most 100 s.

Without arguments: compiles for both trees in parallel, while the new tree is checked against the naive path in fp32;
then times expert choice and thresholds, forward and backward, in one process a tree; prints a table.
With `tiles`: times the products of ragged rows alone at shapes 2, 5, 6 and 1b_mosa's with other tiles and chunks.
"""
import json, os, subprocess, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
TREES = {"before": f"{HERE}/ragged_before", "after": f"{HERE}/ragged_after"}
BEGIN = time.time()

def start(tree, *words, stdout=None):
    path = os.pathsep.join(filter(None, (TREES[tree], os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": f"/tmp/ragged_cache_{tree}"}
    return subprocess.Popen([sys.executable, "-W", "ignore", __file__, *map(str, words)], env=environment, cwd=TREES[tree], stdout=stdout, text=True)

if len(sys.argv) == 1 or sys.argv[1:] == ["tiles"]:
    what = "tile" if sys.argv[1:] else "layer"
    trees = ["after"] if what == "tile" else list(TREES)
    jobs = [start(tree, "compile", what, n) for n in ((2, 5, 6, 7) if what == "tile" else (6, 5, 4, 1, 2, 3, 7)) for tree in trees for _ in (0,)]
    if what == "layer": jobs.append(start("after", "check"))
    for job in jobs:
        try: job.wait(max(5, 60 - (time.time() - BEGIN)))
        except subprocess.TimeoutExpired: print("still compiling:", job.args[-2:], flush=True)
    print(f"compiled, {time.time() - BEGIN:.0f} s", flush=True)
    if what == "tile":
        start("after", "tile").wait(); sys.exit()
    found = {}
    for tree in trees:
        job = start(tree, "layer", stdout=subprocess.PIPE)
        for line in job.stdout:
            if line.startswith("{"): found[tree] = found.get(tree, {}) | json.loads(line)
            else: print(tree, line, end="", flush=True)
        job.wait()
        print(f"{tree} timed, {time.time() - BEGIN:.0f} s", flush=True)
    print("| shape | expert choice, before -> after | thresholds | thresholds / expert | forward of thresholds |\n| --- | --- | --- | --- | --- |")
    for n in found["after"]:
        a, b = found.get("before", {}).get(n), found["after"][n]
        if a: print(f"| {n} | {a['expert']:.3f} -> {b['expert']:.3f} | {a['threshold']:.3f} -> {b['threshold']:.3f} | {a['threshold']/a['expert']:.3f} -> {b['threshold']/b['expert']:.3f} | {a['forward']:.3f} -> {b['forward']:.3f} |")
    for n in found["after"]:
        for tree in trees: print(n, tree, found.get(tree, {}).get(n, {}).get("kernels"))
    sys.exit()

from collections import defaultdict
from dataclasses import replace
from unittest import mock
import torch, triton
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import measure
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels import get_backend, naive
from megatron_mosa.kernels.triton import scattered, tiles
from megatron_mosa.kernels.triton.rows import rows_of
ALL = {i + 1: s for i, s in enumerate(SHAPES)} | {7: Shape(4, 4096, 2048, 128, 16, 32)}  # 7: 1b_mosa's

def layers(shape):
    inputs = m.layer_inputs(shape, shape.batch)
    return inputs, lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton"), m.threshold_layer(shape, inputs)

def kernels_of(function):
    """ms of each kernel in one call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        function(); torch.cuda.synchronize()
    times = defaultdict(float)
    for event in prof.events(): times[event.name.split("(")[0][-34:]] += event.device_time / 1e3
    return " ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda p: -p[1])[:9])

def time_layers():
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    for n, shape in ALL.items():
        inputs, expert, threshold = layers(shape)
        upstream = torch.randn_like(inputs[0])
        both = lambda f: torch.autograd.grad(f(*inputs), inputs, upstream)
        def forward():
            with torch.no_grad(): threshold(*inputs)
        row = {name: measure(lambda: both(f), seconds=0.25).milliseconds for name, f in (("expert", expert), ("threshold", threshold))}
        row |= {"forward": measure(forward, seconds=0.1).milliseconds, "kernels": kernels_of(lambda: both(threshold))}
        print(json.dumps({str(n): row}), flush=True)
        del inputs, expert, threshold, upstream; m.release()

def check():
    """Thresholds with few sequences, several chunks, and heads of few or no rows, against the naive path in fp32."""
    for n, heads, batch in ((2, 109, 5), (5, 170, 3), (6, 100, 3), (7, 32, 4)):
        shape = replace(ALL[n], heads=heads, batch=batch)
        inputs = m.layer_inputs(shape, batch)
        fused, capacity = get_backend("triton", inputs[0]), -(-5 * shape.selected // 4)
        exact_inputs = [t.detach().float().requires_grad_() for t in inputs]
        with torch.no_grad():
            scores = naive.router_scores(*exact_inputs[:2])
            thresholds = scores.gather(-1, scores.topk(shape.selected).indices[..., -1:]).mean(0).squeeze(-1)
            thresholds[1], thresholds[2] = 1.0, 0.0  # a head with the first token alone; one that fills its capacity
            indices = fused.select_above(scores, thresholds, capacity, None, 0.1, 1 / shape.sparsity)
        upstream = torch.randn(inputs[0].shape, device="cuda").bfloat16()
        def run(kernels, tensors):
            scores = kernels.router_scores(*tensors[:2])
            output = kernels.selected_attention(*tensors[:2], scores, indices, *tensors[2:], **m.ROTARY)
            return [output.detach(), *torch.autograd.grad(output, tensors, upstream.to(tensors[0].dtype))]
        exact = run(naive, exact_inputs)
        for small in (256 << 20, 0):
            with mock.patch.object(scattered, "SMALL_BYTES", small):
                first, again = run(fused, inputs), run(fused, inputs)
            found = {"triton": first, "naive": run(naive, inputs)}
            errors = {k: [round(((a.float() - b).norm() / b.norm()).item(), 5) for a, b in zip(v, exact)] for k, v in found.items()}
            good = all(a < 2 * b for a, b in zip(*errors.values())) and all(map(torch.equal, first, again))
            counts = (indices < shape.length).sum(-1).sum(0)
            print("check", n, "good" if good else "BAD", "chunks" if small == 0 else "one chunk", errors, f"rows a head {counts.min()} to {counts.max()} of {capacity * batch}", flush=True)
        del exact, found, first, again, inputs, exact_inputs; m.release()

TILES = [{}] + [dict(zip(("ROWS", "COLUMNS", "INNER", "PROGRAMS", "num_warps", "num_stages"), t)) for t in [
    (128, 256, 64, 1, 8, 3), (128, 256, 64, 1, 8, 4), (256, 128, 64, 1, 8, 3), (128, 128, 64, 1, 8, 4), (128, 128, 64, 1, 8, 6), (128, 128, 64, 2, 8, 2),
    (128, 128, 64, 2, 8, 4), (128, 128, 64, 2, 4, 2), (64, 256, 64, 2, 4, 2), (64, 256, 64, 1, 8, 4)]]

def products(shape, batch):
    """Ragged rows as thresholds select them (each token with probability 1 / rho, clipped), and the two products."""
    g = torch.Generator("cuda").manual_seed(0)
    E, T, h, D, capacity = shape.heads, shape.length, shape.width, shape.head_dim, -(-5 * shape.selected // 4)
    r = lambda *size: torch.randn(*size, device="cuda", generator=g, dtype=torch.bfloat16)
    with torch.no_grad():
        indices = torch.empty(batch, E, capacity, dtype=torch.int64, device="cuda")
        for b in range(batch):
            scores = torch.rand(E, T, device="cuda", generator=g)
            indices[b] = torch.where(scores < 1 / shape.sparsity, torch.arange(T, device="cuda"), T).sort(-1).values[:, :capacity]
    like = r(batch, T, h)
    made = {}  # by the sequences of a chunk, which an override may change
    def rows():
        sequences, _ = scattered.chunks_of(indices.shape, like)
        return made.setdefault(sequences, None) or made.update({sequences: rows_of(indices, T, sequences)}) or made[sequences]
    v3, v1, w3, w1 = r(E, batch * capacity, 3 * D), r(E, batch * capacity, D), r(E, h, 3 * D).mT, r(E, D, h)
    pairs = r(E, batch * capacity, 16), r(E, h)
    return {"dX": lambda: scattered.scattered_product(v3, w3, rows(), like, pairs), "dX without pairs": lambda: scattered.scattered_product(v3, w3, rows(), like), "out": lambda: scattered.scattered_product(v1, w1, rows(), like)}

def all_tiles(n, seconds, overrides=TILES):
    shape = ALL[n]
    batch = shape.batch if seconds else 1
    runs = products(replace(shape, heads=shape.heads if seconds else 16 + shape.heads % 16), batch)
    chosen, chunk = tiles.scattered, scattered.FEWEST_COLUMNS
    for name, run in runs.items():
        if seconds: expected = run().clone()
        for override in overrides if name != "dX without pairs" else [{}]:
            for fewest in (1024, 512) if seconds and not override else (1024,):
                with mock.patch.object(tiles, "scattered", lambda *a: chosen(*a) | override), mock.patch.object(scattered, "FEWEST_COLUMNS", fewest):
                    try:
                        found = run(); torch.cuda.synchronize()
                        if seconds:
                            error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
                            ms = measure(run, seconds=seconds).milliseconds
                            print(f"shape {n} {name} {'-'.join(map(str, override.values())) or 'chosen'} fewest {fewest}: {ms:.3f} ms error {error:.0e} {kernels_of(run) if not override else ''}", flush=True)
                    except Exception as e: print(n, name, override, repr(e)[:90].replace("\n", " "), flush=True)

if sys.argv[1] == "compile" and sys.argv[2] == "layer":
    shape = ALL[int(sys.argv[3])]
    if shape.heads > 1000: shape = replace(shape, heads=shape.heads // 2 // 16 * 16 + shape.heads % 16)
    inputs, *both = layers(shape)
    for f in both: torch.autograd.grad(f(*inputs), inputs, torch.ones_like(inputs[0]))
    with torch.no_grad(): both[1](*inputs)
    torch.cuda.synchronize()
elif sys.argv[1] == "compile":
    n = int(sys.argv[3])
    if len(sys.argv) == 4:
        jobs = [start("after", "compile", "tile", n, i) for i in range(4)]
        [job.wait() for job in jobs]
    else: all_tiles(n, 0, TILES[int(sys.argv[4])::4])
elif sys.argv[1] == "check": check()
elif sys.argv[1] == "layer": time_layers()
elif sys.argv[1] == "tile":
    for n in (5, 6, 2, 7): all_tiles(n, 0.05); m.release()
