"""Sliding-window attention in blocks: memory grows with T times the window, never with T squared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sliding_window_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Each token attends to the last ``window`` tokens, itself included.

    The sequence is cut into blocks of ``window`` tokens; a block's queries see keys of their own block and of the one
    before, under one mask of window x 2 window that all blocks share.

    Args:
        query, key, value: [B, H, T, h'].
        window: 1 or more.

    Returns:
        [B, H, T, h'].
    """
    length = query.shape[-2]
    if length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    padding = -length % window
    query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
    query = query.unflatten(-2, (-1, window))  # [B, H, blocks, window, h']
    key, value = _with_block_before(key, window), _with_block_before(value, window)  # [B, H, blocks, 2 window, h']
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)[None]  # column - window is the place in the own block
    visible = (column > row) & (column <= row + window)  # [window, 2 window]
    # The first block has none before it: its columns there are zeros and must not be seen.
    first = F.scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0], visible & (column >= window))
    rest = F.scaled_dot_product_attention(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], visible)
    attended = torch.cat((first.unsqueeze(2), rest), dim=2)  # [B, H, blocks, window, h']
    return attended.flatten(2, 3)[:, :, :length]


def _with_block_before(states: Tensor, window: int) -> Tensor:
    blocks = states.unflatten(-2, (-1, window))  # [B, H, blocks, window, h']
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat((before, blocks), dim=-2)
