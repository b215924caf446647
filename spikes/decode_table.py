import json, sys
old, new = (json.load(open(p))["rows"] for p in sys.argv[1:3])
def find(rows, **k):
    r = [r for r in rows if all(r.get(n) == v for n, v in k.items())]
    return min(r[0]["ms"]) if r else None
f = lambda x: "   -  " if x is None else f"{x:6.2f}"
print("step ms: what batch context | dense: main now | FLOPs: main now | perplexity: main now | now/dense now: FLOPs, perplexity (speed)")
for kind in ("captured", "unbranched", "eager", "prompt"):
    for batch in (1, 64) if kind != "prompt" else (None,):
        for context in (8192, 32768):
            k = {"kind": kind, "context": context} | ({} if batch is None else {"batch": batch})
            v = [(find(old, model=m, **k), find(new, model=m, **k)) for m in ("dense", "equal FLOPs", "equal perplexity")]
            d = v[0][1] or find(new, model="dense", **(k | {"kind": "captured"}))
            if any(x for p in v for x in p):
                print(f"{kind:10} {batch or '':>3} {context:6} |", " | ".join(f(a) + f(b) for a, b in v), "|", *(f"{d / b:.2f}" if b and d else "-" for _, b in v[1:]), "| main:", *(f"{v[0][0] / a:.2f}" if a and v[0][0] else "-" for a, _ in v[1:]))
for r in new:
    if r.get("kernels") and r["kind"] in ("captured", "unbranched"):
        print(r["kind"], r["model"], r["context"], "launches", r["kernels"]["launches"], "busy us", round(r["kernels"]["busy_us"]), [(n[:22], c, t) for n, c, t in r["kernels"]["each"] if n.startswith("_")])
