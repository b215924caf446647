"""Runs the Gluon source of the kernel in Python: roles as threads that take turns at random, copies, products and stores
that happen at any time that the hardware may choose, barriers with their phases. sim.py FILE [seeds]"""
import random, sys, threading, itertools, time
import numpy as np
rng = random.Random(0)
class Deadlock(Exception): pass
class Stop(BaseException): pass
class World:
    def __init__(s, program, programs):
        s.program, s.programs = program, programs
        s.jobs = []          # pending async copies (callables)
        s.roles = []; s.current = None
        s.lazy = rng.random(); s.switch = rng.choice([0.05,0.3,0.8]); s.fast = rng.choice([0.02,0.2,0.7])
W = None
class Role:
    def __init__(s, f, args, world):
        s.f, s.args, s.world = f, args, world
        s.go, s.back = threading.Semaphore(0), threading.Semaphore(0)
        s.done, s.cond, s.error = False, None, None
        s.groups, s.stores, s.stop = [], [], False     # wgmma in flight; committed stores that still read
        s.where = ''
        s.thread = threading.Thread(target=s.run, daemon=True); s.thread.start()
    def run(s):
        s.go.acquire()
        try:
            if not s.stop: s.f(*s.args)
            if not s.stop: assert not s.stores and not s.groups, 'in flight at the end'
        except Stop: pass
        except BaseException as e: s.error = e
        s.done = True; s.back.release()
def pause(cond=None):
    r = W.current
    if cond is None and rng.random() > W.switch: return
    r.cond = cond
    r.back.release(); r.go.acquire()
    if r.stop: raise Stop
    r.cond = None
def simulate(roles):
    W.roles = [Role(f, a, W) for f, a in roles]
    while True:
        live = [r for r in W.roles if not r.done]
        if not live: break
        ready = [r for r in live if r.cond is None or r.cond()]
        # things that happen by themselves
        doers = []
        for r in live:
            if r.groups: doers.append(r.groups)
            if r.stores: doers.append(r.stores)
        pool = len(W.jobs) and 1
        if (pool or doers) and (not ready or rng.random() < W.fast):
            if pool and (not doers or rng.random() < 0.5):
                W.jobs.pop(rng.randrange(len(W.jobs)))()
            else:
                d = rng.choice(doers); d.pop(0)()
            continue
        if not ready:
            state = [(r.f.__name__, r.where) for r in live]
            for r in live: r.stop = True; r.go.release()
            raise Deadlock(state)
        r = rng.choice(ready); W.current = r
        r.go.release(); r.back.acquire()
        if r.error:
            for q in W.roles:
                if not q.done: q.stop = True; q.go.release()
            raise r.error
    assert not W.jobs, 'copies in flight at the end'
class Shared:
    def __init__(s, a): s.a = a
    def index(s, i):
        assert isinstance(i, int) and 0 <= i < len(s.a), (i, s.a.shape)
        return Shared(s.a[i]) if s.a.ndim and not isinstance(s.a[i], Bar) else s.a[i]
    def reshape(s, shape): v = s.a.view(); v.shape = tuple(shape); return Shared(v)
    def permute(s, o): return Shared(s.a.transpose(o))
    def store(s, t): pause(); s.a[...] = t.get(); pause()
class Bar:
    def __init__(s): s.phase = None
class Bars:
    def __init__(s, n): s.b = [Bar() for _ in range(n)]
    def index(s, i):
        assert 0 <= i < len(s.b); return s.b[i]
def check(b):
    assert b.pending >= 0
    if b.pending == 0 and b.tx == 0: b.phase += 1; b.pending = b.count
class mbarrier:
    class MBarrierLayout: pass
    @staticmethod
    def init(b, count): b.count = b.pending = count; b.tx = 0; b.phase = 0
    @staticmethod
    def wait(b, parity):
        assert parity in (0, 1), parity
        W.current.where = f'wait {b.name} parity {parity}'
        pause(lambda: (b.phase & 1) != parity); 
    @staticmethod
    def expect(b, n): pause(); assert b.pending > 0, (b.name, b.phase, b.tx, b.pending, W.current.f.__name__); b.pending -= 1; b.tx += n; check(b)
    @staticmethod
    def arrive(b): pause(); b.pending -= 1; check(b)
class T:
    def __init__(s, v): s.v = v
    def get(s):
        assert not callable(s.v) and s.v is not None, 'sums read before they were waited for'
        return s.v
    def to(s, d): return T(bf16(s.get()))
    @property
    def shape(s): return s.get().shape
def bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000).astype(np.uint32).view(np.float32).reshape(x.shape)
class Acc:  # sums in flight
    def __init__(s): s.v = None
def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async and a.a.shape[1] == b.a.shape[0]
    new = Acc(); old = acc
    def do():
        base = (old.v if isinstance(old, Acc) else old.get()) if use_acc else 0
        new.v = base + a.a @ b.a
        BUSY['mma'] = 1
    W.current.groups.append(do); pause(); return new
BUSY = {}
def warpgroup_mma_wait(n, deps):
    r = W.current; pause()
    while len(r.groups) > n: r.groups.pop(0)()
    (d,) = deps
    if r.groups: return d
    return T(d.v)
class tma:
    @staticmethod
    def async_copy_global_to_shared(desc, c, bar, dst):
        pause(); dst.a[...] = np.nan
        block = dst.a.shape
        box = np.zeros(block, np.float32)
        assert tuple(desc.block) == block, (desc.block, block)
        sl = [slice(x, min(x + n, m)) for x, n, m in zip(c, block, desc.t.shape)]
        part = desc.t[tuple(sl)]
        box[tuple(slice(0, n) for n in part.shape)] = part
        desc.loads += 1
        def do():
            dst.a[...] = box; bar.tx -= box.size * 2; check(bar)
        W.jobs.append(do)
    @staticmethod
    def async_copy_shared_to_global(desc, c, src):
        pause()
        block = src.a.shape; assert tuple(desc.block) == block
        sl = tuple(slice(x, max(x, min(x + n, m))) for x, n, m in zip(c, block, desc.t.shape))
        def do():
            n = tuple(s.stop - s.start for s in sl)
            desc.t[sl] = src.a[tuple(slice(0, k) for k in n)]; desc.writes[sl] += 1
        W.current.stores.append(do); pause()
    @staticmethod
    def store_wait(n):
        r = W.current; pause()
        while len(r.stores) > n: r.stores.pop(0)()
class Desc:
    def __init__(s, t, block): s.t, s.block, s.dtype, s.layout, s.loads = t, block, 'bf16', None, 0; s.writes = np.zeros(t.shape, int)
NAMES = itertools.count()
class gl:
    float32, int64 = 'f32', 'i64'
    constexpr = staticmethod(lambda x: x)
    static_range = staticmethod(range)
    program_id = staticmethod(lambda a: W.program)
    num_programs = staticmethod(lambda a: W.programs)
    SliceLayout = staticmethod(lambda *a: None)
    DistributedLinearLayout = staticmethod(lambda *a: None)
    convert_layout = staticmethod(lambda b, l, assert_trivial: b)
    arange = staticmethod(lambda a, b, l: np.arange(a, b))
    @staticmethod
    def store(p, b, cache_modifier):
        pause(); v = b.get(); assert p.o.shape == v.shape
        flat = p.out.t.reshape(-1); flat[p.o] = v; p.out.writes.reshape(-1)[p.o] += 1
    NVMMADistributedLayout = staticmethod(lambda *a: None)
    zeros = staticmethod(lambda s, d, l: T(np.full(s, np.nan)))  # never used by the first product
    reshape = staticmethod(lambda b, s: T(b.get().reshape(s)))
    permute = staticmethod(lambda b, o: T(b.get().transpose(o)))
    split = staticmethod(lambda b: (T(b.get()[..., 0]), T(b.get()[..., 1])))
    @staticmethod
    def allocate_shared_memory(t, shape, layout):
        if t == 'i64':
            b = Bars(shape[0]); k = next(NAMES) % 5
            for i, x in enumerate(b.b): x.name = f"{('full_values','empty_values','full_weight','empty_weight','turn')[k]}[{i}]"
            return b
        return Shared(np.full(shape, np.nan, np.float32))
    @staticmethod
    def warp_specialize(roles, warps, regs): simulate(roles)
class Ptr:
    def __init__(s, out, o): s.out, s.o = out, o
    def __add__(s, x): return Ptr(s.out, s.o + x)
MUTATE = []
class gluon:
    @staticmethod
    def jit(f=None, **k): return f if f else (lambda f: f)
def load(path):
    s = open(path).read()
    s = s[s.index('BOX_SIZE = 64'):]
    if '# ---- end of the kernel' in s: s = s[:s.index('# ---- end of the kernel')]
    ns = dict(gluon=gluon, gl=gl, mbarrier=mbarrier, tma=tma, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait, fence_async_shared=lambda: None)
    s = s.replace('i_head.to(gl.int64)', 'i_head').replace('b.to(p_products.dtype.element_ty)', 'b.to(0)')
    for a, b in MUTATE: assert s.count(a), a; s = s.replace(a, b)
    exec(compile('from __future__ import annotations\n' + s, path, 'exec'), ns)
    return ns
def case(ns, E, rows, columns, KB, K_LAST, programs, seed, **o):
    global W
    rng.seed(seed); g = np.random.default_rng(seed)
    K = KB * 64
    v = bf16(g.standard_normal((E, rows, K)).astype(np.float32)); w = bf16(g.standard_normal((E, K, columns)).astype(np.float32))
    N, P = o['N'], o['PIECE']
    dv = Desc(v, [1, 64, 64]); dw = Desc(w.transpose(0, 2, 1).copy() if K_LAST else w, [1, N, 64] if K_LAST else [1, 64, N])
    runs = columns // 32
    if o['DIRECT']:
        m = w.transpose(0, 2, 1).copy().reshape(E * runs, 32, K)
        dw = Desc(np.lib.stride_tricks.as_strided(m, (E * runs, 4, 4, 2, K), tuple(4 * x for x in (32 * K, 2 * K, 8 * K, K, 1))), [N // 32, 4, 4, 2, 64])
    HP=o.get('HAS_PAIRS',False); pr=rt=None; exact=v@w
    if HP:
        P16=np.zeros((E,rows,16),np.float32); P16[...,:2]=bf16(g.standard_normal((E,rows,2)).astype(np.float32))*8
        R16=np.zeros((E,columns,16),np.float32); R16[...,:2]=bf16(g.standard_normal((E,columns,1)).astype(np.float32))
        exact=exact+P16@R16.transpose(0,2,1)
        pr=Desc(P16,[1,64,16]); rt=Desc(R16,[1,N,16])
        if o['DIRECT']: rt=Desc(np.lib.stride_tricks.as_strided(R16.reshape(E*(columns//32),32,16),(E*(columns//32),4,4,2,16),tuple(4*x for x in (32*16,32,128,16,1))),[N//32,4,4,2,16])
    out = Desc(np.full((E, rows, columns), np.nan, np.float32), [1, 64, P])
    pairs, tiles = -(-rows // 128), -(-columns // N); total = E * pairs * tiles
    programs = min(programs, total)
    for p in range(programs):
        W = World(p, programs)
        ns['_products_kernel'](dv, dw, out, pr, rt, Ptr(out, 0), None, E, pairs, tiles, total, runs, rows, rows * columns, columns, CACHE='', KB=KB, K_LAST=K_LAST, TRACED=False, CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0, **o)
    assert (out.writes == 1).all(), 'written not once'
    e = np.abs(out.t - bf16(exact)).max() / np.abs(out.t).max()
    assert e < 1e-2, e
    assert dv.loads == total * 2 * KB
    if HP: assert pr.loads == 2 * total and rt.loads * KB == dw.loads, (pr.loads, rt.loads)
    return dict(total=total, programs=programs, loads=dw.loads, error=float(e))
if __name__ == '__main__':
    ns = load(sys.argv[1]); seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    options = [
        dict(KB=3, N=256, PIECE=128, VALUE_SLOTS=8, WEIGHT_SLOTS=3, STORES=2, GROUP=1),
        dict(KB=3, N=256, PIECE=64, VALUE_SLOTS=8, WEIGHT_SLOTS=4, STORES=2, GROUP=1),
        dict(KB=3, N=256, PIECE=64, VALUE_SLOTS=3, WEIGHT_SLOTS=1, STORES=3, GROUP=3),
        dict(KB=1, N=256, PIECE=128, VALUE_SLOTS=8, WEIGHT_SLOTS=2, STORES=2, GROUP=1),
        dict(KB=1, N=256, PIECE=128, VALUE_SLOTS=4, WEIGHT_SLOTS=2, STORES=4, GROUP=1),
        dict(KB=1, N=256, PIECE=256, VALUE_SLOTS=8, WEIGHT_SLOTS=2, STORES=1, GROUP=1),
        dict(KB=2, N=256, PIECE=128, VALUE_SLOTS=8, WEIGHT_SLOTS=3, STORES=2, GROUP=1),
        dict(KB=6, N=128, PIECE=64, VALUE_SLOTS=4, WEIGHT_SLOTS=4, STORES=2, GROUP=2),
        dict(KB=6, N=256, PIECE=64, VALUE_SLOTS=4, WEIGHT_SLOTS=6, STORES=0, GROUP=1, DIRECT=True),
        dict(KB=1, N=256, PIECE=64, VALUE_SLOTS=12, WEIGHT_SLOTS=4, STORES=0, GROUP=1, DIRECT=True),
        dict(KB=3, N=256, PIECE=64, VALUE_SLOTS=12, WEIGHT_SLOTS=4, STORES=0, GROUP=1, DIRECT=True),
        dict(KB=3, N=256, PIECE=64, VALUE_SLOTS=4, WEIGHT_SLOTS=6, STORES=0, GROUP=1, DIRECT=True),
        dict(KB=6, N=128, PIECE=64, VALUE_SLOTS=6, WEIGHT_SLOTS=3, STORES=2, GROUP=2),
        dict(KB=6, N=128, PIECE=128, VALUE_SLOTS=12, WEIGHT_SLOTS=6, STORES=1, GROUP=1),
    ]
    options = [dict(HAS_PAIRS=True) | q for q in options] + [dict(HAS_PAIRS=False) | q for q in options[::3]] + [
        dict(KB=3, N=256, PIECE=128, VALUE_SLOTS=6, WEIGHT_SLOTS=3, STORES=2, GROUP=1, HAS_PAIRS=True),
        dict(KB=6, N=128, PIECE=64, VALUE_SLOTS=6, WEIGHT_SLOTS=8, STORES=2, GROUP=1, HAS_PAIRS=True),
        dict(KB=3, N=256, PIECE=64, VALUE_SLOTS=9, WEIGHT_SLOTS=4, STORES=0, GROUP=1, DIRECT=True, HAS_PAIRS=True),
        dict(KB=6, N=256, PIECE=64, VALUE_SLOTS=3, WEIGHT_SLOTS=6, STORES=0, GROUP=1, DIRECT=True, HAS_PAIRS=True),
    ]
    if len(sys.argv) > 3: options = options[-4:]
    t0 = time.time(); n = 0
    for seed in range(seeds):
        for o in options:
            for E, rows, columns, programs in ((3, 128, 512, 3), (2, 512, 256, 5), (5, 64, 512, 2), (1, 384, 1024, 7), (3, 192, 320, 1)):
                d = o.get('DIRECT', False)
                if d and columns % o['N']: columns = 512
                x = case(ns, E, rows, columns, K_LAST=bool(rng.getrandbits(1)) or d, programs=programs, seed=seed * 1000 + n, HEADS_INNER=bool(n % 3), ORDERED=bool(n % 4) or o['VALUE_SLOTS'] * o['GROUP'] % (2 * o['KB']) > 0, **({'DIRECT': False} | o)); n += 1
        print(seed, n, x, f'{time.time()-t0:.0f} s', flush=True)
