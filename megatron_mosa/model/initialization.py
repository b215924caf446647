"""Initial weights, as a function of only the seed, a parameter's name and its global shape.

They do not depend on the tensor-parallel size or rank, the ZeRO stage, the device, or the order of construction.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mosa.attention import PartitionedHeads
from megatron_mosa.parallel import partition_of
from megatron_mosa.utils import usable_processors

Initializer = Callable[..., object]
"""Fills a tensor in place, with numbers of the ``generator`` it is given."""


def mark_partitioned(model: torch.nn.Module) -> None:
    """Tag Megatron's partitioned weights with their partition.

    Before Megatron-core 0.19 only its own initialization does that, which is switched off here.
    """
    gated = {layer.linear_fc1 for layer in model.modules() if isinstance(layer, MLP) and layer.config.gated_linear_unit}
    for module in model.modules():
        dim = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}.get(type(module))
        if dim is not None and module.weight is not None:  # None: tied to the embedding
            tags = {
                "tensor_model_parallel": True,
                "partition_dim": dim,
                "partition_stride": 2 if module in gated else 1,
            }
            for tag, value in tags.items():
                setattr(module.weight, tag, value)


def initial_weights(
    model: GPTModel, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield each matrix of the model with this rank's slice of its initial value, in the order of the model.

    The global weights are drawn in fp32 on the CPU, a few at a time in threads, sliced, and converted and moved as
    asked for. Each tensor has memory of its own, of its size. Parameters of one dimension (norms) keep their values.
    Parameters may be partitioned by ZeRO-3.
    """

    def part(*arguments: Any) -> Tensor:
        return _part(*arguments).to(device or "cpu", dtype)

    threads = _threads()
    drawn: deque[tuple[torch.nn.Parameter, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                # ds_shape: before ZeRO-3 partitioned it
                if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
                    continue
                initialize = _initializer(module, name, model.config)
                drawn.append((parameter, pool.submit(part, parameter, seed, f"{module_name}.{name}", initialize)))
                if len(drawn) > threads:  # so few are in memory
                    parameter, future = drawn.popleft()
                    yield parameter, future.result()
        for parameter, future in drawn:
            yield parameter, future.result()


@torch.no_grad()
def draw_state(model: torch.nn.Module, seed: int) -> None:
    """Set buffers that begin at random, such as centroids, as a function of the seed, their name and global shape."""
    for module_name, module in model.named_modules():
        if not isinstance(module, PartitionedHeads):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name in module.initializers:
                size, rank = module.tp_group.size(), module.tp_group.rank()
                shape = (len(buffer) * size, *buffer.shape[1:])
                whole = draw(seed, f"{module_name}.{name}", shape, module.initializers[name])
                buffer.copy_(whole.chunk(size)[rank])


def _part(parameter: torch.nn.Parameter, seed: int, name: str, initialize: Initializer) -> Tensor:
    """Draw a weight, and return this tensor-parallel rank's slice."""
    shape, partition = list(getattr(parameter, "ds_shape", parameter.shape)), partition_of(parameter)
    if partition is None:
        return draw(seed, name, tuple(shape), initialize)
    size = parallel_state.get_tensor_model_parallel_world_size()
    shape[partition.dim] *= size
    whole = draw(seed, name, tuple(shape), initialize)
    return partition.part_of(whole, parallel_state.get_tensor_model_parallel_rank(), size).clone()


def draw(seed: int, name: str, shape: tuple[int, ...], initialize: Initializer) -> Tensor:
    """Return the fp32 initial value of the parameter with this name and global shape."""
    weight = torch.empty(shape)
    initialize(weight, generator=torch.Generator().manual_seed(_seed_of(seed, name)))
    return weight


def _threads() -> int:
    """Return how many weights a rank draws at once: its share of the cores, at most 8."""
    return max(1, min(8, usable_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _initializer(module: torch.nn.Module, name: str, config: TransformerConfig) -> Initializer:
    if isinstance(module, PartitionedHeads):
        return module.initializers[name]
    method = config.output_layer_init_method if isinstance(module, RowParallelLinear) else config.init_method
    return cast(Initializer, method)
