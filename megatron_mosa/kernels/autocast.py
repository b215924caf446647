"""Autocast for MoSA: matrix products run in autocast's type; what is specified as fp32 stays fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.assume_constant_result
def _supports_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _is_enabled(device: torch.device) -> bool:
    return _supports_autocast(device.type) and torch.is_autocast_enabled(device.type)


def autocast_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors as autocast would cast the operands of a matrix product: to its type, except fp64.

    Without autocast on the device of the first tensor, return them unchanged.
    """
    device = tensors[0].device
    if not _is_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator: disable autocast, on the device of the first argument, while the function runs."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_enabled(first.device):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped
