"""few_tiles2.py OUT: the layer with heads of 64 for several FEWEST_TILES (few_tiles.py has those of 128): matched pairs and first_gpu_run, and halves of them."""
import json, sys, types
import torch
from benchmarks import mosa_layer as m
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels.triton import specialized
rows = []
# width, T, heads, d, k, batch
SHAPES = ((512, 1024, 17, 64, 32, 64), (1024, 1024, 14, 64, 32, 64), (1024, 1024, 12, 64, 32, 64), (1280, 1024, 16, 64, 64, 32), (768, 1024, 32, 64, 64, 16), (768, 1024, 32, 64, 64, 8),
          (2048, 4096, 8, 128, 256, 8), (2048, 4096, 8, 128, 256, 4), (4096, 4096, 8, 128, 256, 2), (4096, 4096, 16, 128, 256, 2))
for width, length, heads, size, k, batch in SHAPES:
    shape = types.SimpleNamespace(width=width, length=length, heads=heads, head_dim=size, selected=k, batch=batch)
    inputs = m.layer_inputs(shape, batch)
    for fewest in (2, 0.95, 0.5, 2, 0.95):
        specialized.FEWEST_TILES = fewest
        found = m.time_layer(lambda *i: mosa_attention(*i, num_selected=k, backend="triton"), inputs, 0.2)
        rows.append(dict(shape=(width, length, heads, size, k, batch), fewest=fewest, **{n: found[n] for n in found}))
        print(width, heads, k, batch, fewest, {n: round(v["milliseconds"], 4) for n, v in found.items() if isinstance(v, dict) and "milliseconds" in v}, flush=True)
    del inputs; m.release()
json.dump({"card": torch.cuda.get_device_name(), "rows": rows}, open(sys.argv[1], "w"), default=str)
