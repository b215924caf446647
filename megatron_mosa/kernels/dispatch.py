"""The one place that decides which implementation of the MoSA heads runs."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from megatron_mosa.kernels import naive

BACKENDS = ("naive", "triton")
VARIABLE = "MOSA_BACKEND"  # what "auto" means, from the environment
MOST_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def get_backend(name: str, hidden_states: Tensor, head_dim: int = 64) -> ModuleType:
    """The module that implements ``router_scores``, ``select_tokens``, ``select_above``, ``count_scores`` and
    ``selected_attention``.

    Args:
        name: "naive", "triton", or "auto": what the environment variable MOSA_BACKEND says, else "triton" where it
            runs and "naive" elsewhere.
        hidden_states: what it will be called with.
        head_dim: h' of the heads.

    Raises:
        ValueError: an unknown backend, or one that does not run for these states.
    """
    asked = f"backend={name!r}"
    if name == "auto":
        name, asked = _automatic(hidden_states.device, hidden_states.dtype, head_dim)
    if name not in BACKENDS:
        raise ValueError(f"{asked} is not known; expected 'auto', {', '.join(map(repr, BACKENDS))}")
    if name == "naive":
        return naive
    if (hindrance := _without_triton(hidden_states.device, hidden_states.dtype, head_dim)) is not None:
        raise ValueError(f"{asked} does not run here: {hindrance}; use 'naive'")
    from megatron_mosa.kernels import triton  # only now: triton is optional

    return triton


@torch.compiler.assume_constant_result
def _automatic(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What "auto" means there, and whose words that are."""
    if (name := os.environ.get(VARIABLE)) is not None:
        return name, f"backend=auto with {VARIABLE}={name} in the environment"
    hindrance = "no GPU" if device.type != "cuda" else _without_triton(device, dtype, head_dim)
    name = "triton" if hindrance is None else "naive"
    _say_once(f"MoSA heads run on the {name} backend" + (f": {hindrance}" if hindrance else ""))
    return name, "backend='auto'"


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).info(message)


@torch.compiler.assume_constant_result
def _without_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why Triton's kernels cannot take states of that kind."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in _DTYPES:
        return f"hidden_states is {dtype}, not fp16, bf16 or fp32"
    if head_dim > MOST_HEAD_DIM:
        return f"the head dimension is {head_dim}, above {MOST_HEAD_DIM}"
    if device.type == "cuda":
        is_enough = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if is_enough else "the GPU is older than compute capability 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"hidden_states is on {device}, not on a GPU, and TRITON_INTERPRET=1 is not set"
