"""A linear layer of states that other heads use, too: one product computes its part of their gradient, and adds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


# Dynamo would trace the backward pass itself, and refuse to change its argument in place where the states are a view.
@torch.compiler.allow_in_graph
def shared_linear(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a linear layer without bias, and return the states for all other uses.

    Autograd would sum the gradients of the uses in a pass of its own over [T, B, h]. torch.compile fuses it with what
    follows, but not with a collective, which follows in a tensor-parallel region.

    Args:
        states: [..., h].
        weight: [n, h].

    Returns:
        [..., n], and the states.
    """
    return _SharedLinear.apply(states, weight)


@torch.library.custom_op("megatron_mosa::add_product", mutates_args=("total",))
def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add [..., n] times [n, h] to ``total`` [..., h], contiguous, in place, which cuBLAS does without a copy."""
    total.view(-1, total.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right)


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, weight)
        return F.linear(states, weight), states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dproduct, total), (states, weight) = gradients, ctx.saved_tensors
        total = total.contiguous()
        add_product(total, dproduct, weight)
        return total, dproduct.flatten(0, -2).mT @ states.flatten(0, -2)
