"""layer_graph.py OUT.json SHAPES: consecutive calls of a layer, launched by the host and as a CUDA graph, alternating three times."""
import json, statistics, sys
import torch
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES
from benchmarks.timing import _milliseconds
from megatron_mosa.attention import mosa_attention
found = []
for n in map(int, sys.argv[2].split(",")):
    shape = SHAPES[n - 1]
    inputs = m.layer_inputs(shape, shape.batch); up = torch.randn_like(inputs[0])
    def both():
        torch.autograd.grad(mosa_attention(*inputs, num_selected=shape.selected, backend="triton"), inputs, up)
    stream = torch.cuda.Stream(); stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): both()
    torch.cuda.current_stream().wait_stream(stream); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): both()
    number = max(10, min(300, int(400 / _milliseconds(both, 1)[0])))
    runs = {"called": [], "graph": []}
    for _ in range(3):
        for name, f in (("called", both), ("graph", graph.replay)):
            f(); torch.cuda.synchronize(); runs[name].append(statistics.median(_milliseconds(f, number)))
    found.append(dict(number=n, **runs))
    print(n, {k: [round(x, 3) for x in v] for k, v in runs.items()}, flush=True)
    json.dump(found, open(sys.argv[1], "w"))
    del graph, inputs, up; m.release()
