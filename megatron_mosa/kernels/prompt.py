"""The training kernels for prompts of exported models: the output of MoSA heads, and what their cache stores.

Triton is optional, so its kernels are imported where they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.kernels.backend import KernelBackend
from megatron_mosa.kernels.dispatch import get_backend

# Products of a layer that are summed over heads at once. More than in training, which needs memory for more, and whose
# layers have so many tokens that the host's time for launches does not matter.
SMALL_BYTES = 1 << 30


class Prompt(NamedTuple):
    """What MoSA heads compute from a prompt."""

    output: Tensor
    """[B, T, h], the sum over heads."""

    qkv: Tensor
    """[E, B * k, 3h']: rotated queries and keys, and values, of each head's tokens in order, sequence by sequence."""

    cu_seqlens: Tensor
    """int32 [E, B + 1]: cumulative number of each head's tokens over the sequences."""

    def store(self, first: Tensor, table: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy keys and values to the blocks of a cache.

        Args:
            first: int64 [B, E], the first of consecutive blocks for each sequence and head.
            table: int64 [B, E, n], which is to hold the numbers of these blocks.
            keys, values: [blocks, rows per block, h']. Rows of blocks beyond these are not stored.
        """
        from megatron_mosa.kernels.triton.cached import store_rows

        store_rows(self.qkv, self.cu_seqlens, first, table, keys, values)


def prompt_kernels(hidden_states: Tensor, head_dim: int) -> KernelBackend | None:
    """Return the Triton kernels where they are the default for such states, and no gradient is asked for; else None."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return None
    kernels = get_backend("auto", hidden_states, head_dim)
    return kernels if kernels.NAME == "triton" else None


# These launch without the operators of torch, which need as long as several launches.


def router_scores(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """Compute ``naive.router_scores``."""
    from megatron_mosa.kernels.triton.selection import launch_scores

    with torch.cuda.device_of(hidden_states):
        return launch_scores(hidden_states, router_weight)


def count_above(scores: Tensor, thresholds: Tensor, feedback: float, share: float) -> Tensor:
    """Compute ``naive.count_above``, int32 [B, E]."""
    from megatron_mosa.kernels.triton.selection import launch_count_above

    with torch.cuda.device_of(scores):
        return launch_count_above(scores, thresholds, feedback, share)


def select_above(scores: Tensor, thresholds: Tensor, capacity: int, feedback: float, share: float) -> Tensor:
    """Compute ``naive.select_above``."""
    from megatron_mosa.kernels.triton.selection import launch_select_above

    with torch.cuda.device_of(scores):
        return launch_select_above(scores, thresholds, capacity, None, feedback, share)


def select_and_count(
    scores: Tensor, thresholds: Tensor, capacity: int, feedback: float, share: float
) -> tuple[Tensor, Tensor]:
    """Compute ``naive.select_above``, and what ``naive.count_above`` returns, int32 [B, E], in one launch."""
    from megatron_mosa.kernels.triton.selection import launch_select_and_count

    with torch.cuda.device_of(scores):
        return launch_select_and_count(scores, thresholds, capacity, feedback, share)


def lay_out(counts: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give blocks of a cache to counted rows; see ``triton.cached.lay_out``."""
    from megatron_mosa.kernels.triton import cached

    return cached.lay_out(counts, block)


def capacity_for(largest: int) -> int:
    """Round a number of rows up to one of a few sizes, at most a seventh above it: some kernels are compiled for each.

    Returns:
        16 times a number of at most four binary digits and zeros.
    """
    tiles = max(1, -(-largest // 16))
    step = 1 << max(0, tiles.bit_length() - 4)
    return -(-tiles // step) * step * 16


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
        hidden_states, scores, indices, qkv_weight, proj_weight: as in ``naive.selected_attention``.
        router_weight: not used; exported models pass it.
        rotary_percent: share of the head dimension that is rotated, 0 to 1.
        rotary_base: base of the rotary frequencies.
    """
    from megatron_mosa.kernels.triton.ops import launch_prompt

    rotation = rotary_percent, rotary_base
    with torch.cuda.device_of(hidden_states):  # Triton launches on the current device
        output, qkv, rows = launch_prompt(
            hidden_states, scores, indices, qkv_weight, proj_weight, *rotation, small_bytes=SMALL_BYTES
        )
    return Prompt(output, qkv, rows.cu_seqlens)
