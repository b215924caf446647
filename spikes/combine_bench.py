"""combine_bench.py OUT.json [NUMBERS]: the sum over heads alone, in the tree that PYTHONPATH names, with other tiles.

Shapes 1 to 6, 7: a layer of 1b_mosa, 8: the paper's Tiny with 276 heads, k 32. In a tree whose kernel has TAIL only the present tiles.
OUT.json: for each "columns of a chunk/rows a token/pairs" the fastest; OUT.json.all: everything."""
import itertools, json, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import torch
from benchmarks.mosa_layer import layer_inputs
from benchmarks.shapes import SHAPES, Shape
from megatron_mosa.kernels.triton import scattered, selection, tiles
from megatron_mosa.kernels.triton.common import cdiv, launch, strides
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import bits_of, rows_of

ALL = [*SHAPES, Shape(4, 4096, 2048, 128, 16, 32), Shape(64, 1024, 512, 64, 32, 276)]
OLD = "TAIL" in scattered._combine_kernel.arg_names
PLAIN = [(8, 64), (8, 80), (16, 80), (16, 96), (16, 128), (32, 96), (32, 128), (32, 168), (8, 0), (16, 0), (32, 0)]
PAIRED = [(8, 80), (8, 96), (8, 128), (16, 96), (16, 128), (16, 168), (16, 192), (32, 168), (32, 255), (8, 0), (16, 0), (32, 0)]
import os
if os.environ.get("SMALL"):
    PLAIN, PAIRED = [(4, 0), (4, 64), (4, 80), (8, 64), (8, 80), (16, 128)], [(4, 0), (4, 64), (4, 80), (4, 96), (4, 128), (8, 128)]
WIDTHS = [(128, 1), (256, 1), (512, 2), (1024, 4)]


def variants(pair, columns):
    if OLD:
        return []
    return [dict(UNROLL=u, COLUMNS=c, num_warps=w) | ({"maxnreg": m} if m else {})
            for (c, w), (u, m) in itertools.product(WIDTHS, PAIRED if pair else PLAIN) if c <= columns]


class Sum:
    def __init__(self, shape, pair, device="cuda"):
        self.shape, self.pair = shape, pair
        k = shape.selected
        self.states, self.router, _, _ = (t.detach() for t in layer_inputs(shape, shape.batch, device=device))
        scores = selection.fused_router_scores(self.states, self.router)
        indices = selection.fused_select_tokens(scores, k, True)
        self.sequences, self.columns = scattered.chunks_of(indices.shape, self.states)
        self.rows = rows_of(indices, shape.length, self.sequences)
        self.capacity = self.sequences * k
        self.each = shape.heads * k // shape.length
        self.products = torch.randn(shape.heads, self.capacity, self.columns, device=device, dtype=torch.bfloat16)
        self.output = torch.empty_like(self.states)
        self.pairs = (None, None)
        if pair:
            p = torch.zeros(shape.heads, shape.batch * k, PAIR, device=device, dtype=torch.bfloat16)
            p[..., 0].normal_()
            self.pairs = p, self.router.to(torch.bfloat16).contiguous()

    def run(self, chosen):
        s, r = self.shape, self.rows
        for first in range(0, s.batch, self.sequences):
            last = min(s.batch, first + self.sequences)
            pairs = (self.pairs[0][:, first * s.selected:], self.pairs[1]) if self.pair else (None, None)
            for column in range(0, s.width, self.columns):
                launch(scattered._combine_kernel, (s.length * (last - first), cdiv(self.columns, chosen["COLUMNS"])),
                       self.products, r.offsets, r.entries, *pairs, self.output, first, last - first, s.batch * s.selected,
                       self.capacity, bits_of(self.capacity), s.length, s.width, column, self.columns, *strides(self.output),
                       PAIR=PAIR if self.pair else 0, **chosen)
        return self.output

    def time(self, chosen):
        self.run(chosen); torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(chosen)
        times = []
        for _ in range(9):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000); a.record(); graph.replay(); b.record(); torch.cuda.synchronize()
            times.append(a.elapsed_time(b))
        return sorted(times)[4]


def present_tiles(one, pair):
    import inspect
    first = [torch.bfloat16] if "dtype" in inspect.signature(tiles.combine).parameters else []
    return tiles.combine(*first, one.columns, one.each, pair)


def precompile(job):
    pair, part = job
    for number in (1, 7):  # widths of 512 and 2048: strides and sizes of the same divisibility
        s = ALL[number - 1]
        one = Sum(Shape(4, s.length, s.width, s.head_dim, s.sparsity, 16), pair)
        for chosen in part:
            if chosen["COLUMNS"] <= one.columns:
                try:
                    one.run(chosen)
                except Exception as error:
                    print(chosen, type(error).__name__, flush=True)
    torch.cuda.synchronize()


def main():
    out, start = sys.argv[1], time.time()
    numbers = [int(w) for w in sys.argv[2].split(",")] if len(sys.argv) > 2 else [1, 8, 2, 3, 7, 5, 6, 4]
    if not OLD:
        jobs = [(pair, v[i::7]) for pair in (0, 1) for v in [variants(pair, 4096)] for i in range(7)]
        with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
            list(pool.map(precompile, jobs))
        print(f"compiled after {time.time() - start:.0f} s", flush=True)
        if out == "compile":
            return
    best, rows = {}, []
    for number in numbers:
        for pair in (0, 1):
            torch.cuda.empty_cache()
            one = Sum(ALL[number - 1], pair)
            present = present_tiles(one, bool(pair))
            if OLD:
                times = [(one.time(present), present)]
            else:
                expected, times = one.run(present).clone(), []
                for chosen in [present, *variants(pair, one.columns)]:
                    try:
                        result = one.run(chosen)
                        error = (result.float() - expected.float()).norm() / expected.float().norm()
                        assert error < 0.01, error
                        times.append((one.time(chosen), chosen))
                    except Exception as e:
                        print(number, pair, chosen, str(e)[:80], flush=True)
            moved = ALL[number - 1].batch * (ALL[number - 1].heads * ALL[number - 1].selected + ALL[number - 1].length) * ALL[number - 1].width * 2
            times.sort(key=lambda t: t[0])
            now = next((t for t, c in times if c == present), 0)
            f = lambda c: "/".join(str(c.get(k, 0)) for k in ("UNROLL", "maxnreg", "COLUMNS", "num_warps"))
            print(f"{number} pair {pair} each {one.each} columns {one.columns}: present {now:.3f} ms, {moved / now / 1e9:.2f} TB/s; best " +
                  "  ".join(f"{t:.3f} {f(c)}" for t, c in times[:6]) + f"; {time.time() - start:.0f} s", flush=True)
            rows.append(dict(number=number, pair=pair, each=one.each, columns=one.columns, gigabytes=moved / 1e9, times=times))
            if not OLD:
                best[f"{one.columns}/{one.each}/{pair}"] = times[0][1]
            json.dump(best, open(out, "w")); json.dump(rows, open(out + ".all", "w"))
            del one


if __name__ == "__main__":
    main()
