"""kern2b_spike.py SHAPES: products of full rows, TMA against cuBLAS; following by small blocks."""
import sys, time, torch, triton
from unittest import mock
sys.path.insert(0, __file__.rsplit("/", 1)[0])
import tma_product as tp
from benchmarks import tune, mosa_layer as m
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import measure
from megatron_mosa.kernels.triton import tiles, scattered, selection
print(torch.cuda.get_device_name(), triton.__version__)
shapes = {i + 1: s for i, s in enumerate(SHAPES)}
shapes[7] = Shape(4, 4096, 2048, 128, 16, 32)
def t(f, seconds=0.15):
    try: return measure(f, seconds=seconds).milliseconds
    except Exception as e: return repr(e)[:100].replace("\n", " ")
S = [dict(ROWS=128,COLUMNS=128,SWEEP=8,STAGES=3,EPILOGUE=False,num_warps=8), dict(ROWS=128,COLUMNS=128,SWEEP=8,STAGES=2,EPILOGUE=False,num_warps=8),
     dict(ROWS=128,COLUMNS=64,SWEEP=16,STAGES=3,EPILOGUE=False,num_warps=4), dict(ROWS=128,COLUMNS=64,SWEEP=16,STAGES=2,EPILOGUE=False,num_warps=8), dict(ROWS=256,COLUMNS=64,SWEEP=16,STAGES=2,EPILOGUE=False,num_warps=8)]
G = [dict(ROWS=128,COLUMNS=128,INNER=64,STAGES=4,SPLIT=False,FLATTEN=False,num_warps=8),
 dict(ROWS=128,COLUMNS=128,INNER=64,STAGES=2,SPLIT=False,FLATTEN=False,num_warps=4),
 dict(ROWS=128,COLUMNS=128,INNER=64,STAGES=2,SPLIT=False,FLATTEN=False,num_warps=8),
 dict(ROWS=128,COLUMNS=256,INNER=64,STAGES=3,SPLIT=False,FLATTEN=False,num_warps=8),
 dict(ROWS=128,COLUMNS=256,INNER=64,STAGES=3,SPLIT=True,FLATTEN=True,num_warps=8,programs=132),
 dict(ROWS=256,COLUMNS=128,INNER=64,STAGES=3,SPLIT=True,FLATTEN=True,num_warps=8,programs=132),
 dict(ROWS=128,COLUMNS=128,INNER=64,STAGES=4,SPLIT=False,FLATTEN=True,num_warps=8,programs=132)]
def call(family, c, values, weight, parts, D, p, each, cols, products):
    if family == "sweep": return tp.product(values, weight, parts == 3, parts, D, p, 0, each, 0, cols, products, c)
    return tp.gemm(values, weight, parts == 3, p, 0, each, 0, cols, products, c)
if sys.argv[1] == "compile":
    import subprocess
    if len(sys.argv) == 3:
        ds = [int(d) for d in sys.argv[2].split(",")]
        jobs = [subprocess.Popen([sys.executable, __file__, "compile", str(d), str(i)]) for d in ds for i in range(8)]
        [j.wait() for j in jobs]; sys.exit()
    D, i = int(sys.argv[2]), int(sys.argv[3])
    work = [(f, c, parts) for parts in (3, 1) for f, cs in (("sweep", S), ("gemm", G)) for c in cs][i::8]
    for f, c, parts in work:
        values, products = torch.zeros(3, 1024, parts * D, device="cuda").bfloat16(), torch.zeros(3, 512, 1024, device="cuda").bfloat16()
        weight = torch.zeros(*((3, 1024, 3 * D) if parts == 3 else (3, D, 1024)), device="cuda").bfloat16()
        try: call(f, c, values, weight, parts, D, (torch.zeros(3, 1024, 16, device="cuda").bfloat16(), torch.zeros(3, 1024, device="cuda").bfloat16()) if parts == 3 else None, 512, 1024, products)
        except Exception as e: pass
    sys.exit()
for n in map(int, sys.argv[1].split(",")):
    s = shapes[n]; begin = time.time(); E, k, h, D = s.heads, s.selected, s.width, s.head_dim
    seqs, cols = scattered.chunks_of(s.batch, E * k * h * 2, h)
    each = seqs * k; chunks = -(-s.batch // seqs) * -(-h // cols)
    print("== shape", n, s, "chunk", seqs, "sequences", cols, "columns", chunks, "chunks")
    g = torch.Generator("cuda").manual_seed(0)
    r = lambda *size: torch.randn(*size, device="cuda", generator=g).bfloat16()
    pairs = (r(E, s.batch * k, 16) , r(E, h)); pairs[0][..., 2:] = 0
    for parts in (3, 1):
        values, products = r(E, s.batch * k, parts * D), torch.empty(E, each, cols, dtype=torch.bfloat16, device="cuda")
        weight = r(E, h, 3 * D) if parts == 3 else r(E, D, h)
        wt = (weight.mT if parts == 3 else weight)[:, :, :cols]
        gb = (values.numel() // s.batch * seqs + products.numel()) * 2 / 1e9
        report = lambda name, x: print(f"  parts {parts} {name}:", x if isinstance(x, str) else f"{x*chunks:.3f} ms all, {2*E*each*parts*D*cols/x/1e9:.0f} TFLOP/s {products.numel()*2/x/1e9:.2f} TB/s written", flush=True)
        bmm = lambda: torch.bmm(values[:, :each], wt, out=products)
        report("bmm", t(bmm)); ref = products.clone()
        p = pairs if parts == 3 else None
        if p: ref = ref.float() + (p[0][:, :each, 0].float() + p[0][:, :each, 1].float())[..., None] * p[1][:, None, :cols].float() if ref.numel() < 4e8 else None
        for family, cfgs in (("sweep", S), ("gemm", G)):
            for c in cfgs:
                f = lambda: call(family, c, values, weight, parts, D, p, each, cols, products)
                x = t(f)
                err = "" if isinstance(x, str) or ref is None else f" err {((products.float() - ref.float()).norm() / ref.float().norm()).item():.1e}"
                report(family + " " + "-".join(str(v) for v in c.values()) + err, x)
        del values, products, weight, wt, ref
    st = tune.stages(s)
    print("  followed:", t(st["followed"]), end=" ")
    for block, warps in ((32, 1), (64, 1), (128, 1), (128, 2)):
        with mock.patch.object(tiles, "follow", lambda: dict(BLOCK=block, num_warps=warps)):
            print((block, warps), t(st["followed"]), end=" ")
    print(f"{time.time()-begin:.0f} s", flush=True)
    del st; m.release()
