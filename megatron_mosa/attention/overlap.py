"""Tensor-parallel collectives beside computation: two halves of a micro-batch, half a layer apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from megatron_mosa.attention.decoder_layer import DecoderLayer, Parameters, norm_parameters
from megatron_mosa.parallel import use_lane

HALVES = 2


def run_overlapped(layers: Sequence[DecoderLayer], hidden_states: Tensor, above: bool) -> Tensor:
    """Run all layers on each half of the sequences, each on a stream of its own.

    Collectives of one process group run one after the other, in the order of their calls. A piece of a layer ends with
    the two that lead to the next piece, so while they run for one half, the other half's piece is what the device
    computes; in backward, too, which goes through the pieces in the opposite order, on the same streams.

    Args:
        layers: all layers of the model.
        hidden_states: [T, B, h], or [T / tensor-parallel size, B, h] under sequence parallelism; B is even.
        above: MoSA heads select by their thresholds, not by expert choice.

    Returns:
        [T, B, h], after the norm that follows the last layer, inside of the tensor-parallel region.
    """
    norms = _norms(layers)
    streams = _streams(hidden_states)
    halves = []
    for stream, half in zip(streams, hidden_states.chunk(HALVES, dim=1), strict=True):
        with _on(stream):
            halves.append((half, layers[0].enter_heads(half, norms[0])))
    for layer, of_mlp, following in zip(layers, norms[1::2], norms[2::2], strict=True):
        for number, stream in enumerate(streams):
            with _on(stream):
                hidden, entered, scores = layer.heads_then_enter_mlp(*halves[number], above, of_mlp)
                halves[number] = hidden, entered
                if number == 0:  # the other half would write to the same place at any time
                    layer.keep(scores)
        for number, stream in enumerate(streams):
            with _on(stream):
                halves[number] = layer.mlp_then_enter_next(*halves[number], following)
    outputs = [states for _, states in halves]
    if streams[0] is not None and streams[1] is not None:
        streams[0].wait_stream(streams[1])
        outputs[1].record_stream(streams[0])
    return torch.cat(outputs, dim=1)


def _norms(layers: Sequence[DecoderLayer]) -> list[Parameters]:
    """Return the parameters of all norms in order, whose gradients are summed over ranks at once, for both halves."""
    found = [norm_parameters(layers[0].layer.input_layernorm)]
    for layer in layers:
        found += [norm_parameters(layer.layer.pre_mlp_layernorm), norm_parameters(layer.following_norm)]
    used, each = layers[0].region.all_outside([*chain.from_iterable(found)]), len(found[0])
    return [used[start : start + each] for start in range(0, len(used), each)]


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _streams(hidden_states: Tensor) -> list[torch.cuda.Stream | None]:
    """Return the current stream and one that waits for what it has computed; None on a CPU."""
    device = hidden_states.device
    if device.type != "cuda":
        return [None] * HALVES
    current = torch.cuda.current_stream(device)
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[arg-type]
        use_lane(_side_streams[device], 1)
    side = _side_streams[device]
    side.wait_stream(current)
    hidden_states.record_stream(side)
    return [current, side]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
