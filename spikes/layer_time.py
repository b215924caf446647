"""layer_time.py OUT [dense] [threshold] [check]: time of the layer at six shapes in the tree that PYTHONPATH names."""
import json, sys, time
from dataclasses import asdict
import torch
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from megatron_mosa.attention import mosa_attention
out, *flags = sys.argv[1:]
rows = []
only = [int(f) for f in flags if f.isdigit()]
for n in only or range(1, 1 + len(SHAPES)):
    shape = SHAPES[n - 1]
    t = time.time()
    row = {"number": n}
    if "check" in flags:
        row["check"] = m.check(shape); m.release()
    fused = lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton")
    inputs = m.layer_inputs(shape, shape.batch)
    row["triton"] = m.time_layer(fused, inputs)
    if "threshold" in flags:
        row["threshold"] = m.time_layer(m.threshold_layer(shape, inputs), inputs)
    del inputs; m.release()
    if "dense" in flags:
        row["dense"] = m.time_layer(*m.dense_layer(shape)); m.release()
    rows.append(row)
    b = lambda k: (row[k]["both"]["milliseconds"], row[k]["both"]["called_milliseconds"], row[k]["both"]["extra_gib"], row[k]["both"]["spread"]) if k in row and "both" in row[k] else None
    print(n, "triton", b("triton"), "threshold", b("threshold"), "dense", b("dense"), row.get("check", {}).get("agrees"), f"{time.time()-t:.0f} s", flush=True)
    json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(out, "w"), indent=1)
