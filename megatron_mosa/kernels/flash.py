"""Torch's variable-length flash attention, where it is there: causal, within documents, within a window."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def _varlen_attention() -> Any:
    """Torch's function if it is the one whose causality is a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


_varlen_attn = _varlen_attention()


def has_flash(query: Tensor) -> bool:
    """Whether ``flash_attention`` runs for such queries: on a GPU (Ampere or later), in half precision, torch 2.11."""
    return _has_flash(query.device, query.dtype, query.shape[-1])


@torch.compiler.assume_constant_result
def _has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or _varlen_attn is None:
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int | None = None
) -> Tensor:
    """Attention of each token to those before it between two boundaries, itself included.

    Args:
        query: [B, H, T, h'].
        key, value: [B, G, T, h'], G dividing H.
        boundaries: int32 [N + 1], ascending, from 0 to B * T: places in the batch flattened to [B * T].
        longest: largest distance of two boundaries.
        window: how many tokens it sees at most; None: all.

    Returns:
        [B, H, T, h'].
    """
    batch, heads, length, _ = query.shape
    if key.shape[1] != heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    packed = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [B * T, H, h']
    before = -1 if window is None else window - 1
    attended = _varlen_attn(*packed, boundaries, boundaries, longest, longest, window_size=(before, 0))
    return attended.unflatten(0, (batch, length)).transpose(1, 2)
