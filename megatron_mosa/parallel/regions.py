"""An autograd function: identity forward, sum over the tensor-parallel group backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradients(tensor: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Use a replicated tensor where each rank of ``group`` contributes a part of its gradient.

    This holds for the input of head- or column-partitioned layers, and for replicated parameters applied to a rank's
    slice of the sequence. Megatron-core's ``copy_to_tensor_model_parallel_region`` serves the same purpose, but up to
    0.16 it silently returns a gradient that is not contiguous in memory unsummed.

    Args:
        tensor: any shape, equal on all ranks.
        group: the tensor-parallel group.
    """
    return tensor if group.size() == 1 else _SumGradients.apply(tensor, group)
