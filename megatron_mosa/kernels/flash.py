"""Variable-length flash attention from torch, where it is available: causal, within documents or a window."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def _find_varlen_attn() -> Any:
    """Return torch's function if this torch has it with the parameter ``window_size``, else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


_varlen_attn = _find_varlen_attn()


def has_flash(query: Tensor) -> bool:
    """Return whether ``flash_attention`` runs: half precision, a GPU of Ampere or later, and torch 2.11 or later."""
    return _has_flash(query.device, query.dtype, query.shape[-1])


@torch.compiler.assume_constant_result
def _has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or _varlen_attn is None:
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None = None
) -> Tensor:
    """Causal attention within each of the sequences that are packed into the flattened batch.

    Args:
        query: [B, H, T, h'].
        key, value: [B, G, T, h'], G dividing H.
        cu_seqlens: int32 [N + 1], cumulative lengths of the N packed sequences, from 0 to B * T.
        max_seqlen: length of the longest packed sequence.
        window: maximum number of tokens that a token sees, including itself; None: no limit.

    Returns:
        [B, H, T, h'].
    """
    batch, heads, length, _ = query.shape
    if key.shape[1] != heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    packed = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [B * T, H, h']
    left = -1 if window is None else window - 1
    attended = _varlen_attn(*packed, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0))
    return attended.unflatten(0, (batch, length)).transpose(1, 2)
