"""MoSA under torch.autocast: large matrix products in its type, as everywhere; what is promised in fp32 stays fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _is_on(device: torch.device) -> bool:
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


def autocast_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would hand them to a matrix product: in its type, fp64 excepted; unchanged without it."""
    device = tensors[0].device
    if not _is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Have a function compute in the types of its operands. The device is that of its first argument."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_on(first.device):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped
