"""few_ragged.py OUT: the layer with thresholds as ranks of 1b_mosa and 7b_mosa have it, for several FEWEST_RAGGED_TILES."""
import json, sys, types
import torch
from benchmarks import mosa_layer as m
from megatron_mosa.kernels.triton import specialized
rows = []
# width, T, heads, d, k, batch
for width, length, heads, size, k, batch in ((2048, 4096, 32, 128, 256, 4), (2048, 4096, 16, 128, 256, 4), (2048, 4096, 8, 128, 256, 8), (2048, 4096, 8, 128, 256, 4), (4096, 4096, 16, 128, 256, 2),
                                             (4096, 4096, 8, 128, 256, 2), (512, 1024, 17, 64, 32, 64), (1024, 1024, 12, 64, 32, 64)):
    shape = types.SimpleNamespace(width=width, length=length, heads=heads, head_dim=size, selected=k, batch=batch, sparsity=length / k)
    inputs = m.layer_inputs(shape, batch)
    layer = m.threshold_layer(shape, inputs)
    for fewest in (2, 0.95, 0.5, 2, 0.95):
        specialized.FEWEST_RAGGED_TILES = fewest
        found = m.time_layer(layer, inputs, 0.2)
        rows.append(dict(shape=(width, length, heads, size, k, batch), fewest=fewest, **found))
        print(width, heads, k, batch, fewest, {n: round(v["milliseconds"], 4) for n, v in found.items() if isinstance(v, dict) and "milliseconds" in v}, flush=True)
    del inputs; m.release()
json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(sys.argv[1], "w"), default=str)
