"""The flat buffers of DeepSpeed's optimizers, whose addresses never change, so that CUDA graphs can use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from megatron_mosa.attention import MosaHeads
from megatron_mosa.kernels import GradientTotals, KernelBackend, naive
from megatron_mosa.parallel import data_parallel_group, partition_of, tensor_parallel_group


@dataclass(frozen=True)
class OwnPart:
    """What this rank steps of one group of parameters: flat tensors of one length."""

    weights: Tensor
    """fp32 master weights, the key of their state in the optimizer."""

    rounded: Tensor
    """The weights in bf16, which the model computes with."""

    gradient: Tensor
    """fp32; holds the sum over ranks and micro-batches after ``reduce``."""

    options: dict[str, Any]
    """The group's options of AdamW."""

    is_counted: bool
    """Whether this rank counts the group in the norm: replicated parameters count on one rank only."""


class Storage(Protocol):
    """Where a step finds weights and leaves gradients. Nothing in it waits for the device."""

    parts: list[OwnPart]

    def start_step(self) -> None:
        """Prepare a step, or an evaluation; never part of a graph."""
        ...

    def start_pass(self, is_first: Tensor) -> None:
        """Prepare a pass over one micro-batch.

        Args:
            is_first: a bool scalar on the device: whether the gradients replace those of the last step.
        """
        ...

    def finish_pass(self) -> None:
        """Let the current stream wait for all that the pass has begun."""
        ...

    def reduce(self) -> None:
        """Sum gradients over the data-parallel ranks, as far as the passes have not."""
        ...

    def publish(self) -> None:
        """Hand the stepped weights to the other ranks, as far as ``start_step`` does not."""
        ...

    def close(self) -> None:
        """Take all hooks off the model."""
        ...


class WholeGradients:
    """ZeRO-1: ranks hold all weights and accumulate whole gradients, which are reduced once a step.

    Args:
        optimizer: DeepSpeed's BF16_Optimizer around torch's AdamW.
        kernels: the backend that accumulates gradients.
        heads: those whose backward pass in compiled layers adds the gradients of their matrices itself, which saves
            writing and reading them in bf16. It must not run more than once in a pass.
    """

    def __init__(self, optimizer: Any, kernels: KernelBackend = naive, heads: Sequence[MosaHeads] = ()) -> None:
        self.optimizer = optimizer
        self.kernels = kernels
        self.group = data_parallel_group()
        self.flat_gradients: list[Tensor] = optimizer.fp32_groups_gradients_flat
        rank = dist.get_rank(self.group)
        self.parts = [
            OwnPart(weights, rounded[rank], gradient, options, is_counted(parameters))
            for weights, rounded, gradient, options, parameters in zip(
                optimizer.fp32_groups_flat_partition,
                optimizer.bf16_partitioned_groups,
                optimizer.fp32_groups_gradient_flat_partition,  # views of ``flat_gradients``
                optimizer.optimizer.param_groups,
                optimizer.bf16_groups,
                strict=True,
            )
        ]
        self._totals: dict[torch.nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                self._totals[parameter] = gradient.view_as(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._move_gradient))
        self._left: dict[torch.nn.Parameter, Tensor] = {}  # whose gradients this backward pass has not reached
        self._along = {of.router_weight: (of.qkv_weight, of.proj_weight) for of in heads}
        self._in_place = [
            (of, self._separate_total(of.qkv_weight), self._separate_total(of.proj_weight)) for of in heads
        ]
        self._is_first: Tensor

    def start_step(self) -> None:
        """Do nothing: weights are there."""

    def start_pass(self, is_first: Tensor) -> None:
        self._left, self._is_first = dict(self._totals), is_first
        for heads, qkv_total, proj_total in self._in_place:
            heads.gradient_totals = GradientTotals(qkv_total, proj_total, is_first)

    def finish_pass(self) -> None:
        for total in self._left.values():
            total.masked_fill_(self._is_first, 0.0)
        self._forget_totals()

    def reduce(self) -> None:
        if self.group.size() == 1:
            return
        for flat, part in zip(self.flat_gradients, self.parts, strict=True):
            if dist.get_backend(self.group) == "nccl":
                dist.reduce_scatter_tensor(part.gradient, flat, group=self.group)
            else:
                dist.all_reduce(flat, group=self.group)

    def publish(self) -> None:
        if self.group.size() > 1:
            self.optimizer.update_lp_params()

    def close(self) -> None:
        self._forget_totals()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _forget_totals(self) -> None:
        for heads, *_ in self._in_place:
            heads.gradient_totals = None

    def _separate_total(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return the total of a parameter with a storage and a version of its own.

        Inductor would copy the whole storage if two inputs of a graph shared it and one were written to; autograd would
        take a change of one total for a change of all.
        """
        return torch.from_dlpack(self._totals[parameter])

    @torch.no_grad()
    def _move_gradient(self, parameter: torch.nn.Parameter) -> None:
        if (gradient := parameter.grad) is None:  # heads have added it
            return
        self.kernels.accumulate(self._left.pop(parameter), gradient, self._is_first)
        for weight in self._along.get(parameter, ()):
            del self._left[weight]
        # Else autograd would add the next gradient to this one: in a graph, to memory that others use by then.
        parameter.grad = None


def is_counted(parameters: list[torch.nn.Parameter]) -> bool:
    """Return whether this rank counts a group of parameters in the norm."""
    is_split = {partition_of(parameter) is not None for parameter in parameters}
    assert len(is_split) == 1, "an optimizer group has parameters of both kinds"
    return is_split.pop() or tensor_parallel_group().rank() == 0
