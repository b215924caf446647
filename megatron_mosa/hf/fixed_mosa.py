"""Fixed heads: attention among every ``fixed_stride``-th token of a sequence, with or without a cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mosa import MosaConfig
from .rows_mosa import FixedRows, to_dtype
from .tokens_mosa import Tokens, rotate


class MosaFixedHeads(nn.Module):
    """Heads that attend among tokens 0, s, 2s, ... of a sequence, s = ``fixed_stride``; other tokens get no output."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.num_fixed_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, size, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(size, width, bias=False)

    def forward(self, hidden_states: Tensor, tokens: Tokens, rows: FixedRows | None) -> Tensor:
        """Map [B, T, h] to [B, T, h]. The tokens attend to those in ``rows``, too, and are added to them."""
        strided = tokens.strided
        assert strided is not None
        output = torch.zeros_like(hidden_states)
        batch, _, width = hidden_states.shape
        columns = strided.columns.expand(batch, -1)  # [B, k]
        if columns.shape[1] == 0:
            return output
        index = columns.unsqueeze(-1).expand(-1, -1, width)
        selected = hidden_states.gather(1, index)  # [B, k, h]
        query, key, value = (
            projection(selected).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, k, h']
        tables = (table.expand(batch, -1, -1) for table in tokens.rotary)
        cos, sin = (
            table.gather(1, columns.unsqueeze(-1).expand(-1, -1, table.shape[2])).unsqueeze(1) for table in tables
        )
        query, key = rotate(torch.stack((query, key)), cos, sin)
        visible = None
        if rows is not None:
            has_earlier = rows.keys is not None
            own = strided.rows.expand(batch, -1)  # [B, k]
            stored = rows.add(key, value, own, strided.valid, strided.total)
            if has_earlier:
                key, value = to_dtype(query.dtype, stored)  # [B, heads, rows, h']
                visible = (torch.arange(key.shape[2], device=key.device) <= own.unsqueeze(-1)).unsqueeze(1)
        # Without earlier rows, each sequence's tokens come first among the k, in order.
        attended = F.scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None)
        projected = self.o_proj(attended.transpose(1, 2).flatten(2))  # [B, k, h]
        if strided.valid is not None:
            projected = projected.masked_fill(~strided.valid.unsqueeze(-1), 0)
        return output.scatter(1, index, projected.to(output.dtype))
