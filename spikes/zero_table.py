"""zero_table.py OUT: a table of all OUT/zero_*.json."""
import glob, json, os, sys
rows = []
for file in sorted(glob.glob(os.path.join(sys.argv[1], "zero_*.json"))):
    for r in json.load(open(file)): rows.append((os.path.basename(file)[5:-5], r))
if not rows: sys.exit("nothing was measured")
card = rows[0][1]["device"]
one = [r["tokens_per_step"] / r["median"] for n, r in rows if "DP 1" in r["layout"]]
print(f"{card}; of one card: " + (f"{1000*one[0]:,.0f} tokens/s" if one else "not measured, 114,495 tokens/s taken from docs/performance.md (H200)"))
base = 1000 * one[0] if one else 114495
print(f"{'part':<14}{'case':<22}{'ms':>8}{'lowest':>8}{'of 1':>6} {'busy':>6}{'comm':>6}{'expo':>6}{'kern':>6}{'calls':>6}{'alloc':>6}{'resv':>6}  last loss, norm")
for name, r in rows:
    p = r["profile"] or {}; ways = int(r["layout"].split("DP ")[1].split(",")[0]) * int(r["layout"].split("TP ")[1].split()[0])
    share = r["tokens_per_step"] / r["median"] * 1000 / ways / base
    print(f"{name:<14}{r['case'][:21]:<22}{r['median']:8.1f}{min(r['milliseconds']):8.1f}{100*share:5.1f}% {p.get('busy',0):6.0f}{p.get('communicating',0):6.0f}{p.get('exposed',0):6.0f}"
          f"{p.get('kernels',0):6d}{p.get('host_calls',0):6d}{r['allocated_gib']:6.1f}{r['reserved_gib']:6.1f}  {r['losses'][4]:.5f} {r['grad_norms'][4]:.4f}")
for name, r in rows:
    p = r["profile"] or {}
    kinds = {k: round(v) for k, v in p.get("kinds", {}).items()}
    nccl = [(n.split("(")[0].replace("ncclDevKernel_", ""), round(ms, 1), c) for n, ms, c in p.get("longest", []) if "nccl" in n and not n.startswith("nccl:")]
    print(f"{name} {r['case'][:21]}: {kinds} {nccl[:3]}; built {r['seconds_to_build']:.1f} s, first steps {[round(s,1) for s in r['seconds_of_first_steps']]}")
