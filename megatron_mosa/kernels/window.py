"""Sliding-window attention: memory grows with T times the window at most, never with T squared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.kernels.documents import Documents, document_attention
from megatron_mosa.kernels.flash import flash_attention, has_flash


def sliding_window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, documents: Documents | None = None
) -> Tensor:
    """Each token attends to the last ``window`` tokens, itself included, of its document.

    Flash attention with a window where it is there. Elsewhere the sequence is cut into blocks of ``window`` tokens; a
    block's queries see keys of their own block and of the one before, under a mask of window x 2 window: one for all
    blocks, or with documents one for each.

    Args:
        query, key, value: [B, H, T, h'].
        window: 1 or more.
        documents: None: one a sequence.

    Returns:
        [B, H, T, h'].
    """
    length = query.shape[-2]
    if has_flash(query):
        if documents is not None:
            return flash_attention(query, key, value, documents.boundaries, documents.longest, window)
        ends = torch.arange(0, len(query) * length + 1, length, dtype=torch.int32, device=query.device)
        return flash_attention(query, key, value, ends, length, window)
    if length <= window:
        if documents is not None:
            return document_attention(query, key, value, documents)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    padding = -length % window
    query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
    query = query.unflatten(-2, (-1, window))  # [B, H, blocks, window, h']
    key, value = _with_block_before(key, window), _with_block_before(value, window)  # [B, H, blocks, 2 window, h']
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)[None]  # column - window is the place in the own block
    visible = (column > row) & (column <= row + window)  # [window, 2 window]
    if documents is not None:
        # Padding is a document of its own, else its queries would see nothing.
        starts = F.pad(documents.starts, (0, padding), value=length).unflatten(-1, (-1, window))  # [B, blocks, window]
        begins = torch.arange(0, length + padding, window, device=query.device)[:, None]  # of the blocks
        earliest = (starts - begins + window).unsqueeze(-1)  # column where the query's document begins
        visible = (visible & (column >= earliest)).unsqueeze(1)  # [B, 1, blocks, window, 2 window]
        attended = F.scaled_dot_product_attention(query, key, value, visible)
    else:
        # The first block has none before it: its columns there are zeros and must not be seen.
        first, rest = visible & (column >= window), visible
        attended = torch.cat(
            (
                F.scaled_dot_product_attention(query[:, :, :1], key[:, :, :1], value[:, :, :1], first),
                F.scaled_dot_product_attention(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], rest),
            ),
            dim=2,
        )  # [B, H, blocks, window, h']
    return attended.flatten(2, 3)[:, :, :length]


def _with_block_before(states: Tensor, window: int) -> Tensor:
    blocks = states.unflatten(-2, (-1, window))  # [B, H, blocks, window, h']
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat((before, blocks), dim=-2)
