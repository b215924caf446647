"""MoSA written once more, token by token and head by head, from the equations of arXiv 2505.00315, section 3.1.

Slow on purpose, and independent: no batching, no gather, no code of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mosa_reference(
    hidden_states: Tensor,
    router_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    *,
    num_selected: int | Callable[[int], int],
    include_first_token: bool,
    rotary_percent: float,
    rotary_base: float,
    lengths: list[list[int]] | None = None,
    restart_rotary: bool = False,
) -> Tensor:
    """[B, T, h] to [B, T, h]; ``lengths`` are those of each sequence's documents."""
    batch, length, _ = hidden_states.shape
    heads, head_dim, _ = proj_weight.shape
    rows = [[torch.zeros_like(hidden_states[b, t]) for t in range(length)] for b in range(batch)]
    for b in range(batch):
        owner, firsts = [], []  # the document of each token; the first token of each document
        for number, size in enumerate(lengths[b] if lengths else [length]):
            firsts.append(len(owner))
            owner += [number] * size
        for e in range(heads):
            scores = [torch.sigmoid(hidden_states[b, t] @ router_weight[e]) for t in range(length)]
            values_of_scores = [score.item() for score in scores]
            if callable(num_selected):
                chosen = []
                for number, first in enumerate(firsts):
                    size = owner.count(number)
                    part = choose(values_of_scores[first : first + size], num_selected(size), [0] * include_first_token)
                    chosen += [first + t for t in part]
            else:
                chosen = choose(values_of_scores, num_selected, firsts if include_first_token else [])
            place = {t: t - firsts[owner[t]] if restart_rotary else t for t in chosen}
            w_q, w_k, w_v = qkv_weight[e].split(head_dim, dim=1)
            queries = {t: rotate(hidden_states[b, t] @ w_q, place[t], rotary_percent, rotary_base) for t in chosen}
            keys = {t: rotate(hidden_states[b, t] @ w_k, place[t], rotary_percent, rotary_base) for t in chosen}
            values = {t: hidden_states[b, t] @ w_v for t in chosen}
            for t in chosen:
                earlier = [s for s in chosen if s <= t and owner[s] == owner[t]]
                logits = torch.stack([queries[t] @ keys[s] / math.sqrt(head_dim) for s in earlier])
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                attended = sum(weights[i] * values[s] for i, s in enumerate(earlier))
                rows[b][t] = rows[b][t] + (attended * scores[t]) @ proj_weight[e]
    return torch.stack([torch.stack(row) for row in rows])


def choose(scores: list[float], num_selected: int, included: list[int]) -> list[int]:
    """Positions of the largest scores, earlier first among equals; those that must be included first of all."""
    ranked = sorted(range(len(scores)), key=lambda t: (t not in included, -scores[t] if t not in included else t, t))
    return sorted(ranked[:num_selected])


def rotate(vector: Tensor, position: int, rotary_percent: float, rotary_base: float) -> Tensor:
    """Rotate the pairs (i, i + r/2) of the first r channels by position * base^(-2i/r)."""
    size = int(len(vector) * rotary_percent / 2) * 2
    result = list(vector)
    for i in range(size // 2):
        angle = position * rotary_base ** (-2 * i / size)
        a, b = vector[i], vector[i + size // 2]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(result)


def largest_saved(run: Callable[[], Tensor]) -> int:
    """Return the size of the largest tensor that is saved for the backward pass of ``run``."""
    largest = 0

    def measure(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
        run().sum().backward()
    return largest
