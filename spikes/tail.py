"""TAIL (and UNROLL) of the sum over heads: time of the layer, expert choice, forward + backward, one GPU."""
from unittest import mock
import torch
from benchmarks import mosa_layer as m
from benchmarks.shapes import SHAPES, Shape
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels.triton import tiles
ALL = {i + 1: s for i, s in enumerate(SHAPES)} | {7: Shape(4, 4096, 2048, 128, 16, 32)}
original = tiles.combine
for n in (7, 1, 2, 3, 4):
    shape = ALL[n]; inputs = m.layer_inputs(shape, shape.batch)
    layer = lambda *i: mosa_attention(*i, num_selected=shape.selected, backend="triton")
    found = {}
    for change in ({}, dict(TAIL=2), dict(TAIL=1), dict(TAIL=8), dict(UNROLL=4, TAIL=2), dict(UNROLL=8, TAIL=2), dict(UNROLL=16, TAIL=2), {}):
        with mock.patch.object(tiles, "combine", lambda *a: original(*a) | change):
            r = m.time_layer(layer, inputs, 0.25)
        found[str(change) + ("again" if str(change) in found else "")] = round(r["both"]["milliseconds"], 3), round(r["forward"]["milliseconds"], 3)
    if n in (1, 2):
        threshold = m.threshold_layer(shape, inputs)
        for change in ({}, dict(UNROLL=8), dict(UNROLL=8, TAIL=2), {}):
            with mock.patch.object(tiles, "combine", lambda *a: original(*a) | change):
                found["threshold " + str(change) + ("again" if "threshold " + str(change) in found else "")] = round(m.time_layer(threshold, inputs, 0.25)["both"]["milliseconds"], 3)
    print(n, original(shape.width if hasattr(shape, "width") else 2048, 2, True), found, flush=True)
    del inputs; m.release()
