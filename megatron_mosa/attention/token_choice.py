"""Token choice: each token takes the heads of its largest scores, and loss-free balancing keeps the loads alike.

Causal by construction: a token's choice depends on its own scores alone. A bias per head, which is added to the scores
for the choice and not for the gate, follows the loads of past steps (arXiv 2408.15664), so no loss disturbs training.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_heads(scores: Tensor, bias: Tensor, number: int) -> Tensor:
    """Return which heads each token takes: those of the largest sums of score and bias. Ties go to the earlier head.

    Args:
        scores: [B, E, T].
        bias: [E], fp32.
        number: of heads that a token takes, 1 to E.

    Returns:
        bool [B, E, T], ``number`` of each token's E heads.
    """
    keys = scores + bias.to(scores.dtype)[:, None]
    least = keys.topk(number, dim=1).values[:, -1:]  # [B, 1, T]
    is_above, is_tied = keys > least, keys == least
    room = number - is_above.sum(dim=1, keepdim=True)
    return is_above | (is_tied & (is_tied.cumsum(dim=1, dtype=torch.int32) <= room))


def balanced(bias: Tensor, counts: Tensor, target: Tensor, rate: float) -> Tensor:
    """Return the biases after a step: those of heads that too few tokens took rise by ``rate``, others fall.

    Args:
        bias, counts: [..., E], and how many tokens took each head.
        target: [..., 1], the count of each head if all were alike.
    """
    return bias + rate * torch.sign(target - counts).to(bias.dtype)
