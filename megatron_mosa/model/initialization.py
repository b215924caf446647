"""Initial weights, as a function of only the seed, a parameter's name and its global shape.

They do not depend on the tensor-parallel size or rank, the ZeRO stage, the device, or the order of construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import cast

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

from megatron_mosa.attention.heads import PartitionedHeads
from megatron_mosa.parallel import partition_of

Initialiser = Callable[[Tensor], object]


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


def initial_weights(model: GPTModel, seed: int) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield each matrix of the model with this rank's slice of its initial value, one at a time.

    The global weight is drawn in fp32 on the CPU and sliced. Parameters of one dimension (norms) keep their values.
    Parameters may be partitioned by ZeRO-3.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: before ZeRO-3 partitioned it
            if len(shape) < 2:
                continue
            partition = partition_of(parameter)
            if partition is not None:
                shape[partition.dim] *= size
            weight = draw(seed, f"{module_name}.{name}", tuple(shape), _initialiser(module, name, model.config))
            yield parameter, weight if partition is None else partition.part_of(weight, rank, size)


def draw(seed: int, name: str, shape: tuple[int, ...], initialise: Initialiser) -> Tensor:
    """Return the fp32 initial value of the parameter with this name and global shape."""
    weight = torch.empty(shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(seed, name))  # only the CPU's generator
        initialise(weight)
    return weight


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _initialiser(module: torch.nn.Module, name: str, config: TransformerConfig) -> Initialiser:
    if isinstance(module, PartitionedHeads):
        return module.initialisers[name]
    method = config.output_layer_init_method if isinstance(module, RowParallelLinear) else config.init_method
    return cast(Initialiser, method)
