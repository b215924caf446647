"""layer_variants.py OUT.json SHAPES: forward and backward of a layer, by expert choice and by thresholds, with several ways to cut chunks, twice in turn."""
import json, sys
from megatron_mosa.kernels.triton import scattered
from megatron_mosa.kernels.triton.common import cdiv
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from benchmarks.timing import measure
from megatron_mosa.attention import mosa_attention
import torch
whole = scattered.chunks_of
def even(shape, like, small_bytes=None):
    sequences, columns = whole(shape, like, small_bytes)
    return cdiv(shape[0], cdiv(shape[0], sequences)), columns
VARIANTS = {  # largest MiB, fewest columns, even
    "main": (1536, 1024, False), "large": (1792, 1024, True), "512": (1536, 512, True), "512 uneven": (1536, 512, False), "256": (1536, 256, True),
}
found = []
for n in map(int, sys.argv[2].split(",")):
    shape = SHAPES[n - 1]
    inputs = m.layer_inputs(shape, shape.batch); up = torch.randn_like(inputs[0])
    layers = {"expert": lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton"), "threshold": m.threshold_layer(shape, inputs)}
    for turn in range(2):
        for name, (most, fewest, is_even) in VARIANTS.items():
            scattered.MOST_BYTES, scattered.FEWEST_COLUMNS, scattered.chunks_of = most << 20, fewest, even if is_even else whole
            row = dict(number=n, turn=turn, variant=name)
            for kind, layer in layers.items():
                capacity = shape.selected if kind == "expert" else -(-5 * shape.selected // 4)
                row[kind + " chunk"] = scattered.chunks_of((shape.batch, shape.heads, capacity), inputs[0])
                r = measure(lambda: torch.autograd.grad(layer(*inputs), inputs, up), seconds=0.4)
                row[kind], row[kind + " gib"] = round(r.milliseconds, 3), round(r.extra_gib, 2)
            found.append(row); print(*row.values(), flush=True)
            json.dump(found, open(sys.argv[1], "w"), indent=1)
    del inputs, up, layers; m.release()
