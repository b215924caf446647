"""MoSA written once more, token by token and head by head, from the equations of arXiv 2505.00315, section 3.1.

Slow on purpose, and independent: no batching, no gather, no code of the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mosa_reference(
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_selected: int,
    include_first_token: bool,
    rotary_percent: float,
    rotary_base: float,
) -> Tensor:
    """[B, T, h] to [B, T, h]."""
    batch, length, _ = hidden_states.shape
    heads, head_dim, _ = proj_weight.shape
    rows = [[torch.zeros_like(hidden_states[b, t]) for t in range(length)] for b in range(batch)]
    for b in range(batch):
        for e in range(heads):
            scores = [torch.sigmoid(hidden_states[b, t] @ router_weight[e]) for t in range(length)]
            chosen = choose([score.item() for score in scores], num_selected, include_first_token)
            w_q, w_k, w_v = qkv_weight[e].split(head_dim, dim=1)
            queries = {t: rotate(hidden_states[b, t] @ w_q, t, rotary_percent, rotary_base) for t in chosen}
            keys = {t: rotate(hidden_states[b, t] @ w_k, t, rotary_percent, rotary_base) for t in chosen}
            values = {t: hidden_states[b, t] @ w_v for t in chosen}
            for t in chosen:
                earlier = [s for s in chosen if s <= t]
                logits = torch.stack([queries[t] @ keys[s] / math.sqrt(head_dim) for s in earlier])
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                attended = sum(weights[i] * values[s] for i, s in enumerate(earlier))
                rows[b][t] = rows[b][t] + (attended * scores[t]) @ proj_weight[e]
    return torch.stack([torch.stack(row) for row in rows])


def choose(scores: list[float], num_selected: int, include_first_token: bool) -> list[int]:
    """Positions of the largest scores, earlier first among equals; token 0 first of all if it must be included."""
    ranked = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    if include_first_token:
        ranked = [0] + [t for t in ranked if t != 0]
    return sorted(ranked[:num_selected])


def rotate(vector: Tensor, position: int, rotary_percent: float, rotary_base: float) -> Tensor:
    """Turn the pairs (i, i + r/2) of the first r channels by position * base^(-2i/r)."""
    size = int(len(vector) * rotary_percent / 2) * 2
    result = list(vector)
    for i in range(size // 2):
        angle = position * rotary_base ** (-2 * i / size)
        a, b = vector[i], vector[i + size // 2]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(result)
