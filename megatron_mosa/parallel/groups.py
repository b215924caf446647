"""Megatron-core's process groups and the partition of its parameters, with their types."""

from __future__ import annotations

from typing import cast

from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup


def tensor_parallel_group() -> ProcessGroup:
    """The ranks that hold the parts of one replica."""
    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def data_parallel_group() -> ProcessGroup:
    """The ranks that hold the same part of different replicas."""
    return cast(ProcessGroup, parallel_state.get_data_parallel_group())


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension along which a parameter is split over the tensor-parallel group; None: it is replicated."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None
