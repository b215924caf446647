"""Sliding-window attention, with memory proportional to T times the window, never to T squared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.kernels.documents import AnyDocuments, document_attention
from megatron_mosa.kernels.flash import flash_attention, has_flash


def sliding_window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, documents: AnyDocuments | None = None
) -> Tensor:
    """Causal attention of each token to the last ``window`` tokens of its document, including itself.

    Uses flash attention with a window where ``has_flash``. Elsewhere the sequence is split into blocks of ``window``
    tokens, and the queries of a block see the keys of their own and the previous block under a mask [window, 2 window]:
    one mask for all blocks, or one per block with documents.

    Args:
        query, key, value: [B, H, T, h'].
        window: 1 or more.
        documents: the documents of the batch; None: each sequence is one document.

    Returns:
        [B, H, T, h'].
    """
    length = query.shape[-2]
    if has_flash(query):
        if documents is not None:
            return flash_attention(query, key, value, documents.cu_seqlens, documents.max_seqlen, window)
        cu_seqlens = torch.arange(0, len(query) * length + 1, length, dtype=torch.int32, device=query.device)
        return flash_attention(query, key, value, cu_seqlens, length, window)
    if length <= window:
        if documents is not None:
            return document_attention(query, key, value, documents)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    padding = -length % window
    query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
    query = query.unflatten(-2, (-1, window))  # [B, H, blocks, window, h']
    key, value = _with_block_before(key, window), _with_block_before(value, window)  # [B, H, blocks, 2 window, h']
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)[None]  # column - window is the position in the own block
    visible = (column > row) & (column <= row + window)  # [window, 2 window]
    if documents is not None:
        # Padding is a document of its own; otherwise its queries would have no visible key, which gives NaN.
        starts = F.pad(documents.starts, (0, padding), value=length).unflatten(-1, (-1, window))  # [B, blocks, window]
        begins = torch.arange(0, length + padding, window, device=query.device)[:, None]  # first position of each block
        earliest = (starts - begins + window).unsqueeze(-1)  # first column of the query's document
        visible = (visible & (column >= earliest)).unsqueeze(1)  # [B, 1, blocks, window, 2 window]
        attended = F.scaled_dot_product_attention(query, key, value, visible)
    else:
        # The first block has no previous block: the zeros in its place must be masked.
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
