"""Heads of the Routing Transformer (arXiv 2003.05997): attention within clusters of similar tokens; not causal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mosa import MosaConfig
from .tokens_mosa import Tokens, largest, rotate


class MosaRoutingHeads(nn.Module):
    """Heads whose query and key are the same unit vector; each centroid takes the tokens nearest to it.

    A token's output is the mean over the clusters that took it, and 0 if none did.
    """

    centroids: Tensor

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, size = config.num_routing_heads, config.hidden_size, config.head_dim
        self.qv_weight = nn.Parameter(torch.empty(2 * heads * size, width))  # query and value of head 0, of head 1, ...
        self.proj_weight = nn.Parameter(torch.empty(width, heads * size))
        self.register_buffer("centroids", torch.zeros(heads, config.routing_clusters, size, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.centroids
        super()._apply(fn, recurse)
        self.centroids = fn(kept.view(torch.int32)).view(torch.float32)  # not rounded to the model's dtype
        return self

    def forward(self, hidden_states: Tensor, tokens: Tokens, rows: None) -> Tensor:
        """Map [B, T, h] to [B, T, h], summed over heads."""
        batch, length, _ = hidden_states.shape
        size = self.config.head_dim
        states = F.linear(hidden_states, self.qv_weight).view(batch, length, -1, 2, size)
        query, value = states.permute(3, 0, 2, 1, 4).unbind(0)  # [B, heads, T, h']
        directions = F.normalize(query.float(), dim=-1)
        columns = self.clusters(directions, tokens)  # [B, heads * rho, k], padded with T
        cos, sin = (table.unsqueeze(1) for table in tokens.rotary)  # [B, 1, T, n]
        query = rotate(directions * size**0.5, cos, sin).to(value.dtype)
        heads = query.shape[1]
        # Unused slots come last, so that no other slot attends to them; they are scattered to a row that is dropped.
        sequences = torch.arange(batch * heads, device=columns.device)[:, None]
        slots = columns.view(batch * heads, -1)
        source = (sequences * length + slots.clamp(max=length - 1)).flatten()
        query, value = (part.reshape(-1, size)[source].view(*columns.shape, size) for part in (query, value))
        attended = F.scaled_dot_product_attention(query, query, value, is_causal=True)  # [B, heads * rho, k, h']
        target = (sequences * (length + 1) + slots).flatten()
        total = torch.zeros(batch * heads * (length + 1), size, dtype=torch.float32, device=columns.device)
        total = total.index_add(0, target, attended.reshape(-1, size).float())
        number = torch.zeros(len(total), dtype=torch.float32, device=columns.device)
        number = number.index_add(0, target, torch.ones_like(target, dtype=torch.float32))
        means = (total / number.clamp(min=1).unsqueeze(1)).to(value.dtype).view(batch, heads, length + 1, size)
        return F.linear(means[:, :, :length].transpose(1, 2).flatten(2), self.proj_weight)

    def clusters(self, directions: Tensor, tokens: Tokens) -> Tensor:
        """Return the columns of each cluster's tokens [B, heads * rho, k] in order, padded with T."""
        device = directions.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            scores = 1 + torch.einsum("bhtd,hcd->bhct", directions, self.centroids)  # rounded as in training
        return largest(scores.clamp(min=0).flatten(1, 2), tokens, self.config.num_clustered)
