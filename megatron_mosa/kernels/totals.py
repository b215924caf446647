"""Gradients that a backward pass adds to totals by itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GradientTotals(NamedTuple):
    """Where backward adds the gradients of the matrices of MoSA heads, in place of returning them to autograd."""

    qkv: Tensor
    """fp32, contiguous, [E, h, 3h']."""

    proj: Tensor
    """fp32, contiguous, [E, h', h]."""

    replaces: Tensor
    """A bool scalar on their device: whether gradients replace the totals, whatever these hold."""
