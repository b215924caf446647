"""Dense and local heads: attention to all previous tokens, or to those in a window, with or without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from .configuration_mosa import MosaConfig
from .dense_kernels_mosa import attend_to_rows, rotate_and_store
from .rows_mosa import DenseRows, WindowRows, to_dtype
from .tokens_mosa import Column, Tokens, rotate

QUERY_CHUNK = 512  # queries per attention call if a mask is needed


class MosaCausalHeads(nn.Module):
    """Heads that attend to all previous tokens, or to the last ``window`` tokens including the token itself."""

    def __init__(self, config: MosaConfig, heads: int, groups: int, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.window = window
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, heads, bias=False) if config.attention_gate else None

    def forward(self, hidden_states: Tensor, tokens: Tokens, rows: DenseRows | WindowRows | None) -> Tensor:
        """Map [B, T, h] to [B, T, h]. The tokens attend to those in ``rows``, too, and are added to them."""
        query, key, value = self.project(hidden_states, tokens)
        if self.window is None:
            assert rows is None or isinstance(rows, DenseRows)
            key, value = (key, value) if rows is None else to_dtype(query.dtype, rows.append(key, value))
            attended = causal_attention(query, key, value, tokens.valid_keys)
        else:
            assert rows is None or isinstance(rows, WindowRows)
            attended = self.attend_in_window(query, key, value, tokens, rows)
        return self.project_out(attended.transpose(1, 2), hidden_states)

    def step(self, hidden_states: Tensor, tokens: Tokens, rows: DenseRows | WindowRows, column: Column) -> Tensor:
        """Map one token of each sequence, [B, 1, h] to [B, 1, h], as a step that can be captured; see graph_mosa.py."""
        row, lengths, valid = column
        if isinstance(rows, WindowRows):
            row, lengths = rows.count_one(tokens.positions, tokens.valid)
            valid = None
        assert rows.keys is not None and rows.values is not None
        query, key, value = (projection(hidden_states)[:, 0] for projection in (self.q_proj, self.k_proj, self.v_proj))
        query = rotate_and_store(query, key, value, tokens.rotary, row, rows.keys, rows.values)
        attended = attend_to_rows(query, rows.keys, rows.values, lengths, valid)
        return self.project_out(attended[:, None], hidden_states)

    def project(self, hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [B, heads or groups, T, h'], rotated."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (table.unsqueeze(1) for table in tokens.rotary)  # [B, 1, T, n]
        rotated = rotate(torch.cat((query, key), dim=1), cos, sin)
        query, key = rotated.split((query.shape[1], key.shape[1]), dim=1)
        return query, key, value

    def project_out(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """Gate what was attended, [B, T, heads, h'], and sum over the heads."""
        if self.g_proj is not None:
            gate = torch.sigmoid(self.g_proj(hidden_states).float()).unsqueeze(-1)
            attended = (attended.float() * gate).to(attended.dtype)
        return self.o_proj(attended.flatten(2))

    def attend_in_window(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, rows: WindowRows | None
    ) -> Tensor:
        """Attend among [B, heads, T, h'], in chunks if ``rows`` stores the window."""
        assert self.window is not None
        batch, length = query.shape[0], query.shape[2]
        positions = tokens.positions.expand(batch, -1)  # [B, T]
        size = length if rows is None else max(self.window, QUERY_CHUNK)
        outputs = []
        for start in range(0, length, size):
            chunk = slice(start, start + size)
            query_positions = positions[:, chunk]
            valid = None if tokens.valid is None else tokens.valid[:, chunk]
            keys, values, key_positions, valid_keys = key[:, :, chunk], value[:, :, chunk], query_positions, valid
            past = None if rows is None else rows.read()
            if past is not None:
                past_keys, past_values = to_dtype(query.dtype, past[:2])
                keys, values = torch.cat((past_keys, keys), dim=2), torch.cat((past_values, values), dim=2)
                key_positions = torch.cat((past[2], query_positions), dim=1)  # [B, window + t]
                if valid is not None:
                    valid_keys = torch.cat((torch.ones_like(past[2], dtype=torch.bool), valid), dim=1)
            distance = query_positions[:, :, None] - key_positions[:, None]  # [B, t, n]
            visible = (distance >= 0) & (distance < self.window) & (key_positions >= 0)[:, None]
            if valid is not None and valid_keys is not None:
                # Padding sees everything, since a query without any key would give NaN.
                visible = visible & valid_keys[:, None] | ~valid[:, :, None]
            outputs.append(F.scaled_dot_product_attention(query[:, :, chunk], keys, values, visible[:, None]))
            if rows is not None:
                rows.write(key[:, :, chunk], value[:, :, chunk], query_positions, valid)
        return torch.cat(outputs, dim=2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Causal attention of the last T columns, [B, heads, T, h'], over all n columns, [B, groups, n, h'].

    Args:
        query: [B, heads, T, h'].
        key, value: [B, groups, n, h'].
        valid: [B, n], False at padding, which only attends to itself and nothing else attends to; None: no padding.
    """
    length, columns, groups = query.shape[2], key.shape[2], key.shape[1]
    if length == 1:  # queries that share a key become rows of one matrix product
        visible = None
        if valid is not None:
            visible = (valid | (torch.arange(columns, device=query.device) == columns - 1))[:, None, None]
        rows = query.squeeze(2).unflatten(1, (groups, -1))  # [B, groups, queries, h']
        return F.scaled_dot_product_attention(rows, key, value, visible).flatten(1, 2).unsqueeze(2)
    repeats = query.shape[1] // groups
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if valid is None and length == columns:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    own = torch.arange(columns - length, columns, device=query.device)[:, None]  # [T, 1]
    column = torch.arange(columns, device=query.device)
    outputs = []
    for start in range(0, length, QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        end = columns - length + start + chunk.shape[2]
        if valid is None:
            visible: Any = causal_lower_right(chunk.shape[2], end)
        else:
            at = own[start : start + QUERY_CHUNK]
            visible = (column[:end] <= at) & valid[:, None, None, :end] | (column[:end] == at)
        outputs.append(F.scaled_dot_product_attention(chunk, key[:, :, :end], value[:, :, :end], visible))
    return torch.cat(outputs, dim=2)
