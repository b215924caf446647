"""attn_many.py OUT.json NUMBERS: attention's backward pass of thresholds' rows, with other tiles for those that have more rows than one tile."""
import json, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from unittest import mock
import torch
from attn_thresholds import SHAPES, chosen, stages, timed, tiles
TILES = [dict(BLOCK=b, num_warps=w, num_stages=s) for b, w, s in ((16, 2, 2), (16, 1, 2), (16, 1, 1), (16, 2, 1), (32, 2, 2), (32, 1, 2), (32, 2, 1), (64, 4, 1), (64, 2, 1), (64, 4, 2))]
def override(t):
    def attention(dtype, device, selected, width, is_backward):
        present = chosen(dtype, device, selected, width, is_backward)
        return present | t if is_backward and selected in (40, 80) else present
    return mock.patch.object(tiles, "attention", attention)
def precompile(job):
    n, t = job
    s = SHAPES[n - 1]
    runs, *_ = stages(replace(s, batch=2, heads=16 + s.heads % 16))
    try:
        with override(t): runs[1](); torch.cuda.synchronize()
    except Exception as e: print(n, t, type(e).__name__, flush=True)
def main():
    out, numbers = sys.argv[1], [int(w) for w in sys.argv[2].split(",")]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(precompile, [(n, t) for n in numbers if n != 2 for t in TILES]))
    found = []
    for n in numbers:
        runs, rows, about = stages(SHAPES[n - 1]); run = runs[1]
        times = []
        for _ in range(2):
            for t in TILES:
                with override(t): times.append((timed(run), "/".join(map(str, t.values()))))
        times.sort()
        print(n, about, "present", [x for x, y in times if y == "16/2/2"], times[:8], flush=True)
        found.append((n, times)); json.dump(found, open(out, "w"))
        del runs, run; torch.cuda.empty_cache()
if __name__ == "__main__": main()
