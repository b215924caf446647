"""warm.py SHAPES [dense]: compiles what layer_time.py runs, once each, and measures nothing."""
import sys
import torch
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from megatron_mosa.attention import mosa_attention
for n in map(int, sys.argv[1].split(",")):
    shape = SHAPES[n - 1]
    inputs = m.layer_inputs(shape, shape.batch)
    layers = [(lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton"), inputs)]
    if "threshold" in sys.argv:
        layers.append((m.threshold_layer(shape, inputs), inputs))
    if "dense" in sys.argv:
        layers.append(m.dense_layer(shape))
    for layer, tensors in layers:
        with torch.no_grad():
            layer(*tensors)
        out = layer(*tensors)
        torch.autograd.grad(out, tensors, torch.randn_like(tensors[0]))
    torch.cuda.synchronize()
    del inputs, layers, tensors, out
    m.release()
