"""few_tiles.py OUT: the layer of 1b_mosa as one card and a tensor-parallel rank have it, for several FEWEST_TILES of Gluon's kernels."""
import json, sys, types
import torch
from benchmarks import mosa_layer as m
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels.triton import specialized
rows = []
for heads, batch in ((32, 4), (16, 4), (16, 8), (8, 8), (8, 16)):
    shape = types.SimpleNamespace(width=2048, length=4096, heads=heads, head_dim=128, selected=256, batch=batch)
    inputs = m.layer_inputs(shape, batch)
    for fewest in (2, 1.9, 0.95):
        specialized.FEWEST_TILES = fewest
        found = m.time_layer(lambda *i: mosa_attention(*i, num_selected=256, backend="triton"), inputs, 0.25)
        rows.append(dict(heads=heads, batch=batch, fewest=fewest, **{k: found[k] for k in found}))
        print(heads, batch, fewest, {k: round(v["milliseconds"], 3) for k, v in found.items() if isinstance(v, dict) and "milliseconds" in v}, flush=True)
    del inputs; m.release()
json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(sys.argv[1], "w"), default=str)
