"""Runs hopper_scattered's source in the model of sim_pairs. sim_ragged.py FILE [seeds]"""
import sys, time
import numpy as np
import sim_pairs as s
from sim_pairs import Desc, World, gl, mbarrier, bf16, rng, gluon, tma, warpgroup_mma, warpgroup_mma_wait, pause, check
_arrive = mbarrier.arrive
def arrive(b, pred=True):
    if pred: _arrive(b)
    else: pause()
mbarrier.arrive = staticmethod(arrive)
class P:
    def __init__(p, a, o=0): p.a, p.o = a, o
    def __add__(p, x): return P(p.a, p.o + int(x))
def gload(p):
    assert 0 <= p.o < len(p.a), p.o
    return int(p.a[p.o])
gl.load = staticmethod(gload)
gl.where = staticmethod(lambda c, a, b: a if c else b)
gl.maximum = staticmethod(max)
gl.int32 = 'i32'
def load(path, mutate=()):
    src = open(path).read()
    src = src[src.index('@gluon.jit'):src.index('class RaggedProduct')]
    for a, b in mutate: assert src.count(a) == 1, (src.count(a), a); src = src.replace(a, b)
    ns = dict(gluon=gluon, gl=gl, mbarrier=mbarrier, tma=tma, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait, fence_async_shared=lambda: None, BOX=64, PAIR=16)
    exec(compile('from __future__ import annotations\n' + src, path, 'exec'), ns)
    return ns
def case(ns, E, B, k, width, columns, KB, K_LAST, HP, programs, seed, S, **o):
    rng.seed(seed); g = np.random.default_rng(seed)
    K, R, cap, N = KB * 64, B * k, S * k, o['COLUMNS']
    counts = g.integers(0, k + 1, (E, B)); counts[g.random((E, B)) < 0.2] = 0
    if E > 2: counts[1] = 0; counts[2] = k
    cu = np.concatenate([np.zeros((E, 1), int), counts.cumsum(1)], 1)
    v = bf16(g.standard_normal((E, R, K)).astype(np.float32)); w = bf16(g.standard_normal((E, K, width)).astype(np.float32))
    for e in range(E): v[e, cu[e, -1]:] = np.nan
    dv = Desc(v, [1, 64, 64]); dw = Desc(w.transpose(0, 2, 1).copy() if K_LAST else w, [1, N, 64] if K_LAST else [1, 64, N])
    exact = np.nan_to_num(v) @ w; pr = rt = None
    if HP:
        P16 = np.zeros((E, R, 16), np.float32); P16[..., :2] = bf16(g.standard_normal((E, R, 2)).astype(np.float32)) * 8
        R16 = np.zeros((E, width, 16), np.float32); R16[..., :2] = bf16(g.standard_normal((E, width, 1)).astype(np.float32))
        exact = exact + P16 @ R16.transpose(0, 2, 1); pr = Desc(P16, [1, 64, 16]); rt = Desc(R16, [1, N, 16])
    chunks = -(-B // S); most = E * (-(-cap // 128))
    lists = np.full((chunks, 4, most), 2**30, int); numbers = np.zeros(chunks, int)
    for c in range(chunks):
        n = 0
        for e in range(E):
            a, z = cu[e, c * S], cu[e, min(B, c * S + S)]
            for t in range(-(-(z - a) // 128)):
                lists[c, :, n] = e, a + t * 128, t * 128, min(z - a - t * 128, 128); n += 1
        numbers[c] = n
    for c in range(chunks):
        for first in range(0, width, columns):
            out = Desc(np.full((E, cap, columns), np.nan, np.float32), [1, 64, N // 2])
            tiles = -(-min(columns, width - first) // N)
            grid = min(programs, most * (-(-columns // N)))
            for p in range(grid):
                s.W = World(p, grid)
                s.W.programs = grid
                ns['_ragged_kernel'](dv, dw, out, pr, rt, P(lists.reshape(-1)), P(numbers), c, first, tiles, most, BOXES=KB, IS_TRANSPOSED=K_LAST, HAS_PAIRS=HP, CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0, **o)
            valid = min(columns, width - first)
            for e in range(E):
                a, z = cu[e, c * S], cu[e, min(B, c * S + S)]
                n = z - a
                want = bf16(exact[e, a:z, first:first + valid])
                got = out.t[e, :n, :valid]
                assert (out.writes[e, :n, :valid] == 1).all(), 'written not once'
                assert out.writes.max() <= 1
                assert (out.writes[e, -(-n // 64) * 64:] == 0).all(), 'empty halves written'
                if n: assert np.abs(got - want).max() / np.abs(want).max() < 1e-2, (e, np.abs(got - want).max())
CUT = {(1, False): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=8, WEIGHT_SLOTS=2), (2, False): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=8, WEIGHT_SLOTS=3),
       (3, True): dict(COLUMNS=256, GROUP=1, VALUE_SLOTS=6, WEIGHT_SLOTS=3), (6, True): dict(COLUMNS=128, GROUP=2, VALUE_SLOTS=5, WEIGHT_SLOTS=3)}
SHAPES = [(3, 4, 50, 512, 512, 5, 2), (5, 3, 130, 512, 256, 2, 1), (2, 2, 100, 320, 320, 1, 2), (1, 2, 64, 512, 512, 3, 2), (4, 5, 70, 640, 256, 7, 2)]
def run(ns, seeds, quiet=False):
    n, t0 = 0, time.time()
    for seed in range(seeds):
        for (KB, HP), o in CUT.items():
            for E, B, k, width, columns, programs, S in SHAPES:
                case(ns, E, B, k, width, columns, KB, HP or bool(n % 2), HP, programs, seed * 1000 + n, S, **o); n += 1
        if not quiet: print(seed, n, f'{time.time() - t0:.0f} s', flush=True)
if __name__ == '__main__':
    run(load(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
