"""The one place that decides which backend runs."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_mosa.kernels import naive
from megatron_mosa.kernels.backend import KernelBackend

BACKENDS = ("naive", "triton")
VARIABLE = "MOSA_BACKEND"  # environment variable that decides what "auto" means
MAX_HEAD_DIM = 256  # of the Triton kernels
_OLDEST_TRITON = (3, 4)  # earlier ones cannot compile all of them: 3.3 has no masked histogram
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def get_backend(name: str, hidden_states: Tensor, head_dim: int = 64) -> KernelBackend:
    """Return a backend that runs on states of this device and type.

    Args:
        name: "naive", "triton", or "auto": the value of the environment variable MOSA_BACKEND, else "triton" on GPUs
            where it runs, and "naive" elsewhere.
        hidden_states: any tensor with the device and type of the activations.
        head_dim: h', the width of a head.

    Raises:
        ValueError: the backend is unknown, or does not run on such states.
    """
    setting = f"backend={name!r}"
    if name == "auto":
        name, setting = _resolve_auto(hidden_states.device, hidden_states.dtype, head_dim)
    if name not in BACKENDS:
        raise ValueError(f"{setting} is not known; expected 'auto', {', '.join(map(repr, BACKENDS))}")
    if name == "naive":
        return naive
    if (obstacle := _triton_obstacle(hidden_states.device, hidden_states.dtype, head_dim)) is not None:
        raise ValueError(f"{setting} does not run here: {obstacle}; use 'naive'")
    from megatron_mosa.kernels import triton  # imported here because triton is optional

    return triton


@torch.compiler.assume_constant_result
def _resolve_auto(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return the backend that "auto" stands for, and the setting that an error message should name."""
    if (name := os.environ.get(VARIABLE)) is not None:
        return name, f"backend=auto with {VARIABLE}={name} in the environment"
    obstacle = "no GPU" if device.type != "cuda" else _triton_obstacle(device, dtype, head_dim)
    name = "triton" if obstacle is None else "naive"
    _log_once(f"MoSA heads run on the {name} backend" + (f": {obstacle}" if obstacle else ""))
    return name, "backend='auto'"


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton  # optional

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).info(message)


@torch.compiler.assume_constant_result
def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return the reason why the Triton kernels do not run on such states, or None if they do."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if (version := _triton_version()) < _OLDEST_TRITON:
        return f"triton is {'.'.join(map(str, version))}, older than {'.'.join(map(str, _OLDEST_TRITON))}"
    if dtype not in _DTYPES:
        return f"hidden_states is {dtype}, not fp16, bf16 or fp32"
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}, above {MAX_HEAD_DIM}"
    if device.type == "cuda":
        is_enough = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if is_enough else "the GPU is older than compute capability 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"hidden_states is on {device}, not on a GPU, and TRITON_INTERPRET=1 is not set"
