"""Where activations enter and leave the tensor-parallel region: each collective, and the one backward in its place.

All go through torch's functional collectives, which torch.compile traces and CUDA graphs capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_mosa.parallel.copies import exchange_copies, gather_copies

_collectives = torch.ops._c10d_functional


def _all_reduce(tensor: Tensor, group: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.all_reduce(tensor.contiguous(), "sum", group))


def _all_gather(tensor: Tensor, size: int, group: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.all_gather_into_tensor(tensor.contiguous(), size, group))


def _reduce_scatter(tensor: Tensor, size: int, group: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.reduce_scatter_tensor(tensor.contiguous(), "sum", size, group))


def _gather(tensor: Tensor, region: TensorParallelRegion) -> Tensor:
    if region.copies:
        return gather_copies(tensor, region.size, region.group)
    return _all_gather(tensor, region.size, region.group)


def _scatter(tensor: Tensor, region: TensorParallelRegion) -> Tensor:
    if not region.copies:
        return _reduce_scatter(tensor, region.size, region.group)
    received = exchange_copies(tensor, region.size, region.group)
    own = tensor.chunk(region.size)[region.rank]
    return (own.float() + received.float().sum(0)).to(tensor.dtype)  # compiled with what follows


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradients[0], ctx.group), None


class _SumAllGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple([tensor.view_as(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = _all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), ctx.group)
        parts = total.split([gradient.numel() for gradient in gradients])
        return (None, *[part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, region: TensorParallelRegion) -> Tensor:
        ctx.region = region
        return _gather(tensor, region)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scatter(gradients[0], ctx.region), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, region: TensorParallelRegion) -> Tensor:
        ctx.region = region
        return _scatter(tensor, region)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], ctx.region), None


def gather_first_dim(tensor: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Concatenate the tensors of all ranks of ``group`` along their first dimension; no gradient flows."""
    return _all_gather(tensor.detach(), group.size(), group.group_name) if group.size() > 1 else tensor.detach()


def sum_gradients(tensor: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Use a replicated tensor where each rank of ``group`` contributes a part of its gradient.

    This holds for the input of head- or column-partitioned layers, and for replicated parameters applied to a rank's
    slice of the sequence. Megatron-core's ``copy_to_tensor_model_parallel_region`` serves the same purpose, but up to
    0.16 it silently returns a gradient that is not contiguous in memory unsummed.

    Args:
        tensor: any shape, equal on all ranks.
        group: the tensor-parallel group.
    """
    return tensor if group.size() == 1 else _SumGradients.apply(tensor, group.group_name)


@dataclass(frozen=True)
class TensorParallelRegion:
    """The part of a layer in which each rank works on whole sequences with its share of the weights.

    Outside of it hidden states are [T, B, h] on every rank, or under sequence parallelism [T / size, B, h], a slice of
    the sequence on each. With one rank every method returns its argument.
    """

    group: str
    """Name of the tensor-parallel process group."""

    size: int
    """Its ranks."""

    splits_sequence: bool
    """Sequence parallelism."""

    rank: int = 0
    """Of this process in the group."""

    copies: bool = False
    """Under sequence parallelism, collectives are copies between devices; see ``copies``."""

    def enter(self, hidden_states: Tensor) -> Tensor:
        """Hidden states as they are outside to [T, B, h]; backward sums over ranks what each contributes."""
        if self.size == 1:
            return hidden_states
        if self.splits_sequence:
            return _Gather.apply(hidden_states, self)
        return _SumGradients.apply(hidden_states, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum each rank's [T, B, h] over ranks, to hidden states as they are outside."""
        if self.size == 1:
            return partial
        if self.splits_sequence:
            return _Scatter.apply(partial, self)
        return _Sum.apply(partial, self.group)

    def outside(self, parameter: Tensor) -> Tensor:
        """Use a replicated parameter outside: under sequence parallelism its gradient is summed over the slices."""
        return _SumGradients.apply(parameter, self.group) if self.splits_sequence and self.size > 1 else parameter

    def all_outside(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Use replicated parameters of one type outside: one collective sums their gradients, once all are known.

        Not in compiled code: Dynamo does not trace a function of any number of tensors.
        """
        if not self.splits_sequence or self.size == 1:
            return tuple(parameters)
        return _SumAllGradients.apply(self.group, *parameters)
