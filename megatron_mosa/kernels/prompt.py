"""The training kernels for prompts of exported models: the output of MoSA heads, and what their cache stores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.kernels.backend import KernelBackend
from megatron_mosa.kernels.dispatch import get_backend


class Prompt(NamedTuple):
    """What MoSA heads compute from a prompt."""

    output: Tensor
    """[B, T, h], the sum over heads."""

    keys: Tensor
    """[B, E, k, h'], rotated, in position order."""

    values: Tensor
    """[B, E, k, h']."""

    valid: Tensor
    """bool [B, E, k], False in empty slots, which come last."""


def prompt_kernels(hidden_states: Tensor, head_dim: int) -> KernelBackend | None:
    """Return the Triton kernels where they are the default for such states, and no gradient is asked for; else None."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return None
    kernels = get_backend("auto", hidden_states, head_dim)
    return kernels if kernels.NAME == "triton" else None


def read_prompt(
    hidden_states: Tensor,
    router_weight: Tensor,
    scores: Tensor,
    indices: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    rotary_percent: float,
    rotary_base: float,
) -> Prompt:
    """Compute the heads' output at positions 0 to T - 1 with the Triton kernels, and keep keys and values.

    Args:
        hidden_states, router_weight, scores, indices, qkv_weight, proj_weight: as in ``naive.selected_attention``.
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
    """
    from megatron_mosa.kernels.triton.ops import fused_attention  # imported here because triton is optional
    from megatron_mosa.kernels.triton.rows import Rows

    options = rotary_percent, rotary_base, None, False, True
    output, qkv, _, _, _, *rows = fused_attention(
        hidden_states, router_weight, scores, indices, qkv_weight, proj_weight, *options
    )
    ends = Rows(*rows).cu_seqlens.t()  # [B + 1, E]
    slots = torch.arange(indices.shape[2], device=indices.device)
    valid = slots < (ends[1:] - ends[:-1])[..., None]  # [B, E, k]
    places = (ends[:-1, :, None] + slots).masked_fill(~valid, 0)
    heads = torch.arange(len(qkv), device=qkv.device)[:, None]
    _, keys, values = qkv[heads, places].chunk(3, dim=-1)
    return Prompt(output, keys, values, valid)
